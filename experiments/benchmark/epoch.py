"""The paired training loop as bnjax and its peers write it, an epoch at a time.

Each contender trains the network of the preset boostcourse with batch normalization and its twin on
the same batches, in a process of its own, which shares nothing with others but the machine. It is a
function that takes the dataset and returns one that trains for an epoch and tells its seconds.
"""

import dataclasses
import importlib.util
import timeit
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training import train_state

from bnjax import paired
from bnjax.data import Dataset
from experiments.benchmark.turns import Part, compare, take_turns
from experiments.lab import arms, devices, scratch
from experiments.lab.presets import BOOSTCOURSE as PRESET

Epoch = Callable[[], float]
Contender = Callable[[Dataset], Epoch]


def run(dataset: Dataset, repeats: int) -> Part:
    """Measures every contender, those in PyTorch where it is installed."""
    torch = importlib.util.find_spec("torch")
    there = {name: one for name, one in CONTENDERS.items() if torch or "PyTorch" not in name}
    seconds = measure(there, dataset, repeats)
    title = "Paired epoch of boostcourse, per replicate"
    return {"seconds_per_replicate": seconds}, title, compare(seconds, "s")


def measure(
    contenders: Mapping[str, Contender], dataset: Dataset, repeats: int
) -> dict[str, list[float]]:
    """The seconds that contenders tell by turns, by name, each in its process."""
    calls = {}
    with ExitStack() as stack:
        for name, contender in contenders.items():
            pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            pool.submit(_prepare, contender, dataset).result()
            calls[name] = lambda pool=pool: pool.submit(_train).result()
        return take_turns(calls, repeats)


_prepared: list[Epoch] = []  # in the contender's process


def _prepare(contender: Contender, dataset: Dataset) -> None:
    _prepared.append(contender(dataset))


def _train() -> float:
    return _prepared[0]()


def bnjax(dataset: Dataset, replicates: int = 1, mesh: str = "auto", **settings: Any) -> Epoch:
    """This project's own loop; one call trains all replicates and tells the seconds of each.

    `settings` are those in which it differs from the preset.
    """
    experiment = dataclasses.replace(PRESET, **settings)
    trainer = paired.Trainer(
        devices.make_placements(arms.make_arms(experiment), mesh, replicates),
        paired.replicate_keys(experiment.seed, replicates),
        *scratch.batches(dataset),
        experiment.batch_size,
        statistics=experiment.bn_statistics,
    )
    epochs = trainer.epochs(trainer.initial_states(), range(1, 10**6))

    def train() -> float:
        epoch = next(epochs)
        jax.block_until_ready((epoch.train, epoch.test))  # the next epoch starts on idle devices
        return epoch.seconds / replicates

    return train


def flax(dataset: Dataset) -> Epoch:
    """Flax's own MNIST loop: a compiled step, called from Python with batches taken in NumPy."""

    class State(train_state.TrainState):
        batch_stats: Any

    images = dataset.train_images.reshape(len(dataset.train_images), -1).astype(np.float32) / 255
    labels = dataset.train_labels
    rng = np.random.default_rng(0)

    def create(use_batch_norm: bool) -> State:
        layers: list[Callable] = []
        for size in PRESET.hidden_sizes:
            norm = [nn.BatchNorm(use_running_average=False, momentum=0.9)] if use_batch_norm else []
            layers += [nn.Dense(size), *norm, nn.relu]
        network = nn.Sequential([*layers, nn.Dense(PRESET.num_classes)])
        variables = {"batch_stats": {}, **network.init(jax.random.key(0), images[:1])}
        optimizer = optax.adam(PRESET.learning_rate)
        return State.create(apply_fn=network.apply, tx=optimizer, **variables)

    @jax.jit
    def step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, **updates), loss

    states = [create(True), create(False)]

    def train() -> None:
        steps = len(labels) // PRESET.batch_size
        order = rng.permutation(len(labels))[: steps * PRESET.batch_size]
        for i in order.reshape(steps, -1):
            for k, state in enumerate(states):
                states[k], _ = step(state, images[i], labels[i])
        jax.block_until_ready(states)

    return partial(timeit.timeit, train, number=1)


def pytorch(dataset: Dataset, loader: bool = False) -> Epoch:
    """Eager PyTorch on tensors in memory or, as notebooks do it, on a Dataset and a DataLoader."""
    import torch
    from torch.utils.data import DataLoader

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.tensor(dataset.train_images, device=device).float().div(255).flatten(1)
    labels = torch.tensor(dataset.train_labels, device=device).long()

    def create(use_batch_norm: bool) -> torch.nn.Module:
        layers: list[torch.nn.Module] = []
        sizes = (images.shape[1], *PRESET.hidden_sizes)
        for fan_in, size in pairwise(sizes):
            norm = [torch.nn.BatchNorm1d(size)] if use_batch_norm else []
            layers += [torch.nn.Linear(fan_in, size), *norm, torch.nn.ReLU()]
        layers.append(torch.nn.Linear(sizes[-1], PRESET.num_classes))
        return torch.nn.Sequential(*layers).to(device)

    networks = [create(True), create(False)]
    optimizers = [torch.optim.Adam(n.parameters(), PRESET.learning_rate) for n in networks]

    class Digits(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image = torch.from_numpy(dataset.train_images[index])
            return image.float().div(255).flatten(), int(dataset.train_labels[index])

    def batches() -> Any:
        if loader:
            return DataLoader(Digits(), PRESET.batch_size, shuffle=True, drop_last=True)
        order = torch.randperm(len(labels), device=device).split(PRESET.batch_size)
        return ((images[i], labels[i]) for i in order if len(i) == PRESET.batch_size)

    def train() -> None:
        for x, y in batches():
            x, y = x.to(device), y.to(device)
            for network, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(x), y).backward()
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return partial(timeit.timeit, train, number=1)


CONTENDERS: dict[str, Contender] = {
    "PyTorch": pytorch,
    "PyTorch loader": partial(pytorch, loader=True),
    "Flax": flax,
    **{f"bnjax, R = {r}": partial(bnjax, replicates=r) for r in (1, 8, 32)},
}
