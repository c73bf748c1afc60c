"""The verdicts, and that every claim could get each of them."""

import functools
import importlib
import json
import math
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from scipy import stats

from bnjax import data, functional, models, norms, training
from bnjax.functional import BatchStats
from bnjax.losses import cross_entropy
from bnjax.training import Batch
from experiments.claims import (
    Check,
    Claim,
    Evidence,
    Settings,
    Verdict,
    collect,
    ema_versus_population,
    gradient_explosion_at_init,
    interval,
    judge,
    lab10_erratum,
    landscape,
    load_claims,
    paper_figure_1,
    predicted,
    printed_figures,
    scale_invariance,
)
from experiments.report import figures

PASS, FAIL, INCONCLUSIVE = Verdict
NAN, INF = math.nan, math.inf
CLAIMS = load_claims()
FAST = {"rank-collapse", "scale-invariance"}

MEAN = Check("q", "", 0.0, 1.0)
EACH = Check("q", "", 0.0, 1.0, "each")
PREDICTED = Check("q", "", 0.5, 0.5, "predicted")
ORIGINAL = Check("q", "", 0.0, 1.0, original=True)
SHOWN = Check("q", "shown only")


def half(values, *, predicted=False):
    """Half of the 95 % interval, in closed form."""
    n = len(values)
    widening = math.sqrt(1 / n + predicted)
    return stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) * widening


class TestCheck:
    @pytest.mark.parametrize(
        ("check", "values", "verdict"),
        [
            (MEAN, [0.4, 0.5, 0.6], PASS),
            (MEAN, [-0.1, 0.5, 0.5, 0.5, 0.5, 1.1], PASS),  # a replicate alone may lie outside
            (MEAN, [1.9, 2.0, 2.1], FAIL),
            (MEAN, [-2.1, -2.0, -1.9], FAIL),
            (MEAN, [0.9, 1.0, 1.1], INCONCLUSIVE),
            (MEAN, [-2.0, 0.5, 3.0], INCONCLUSIVE),  # across both bounds
            (MEAN, [0.5], INCONCLUSIVE),
            (MEAN, [7.0], INCONCLUSIVE),
            (MEAN, [0.4, NAN, 0.6], INCONCLUSIVE),
            (MEAN, [0.4, INF, 0.6], INCONCLUSIVE),
            (MEAN, [1.4, INF, 1.6], FAIL),  # an infinite mean, with every replicate outside
            (MEAN, [-INF, -INF], FAIL),
            (MEAN, [INF], INCONCLUSIVE),
            (MEAN, [1.4, INF, NAN], INCONCLUSIVE),
            (MEAN, [], INCONCLUSIVE),
            (MEAN, [0.5, 0.5], PASS),
            (MEAN, [1.0, 1.0], PASS),  # the bounds are allowed
            (MEAN, [0.0, 0.0], PASS),
            (MEAN, [1.5, 1.5], FAIL),
            (replace(MEAN, high=INF), [1e9, 1e9], PASS),
            (replace(MEAN, low=-INF), [1e9, 1e9], FAIL),
            (EACH, [0.0, 0.5, 1.0], PASS),
            (EACH, [0.5, 0.5, 1.1], FAIL),
            (EACH, [0.5, -0.1, 0.5], FAIL),
            (EACH, [0.5], PASS),
            (EACH, [1.5], FAIL),
            (EACH, [0.5, NAN], FAIL),
            (EACH, [], INCONCLUSIVE),
            (PREDICTED, [0.4, 0.5, 0.6], PASS),
            (PREDICTED, [1.4, 1.5, 1.6], FAIL),
            (PREDICTED, [0.5, 0.5], PASS),
            (PREDICTED, [0.6, 0.6], FAIL),
            (PREDICTED, [0.5], INCONCLUSIVE),
            (PREDICTED, [0.4, NAN, 0.6], INCONCLUSIVE),
            (PREDICTED, [], INCONCLUSIVE),
            (SHOWN, [0.5, 0.6], PASS),
            (SHOWN, [NAN], PASS),
            (SHOWN, [], PASS),
        ],
    )
    def test_judges(self, check, values, verdict):
        assert check.judge(values) is verdict
        assert check.judge(np.array(values)) is verdict

    @pytest.mark.parametrize("values", [[0.4, 0.6], [7.0, 7.0], []])
    def test_original_figures_decide_nothing_elsewhere(self, values):
        assert ORIGINAL.judge(values, "on digits instead of MNIST") is INCONCLUSIVE
        assert ORIGINAL.judge(values, "") is MEAN.judge(values, "on digits instead of MNIST")

    @pytest.mark.parametrize("bound", [{"low": 0.0}, {"high": 0.0}, {"low": 1.0, "high": 2.0}])
    def test_decides_with_a_bound_alone(self, bound):
        assert Check("q", "", **bound).decides
        assert not SHOWN.decides

    @pytest.mark.parametrize("rule", ["mean", "predicted"])
    @pytest.mark.parametrize("values", [[1.0, 3.0], [0.2, 0.1, 0.7, 0.4, 0.3]])
    def test_intervals_are_those_of_student(self, rule, values):
        mean, reach = np.mean(values), half(values, predicted=rule == "predicted")
        found = interval(np.array(values), predicted=rule == "predicted")
        np.testing.assert_allclose(found, (mean - reach, mean + reach), rtol=1e-12)

        def at(distance):
            if rule == "predicted":
                return Check("q", "", mean + distance, mean + distance, rule)
            return Check("q", "", mean - abs(distance), mean + abs(distance), rule)

        inside, outside = (PASS, FAIL) if rule == "predicted" else (INCONCLUSIVE, PASS)
        for sign in (-1, 1):
            assert at(sign * reach * (1 - 1e-9)).judge(values) is inside
            assert at(sign * reach * (1 + 1e-9)).judge(values) is outside

    def test_published_figures(self):
        check = predicted("cost", 1.5)
        assert (check.published, check.low, check.high) == ("1.5", 1.5, 1.5)
        assert (check.rule, check.original) == ("predicted", True)

    def test_measured_values_bear_the_names_of_the_checks(self):
        checks = Check("a", ""), Check("b", "")
        panels = {"t": {"line": (np.ones(2), [jnp.int32(5)])}}
        found = collect(checks, [np.float32([1, 2]), [3, 4]], panels, range(2))
        assert found.measured == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
        assert found.picture == {"panels": {"t": {"line": [[1.0, 1.0], [5]]}}, "x": [0, 1]}
        with pytest.raises(ValueError, match="shorter"):
            collect(checks, [[1.0]])


