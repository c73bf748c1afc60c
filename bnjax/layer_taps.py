"""What enters and leaves the layers of any Flax module, seen by an interceptor while it is applied.

Layers are the calls of `nn.Dense`, `nn.Conv` and what derives from them, in the order of the calls;
the last gives the logits, the others are hidden. A layer called twice counts as two.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax.core.tracers import current_trace
from jax import Array

from bnjax.layers import BatchNorm
from bnjax.models import Activation
from bnjax.norms import GroupNorm, MeanOnlyBatchNorm
from bnjax.training import AnyArray, to_float

Path = tuple[str, ...]
Variables = Mapping[str, Any]

LAYERS = nn.Dense | nn.DenseGeneral | nn.Conv | nn.ConvTranspose
BATCH_NORMS = BatchNorm | nn.BatchNorm
FLAX_NORMS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.InstanceNorm
NORMS = BATCH_NORMS | FLAX_NORMS | GroupNorm | MeanOnlyBatchNorm


class Hidden(NamedTuple):
    """A hidden layer: what enters its activation and what leaves it, `[N, ...]`."""

    entering: Array
    leaving: Array
    activation: Activation | None  # where it is one that can be seen


@contextmanager
def watch(see: Callable[[nn.Module, Any, Any], Any], *, lifted: bool = False) -> Iterator[None]:
    """Within it each call of a module returns `see(module, x, y)` of its first argument and result.

    A module that calls what it derives from is called once.

    Raises:
        ValueError: unless `lifted`, if a module is called inside `nn.scan`, `nn.remat` or the like,
            which no array may leave.
    """
    trace = current_trace()
    calls: list[nn.Module] = []

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or (calls and calls[-1] is module):
            return next_fun(*args, **kwargs)
        if not lifted and current_trace() != trace:
            raise ValueError(
                f"{'/'.join(module.path)} is called inside nn.scan, nn.remat or another "
                "transformation, where it cannot be looked at: take the module without it"
            )
        calls.append(module)
        y = next_fun(*args, **kwargs)
        calls.pop()
        return see(module, args[0] if args else kwargs.get("inputs", kwargs.get("x")), y)

    with nn.intercept_methods(intercept):
        yield


def hidden(model: nn.Module, variables: Variables, images: AnyArray, train: bool) -> list[Hidden]:
    """The hidden layers, from the input on, as `bnjax.diagnostics.features` tells.

    A normalization of any kind after an activation is the last module whose result has the shape of
    the activation's. What comes before the first layer belongs to none.
    """
    found: list[Hidden] = []
    layer: Hidden | None = None

    def see(module: nn.Module, x: Any, y: Any) -> Any:
        nonlocal layer
        if isinstance(module, LAYERS):
            if layer is not None:
                found.append(layer if layer.activation else layer._replace(leaving=x))
            layer = Hidden(y, y, None)
        elif layer is not None:
            if isinstance(module, Activation):
                layer = Hidden(x, y, module)
            elif layer.activation is None:
                layer = layer._replace(entering=y) if isinstance(module, NORMS) else layer
            elif getattr(y, "shape", None) == layer.leaving.shape:
                around = module.path == layer.activation.path[: len(module.path)]
                layer = layer if around else layer._replace(leaving=y)
        return y

    with watch(see):
        model.apply(variables, to_float(images), train=train, mutable=["batch_stats"])
    return found


def outputs(
    model: nn.Module, variables: Variables, images: AnyArray, kinds: Any, *, train: bool
) -> dict[Path, list[jax.ShapeDtypeStruct]]:
    """Shape and dtype of what each call of modules of these kinds gives, by path, in order."""
    calls: dict[Path, list[jax.ShapeDtypeStruct]] = {}

    def see(module: nn.Module, x: Any, y: Any) -> Any:
        if isinstance(module, kinds):
            calls.setdefault(module.path, []).append(jax.ShapeDtypeStruct(y.shape, y.dtype))
        return y

    apply = partial(model.apply, train=train, mutable=["batch_stats"])
    with watch(see, lifted=True):
        jax.eval_shape(apply, variables, to_float(images))
    return calls
