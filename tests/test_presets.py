"""The settings of a run: presets, what they refuse, and the commands that stand for them."""

import dataclasses
import itertools
import json
import shlex

import jax
import numpy as np
import pytest

from bnjax import initializers
from bnjax.data import Dataset
from experiments.lab import options
from experiments.lab.arms import make_arms
from experiments.lab.options import Execution
from experiments.lab.presets import (
    BOOSTCOURSE,
    DEEP10,
    LAB10,
    NOTEBOOKS,
    PRESETS,
    Experiment,
    from_json,
)

EVERYWHERE = {
    "arms": ("bn", "no_bn"),
    "reference": None,
    "dataset": "auto",
    "replicates": 1,
    "seed": 0,
    "activation": "relu",
    "shared_init": False,
    "bn_statistics": "global",
    "matmul_precision": "float32",
}

CHANGED = [
    {},
    {"epochs": 3, "dataset": "kmnist", "replicates": 5, "seed": 2**32 - 1},
    {"learning_rate": 1e-30, "batch_size": 7},
    {"shared_init": True, "matmul_precision": "tensorfloat32"},
    {"hidden_sizes": (1,), "num_classes": 10, "activation": "leaky_relu"},
    {"bn_init": "normal(0.05)", "no_bn_init": "he_normal"},
    {"drop_last": True},
    {"drop_last": False},
    {"arms": ("layer_norm", "ghost_bn(25)", "no_bn"), "reference": "layer_norm"},
]


def parse(*arguments: str) -> options.Options:
    chosen, _ = options.read(arguments, "program", "description")
    return chosen


def dataset(examples: int) -> Dataset:
    images, labels = np.zeros((examples, 28, 28), np.uint8), np.zeros(examples, np.int32)
    return Dataset("blank", images, labels, images, labels)


class TestPresets:
    @pytest.mark.parametrize(
        ("preset", "values"),
        [
            (
                "boostcourse",
                {
                    "epochs": 15,
                    "batch_size": 100,
                    "drop_last": True,
                    "learning_rate": 1e-3,
                    "hidden_sizes": (32, 32),
                    "num_classes": 512,
                    "bn_init": "xavier_uniform",
                    "no_bn_init": "torch_default",
                },
            ),
            (
                "lab10",
                {
                    "epochs": 11,
                    "batch_size": 32,
                    "drop_last": True,
                    "learning_rate": 1e-2,
                    "hidden_sizes": (32, 32),
                    "num_classes": 10,
                    "bn_init": "torch_default",
                    "no_bn_init": "torch_default",
                },
            ),
            (
                "deep10",
                {
                    "epochs": 9,
                    "batch_size": 64,
                    "drop_last": False,
                    "learning_rate": 1e-3,
                    "hidden_sizes": (64,) * 10,
                    "num_classes": 10,
                    "bn_init": "torch_default",
                    "no_bn_init": "torch_default",
                },
            ),
        ],
    )
    def test_values(self, preset, values):
        assert dataclasses.asdict(PRESETS[preset]) == {"preset": preset, **EVERYWHERE, **values}

    @pytest.mark.parametrize(
        ("preset", "numbers"),
        [
            ("boostcourse", ["1.206", "0.0479", "0.949", "0.0873"]),
            ("lab10", ["0.04811", "0.04808"]),
            ("deep10", ["97.83 %", "95.98 %"]),
        ],
    )
    def test_published_numbers(self, preset, numbers):
        told = " ".join(NOTEBOOKS[preset]["published"])
        assert all(number in told for number in numbers)

    @pytest.mark.parametrize(
        ("preset", "words"),
        [
            ("boostcourse", ["512 outputs"]),
            (
                "lab10",
                ["calls the network with batch normalization where it means the one without"],
            ),
            ("lab10", ["accuracies are losses divided"]),
            ("deep10", ["average loss", "sum over batches", "10,000"]),
        ],
    )
    def test_errata(self, preset, words):
        assert any(
            all(word in erratum for word in words) for erratum in NOTEBOOKS[preset]["errata"]
        )

    @pytest.mark.parametrize("name", PRESETS)
    def test_frozen(self, name):
        with pytest.raises(dataclasses.FrozenInstanceError):
            PRESETS[name].epochs = 3

    @pytest.mark.parametrize(
        ("preset", "widths"),
        [
            ("boostcourse", [784, 32, 32, 512]),
            ("lab10", [784, 32, 32, 10]),
            ("deep10", [784, *[64] * 10, 10]),
        ],
    )
    def test_networks(self, preset, widths):
        for arm in make_arms(PRESETS[preset]):
            shape = jax.ShapeDtypeStruct((2, 28, 28), np.float32)
            variables = jax.eval_shape(
                lambda key, x, module=arm.module: module.init(key, x, train=True),
                jax.random.key(0),
                shape,
            )
            dense = [variables["params"][f"Dense_{k}"] for k in range(len(widths) - 1)]
            assert [layer["kernel"].shape for layer in dense] == list(itertools.pairwise(widths))
            assert [layer["bias"].shape for layer in dense] == [(width,) for width in widths[1:]]
            normalized = len(variables.get("batch_stats", {}))
            assert normalized == (len(widths) - 2 if arm.name == "bn" else 0)

    def test_boostcourse_starts_only_the_normalized_network_with_xavier(self):
        bn, no_bn = make_arms(BOOSTCOURSE)
        assert bn.module.kernel_init is initializers.xavier_uniform
        assert no_bn.module.kernel_init is initializers.torch_default


