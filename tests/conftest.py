"""Strict numerics for all tests: rank promotion raises, warnings are errors (pyproject.toml)."""

from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.lab import devices

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED_MNIST = Path(__file__).parents[2] / "shared" / "mnist"


@pytest.fixture
def strict_promotion():
    """Mixing dtypes raises, as optax and Flax's own layers cannot bear everywhere."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """float64 is available."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mnist_directory() -> Path:
    """The real MNIST, where it lies beside the project."""
    if not SHARED_MNIST.is_dir():
        pytest.skip(f"the real MNIST is not at {SHARED_MNIST}")
    return SHARED_MNIST


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch, tmp_path_factory):
    """Tests see neither the user's data nor the user's cache."""
    monkeypatch.delenv("BNJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory):
    """What this file compiles is compiled once, for this process and those it starts."""
    home = tmp_path_factory.mktemp("cache_home")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    devices.cache_programs(home / "bnjax" / "programs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "cache_programs", lambda directory: None)
        yield home
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
