"""Networks with and without batch normalization."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import Array

from bnjax import initializers, norms
from bnjax.functional import BatchStats, fold
from bnjax.layers import BatchNorm
from bnjax.names import choose
from bnjax.norms import Norm

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    name: getattr(nn, name)
    for name in ("relu", "sigmoid", "tanh", "leaky_relu", "elu", "gelu", "silu", "softplus")
}


def activation(name: str) -> Callable[[Array], Array]:
    """That of a name in `ACTIVATIONS`; a `ValueError` names the nearest where there is none."""
    return ACTIVATIONS[choose("activation", name, ACTIVATIONS)]


class Activation(nn.Module):
    """An activation that `flax.linen.intercept_methods` can see."""

    function: Callable[[Array], Array]

    def __call__(self, x: Array) -> Array:
        """Applies the function."""
        return self.function(x)


class MLP(nn.Module):
    """Dense, normalization, activation, dropout, for each hidden size; then Dense.

    Whatever the normalization, the Dense layers keep their names and shapes, so that networks can
    be held side by side. Biases are PyTorch's. Dropout is inverted, as in Srivastava et al. (2014),
    section 10.

    Attributes:
        hidden_sizes: width of each hidden layer.
        num_classes: number of logits.
        norm: None, a name of `bnjax.norms.NORMS`, or a function `train -> module`.
        activation: what follows each hidden layer.
        kernel_init: initializer of all kernels.
        dropout_rate: share of the features of each hidden layer that training sets to 0, scaling
            the others by 1 / (1 - rate); below 1.
        norm_after: normalize what leaves each activation instead of what enters it.

    Example:
        >>> model = MLP(hidden_sizes=(32, 32), num_classes=10)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 784)), train=True)
        >>> model.apply(variables, jnp.ones((5, 28, 28)), train=False).shape
        (5, 10)
    """

    hidden_sizes: tuple[int, ...] = (32, 32)
    num_classes: int = 10
    norm: str | Norm | None = "batch"
    activation: Callable[[Array], Array] = nn.relu
    kernel_init: nn.initializers.Initializer = initializers.torch_default
    dropout_rate: float = 0.0
    norm_after: bool = False

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool, return_features: bool = False
    ) -> Array | tuple[Array, list[Array]]:
        """Computes the logits.

        Args:
            x: `[N, ...]` floating point; the axes after the first are flattened.
            train: normalize with the batch's statistics and update the running ones (apply with
                `mutable=["batch_stats"]`), instead of using the running ones; drop features
                (apply with `rngs={"dropout": key}` if `dropout_rate` is not 0).
            return_features: also return what leaves each hidden layer, before dropout.

        Returns:
            Logits `[N, num_classes]`; with `return_features` a pair of them and a list with one
            `[N, H]` array per hidden layer.

        Raises:
            ValueError: if `train` and a batch of one example meet batch normalization, or
                `dropout_rate` is not in [0, 1).
        """
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate is {self.dropout_rate}: expected in [0, 1)")
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        features = []
        for size in self.hidden_sizes:
            x = self._dense(size, x)
            normalize: list[Any] = [] if self.norm is None else [norms.norm(self.norm)(train)]
            activate = [Activation(self.activation)]
            for layer in activate + normalize if self.norm_after else normalize + activate:
                x = layer(x)
            features.append(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        logits = self._dense(self.num_classes, x)
        return (logits, features) if return_features else logits

    def _dense(self, size: int, x: Array) -> Array:
        bias_init = initializers.torch_default_bias(fan_in=x.shape[-1])
        return nn.Dense(size, kernel_init=self.kernel_init, bias_init=bias_init)(x)


def fold_batch_norm(model: MLP, variables: Mapping[str, Any]) -> tuple[MLP, dict[str, Any]]:
    """The same network in evaluation mode, without batch normalization.

    Each normalization is merged into the Dense layer before it (`bnjax.functional.fold`), with its
    own epsilon, and with scale and bias where it has them.

    Returns:
        The model with `norm=None` and its variables, `{"params": ...}`.

    Raises:
        ValueError: if the model has not `bnjax.BatchNorm` or Flax's before its activations, or the
            variables are not its own.

    Example:
        >>> model = MLP(hidden_sizes=(32, 32), num_classes=10)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 784)), train=True)
        >>> folded, variables = fold_batch_norm(model, variables)
        >>> folded.norm, sorted(variables["params"])
        (None, ['Dense_0', 'Dense_1', 'Dense_2'])
    """
    if model.norm is None or model.norm_after:
        raise ValueError("nothing to fold: the model does not normalize before its activations")
    norm = batch_norm_of(model.norm)
    kernel = variables["params"].get("Dense_0", {}).get("kernel", jnp.zeros((1, 1)))
    images = jax.ShapeDtypeStruct((2, kernel.shape[0]), jnp.float32)
    own = jax.eval_shape(partial(model.init, train=True), jax.random.key(0), images)
    expected, given = (
        {(path, jnp.shape(leaf)) for path, leaf in flatten_dict(one).items() if path[-1] != "count"}
        for one in (own, variables)
    )
    if wrong := {path[1] for path, _ in expected ^ given}:
        raise ValueError(
            "the variables are not those of the model; missing, surplus or of another shape: "
            f"{', '.join(sorted(wrong))}"
        )
    params, stats = variables["params"], variables.get("batch_stats", {})
    folded = {name: dense for name, dense in params.items() if name.startswith("Dense_")}
    for k in range(len(model.hidden_sizes)):
        name = norm.name or f"{type(norm).__name__}_{k}"
        dense, learned = folded[f"Dense_{k}"], params.get(name, {})
        affine = {"scale": learned.get("scale"), "offset": learned.get("bias")}
        running = BatchStats(**stats[name])
        kernel, bias = fold(**dense, **affine, stats=running, epsilon=norm.epsilon)
        folded[f"Dense_{k}"] = {"kernel": kernel, "bias": bias}
    return model.clone(norm=None), {"params": folded}


def batch_norm_of(norm: str | Norm) -> BatchNorm | nn.BatchNorm:
    """The batch normalization of that name; a `ValueError` if it is another kind of layer."""
    layer = norms.norm(norm)(False)
    if not isinstance(layer, BatchNorm | nn.BatchNorm):
        raise ValueError(f"the model normalizes by {type(layer).__name__}: expected BatchNorm")
    return layer
