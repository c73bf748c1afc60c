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

# A layer that is found, and one that is expected, by PyTorch's names of its arrays. Of those that
# are expected there are Flax's path and PyTorch's shape, whose last length is -1 if it may be any.
Layer = Mapping[str, np.ndarray]
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
        ValueError: naming layers whose order is not known, or all keys that are missing, surplus or
            of wrong shape, or, where nothing tells which layers are meant, all that were found and
            expected; or a value that is no array of numbers; or a model that normalizes otherwise.

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
        norm = batch_norm_of(model)
        affine = [leaf for leaf in ("scale", "bias") if getattr(norm, f"use_{leaf}")]
    slots = _slots((*model.hidden_sizes, model.num_classes), affine)
    matched = dict(zip(_match(layers, slots), slots.values(), strict=True))
    for name in {**matched, **layers}:
        for what, key in _faults(name, layers.get(name, {}), matched.get(name, {})):
            faults[what].append(key)
    if any(faults.values()):
        told = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(f"the state_dict does not fit the model: {told}")
    variables = {}
    for name, slot in matched.items():
        layer = layers[name]
        dtype = layer["running_mean" if "running_mean" in slot else "weight"].dtype
        for leaf, (path, shape) in slot.items():
            if leaf in layer:
                variables[path] = layer[leaf].T
            elif leaf != "num_batches_tracked":
                variables[path] = np.full(shape, leaf == "weight", dtype)
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
        >>> import jax
        >>> variables = MLP((4,), 2).init(jax.random.key(0), np.zeros((2, 3)), train=True)
        >>> list(to_torch(variables))[:4]
        ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    given = flatten_dict({name: variables.get(name, {}) for name in ("params", "batch_stats")})
    layers = {path[1] for path in given}
    depth = sum(layer.startswith("Dense_") for layer in layers)
    kernels = [given.get(("params", f"Dense_{k}", "kernel")) for k in range(depth)]
    sizes = [0 if kernel is None else kernel.shape[-1] for kernel in kernels]
    normalized = [path[-1] for path in given if path[1].startswith("BatchNorm_")]
    slots = _slots(sizes, normalized or None)
    expected = {slot[leaf][0]: name + leaf for name, slot in slots.items() for leaf in slot}
    for path in expected:
        if path[-1] == "count":
            given.setdefault(path, 0)
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


def _faults(name: str, layer: Layer, slot: Slot) -> list[tuple[str, str]]:
    """Why a layer is not the one expected: what is the matter, and with which key."""
    optional = {"num_batches_tracked"}
    if "running_mean" not in slot:
        optional |= {"bias"}
    elif not layer.keys() & {"weight", "bias"}:
        optional |= {"weight", "bias"}
    faults = []
    for leaf, (_, expected) in slot.items():
        shape = layer[leaf].shape if leaf in layer else expected
        if leaf not in layer and (leaf not in optional or not layer):
            faults.append(("missing", name + leaf))
        if expected not in (shape, (*shape[:-1], -1)):
            told = f"{name}{leaf} {_show(shape)} (expected {_show(expected)})"
            faults.append(("of wrong shape", told))
    return faults + [("surplus", name + leaf) for leaf in layer if leaf not in slot]


def _match(layers: Mapping[str, Layer], slots: Mapping[str, Slot]) -> list[str]:
    """The layers' names in the order of the slots; if not all fit, as they seem to be meant.

    The first slot takes the one layer that fits it and has no layer before it, the last the one
    that has none after it, and so on inwards: no other order is possible.
    """
    prefixes = {re.sub(r"\d+\.$", "", name) for name in layers}
    usual = [(min(prefixes) if len(prefixes) == 1 else "") + name for name in slots]
    if layers.keys() <= set(usual) or layers.keys() >= set(usual):
        return usual
    fits = {
        name: {k for k, slot in enumerate(slots.values()) if not _faults(name, layer, slot)}
        for name, layer in layers.items()
    }
    # Text and numbers in turn, beginning with text.
    parts = {a: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", a)] for a in layers}
    left, places = sorted(layers, key=parts.__getitem__), list(range(len(slots)))
    before, after = ({name: set[str]() for name in layers} for _ in range(2))
    for a, b in combinations(left, 2):
        first = next((p for p, q in zip(parts[a], parts[b], strict=False) if p != q), "")
        if isinstance(first, int):
            before[b].add(a)
            after[a].add(b)
    found: dict[int, str] = {}
    while left and places:
        starts = [a for a in left if places[0] in fits[a] and before[a].isdisjoint(left)]
        ends = [a for a in left if places[-1] in fits[a] and after[a].isdisjoint(left)]
        if len(starts) == 1 or len(left) == len(places) == 1:
            place, name = places[0], *(starts or left)
        elif len(ends) == 1:
            place, name = places[-1], *ends
        else:
            break
        found[place] = name
        places.remove(place)
        left.remove(name)
    if not places:
        return [found[k] for k in range(len(slots))]
    if len(left) == len(places) and starts and ends and all(fits[name] for name in left):
        raise ValueError(
            f"the order of the layers {', '.join(name[:-1] for name in left)} is not known from "
            "the numbers in their names, and their shapes fit more than one order: rename them "
            "with numbers, as in fc1, fc2"
        )
    shapes = (f"{name}{max(one)} {_show(one[max(one)].shape)}" for name, one in layers.items())
    expected = (f"{max(one)} {_show(one[max(one)][1])}" for one in slots.values())
    raise ValueError(
        f"the state_dict does not fit the model: found {', '.join(shapes)}, expected, in the order "
        f"of the numbers in their names, {', '.join(expected)}"
    )


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
