"""PyTorch's weights and ours: `state_dict` of an `nn.Sequential` of layers <-> Flax variables.

PyTorch's Linear keeps its kernel as [out, in], Flax's Dense as [in, out]. PyTorch's BatchNorm1d
calls the scale `weight`; its `num_batches_tracked` is `count` in `batch_stats`, which
`bnjax.BatchNorm` keeps up where it finds it. NumPy arrays are all that is needed here: PyTorch's
tensors are taken too, but PyTorch itself is never imported.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.models import MLP

Shape = tuple[int | None, ...]


class Entry(NamedTuple):
    """One array: PyTorch's key, where Flax keeps it, and PyTorch's shape (None for any length)."""

    key: str
    path: tuple[str, str, str]
    shape: Shape


def from_torch(state_dict: Mapping[str, Any], model: MLP) -> dict[str, Any]:
    """Variables of `model` from the weights of the same network in PyTorch.

    Layers are matched in the order of their numbers or, if they have none, as they come, whatever
    their names: the entries of one share what stands before the last dot, as in
    `"features.0.weight"`.

    Args:
        state_dict: `{"0.weight": [out, in], "0.bias": [out], "1.running_mean": [C], ...}` of
            Linear and, with `use_batch_norm`, BatchNorm1d layers, as arrays or CPU tensors.
        model: whose `hidden_sizes`, `num_classes` and `use_batch_norm` say what is expected.

    Returns:
        `{"params": ..., "batch_stats": ...}`, copies as NumPy arrays of the dtypes they came with.

    Raises:
        TypeError: if `state_dict` is no mapping from names; files are never opened or unpickled.
        ValueError: naming all missing and surplus keys and all wrong shapes, or a value that is no
            array of numbers.

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
    given = {key: _to_numpy(key, value) for key, value in state_dict.items()}
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in given))
    numbered = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    if len({match and match[1] for match in numbered}) == 1 and None not in numbered:
        names.sort(key=lambda name: int(re.findall(r"\d+", name)[-1]))
    expected = _entries((*model.hidden_sizes, model.num_classes), model.use_batch_norm, names)
    keys = [entry.key for entry in expected]
    problems = {
        "missing": [key for key in keys if key not in given],
        "surplus": [key for key in given if key not in keys],
        "of wrong shape": [
            f"{key} {list(given[key].shape)} (expected {_describe(shape)})"
            for key, _, shape in expected
            if key in given and not _fits(given[key].shape, shape)
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"the state_dict does not fit the model: {told}")
    return unflatten_dict({path: given[key].T for key, path, _ in expected})


def to_torch(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The `state_dict` of `nn.Sequential(Linear, BatchNorm1d, activation, ..., Linear)`.

    Without batch normalization that of `nn.Sequential(Linear, activation, ..., Linear)`. Layers
    with other names take the values in the same order:
    `dict(zip(module.state_dict(), to_torch(variables).values()))`.

    Args:
        variables: of an `MLP`.

    Returns:
        Copies as NumPy arrays, to be loaded with
        `module.load_state_dict({key: torch.tensor(value) for key, value in ....items()})`. Where
        `batch_stats` has no `count`, `num_batches_tracked` is 0, with which PyTorch's momentum of
        0.1 has nothing to do.

    Raises:
        ValueError: if the variables are not those of an `MLP`.

    Source: as `from_torch`.

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
    use_batch_norm = any(layer.startswith("BatchNorm_") for layer in layers)
    expected = _entries(sizes, use_batch_norm)
    for _, path, _ in expected:
        if path[-1] == "count":
            given.setdefault(path, 0)
    wrong = set(given) ^ {path for _, path, _ in expected}
    if wrong or not depth:
        told = ", ".join(sorted("/".join(path) for path in wrong)) or "there is no Dense_0"
        raise ValueError(f"the variables are not those of an MLP; missing or surplus: {told}")
    return {
        key: np.array(given[path], np.int64 if path[-1] == "count" else None).T
        for key, path, _ in expected
    }


def _entries(sizes: Sequence[int], use_batch_norm: bool, names: Sequence[str] = ()) -> list[Entry]:
    """All entries of an MLP in PyTorch's order; `names` are the layers' own, in their order."""
    step = 3 if use_batch_norm else 2
    layers: dict[str, tuple[str, list[tuple[str, str, str, Shape]]]] = {}
    fan_in = None
    for k, size in enumerate(sizes):
        layers[f"{step * k}"] = (
            f"Dense_{k}",
            [
                ("weight", "params", "kernel", (size, fan_in)),
                ("bias", "params", "bias", (size,)),
            ],
        )
        if use_batch_norm and k + 1 < len(sizes):
            layers[f"{step * k + 1}"] = (
                f"BatchNorm_{k}",
                [
                    ("weight", "params", "scale", (size,)),
                    ("bias", "params", "bias", (size,)),
                    ("running_mean", "batch_stats", "mean", (size,)),
                    ("running_var", "batch_stats", "var", (size,)),
                    ("num_batches_tracked", "batch_stats", "count", ()),
                ],
            )
        fan_in = size
    own = len(names) == len(layers)
    return [
        Entry(f"{name}.{key}".lstrip("."), (collection, layer, leaf), shape)
        for name, (layer, entries) in zip(names if own else layers, layers.values(), strict=True)
        for key, collection, leaf, shape in entries
    ]


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


def _fits(shape: tuple[int, ...], expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        b in (a, None) for a, b in zip(shape, expected, strict=True)
    )


def _describe(shape: Shape) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
