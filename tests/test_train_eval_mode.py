"""The lesson: its numbers, its picture, its errors."""

import json

import pytest
from command import blank_pictures
from factories import noise, write_idx

from experiments import train_eval_mode


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    path = tmp_path_factory.mktemp("lesson") / "out"
    arguments = ["--dataset", "digits", "--epochs", "10", "--seed", "1", "--out", str(path)]
    assert train_eval_mode.main(arguments) == 0
    return path, json.loads((path / "numbers.json").read_text())


def test_dropout_left_on_changes_predictions_from_call_to_call(lesson):
    dropout = lesson[1]["dropout"]
    assert dropout["changing"] > 100
    assert len(set(dropout["training"])) > 1
    assert max(dropout["training"]) < dropout["evaluation"]
    assert sum(dropout["torn_votes"]) == train_eval_mode.CALLS
    assert max(dropout["torn_votes"]) < train_eval_mode.CALLS


def test_one_image_is_refused_and_fed_twice_it_is_always_the_same_class(lesson):
    alone = lesson[1]["alone"]
    assert "N = 1 in x of shape (1, 32)" in alone["error"]
    assert sorted(alone["twice"])[-2:] == [0, 360]
    assert alone["accuracy"] < 0.2


def test_predictions_depend_on_the_company_in_training_mode_alone(lesson):
    groups = lesson[1]["groups"]
    pairs, tens, hundreds = (groups["training"][size] for size in ("2", "10", "100"))
    assert pairs["accuracy"] < tens["accuracy"] < groups["evaluation"]["accuracy"]
    assert pairs["changing"] > tens["changing"] > hundreds["changing"] > 0
    assert groups["evaluation"]["changing"] == 0
    assert pairs["of"] == tens["of"] == hundreds["of"] == 300


def test_population_statistics_close_the_gap(lesson):
    found = lesson[1]["population"]
    assert found["running"]["gaps"]["BatchNorm_0"]["mean"] > 0.01
    for name in ("all layers at once", "layer by layer"):
        assert found[name]["gaps"]["BatchNorm_0"]["mean"] < 1e-5
        assert found[name]["accuracy"] > 0.85


def test_the_picture_is_there(lesson):
    assert (lesson[0] / "train_eval_mode.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_teaches_the_same_lesson(lesson, tmp_path):
    arguments = ["--dataset", "digits", "--epochs", "10", "--seed", "1"]
    with blank_pictures():
        assert train_eval_mode.main([*arguments, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "numbers.json").read_text()) == lesson[1]


def write_images(path, train, test):
    return ["--dataset", "mnist", "--data-dir", str(write_idx(path, *noise(train, test)))]


@pytest.mark.slow
def test_a_handful_of_images_is_enough(tmp_path, capsys):
    arguments = [*write_images(tmp_path / "data", 30, 7), "--out", str(tmp_path / "out")]
    assert train_eval_mode.main(arguments) == 0
    assert "7 test images of mnist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arm", "told"),
    [pytest.param("batch_renorm", "Batch re", marks=pytest.mark.slow), ("ghost_bn(2)", "Ghost")],
)
def test_another_arm(tmp_path, capsys, arm, told):
    arguments = [*write_images(tmp_path / "data", 30, 7), "--out", str(tmp_path / "out")]
    with blank_pictures():
        assert train_eval_mode.main([*arguments, "--arm", arm, "--epochs", "1"]) == 0
    assert json.loads((tmp_path / "out" / "numbers.json").read_text())["arm"] == arm
    assert f"2. {told}" in capsys.readouterr().out


def test_mistakes_end_with_one_sentence(tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    for arguments, message in (
        (["--out", str(tmp_path)], "is not empty"),
        (["--data-dir", str(tmp_path / "nowhere")], "nowhere"),
        (write_images(tmp_path / "data", 30, 1), "mnist has 1 images"),
        (["--arm", "bm"], "unknown arm 'bm': did you mean 'bn'"),
        (["--arm", "layer_norm"], "has no running means and deviations"),
        (["--arm", "mean_only_bn"], "has no running means and deviations"),
        (["--arm", "ghost_bn(25)"], "the nearest that does is ghost_bn(2)"),
    ):
        assert train_eval_mode.main(arguments) == 2
        assert message in capsys.readouterr().err
    for arguments in (["--epochs", "0"], ["--seed", "-1"], ["--dataset", "minst"]):
        with pytest.raises(SystemExit, match="2"):
            train_eval_mode.main(arguments)
    assert "did you mean 'mnist'" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "mine"


def test_an_error_of_ours_does_not_look_like_the_users(tmp_path, monkeypatch):
    def failing(*arguments):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(train_eval_mode, "lesson", failing)
    with pytest.raises(ValueError, match="shapes do not match"):
        train_eval_mode.main(["--dataset", "digits", "--out", str(tmp_path / "out")])
