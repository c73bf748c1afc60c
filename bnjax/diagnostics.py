"""Probes: pure functions `(model, variables, batch) -> dict of arrays` that look into a network.

`model` is any module called as `model.apply(variables, images, train=...)`. Its layers are the
calls of `nn.Dense`, `nn.Conv` and what derives from them (`bnjax.layer_taps`), from the input on;
the last gives the logits, the others are hidden, D of them. The units of features `[N, H]` are
columns, those of `[N, H, W, C]` channels, and positions count as examples.
A `batch` has `[N, ...]` images; only the probes of gradients, which work in training mode, read its
labels. `train=True` normalizes with the statistics of the batch, as a network at initialization
must; by default the running ones are used. Nothing draws random numbers: dropout must be off in
training. What a module calls inside `nn.scan`, `nn.remat` and the like cannot be looked at: a
ValueError.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from jax import Array

from bnjax import layer_taps
from bnjax.layer_taps import LAYERS, Variables
from bnjax.losses import cross_entropy
from bnjax.training import Batch, to_float, vary_with


def features(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """What leaves each hidden layer: `{"features_1": [N, H] or [N, H, W, C], ...}`.

    Where the network calls a `bnjax.models.Activation`, what enters a layer's activation is what
    enters that, and what leaves the layer is what leaves that, or a normalization after it: of an
    `MLP` what `return_features=True` returns. In a module without them what enters the activation
    is what leaves the layer, or the last normalization after it (Flax's or bnjax's), and what
    leaves the layer is what the next one is given: pooled and flattened if the module does that.
    """
    layers = layer_taps.hidden(model, variables, batch.images, train)
    return _numbered("features", (layer.leaving for layer in layers))


def preactivations(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """What enters each hidden layer's activation, as `features`: `{"preactivations_1": ...}`."""
    layers = layer_taps.hidden(model, variables, batch.images, train)
    return _numbered("preactivations", (layer.entering for layer in layers))


def gradient_norms(model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
    """Frobenius norm of the gradient of the mean cross entropy in each kernel.

    Returns:
        `{"Dense_0": [], ...}`, a scalar for each layer, by its path, from the input on.
    """
    params = vary_with(batch, variables["params"])
    gradients = flatten_dict(jax.grad(_loss(model, variables, batch))(params))
    layers = layer_taps.outputs(model, variables, batch.images, LAYERS, train=True)
    kernels = {"/".join(path): gradients[*path, "kernel"] for path in layers}
    return {path: jnp.linalg.norm(kernel.ravel()) for path, kernel in kernels.items()}


def backpropagated_norms(model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
    """Frobenius norm of the gradient of the mean cross entropy in what leaves each layer.

    Unlike the gradient in a kernel it is not summed over examples, which may cancel or add up. What
    leaves a layer is not yet normalized; all calls of a layer count together.

    Returns:
        `{"Dense_0": [], ...}`, as `gradient_norms`.
    """
    calls = layer_taps.outputs(model, variables, batch.images, LAYERS, train=True)

    def loss(shifts: dict[layer_taps.Path, list[Array]]) -> Array:
        rest = {path: iter(of_calls) for path, of_calls in shifts.items()}

        def shift(module: nn.Module, x: Any, y: Any) -> Any:
            return y + next(rest[module.path]) if isinstance(module, LAYERS) else y

        with layer_taps.watch(shift):
            return _loss(model, variables, batch)(variables["params"])

    shifts = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), calls)
    gradients = jax.grad(loss)(vary_with(batch, shifts))
    return {"/".join(path): optax.tree.norm(gradients[path]) for path in calls}


def landscape(
    model: nn.Module, variables: Variables, batch: Batch, *, step_sizes: Sequence[float]
) -> dict[str, Array]:
    """Loss and gradient of a batch along its own gradient direction.

        loss(w - s g)   and   |grad loss(w - s g) - g|,   g = grad loss(w),   for each step size s

    Returns:
        `{"losses": [S], "gradient_distances": [S]}`.

    Source: Santurkar et al., "How does batch normalization help optimization?" (2018), figure 4.
    """
    loss = jax.value_and_grad(_loss(model, variables, batch))
    params = vary_with(batch, variables["params"])
    here, gradient = loss(params)

    def at(step_size: Array) -> tuple[Array, Array]:
        value, other = loss(jax.tree.map(lambda w, g: w - step_size * g, params, gradient))
        return value, optax.tree.norm(jax.tree.map(jnp.subtract, other, gradient))

    losses, distances = jax.lax.map(at, jnp.asarray(step_sizes, here.dtype))
    return {"losses": losses, "gradient_distances": distances}


