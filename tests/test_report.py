"""The report: what its tables say, and that its page can be opened by anybody."""

import csv
import dataclasses
import io
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from report_fixture import SERIES, make_record, seven_records
from spectraformer.report import write_report
from spectraformer.report.analysis import summary
from spectraformer.report.drawing import spread
from spectraformer.report.rows import check_records, sections
from spectraformer.report.table import cells, escape_markdown, signed, three_digits

VOID = {"meta", "link", "br", "hr", "img", "input"}

MARKDOWN = """\
### listops (tiny)

Data: generated from the grammar, seed 0; 2,000 train, 500 dev, 500 test examples; the most common class is \
18.40 % of test, 17.20 % of dev. Unless a name says otherwise: 600 steps, 32 examples a batch, 128 random \
features.

| attention | test % | 95 % interval | seeds | dev % | over majority | parameters | to softmax | steps/s | \
speed to softmax | peak memory | state a head | best step |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| softmax (exact) | 37.80 | 33.7 to 42.1 ‡ | 1 | 39.05 | +19.40 | 200,000 | 0.0 % | 8.00 | 1.00× | 3.00 GiB | – \
| 500 |
| oprf-orf | 36.90 ± 0.42 | 33.1 to 40.7 | 2 | 38.15 | +18.50 | 200,100 | 0.0 % | 12.5 | 1.56× | 720 MiB | \
4,352 | 500 |
| posrf-fastfoodl | 18.40 | 15.2 to 22.0 ‡ | 1 | 19.65 | 0.00 | 231,000 | +15.5 % † | 10.0 | – | 500 MiB | \
4,352 | 500 |

### image (jpeg)

Data: CIFAR-10 through JPEG, in grey; 45,000 train, 5,000 dev, 10,000 test examples; the most common class is \
10.00 % of test, 10.00 % of dev. Unless a name says otherwise: 600 steps, 32 examples a batch, 128 random \
features.

| attention | test % | 95 % interval | seeds | dev % | over majority | parameters | to softmax | steps/s | \
speed to softmax | peak memory | state a head | best step |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| oprf-orf (center=true) | 39.21 | 38.3 to 40.2 ‡ | 1 | 40.46 | +29.21 | 200,000 | – | 123 | – | 500 MiB GPU | \
4,352 | 500 |
| oprf-orf | 38.47 | 37.5 to 39.4 ‡ | 1 | 39.72 | +28.47 | 200,000 | – | 130 | – | 500 MiB GPU | 4,352 | 500 |

### image (jpeg), published protocol

Data: CIFAR-10 through JPEG, in grey; 45,000 train, 5,000 dev, 10,000 test examples; the most common class is \
10.00 % of test, 10.00 % of dev. Unless a name says otherwise: 600 steps, 32 examples a batch.

| attention | test % | 95 % interval | seeds | dev % | over majority | parameters | to softmax | steps/s | \
speed to softmax | peak memory | state a head | best step |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| softmax (exact) | 41.02 | 40.1 to 42.0 ‡ | 1 | 42.27 | +31.02 | 200,000 | 0.0 % | 61.2 | 1.00× | 500 MiB | – \
| 500 |

- Test accuracy"""

