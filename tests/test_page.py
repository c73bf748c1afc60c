"""Pages in a real browser: nothing fails, nothing is fetched, and everybody can read them.

These need Chromium and, in AXE, the path of axe-core's script.
"""

import json
import os
import re
import shutil
import subprocess
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import command
import pytest

from experiments import compare, reproduce, sweep

AXE = os.environ.get("AXE", "")
CHROMIUM = shutil.which("chromium") or ""
call = partial(command.call, pictures=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
    pytest.mark.skipif(not AXE, reason="needs the path of axe-core's script in AXE"),
]

DIGITS = "--dataset", "digits", "--epochs", 2, "--no-progress", "--hidden-sizes"
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

# Runs when all is there: what was loaded and is shown, and what axe-core finds.
TELL = """
<script>
addEventListener("load", () => axe.run().then(found => {
  const told = {
    fetched: performance.getEntriesByType("resource").map(one => one.name)
      .filter(name => !name.startsWith("data:")),
    images: [...document.images].map(one => one.complete && one.naturalWidth > 0),
    described: [...document.images].map(one => one.alt.length),
    width: innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    faults: found.violations.map(one => [one.impact, one.id, one.nodes[0].html]),
  };
  const place = document.createElement("pre");
  place.id = "told";
  place.textContent = JSON.stringify(told);
  parent.document.body.append(place);
}));
</script>
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of each kind."""
    path = tmp_path_factory.mktemp("pages")
    first, second = path / "first", path / "second"
    assert call(*DIGITS, 8, 8, "--replicates", 2, "--out", first).status == 0
    assert call(*DIGITS, *[8] * 6, "--learning-rate", 0.01, "--out", second).status == 0
    arms = ("--arms", "bn", "no_bn", "layer_norm", "bn_after", "--replicates", 2)
    assert call(*DIGITS, 8, 8, *arms, "--out", path / "arms").status == 0
    assert compare.main([str(first), str(second), "--out", str(path / "compared")]) == 0
    grid = "--dataset digits --epochs 1 --learning-rate 0.001 0.01 --replicates 2 --out"
    assert sweep.main([*grid.split(), str(path / "sweep")]) == 0
    claim = "scale-invariance --quick --dataset digits --out"
    assert reproduce.main([*claim.split(), str(path / "claims")]) == 0
    return {
        "report": first / "report.html",
        "deep": second / "report.html",
        "arms": path / "arms" / "report.html",
        "compare": path / "compared" / "compare.html",
        "sweep": path / "sweep" / "sweep.html",
        "claims": path / "claims" / "report.html",
    }


def look(page: Path, directory: Path, *, width: int, dark: bool) -> dict:
    """What a browser makes of a page."""
    content = page.read_text()
    axe = f"<script>{Path(AXE).read_text()}</script>"
    (directory / "page.html").write_text(content.replace("</body>", axe + TELL + "</body>"))
    frame = (
        '<!doctype html><meta name="color-scheme" content="light dark">'
        f'<iframe src="page.html" width="{width}" height="2000"></iframe>'
    )
    (directory / "frame.html").write_text(frame)  # a window has a least width
    serve = partial(Quiet, directory=directory)
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shown = browse(f"http://127.0.0.1:{server.server_port}/frame.html", directory, dark)
        server.shutdown()
    (told,) = re.findall(r'<pre id="told">(.*?)</pre>', shown.stdout, flags=re.DOTALL)
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(unescape(told)), "console": console}


class Quiet(SimpleHTTPRequestHandler):
    """Serves without a word: a browser tells what it fetches of servers, not of files."""

    def log_message(self, *words) -> None: ...


def browse(address: str, directory: Path, dark: bool) -> subprocess.CompletedProcess:
    """Chromium's document after all has loaded, and its console."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    return subprocess.run(
        [
            *(CHROMIUM, *QUIET, scheme, "--window-size=1200,2000"),
            *(f"--user-data-dir={directory / 'profile'}", "--virtual-time-budget=20000"),
            "--enable-logging=stderr",
            *("--dump-dom", address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("kind", ["report", "deep", "arms", "compare", "sweep", "claims"])
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (412, False)])
def test_a_page_in_the_browser(pages, tmp_path, kind, width, dark):
    told = look(pages[kind], tmp_path, width=width, dark=dark)
    assert told["console"] == []
    assert told["fetched"] == []
    assert (told["width"], told["dark"]) == (width, dark)
    assert told["images"]
    assert all(told["images"])
    assert min(told["described"]) > 20
    assert not told["wide"]
    assert [fault for fault in told["faults"] if fault[0] in ("serious", "critical")] == []


def test_what_is_wrong_is_seen(tmp_path):
    """A page with a fault of each kind."""
    page = tmp_path / "faulty.html"
    page.write_text(
        '<!doctype html><html lang="en"><head><title>Faulty</title></head><body>'
        '<img src="beside.png"><img src="http://elsewhere.invalid/far.png" alt="far">'
        '<p style="width: 3000px; color: #eee">pale</p>'
        "<script>undefined_function()</script></body></html>"
    )
    told = look(page, tmp_path, width=500, dark=False)
    assert any("undefined_function is not defined" in line for line in told["console"])
    assert {Path(name).name for name in told["fetched"]} == {"beside.png", "far.png"}
    assert told["images"] == [False, False]
    assert told["wide"]
    assert {"image-alt", "color-contrast"} <= {fault[1] for fault in told["faults"]}
