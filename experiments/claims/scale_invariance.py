"""The paper's identities: what batch normalization does not see, and what it does to gradients."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bnjax.functional import BatchStats, batch_norm_train
from bnjax.losses import cross_entropy
from experiments.claims import Check, Claim, Evidence, Settings, collect, draw_lines

SCALES = (0.01, 0.1, 10.0, 100.0)
BATCH, WIDTH = 100, 32
TOLERANCE = 1e-10
SCALED = {"output": "BN(aWu)", "u": "its gradient in u", "W": "its gradient in aW"}
_norms = partial(jnp.linalg.norm, axis=0)


def run(settings: Settings) -> Evidence:
    """The relative error of each identity in float64, by scale and the largest."""
    keys = settings.keys(5, 20)
    batch, _ = settings.data(BATCH)
    with jax.enable_x64(True):
        u, labels = jnp.asarray(batch.images.reshape(BATCH, -1) / 255), jnp.asarray(batch.labels)
        errors = jax.jit(jax.vmap(lambda key: _errors(key, u, labels)))(keys)
    largest = [np.asarray(found).max(axis=1) for found in errors]
    panels = {"Relative error in float64": dict(zip(SCALED, errors, strict=False))}
    return collect(CLAIM.checks, largest, panels, SCALES)


def _normalize(x: Array) -> Array:
    stats = BatchStats(jnp.zeros(x.shape[1]), jnp.ones(x.shape[1]))
    return batch_norm_train(x, None, None, stats, epsilon=0.0)[0]


def _errors(key: Array, u: Array, labels: Array) -> tuple[Array, ...]:
    """Of each identity in turn, `[N]`, of the first three for each scale."""
    first, second = jax.random.split(key)
    w = jax.random.normal(first, (u.shape[1], WIDTH), jnp.float64)
    gamma = jax.random.uniform(second, (WIDTH,), jnp.float64, 0.5, 2.0)

    def loss(y: Array) -> Array:
        return cross_entropy(gamma[None] * y, labels).mean()

    def through(w: Array, u: Array) -> Array:
        return loss(_normalize(u @ w))

    at_w, at_u = jax.grad(through, argnums=(0, 1))(w, u)

    def scaled(a: Array) -> tuple[Array, Array, Array]:
        by_w, by_u = jax.grad(through, argnums=(0, 1))(a * w, u)
        return (
            _relative(_normalize(u @ (a * w)), _normalize(u @ w)),
            _relative(by_u, at_u),
            _relative(a * by_w, at_w),
        )

    orthogonal = jnp.abs(jnp.sum(w * at_w, axis=0)) / _norms(w) / _norms(at_w)
    theorem = _theorem_4_1(u @ w, gamma, loss)
    return *jax.vmap(scaled)(jnp.asarray(SCALES)), orthogonal, theorem[None]


def _theorem_4_1(y: Array, gamma: Array, loss: Callable[[Array], Array]) -> Array:
    """|dL/dy|^2 = gamma^2 / sigma^2 (|g|^2 - (sum g)^2 / m - <g, y_hat>^2 / m), for each unit.

    y enters the normalization, y_hat leaves it, and gamma g is the gradient of the loss in y_hat.
    """
    y_hat = _normalize(y)
    g = jax.grad(loss)(y_hat) / gamma[None]
    before = jax.grad(lambda y: loss(_normalize(y)))(y)
    left_out = jnp.sum(g, axis=0) ** 2 + jnp.sum(g * y_hat, axis=0) ** 2
    expected = gamma**2 / y.var(axis=0) * (jnp.sum(g**2, axis=0) - left_out / len(y))
    return _relative(_norms(before) ** 2, expected)


def _relative(found: Array, expected: Array) -> Array:
    return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


def _check(identity: str, published: str) -> Check:
    return Check(f"{identity}, largest relative error", published, 0.0, TOLERANCE, "each")


CLAIM = Claim(
    id="scale-invariance",
    statement="Batch normalization does not see the scale of the weights before it, whose gradient "
    "shrinks as they grow and is orthogonal to them.",
    source="Ioffe & Szegedy (2015), section 3.3; Santurkar et al., How does batch normalization "
    "help optimization? (2018), theorem 4.1 (an equality for the same gradient from above)",
    setup=f"One layer of {WIDTH}, {BATCH} training images u, normal weights W, cross entropy, "
    f"epsilon 0, float64; W is multiplied by {', '.join(f'{a:g}' for a in SCALES)}.",
    checks=(
        _check("output", "BN(aWu) = BN(Wu)"),
        _check("gradient in u", "dBN(aWu)/du = dBN(Wu)/du"),
        _check("gradient in W", "dBN(aWu)/d(aW) = 1/a dBN(Wu)/dW"),
        _check("W and its gradient, cosine", "<W, dW> = 0"),
        _check("norm of the gradient before BN", "Santurkar et al., theorem 4.1"),
    ),
    seconds=(3, 5),
    run=run,
    draw=draw_lines(SCALED, xlabel="a", xscale="log", yscale="log"),
)