class TestSettings:
    @pytest.mark.parametrize(
        ("quick", "replicates", "count", "told"),
        [
            (True, None, 3, "on digits instead of MNIST, 1 of 9 epochs"),
            (False, None, 10, "on digits instead of MNIST"),
            (True, 7, 7, "on digits instead of MNIST, 1 of 9 epochs"),
        ],
    )
    def test_quick_runs_less(self, quick, replicates, count, told):
        settings = Settings(few_digits(), quick, replicates)
        assert len(settings.keys(3, 10)) == count
        assert settings.either("less", "all") == ("less" if quick else "all")
        assert settings.incomparable("1 of 9 epochs") == told

    def test_only_a_full_run_on_mnist_compares(self):
        mnist = few_digits()._replace(name="mnist")
        assert Settings(mnist, quick=False).incomparable("1 of 9 epochs") == ""
        assert Settings(mnist, quick=True).incomparable() == ""
        assert Settings(mnist, quick=True).incomparable("1 of 9 epochs") == "1 of 9 epochs"


def allowed(check: Check) -> list[float]:
    """Three replicates that satisfy a check."""
    if check.rule == "predicted":
        return [check.low - 1, check.low, check.low + 1]
    if not check.decides:
        return [NAN] * 3
    low = check.low if math.isfinite(check.low) else check.high - 1
    high = check.high if math.isfinite(check.high) else check.low + 1
    return [(low + high) / 2] * 3


def contradictions(check: Check) -> list[list[float]]:
    """Three replicates below what a check allows, and three above, where that is possible."""
    beyond = [check.low - 1, check.high + 1]
    fine = allowed(check)[:2] if check.rule == "each" else None
    return [[*fine, x] if fine else [x] * 3 for x in beyond if math.isfinite(x)]


def evidence(checks, **others) -> Evidence:
    return Evidence({check.quantity: allowed(check) for check in checks} | others, {})


CHECKS = [
    pytest.param(claim, check, id=f"{claim.id}: {check.quantity}")
    for claim in CLAIMS.values()
    for check in claim.checks
    if check.decides
]


