"""The paired training loop as bnjax and its peers write it, to be timed by `experiments.benchmark`.

Each contender trains the network with batch normalization and its twin on the same batches, and
evaluates both on all training and test examples. It imports nothing that its users would not
import: `python -m experiments.benchmark.loops JOB EPOCHS` is the whole experiment as a PyTorch
script.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Epoch = Callable[[], tuple[float, float]]  # seconds of training, seconds of evaluation
Examples = tuple[np.ndarray, np.ndarray]  # images and labels
EVALUATION_BATCH = 1000


class Job(NamedTuple):
    """What to train: a file of arrays as `bnjax.data.Dataset` names them, and the settings."""

    data: str
    hidden_sizes: tuple[int, ...] = (32, 32)
    num_classes: int = 512
    batch_size: int = 100
    learning_rate: float = 1e-3
    replicates: int = 1

    def load(self) -> list[Examples]:
        """The training and the test set, images as bytes."""
        with np.load(self.data) as data:
            return [(data[f"{p}_images"], data[f"{p}_labels"]) for p in ("train", "test")]

    def load_floats(self) -> list[Examples]:
        """The same, images from 0 to 1."""
        return [(images.astype(np.float32) / 255, labels) for images, labels in self.load()]


def bnjax(job: Job) -> Epoch:
    """This project's own loop; one call trains all replicates."""
    import jax

    from bnjax import paired
    from bnjax.paired import Trainer
    from bnjax.training import Batch
    from experiments.lab import arms, devices
    from experiments.lab.presets import BOOSTCOURSE

    settings = job._asdict()
    del settings["data"]
    experiment = dataclasses.replace(BOOSTCOURSE, **settings)
    jax.config.update("jax_default_matmul_precision", experiment.matmul_precision)
    placements = devices.make_placements(arms.make_arms(experiment), "auto", job.replicates)
    train, test = (Batch(*examples) for examples in job.load())
    keys = paired.replicate_keys(experiment.seed, job.replicates)
    trainer = Trainer(placements, keys, train, test, job.batch_size)
    epochs = trainer.epochs(trainer.initial_states(), range(1, 10**6))

    def call() -> tuple[float, float]:
        start = time.perf_counter()
        epoch = next(epochs)
        jax.block_until_ready((epoch.train, epoch.test))
        return epoch.seconds, time.perf_counter() - start - epoch.seconds

    return call


