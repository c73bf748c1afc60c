"""The whole command: its list, its directory, its page, its errors, going on, stopping."""

import contextlib
import html.parser
import io
import json
import re
import shlex
import signal
from pathlib import Path

import pytest

from bnjax import data
from experiments import reproduce
from experiments.claims import Check, Claim, Evidence, load_claims, verdicts
from experiments.lab import rundir
from experiments.report import figures

CLAIMS = load_claims()
DIGITS = ("--dataset", "digits")
REAL = CLAIMS["scale-invariance"]


def call(*arguments) -> int:
    """The command in this process."""
    try:
        return reproduce.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def plain(text: str) -> str:
    """Text without the boxes and the line breaks that tyro and rich put into it."""
    return " ".join(re.sub("[─-╿]", " ", text).split())


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file()
    }


class Page(html.parser.HTMLParser):
    """What a page refers to, its tags and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.text = ""
        self.feed((path / "report.html").read_text())
        self.text = plain(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        loading = {"src", "href", "srcset", "data", "action", "poster"}
        self.references += [value for name, value in attrs if name in loading]
        self.ids |= {value for name, value in attrs if name == "id"}

    def handle_data(self, text):
        self.text += text + " "


def fake(values, interfere=lambda: None, **fields) -> tuple[Claim, list[bool]]:
    """A claim that measures these values; and an entry for each time that it was run."""
    computed: list[bool] = []

    def run(settings):
        interfere()
        computed.append(True)
        return Evidence({"q": list(values)}, {"drawn": 1})

    told = {
        "id": "made-up",
        "statement": "Two values are about 1.",
        "source": "nobody",
        "setup": "none.",
        "checks": (Check("q", "1", 0.5, 1.5),),
        "seconds": (1, 100),
    }
    claim = Claim(**{**told, **fields}, run=run, draw=lambda evidence: figures.panels(["Drawn"])[0])
    return claim, computed


@pytest.fixture
def offer(monkeypatch):
    """Lets the command know these claims alone."""

    def offer(*claims):
        for module in (reproduce, verdicts):
            monkeypatch.setattr(
                module, "load_claims", lambda: {claim.id: claim for claim in claims}
            )

    return offer


class TestList:
    def test_names_all_claims_and_runs_none(self, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert call() == 0
        listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
        assert set(CLAIMS) <= listed
        assert list(tmp_path.iterdir()) == []

    def test_help_explains_the_exit_statuses(self, capsys):
        assert call("--help") == 0
        told = plain(capsys.readouterr().out).split("Exit status:")[1]
        assert all(re.search(rf"\b{status} \w+", told) for status in (0, 2, 130, 143))


@pytest.fixture(scope="module")
def settled(tmp_path_factory) -> Path:
    """A directory with one claim."""
    path = tmp_path_factory.mktemp("settled") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "load_claims", lambda: {"made-up": fake([1.0, 1.0])[0]})
        patch.setattr(reproduce, "load_claims", verdicts.load_claims)
        assert call("made-up", *DIGITS, "--quick", "--replicates", 2, "--out", path) == 0
    return path


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("scale-invarance", "unknown claim 'scale-invarance': did you mean 'scale-invariance'"),
            ("scale-invariance nonsense", "unknown claim 'nonsense'"),
            ("all --dataset minst", "unknown dataset 'minst': did you mean 'mnist'"),
            ("all --replicates 0", "replicates is 0: expected at least 1"),
            ("all --replicates two", "two"),
            ("all --seed -1", "seed is -1: expected 0 to 4294967295"),
            ("all --seed 4294967296", "seed is 4294967296: expected 0 to 4294967295"),
            ("all --dataset mnist --data-dir nowhere", "nowhere: no such directory"),
        ],
    )
    def test_end_with_one_sentence(self, capsys, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        assert call(*arguments.split(), "--out", "out") == 2
        told = capsys.readouterr().err
        assert message in plain(told)
        assert "Traceback" not in told
        if "unknown claim" in message:
            assert told.startswith("error: ")
            assert told.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_out_that_belongs_to_something_else_is_left_alone(self, capsys, tmp_path):
        (tmp_path / "kept").write_text("mine")
        for out, message in ((tmp_path, "is not empty"), (tmp_path / "kept", "is a file")):
            before = contents(tmp_path)
            assert call(REAL.id, *DIGITS, "--out", out) == 2
            assert message in capsys.readouterr().err
            assert contents(tmp_path) == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--replicates 2", "quick was True, now False"),
            ("--quick", "replicates was 2, now None"),
            ("--quick --replicates 3", "replicates was 2, now 3"),
            ("--quick --replicates 2 --seed 1", "seed was 0, now 1"),
            ("--seed 1", "quick was True, now False, replicates was 2, now None, seed was 0"),
        ],
    )
    def test_other_settings_are_named(self, capsys, settled, arguments, message):
        before = contents(settled)
        assert call(REAL.id, *DIGITS, *arguments.split(), "--out", settled) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {settled} holds results with other settings: ")
        assert message in told
        assert contents(settled) == before

    def test_other_data_are_named(self, capsys, settled, monkeypatch):
        load = reproduce.load_data
        monkeypatch.setattr(
            reproduce,
            "load_data",
            lambda *arguments: (d := load(*arguments))._replace(test_labels=d.test_labels[::-1]),
        )
        before = contents(settled)
        arguments = (*DIGITS, "--quick", "--replicates", 2, "--out", settled)
        assert call(REAL.id, *arguments) == 2
        assert re.search(
            "data was digits [0-9a-f]{12}, now digits [0-9a-f]{12}\n", capsys.readouterr().err
        )
        assert contents(settled) == before

    def test_another_kind_of_run_is_named(self, capsys, tmp_path):
        config = {"experiment": {"preset": "lab10"}, "execution": {}, "versions": {}}
        config["dataset"] = {"name": "digits", "requested": "digits", "sha256": "0"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert call(REAL.id, *DIGITS, "--out", tmp_path) == 2
        assert "holds another kind of run" in plain(capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("count", "message"), [(511, "claims need 512"), (577, "would hold one example")]
    )
    def test_too_few_images(self, capsys, tmp_path, monkeypatch, count, message):
        digits = data.load("digits")
        few = digits._replace(
            train_images=digits.train_images[:count], train_labels=digits.train_labels[:count]
        )
        monkeypatch.setattr(reproduce, "load_data", lambda *_: few)
        assert call(REAL.id, "--out", tmp_path / "out") == 2
        assert message in plain(capsys.readouterr().err)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
    def test_damaged_configuration(self, capsys, tmp_path, text):
        (tmp_path / "config.json").write_text(text)
        assert call(REAL.id, *DIGITS, "--out", tmp_path) == 2
        assert "config.json is damaged" in plain(capsys.readouterr().err)
        assert contents(tmp_path).keys() == {"config.json"}


REAL_ARGUMENTS = (REAL.id, "--quick", *DIGITS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A directory with a real claim, and what was printed."""
    path = tmp_path_factory.mktemp("finished") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert call(*REAL_ARGUMENTS, "--out", path) == 0
    return path, out.getvalue()