COLUMNS = """\
key task protocol attention run.train.seed accuracy.test accuracy.dev best_step data.counts.dev data.counts.test
data.counts.train data.majority.dev data.majority.test data.sha256 data.source device finished folder format git_commit
loss.dev loss.test loss.train memory_kind parameters peak_memory_bytes run.attention.name run.attention.num_features
run.attention.options run.model.classifier run.model.depth run.model.dropout run.model.hidden run.model.num_heads
run.model.width run.protocol run.size run.task run.train.accumulate run.train.batch_size
run.train.clip run.train.eval_every run.train.learning_rate run.train.precision run.train.select_after run.train.steps
run.train.warmup run.train.weight_decay seconds sessions started steps steps_per_second versions.python
versions.spectraformer versions.torch
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_report(seven_records(), tmp_path_factory.mktemp("report"))


def rows_of(*records):
    """Rows of the first section, by label."""
    return {row.label: row for row in sections(check_records(records))[0].rows}


def test_the_markdown_is_this(paths):
    assert paths.markdown.read_text(encoding="utf-8").startswith(MARKDOWN)


def test_the_csv_has_one_line_a_run_with_every_scalar(paths):
    lines = list(csv.DictReader(io.StringIO(paths.table.read_text(encoding="utf-8"))))
    assert list(lines[0]) == COLUMNS.split()
    records = {record.content["key"]: record for record in seven_records()}
    assert [line["key"] for line in lines] == sorted(records)
    for line in lines:
        content = records[line["key"]].content
        assert float(line["accuracy.test"]) == content["accuracy"]["test"]
        assert float(line["seconds"]) == content["seconds"]
        assert line["git_commit"] == "" and line["folder"] == records[line["key"]].path.name
    assert sorted(line["run.attention.options"] for line in lines)[0] == '{"center":true}'


def test_equal_records_in_any_order_give_equal_bytes(paths, tmp_path):
    again = write_report(seven_records()[::-1], tmp_path / "new" / "folder")
    for old, new in zip(all_files(paths), all_files(again), strict=True):
        assert old.name == new.name and old.read_bytes() == new.read_bytes()
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == sorted(path.name for path in all_files(paths))


def all_files(paths):
    lone = (paths.page, paths.markdown, paths.table, paths.leaderboard, paths.latex, paths.rows, paths.comparisons)
    return [*lone, *paths.curves, *paths.drawings]


def test_a_failure_leaves_the_old_files(tmp_path, monkeypatch):
    out = tmp_path / "out"
    written = write_report(seven_records()[:1], out)
    before = {path: path.read_bytes() for path in all_files(written)}
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(seven_records()[1:2], out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_rows_name_what_sets_them_apart():
    rows = rows_of(
        make_record("image", "oprf-orf", num_features=64),
        make_record("image", "oprf-orf", num_features=128),
        make_record("image", "posrf-orf", num_features=128),
        make_record("image", "gerf-orf", steps=700),
        make_record("image", "softmax", num_features=16),
    )
    # softmax has no features; settings of the training are told only where they are not the usual ones.
    both = {"oprf-orf (num_features=64)", "oprf-orf (num_features=128)"}
    assert set(rows) == both | {"posrf-orf", "gerf-orf (train.steps=700)", "softmax"}


def test_seeds_are_one_row_and_other_differences_are_not():
    rows = rows_of(
        make_record("image", "oprf-orf", 0, 0.30),
        make_record("image", "oprf-orf", 1, 0.34),
        make_record("image", "oprf-orf", 2, 0.50, steps=700),
    )
    usual = rows["oprf-orf"]
    assert usual.test.mean == pytest.approx(0.32) and usual.test.count == 2
    assert usual.test.deviation == pytest.approx(0.02 * 2**0.5)
    assert rows["oprf-orf (train.steps=700)"].test.deviation is None


def test_speed_is_compared_on_one_device_only():
    near, far = make_record("image", "a", speed=25.0), make_record("image", "b", speed=25.0, device="other")
    rows = rows_of(make_record("image", "softmax", speed=10.0), near, far)
    assert rows["a"].speed_ratio == 2.5 and rows["b"].speed_ratio is None
    assert rows["b"].parameters_change == 0.0
    mixed = rows_of(make_record("image", "a", 0), make_record("image", "a", 1, device="other"))
    assert mixed["a"].steps_per_second is None and cells(mixed["a"])["steps/s"] == "–"


def test_a_published_row_is_never_measured_against_a_strict_one():
    records = [make_record("text", "softmax"), make_record("text", "oprf-orf", protocol="published")]
    found = sections(check_records(records))
    assert [section.title for section in found] == ["text (tiny)", "text (tiny), published protocol"]
    assert found[1].rows[0].parameters_change is None and found[1].rows[0].speed_ratio is None


@pytest.mark.parametrize(
    ("parameters", "outside"), [(220_000, False), (220_001, True), (179_999, True), (180_000, False)]
)
def test_parameters_beyond_a_tenth_of_softmax_are_marked(parameters, outside):
    rows = rows_of(make_record("image", "softmax"), make_record("image", "a", parameters=parameters))
    assert rows["a"].outside_parity is outside
    assert cells(rows["a"])["to softmax"].endswith("†") is outside


def test_the_summary_compares_with_the_majority_class_and_with_softmax():
    def said(*records):
        text = summary(sections(check_records(records))[0]).replace("\N{NO-BREAK SPACE}", " ")
        return text.removeprefix("On image (jpeg), ")

    softmax = make_record("image", "softmax", test=0.30)
    assert said(softmax) == "softmax has a test accuracy of 30.0 %, 20.0 points above the majority class."
    assert said(softmax, make_record("image", "a", test=0.35)) == (
        "a is the best of 2 with a test accuracy of 35.0 %, 25.0 points above the majority class "
        "and 5.0 points above softmax."
    )
    tied = said(make_record("image", "a", test=0.1), make_record("image", "b", test=0.1))
    assert tied == "a and b are the best of 2 with a test accuracy of 10.0 %, level with the majority class."
    assert "5.0 points below the majority class" in said(make_record("image", "a", test=0.05))


class Page(HTMLParser):
    """Checks nesting; gathers text, attributes and identifiers."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.attributes, self.ids, self.tags = [], "", [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(paths):
    text = paths.page.read_text(encoding="utf-8")
    page = Page(text)
    assert "://" not in text and "@import" not in text
    assert not {"iframe", "img"} & {tag for tag, _ in page.tags}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]  # our own, in the page
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data"):
            assert value.startswith("#") or (tag == "link" and value == "data:,"), (tag, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert len(page.ids) == len(set(page.ids))
    targets = [value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")]
    targets += re.findall(r"url\(#([^)]*)\)", text)
    assert targets and set(targets) <= set(page.ids)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(drawing.get("aria-label") or drawing.get("aria-hidden") == "true" for drawing in drawings)


def test_the_page_shows_every_row_and_number(paths):
    page = Page(paths.page.read_text(encoding="utf-8"))
    for section in sections(check_records(seven_records())):
        assert section.task in page.text
        for row in section.rows:
            assert row.name in page.text
            assert all(text in page.text for column, text in cells(row).items() if column != "attention")
    for record in seven_records():
        assert record.content["key"][:12] in page.text and record.content["device"] in page.text


def test_text_is_only_text(tmp_path):
    name = 'a<b>&|$x$_{"'
    record = dataclasses.replace(make_record("image", name), path=tmp_path / "run")
    record.content["data"]["source"] = "<script>alert(1)</script>"
    paths = write_report([record], tmp_path)
    page = Page(paths.page.read_text(encoding="utf-8"))
    assert name in page.text and "<script>" in page.text
    assert any(name in (attributes.get("aria-label") or "") for tag, attributes in page.tags if tag == "svg")
    (line,) = [line for line in paths.markdown.read_text(encoding="utf-8").splitlines() if line.startswith("| a&lt;b")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 14
    drawn = ElementTree.fromstring(next(path for path in paths.curves if path.suffix == ".svg").read_bytes())
    assert any(element.text == name for element in drawn.iter("{http://www.w3.org/2000/svg}text"))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("a|b", r"a\|b"),
        ("<b>&", "&lt;b>&amp;"),
        ("num_features=1", "num_features=1"),
        ("_a_ *b*\n`c`", r"\_a\_ \*b\* \`c\`"),
    ],
)
def test_markdown_is_escaped(given, written):
    assert escape_markdown(given) == written


def test_tasks_whose_names_differ_in_punctuation_have_files_of_their_own(tmp_path):
    records = [make_record("image", "a"), make_record("image", "a", 1, label="image [jpeg]"), make_record("text", "a")]
    paths = write_report(records, tmp_path)
    assert len(set(paths.curves)) == 6 and all(path.is_file() for path in paths.curves)
    assert tmp_path / "curves-text-tiny.svg" in paths.curves


@pytest.mark.parametrize("evaluations", [0, 1])
def test_short_and_broken_histories_are_drawn(tmp_path, evaluations):
    record = make_record("image", "a", evaluations=evaluations)
    if evaluations:
        record.content["history"][0]["train_loss"] = None
    text = write_report([record], tmp_path).page.read_text(encoding="utf-8")
    assert text.count("no evaluations recorded</text>") == (2 if evaluations else 4)


def broken(**changes):
    record = make_record("image", "a")
    return dataclasses.replace(record, content={**record.content, **changes})


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no records to report; make one with `spectraformer train"),
        ([make_record("image", "a"), make_record("image", "a")], "the same run is given twice"),
        ([broken(format=2)], "has format 2; expected 1"),
        ([broken(accuracy={"dev": 0.1})], r"accuracy\.test of runs.* is None; expected a finite number"),
        ([broken(parameters=float("nan"))], "parameters of .* is nan; expected a finite number"),
        ([broken(device=None)], "device of .* is None; expected a text"),
        ([broken(history=None)], "history of .* is no list"),
        (["result.json"], "one of the records is 'result.json'; expected a Record"),
    ],
)
def test_records_that_cannot_be_reported(records, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report(records, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match="a file is in the way"):
            write_report(seven_records()[:1], out)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.1234, "0.123"), (9.5, "9.50"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346"), (0, "0")],
)
def test_speeds_have_three_digits(number, text):
    assert three_digits(number) == text


def test_signs():
    assert [signed(x, 1) for x in (1.26, -1.26, -0.04, 0.0)] == ["+1.3", "\N{MINUS SIGN}1.3", "0.0", "0.0"]


def test_labels_do_not_overlap_and_stay_inside():
    sizes = [0.1, 0.2, 0.1, 0.1]
    places = spread([0.5, 0.5, 0.52, 0.99], sizes)
    gaps = [b - a - (p + q) / 2 for a, b, p, q in zip(places, places[1:], sizes, sizes[1:], strict=False)]
    assert min(gaps) >= -1e-9 and places[-1] == pytest.approx(0.95)
    assert sum(places[:3]) / 3 == pytest.approx(1.52 / 3)  # moved as little as can be
    assert spread([0.2, 0.8], [0.1, 0.1]) == pytest.approx([0.2, 0.8])


def test_the_picture_shows_every_colour(paths):
    picture = next(path for path in paths.curves if path.name == "curves-listops-tiny.png")
    pixels = np.asarray(Image.open(picture).convert("RGB"), dtype=int)
    assert pixels.shape == (1200, 1760, 3)
    for colour in (*SERIES["light"], (0x1B, 0x1E, 0x23)):
        assert (np.abs(pixels - colour).sum(-1) < 12).sum() > 1000