def pytorch(job: Job, loader: bool = False) -> Epoch:
    """Eager PyTorch on tensors in memory or, as notebooks do it, on a Dataset and a DataLoader."""
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = job.load()[0]
    sets = [
        (torch.tensor(x, device=device).flatten(1), torch.tensor(y, device=device).long())
        for x, y in job.load_floats()
    ]

    def create(use_batch_norm: bool) -> nn.Module:
        layers: list[nn.Module] = []
        sizes = (images[0].size, *job.hidden_sizes)
        for fan_in, size in pairwise(sizes):
            norm = [nn.BatchNorm1d(size)] if use_batch_norm else []
            layers += [nn.Linear(fan_in, size), *norm, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], job.num_classes)).to(device)

    networks = [create(True), create(False)]
    optimizers = [torch.optim.Adam(n.parameters(), job.learning_rate) for n in networks]

    class Digits(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(images[index]).float().div(255), int(labels[index])

    def batches() -> Any:
        if loader:
            return torch.utils.data.DataLoader(
                Digits(), job.batch_size, shuffle=True, drop_last=True
            )
        x, y = sets[0]
        order = torch.randperm(len(y), device=device).split(job.batch_size)
        return ((x[i], y[i]) for i in order if len(i) == job.batch_size)

    def fit() -> None:
        for x, y in batches():
            x, y = x.to(device).flatten(1), y.to(device)
            for network, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                cross_entropy(network.train()(x), y).backward()
                optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        for network in networks:
            network.eval()
            for examples in sets:
                loss = correct = torch.zeros((), device=device)
                parts = (each.split(EVALUATION_BATCH) for each in examples)
                for x, y in zip(*parts, strict=True):
                    logits = network(x)
                    loss = loss + cross_entropy(logits, y, reduction="sum")
                    correct = correct + (logits.argmax(1) == y).sum()
                float(loss), float(correct)

    return _timed(fit, evaluate)


def flax(job: Job) -> Epoch:
    """Flax's own MNIST loop: a compiled step, called from Python with batches taken in NumPy."""
    import flax.linen as nn
    import jax
    import optax
    from flax.training import train_state

    class Network(nn.Module):
        use_batch_norm: bool

        @nn.compact
        def __call__(self, x: jax.Array, train: bool) -> jax.Array:
            x = x.reshape((x.shape[0], -1))
            for size in job.hidden_sizes:
                x = nn.Dense(size)(x)
                if self.use_batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
                x = nn.relu(x)
            return nn.Dense(job.num_classes)(x)

    class State(train_state.TrainState):
        batch_stats: Any

    sets = job.load_floats()
    rng = np.random.default_rng(0)

    def create(use_batch_norm: bool) -> State:
        network = Network(use_batch_norm)
        variables = network.init(jax.random.key(0), sets[0][0][:1], train=False)
        variables = {"batch_stats": {}, **variables}
        tx = optax.adam(job.learning_rate)
        return State.create(apply_fn=network.apply, tx=tx, **variables)

    def loss_fn(params: Any, state: State, x: jax.Array, y: jax.Array, train: bool) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, x, train=train, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), ((logits.argmax(-1) == y).mean(), updates)

    @jax.jit
    def step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (accuracy, updates)), grads = value_and_grad(state.params, state, x, y, True)
        return state.apply_gradients(grads=grads, **updates), loss, accuracy

    evaluation_step = jax.jit(lambda state, x, y: loss_fn(state.params, state, x, y, False)[0])
    states = [create(True), create(False)]

    def fit() -> None:
        x, y = sets[0]
        losses = []
        steps = len(y) // job.batch_size
        for index in rng.permutation(len(y))[: steps * job.batch_size].reshape(steps, -1):
            for k, state in enumerate(states):
                states[k], loss, _ = step(state, x[index], y[index])
                losses.append(loss)
        float(np.mean(losses))

    def evaluate() -> None:
        for state in states:
            for x, y in sets:
                starts = range(0, len(y), EVALUATION_BATCH)
                parts = [slice(start, start + EVALUATION_BATCH) for start in starts]
                float(np.mean([evaluation_step(state, x[part], y[part]) for part in parts]))

    return _timed(fit, evaluate)


def keras(job: Job) -> Epoch:
    """Keras 3 on JAX: `fit` and `evaluate`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    def create(use_batch_norm: bool) -> Any:
        layers: list[Any] = [keras.layers.Flatten()]
        for size in job.hidden_sizes:
            norm = [keras.layers.BatchNormalization(momentum=0.9)] if use_batch_norm else []
            layers += [keras.layers.Dense(size), *norm, keras.layers.ReLU()]
        model = keras.Sequential([*layers, keras.layers.Dense(job.num_classes)])
        model.compile(
            optimizer=keras.optimizers.Adam(job.learning_rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        return model

    models = [create(True), create(False)]
    sets = job.load_floats()

    def fit() -> None:
        for model in models:
            model.fit(*sets[0], batch_size=job.batch_size, epochs=1, verbose=0)

    def evaluate() -> None:
        for model in models:
            for examples in sets:
                model.evaluate(*examples, batch_size=EVALUATION_BATCH, verbose=0)

    return _timed(fit, evaluate)


def _timed(fit: Callable[[], None], evaluate: Callable[[], None]) -> Epoch:
    def call() -> tuple[float, float]:
        start = time.perf_counter()
        fit()
        middle = time.perf_counter()
        evaluate()
        return middle - start, time.perf_counter() - middle

    return call


if __name__ == "__main__":
    epoch, last = pytorch(Job(**json.loads(sys.argv[1]))), int(sys.argv[2])
    for number in range(1, last + 1):
        print(f"{number}/{last}", *epoch(), flush=True)
