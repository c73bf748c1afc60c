"""Every Python snippet of docs/ runs, and leaves what it promises."""

import re
from pathlib import Path

import pytest

from experiments.lab import Run

DOCS = Path(__file__).parents[1] / "docs"


def snippets(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)


def test_an_arm_of_ones_own_stands_on_the_page_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = snippets("own_arm.md")
    names: dict = {}
    exec(compile(code, "own_arm.md", "exec"), names)
    run, page = Run("runs/mine"), Path("runs/mine/report.html").read_text()
    assert run.arms == ("length_norm", "bn", "no_bn")
    assert all(title.lower() in page.lower() for title in run.titles.values())
    assert run.metrics["length_norm"]["test_accuracy"][-1, 0] > 0.5
    with pytest.raises(ValueError, match="unknown arm 'length_norm'"):
        run.model("length_norm")
    assert Run("runs/mine", own=[names["mine"]]).model("length_norm") is not None
