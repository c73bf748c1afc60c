"""The paired training loop as bnjax and its peers write it, to be timed by `experiments.benchmark`.

Each contender trains the network of the preset boostcourse with batch normalization and its twin
on the same batches. It takes a file with the arrays of `bnjax.data.Dataset`, returns a function
that trains for an epoch and tells its seconds, and imports nothing that its users would not import.
"""

import dataclasses
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

HIDDEN_SIZES = (32, 32)
NUM_CLASSES = 512
BATCH_SIZE = 100
LEARNING_RATE = 1e-3

Epoch = Callable[[], float]
Examples = tuple[np.ndarray, np.ndarray]


def load(data: str) -> list[Examples]:
    """Images and labels of the training and the test set."""
    with np.load(data) as arrays:
        return [(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test")]


def bnjax(data: str, replicates: int = 1) -> Epoch:
    """This project's own loop; one call trains all replicates."""
    import jax

    from bnjax import paired
    from bnjax.paired import Trainer
    from bnjax.training import Batch
    from experiments.lab import arms, devices
    from experiments.lab.presets import BOOSTCOURSE

    experiment = dataclasses.replace(BOOSTCOURSE, replicates=replicates)
    jax.config.update("jax_default_matmul_precision", experiment.matmul_precision)
    placements = devices.make_placements(arms.make_arms(experiment), "auto", replicates)
    train, test = (Batch(*examples) for examples in load(data))
    keys = paired.replicate_keys(experiment.seed, replicates)
    trainer = Trainer(placements, keys, train, test, experiment.batch_size)
    epochs = trainer.epochs(trainer.initial_states(), range(1, 10**6))

    def call() -> float:
        epoch = next(epochs)
        jax.block_until_ready((epoch.train, epoch.test))  # the next epoch starts on idle devices
        return epoch.seconds

    return call


def pytorch(data: str, loader: bool = False) -> Epoch:
    """Eager PyTorch on tensors in memory or, as notebooks do it, on a Dataset and a DataLoader."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load(data)[0]
    all_x = torch.tensor(images, device=device).float().div(255).flatten(1)
    all_y = torch.tensor(labels, device=device).long()

    def create(use_batch_norm: bool) -> nn.Module:
        layers: list[nn.Module] = []
        sizes = (images[0].size, *HIDDEN_SIZES)
        for fan_in, size in pairwise(sizes):
            norm = [nn.BatchNorm1d(size)] if use_batch_norm else []
            layers += [nn.Linear(fan_in, size), *norm, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], NUM_CLASSES)).to(device)

    networks = [create(True), create(False)]
    optimizers = [torch.optim.Adam(n.parameters(), LEARNING_RATE) for n in networks]

    class Digits(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(images[index]).float().div(255), int(labels[index])

    def batches() -> Any:
        if loader:
            return torch.utils.data.DataLoader(Digits(), BATCH_SIZE, shuffle=True, drop_last=True)
        order = torch.randperm(len(labels), device=device).split(BATCH_SIZE)
        return ((all_x[i], all_y[i]) for i in order if len(i) == BATCH_SIZE)

    def fit() -> None:
        for x, y in batches():
            x, y = x.to(device).flatten(1), y.to(device)
            for network, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                loss = cross_entropy(network.train()(x), y)
                loss.backward()
                optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return _timed(fit)


def flax(data: str) -> Epoch:
    """Flax's own MNIST loop: a compiled step, called from Python with batches taken in NumPy."""
    import flax.linen as nn
    import jax
    import optax
    from flax.training import train_state

    class Network(nn.Module):
        use_batch_norm: bool

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = x.reshape((x.shape[0], -1))
            for size in HIDDEN_SIZES:
                x = nn.Dense(size)(x)
                if self.use_batch_norm:
                    x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
                x = nn.relu(x)
            return nn.Dense(NUM_CLASSES)(x)

    class State(train_state.TrainState):
        batch_stats: Any

    images, labels = load(data)[0]
    images = images.astype(np.float32) / 255
    rng = np.random.default_rng(0)

    def create(use_batch_norm: bool) -> State:
        network = Network(use_batch_norm)
        variables = {"batch_stats": {}, **network.init(jax.random.key(0), images[:1])}
        return State.create(apply_fn=network.apply, tx=optax.adam(LEARNING_RATE), **variables)

    @jax.jit
    def step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), ((logits.argmax(-1) == y).mean(), updates)

        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (accuracy, updates)), grads = value_and_grad(state.params)
        return state.apply_gradients(grads=grads, **updates), loss, accuracy

    states = [create(True), create(False)]

    def fit() -> None:
        losses = []
        steps = len(labels) // BATCH_SIZE
        for i in rng.permutation(len(labels))[: steps * BATCH_SIZE].reshape(steps, -1):
            for k, state in enumerate(states):
                states[k], loss, _ = step(state, images[i], labels[i])
                losses.append(loss)
        float(np.mean(losses))

    return _timed(fit)


def _timed(fit: Callable[[], None]) -> Epoch:
    def call() -> float:
        start = time.perf_counter()
        fit()
        return time.perf_counter() - start

    return call