class TestRealClaim:
    def test_line_says_what_decided(self, finished):
        path, out = finished
        (line,) = (line for line in out.splitlines() if REAL.id in line)
        assert re.match(
            rf"PASS +{REAL.id} +output, largest relative error: \S+ ± \S+ \(n = 5\)", line
        )
        assert "(published: BN(aWu) = BN(Wu))" in line
        assert f"report: {path / 'report.html'}" in out

    def test_files(self, finished):
        path, _ = finished
        files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert files == {
            *("config.json", "report.html", "verdicts.json"),
            *(f"{REAL.id}/{name}" for name in ("evidence.json", "figure.png")),
        }
        evidence = json.loads((path / REAL.id / "evidence.json").read_text())
        assert evidence.keys() == {"measured", "picture", "incomparable", "seconds"}
        assert list(evidence["measured"]) == [check.quantity for check in REAL.checks]
        assert [len(values) for values in evidence["measured"].values()] == [5] * 5

    def test_verdicts(self, finished):
        (told,) = json.loads((finished[0] / "verdicts.json").read_text())["verdicts"]
        assert (told["claim"], told["verdict"]) == (REAL.id, "PASS")
        for check, row in zip(REAL.checks, told["checks"], strict=True):
            assert (row["quantity"], row["published"]) == (check.quantity, check.published)
            assert (row["allowed"], row["verdict"]) == ("each 0 to 1e-10", "PASS")

    def test_page_says_what_was_claimed_measured_and_decided(self, finished):
        page = Page(finished[0])
        (told,) = json.loads((finished[0] / "verdicts.json").read_text())["verdicts"]
        for text in (REAL.statement, REAL.source, REAL.setup):
            assert plain(text) in page.text
        for row in told["checks"]:
            for name in ("quantity", "published", "measured", "interval", "allowed", "verdict"):
                assert row[name]
                assert plain(row[name]) in page.text
        assert f"{REAL.id}: PASS" in page.text
        assert f"python -m experiments.reproduce {REAL.id} --dataset digits --quick" in page.text
        assert "PASS 1 , FAIL 0 , INCONCLUSIVE 0" in page.text
        assert "Quick run on digits, seed 0" in page.text

    def test_page_needs_no_network_and_no_other_file(self, finished):
        page = Page(finished[0])
        pictures = [
            found for found in page.references if found.startswith("data:image/png;base64,")
        ]
        assert len(pictures) == 1
        assert set(page.references) - set(pictures) == {f"#{REAL.id}"}
        assert REAL.id in page.ids
        assert not {"script", "link", "iframe", "base"} & page.tags
        assert not re.search(r"@import|url\(", (finished[0] / "report.html").read_text())

    def test_is_not_run_again_and_has_room_for_another(self, finished, capsys, offer):
        path, _ = finished
        before = contents(path / REAL.id)
        other, computed = fake([1.0, 1.0])
        offer(REAL, other)
        assert call(*REAL_ARGUMENTS, "--out", path) == 0
        assert "1 claim, 1 done before" in capsys.readouterr().out
        assert contents(path / REAL.id) == before

        assert call(other.id, REAL.id, *REAL_ARGUMENTS[1:], "--out", path) == 0
        assert contents(path / REAL.id) == before
        assert computed == [True]
        told = json.loads((path / "verdicts.json").read_text())["verdicts"]
        assert {one["claim"] for one in told} == {REAL.id, other.id}
        page = Page(path)
        assert {REAL.id, other.id} <= page.ids
        assert "PASS 2 , FAIL 0 , INCONCLUSIVE 0" in page.text


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1], "INCONCLUSIVE"),  # two replicates say little
        ([1.0, 1.0], "PASS"),
        ([2.0, 2.0], "FAIL"),
        ([2.0, float("nan")], "INCONCLUSIVE"),
    ],
)
def test_every_verdict_is_a_success(capsys, tmp_path, offer, values, verdict):
    offer(fake(values)[0])
    assert call("made-up", *DIGITS, "--out", tmp_path / "out") == 0
    assert re.search(rf"^{verdict} +made-up ", capsys.readouterr().out, re.MULTILINE)
    (told,) = json.loads((tmp_path / "out" / "verdicts.json").read_text())["verdicts"]
    assert told["verdict"] == verdict
    assert f"made-up: {verdict}" in Page(tmp_path / "out").text


