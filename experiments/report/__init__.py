"""Pictures and a page, drawn from the files of a run directory alone.

python -m experiments.report RUN
"""

from experiments.report.run import redraw

__all__ = ["redraw"]
