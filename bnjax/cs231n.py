"""Batch and layer normalization as Stanford's CS231n names them (assignment 2), forward and back.

The assignment asks for the gradient twice: step by step through the computational graph, and
simplified on paper to one expression. Both are here, and `jax.vjp` of the forward pass is a third.
Everywhere `x`, `out` and their gradients `dx`, `dout` are `[N, D]` floating point, the scale gamma,
the shift beta and theirs are `[D]`. Unlike the assignment's, these functions change no argument:
`bn_param` comes back as a new dictionary. Research code uses `bnjax.functional`.

Source: CS231n, assignment 2, `layers.py`; Ioffe & Szegedy (2015), algorithm 1 and section 3; Ba,
Kiros & Hinton, "Layer Normalization" (2016), section 3.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class Cache:
    """What the forward pass keeps for the backward passes.

    Attributes:
        x_centred, x_hat, std: as in `batchnorm_forward`, std `[1, D]`.
        gamma: `[1, D]`, or `[N, 1]` in layer normalization.
        axis: the axis or axes that the gradients of gamma and beta are summed over.
        shape: what `dout` is reshaped to before, in Fortran's order.
    """

    x_centred: Array
    x_hat: Array
    std: Array
    gamma: Array
    axis: int | tuple[int, ...] = flax.struct.field(pytree_node=False)
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)


def batchnorm_forward(
    x: Array, gamma: Array, beta: Array, bn_param: Mapping[str, Any]
) -> tuple[Array, Cache | None, dict[str, Any]]:
    """Batch normalization of the columns of `x`.

        mu = mean(x)    var = mean((x - mu)^2)    std = sqrt(var + eps)
        x_hat = (x - mu) / std                    out = gamma * x_hat + beta
        running = momentum * running + (1 - momentum) * (mu or var)

    with means over axis 0. In mode "test" the running statistics take the place of mu and var.

    Args:
        x, gamma, beta: as the module says.
        bn_param: `mode` ("train" or "test", required); `eps` (1e-5); `momentum` (0.9), what the
            running statistics keep of themselves; `running_mean` and `running_var` (`[D]`, from
            zeros). Where `axis` (0) is another one, the rows of `x` are features in disguise:
            gamma and beta are columns `[N, 1]`, their gradients are those of `dout` in `shape`
            (that of `x`) summed over `axis`, and nothing is tracked.

    Returns:
        `out`; the cache for the backward passes (None in mode "test"); `bn_param` with the new
        `running_mean` and `running_var`.

    Raises:
        ValueError: if the mode is neither "train" nor "test", `x` is not `[N, D]`, or gamma and
            beta do not fit it.

    Example:
        >>> x = jnp.array([[1.0], [3.0]])
        >>> gamma, beta = jnp.array([2.0]), jnp.array([5.0])
        >>> bn_param = {"mode": "train", "momentum": 0.5}
        >>> out, cache, bn_param = batchnorm_forward(x, gamma, beta, bn_param)
        >>> print(out.ravel().round(2), bn_param["running_mean"])
        [3. 7.] [1.]
    """
    x, gamma, beta = _as_matrix(x), jnp.atleast_2d(gamma), jnp.atleast_2d(beta)
    if {gamma.shape, beta.shape} - {(1, x.shape[1]), (x.shape[0], 1), x.shape}:
        raise ValueError(f"gamma and beta have shapes {gamma.shape}, {beta.shape}: x has {x.shape}")
    mode, axis = bn_param.get("mode"), bn_param.get("axis", 0)
    eps, momentum = bn_param.get("eps", 1e-5), bn_param.get("momentum", 0.9)
    running_mean = bn_param.get("running_mean", jnp.zeros(x.shape[1], x.dtype))
    running_var = bn_param.get("running_var", jnp.zeros(x.shape[1], x.dtype))

    if mode == "train":
        mu = x.mean(axis=0)
        x_centred = x - mu[None]
        var = jnp.square(x_centred).mean(axis=0)
        std = jnp.sqrt(var + eps)[None]
        x_hat = x_centred / std
        cache = Cache(x_centred, x_hat, std, gamma, axis, bn_param.get("shape", x.shape))
        if axis == 0:
            running_mean = momentum * running_mean + (1 - momentum) * mu
            running_var = momentum * running_var + (1 - momentum) * var
    elif mode == "test":
        x_hat = (x - running_mean[None]) / jnp.sqrt(running_var + eps)[None]
        cache = None
    else:
        raise ValueError(f"mode is {mode!r}: expected 'train' or 'test' in bn_param")

    running = {"running_mean": running_mean, "running_var": running_var}
    return gamma * x_hat + beta, cache, {**bn_param, **running}


def batchnorm_backward(dout: Array, cache: Cache | None) -> tuple[Array, Array, Array]:
    """The gradients, step by step back through the graph of `batchnorm_forward`.

        out = gamma * x_hat + beta      dbeta = sum(dout), dgamma = sum(dout * x_hat),
                                        dx_hat = gamma * dout
        x_hat = x_centred / std         dx_centred = dx_hat / std,
                                        dstd = -sum(dx_hat * x_centred) / std^2
        std = sqrt(var + eps)           dvar = dstd / (2 std)
        var = mean(x_centred^2)         dx_centred += 2 x_centred dvar / N
        x_centred = x - mu              dx = dx_centred, dmu = -sum(dx_centred)
        mu = mean(x)                    dx += dmu / N

    Returns:
        `dx`, `dgamma` and `dbeta`, of the dtype of the inputs.

    Raises:
        ValueError: if the cache is None, that of mode "test".

    Example:
        >>> x, ones = jnp.array([[1.0], [3.0]]), jnp.ones(1)
        >>> _, cache, _ = batchnorm_forward(x, ones, ones, {"mode": "train"})
        >>> dx, dgamma, dbeta = batchnorm_backward(jnp.array([[1.0], [2.0]]), cache)
        >>> print(dgamma.round(3), dbeta)
        [1.] [3.]
    """
    cache, dx_hat, dgamma, dbeta = _scale_and_shift_backward(dout, cache)
    n = dout.shape[0]
    dx_centred = dx_hat / cache.std
    dstd = -(dx_hat * cache.x_centred).sum(axis=0, keepdims=True) / jnp.square(cache.std)
    dvar = dstd / (2 * cache.std)
    dx_centred = dx_centred + 2 * cache.x_centred * dvar / n
    dmu = -dx_centred.sum(axis=0, keepdims=True)
    return dx_centred + dmu / n, dgamma, dbeta


def batchnorm_backward_alt(dout: Array, cache: Cache | None) -> tuple[Array, Array, Array]:
    """The same gradients, simplified on paper.

        dx = (dx_hat - mean(dx_hat) - x_hat * mean(dx_hat * x_hat)) / std,   dx_hat = gamma * dout

    Results and errors as for `batchnorm_backward`.
    """
    cache, dx_hat, dgamma, dbeta = _scale_and_shift_backward(dout, cache)
    along = cache.x_hat * (dx_hat * cache.x_hat).mean(axis=0, keepdims=True)
    dx = (dx_hat - dx_hat.mean(axis=0, keepdims=True) - along) / cache.std
    return dx, dgamma, dbeta


def layernorm_forward(
    x: Array, gamma: Array, beta: Array, ln_param: Mapping[str, Any]
) -> tuple[Array, Cache | None]:
    """Layer normalization: every row of `x` has mean 0 and variance 1, then gamma and beta.

    It is batch normalization of the transpose, in training mode always, with `axis` 1:

        out.T = batchnorm_forward(x.T, gamma[:, None], beta[:, None])

    `ln_param` has `eps` (1e-5). Results and errors as for `batchnorm_forward`, less `bn_param`.

    Example:
        >>> out, _ = layernorm_forward(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2), {})
        >>> print(out.round(3))
        [[-1.  1.]]
    """
    x = _as_matrix(x)
    columns = jnp.atleast_2d(gamma).T, jnp.atleast_2d(beta).T
    out, cache, _ = batchnorm_forward(x.T, *columns, {**ln_param, "mode": "train", "axis": 1})
    return out.T, cache


def layernorm_backward(dout: Array, cache: Cache | None) -> tuple[Array, Array, Array]:
    """The gradients of `layernorm_forward`: those of batch normalization of the transpose.

        dx.T, dgamma, dbeta = batchnorm_backward_alt(dout.T)

    Results as for `batchnorm_backward`.

    Example:
        >>> _, cache = layernorm_forward(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2), {})
        >>> dx, dgamma, dbeta = layernorm_backward(jnp.array([[1.0, 2.0]]), cache)
        >>> print(dgamma.round(3), dbeta)
        [-1.  2.] [1. 2.]
    """
    dx, dgamma, dbeta = batchnorm_backward_alt(dout.T, cache)
    return dx.T, dgamma, dbeta


def _as_matrix(x: Array) -> Array:
    if jnp.ndim(x) != 2:
        raise ValueError(f"x has shape {jnp.shape(x)}: expected [N, D]")
    return jnp.asarray(x)


def _scale_and_shift_backward(
    dout: Array, cache: Cache | None
) -> tuple[Cache, Array, Array, Array]:
    """The cache, which must be one, and `dx_hat`, `dgamma` and `dbeta`."""
    if cache is None:
        raise ValueError("the cache is None: expected that of a forward pass in mode 'train'")
    dout = jnp.asarray(dout)
    dgamma = (dout * cache.x_hat).reshape(cache.shape, order="F").sum(axis=cache.axis)
    dbeta = dout.reshape(cache.shape, order="F").sum(axis=cache.axis)
    return cache, dout * cache.gamma, dgamma, dbeta
