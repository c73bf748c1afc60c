"""Runs that nobody ran and data that nobody took: what their files hold is made up."""

import contextlib
import dataclasses
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import numpy as np

from bnjax.data import FILES
from bnjax.layers import BatchNorm
from experiments.lab import arms, metrics, probes, rundir


def line(epoch: int, arm: str, replicate: int = 0, **changes) -> dict:
    values = dict.fromkeys(metrics.METRICS, 0.5)
    place = {"epoch": epoch, "arm": arm, "replicate": replicate}
    return {**place, **values, "seconds": 0.25, **changes}


def make_lines(epochs: int, replicates: int, seed: int = 0, arms=("bn", "no_bn")) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        line(
            epoch, arm, replicate, **dict(zip(metrics.METRICS, rng.random(5).tolist(), strict=True))
        )
        for epoch in range(1, epochs + 1)
        for replicate in range(replicates)
        for arm in arms
    ]


def make_curves(
    epochs: int, replicates: int, seed: int = 0, arms=("bn", "no_bn")
) -> metrics.Curves:
    return metrics.curves(make_lines(epochs, replicates, seed, arms), arms)


def make_summary(epochs: int = 1, replicates: int = 1, seed: int = 0, arms=("bn", "no_bn")) -> dict:
    """Against the last of the arms."""
    return metrics.summarize(make_curves(epochs, replicates, seed, arms), arms[-1])


def named(chosen, what: str) -> dict[str, str]:
    """The `label` or `title` of each of these arms."""
    return {arm: getattr(arms.find(arm), what) for arm in chosen}


def config(experiment, requested: str = "digits") -> dict:
    labels, titles = (named(experiment.arms, what) for what in ("label", "title"))
    provenance = rundir.provenance()
    return {
        "experiment": dataclasses.asdict(experiment),
        "arms": {arm: {"label": labels[arm], "title": titles[arm]} for arm in experiment.arms},
        "execution": {},
        "dataset": {"name": experiment.dataset, "requested": requested, "sha256": "0" * 64},
        **provenance,
        "versions": {**provenance["versions"], "bnjax": "0.2.0"},
        "device_kind": "abacus",
        "device_count": 3,
        "process_count": 1,
        "mesh": {"replicate": 3, "data": 1},
    }


def make_probes(experiment, replicates: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What `probes.after_epoch` gives."""
    rng = np.random.default_rng(seed)
    depth = len(experiment.hidden_sizes)
    edges = np.sort(rng.normal(size=(replicates, depth, probes.BINS + 1)))
    made: dict[str, np.ndarray] = {}
    for arm in experiment.arms:
        of_arm = {
            **{
                f"features_{k}": rng.random((replicates, 1, size))
                for k, size in enumerate(experiment.hidden_sizes, 1)
            },
            "gradient_norms": rng.random((replicates, depth + 1)),
            "percentiles": np.sort(rng.normal(size=(replicates, depth, len(probes.PERCENTILES)))),
            "histograms": rng.integers(0, 9, (replicates, depth, probes.BINS)),
            "edges": edges,
        }
        made |= {f"{arm}/{name}": values for name, values in of_arm.items()}
    return made


def make_end(experiment, seed: int = 0) -> dict[str, np.ndarray]:
    """What `probes.at_end` gives, of 50 test examples; all arms but the last normalize batches."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, 50).astype(np.uint8)
    guesses = {
        arm: np.where(rng.random(50) < 0.8, labels, (labels + 1) % 10).astype(np.uint8)
        for arm in experiment.arms
    }
    right = sum((guess == labels).astype(int) for guess in guesses.values())
    made = {"labels": labels}
    for arm, guess in guesses.items():
        only = np.flatnonzero((guess == labels) & (right == 1))
        made[f"{arm}/predictions"] = guess
        made[f"only_{arm}"] = only
        made[f"images_{arm}"] = rng.integers(0, 256, (len(only), 28, 28)).astype(np.uint8)
    for arm in experiment.arms[:-1]:
        for k, size in enumerate(experiment.hidden_sizes):
            for kind in ("running", "population"):
                made[f"{arm}/{kind}/BatchNorm_{k}/mean"] = rng.normal(size=size)
                made[f"{arm}/{kind}/BatchNorm_{k}/var"] = rng.random(size) + 0.5
    return made


def save_run(path: Path, experiment, replicates: int = 1, requested: str = "digits") -> list[dict]:
    """Writes all that a report needs; returns the lines of the metrics."""
    reference = experiment.reference or experiment.arms[-1]
    experiment = dataclasses.replace(experiment, replicates=replicates, reference=reference)
    rundir.create(path, config(experiment, requested))
    lines = make_lines(experiment.epochs, replicates, arms=experiment.arms)
    metrics.append(path, lines)
    for epoch in range(1, experiment.epochs + 1):
        file = path / "probes" / f"epoch-{epoch:03}.npz"
        rundir.write_arrays(file, make_probes(experiment, replicates, epoch))
    rundir.write_arrays(path / "probes" / "end.npz", make_end(experiment))
    example = {"image": np.zeros((28, 28), np.uint8), "label": np.int32(6)}
    rundir.write_arrays(path / "probes" / "example.npz", example)
    return lines


def norm_of(layer):
    """A layer that takes `use_running_average`, as `MLP` takes its normalization."""
    return lambda train: layer(use_running_average=not train)


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file has it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def noise(train: int, test: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """A dataset of bytes: images and labels to train on, and to test on."""
    rng = np.random.default_rng(seed)
    shapes = (train, 28, 28), (train,), (test, 28, 28), (test,)
    return tuple(rng.integers(0, 256 if shape[1:] else 10, shape, np.uint8) for shape in shapes)


def write_idx(path: Path, *arrays: np.ndarray) -> Path:
    """The four files of a dataset."""
    path.mkdir(parents=True)
    for name, array in zip(FILES, arrays, strict=True):
        (path / name).write_bytes(idx(array.astype(np.uint8)))
    return path


class Block(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (3, 3), strides=2)(x)
        return nn.relu(BatchNorm(use_running_average=not self.train)(x))


class Nested(nn.Module):
    """A convolutional network of a user's own: nothing of `bnjax.models`, and modules in it."""

    depth: int

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(*x.shape[:3], -1)
        for _ in range(self.depth):
            x = Block(train)(x)
        x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        return nn.Dense(10)(x.reshape(len(x), -1))


@contextlib.contextmanager
def locked(path: Path, mode: int = 0) -> Iterator[None]:
    """Takes permissions from `path`, and root's privileges from this process."""
    before, user = path.stat().st_mode, os.geteuid()
    path.chmod(mode)
    if user == 0:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(before)