class TestEveryClaim:
    @pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
    def test_can_pass_and_can_stay_open(self, claim):
        verdict, each = judge(claim, evidence(claim.checks))
        assert (verdict, set(each)) == (PASS, {PASS})
        verdict, each = judge(claim, Evidence({}, {}))
        assert verdict is INCONCLUSIVE
        assert each == [INCONCLUSIVE if check.decides else PASS for check in claim.checks]

    @pytest.mark.parametrize(("claim", "check"), CHECKS)
    def test_can_fail_by_each_of_its_checks(self, claim, check):
        assert contradictions(check)
        for values in contradictions(check):
            told = {check.quantity: values}
            verdict, each = judge(claim, evidence(claim.checks, **told))
            assert verdict is FAIL
            assert each == [FAIL if one is check else PASS for one in claim.checks]
            assert judge(claim, Evidence(told, {}))[0] is FAIL  # whatever the others lack

    @pytest.mark.parametrize(("claim", "check"), CHECKS)
    def test_stays_open_with_each_of_its_checks(self, claim, check):
        assert judge(claim, evidence(claim.checks, **{check.quantity: []}))[0] is INCONCLUSIVE

    @pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
    def test_is_complete(self, claim):
        assert claim.source
        for text in (claim.statement, claim.setup, claim.remark or "None."):
            assert text == " ".join(text.split())
            assert text.endswith(".")
        assert any(check.decides for check in claim.checks)
        assert all(check.rule in ("mean", "each", "predicted") for check in claim.checks)
        assert len({check.quantity for check in claim.checks}) == len(claim.checks)
        assert all(check.low <= check.high for check in claim.checks)
        quick, full = claim.seconds
        assert 0 < quick <= full <= 1800

    @pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
    def test_stands_in_the_file_of_its_name(self, claim):
        if claim not in (printed_figures.COST, printed_figures.ACCURACY):
            name = f"experiments.claims.{claim.id.replace('-', '_')}"
            assert importlib.import_module(name).CLAIM is claim

    def test_is_listed_once_in_order(self):
        assert list(CLAIMS) == sorted(claim.id for claim in CLAIMS.values())
        assert len(CLAIMS) >= 15


SMALLER = {
    "batch-size": {"SIZES": (2, 32)},
    "depth-limit": {"DEPTHS": (2, 4)},
    "rank-collapse": {"DEPTH": 2},
}


@functools.cache
def few_digits() -> data.Dataset:
    digits = data.load("digits")
    return data.Dataset("digits", *(a[:600] for a in digits[1:3]), *(a[:100] for a in digits[3:]))


def run(claim: Claim) -> Evidence:
    """A quick run of two replicates on a few digits, that has been JSON."""
    found = claim.run(Settings(few_digits(), quick=True, replicates=2))
    return Evidence(**json.loads(json.dumps(found._asdict())))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in CLAIMS]
)
def test_measures_what_its_checks_judge(monkeypatch, name):
    claim = CLAIMS[name]
    for constant, value in SMALLER.get(name, {}).items():
        monkeypatch.setattr(sys.modules[claim.run.__module__], constant, value)
    found = run(claim)
    assert list(found.measured) == [check.quantity for check in claim.checks]
    assert all(len(values) == 2 for values in found.measured.values())
    assert found.incomparable or not any(check.original for check in claim.checks)

    saved = Evidence(**json.loads(json.dumps(found._asdict())))
    np.testing.assert_equal(saved._asdict(), found._asdict())
    figure = claim.draw(saved)
    assert isinstance(figure, Figure)
    assert figures.to_png(figure).startswith(b"\x89PNG")
    if claim is scale_invariance.CLAIM:
        assert judge(claim, saved)[0] is PASS


def test_scale_invariance_ends_with_the_usual_epsilon(monkeypatch):
    def normalize(x):
        fresh = BatchStats(jnp.zeros(x.shape[1]), jnp.ones(x.shape[1]))
        return functional.batch_norm_train(x, None, None, fresh, epsilon=1e-5)[0]

    monkeypatch.setattr(scale_invariance, "_normalize", normalize)
    verdict, each = judge(scale_invariance.CLAIM, run(scale_invariance.CLAIM))
    assert (verdict, set(each)) == (FAIL, {FAIL})


@pytest.mark.parametrize("growth", [0.5, 1.0, 1.467])
def test_growth_is_that_of_the_middle_of_a_geometric_sequence(growth):
    squares = 3.0 * growth ** -np.arange(gradient_explosion_at_init.DEPTH)
    squares[[0, 3, 26, 29]] = 1e-9, 7.0, 1e9, 7.0
    found = gradient_explosion_at_init._growth(np.stack([squares, 7 * squares]))
    np.testing.assert_allclose(found, growth, rtol=1e-9)


