"""Strict numerics for all tests: rank promotion raises, warnings are errors (pyproject.toml).

What one test has compiled, no other compiles again: tests, the processes among which they are
dealt, and those that they start share JAX's cache of compiled programs, made anew for each suite.
Most of the time is compilation, which takes a third less without LLVM's optimizations; where the
last bits are the subject, `all_optimizations` compiles as users have it.
"""

import os
import signal
import tempfile
from pathlib import Path

PROGRAMS = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="programs-"))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402  reads the environment
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# What takes longest begins first, so that at the end no process works alone.
LONGEST = ("test_processes", "test_claims", "test_readme", "test_devices", "test_crash_recovery")

SHARED_MNIST = Path(__file__).parents[2] / "shared" / "mnist"


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Compiled programs go with the file of their tests: each takes some of the memory mappings
    that a process may have, and where these run out XLA ends it."""
    yield
    jax.clear_caches()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # commands set it


@pytest.fixture(scope="module")
def all_optimizations():
    """Programs round as those that users compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    jax.config.update("jax_disable_most_optimizations", before == "1")


@pytest.fixture
def strict_promotion():
    """Mixing dtypes raises, as optax and Flax's own layers cannot bear everywhere."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def python_sigint():
    """Ctrl-C raises, also where a shell started pytest in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def x64():
    """float64 is available."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def public_path():
    """A directory that other users may enter, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture
def mnist_directory() -> Path:
    """The real MNIST, where it lies beside the project."""
    if not SHARED_MNIST.is_dir():
        pytest.skip(f"the real MNIST is not at {SHARED_MNIST}")
    return SHARED_MNIST


def make_cache(home: Path) -> Path:
    """A directory for `$XDG_CACHE_HOME` in which commands find what was compiled before."""
    (home / "bnjax").mkdir()
    (home / "bnjax" / "programs").symlink_to(PROGRAMS, target_is_directory=True)
    return home


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """A cache that several tests share; neither the user's data nor the user's cache are seen."""
    home = make_cache(tmp_path_factory.mktemp("cache_home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BNJAX_DATA_DIR", raising=False)
        patch.setenv("TFDS_DATA_DIR", str(home / "no tfds"))
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Each test begins with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(make_cache(tmp_path_factory.mktemp("cache"))))
