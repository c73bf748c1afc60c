"""What goes wrong when a trained network is left in training mode, in numbers and one picture.

Two networks of two hidden layers of 32 are trained, one with batch normalization, or that of
--arm, and one with dropout of 0.3. Then their test predictions are taken as they should be, in
evaluation mode, and as they come out when that is forgotten.

    python -m experiments.train_eval_mode
    python -m experiments.train_eval_mode --dataset digits --epochs 20

It leaves a directory with train_eval_mode.png and numbers.json.
Exit status: 0 success; 2 a mistake in the command, the settings or the data; 130 after
Ctrl-C, 143 after SIGTERM.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import flax.linen as nn
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
from experiments.lab import arms, exits, rundir
from experiments.lab.arms import ArmSpec
from experiments.lab.console import print_plain
from experiments.lab.grids import accuracy_of, predict
from experiments.lab.plan import load_data
from experiments.lab.presets import Experiment

PROG = "python -m experiments.train_eval_mode"
CALLS = 20
GROUPS = (2, 10, 100)
NETWORK = Experiment()


@dataclass(frozen=True)
class LessonConfig:
    """What the lesson is shown on."""

    arm: Annotated[str, tyro.conf.arg(metavar="NAME")] = "bn"
    """Network that normalizes by its batch, as of experiments.mnist_bn."""

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
        dataclasses.replace(NETWORK, epochs=self.epochs, seed=self.seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    settings = tyro.cli(LessonConfig, args=arguments, prog=PROG, description=__doc__)
    console = Console()

    def command(raise_if_stopped: Callable[[], None]) -> int:
        with exits.user_errors():
            arm = find_arm(settings.arm)
            out = settings.out and rundir.expand(settings.out)
            if out is not None:
                rundir.check_free(out)
            dataset = load_data(settings.dataset, settings.data_dir, console)
            if (count := min(len(dataset.train_labels), len(dataset.test_labels))) < GROUPS[0]:
                raise ValueError(f"{dataset.name} has {count} images to train or test: expected 2")
        path = out or rundir.default_path("train_eval_mode", dataset.name)
        path.mkdir(parents=True, exist_ok=True)
        numbers = lesson(dataset, arm, settings.epochs, settings.seed)
        raise_if_stopped()
        for line in tell(numbers):
            print_plain(console, line)
        rundir.write_json(path / "numbers.json", numbers)
        then = "the numbers are in numbers.json"
        with exits.optional(console, "the picture could not be drawn", then):
            draw(path / "train_eval_mode.png", numbers)
        print_plain(console, f"\npicture and numbers: {path}")
        return 0

    return exits.run(command)


def find_arm(name: str) -> ArmSpec:
    """The arm of that name, if the lesson can be shown on it.

    Raises:
        ValueError: if there is none, it keeps no running means and deviations, or a batch of two
            is too small for it.
    """
    arm = arms.find(name)
    arms.check_sizes(dataclasses.replace(NETWORK, arms=(name,), batch_size=GROUPS[0]), 0)
    module, images = arm.make(NETWORK), jnp.zeros((2, 1))
    variables = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), images)
    if not population.layer_paths(module, variables, images):
        raise ValueError(
            f"{name} has no running means and deviations: choose an arm that normalizes by both "
            "those of its batch, as bn does"
        )
    return arm


def lesson(dataset: Dataset, arm: ArmSpec, epochs: int, seed: int) -> dict[str, Any]:
    """Trains both networks and measures what the modes do to their predictions.

    Returns:
        Everything that `tell` and the picture need, as plain numbers and lists.
    """
    train = Batch(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    test = Batch(jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels))
    arm_key, dropout_key, call_key = jax.random.split(jax.random.key(seed), 3)
    module = arm.make(NETWORK)
    normalized = _train(module, train, epochs, arm_key)
    dropout = models.MLP(NETWORK.hidden_sizes, NETWORK.num_classes, None, dropout_rate=0.3)
    with_dropout = _train(dropout, train, epochs, dropout_key)
    return {
        "dataset": dataset.name,
        "arm": arm.name,
        "title": arm.title or arm.label,
        "epochs": epochs,
        "test_images": len(test.labels),
        "dropout": _dropout(with_dropout, test, jax.random.split(call_key, CALLS)),
        "alone": _alone(normalized, test),
        "groups": _groups(normalized, test, call_key),
        "population": _population(module, normalized, train, test),
    }


def tell(numbers: dict[str, Any]) -> Iterator[str]:
    """The lesson in words, line by line."""
    count, dropout, alone = numbers["test_images"], numbers["dropout"], numbers["alone"]
    yield f"{count} test images of {numbers['dataset']}, after {numbers['epochs']} epochs"

    yield "\n1. Dropout left on: predictions change from call to call"
    low, high = min(dropout["training"]), max(dropout["training"])
    yield f"   images given more than one class in {CALLS} calls: {dropout['changing']}"
    yield f"   accuracy {low:.2%} to {high:.2%}; in evaluation mode {dropout['evaluation']:.2%}"

    what = numbers["title"].removeprefix("with ")
    yield f"\n2. {what[0].upper()}{what[1:]} left in training mode: one image has no variance"
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


def _train(module: nn.Module, train: Batch, epochs: int, key: Array) -> TrainState:
    init_key, order_key = jax.random.split(key)
    optimizer = optax.adam(NETWORK.learning_rate)
    state = training.create_state(module, optimizer, init_key, train.images[:2])
    batch_size = min(NETWORK.batch_size, len(train.labels))
    for epoch in range(epochs):
        order = jax.random.fold_in(order_key, epoch)
        state, _ = training.train_epoch(state, train, order, batch_size=batch_size)
    return state


def _dropout(state: TrainState, test: Batch, keys: Array) -> dict[str, Any]:
    count = len(test.labels)
    calls = np.stack([predict(state, test.images, count, train=True, key=key) for key in keys])
    votes = (calls[..., None] == np.arange(NETWORK.num_classes)).sum(axis=0)  # [N, classes]
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
    count = partial(np.bincount, minlength=NETWORK.num_classes)
    return {
        "error": error,
        "twice": count(twice).tolist(),
        "evaluation": count(predict(state, test.images, 1, train=False)).tolist(),
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


def _population(module: nn.Module, state: TrainState, train: Batch, test: Batch) -> dict[str, Any]:
    batches = jnp.array_split(train.images, max(1, len(train.labels) // 1000))
    estimate = partial(population.estimate, module, state.variables, batches)
    estimated = {
        "running": state.variables,
        "all layers at once": estimate(),
        "layer by layer": estimate(layer_by_layer=True),
    }
    found = {}
    for name, variables in estimated.items():
        renewed = state.replace(batch_stats=variables["batch_stats"])
        gaps = population.statistics_gap(variables, estimated["layer by layer"])
        found[name] = {
            "accuracy": accuracy_of(predict(renewed, test.images, 1, train=False), test.labels),
            "gaps": {
                layer: {k: float(v) for k, v in g._asdict().items()} for layer, g in gaps.items()
            },
        }
    return found


if __name__ == "__main__":
    exits.leave(main())
