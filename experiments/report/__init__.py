"""Pictures and a page, drawn from the files of a run directory alone."""

from experiments.report.page import write

__all__ = ["write"]