def activation_percentiles(
    model: nn.Module,
    variables: Variables,
    batch: Batch,
    *,
    percentiles: Sequence[float] = (15, 50, 85),
    train: bool = False,
) -> dict[str, Array]:
    """Percentiles of what enters each unit's activation: `{"percentiles_1": [P, H or C], ...}`.

    Source: Ioffe & Szegedy (2015), figure 1 (b, c), draw them for one unit.
    """
    layers = preactivations(model, variables, batch, train=train).values()
    wanted = jnp.asarray(percentiles)
    return _numbered("percentiles", (jnp.percentile(_units(x), wanted, axis=0) for x in layers))


def saturation(
    model: nn.Module,
    variables: Variables,
    batch: Batch,
    *,
    slope: float = 0.01,
    train: bool = False,
) -> dict[str, Array]:
    """Share of each hidden layer's values at which the activation is flat: `{"saturation": [D]}`.

    Flat means that the derivative of the layer's activation is smaller than `slope`: a sigmoid
    beyond 4.58, tanh beyond 2.99, ReLU below 0.

    Raises:
        ValueError: if a hidden layer does not call its activation as `bnjax.models.Activation`.
    """

    def flat(layer: layer_taps.Hidden) -> Array:
        if layer.activation is None:
            raise ValueError(
                "the activation of a hidden layer cannot be seen: call it as "
                "bnjax.models.Activation(function)(x)"
            )
        derivative = jax.vmap(jax.grad(layer.activation.function))
        return jnp.mean(jnp.abs(derivative(layer.entering.ravel())) < slope)

    layers = layer_taps.hidden(model, variables, batch.images, train)
    return {"saturation": jnp.stack([flat(layer) for layer in layers])}


def dead_units(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """Share of each layer's units that are the same for every example: `{"dead_units": [D]}`."""
    layers = features(model, variables, batch, train=train).values()
    return {"dead_units": jnp.stack([jnp.mean(jnp.ptp(_units(x), axis=0) == 0) for x in layers])}


def cosine_similarity(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """Mean cosine of the angle between two examples' flattened features, over all pairs.

        (|sum_i u_i|^2 - N) / (N (N - 1)),   u_i = x_i / |x_i|

    Returns:
        `{"cosine_similarity": [D]}`; 1 where all examples look alike but for their length. An
        example whose features are all 0 counts as perpendicular to all others.
    """

    def mean_cosine(layer: Array) -> Array:
        count = layer.shape[0]
        layer = layer.reshape(count, -1)
        length = jnp.linalg.norm(layer, axis=1, keepdims=True)
        units = layer / jnp.where(length == 0, 1, length)
        return (jnp.sum(units.sum(axis=0) ** 2) - jnp.sum(units**2)) / (count * (count - 1))

    layers = features(model, variables, batch, train=train).values()
    return {"cosine_similarity": jnp.stack([mean_cosine(layer) for layer in layers])}


def effective_rank(
    model: nn.Module,
    variables: Variables,
    batch: Batch,
    *,
    threshold: float = 0.01,
    train: bool = False,
) -> dict[str, Array]:
    """Number of singular values of each layer's features above `threshold` of the largest.

    Features are the matrix `[N, H]` of examples, with channels and positions flattened.

    Returns:
        `{"effective_rank": [D]}`, integers; 0 where all features are 0.

    Source: Daneshmand et al., "Batch normalization provably avoids rank collapse" (2020), section
    2, count the same of the features' Gram matrix, whose eigenvalues are squares.
    """

    def rank(layer: Array) -> Array:
        values = jnp.linalg.svd(layer.reshape(layer.shape[0], -1), compute_uv=False)
        return jnp.sum(values > threshold * values[0])

    layers = features(model, variables, batch, train=train).values()
    return {"effective_rank": jnp.stack([rank(layer) for layer in layers])}


def train_eval_discrepancy(
    model: nn.Module, variables: Variables, batch: Batch
) -> dict[str, Array]:
    """What forgetting to leave training mode does to the predictions of a batch.

    Returns:
        `{"changed": [], "logits": []}`: the share of examples that get another class, and the root
        mean square difference of the logits.
    """
    images = to_float(batch.images)
    evaluation, training = (
        model.apply(variables, images, train=train, mutable=["batch_stats"])[0]
        for train in (False, True)
    )
    return {
        "changed": jnp.mean(evaluation.argmax(axis=1) != training.argmax(axis=1)),
        "logits": jnp.sqrt(jnp.mean((evaluation - training) ** 2)),
    }


def _loss(model: nn.Module, variables: Variables, batch: Batch) -> Callable[[Any], Array]:
    """The mean cross entropy of the batch in training mode, as a function of the parameters."""

    def loss(params: Any) -> Array:
        there, images = {**variables, "params": params}, to_float(batch.images)
        logits, _ = model.apply(there, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, batch.labels).mean()

    return loss


def _numbered(name: str, layers: Iterable[Array]) -> dict[str, Array]:
    return {f"{name}_{number}": layer for number, layer in enumerate(layers, start=1)}


def _units(layer: Array) -> Array:
    """`[N, H]`, or `[N * H * W, C]`."""
    return layer.reshape(-1, layer.shape[-1])
