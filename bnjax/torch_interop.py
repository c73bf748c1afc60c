"""PyTorch's weights and ours: a `state_dict` of Linear and BatchNorm1d layers <-> Flax variables.

PyTorch's Linear keeps its kernel as [out, in], Flax's Dense as [in, out]. PyTorch's BatchNorm1d
calls the scale `weight`; its `num_batches_tracked` is `count` in `batch_stats`, which
`bnjax.BatchNorm` keeps up where it finds it. NumPy arrays are all that is needed here: PyTorch's
tensors are taken too, but PyTorch itself is never imported.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.models import MLP, batch_norm_of

# What PyTorch calls the arrays of a BatchNorm1d, and where Flax keeps them.
BATCH_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
    "num_batches_tracked": ("batch_stats", "count"),
}

# An expected layer: by PyTorch's names of its arrays Flax's path and PyTorch's shape, whose last
# length is -1 if it may be any.
Slot = Mapping[str, tuple[tuple[str, str, str], tuple[int, ...]]]


def from_torch(state_dict: Mapping[str, Any], model: MLP) -> dict[str, Any]:
    """Variables of `model` from the weights of the same network in PyTorch.

    What stands before a key's last dot names the layer. Two names are compared where they first
    differ: numbers there tell which layer comes first, as `fc2` before `fc10` and `block.0.out`
    before `block.1.fc`; text, as in `fc1` and `out`, tells nothing, and kinds and shapes of the
    layers must leave no choice. The order of the mapping never counts.

    Args:
        state_dict: `{"0.weight": [out, in], "0.bias": [out], "1.running_mean": [C], ...}` of
            Linear and BatchNorm1d layers, as arrays or CPU tensors. A Linear may lack its bias (it
            becomes 0), a BatchNorm1d weight and bias together (they become 1 and 0) and
            `num_batches_tracked` (then there is no `count`).
        model: which normalizes by BatchNorm or not at all.

    Returns:
        `{"params": ..., "batch_stats": ...}`, copies as NumPy arrays of the dtypes they came with.

    Raises:
        TypeError: if `state_dict` is no mapping from names; files are never opened or unpickled.
        ValueError: naming all keys that are missing, surplus or of wrong shape; or the layers whose
            order is not known, and those expected; or a value that is no array of numbers; or a
            model that normalizes otherwise.

    Source: `torch.nn.Linear`, `torch.nn.BatchNorm1d`, section Variables of their documentation.

    Example:
        >>> model = MLP(hidden_sizes=(), num_classes=2)
        >>> state_dict = {"0.weight": np.zeros((2, 3)), "0.bias": np.zeros(2)}
        >>> from_torch(state_dict, model)["params"]["Dense_0"]["kernel"].shape
        (3, 2)
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(
            f"state_dict is a {type(state_dict).__name__}: expected a mapping from names to "
            "arrays, as module.state_dict() gives"
        )
    layers: dict[str, dict[str, np.ndarray]] = {}
    faults: dict[str, list[str]] = {"missing": [], "surplus": [], "of wrong shape": []}
    for key, value in state_dict.items():
        array, (name, dot, leaf) = _to_numpy(key, value), key.rpartition(".")
        if leaf in BATCH_NORM:
            layers.setdefault(name + dot, {})[leaf] = array
        else:
            faults["surplus"].append(key)
    affine = None
    if model.norm is not None:
        norm = batch_norm_of(model.norm)
        affine = [leaf for leaf in ("scale", "bias") if getattr(norm, f"use_{leaf}")]
    slots = _slots((*model.hidden_sizes, model.num_classes), affine)
    names, variables = _match(layers, slots), {}
    for place, slot in slots.items():
        name, defaults = names[place], {}
        layer = layers.pop(name, {})
        chief = layer.get("running_mean", layer.get("weight", np.zeros(())))
        whole = "running_mean" in layer and layer.keys() & {"weight", "bias"}
        if chief.ndim and not whole:  # a Linear may have no bias, a BatchNorm1d no affine part
            zeros = np.zeros(chief.shape[:1], chief.dtype)
            defaults = {"weight": np.ones_like(zeros), "bias": zeros}
        given = {**defaults, **layer}
        for leaf, (path, shape) in slot.items():
            if leaf in given and _fits(given[leaf].shape, shape):
                variables[path] = given[leaf].T
            elif leaf in given:
                told = f"{name}{leaf} {_show(given[leaf].shape)} (expected {_show(shape)})"
                faults["of wrong shape"].append(told)
            elif leaf != "num_batches_tracked":
                faults["missing"].append(name + leaf)
        faults["surplus"] += [name + leaf for leaf in layer if leaf not in slot]
    faults["surplus"] += [name + leaf for name, layer in layers.items() for leaf in layer]
    if any(faults.values()):
        told = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(f"the state_dict does not fit the model: {told}")
    return unflatten_dict(variables)


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The `state_dict` of `nn.Sequential(Linear, BatchNorm1d, activation, ..., Linear)`.

    Without batch normalization there are only Linear layers and activations. A module with other
    names that lists its layers in this order takes
    `dict(zip(module.state_dict(), to_torch(variables).values()))`, as must one with its activations
    before the normalizations: variables do not tell an `MLP` with `norm_after` from one without.

    Returns:
        Copies as NumPy arrays, to be loaded with
        `module.load_state_dict({key: torch.tensor(value) for key, value in ....items()})`, without
        the scale and bias that normalization lacks, as with `affine=False`. Without a `count`,
        `num_batches_tracked` is 0, with which PyTorch's momentum of 0.1 has nothing to do.

    Raises:
        ValueError: if the variables are not those of an `MLP`.

    Example:
        >>> variables = MLP((4,), 2).init(jax.random.key(0), np.zeros((2, 3)), train=True)
        >>> list(to_torch(variables))[:4]
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    given = flatten_dict({name: variables.get(name, {}) for name in ("params", "batch_stats")})
    depth = len({path[1] for path in given if path[1].startswith("Dense_")})
    normalized = [path[-1] for path in given if path[1].startswith("BatchNorm_")]
    slots = _slots([0] * depth, normalized or None)
    expected = {slot[leaf][0]: name + leaf for name, slot in slots.items() for leaf in slot}
    given = {path: 0 for path in expected if path[-1] == "count"} | given
    wrong = set(given) ^ set(expected)
    if wrong or not depth:
        told = ", ".join(sorted("/".join(path) for path in wrong)) or "there is no Dense_0"
        raise ValueError(f"the variables are not those of an MLP; missing or surplus: {told}")
    return {
        key: np.array(given[path], np.int64 if path[-1] == "count" else None).T
        for path, key in expected.items()
    }


