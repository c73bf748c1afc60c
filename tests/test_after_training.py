"""No diagnostic, picture or page costs what was trained: one that fails costs a sentence."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import Result, blank_pictures, call, lines_of
from rich.console import Console

from bnjax import models, population
from experiments import compare, sweep
from experiments.claims import Evidence, load_claims, verdicts
from experiments.lab import divergences, exits, probes, rundir
from experiments.report import __main__ as report_command
from experiments.report import heat

pytestmark = pytest.mark.usefixtures("cache_home")

RUN = ("--dataset", "digits", "--hidden-sizes", 5, "--num-classes", 10, "--epochs", 2)


@pytest.fixture(scope="module")
def whole(cache_home, tmp_path_factory) -> Path:
    """A run in which nothing fails."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert call(*RUN, "--out", path).status == 0
    return path


@pytest.fixture
def break_(monkeypatch):
    """Lets a function fail; all of them work again after the call."""

    def break_(place: str) -> None:
        def fail(*_, **__):
            raise RuntimeError(f"{place} is\nbroken")

        module, _, name = place.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), name, fail)

    return break_


def notes(result: Result) -> list[str]:
    return [line for line in result.out.splitlines() if line.startswith("NOTE: ")]


def assert_numbers_are_complete(path: Path, whole: Path) -> None:
    assert lines_of(path) == lines_of(whole)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (path, whole)]
    assert summaries[0] == summaries[1]


AGAIN = "python -m experiments.report {path} tries again"
RESUME = "python -m experiments.mnist_bn --resume {path}"
EPOCH_1 = "NOTE: the report lacks what probes/epoch-001.npz would show, which is not there"
END = (
    "NOTE: the report lacks what probes/end.npz would show, which is not there: {resume} records it"
)
PICTURE = "NOTE: the report lacks {what} ({place} is broken): {again}"


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (
            "experiments.lab.probes.after_epoch",
            [
                "NOTE: what happens inside after epoch 1 could not be recorded ({place} is "
                "broken): the report will be without it",
                "NOTE: what happens inside after epoch 2 could not be recorded ({place} is "
                "broken): the report will be without it",
                EPOCH_1,
                EPOCH_1.replace("001", "002"),
            ],
        ),
        (
            "experiments.lab.probes.at_end",
            [
                "NOTE: what the networks have become could not be recorded ({place} is broken): "
                "{resume} tries again",
                END,
            ],
        ),
        (
            "bnjax.population.estimate",
            [
                "NOTE: what the networks have become could not be recorded ({place} is broken): "
                "{resume} tries again",
                END,
            ],
        ),
        ("experiments.report.figures.curves", [PICTURE.replace("{what}", "the curves")]),
        (
            "experiments.report.figures.features",
            [PICTURE.replace("{what}", "the digit through the layers")],
        ),
        ("experiments.report.layers.gradient_norms", [PICTURE.replace("{what}", "the gradients")]),
        (
            "experiments.report.predictions.confusion",
            [PICTURE.replace("{what}", "the predictions")],
        ),
        (
            "experiments.report.words.headline",
            ["NOTE: the report could not be drawn ({place} is broken): {again}"],
        ),
        (
            "experiments.report.run.render",
            ["NOTE: the report could not be drawn ({place} is broken): {again}"],
        ),
    ],
)
def test_what_fails_costs_a_sentence(whole, tmp_path, break_, monkeypatch, place, told):
    path = tmp_path / "run"
    words = {"path": path, "place": place}
    words |= {"again": AGAIN.format(path=path), "resume": RESUME.format(path=path)}
    break_(place)
    result = call(*RUN, "--out", path)
    monkeypatch.undo()
    assert (result.status, result.err) == (0, "")
    assert notes(result) == [line.format(**words) for line in told]
    assert_numbers_are_complete(path, whole)
    drawn = (path / "report.html").exists()
    assert drawn == ("could not be drawn" not in result.out) == ("\nreport: " in result.out)
    if drawn:
        assert "What is missing here" in (path / "report.html").read_text()

    with blank_pictures():
        assert report_command.main([str(path)]) == 0
    page = (path / "report.html").read_text()
    assert ("What is missing here" in page) == place.startswith(("experiments.lab.probes", "bnjax"))
    assert "Curves" in page
    assert_numbers_are_complete(path, whole)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("experiments.lab.probes.after_epoch", OSError("b")),
        ("experiments.lab.probes.at_end", MemoryError()),
        ("experiments.report.words.mistakes", KeyError("a")),
        ("experiments.report.figures.to_svg", IndexError("c")),
    ],
)
def test_whatever_the_error_the_numbers_are_complete(whole, tmp_path, monkeypatch, place, error):
    def fail(*_, **__):
        raise error

    module, _, name = place.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(module), name, fail)
        result = call(*RUN, "--out", tmp_path / "run", pictures=place.endswith("to_svg"))
    assert (result.status, result.err) == (0, "")
    assert len(notes(result)) >= 1
    assert_numbers_are_complete(tmp_path / "run", whole)


