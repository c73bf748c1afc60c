"""Pages: one HTML file each, with everything inside."""

import base64
from typing import Any

import jinja2

from experiments.lab import console


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file; text is escaped, a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png_uri"] = png_uri
    environment.globals |= {
        "certainty": console.format_certainty,
        "final": console.format_final,
        "format": console.format_summary,
        "one_replicate": console.ONE_REPLICATE,
        "shown": console.SHOWN,
    }
    return environment.get_template(template).render(**values)


def png_uri(png: bytes) -> str:
    """A picture as it stands in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def svg_uri(svg: bytes) -> str:
    """A drawing as it stands in a page; it stays sharp on a projector."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