def _slots(sizes: Sequence[int], affine: Collection[str] | None) -> dict[str, Slot]:
    """The layers of an MLP by their names in `nn.Sequential`; `affine` is what normalization has of
    scale and bias, or None without normalization."""
    step = 2 if affine is None else 3
    slots: dict[str, Slot] = {}
    for k, (fan_in, size) in enumerate(pairwise([-1, *sizes])):
        slots[f"{step * k}."] = {
            "weight": (("params", f"Dense_{k}", "kernel"), (size, fan_in)),
            "bias": (("params", f"Dense_{k}", "bias"), (size,)),
        }
        if affine is not None and k + 1 < len(sizes):
            slots[f"{step * k + 1}."] = {
                key: ((collection, f"BatchNorm_{k}", leaf), () if leaf == "count" else (size,))
                for key, (collection, leaf) in BATCH_NORM.items()
                if collection == "batch_stats" or leaf in affine
            }
    return slots


def _match(
    layers: Mapping[str, dict[str, np.ndarray]], slots: Mapping[str, Slot]
) -> dict[str, str]:
    """By the names of the slots those of the layers: the same, or in the only order possible.

    The first slot takes the one layer that has its shape and no layer before it, the last the one
    that has none after it, and so on inwards.
    """
    prefixes = {re.sub(r"\d+\.$", "", name) for name in layers}
    usual = {name: (min(prefixes) if len(prefixes) == 1 else "") + name for name in slots}
    if layers.keys() <= set(usual.values()) or layers.keys() >= set(usual.values()):
        return usual
    # Text and numbers in turn, beginning with text.
    parts = {a: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", a)] for a in layers}
    left = sorted(layers, key=parts.__getitem__)
    before, after = ({name: set[str]() for name in layers} for _ in range(2))
    for a, b in combinations(left, 2):
        differing = (p for p, q in zip(parts[a], parts[b], strict=False) if p != q)
        if isinstance(next(differing, ""), int):
            before[b].add(a)
            after[a].add(b)
    shapes = {name: layer[max(layer)].shape for name, layer in layers.items()}
    expected = {place: slot[max(slot)][1] for place, slot in slots.items()}
    places, names = list(slots), {}
    while places:
        for end, others in ((0, before), (-1, after)):
            fitting = [a for a in left if _fits(shapes[a], expected[places[end]])]
            fitting = [a for a in fitting if others[a].isdisjoint(left)]
            if len(fitting) == 1:
                break
        else:
            found = (f"{a}{max(layers[a])} {_show(shapes[a])}" for a in left)
            wanted = (f"{max(slots[place])} {_show(expected[place])}" for place in places)
            raise ValueError(
                "names, kinds and shapes of the layers do not tell a single order that fits the "
                f"model: found {', '.join(found) or 'no more'}, expected, in the order of the "
                f"numbers in their names, {', '.join(wanted)}: rename them with numbers, as in "
                "fc1, fc2, or change the model"
            )
        names[places.pop(end)] = fitting[0]
        left.remove(fitting[0])
    return names


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return expected in (shape, (*shape[:-1], -1))


def _show(shape: tuple[int, ...]) -> str:
    return str(list(shape)).replace("-1", "any")


def _to_numpy(key: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except Exception as error:  # an object's own conversion raises whatever it likes
        raise ValueError(
            f"{key} cannot be read as a NumPy array ({error}): pass detached CPU tensors, bfloat16 "
            "ones as float32"
        ) from error
    if not any(jax.dtypes.issubdtype(array.dtype, kind) for kind in (np.integer, np.floating)):
        raise ValueError(f"{key} is of dtype {array.dtype}: expected numbers")
    return array.copy()
