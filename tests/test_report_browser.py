"""The page in a real browser: it shows what it should at any width, in light and dark, and its tables sort."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from report_fixture import SERIES, make_record, paper_records, seven_records
from spectraformer.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH to open the page with")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    names = ("softmax", "nystrom", "posrf-orf", "posrf-mm", "oprf-orf", "oprf-mm")
    sweep = [r for r in paper_records(range(2), evaluations=8) if r.run.attention.name in names]
    sweep = [r for r in sweep if r.run.task in ("listops", "image", "pathfinder")]
    return write_report([*sweep, *seven_records()[6:]], tmp_path_factory.mktemp("report")).page


def browse(page, profile, *arguments):
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command = [CHROMIUM, *options, "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *arguments]
    run = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "light"), (390, "dark")])
def test_a_browser_shows_the_page(page, tmp_path, width, scheme):
    shot = tmp_path / "page.png"
    setting = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    browse(page, tmp_path / "profile", setting, f"--screenshot={shot}", f"--window-size={width},7000")
    pixels = np.asarray(Image.open(shot).convert("RGB"), dtype=int)
    assert pixels.shape == (7000, width, 3)
    background = pixels[0, 0]
    assert (background.mean() > 240) == (scheme == "light")
    assert (np.abs(pixels - background).sum(-1) > 60).sum() > 50_000
    for colour in SERIES[scheme]:
        assert (np.abs(pixels - colour).sum(-1) < 12).sum() > 100


FRAMES = """\
<body style="margin:0"><iframe src="index.html" style="width:360px;height:900px;border:0"></iframe>
<iframe src="index.html" style="width:1280px;height:900px;border:0"></iframe>
<script>onload = () => { document.title = Array.from(frames, ({document: page}) => {
    const tables = [...page.querySelectorAll(".scroll")];
    page.querySelectorAll("details").forEach(one => one.open = true);
    return [page.documentElement.scrollWidth, page.documentElement.clientWidth,
        tables.some(table => table.scrollWidth > table.clientWidth)];
}).join(" ") }</script>
"""


def test_the_page_does_not_scroll_sideways(tmp_path):
    """Whatever the length of names: a wide table scrolls in its box. Windows may refuse to be narrow, frames do not."""
    name = "an-attention-with-a-name-that-does-not-fit-in-a-narrow-window"
    records = [*seven_records()[4:6], make_record("image", name, options={"x" * 40: "y" * 80})]
    records += [
        make_record("listops", name + "!" * 60),
        make_record("listops", "softmax"),
        make_record("text", "softmax"),
    ]
    write_report(records, tmp_path)
    outer = tmp_path / "outer.html"
    outer.write_text(FRAMES, encoding="utf-8")
    arguments = ("--allow-file-access-from-files", "--dump-dom", "--window-size=1800,1000")
    dumped = browse(outer, tmp_path / "profile", *arguments)
    assert re.search("<title>(.*?)</title>", dumped)[1].split()[0].startswith("360,360,true")
    assert re.search("<title>(.*?)</title>", dumped)[1].split()[1].startswith("1280,1280,")


SORT = """\
<iframe src="index.html"></iframe>
<script>onload = () => {
    const page = frames[0].document, table = page.querySelector("table.sortable");
    const names = () => [...table.tBodies[0].rows].map(row => row.cells[0].innerText.trim());
    const head = table.tHead.rows[0].cells;
    const click = i => {
        head[i].querySelector("button").click();
        return [names(), head[i].getAttribute("aria-sort")];
    };
    const found = {
        before: names(), down: click(1), up: click(1), name: click(0),
        numbers: [...table.tBodies[0].rows].map(row => row.cells[1].dataset.value ?? null),
        focusable: head[1].querySelector("button").tabIndex,
    };
    document.body.textContent = JSON.stringify(found);
}</script>
"""


def test_tables_sort_by_any_column_and_what_is_missing_comes_last(tmp_path):
    records = [
        make_record("listops", "b", test=0.3),
        make_record("listops", "a", test=0.5),
        make_record("listops", "softmax", test=0.4),
        *(make_record("text", name, test=0.6) for name in ("a", "c", "softmax")),
    ]
    write_report(records, tmp_path)
    outer = tmp_path / "outer.html"
    outer.write_text(SORT, encoding="utf-8")
    dumped = browse(outer, tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom")
    found = json.loads(re.search(r"\{.*\}", dumped, re.S)[0])
    assert found["before"][:2] == ["a", "softmax"]  # they have both tasks
    assert found["down"] == [["a", "softmax", "b", "c"], "descending"]  # c has no listops
    assert found["up"] == [["b", "softmax", "a", "c"], "ascending"]
    assert found["name"] == [["a", "b", "c", "softmax"], "ascending"]
    assert found["numbers"] == ["0.5", "0.3", None, "0.4"] and found["focusable"] == 0


def test_without_a_script_the_tables_are_there(page):
    text = page.read_text(encoding="utf-8")
    body = text[: text.index("<script>")]
    assert "<button" not in body and body.count("<tbody>") == body.count("<table") > 8


def test_it_prints(page, tmp_path):
    printed = tmp_path / "page.pdf"
    browse(page, tmp_path / "profile", f"--print-to-pdf={printed}")
    assert printed.read_bytes().startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) > 3
