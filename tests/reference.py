"""Batch normalization in float64 NumPy, as plainly as it can be written."""

import numpy as np


def batch_norm(x, scale, bias, epsilon=1e-5, mask=None):
    """Returns y, mean and biased variance of `[N, ..., C]`, over the rows where `mask` is True."""
    x = np.asarray(x, np.float64)
    rows = x[mask] if mask is not None else x.reshape(-1, x.shape[-1])
    mean, var = rows.mean(axis=0), rows.var(axis=0)
    y = np.asarray(scale, np.float64) * (x - mean) / np.sqrt(var + epsilon) + np.asarray(bias)
    return (y if mask is None else np.where(mask[..., None], y, 0.0)), mean, var


def relative_error(actual, expected):
    """Norm of the difference over the norm of what is expected."""
    expected = np.asarray(expected, np.float64)
    difference = np.asarray(actual, np.float64) - expected
    return np.linalg.norm(difference) / np.linalg.norm(expected)
