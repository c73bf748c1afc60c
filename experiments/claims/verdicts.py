"""What is shown of the claims: the list, a line as each ends, and the page."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from experiments.claims import Check, Claim, Evidence, Verdict, interval, judge, load_claims
from experiments.lab import exits, rundir
from experiments.report import figures
from experiments.report.page import png_uri, render

EVIDENCE = "evidence.json"
TYPES = {"measured": dict, "picture": dict, "incomparable": str, "seconds": float}


def listing(claims: Iterable[Claim]) -> Table:
    """What can be run, and what it costs."""
    quick, full = (Column(name, justify="right", no_wrap=True) for name in ("quick", "full"))
    table = Table(Column("claim", no_wrap=True), "says", quick, full, box=SIMPLE)
    table.title, table.title_justify = "Claims about batch normalization", "left"
    for claim in claims:
        table.add_row(claim.id, claim.statement, *map(format_seconds, claim.seconds))
    return table


def save(path: Path, claim: Claim, evidence: Evidence, seconds: float) -> None:
    """Writes a claim's evidence into its directory."""
    (path / claim.id).mkdir(parents=True, exist_ok=True)
    (path / claim.id / "figure.png").unlink(missing_ok=True)  # of other evidence
    content = rundir.null_for_nan({**evidence._asdict(), "seconds": seconds})
    rundir.write_json(path / claim.id / EVIDENCE, content)


def read(path: Path, claim: Claim) -> dict[str, Any]:
    """What the page shows of a claim that has evidence, but for its picture."""
    saved = rundir.read_object(path / claim.id / EVIDENCE, TYPES)
    seconds = saved.pop("seconds")
    evidence = Evidence(**saved)
    verdict, each = judge(claim, evidence)
    return {
        "claim": claim,
        "evidence": evidence,
        "verdict": verdict,
        "rows": [_row(*pair, evidence) for pair in zip(claim.checks, each, strict=True)],
        "seconds": format_seconds(seconds),
    }


def _row(check: Check, verdict: Verdict, evidence: Evidence) -> dict[str, str]:
    values = np.array(evidence.measured.get(check.quantity, []), np.float64)
    low, high = interval(values, predicted=check.rule == "predicted")
    measured = "not measured"
    if len(values):
        with np.errstate(invalid="ignore"):  # as of infinite values
            mean, sd = values.mean(), values.std(ddof=1) if len(values) > 1 else math.nan
        spread = f" ± {sd:.2g}" if math.isfinite(sd) else ""
        measured = f"{mean:.4g}{spread} (n = {len(values)})"
    return {
        "quantity": check.quantity,
        "published": check.published,
        "measured": measured,
        "interval": f"{low:.4g} to {high:.4g}" if math.isfinite(low + high) else "none",
        "allowed": _format_allowed(check),
        "verdict": verdict.value if check.decides else "",
    }


def _format_allowed(check: Check) -> str:
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


def format_line(path: Path, claim: Claim) -> str:
    """One line: the verdict, the claim, and what decided."""
    section = read(path, claim)
    row = next(row for row in section["rows"] if row["verdict"] == section["verdict"])
    published = f" (published: {row['published']})" if row["published"] else ""
    told = f"{row['quantity']}: {row['measured']}{published}, {section['seconds']}"
    return f"{row['verdict']:<13} {claim.id:<27} {told}"


def write_page(path: Path, command: str) -> None:
    """Writes `report.html` and `verdicts.json` about all claims that have evidence.

    It draws the pictures that are not there; one that cannot be drawn costs a sentence.

    Args:
        path: the directory of the results.
        command: what ran them, but for the claims' ids.
    """
    claims = load_claims().values()
    sections = [read(path, claim) for claim in claims if (path / claim.id / EVIDENCE).exists()]
    for section in sections:
        claim = section["claim"]
        section["figure"] = _figure(path / claim.id / "figure.png", claim, section["evidence"])
    shown = {"command": command, "config": rundir.read_config(path), "sections": sections}
    rundir.write_bytes(path / "report.html", render("claims.html.j2", **shown).encode())
    told = [
        {"claim": section["claim"].id, "verdict": section["verdict"], "checks": section["rows"]}
        for section in sections
    ]
    rundir.write_json(path / "verdicts.json", {"verdicts": told})


@figures.our_style
def _figure(file: Path, claim: Claim, evidence: Evidence) -> str:
    if not file.exists():
        told = f"the picture of {claim.id} could not be drawn"
        with exits.optional(Console(), told, "the same command with --out tries again"):
            rundir.write_bytes(file, figures.to_png(claim.draw(evidence)))
    return png_uri(file.read_bytes()) if file.exists() else ""
