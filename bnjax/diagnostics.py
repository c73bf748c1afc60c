"""Probes: pure functions `(model, variables, batch) -> dict of arrays` that look into a network.

`model` is any module called as `model.apply(variables, images, train=...)`. Its layers are those of
`bnjax.layer_taps`; the last gives the logits, the others are hidden. Vectors over layers go from
the input on.
A `batch` has `[N, ...]` images; only the probes of gradients read its labels.
`train=True` normalizes with the statistics of the batch, as a network at initialization must;
by default the running ones are used. Nothing draws random numbers: dropout must be off in training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from bnjax import population
from bnjax.layer_taps import Path, hidden, is_layer, layer_outputs
from bnjax.training import Batch, cross_entropy, to_float, vary_with

Variables = Mapping[str, Any]


def features(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """What leaves each hidden layer: what the next one is given.

    Dropout is looked at from before it. Pooling and reshaping between two layers count as part of
    the first, but for the reshaping of `[N, H, W, C]` that a Dense layer needs.

    Returns:
        `{"features_1": [N, ...], ...}`, one entry per hidden layer, from the input on.
    """
    leaving = [taken for _, taken in hidden(model, variables, batch.images, train)]
    return {f"features_{number}": layer for number, layer in enumerate(leaving, start=1)}


def preactivations(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """What enters each hidden layer's activation: normalized where the model normalizes.

    Activations that are a `bnjax.models.Activation` are seen themselves. In a module without them
    it is what leaves the layer, or the normalization that follows it.

    Returns:
        `{"preactivations_1": [N, ...], ...}`, one entry per hidden layer.
    """
    entering = [taken for taken, _ in hidden(model, variables, batch.images, train)]
    return {f"preactivations_{number}": layer for number, layer in enumerate(entering, start=1)}


def gradient_norms(model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
    """Frobenius norm of the gradient of the mean cross entropy in each kernel, in training mode.

    Returns:
        `{"Dense_0": [], ...}`, a scalar for each layer, by its path.
    """
    gradients = flatten_dict(
        jax.grad(_loss(model, variables, batch))(vary_with(batch, variables["params"]))
    )
    return {
        "/".join(path): jnp.linalg.norm(gradients[*path, "kernel"].ravel())
        for path in layer_outputs(model, variables, batch.images)
    }


def backpropagated_norms(model: nn.Module, variables: Variables, batch: Batch) -> dict[str, Array]:
    """Frobenius norm of the gradient of the mean cross entropy in what leaves each layer.

    Unlike the gradient in a kernel it is not summed over examples, which may cancel or add up. In
    training mode, before normalization and activation.

    Returns:
        `{"Dense_0": [], ...}`, a scalar for each layer, by its path; the norm of `[N, ...]`.
    """

    def loss(shifts: dict[Path, Array]) -> Array:
        def shift(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            y = next_fun(*args, **kwargs)
            return y + shifts[context.module.path] if is_layer(context) else y

        with nn.intercept_methods(shift):
            return _loss(model, variables, batch)(variables["params"])

    outputs = layer_outputs(model, variables, batch.images)
    shifts = {path: jnp.zeros(y.shape, y.dtype) for path, y in outputs.items()}
    gradients = jax.grad(loss)(vary_with(batch, shifts))
    return {"/".join(path): jnp.linalg.norm(gradients[path].ravel()) for path in outputs}


def landscape(
    model: nn.Module, variables: Variables, batch: Batch, *, step_sizes: Sequence[float]
) -> dict[str, Array]:
    """Loss and gradient of a batch along its own gradient direction, in training mode.

        loss(w - s g)   and   |grad loss(w - s g) - g|,   g = grad loss(w),   for each step size s

    Returns:
        `{"losses": [S], "gradient_distances": [S]}`.

    Source: Santurkar et al., "How does batch normalization help optimization?" (2018), figure 4.
    """
    loss = jax.value_and_grad(_loss(model, variables, batch))
    params = vary_with(batch, variables["params"])
    here, gradient = loss(params)

    def at(step_size: Array) -> tuple[Array, Array]:
        there = jax.tree.map(lambda w, g: w - step_size * g, params, gradient)
        value, other = loss(there)
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), other, gradient)
        return value, jnp.sqrt(sum(jax.tree.leaves(squares)))

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
    """Percentiles over the batch of what enters each unit's activation.

    Returns:
        `{"percentiles_1": [P, H], ...}`, one entry per hidden layer.

    Source: Ioffe & Szegedy (2015), figure 1 (b, c), draw them for one unit.
    """
    layers = preactivations(model, variables, batch, train=train).values()
    return {
        f"percentiles_{number}": jnp.percentile(layer, jnp.asarray(percentiles), axis=0)
        for number, layer in enumerate(layers, start=1)
    }


def saturation(
    model: nn.Module,
    variables: Variables,
    batch: Batch,
    *,
    slope: float = 0.01,
    train: bool = False,
) -> dict[str, Array]:
    """Share of each hidden layer's values at which the activation is flat.

    Flat means that the derivative of the model's field `activation` is smaller than `slope`: a
    sigmoid beyond 4.58, tanh beyond 2.99, ReLU below 0.

    Returns:
        `{"saturation": [D]}`, from 0 to 1.
    """
    derivative = jax.vmap(jax.grad(model.activation))
    layers = preactivations(model, variables, batch, train=train).values()
    flat = [jnp.mean(jnp.abs(derivative(layer.ravel())) < slope) for layer in layers]
    return {"saturation": jnp.stack(flat)}


def dead_units(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """Share of each hidden layer's units that say the same of every example.

    Returns:
        `{"dead_units": [D]}`, from 0 to 1.
    """
    layers = features(model, variables, batch, train=train).values()
    return {"dead_units": jnp.stack([jnp.mean(jnp.ptp(layer, axis=0) == 0) for layer in layers])}


def cosine_similarity(
    model: nn.Module, variables: Variables, batch: Batch, *, train: bool = False
) -> dict[str, Array]:
    """Mean cosine of the angle between two examples' features, over all pairs, in each layer.

        (|sum_i u_i|^2 - N) / (N (N - 1)),   u_i = x_i / |x_i|

    Returns:
        `{"cosine_similarity": [D]}`; 1 where all examples look alike but for their length. An
        example whose features are all 0 counts as perpendicular to all others.
    """

    def mean_cosine(layer: Array) -> Array:
        layer = layer.reshape(layer.shape[0], -1)
        length = jnp.linalg.norm(layer, axis=1, keepdims=True)
        units = layer / jnp.where(length == 0, 1, length)
        own = jnp.sum(units**2)
        count = layer.shape[0]
        return (jnp.sum(units.sum(axis=0) ** 2) - own) / (count * (count - 1))

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
    """Number of singular values of each layer's features `[N, H]` above `threshold` of the largest.

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


def population_gap(
    model: nn.Module, variables: Variables, batch: Batch, *, epsilon: float = 1e-5
) -> dict[str, Array]:
    """How far the running statistics are from those of the batch, taken as the population.

    `epsilon` is that of the layers. Not to be jitted: statistics are merged on the host.

    Returns:
        `{"BatchNorm_0/mean": [], "BatchNorm_0/std": [], ...}`, as `bnjax.population.gap`.
    """
    estimated = population.estimate(model, dict(variables), [batch.images])
    gaps = population.gap(dict(variables), estimated, epsilon=epsilon)
    return {
        f"{layer}/{name}": value
        for layer, gap in gaps.items()
        for name, value in gap._asdict().items()
    }


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
        variables_there = {**variables, "params": params}
        images = to_float(batch.images)
        logits, _ = model.apply(variables_there, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, batch.labels).mean()

    return loss
