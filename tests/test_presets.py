"""The settings of a run: presets, what they refuse, and the commands that stand for them."""

import dataclasses
import itertools
import shlex

import jax
import numpy as np
import pytest

from bnjax import initializers
from bnjax.data import Dataset
from experiments.lab import options
from experiments.lab.options import Execution
from experiments.lab.plan import make_arms
from experiments.lab.presets import PRESETS, Boostcourse, Deep10, Experiment, Lab10

EVERYWHERE = {
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
]


def parse(*arguments: str) -> options.Options:
    preset, _ = options.preset_and_resume(arguments)
    return options.parse(arguments, options.preset_defaults(preset), "program", "description")


def dataset(examples: int) -> Dataset:
    images, labels = np.zeros((examples, 28, 28), np.uint8), np.zeros(examples, np.int32)
    return Dataset("blank", images, labels, images, labels)


class TestPresets:
    @pytest.mark.parametrize(
        ("preset", "values"),
        [
            (
                Boostcourse,
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
                Lab10,
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
                Deep10,
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
        name = preset.__name__.lower()
        assert dataclasses.asdict(preset()) == {"preset": name, **EVERYWHERE, **values}
        assert PRESETS[name] is preset

    @pytest.mark.parametrize(
        ("preset", "numbers"),
        [
            (Boostcourse, ["1.206", "0.0479", "0.949", "0.0873"]),
            (Lab10, ["0.04811", "0.04808"]),
            (Deep10, ["97.83 %", "95.98 %"]),
        ],
    )
    def test_published_numbers(self, preset, numbers):
        told = " ".join(preset.published)
        assert all(number in told for number in numbers)

    @pytest.mark.parametrize(
        ("preset", "words"),
        [
            (Boostcourse, ["512 outputs"]),
            (Lab10, ["calls the network with batch normalization where it means the one without"]),
            (Lab10, ["accuracies are losses divided"]),
            (Deep10, ["average loss", "sum over batches", "10,000"]),
        ],
    )
    def test_errata(self, preset, words):
        assert any(all(word in erratum for word in words) for erratum in preset.errata)

    @pytest.mark.parametrize("name", PRESETS)
    def test_docstring(self, name):
        text = PRESETS[name].__doc__
        command = f"Command: python -m experiments.mnist_bn --preset {name}\n"
        assert all(part in text for part in ("Source: ", command, "Expected: ", "Runtime: "))

    @pytest.mark.parametrize("name", PRESETS)
    def test_frozen(self, name):
        with pytest.raises(dataclasses.FrozenInstanceError):
            PRESETS[name]().epochs = 3

    @pytest.mark.parametrize(
        ("preset", "widths"),
        [
            (Boostcourse, [784, 32, 32, 512]),
            (Lab10, [784, 32, 32, 10]),
            (Deep10, [784, *[64] * 10, 10]),
        ],
    )
    def test_networks(self, preset, widths):
        for arm in make_arms(preset()):
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
        bn, no_bn = make_arms(Boostcourse())
        assert bn.module.kernel_init is initializers.xavier_uniform
        assert no_bn.module.kernel_init is initializers.torch_default


class TestCommandLine:
    def test_defaults(self):
        assert parse() == options.Options(Boostcourse(), Execution())

    @pytest.mark.parametrize(
        "arguments",
        ["--preset lab10 --epochs 3", "--epochs 3 --preset lab10", "--preset=lab10 --epochs=3"],
    )
    def test_flags_override_the_preset(self, arguments):
        assert parse(*arguments.split()).experiment == Lab10(epochs=3)

    @pytest.mark.parametrize(
        ("flag", "expected"), [("--drop-last", True), ("--no-drop-last", False)]
    )
    @pytest.mark.parametrize("preset", PRESETS)
    def test_drop_last(self, preset, flag, expected):
        assert parse("--preset", preset, flag).experiment.drop_last is expected

    @pytest.mark.parametrize("change", CHANGED)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_command_means_the_experiment(self, preset, change):
        experiment = PRESETS[preset](**change)
        python, m, module, *arguments = shlex.split(options.command(experiment))
        assert [python, m, module] == ["python", "-m", "experiments.mnist_bn"]
        parsed = parse(*arguments).experiment
        assert parsed == experiment
        assert type(parsed) is PRESETS[preset]

    def test_command_names_only_what_differs_from_the_preset(self):
        command = options.command(Deep10(seed=3, drop_last=True))
        assert command == "python -m experiments.mnist_bn --preset deep10 --drop-last --seed 3"

    def test_changes(self):
        assert options.changes(Lab10(), Lab10()) == {}
        assert options.changes(Lab10(), Lab10(seed=3, hidden_sizes=(8,))) == {
            "seed": (0, 3),
            "hidden_sizes": ((32, 32), (8,)),
        }


class TestSaving:
    @pytest.mark.parametrize("change", CHANGED)
    @pytest.mark.parametrize("preset", PRESETS)
    def test_saved_experiments_load(self, preset, change):
        experiment = PRESETS[preset](**change)
        values = dataclasses.asdict(experiment)
        loaded = Experiment.load({**values, "hidden_sizes": list(values["hidden_sizes"])})
        assert loaded == experiment
        assert type(loaded) is PRESETS[preset]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"momentum": 0.9}, "this version differ in: momentum"),
            ({"preset": "lab11"}, "did you mean 'lab10'"),
            ({"matmul_precision": "float23"}, "did you mean 'float32'"),
            ({"epochs": 0}, "epochs is 0"),
        ],
    )
    def test_others_do_not(self, change, message):
        with pytest.raises(ValueError, match=message):
            Experiment.load({**dataclasses.asdict(Lab10()), **change})

    def test_missing_settings_are_named(self):
        values = dataclasses.asdict(Lab10())
        del values["seed"], values["epochs"]
        with pytest.raises(ValueError, match="differ in: epochs, seed"):
            Experiment.load(values)


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
        experiment = Lab10(batch_size=batch_size, drop_last=drop_last)
        with pytest.raises(ValueError, match=message):
            experiment.check_against(dataset(examples))

    @pytest.mark.parametrize(
        ("examples", "batch_size", "drop_last"),
        [(100, 100, False), (101, 100, True), (102, 100, False), (2, 2, True)],
    )
    def test_accepted(self, examples, batch_size, drop_last):
        Lab10(batch_size=batch_size, drop_last=drop_last).check_against(dataset(examples))
