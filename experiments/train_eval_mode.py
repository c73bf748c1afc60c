"""What goes wrong when a trained network is left in training mode, in numbers and one picture.

Two networks of two hidden layers of 32 are trained, one with batch normalization and one with
dropout of 0.3. Then their test predictions are taken as they should be, in evaluation mode,
and as they come out when that is forgotten.

    python -m experiments.train_eval_mode
    python -m experiments.train_eval_mode --dataset digits --epochs 20

It leaves a directory with train_eval_mode.png and numbers.json.
Exit status: 0 success; 2 a mistake in the command, the settings or the data; 130 after
Ctrl-C, 143 after SIGTERM.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from rich.console import Console

from bnjax import models, population, training
from bnjax.data import Dataset
from bnjax.training import Batch, TrainState
from experiments.lab import exits, rundir
from experiments.lab.console import print_plain
from experiments.lab.grids import accuracy_of, predict
from experiments.lab.plan import load_data

PROG = "python -m experiments.train_eval_mode"
CALLS = 20
GROUPS = (2, 10, 100)
BATCH_SIZE = 100


@dataclass(frozen=True)
class Settings:
    """What the lesson is shown on."""

    dataset: str = "auto"
    """auto, mnist, fashion_mnist, kmnist or digits; auto is MNIST where it can be had."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the dataset's IDX files are."""

    epochs: int = 5
    """Times that each network sees the training set."""

    seed: int = 0
    """Decides initial weights, order and dropout."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to create; by default runs/train_eval_mode-DATASET-TIME."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}: expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}: expected 0 to 4294967295")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    settings = tyro.cli(Settings, args=arguments, prog=PROG, description=__doc__)
    console = Console()

    def command(check: Callable[[], None]) -> int:
        with exits.user_errors():
            out = settings.out and rundir.expand(settings.out)
            if out is not None:
                rundir.check_free(out)
            dataset = load_data(settings.dataset, settings.data_dir, console)
            path = out or rundir.default_path("train_eval_mode", dataset.name)
            path.mkdir(parents=True, exist_ok=True)
            numbers = lesson(dataset, settings.epochs, settings.seed)
        check()
        for line in tell(numbers):
            print_plain(console, line)
        rundir.write_json(path / "numbers.json", numbers)
        then = "the numbers are in numbers.json"
        with exits.optional(console, "the picture could not be drawn", then):
            draw(path / "train_eval_mode.png", numbers)
        print_plain(console, f"\npicture and numbers: {path}")
        return 0

    return exits.run(command, list)


def lesson(dataset: Dataset, epochs: int, seed: int) -> dict[str, Any]:
    """Trains both networks and measures what the modes do to their predictions.

    Returns:
        Everything that `tell` and the picture need, as plain numbers and lists.
    """
    train = Batch(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    test = Batch(jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels))
    bn_key, dropout_key, call_key = jax.random.split(jax.random.key(seed), 3)
    with_bn = _train(models.MLP(), train, epochs, bn_key)
    with_dropout = _train(
        models.MLP((32, 32), 10, None, dropout_rate=0.3), train, epochs, dropout_key
    )
    return {
        "dataset": dataset.name,
        "epochs": epochs,
        "test_images": len(test.labels),
        "dropout": _dropout(with_dropout, test, jax.random.split(call_key, CALLS)),
        "alone": _alone(with_bn, test),
        "groups": _groups(with_bn, test, call_key),
        "population": _population(with_bn, train, test),
    }


def tell(numbers: dict[str, Any]) -> Iterator[str]:
    """The lesson in words, line by line."""
    count, dropout, alone = numbers["test_images"], numbers["dropout"], numbers["alone"]
    yield f"{count} test images of {numbers['dataset']}, after {numbers['epochs']} epochs"

    yield "\n1. Dropout left on: predictions change from call to call"
    low, high = min(dropout["training"]), max(dropout["training"])
    yield f"   images given more than one class in {CALLS} calls: {dropout['changing']}"
    yield f"   accuracy {low:.2%} to {high:.2%}; in evaluation mode {dropout['evaluation']:.2%}"

    yield "\n2. Batch normalization left in training mode: one image has no variance"
    yield f"   fed alone: {alone['error']}"
    classes = " or ".join(str(k) for k, votes in enumerate(alone["twice"]) if votes)
    yield f"   fed twice: every prediction is {classes}; accuracy {alone['accuracy']:.2%}"

    yield "\n3. ... and an image is judged by the company it keeps"
    yield "   images in a batch   accuracy   judged otherwise in another order"
    for size, group in numbers["groups"]["training"].items():
        yield f"   {size:>17}{group['accuracy']:>11.2%}{group['changing']:>19} of {group['of']}"
    evaluation = numbers["groups"]["evaluation"]
    told = f"{evaluation['changing']} change when each image is fed alone"
    yield f"   in evaluation mode {evaluation['accuracy']:.2%}; {told}"

    yield "\n4. Population statistics mend it: here every image is alone in its batch"
    yield "   statistics           accuracy   off in mean and deviation, by layer"
    for name, found in numbers["population"].items():
        gaps = (f"{gap['mean']:.3f} and {gap['std']:.3f}" for gap in found["gaps"].values())
        yield f"   {name:<20}{found['accuracy']:>9.2%}   {', '.join(gaps)}"


def draw(file: Path, numbers: dict[str, Any]) -> None:
    """Draws the lesson."""
    from experiments.report import figures  # matplotlib takes a third of a second

    rundir.write_bytes(file, figures.to_png(figures.train_eval_mode(numbers)))


def _train(model: models.MLP, train: Batch, epochs: int, key: Array) -> TrainState:
    init_key, order_key = jax.random.split(key)
    state = training.create_state(model, optax.adam(1e-3), init_key, train.images[:2])
    batch_size = min(BATCH_SIZE, len(train.labels))
    for epoch in range(epochs):
        order = jax.random.fold_in(order_key, epoch)
        state, _ = training.train_epoch(state, train, order, batch_size=batch_size)
    return state


def _dropout(state: TrainState, test: Batch, keys: Array) -> dict[str, Any]:
    count = len(test.labels)
    calls = np.stack([predict(state, test.images, count, train=True, key=key) for key in keys])
    votes = (calls[..., None] == np.arange(10)).sum(axis=0)  # [N, 10]
    torn = int(votes.max(axis=1).argmin())
    evaluation = predict(state, test.images, count, train=False)
    return {
        "changing": int((votes.max(axis=1) < len(keys)).sum()),
        "training": [accuracy_of(classes, test.labels) for classes in calls],
        "evaluation": accuracy_of(evaluation, test.labels),
        "torn_label": int(test.labels[torn]),
        "torn_votes": votes[torn].tolist(),
        "torn_evaluation": int(evaluation[torn]),
    }


def _alone(state: TrainState, test: Batch) -> dict[str, Any]:
    error = ""
    try:
        predict(state, test.images[:1], 1, train=True)
    except ValueError as refused:
        error = str(refused)
    twice = predict(state, test.images.repeat(2, axis=0), 2, train=True)[::2]
    return {
        "error": error,
        "twice": np.bincount(twice, minlength=10).tolist(),
        "evaluation": np.bincount(
            predict(state, test.images, 1, train=False), minlength=10
        ).tolist(),
        "accuracy": accuracy_of(twice, test.labels),
    }


def _groups(state: TrainState, test: Batch, key: Array) -> dict[str, Any]:
    sizes = [size for size in GROUPS if size <= len(test.labels)]
    count = len(test.labels) // sizes[-1] * sizes[-1]  # so that groups of all sizes cover the same
    test = Batch(test.images[:count], test.labels[:count])
    order = jax.random.permutation(key, count)
    training_mode = {}
    for size in sizes:
        classes = predict(state, test.images, size, train=True)
        elsewhere = predict(state, test.images[order], size, train=True)
        training_mode[size] = {
            "accuracy": accuracy_of(classes, test.labels),
            "changing": int((classes[order] != elsewhere).sum()),
            "of": count,
        }
    together = predict(state, test.images, len(test.labels), train=False)
    alone = predict(state, test.images, 1, train=False)
    evaluation = {
        "accuracy": accuracy_of(together, test.labels),
        "changing": int((together != alone).sum()),
    }
    return {"training": training_mode, "evaluation": evaluation}


def _population(state: TrainState, train: Batch, test: Batch) -> dict[str, Any]:
    model = models.MLP()
    batches = jnp.array_split(train.images, max(1, len(train.labels) // 1000))
    estimated = {
        "running": state.variables,
        "all layers at once": population.estimate(model, state.variables, batches),
        "layer by layer": population.estimate(model, state.variables, batches, layer_by_layer=True),
    }
    found = {}
    for name, variables in estimated.items():
        renewed = state.replace(batch_stats=variables["batch_stats"])
        gaps = population.gap(variables, estimated["layer by layer"])
        found[name] = {
            "accuracy": accuracy_of(predict(renewed, test.images, 1, train=False), test.labels),
            "gaps": {
                layer: {k: float(v) for k, v in g._asdict().items()} for layer, g in gaps.items()
            },
        }
    return found


if __name__ == "__main__":
    exits.leave(main())
