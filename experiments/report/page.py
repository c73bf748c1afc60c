"""The page of a run: one HTML file with everything inside."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from experiments import divergences, metrics, options, runs
from experiments.console import ONE_REPLICATE, TITLES, format_certainty, format_summary
from experiments.presets import Experiment
from experiments.report import figures


def write(path: Path, summary: Mapping[str, Any]) -> None:
    """Draws the pictures of a run and writes `report.html`.

    Args:
        path: a run directory with `config.json`, `metrics.jsonl` and `probes`.
        summary: from `metrics.summarize`.
    """
    config = runs.read_config(path)
    experiment = Experiment.load(config["experiment"])
    data_dir = config["execution"].get("data_dir")
    curves = figures.curves(metrics.curves(metrics.read(path)))
    curves_png = figures.to_png(curves)
    runs.write_bytes(path / "curves.png", curves_png)
    runs.write_bytes(path / "curves.svg", figures.to_svg(curves))
    features_png = _draw_features(path, experiment) if experiment.draws_features else None

    html = render(
        "page.html.j2",
        arms=metrics.ARMS,
        command=options.command(experiment) + " --data-dir DIR" * bool(data_dir),
        config=config,
        curves=data_uri(curves_png),
        experiment=experiment,
        features=features_png and data_uri(features_png),
        certainty=format_certainty,
        divergences=[divergences.describe(mark) for mark in divergences.read(path)],
        format=format_summary,
        one_replicate=ONE_REPLICATE,
        summary=summary,
        titles=TITLES,
    )
    runs.write_bytes(path / "report.html", html.encode(errors="replace"))


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file; text is escaped, a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _draw_features(path: Path, experiment: Experiment) -> bytes:
    example = figures.read_arrays(path / "probes" / "example.npz")
    probes = figures.read_arrays(path / "probes" / f"epoch-{experiment.epochs:03}.npz")
    png = figures.to_png(figures.features(example["image"], int(example["label"]), probes))
    runs.write_bytes(path / "features.png", png)
    return png


def data_uri(png: bytes) -> str:
    """A picture as it stands in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
