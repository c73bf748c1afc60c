"""What is shown of the claims: the list, a line as each ends, and the page."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.claims import Check, Claim, Evidence, Verdict, interval, judge, load_claims
from experiments.lab import exits, rundir
from experiments.report import figures
from experiments.report.page import png_uri, render

EVIDENCE = "evidence.json"


def listing(claims: Iterable[Claim]) -> Table:
    """What can be run, and what it costs."""
    table = Table(title="Claims about batch normalization", title_justify="left", box=SIMPLE)
    table.add_column("claim", no_wrap=True)
    table.add_column("says")
    for heading in ("quick", "full"):
        table.add_column(heading, justify="right", no_wrap=True)
    for claim in claims:
        table.add_row(claim.id, claim.statement, *map(format_seconds, claim.seconds))
    return table


def save(path: Path, claim: Claim, evidence: Evidence, seconds: float) -> None:
    """Writes a claim's evidence into its directory."""
    (path / claim.id).mkdir(parents=True, exist_ok=True)
    (path / claim.id / "figure.png").unlink(missing_ok=True)  # of other evidence
    content = rundir.null_for_nan({**evidence._asdict(), "seconds": seconds})
    rundir.write_json(path / claim.id / EVIDENCE, content)


def load(path: Path, claim: Claim) -> tuple[Evidence, float]:
    """The evidence of a claim, and the seconds that it took."""
    content = rundir.nan_for_null(
        rundir.read_object(path / claim.id / EVIDENCE, [*Evidence._fields, "seconds"])
    )
    seconds = content.pop("seconds")
    return Evidence(**content), seconds


def format_line(claim: Claim, path: Path) -> str:
    """One line: the verdict, the claim, and what decided."""
    evidence, seconds = load(path, claim)
    verdict, each = judge(claim, evidence)
    pairs = zip(claim.checks, each, strict=True)
    check = next(check for check, found in pairs if found == verdict and check.decides)
    values = evidence.measured.get(check.quantity, [])
    told = f"{check.quantity}: {format_values(values)}"
    if check.published:
        told += f" (published: {check.published})"
    return f"{verdict:<13} {claim.id:<27} {told}, {format_seconds(seconds)}"


def write_page(path: Path, command: str) -> None:
    """Writes `report.html` and `verdicts.json` about all claims that have evidence.

    It draws the pictures that are not there; one that cannot be drawn costs a sentence.

    Args:
        path: the directory of the results.
        command: what ran them, but for the claims' ids.
    """
    found = {
        claim: load(path, claim)
        for claim in load_claims().values()
        if (path / claim.id / EVIDENCE).exists()
    }
    sections = [_section(path, claim, *told) for claim, told in found.items()]
    counts = Counter(section["verdict"] for section in sections)
    html = render(
        "claims.html.j2",
        command=command,
        config=rundir.read_config(path),
        counts=[(verdict.value, counts[verdict]) for verdict in Verdict],
        sections=sections,
    )
    rundir.write_bytes(path / "report.html", html.encode())
    verdicts = [
        {"claim": section["claim"].id, "verdict": section["verdict"], "checks": section["rows"]}
        for section in sections
    ]
    rundir.write_json(path / "verdicts.json", {"verdicts": verdicts})


def _section(path: Path, claim: Claim, evidence: Evidence, seconds: float) -> dict[str, Any]:
    verdict, each = judge(claim, evidence)
    rows = [_row(*pair, evidence) for pair in zip(claim.checks, each, strict=True)]
    return {
        "claim": claim,
        "verdict": verdict,
        "rows": rows,
        "incomparable": evidence.incomparable,
        "figure": _figure(path / claim.id / "figure.png", claim, evidence),
        "seconds": format_seconds(seconds),
    }


@figures.our_style
def _figure(file: Path, claim: Claim, evidence: Evidence) -> str:
    if not file.exists():
        told = f"the picture of {claim.id} could not be drawn"
        with exits.optional(Console(), told, "the same command with --out tries again"):
            rundir.write_bytes(file, figures.to_png(claim.draw(evidence)))
    return png_uri(file.read_bytes()) if file.exists() else ""


def _row(check: Check, verdict: Verdict, evidence: Evidence) -> dict[str, str]:
    values = evidence.measured.get(check.quantity, [])
    return {
        "quantity": check.quantity,
        "published": check.published,
        "measured": format_values(values),
        "interval": format_interval(values, predicted=check.rule == "predicted"),
        "allowed": format_allowed(check),
        "verdict": verdict.value if check.decides else "",
    }


def format_values(values: list[float]) -> str:
    """`mean ± standard deviation (n = ...)`."""
    found = np.asarray(values, np.float64)
    if not len(found):
        return "not measured"
    with np.errstate(invalid="ignore"):
        mean, sd = found.mean(), found.std(ddof=1) if len(found) > 1 else math.nan
    spread = f" ± {sd:.2g}" if math.isfinite(sd) else ""
    return f"{mean:.4g}{spread} (n = {len(found)})"


def format_interval(values: list[float], *, predicted: bool) -> str:
    """The 95 % interval that decides."""
    low, high = interval(np.asarray(values, np.float64), predicted=predicted)
    return f"{low:.4g} to {high:.4g}" if math.isfinite(low + high) else "none"


def format_allowed(check: Check) -> str:
    """The bounds of a check in words."""
    if not check.decides:
        return "shown only"
    if check.rule == "predicted":
        return f"{check.low:.10g} predicted"
    each = "each " if check.rule == "each" else ""
    if check.low == check.high:
        return f"{each}{check.low:g}"
    if not math.isfinite(check.high):
        return f"{each}at least {check.low:.4g}"
    if not math.isfinite(check.low):
        return f"{each}at most {check.high:.4g}"
    return f"{each}{check.low:.4g} to {check.high:.4g}"


def format_seconds(seconds: float) -> str:
    """`40 s` or `3 min`."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
