"""Published claims about batch normalization: what each says, and the criterion that judges it.

A claim is one file beside this one, or one of two that share a run. What it measures has names; its
checks, written before any run, say which values of which name the claim allows. Whether a claim
passes is decided by these alone (`judge`).
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jax import Array
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from bnjax import paired, statistics
from bnjax.data import Dataset
from bnjax.training import Batch
from experiments.lab.scratch import batches, head
from experiments.report import figures

T = TypeVar("T")

LABELS = {"bn": "with BN", "no_bn": "without BN"}


class Verdict(StrEnum):
    """What the evidence says about a claim."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


class Evidence(NamedTuple):
    """What a run found, as plain numbers that JSON can hold.

    Attributes:
        measured: `{quantity: one value per replicate}`.
        picture: what the claim's figure draws, beside the measured values.
        incomparable: why figures of the original set-up cannot be compared with this run's; empty
            if they can.
    """

    measured: dict[str, list[float]]
    picture: dict[str, Any]
    incomparable: str = ""


@dataclass(frozen=True)
class Check:
    """The values of one quantity that a claim allows.

    Attributes:
        quantity: its name in the evidence, with the unit.
        published: what the source says of it, in words or figures.
        low, high: the bounds of what is allowed, themselves included. Without any, the quantity is
            shown and decides nothing.
        rule: what must lie within them. "mean": the 95 % confidence interval of the mean; the check
            fails if all of it lies outside, and is inconclusive if it reaches across a bound.
            "each": every single replicate. "predicted": the bounds (both the published figure) must
            lie within the 95 % prediction interval of one more replicate.
        original: the published figure belongs to the original set-up: with other data, or a shorter
            run, the check is inconclusive.
    """

    quantity: str
    published: str
    low: float = -math.inf
    high: float = math.inf
    rule: str = "mean"
    original: bool = False

    @property
    def decides(self) -> bool:
        """Whether any value could fail."""
        return math.isfinite(self.low) or math.isfinite(self.high)

    def judge(self, values: Iterable[float], incomparable: str = "") -> Verdict:
        """What the replicates' values say; pure, and the only place that decides."""
        found = np.asarray(list(values), np.float64)
        if not self.decides:
            return Verdict.PASS
        if not len(found) or (self.original and incomparable):
            return Verdict.INCONCLUSIVE
        if self.rule == "each":
            within = (self.low <= found) & (found <= self.high)
            return Verdict.PASS if within.all() else Verdict.FAIL
        low, high = interval(found, predicted=self.rule == "predicted")
        if not (math.isfinite(low) and math.isfinite(high)):  # one replicate, or infinite values
            beyond = np.all((found < self.low) | (found > self.high))
            fails = self.rule == "mean" and len(found) > 1 and beyond
            return Verdict.FAIL if fails else Verdict.INCONCLUSIVE
        if self.rule == "predicted":
            return Verdict.PASS if low <= self.low and self.high <= high else Verdict.FAIL
        if self.low <= low and high <= self.high:
            return Verdict.PASS
        return Verdict.FAIL if high < self.low or low > self.high else Verdict.INCONCLUSIVE


def collect(
    checks: Iterable[Check],
    values: Iterable[ArrayLike],
    panels: Mapping[str, Any] = {},
    x: Iterable[Any] = (),
    incomparable: str = "",
) -> Evidence:
    """The evidence: values `[R]` under the names of the checks, in their order, and a picture.

    Args:
        checks: what the claim allows.
        values: what was measured for each of them.
        panels: what the figure draws, `{title: {line: [R, N]}}` for `draw_lines`.
        x: of these lines, `[N]`; by default 1 to N.
        incomparable: why figures of the original set-up do not compare.
    """
    pairs = zip(checks, values, strict=True)
    measured = {check.quantity: np.asarray(found, np.float64).tolist() for check, found in pairs}
    plain = json.dumps({"panels": panels, "x": x}, default=lambda found: np.asarray(found).tolist())
    return Evidence(measured, json.loads(plain), incomparable)


def predicted(quantity: str, figure: float) -> Check:
    """A check that a published figure lies within the prediction interval of the replicates."""
    return Check(quantity, f"{figure:.10g}", figure, figure, "predicted", original=True)