class TestPaperFigure1:
    def test_first_epoch_that_reaches_a_level(self):
        accuracy = np.array([[10.0, 50.0, 40.0, 90.0], [30.0, 30.0, 30.0, 30.0]])
        levels = np.array([[10.0, 45.0, 90.0, 91.0], [0.0, 30.0, 31.0, 100.0]])
        np.testing.assert_array_equal(
            paper_figure_1._first(accuracy, levels), [[1, 2, 4, 5], [1, 1, 5, 5]]
        )

    def test_compares_speed_height_and_drift(self):
        def percentiles(spread, shifts):  # [R, epochs, 3, H], one of each but for epochs
            return (spread * np.array([-1, 0, 1]) + np.reshape(shifts, (-1, 1)))[None, ..., None]

        found = paper_figure_1._compare(
            # reaches 20, 60 and 80 after 1, 1 and 3 epochs, the other after 1, 2 and 4
            {"bn": np.array([[60.0, 70.0, 85.0, 84.0]]), "no_bn": np.array([[20.0, 60, 50, 80]])},
            {
                "bn": percentiles(1.0, [0.0, 0.0, 1.0, 0.0]),
                "no_bn": percentiles(2.0, [0.0, 4.0, 0.0, 2.0]),
            },
        )
        # drifts 1 and 4, in spreads of 2 and 4
        np.testing.assert_allclose(np.ravel(found), [1.0, 0.75, 4.0, 0.25, 0.5], rtol=1e-12)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_running_variance_of_normal_data_has_both_biases(scale):
    x = scale * jax.random.normal(jax.random.key(0), (4000, 32)) + 5
    bias, startup = ema_versus_population._biases(x, jax.random.key(1))
    assert float(bias) == pytest.approx(1, abs=0.03)
    assert float(startup) == pytest.approx(1, abs=0.02)


def test_lab10_columns_differ_by_the_loss_they_start_from():
    size = lab10_erratum.LAB10.batch_size
    batch = Batch(*(jnp.asarray(a[: 3 * size + 5]) for a in few_digits()[1:3]))
    model = models.MLP((), 10)
    state = training.create_state(model, optax.sgd(0.1), jax.random.key(0), batch.images)
    last = jnp.float32(0.7)
    bn, no_bn, expected, bound = map(float, lab10_erratum._validate(state, batch, last))
    logits = model.apply(state.variables, batch.images[: 3 * size] / 255, train=False)
    losses = cross_entropy(logits, batch.labels[: 3 * size])
    assert no_bn == pytest.approx(float(losses.mean()), rel=1e-5)
    assert expected == pytest.approx(0.7 / 3, rel=1e-6)
    assert abs(bn - no_bn - expected) <= bound < 1e-5 * expected


class TestNoisyBatchNorm:
    X = np.random.default_rng(0).normal(2.0, 3.0, (4000, 40)).astype(np.float32)
    initialize = staticmethod(jax.jit(landscape.NoisyBatchNorm(train=True).init_with_output))

    def train(self, x, seed=0):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(seed)}
        y, variables = self.initialize(rngs, x)
        return np.asarray(y), variables

    def test_evaluates_with_the_mean_of_its_noise(self):
        variables = self.train(self.X)[1]
        y = landscape.NoisyBatchNorm(train=False).apply(variables, self.X)
        plain = norms.norm("batch")(False)
        expected = plain.apply(
            {kind: own["BatchNorm_0"] for kind, own in variables.items()}, self.X
        )
        np.testing.assert_allclose(y, 1.125 * expected, rtol=1e-6)

    def test_noise_is_seeded(self):
        y = self.train(self.X)[0]
        np.testing.assert_array_equal(y, self.train(self.X)[0])
        assert np.mean(y == self.train(self.X, seed=1)[0]) < 1e-3

    def test_shifts_have_a_part_in_common_in_each_unit(self):
        constant = np.full_like(self.X, 3.0)  # normalized to 0: only the shifts remain
        shifts = self.train(constant)[0]
        assert np.abs(shifts).max() <= 0.6
        assert np.all((np.ptp(shifts, axis=0) > 0.19) & (np.ptp(shifts, axis=0) <= 0.2 + 1e-6))
        assert np.ptp(shifts.mean(axis=0)) > 0.7  # of 1, over 40 units

    def test_scales_are_about_1_to_1_25(self):
        signs = np.tile(np.array([[-1.0], [1.0]], np.float32), (len(self.X) // 2, 40))
        y = self.train(signs)[0]
        halves = (y[1::2] - y[::2]) / 2  # s, with a standard deviation of 0.1, and m's
        scales = halves.mean(axis=0)
        assert np.all((scales > 0.99) & (scales < 1.26))
        assert np.ptp(scales) > 0.18  # of 0.25
        deviation = math.sqrt((0.1**2 + 0.2**2 / 12) / 2)
        assert halves.std(axis=0).mean() == pytest.approx(deviation, rel=0.02)
