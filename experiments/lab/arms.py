"""The arms of a comparison: networks by name, each made from the settings of an experiment."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import flax.linen as nn
import optax

from bnjax import initializers, models
from bnjax.names import split_number
from bnjax.paired import Arm
from experiments.lab.presets import Experiment


@dataclass(frozen=True)
class ArmSpec:
    """A row of the table.

    Attributes:
        name: on the command line and in files.
        label: in pictures, as `with BN`.
        make: the network of an experiment.
        title: in tables and sentences, as `with batch normalization`; by default the label.
    """

    name: str
    label: str
    make: Callable[[Experiment], nn.Module]
    title: str = ""


def _make(norm: str | None, norm_after: bool = False) -> Callable[[Experiment], nn.Module]:
    def make(experiment: Experiment) -> nn.Module:
        own_init = norm is None and not experiment.shared_init
        return models.MLP(
            hidden_sizes=experiment.hidden_sizes,
            num_classes=experiment.num_classes,
            norm=norm,
            norm_after=norm_after,
            activation=models.activation(experiment.activation),
            kernel_init=initializers.kernel(
                experiment.no_bn_init if own_init else experiment.bn_init
            ),
        )

    return make


_BN = "with batch normalization"
ARMS = {
    spec.name: spec
    for spec in (
        ArmSpec("no_bn", "without BN", _make(None), "without"),
        ArmSpec("bn", "with BN", _make("batch"), _BN),
        ArmSpec("bn_after", "BN after", _make("batch", True), f"{_BN} after the activation"),
        ArmSpec("bn_no_affine", "BN, no affine", _make("batch_no_affine"), f"{_BN}, no affine"),
        ArmSpec("mean_only_bn", "mean-only BN", _make("mean_only"), "with mean-only BN"),
        ArmSpec("batch_renorm", "renorm", _make("renorm"), "with batch renormalization"),
        ArmSpec("layer_norm", "layer norm", _make("layer"), "with layer normalization"),
        ArmSpec("rms_norm", "RMS norm", _make("rms"), "with RMS normalization"),
    )
}


def _ghost_bn(size: int) -> ArmSpec:
    name, title = f"ghost_bn({size})", f"with ghost batches of {size}"
    return ArmSpec(name, f"ghost BN, {size}", _make(f"ghost({size})"), title)


def _group_norm(groups: int) -> ArmSpec:
    name, title = f"group_norm({groups})", f"with group normalization, {groups} groups"
    return ArmSpec(name, f"group norm, {groups}", _make(f"group({groups})"), title)


# Of a number: what it makes, the least that it may be, and what it must divide.
FAMILIES: dict[str, tuple[Callable[[int], ArmSpec], int, str]] = {
    "ghost_bn": (_ghost_bn, 2, "batch"),
    "group_norm": (_group_norm, 1, "width"),
}


def find(name: str, own: Sequence[ArmSpec] = ()) -> ArmSpec:
    """The arm of that name, one's own before those of the table; an error names the nearest.

    Example:
        >>> find("ghost_bn(25)").label
        'ghost BN, 25'
    """
    table = {**ARMS, **{spec.name: spec for spec in own}}
    if name in table:
        return table[name]
    family, number = split_number(name)
    if family in FAMILIES and number >= FAMILIES[family][1]:
        return FAMILIES[family][0](number)
    known = [*table, "ghost_bn(SIZE)", "group_norm(GROUPS)"]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown arm {name!r}: did you mean {nearest!r}? Known: {', '.join(known)}")


def choose(experiment: Experiment, own: Sequence[ArmSpec] = ()) -> list[ArmSpec]:
    """The arms of an experiment, in its order; each once, and the reference among them."""
    if len(set(experiment.arms)) < max(1, len(experiment.arms)):
        raise ValueError(f"arms are {' '.join(experiment.arms)}: expected each of them once")
    specs = [find(name, own) for name in experiment.arms]
    if experiment.reference not in (None, *experiment.arms):
        nearest = difflib.get_close_matches(str(experiment.reference), experiment.arms, 1, 0.0)[0]
        raise ValueError(
            f"reference is {experiment.reference!r}: expected one of the arms that run, "
            f"{', '.join(experiment.arms)}; did you mean {nearest!r}?"
        )
    return specs


def check_sizes(experiment: Experiment, examples: int) -> None:
    """Refuses ghost batches that do not divide a batch, and groups that do not divide a width.

    The batches are those of so many training examples; an error names the nearest possible arm.
    """
    last = 0 if experiment.drop_last else examples % experiment.batch_size
    whole = {"batch": (experiment.batch_size, last), "width": experiment.hidden_sizes}
    for name in experiment.arms:
        family, number = split_number(name)
        if family not in FAMILIES or not number:
            continue
        _, least, what = FAMILIES[family]
        common = math.gcd(*whole[what])
        if common % number:
            divisors = [n for n in range(least, common + 1) if common % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - number), default=None)
            hint = f"the nearest that does is {family}({nearest})" if nearest else "none does"
            found = " and ".join(str(n) for n in dict.fromkeys(whole[what]) if n)
            raise ValueError(f"{name}: {number} does not divide every {what}, {found}; {hint}")


def make_arms(experiment: Experiment, own: Sequence[ArmSpec] = ()) -> tuple[Arm, ...]:
    """The networks of an experiment, each with Adam."""
    specs = choose(experiment, own)
    return tuple(
        Arm(spec.name, spec.make(experiment), _adam(experiment.learning_rate)) for spec in specs
    )


@cache
def _adam(learning_rate: float) -> optax.GradientTransformation:
    """The same object for the same rate: what JAX has traced with it, it need not trace again."""
    return optax.adam(learning_rate)