def test_all_means_every_claim_once(capsys, tmp_path, offer):
    claims = [fake([1.0], id=f"made-up-{k}") for k in range(3)]
    offer(*(claim for claim, _ in claims))
    assert call("made-up-1", "all", *DIGITS, "--out", tmp_path / "out") == 0
    assert [computed for _, computed in claims] == [[True]] * 3
    assert "3 claims, about 5 min on two cores" in capsys.readouterr().out


def test_what_is_not_finite_is_null(tmp_path, offer):
    claim, _ = fake([1.0, float("nan"), float("inf")])
    offer(claim)
    assert call(claim.id, *DIGITS, "--out", tmp_path / "out") == 0

    def refuse(constant):
        raise AssertionError(constant)

    for file in (tmp_path / "out").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)
    verdict = json.loads((tmp_path / "out" / "verdicts.json").read_text())["verdicts"][0]
    assert verdict["verdict"] == "INCONCLUSIVE"


def test_directory_has_a_name_of_its_own(capsys, tmp_path, monkeypatch, offer):
    monkeypatch.chdir(tmp_path)
    offer(fake([1.0])[0])
    assert call("made-up", *DIGITS) == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"reproduce-digits-\d{8}-\d{6}", path.name)
    assert f"directory: runs/{path.name}\n" in capsys.readouterr().out
    assert rundir.read_config(path)["dataset"]["requested"] == "digits"


