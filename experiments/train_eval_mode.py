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
from collections.abc import Callable, Sequence
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

from bnjax import models, paired, population
from bnjax.data import Dataset
from bnjax.paired import Arm
from bnjax.training import Batch, TrainState
from experiments.lab import arms, exits, results, rundir
from experiments.lab.arms import ArmSpec
from experiments.lab.console import print_plain
from experiments.lab.plan import load_data
from experiments.lab.presets import Experiment
from experiments.lab.scratch import accuracy_of, batches, head, predict, train, unstack

PROG = "python -m experiments.train_eval_mode"
CALLS = 20
GROUPS = (2, 10, 100)
NETWORK = Experiment()


@dataclass(frozen=True, kw_only=True)
class LessonConfig(results.CommonConfig):
    """What the lesson is shown on."""

    arm: Annotated[str, tyro.conf.arg(metavar="NAME")] = "bn"
    """Network that normalizes by its batch, as of experiments.mnist_bn."""

    epochs: int = 5
    """Times that each network sees the training set."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory to create; by default runs/train_eval_mode-DATASET-TIME."""

    def __post_init__(self) -> None:
        super().__post_init__()
        dataclasses.replace(NETWORK, epochs=self.epochs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    config = tyro.cli(LessonConfig, args=arguments, prog=PROG, description=__doc__)
    console = Console()

    def command(raise_if_stopped: Callable[[], None]) -> None:
        with exits.user_errors():
            arm = find_arm(config.arm)
            dataset = load_data(config.dataset, config.data_dir, console)
            if (count := min(len(dataset.train_labels), len(dataset.test_labels))) < GROUPS[0]:
                raise ValueError(f"{dataset.name} has {count} images to train or test: expected 2")
            default = rundir.default_path("train_eval_mode", dataset.name)
            path = rundir.expand(config.out or default)
            rundir.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        numbers = lesson(dataset, arm, config.epochs, config.seed)
        raise_if_stopped()
        print_plain(console, tell(numbers))
        rundir.write_json(path / "numbers.json", numbers)
        then = "the numbers are in numbers.json"
        with exits.optional(console, "the picture could not be drawn", then):
            from experiments.report import figures  # matplotlib takes a third of a second

            picture = figures.to_png(figures.train_eval_mode(numbers))
            rundir.write_bytes(path / "train_eval_mode.png", picture)
        print_plain(console, f"\npicture and numbers: {path}")

    return exits.run(command)


def find_arm(name: str) -> ArmSpec:
    """The arm of that name; `ValueError` if it cannot normalize two images by mean and variance."""
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
    """Trains both networks and measures what the modes do to their predictions, for JSON."""
    examples, test = jax.tree.map(jnp.asarray, batches(dataset))
    module, keys = arm.make(NETWORK), paired.replicate_keys(seed, 1)
    dropout = models.MLP(NETWORK.hidden_sizes, NETWORK.num_classes, None, dropout_rate=0.3)
    adam, call_key = optax.adam(NETWORK.learning_rate), paired.derive(keys[0], "calls")
    both = Arm(arm.name, module, adam), Arm("dropout", dropout, adam)
    size = NETWORK.batch_size
    *_, last = train(both, keys, examples, test, epochs=epochs, batch_size=size)
    normalized, with_dropout = (unstack(last.states[one.name])[0] for one in both)
    return {
        "dataset": dataset.name,
        "arm": arm.name,
        "title": arm.title or arm.label,
        "epochs": epochs,
        "test_images": len(test.labels),
        "dropout": _dropout(with_dropout, test, jax.random.split(call_key, CALLS)),
        "alone": _alone(normalized, test),
        "groups": _groups(normalized, test, call_key),
        "population": _population(module, normalized, examples, test),
    }


def tell(numbers: dict[str, Any]) -> str:
    """The lesson in words."""
    dropout, alone, groups = (numbers[part] for part in ("dropout", "alone", "groups"))
    what = numbers["title"].removeprefix("with ")
    classes = " or ".join(str(k) for k, votes in enumerate(alone["twice"]) if votes)
    companies = "\n".join(
        f"   {size:>17}{group['accuracy']:>11.2%}{group['changing']:>19} of {group['of']}"
        for size, group in groups["training"].items()
    )
    mended = "\n".join(
        f"   {name:<20}{found['accuracy']:>9.2%}   "
        + ", ".join(f"{gap['mean']:.3f} and {gap['std']:.3f}" for gap in found["gaps"].values())
        for name, found in numbers["population"].items()
    )
    return f"""\
{numbers["test_images"]} test images of {numbers["dataset"]}, after {numbers["epochs"]} epochs

1. Dropout left on: predictions change from call to call
   images given more than one class in {CALLS} calls: {dropout["changing"]}
   accuracy {min(dropout["training"]):.2%} to {max(dropout["training"]):.2%}; in evaluation mode \
{dropout["evaluation"]:.2%}

2. {what[0].upper()}{what[1:]} left in training mode: one image has no variance
   fed alone: {alone["error"]}
   fed twice: every prediction is {classes}; accuracy {alone["accuracy"]:.2%}

3. ... and an image is judged by the company it keeps
   images in a batch   accuracy   judged otherwise in another order
{companies}
   in evaluation mode {groups["evaluation"]["accuracy"]:.2%}; \
{groups["evaluation"]["changing"]} change when each image is fed alone

4. Population statistics mend it: here every image is alone in its batch
   statistics           accuracy   off in mean and deviation, by layer
{mended}"""


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
    try:
        predict(state, test.images[:1], 1, train=True)
        error = ""
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
    test, order = head(test, count), jax.random.permutation(key, count)

    def compare(classes: Array, others: Array) -> dict[str, Any]:
        accuracy = accuracy_of(classes, test.labels)
        return {"accuracy": accuracy, "changing": int((classes != others).sum()), "of": count}

    training_mode = {}
    for size in sizes:
        elsewhere = predict(state, test.images[order], size, train=True)
        classes = predict(state, test.images, size, train=True)
        training_mode[size] = compare(classes, elsewhere[jnp.argsort(order)])
    together, alone = (predict(state, test.images, size, train=False) for size in (count, 1))
    return {"training": training_mode, "evaluation": compare(together, alone)}


def _population(
    module: nn.Module, state: TrainState, examples: Batch, test: Batch
) -> dict[str, Any]:
    parts = jnp.array_split(examples.images, max(1, len(examples.labels) // 1000))
    estimate = partial(population.estimate, module, state.variables, parts)
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
            "gaps": {k: jax.tree.map(float, gap._asdict()) for k, gap in gaps.items()},
        }
    return found


if __name__ == "__main__":
    exits.leave(main())
