"""Population statistics: what batch normalization should use in evaluation, over frozen weights.

Running statistics follow the weights with a delay and weigh the last batches most. Once training
is over they can be estimated afresh, from as many samples as one likes: Ioffe & Szegedy (2015),
algorithm 2; Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.

Every pass is in evaluation mode, so that nothing else in the network (dropout) behaves as in
training: just before a layer normalizes, the statistics of the batch at hand take the place of its
running ones. It works for any module called as `module.apply(variables, x, train=...)` whose layers
are `bnjax.BatchNorm` or `flax.linen.BatchNorm`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial, reduce
from itertools import islice
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from bnjax import layer_taps
from bnjax.layer_taps import BATCH_NORMS, Path
from bnjax.layers import features_last
from bnjax.moments import Moments, centre, check_sample_count, merge, statistics_dtype
from bnjax.training import AnyArray, to_float

Variables = dict[str, Any]


class Gap(NamedTuple):
    """How far a layer's running statistics are from those of the population.

    Attributes:
        mean: root mean square over the features of the difference of the means, in units of the
            population's sqrt(var + epsilon): the shift of the normalized values.
        std: the same of the ratio of sqrt(var + epsilon), running over population, minus one.
    """

    mean: Array
    std: Array


def pool_batch_moments(batches: Sequence[Moments]) -> Moments:
    """The moments of all samples together, however they are cut into batches.

    Source: Wu & Johnson (2021), section 3; Chan, Golub & LeVeque (1979) for the merging.
    """
    return reduce(merge, batches)


def average_batch_moments(batches: Sequence[Moments]) -> Moments:
    """The average over batches that the paper's algorithm 2 prescribes.

        mean = E[mean_B],   var = E[m / (m - 1) var_B]

    with m samples per feature in a batch, and the same weight for every batch: exact for batches of
    one size, drawn at random. PyTorch's `torch.optim.swa_utils.update_bn` does the same, and misses
    the variance between the batches.

    Source: Ioffe & Szegedy (2015), algorithm 2, steps 8 to 10.
    """
    mean: Any = np.mean([b.mean for b in batches], axis=0)
    var: Any = np.mean([b.var * b.count / (b.count - 1) for b in batches], axis=0)
    return Moments(mean, var, np.sum([b.count for b in batches], axis=0))


def estimate(
    module: nn.Module,
    variables: Variables,
    batches: Iterable[AnyArray],
    *,
    layer_by_layer: bool = False,
    combine: Callable[[Sequence[Moments]], Moments] = pool_batch_moments,
) -> Variables:
    """The statistics of the population, of which `batches` are samples.

    Args:
        module: called as `module.apply(variables, x, train=False)`.
        variables: parameters, and `batch_stats` to be replaced.
        batches: `[N, ...]` images, uint8 in 0..255 or floating point, or pairs that begin with
            them. Each is measured on the device, and all are combined on the host.
        layer_by_layer: one pass over the batches for each layer, in which all earlier layers
            already use their population statistics, as they will in evaluation. Otherwise one pass
            in all, in which every layer sees what the batch's own statistics make of the earlier
            ones, as in training.
        combine: makes one of the batches' moments, in float64: `pool_batch_moments` or
            `average_batch_moments`.

    Returns:
        `variables` with the mean and variance of the population in `batch_stats`.

    Raises:
        ValueError: if there is no batch or no batch normalization, a batch has fewer than two
            valid samples per feature, or `layer_by_layer` finds that `batches` can be read only
            once.

    Example:
        >>> from bnjax.models import MLP
        >>> model = MLP(hidden_sizes=(4,), num_classes=2)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 1)), train=True)
        >>> x = jnp.arange(10.0)[:, None]
        >>> variables = estimate(model, variables, [x[:4], x[4:8], x[8:]])
        >>> pre = x @ variables["params"]["Dense_0"]["kernel"]
        >>> bool(jnp.allclose(variables["batch_stats"]["BatchNorm_0"]["var"], pre.var(axis=0)))
        True
    """
    if layer_by_layer and isinstance(batches, Iterator):
        raise ValueError(
            "layer_by_layer reads the batches once for each layer, found an iterator, which ends "
            "after the first: pass a list"
        )
    try:
        apply = _shared_apply(module)
    except TypeError:  # fields without a hash: what is compiled is this module's alone
        apply = module.apply
    first = list(islice(batches, 1)) if layer_by_layer else []
    paths = [path for batch in first for path in layer_paths(module, variables, _images(batch))]
    for path in paths or (None,):
        found = [_measure(apply, path, variables, _images(batch)) for batch in batches]
        if not (found and found[0]):
            what = "batch normalization in the module" if found else "batch"
            raise ValueError(f"there is nothing to estimate statistics from: found no {what}")
        stats = flatten_dict(variables.get("batch_stats", {}))
        for layer in found[0]:
            moments = combine([_exact(*call) for layers in found for call in layers[layer]])
            for name, value in (("mean", moments.mean), ("var", moments.var)):
                stats[*layer, name] = jnp.asarray(value, found[0][layer][0][0].mean.dtype)
        variables = {**variables, "batch_stats": unflatten_dict(stats)}
    return variables


def statistics_gap(
    running: Variables, population: Variables, *, epsilon: float = 1e-5
) -> dict[str, Gap]:
    """The gap between running statistics, as training left them, and those from `estimate`.

    Args:
        running, population: variables with both in `batch_stats`.
        epsilon: of the layers.

    Returns:
        A `Gap` of scalars per layer, by its path, as in `"Block_0/BatchNorm_1"`.

    Raises:
        ValueError: if the layers are not the same.

    Example:
        >>> running = {"batch_stats": {"norm": {"mean": jnp.ones(2), "var": 4 * jnp.ones(2)}}}
        >>> population = {"batch_stats": {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
        >>> print(*statistics_gap(running, population, epsilon=0.0)["norm"])
        1.0 1.0
    """
    before, after = (flatten_dict(v["batch_stats"]) for v in (running, population))
    first, second = ([path[:-1] for path in v if path[-1] == "var"] for v in (before, after))
    if set(first) != set(second):
        wrong = sorted("/".join(path) for path in set(first) ^ set(second))
        raise ValueError(f"the networks differ in their layers: {', '.join(wrong)}")
    gaps = {}
    for path in first:
        std = jnp.sqrt(after[*path, "var"] + epsilon)
        shift = (before[*path, "mean"] - after[*path, "mean"]) / std
        stretch = jnp.sqrt(before[*path, "var"] + epsilon) / std - 1
        gaps["/".join(path)] = Gap(*(jnp.sqrt(jnp.mean(v**2)) for v in (shift, stretch)))
    return gaps


def layer_paths(module: nn.Module, variables: Variables, images: AnyArray) -> list[Path]:
    """The paths of the batch normalizations of `[N, ...]` images, from the input on."""
    return list(layer_taps.outputs(module, variables, images, BATCH_NORMS, train=False))


def _images(batch: Any) -> AnyArray:
    return to_float(batch[0] if isinstance(batch, tuple | list) and batch else batch)


@lru_cache
def _shared_apply(module: nn.Module) -> Callable:
    """One `apply` of all modules that are equal, so that they share what is compiled."""
    return module.apply


@partial(jax.jit, static_argnames=("apply", "only"))
def _measure(
    apply: Callable, only: Path | None, variables: Variables, images: AnyArray
) -> dict[Path, tuple[tuple[Moments, Array], ...]]:
    """Moments of what enters each layer, or `only` one, when it normalizes with them."""

    def substitute(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        layer = context.module
        called = context.method_name == "__call__" and isinstance(layer, BATCH_NORMS)
        if called and only in (None, layer.path):
            x = args[0] if args else kwargs["x"]
            moments, rest = _moments(x, layer.axis, kwargs.get("mask"))
            calls = layer.get_variable("batch_stats", "calls", ())
            seen = {"calls": (*calls, (moments, rest)), "mean": moments.mean, "var": moments.var}
            for name, value in seen.items():
                layer.put_variable("batch_stats", name, value)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(substitute):
        _, found = apply(variables, images, train=False, mutable=["batch_stats"])
    stats = flatten_dict(found.get("batch_stats", {}))
    return {path[:-1]: calls for path, calls in stats.items() if path[-1] == "calls"}


def _moments(x: Array, axis: int | Sequence[int], mask: Array | None) -> tuple[Moments, Array]:
    """Moments in the shape of the features, and what rounding left out of the mean."""
    x, mask, shape = features_last(x, axis, mask)
    check_sample_count(x)
    valid = None if mask is None else mask.reshape(-1, 1)
    rows = x.reshape(-1, x.shape[-1]).astype(statistics_dtype(x))
    _, moments = centre(rows, valid, None)
    _, (rest, _, _) = centre(rows - moments.mean[None], valid, None)
    count = jnp.full_like(rest, moments.count)  # of that shape under nn.scan as well
    mean, var, count, rest = (a.reshape(shape) for a in (*moments[:2], count, rest))
    return Moments(mean, var, count), rest


def _exact(moments: Moments, rest: Array) -> Moments:
    """Moments in float64, on the host: means of many batches are merged without being rounded."""
    values: list[Any] = [np.asarray(a, np.float64) for a in (*moments, rest)]
    mean, var, count, left_out = values
    if (count < 2).any():
        raise ValueError("a batch has fewer than 2 valid samples per feature: leave it out")
    return Moments(mean + left_out, var, count)
