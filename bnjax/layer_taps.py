"""What enters and leaves the layers of any Flax module, seen by interceptors while it is applied.

Layers are the calls of `nn.Dense`, `nn.Conv` and what derives from them, in the order of the calls.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from bnjax.layers import BatchNorm
from bnjax.models import Activation
from bnjax.norms import GroupNorm, MeanOnlyBatchNorm
from bnjax.training import AnyArray, to_float

Path = tuple[str, ...]
Variables = Mapping[str, Any]

LAYERS = nn.Dense | nn.DenseGeneral | nn.Conv | nn.ConvTranspose
NORMS = (
    nn.BatchNorm
    | BatchNorm
    | nn.LayerNorm
    | nn.RMSNorm
    | nn.GroupNorm
    | GroupNorm
    | MeanOnlyBatchNorm
)


def hidden(
    model: nn.Module, variables: Variables, images: AnyArray, train: bool
) -> list[tuple[Array, Array]]:
    """What enters the activation of each hidden layer, and what leaves the layer.

    Activations that are a `bnjax.models.Activation` are seen themselves, and what leaves a layer is
    what leaves them, or the normalization after them. In a module without them it is the
    normalization after a layer, or the layer itself, that enters, and what the next layer is given,
    before dropout, that leaves. The last layer is not hidden.
    """
    found: list[tuple[Array, Array]] = []
    entering: Array | None = None
    leaving: Array | None = None

    def record(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal entering, leaving
        module = context.module
        if context.method_name != "__call__" or not isinstance(
            module, LAYERS | NORMS | Activation | nn.Dropout
        ):
            return next_fun(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(module, LAYERS):
            if entering is not None:
                found.append((entering, x if leaving is None else leaving))
            entering = leaving = None
        y = next_fun(*args, **kwargs)
        if isinstance(module, nn.Dropout):
            leaving = x if leaving is None else leaving
        elif isinstance(module, Activation):
            entering, leaving = x, y
        elif isinstance(module, NORMS) and leaving is not None:
            leaving = y
        else:
            entering = y
        return y

    with nn.intercept_methods(record):
        model.apply(variables, to_float(images), train=train, mutable=["batch_stats"])
    return found


def is_layer(context: Any) -> bool:
    """Whether the call that `nn.intercept_methods` shows is that of a layer."""
    return context.method_name == "__call__" and isinstance(context.module, LAYERS)


def layer_outputs(
    model: nn.Module, variables: Variables, images: AnyArray
) -> dict[Path, jax.ShapeDtypeStruct]:
    """Shape and dtype of what leaves each layer, by its path, in the order of the calls."""
    outputs: dict[Path, jax.ShapeDtypeStruct] = {}

    def note(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        if is_layer(context):
            outputs[context.module.path] = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return y

    apply = partial(model.apply, train=True, mutable=["batch_stats"])
    with nn.intercept_methods(note):
        jax.eval_shape(apply, variables, to_float(images))
    return outputs
