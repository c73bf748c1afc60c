"""Pictures and a page, from the files of a run alone: `python -m experiments.report RUN`."""

from experiments.report.run import redraw

__all__ = ["redraw"]