@pytest.mark.parametrize("error", [KeyError("a"), OSError("b"), MemoryError(), IndexError("c")])
def test_whatever_the_error_it_costs_a_sentence(capsys, error):
    with exits.optional(Console(), "the report could not be drawn", "try again"):
        raise error
    assert capsys.readouterr().out.startswith("NOTE: the report could not be drawn (")


def test_what_the_networks_have_become_is_recorded_by_going_on(
    whole, tmp_path, break_, monkeypatch
):
    path = tmp_path / "run"
    break_("experiments.lab.probes.at_end")
    assert call(*RUN, "--out", path).status == 0
    monkeypatch.undo()
    assert call("--resume", path).status == 0
    ends = [dict(np.load(run / "probes" / "end.npz")) for run in (path, whole)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert "is finished: 2 epochs" in call("--resume", path).out


def test_a_finished_run_is_not_trained_again_for_a_look(whole, tmp_path):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    (path / "probes" / "end.npz").unlink()
    shutil.rmtree(path / "checkpoints")
    result = call("--resume", path)
    assert result.status == 2
    assert "is finished, but has no state of its last epoch" in result.err
    assert_numbers_are_complete(path, whole)


def test_a_finished_run_is_drawn_without_what_was_lost(whole, tmp_path, capsys):
    path = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("epoch-002", "end", "example"):
        (path / "probes" / f"{name}.npz").unlink()
    with blank_pictures():
        assert report_command.main([str(path)]) == 0
    told = capsys.readouterr().out
    for name in ("epoch-002", "end", "example"):
        assert f"NOTE: the report lacks what probes/{name}.npz would show" in told
    page = (path / "report.html").read_text()
    assert "Curves" in page
    assert "One digit through the layers" not in page


@pytest.mark.parametrize("chunk", [1436, 718, 359, 2, 1437, 5000])
def test_the_training_set_is_cut_into_chunks_of_two_at_least(monkeypatch, chunk):
    """1,437 = 1,436 + 1 = 2 * 718 + 1 = 4 * 359 + 1 examples: the rest of one joins the others."""
    monkeypatch.setattr(probes, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    count = 1437 if chunk > 2 else 5
    images = rng.integers(0, 256, (count, 4, 4), np.uint8)
    module = models.MLP((3,), 10)
    variables = module.init(jax.random.key(0), jnp.zeros((2, 16)), train=True)
    found = probes._statistics(module, variables, images)
    expected = population.estimate(module, variables, [images])["batch_stats"]
    for name, values in expected["BatchNorm_0"].items():
        place = f"population/BatchNorm_0/{name}"
        np.testing.assert_allclose(found[place], values, rtol=1e-6, atol=1e-7)


def test_statistics_are_saved_from_the_input_on():
    """JAX sorts names, and `BatchNorm_10` before `BatchNorm_2`."""
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4), np.uint8)
    module = models.MLP((3,) * 12, 10)
    variables = module.init(jax.random.key(0), jnp.zeros((2, 16)), train=True)
    found = probes._statistics(module, jax.tree.map(jnp.asarray, variables), images)
    layers = [name.split("/")[1] for name in found if name.startswith("running/")]
    assert list(dict.fromkeys(layers)) == [f"BatchNorm_{k}" for k in range(12)]


