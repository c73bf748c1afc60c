"""Looking into a network: what its layers give, its gradients, and what that says.

`model` is any module called as `model.apply(variables, images, train=...)`. Its layers are the
calls of `nn.Dense`, `nn.Conv` and what derives from them (`bnjax.layer_taps`), from the input on;
the last gives the logits, the others are hidden. A `batch` has `[N, ...]` images; only gradients,
which are those of training mode, read its labels. `train=True` normalizes with the statistics of
the batch, as a network at initialization must; by default the running ones are used. Nothing draws
random numbers: dropout must be off in training. What a module calls inside `nn.scan`, `nn.remat`
and the like cannot be looked at: a ValueError.

Example:
    >>> from bnjax.models import MLP
    >>> model, batch = MLP((3, 3), 4), Batch(jnp.eye(4), jnp.arange(4))
    >>> variables = model.init(jax.random.key(0), batch.images, train=True)
    >>> layers = features(model, variables, batch)
    >>> {name: int(effective_rank(layer)) for name, layer in layers.items()}
    {'features_1': 3, 'features_2': 2}
"""

from collections.abc import Callable, Sequence
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
    return {f"features_{k}": layer.leaving for k, layer in enumerate(layers, start=1)}


def preactivations(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """What enters each hidden layer's activation, as `features`: `{"preactivations_1": ...}`."""
    layers = layer_taps.hidden(model, variables, batch.images, train)
    return {f"preactivations_{k}": layer.entering for k, layer in enumerate(layers, start=1)}


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


def saturation(
    values: Array, activation: Callable[[Array], Array], *, slope: float = 0.01
) -> Array:
    """Share of the values that enter an activation at which it is flat.

    Flat means that its derivative is smaller than `slope`: a sigmoid beyond 4.58, tanh beyond 2.99,
    ReLU below 0.
    """
    derivatives = jax.vmap(jax.grad(activation))(values.ravel())
    return jnp.mean(jnp.abs(derivatives) < slope)


def dead_units(layer: Array) -> Array:
    """Share of a layer's units that are the same for every example.

    Units are the columns of its features `[N, H]`, or the channels of `[N, H, W, C]`.
    """
    return jnp.mean(jnp.ptp(layer, axis=range(layer.ndim - 1)) == 0)


def cosine_similarity(layer: Array) -> Array:
    """Mean cosine of the angle between two examples' features `[N, ...]`, over all pairs.

        (|sum_i u_i|^2 - N) / (N (N - 1)),   u_i = x_i / |x_i|

    It is 1 where all examples look alike but for their length. One whose features are all 0 counts
    as perpendicular to all others.
    """
    count = layer.shape[0]
    rows = layer.reshape(count, -1)
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / jnp.where(length == 0, 1, length)
    return (jnp.sum(units.sum(axis=0) ** 2) - jnp.sum(units**2)) / (count * (count - 1))


def effective_rank(layer: Array, *, threshold: float = 0.01) -> Array:
    """Number of singular values of the features `[N, ...]` above `threshold` of the largest.

    An example is a row, with channels and positions flattened. It is 0 where all features are 0.

    Source: Daneshmand et al., "Batch normalization provably avoids rank collapse" (2020), section
    2, count the same of the features' Gram matrix, whose eigenvalues are squares.
    """
    values = jnp.linalg.svd(layer.reshape(layer.shape[0], -1), compute_uv=False)
    return jnp.sum(values > threshold * values[0])


def _loss(model: nn.Module, variables: Variables, batch: Batch) -> Callable[[Any], Array]:
    """The mean cross entropy of the batch in training mode, as a function of the parameters."""

    def loss(params: Any) -> Array:
        there, images = {**variables, "params": params}, to_float(batch.images)
        logits, _ = model.apply(there, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, batch.labels).mean()

    return loss
