"""What a run computes: the settings that decide its numbers, and those of three notebooks."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from bnjax import data, initializers, models
from bnjax.data import Dataset
from bnjax.names import choose

MAX_SEED = 2**32 - 1
MAX_SIZE = 2**31 - 1
STATISTICS = ("global", "local")
PRECISIONS = ("float32", "tensorfloat32", "bfloat16")

NAMES = ("boostcourse", "lab10", "deep10")

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides the numbers of a run."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(NAMES))] = "boostcourse"
    """The notebook to re-run; its settings become the defaults of all other flags."""

    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ("bn", "no_bn")
    """Networks to compare: no_bn, bn, bn_after, bn_no_affine, mean_only_bn, ghost_bn(SIZE),
    batch_renorm, layer_norm, rms_norm, group_norm(GROUPS)."""

    reference: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """The arm that the others are held against; by default no_bn where it runs, else the first."""

    dataset: Annotated[str, tyro.conf.arg(metavar="|".join(data.NAMES))] = "auto"
    """What to train on. `auto` is MNIST where it can be had, otherwise the embedded digits."""

    epochs: int = 15
    """How often to go through the training set."""

    batch_size: int = 100
    """Examples per optimizer step; normalization takes its statistics over them."""

    drop_last: bool = True
    """Drop the last, incomplete batch; which examples that are changes with every epoch."""

    learning_rate: float = 1e-3
    """Step size of Adam."""

    hidden_sizes: tuple[int, ...] = (32, 32)
    """Width of each hidden layer."""

    num_classes: int = 10
    """Number of logits, at least 10."""

    activation: Annotated[str, tyro.conf.arg(metavar="|".join(models.ACTIVATIONS))] = "relu"
    """What follows each hidden layer, after its normalization."""

    bn_init: Annotated[str, tyro.conf.arg(metavar="NAME")] = "torch_default"
    """Initial kernels of every network but no_bn: torch_default, xavier_uniform, xavier_normal,
    he_uniform, he_normal or normal(STD)."""

    no_bn_init: Annotated[str, tyro.conf.arg(metavar="NAME")] = "torch_default"
    """Initial kernels of the network without normalization, no_bn."""

    shared_init: bool = False
    """Start all networks of a replicate from the same Dense layers, those that bn_init draws."""

    replicates: int = 1
    """Independent repetitions, each with its own initial weights and order of the examples."""

    seed: int = 0
    """Decides everything random."""

    bn_statistics: Annotated[str, tyro.conf.arg(metavar="|".join(STATISTICS))] = "global"
    """Where devices share a batch (the axis data of --mesh): normalize by all of it, or each device
    by its own examples, as PyTorch's DistributedDataParallel does."""

    matmul_precision: Annotated[str, tyro.conf.arg(metavar="|".join(PRECISIONS))] = "float32"
    """Precision of matrix products of float32 on accelerators. Left to themselves, they would use
    less (TF32 on NVIDIA's); CPUs always compute in float32."""

    def __post_init__(self) -> None:
        choose("preset", self.preset, NAMES)
        choose("dataset", self.dataset, data.NAMES)
        models.activation(self.activation)
        initializers.kernel(self.bn_init)
        initializers.kernel(self.no_bn_init)
        choose("bn_statistics", self.bn_statistics, STATISTICS)
        choose("matmul_precision", self.matmul_precision, PRECISIONS)
        _check_range("epochs", self.epochs, 1)
        _check_range("replicates", self.replicates, 1)
        _check_range("batch_size", self.batch_size, 2, ", normalization needs two examples")
        _check_range("num_classes", self.num_classes, 10, ", the data have ten classes")
        if not self.hidden_sizes:
            raise ValueError("hidden_sizes is empty: expected the width of at least one layer")
        for size in self.hidden_sizes:
            _check_range("hidden_sizes", size, 1)
        if self.shared_init and self.no_bn_init not in (self.bn_init, Experiment.no_bn_init):
            raise ValueError(
                f"no_bn_init is {self.no_bn_init}, but shared_init starts all networks from what "
                "bn_init draws: choose one of the two"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate is {self.learning_rate}: expected a positive finite number"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}: expected 0 to {MAX_SEED}")

    def resolved(self) -> "Experiment":
        """The same with its reference named."""
        default = "no_bn" if "no_bn" in self.arms else next(iter(self.arms), None)
        return dataclasses.replace(self, reference=self.reference or default)

    def check_against(self, dataset: Dataset) -> None:
        """Refuses a batch larger than the training set, and a last batch of a single example."""
        examples = len(dataset.train_labels)
        if self.batch_size > examples:
            raise ValueError(
                f"batch_size is {self.batch_size}: {dataset.name} has {examples} training "
                "examples, choose no more than that"
            )
        if not self.drop_last and examples % self.batch_size == 1:
            raise ValueError(
                f"batch_size is {self.batch_size}: the last batch of {examples} training examples "
                "would hold one example, which cannot be normalized; choose another batch size or "
                "--drop-last"
            )


def from_json(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """The settings that were saved as `values`, a dataclass of this kind; JSON has no tuples.

    All fields must be there, and no others, each of the type of its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if different := sorted(defaults.keys() ^ values.keys()):
        told = ", ".join(map(repr, different))
        raise ValueError(f"the saved settings and this version differ in {told}")
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, default in defaults.items():
        expected = {str, type(None)} if default is None else _types(default)
        alike = isinstance(found[name], tuple) == isinstance(default, tuple)
        if not (alike and _types(found[name]) <= expected):
            raise ValueError(f"the saved {name} is {values[name]!r:.40}: not a value of this field")
    return kind(**found)


def _types(value: Any) -> set[type]:
    return {type(item) for item in (value if isinstance(value, tuple) else (value,))}


def _check_range(name: str, value: int, least: int, why: str = "") -> None:
    if value < least:
        raise ValueError(f"{name} is {value}: expected at least {least}{why}")
    if value > MAX_SIZE:
        raise ValueError(f"{name} is {value}: expected at most {MAX_SIZE}")


# Two hidden layers of 32, two to three seconds of training on two cores. Xavier kernels in the
# network with batch normalization only; everything else starts as PyTorch does.
BOOSTCOURSE = Experiment(num_classes=512, bn_init="xavier_uniform")

# The published loop trains one network twice; here both are trained.
LAB10 = Experiment("lab10", epochs=11, batch_size=32, learning_rate=1e-2)

# The last short batch is kept, as the post has it.
DEEP10 = Experiment("deep10", epochs=9, batch_size=64, drop_last=False, hidden_sizes=(64,) * 10)

PRESETS = dict(zip(NAMES, (BOOSTCOURSE, LAB10, DEEP10), strict=True))

# What presets re-run: where it was published, the figures that it prints, its errata.
NOTEBOOKS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("notebooks.toml").read_text(encoding="utf-8")
)