def test_text_is_escaped(tmp_path, offer):
    nasty = "<script>alert('x')</script> & <b>bold</b>."
    checks = (Check("<i>q</i>", "<u>1</u>", 0.5, 1.5),)
    texts = dict.fromkeys(("statement", "source", "setup", "remark"), nasty)
    offer(fake([1.0], checks=checks, **texts)[0])
    assert call("made-up", *DIGITS, "--out", tmp_path / "out") == 0
    page = Page(tmp_path / "out")
    assert not {"script", "b", "i", "u"} & page.tags
    assert page.text.count(plain(nasty)) == 5  # the statement stands in the overview, too
    assert "<i>q</i> <u>1</u>" in page.text


class TestStopping:
    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
    )
    @pytest.mark.parametrize("swallowed", [False, True], ids=["raised", "lost in a callback"])
    def test_goes_on_where_it_stopped(
        self, capsys, tmp_path, offer, monkeypatch, number, status, swallowed
    ):
        stopping = [True]

        def interfere():
            if stopping:
                stopping.clear()
                with contextlib.suppress(BaseException) if swallowed else contextlib.nullcontext():
                    signal.raise_signal(number)

        (first, ran), (second, again) = (
            fake([1.0], id="a"),
            fake([1.0, 2.0, 3.0], interfere, id="made-up"),
        )
        offer(first, second)
        out = tmp_path / "my out"
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        arguments = ("all", "--quick", *DIGITS, "--seed", 3, "--out", out)
        assert call(*arguments) == status
        assert {n: signal.getsignal(n) for n in before} == before
        captured = capsys.readouterr()
        told, hint = captured.err.removesuffix("\n").split("; go on with: ")
        assert told == "stopped"
        words = shlex.split(hint)
        assert words[:3] == ["python", "-m", "experiments.reproduce"]
        assert call(*words[3:]) == 0
        assert (ran, again) == ([True], [True])
        evidence = json.loads((out / "made-up" / "evidence.json").read_text())
        assert evidence["measured"] == {"q": [1.0, 2.0, 3.0]}

    def test_keeps_the_claims_that_were_done(self, tmp_path, offer):
        def interrupt():
            raise KeyboardInterrupt

        first, second = fake([1.0], id="a"), fake([1.0], interrupt, id="b")
        offer(first[0], second[0])
        out = tmp_path / "out"
        assert call("all", *DIGITS, "--out", out) == 130
        assert [
            one["claim"] for one in json.loads((out / "verdicts.json").read_text())["verdicts"]
        ] == ["a"]
        assert "1 published claim " in Page(out).text

    def test_before_anything_is_written_gives_no_hint(self, capsys, tmp_path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(reproduce, "load_data", interrupted)
        assert call("all", *DIGITS, "--out", tmp_path / "out") == 130
        assert capsys.readouterr().err == "stopped\n"
        assert list(tmp_path.iterdir()) == []
