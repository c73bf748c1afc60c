"""Probes: pure functions `(model, variables, batch) -> dict of arrays` that look into a network."""

from typing import Any

import flax.linen as nn
from jax import Array

from bnjax.training import Batch, to_float


def features(model: nn.Module, variables: dict[str, Any], batch: Batch) -> dict[str, Array]:
    """What leaves each hidden layer's activation, in evaluation mode.

    Args:
        model: called as `model.apply(variables, images, train=False, return_features=True)`.
        variables: its parameters and running statistics.
        batch: `[N, ...]` images; the labels are not used.

    Returns:
        `{"features_1": [N, H], ...}`, one entry per hidden layer, from the input on.
    """
    _, layers = model.apply(variables, to_float(batch.images), train=False, return_features=True)
    return {f"features_{number}": layer for number, layer in enumerate(layers, start=1)}