def interval(values: np.ndarray, *, predicted: bool = False) -> tuple[float, float]:
    """95 % interval of the mean, or of one more value: mean ± t sd sqrt(1 / n), or sqrt(1 + 1 / n).

    NaN where a value is not finite or there are fewer than two.
    """
    summary = statistics.summarize(values)
    if summary.interval is None or summary.n < len(values):
        return math.nan, math.nan
    low, high = summary.interval
    half = (high - low) / 2 * (math.sqrt(summary.n + 1) if predicted else 1)
    return (low + high) / 2 - half, (low + high) / 2 + half


@dataclass(frozen=True)
class Settings:
    """What a run may depend on.

    Attributes:
        dataset: what to train on.
        quick: run less of it, so that all claims take minutes.
        replicates: how many, in place of the claim's own number.
        seed: decides everything random.
    """

    dataset: Dataset
    quick: bool = False
    replicates: int | None = None
    seed: int = 0

    def either(self, quick: T, full: T) -> T:
        """The first in a quick run, the second in a full one."""
        return quick if self.quick else full

    def keys(self, quick: int, full: int) -> Array:
        """One key for each replicate, `[R]`, of as many as a quick or a full run has."""
        return paired.replicate_keys(self.seed, self.replicates or self.either(quick, full))

    def incomparable(self, shortened: str = "") -> str:
        """Why figures published for MNIST do not compare; `shortened`: how much less was run."""
        elsewhere = self.dataset.name != "mnist" and f"on {self.dataset.name} instead of MNIST"
        return ", ".join(reason for reason in (elsewhere, self.quick and shortened) if reason)

    def data(self, count: int | None = None) -> tuple[Batch, Batch]:
        """The first so many training images, all of them without a count, and the test set."""
        train, test = batches(self.dataset)
        return head(train, count), test


@dataclass(frozen=True)
class Claim:
    """A published claim, and how it is put to the test.

    Attributes:
        id: its name on the command line.
        statement: what is claimed, in one sentence.
        source: paper, section, figure; course and lesson.
        setup: what is run and measured, with what the source leaves open.
        checks: the criterion.
        seconds: what the quick and the full run take on two cores, about.
        run: measures.
        draw: the figure, from the evidence alone.
        remark: what a reader should know about the outcome, if anything.
    """

    id: str
    statement: str
    source: str
    setup: str
    checks: tuple[Check, ...]
    seconds: tuple[int, int]
    run: Callable[[Settings], Evidence]
    draw: Callable[[Evidence], Figure]
    remark: str = ""


def draw_lines(labels: Mapping[str, str] = LABELS, **settings: Any) -> Callable[[Evidence], Figure]:
    """Draws panels of lines, each the mean over replicates within its 95 % confidence interval.

    Args:
        labels: of the lines.
        settings: of the axes of every panel, as `xlabel`.
    """

    def draw(evidence: Evidence) -> Figure:
        styles, panels = figures.arm_styles(labels), evidence.picture["panels"]
        figure, row = figures.panels(list(panels), width=14 / (1 + len(panels)))
        for axes, lines in zip(row, panels.values(), strict=True):
            for name, values in lines.items():
                x = evidence.picture["x"] or range(1, 1 + len(values[0]))
                figures.draw_band(axes, styles[name], x, values)
            axes.set(**settings)
            axes.legend()
        return figure

    return draw


def judge(claim: Claim, evidence: Evidence) -> tuple[Verdict, list[Verdict]]:
    """The verdict on a claim and on each of its checks.

    It fails if one check fails, and passes if all those pass that decide.
    """
    verdicts = [
        check.judge(evidence.measured.get(check.quantity, []), evidence.incomparable)
        for check in claim.checks
    ]
    worst = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS)
    return min(verdicts, key=worst.index), verdicts


def load_claims() -> Mapping[str, Claim]:
    """All claims by their ids, sorted."""
    files = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    claims = [x for file in files for x in vars(file).values() if isinstance(x, Claim)]
    return {claim.id: claim for claim in sorted(claims, key=lambda claim: claim.id)}