def test_a_divergence_whose_layer_cannot_be_found_is_recorded(tmp_path, break_):
    path = tmp_path / "run"
    break_("experiments.lab.divergences.replay")
    result = call(*RUN[:-1], 3, "--learning-rate", "1e30", "--out", path)
    assert result.status == 3
    assert notes(result) == [
        "NOTE: the first layer that was not finite could not be found "
        "(experiments.lab.divergences.replay is broken): epoch and step are known",
        "NOTE: with BN, replicate 0 diverged in step 2 of epoch 1",
        "NOTE: without BN, replicate 0 diverged in step 2 of epoch 1",
    ]
    assert [(mark["epoch"], mark["layer"]) for mark in divergences.read(path)] == [(1, None)] * 2


def test_evidence_is_kept_where_its_picture_fails(tmp_path, monkeypatch, capsys):
    claim = load_claims()["depth-limit"]
    evidence = Evidence({}, {"panels": {"Accuracy": {"bn": [[1, 2], [3, 4]]}}, "x": [2, 4]})
    monkeypatch.setattr(verdicts.figures, "to_png", lambda figure: 1 / 0)
    verdicts.save(tmp_path, claim, evidence, 1.0)
    rundir.write_json(tmp_path / "config.json", json.loads(CONFIG))
    verdicts.write_page(tmp_path, "again")
    told = (
        f"NOTE: the picture of {claim.id} could not be drawn (division by zero): the same command"
    )
    assert told in capsys.readouterr().out
    assert claim.statement in (tmp_path / "report.html").read_text()
    monkeypatch.undo()
    verdicts.write_page(tmp_path, "again")
    assert (tmp_path / claim.id / "figure.png").exists()
    verdicts.save(tmp_path, claim, evidence, 1.0)
    assert not (tmp_path / claim.id / "figure.png").exists()  # it showed other evidence


CONFIG = json.dumps(
    {
        "experiment": {"quick": True, "replicates": None, "seed": 0},
        "execution": {"data_dir": None},
        "dataset": {"name": "digits", "requested": "digits", "sha256": "0" * 64},
        **rundir.provenance(),
        "device_kind": "abacus",
        "device_count": 1,
        "process_count": 1,
    }
)


@pytest.mark.slow
def test_a_sweep_keeps_its_numbers_where_its_map_fails(tmp_path, monkeypatch, capsys):
    arguments = ["--dataset", "digits", "--epochs", "1", "--replicates", "2"]
    arguments += ["--out", str(tmp_path / "sweep")]
    with monkeypatch.context() as patch:
        patch.setattr(heat, "maps", lambda *_: 1 / 0)
        assert sweep.main(arguments) == 0
    told = "NOTE: the report could not be drawn (division by zero): the same command tries again"
    assert told in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["cells"]
    assert sweep.main(arguments) == 0
    assert (tmp_path / "sweep" / "sweep.html").exists()


def test_a_comparison_keeps_its_numbers_where_its_picture_fails(whole, tmp_path, break_, capsys):
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    break_("experiments.report.figures.overlay")
    assert compare.main([str(whole), str(other), "--out", str(tmp_path / "compared")]) == 0
    assert "NOTE: the comparison could not be drawn (" in capsys.readouterr().out
    assert json.loads((tmp_path / "compared" / "compare.json").read_text())["runs"]
