"""The paired training loop as bnjax and its peers write it, to be timed by `experiments.benchmark`.

Each contender trains the network with batch normalization and its twin on the same batches, and
evaluates both on all training and test examples. It is made in a process of its own, and imports
nothing that its users would not import: `python -m experiments.benchmark.loops JOB EPOCHS` is the
whole experiment as a PyTorch script.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Epoch = Callable[[], tuple[float, float]]  # seconds of training, seconds of evaluation
EVALUATION_BATCH = 1000


class Job(NamedTuple):
    """What to train: a file of arrays as `bnjax.data.Dataset` names them, and the settings."""

    data: str
    hidden_sizes: tuple[int, ...] = (32, 32)
    num_classes: int = 512
    batch_size: int = 100
    learning_rate: float = 1e-3
    replicates: int = 1


def bnjax(job: Job) -> Epoch:
    """This project's own loop; one call trains all replicates."""
    import jax

    from bnjax import paired
    from bnjax.paired import Trainer
    from bnjax.training import Batch
    from experiments.lab import arms, devices
    from experiments.lab.presets import BOOSTCOURSE

    experiment = dataclasses.replace(
        BOOSTCOURSE,
        hidden_sizes=tuple(job.hidden_sizes),
        num_classes=job.num_classes,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        replicates=job.replicates,
    )
    data = np.load(job.data)
    train, test = (Batch(data[f"{p}_images"], data[f"{p}_labels"]) for p in ("train", "test"))
    jax.config.update("jax_default_matmul_precision", experiment.matmul_precision)
    placements = devices.make_placements(arms.make_arms(experiment), "auto", job.replicates)
    keys = paired.replicate_keys(0, job.replicates)
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
    data = np.load(job.data)

    def network(use_batch_norm: bool) -> nn.Module:
        layers: list[nn.Module] = []
        sizes = (data["train_images"][0].size, *job.hidden_sizes)
        for fan_in, size in zip(sizes, job.hidden_sizes, strict=False):
            norm = [nn.BatchNorm1d(size)] if use_batch_norm else []
            layers += [nn.Linear(fan_in, size), *norm, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], job.num_classes)).to(device)

    networks = [network(True), network(False)]
    optimizers = [torch.optim.Adam(n.parameters(), job.learning_rate) for n in networks]

    def tensors(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor(data[f"{part}_images"], device=device).float().div(255).flatten(1)
        return x, torch.tensor(data[f"{part}_labels"], device=device).long()

    train, test = tensors("train"), tensors("test")
    images, labels = data["train_images"], data["train_labels"]

    class Examples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return torch.from_numpy(images[index]).float().div(255), int(labels[index])

    def batches() -> Any:
        if loader:
            return torch.utils.data.DataLoader(
                Examples(), job.batch_size, shuffle=True, drop_last=True
            )
        order = torch.randperm(len(train[1]), device=device).split(job.batch_size)
        return ((train[0][i], train[1][i]) for i in order if len(i) == job.batch_size)

    def fit() -> None:
        for x, y in batches():
            x, y = x.to(device).flatten(1), y.to(device)
            for network, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                cross_entropy(network.train()(x), y).backward()
                optimizer.step()

    def evaluate() -> None:
        with torch.no_grad():
            for network in networks:
                network.eval()
                for x, y in (train, test):
                    loss = correct = torch.zeros((), device=device)
                    for xs, ys in zip(
                        x.split(EVALUATION_BATCH), y.split(EVALUATION_BATCH), strict=True
                    ):
                        logits = network(xs)
                        loss = loss + cross_entropy(logits, ys, reduction="sum")
                        correct = correct + (logits.argmax(1) == ys).sum()
                    float(loss), float(correct)

    return _timed(fit, evaluate)


def pytorch_loader(job: Job) -> Epoch:
    """`pytorch` with a DataLoader."""
    return pytorch(job, loader=True)


def flax(job: Job) -> Epoch:
    """Flax's own MNIST loop: a compiled step, called from Python with batches taken in NumPy."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
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

    data = np.load(job.data)
    sets: list[tuple[np.ndarray, np.ndarray]] = [
        (data[f"{part}_images"].astype(np.float32) / 255, data[f"{part}_labels"])
        for part in ("train", "test")
    ]
    rng = np.random.default_rng(0)

    def create(use_batch_norm: bool) -> State:
        network = Network(use_batch_norm)
        variables = network.init(jax.random.key(0), sets[0][0][:1], train=False)
        return State.create(
            apply_fn=network.apply,
            params=variables["params"],
            tx=optax.adam(job.learning_rate),
            batch_stats=variables.get("batch_stats", {}),
        )

    def forward(state: State, params: Any, x: jax.Array, y: jax.Array, train: bool) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, x, train=train, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), (updates, jnp.mean(logits.argmax(-1) == y))

    @jax.jit
    def step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array, jax.Array]:
        def loss_fn(params: Any) -> Any:
            return forward(state, params, x, y, train=True)

        (loss, (updates, accuracy)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params
        )
        updated = state.apply_gradients(
            grads=gradients, batch_stats=updates.get("batch_stats", state.batch_stats)
        )
        return updated, loss, accuracy

    evaluation_step = jax.jit(lambda state, x, y: forward(state, state.params, x, y, train=False))
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
                found = [
                    evaluation_step(
                        state, x[i : i + EVALUATION_BATCH], y[i : i + EVALUATION_BATCH]
                    )[0]
                    for i in range(0, len(y), EVALUATION_BATCH)
                ]
                float(np.mean(found))

    return _timed(fit, evaluate)


def keras(job: Job) -> Epoch:
    """Keras 3 on JAX: `fit` and `evaluate`."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    data = np.load(job.data)

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
    train, test = (
        (data[f"{part}_images"].astype(np.float32) / 255, data[f"{part}_labels"])
        for part in ("train", "test")
    )

    def fit() -> None:
        for model in models:
            model.fit(*train, batch_size=job.batch_size, epochs=1, verbose=0)

    def evaluate() -> None:
        for model in models:
            for x, y in (train, test):
                model.evaluate(x, y, batch_size=EVALUATION_BATCH, verbose=0)

    return _timed(fit, evaluate)


def _timed(fit: Callable[[], None], evaluate: Callable[[], None]) -> Epoch:
    def call() -> tuple[float, float]:
        start = time.perf_counter()
        fit()
        middle = time.perf_counter()
        evaluate()
        return middle - start, time.perf_counter() - middle

    return call


def _script(job: Job, epochs: int) -> None:
    call = pytorch(job)
    for epoch in range(1, epochs + 1):
        print(f"{epoch}/{epochs}", *call(), flush=True)


if __name__ == "__main__":
    _script(Job(**json.loads(sys.argv[1])), int(sys.argv[2]))