class TestCommandLine:
    def test_defaults(self):
        assert parse() == options.Options(BOOSTCOURSE, Execution())

    @pytest.mark.parametrize(
        "arguments",
        ["--preset lab10 --epochs 3", "--epochs 3 --preset lab10", "--preset=lab10 --epochs=3"],
    )
    def test_flags_override_the_preset(self, arguments):
        assert parse(*arguments.split()).experiment == dataclasses.replace(LAB10, epochs=3)

    @pytest.mark.parametrize(
        ("flag", "expected"), [("--drop-last", True), ("--no-drop-last", False)]
    )
    @pytest.mark.parametrize("preset", PRESETS)
    def test_drop_last(self, preset, flag, expected):
        assert parse("--preset", preset, flag).experiment.drop_last is expected

    @pytest.mark.parametrize("change", CHANGED)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_command_means_the_experiment(self, preset, change):
        experiment = dataclasses.replace(PRESETS[preset], **change)
        python, m, module, *arguments = shlex.split(options.command(experiment))
        assert [python, m, module] == ["python", "-m", "experiments.mnist_bn"]
        parsed = parse(*arguments).experiment
        assert parsed == experiment

    def test_command_names_only_what_differs_from_the_preset(self):
        command = options.command(dataclasses.replace(DEEP10, seed=3, drop_last=True))
        assert command == "python -m experiments.mnist_bn --preset deep10 --drop-last --seed 3"

    def test_changes(self):
        assert options.changes(LAB10, LAB10) == {}
        assert options.changes(LAB10, dataclasses.replace(LAB10, seed=3, hidden_sizes=(8,))) == {
            "seed": (0, 3),
            "hidden_sizes": ((32, 32), (8,)),
        }


class TestSaving:
    @pytest.mark.parametrize("change", CHANGED)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_saved_experiments_load(self, preset, change):
        experiment = dataclasses.replace(PRESETS[preset], **change)
        values = dataclasses.asdict(experiment)
        loaded = from_json(Experiment, json.loads(json.dumps(values)))
        assert loaded == experiment

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"momentum": 0.9}, "this version differ in 'momentum'"),
            ({"preset": "lab11"}, "did you mean 'lab10'"),
            ({"matmul_precision": "float23"}, "did you mean 'float32'"),
            ({"epochs": 0}, "epochs is 0"),
        ],
    )
    def test_others_do_not(self, change, message):
        with pytest.raises(ValueError, match=message):
            from_json(Experiment, {**dataclasses.asdict(LAB10), **change})

    def test_missing_settings_are_named(self):
        values = dataclasses.asdict(LAB10)
        del values["seed"], values["epochs"]
        with pytest.raises(ValueError, match="differ in 'epochs', 'seed'"):
            from_json(Experiment, values)


class TestAgainstTheData:
    @pytest.mark.parametrize(
        ("examples", "batch_size", "drop_last", "message"),
        [
            (99, 100, True, "blank has 99 training examples"),
            (99, 100, False, "blank has 99 training examples"),
            (101, 100, False, "would hold one example"),
            (5, 4, False, "would hold one example"),
        ],
    )
    def test_refused(self, examples, batch_size, drop_last, message):
        experiment = dataclasses.replace(LAB10, batch_size=batch_size, drop_last=drop_last)
        with pytest.raises(ValueError, match=message):
            experiment.check_against(dataset(examples))

    @pytest.mark.parametrize(
        ("examples", "batch_size", "drop_last"),
        [(100, 100, False), (101, 100, True), (102, 100, False), (2, 2, True)],
    )
    def test_accepted(self, examples, batch_size, drop_last):
        dataclasses.replace(LAB10, batch_size=batch_size, drop_last=drop_last).check_against(
            dataset(examples)
        )
