"""Leaderboards, comparisons, the published figures, heatmaps and Pareto fronts: what they say of made-up runs."""

import csv
import dataclasses
import io
import re
import shutil
import subprocess

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from report_fixture import make_record, paper_records, seven_records
from spectraformer.config import AttentionConfig, ModelConfig
from spectraformer.features import FeatureMap
from spectraformer.report import write_report
from spectraformer.report.analysis import analyse, leaderboard_markdown
from spectraformer.report.comparisons import compare, conclusions
from spectraformer.report.curves import PANELS, curves
from spectraformer.report.heatmap import heatmap
from spectraformer.report.latex import escape_latex, latex
from spectraformer.report.leaderboard import comparisons_csv, leaderboard_csv, leaderboards, tables
from spectraformer.report.notes import footnotes
from spectraformer.report.pareto import _draw_front as draw_front
from spectraformer.report.pareto import _steps as pareto_steps
from spectraformer.report.pareto import fronts, pareto
from spectraformer.report.published import beside_cells, beside_published, beside_words, find_published, our_name
from spectraformer.report.rows import check_records, sections
from spectraformer.report.state import state_numbers

HOSTILE = 'a_b%$#&{x}~^\\|"<i>[1]'
PUBLISHED = """\
variant,task,accuracy_percent,accuracy_sd,train_hours,peak_memory_gb
OT,image,37.48,0.83,4.00,9.42
OPRF-OR,image,33.70,0.57,2.00,5.25
PosRF-MM,image,33.82,0.51,2.02,4.49
OT,listops,38.49,0.80,1.96,4.37
"""


def sections_of(*records):
    return sections(check_records(records))


def board_of(*records):
    return leaderboards(sections_of(*records))[0]


def cells_of(table):
    return {line[0]: dict(zip(table.columns[1:], line[1:], strict=True)) for line in table.lines}


def seeds(name, accuracies, task="image", **other):
    return [make_record(task, name, seed, test, **other) for seed, test in enumerate(accuracies)]


def test_the_leaderboard_has_tasks_in_order_averages_and_gaps():
    board = board_of(
        *seeds("softmax", [0.40, 0.42]),
        *seeds("softmax", [0.6, 0.6], "text"),
        make_record("image", "a", test=0.5),
        make_record("text", "a", test=0.7),
        make_record("image", "b", test=0.9),
    )
    table = tables(board)[0]
    assert table.columns == ("attention", "text (tiny)", "image (jpeg)", "average", "mean rank", "seeds")
    rows = cells_of(table)
    assert list(rows) == ["a", "softmax", "b"]  # without a task, an average of the others would say nothing
    assert rows["softmax"]["image (jpeg)"] == "41.00 ± 1.41" and rows["softmax"]["average"] == "50.50"
    assert rows["b"] == dict.fromkeys(rows["b"], "–") | {"image (jpeg)": "90.00", "seeds": "1"}
    assert [sorted(best) for best in table.best] == [[1, 3, 4], [], [2]]


def test_other_training_is_another_line_and_other_options_too():
    board = board_of(
        *seeds("oprf-orf", [0.3, 0.3, 0.3]),
        make_record("image", "oprf-orf", 3, 0.9, steps=700),
        make_record("text", "oprf-orf", 0, 0.8, num_features=64),
        make_record("text", "softmax", 0, 0.7),
        make_record("image", "softmax", 0, 0.2),
    )
    rows = cells_of(tables(board)[0])
    assert set(rows) == {
        "softmax",
        "oprf-orf (num_features=128)",
        "oprf-orf (num_features=128, train.steps=700)",
        "oprf-orf (num_features=64)",
    }
    assert rows["oprf-orf (num_features=128)"]["image (jpeg)"] == "30.00 ± 0.00"


def test_times_of_several_devices_are_marked_and_none_is_the_best():
    records = [
        make_record("image", "a", speed=10.0, steps=36_000),
        make_record("image", "b", speed=10.0, steps=36_000, device="other"),
        make_record("image", "c", speed=None, steps=36_000),
    ]
    board = board_of(*records)
    _, time, memory = tables(board)
    assert cells_of(time) == {
        "a": {"image (jpeg)": "1.00 a"},
        "b": {"image (jpeg)": "1.00 b"},
        "c": {"image (jpeg)": "–"},
    }
    assert time.title == "Training time, hours" and not any(time.best) and "b: measured on other." in time.notes
    assert cells_of(memory)["c"] == {"image (jpeg)": "–"}
    one = tables(board_of(records[0], records[2]))[1]
    assert one.title == "Training time, hours, on CPU, made up, 2 threads" and not one.notes
    assert len(tables(board_of(records[2]))) == 1


def test_accuracy_only_runs_leave_times_to_the_others():
    rows = sections_of(make_record("image", "a", 0, speed=20.0), make_record("image", "a", 1, speed=None))[0].rows
    assert rows[0].test.count == 2 and rows[0].steps_per_second == 20.0 and rows[0].seconds == 30.0
    (alone,) = sections_of(make_record("image", "a", speed=None))[0].rows
    assert alone.device is None and alone.seconds is None and alone.peak_memory is None
    notes = footnotes(analyse(check_records([make_record("image", "a", speed=None)]), {}, "softmax"))
    assert any(note.startswith("Runs that shared their device") for note in notes)


def test_curves_over_time_are_of_runs_that_were_timed_on_one_device():
    by_step, by_time = PANELS[:2]
    shared = make_record("image", "a", 1, speed=30.0)
    shared = dataclasses.replace(shared, content={**shared.content, "steps_per_second": None})
    (section,) = sections_of(make_record("image", "a", 0, speed=10.0), shared)
    assert curves(section, by_time)[0].mean[-1][0] == 60.0  # not the mean of 60 and 20 seconds
    assert curves(section, by_step)[0].low != curves(section, by_step)[0].high  # both seeds
    (section,) = sections_of(make_record("image", "a", 0), make_record("image", "a", 1, device="other"))
    assert curves(section, by_time) == [] and len(curves(section, by_step)) == 1


def test_long_curves_are_thinned_and_keep_their_end():
    record = make_record("image", "a", steps=5000, evaluations=1234)
    (curve,) = curves(sections_of(record)[0], PANELS[0])
    last = record.content["history"][-1]
    assert 90 <= len(curve.mean) <= 100 and curve.mean[-1] == (last["step"], last["dev_accuracy"])


def environments(text):
    return re.findall(r"\\begin\{tabular\}\{(lr*)\}(.*?)\\end\{tabular\}", text, re.S)


def test_latex_is_whole():
    text = latex([board_of(*seven_records()[:4]), board_of(make_record("image", HOSTILE), make_record("image", "[b]"))])
    for opened, closed in (("table", "table"), ("tabular", "tabular")):
        assert text.count(f"\\begin{{{opened}}}") == text.count(f"\\end{{{closed}}}") == 6
    plain = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
    for columns, body in environments(text):
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert lines and all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
        assert all(not line.strip().startswith(("[", "*")) for line in lines)  # else an argument of the line before
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 6
    assert escape_latex(HOSTILE) in text and r"\textbf{37.80}" in text and r"36.90 $\pm$ 0.42" in text
    assert escape_latex("a_b & 5 %\n<") == r"a\_b \& 5 \% \textless{}"


def test_decimal_points_stand_below_one_another_in_print():
    records = [*seeds("softmax", [0.40, 0.42]), make_record("image", "a", test=0.5), make_record("text", "a", test=0.7)]
    accuracy, time, _ = latex([board_of(*records, make_record("image", "b", speed=1.0))]).split(r"\end{table}")[:3]
    assert r"41.00 $\pm$ 1.41 &" in accuracy and r"\textbf{50.00}\phantom{ $\pm$ 1.41} &" in accuracy
    assert r"0.500\phantom{" not in time and r"b & -- & 10.0\phantom{00}" in time, "dashes stay as they are"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on PATH to compile the table with")
def test_latex_compiles(tmp_path):
    body = latex([board_of(*seven_records()[:4], make_record("listops", HOSTILE))])
    head = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "a.tex").write_text(f"{head}{body}\\end{{document}}\n", encoding="utf-8")
    subprocess.run(["pdflatex", "-halt-on-error", "-interaction=batchmode", "a.tex"], cwd=tmp_path, check=True)


def comparisons_of(*records, baseline="softmax"):
    (section,) = sections_of(*records)
    found = compare(section, baseline)
    words = " ".join(conclusions(section, found, baseline)).replace("\N{NO-BREAK SPACE}", " ")
    return {comparison.row.label: comparison for comparison in found}, words


def test_seeds_are_paired_and_the_verdict_is_corrected():
    softmax = [0.400, 0.410, 0.390, 0.405, 0.395]
    found, words = comparisons_of(
        *seeds("softmax", softmax),
        *seeds("a", [x + 0.05 + e for x, e in zip(softmax, (0.001, 0, 0, 0, -0.001), strict=True)]),
        *seeds("b", [x - 0.05 + e for x, e in zip(softmax, (0.001, 0, 0, 0, -0.001), strict=True)]),
        *seeds("c", [0.41, 0.39, 0.40, 0.41, 0.39]),
    )
    assert {name: one.verdict for name, one in found.items()} == {"a": "above", "b": "below", "c": "not told apart"}
    assert all(one.difference.test == "paired" and one.difference.seeds == 5 for one in found.values())
    assert found["a"].adjusted == pytest.approx(3 * found["a"].difference.p)
    assert "Above softmax by more than seed noise: a (+5.0)." in words
    assert "Below softmax by more than seed noise: b (−5.0)." in words
    assert "Not told apart from softmax: c (0.0). That is no proof of equality: with 5 seeds and 3 comparisons" in words


def test_a_correction_can_take_a_verdict_back():
    softmax, a = [0.400, 0.410, 0.390], [0.420, 0.424, 0.407]
    alone, _ = comparisons_of(*seeds("softmax", softmax), *seeds("a", a))
    assert alone["a"].verdict == "above"
    others = [record for i in range(9) for record in seeds(f"x{i}", [0.41, 0.39 + i / 1000, 0.40])]
    among, _ = comparisons_of(*seeds("softmax", softmax), *seeds("a", a), *others)
    assert among["a"].difference == alone["a"].difference and among["a"].verdict == "not told apart"


def test_one_seed_borrows_the_noise_of_others_and_says_so():
    found, words = comparisons_of(
        *seeds("softmax", [0.40, 0.41, 0.39]),
        *seeds("a", [0.42, 0.40, 0.41]),
        make_record("image", "b", test=0.10),
        make_record("image", "c", test=0.41),
    )
    assert [found[name].difference.test for name in "abc"] == ["paired", "pooled", "pooled"]
    assert found["b"].difference.freedom == 4 and found["b"].verdict == "below"
    assert found["b"].adjusted == pytest.approx(2 * found["b"].difference.p)  # of its own kind alone
    assert "‡ Below softmax by more than seed noise, if theirs is that of the rows with several seeds: b" in words


def test_single_seeds_are_never_called_different():
    found, words = comparisons_of(make_record("image", "softmax", test=0.4), make_record("image", "a", test=0.1))
    assert found["a"].verdict == "not testable" and found["a"].difference.p is None
    assert (
        "Seed noise is unknown for 1 of 1" in words and "More than the noise of a finite test set: a (−30.0)" in words
    )


def test_only_rows_of_the_same_data_and_training_are_compared():
    found, words = comparisons_of(
        *seeds("softmax", [0.40, 0.41]), *seeds("a", [0.5, 0.5]), *seeds("b", [0.5, 0.6], steps=700)
    )
    assert set(found) == {"a"} and "are not compared" in words
    assert comparisons_of(*seeds("a", [0.5, 0.5]))[1].startswith("No softmax run of this task")
    other, _ = comparisons_of(*seeds("softmax", [0.40, 0.41]), *seeds("a", [0.5, 0.52]), baseline="a")
    assert set(other) == {"softmax"} and other["softmax"].difference.mean == pytest.approx(-0.105)


def test_a_baseline_that_is_not_there_is_named():
    records = check_records(seeds("oprf-orf", [0.5]))
    assert analyse(records, {}, "softmax").parts  # may always be absent
    with pytest.raises(ValueError, match=r"baseline is 'oprf-orff'; .*: oprf-orf; did you mean 'oprf-orf'\?"):
        analyse(records, {}, "oprf-orff")


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "published_lra_table.csv"
    path.write_text(PUBLISHED)
    return path


def test_the_published_figures_stand_beside_ours_with_what_differs(published):
    (section,) = sections_of(
        *seeds("softmax", [0.41, 0.43], speed=10.0),
        make_record("image", "oprf-orf", test=0.387, speed=20.0),
        make_record("image", "oprf-orf", test=0.5, options={"center": True}),
        make_record("image", "posrf-mm", test=0.2, device="other"),
        make_record("image", "reformer", test=0.2),
    )
    found = beside_published(section, find_published(published))
    assert [row.label for row, _ in found.pairs] == ["softmax", "oprf-orf", "posrf-mm"]
    words = " ".join(beside_words(found))
    for text in ("image (jpeg), not image", "strict protocol", "steps 600, not 50,000", "batch size 32, not 256"):
        assert text in words
    assert found.correlation == pytest.approx(0.5)  # ours: softmax, oprf, posrf; theirs: softmax, posrf, oprf
    texts, _ = beside_cells(found, *found.pairs[1])
    assert texts["published %"] == "33.70 ± 0.57" and texts["difference"] == "+5.00"
    assert texts["time to softmax"] == "0.500×" and texts["published time to softmax"] == "0.500×"
    assert beside_cells(found, *found.pairs[2])[0]["time to softmax"] == "–"  # measured on another device
    assert beside_published(section, {}) is None


def test_names_of_the_published_table():
    variants = ("OPRF-OR", "PosRF-ORF", "OT", "Big Bird", "Nystromformer", "SADERF-FastFoodL", "OPRF-SORF")
    ours = ["oprf-orf", "posrf-orf", "softmax", "bigbird", "nystrom", "saderf-fastfoodl", "oprf-sorf"]
    assert list(map(our_name, variants)) == ours


def test_the_published_table_is_found_by_the_environment_and_may_be_absent(published, monkeypatch):
    monkeypatch.delenv("SPECTRAFORMER_DATA", raising=False)
    assert find_published(None) == {}
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(published.parent))
    assert find_published(None)["image", "oprf-orf"].accuracy == pytest.approx(0.337)
    monkeypatch.setenv("SPECTRAFORMER_DATA", str(published.parent / "elsewhere"))
    assert find_published(None) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "which is no file; expected a table such as published_lra_table.csv"),
        ("", "has the columns of no table; expected variant, task"),
        ("variant,task\n", "has the columns variant, task; expected variant, task, accuracy_percent"),
        (PUBLISHED.replace("33.70", "nan"), "accuracy_percent in .*line 3 is 'nan'; expected a number"),
        (PUBLISHED.replace(",33.70,0.57,2.00,5.25", ""), "accuracy_percent in .*line 3 is None; expected a number"),
        (b"\xff\xfe\x00", "cannot be read as a table"),
    ],
)
def test_a_published_table_that_is_none(tmp_path, content, message):
    path = tmp_path / "table.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        find_published(path)


def test_the_heatmap_holds_the_usual_pairs_and_names_the_others():
    names = ("posrf-orf", "posrf-mm", "poisrf+-orf", "softmax", "my-thing")
    records = [make_record("image", name, test=0.2 + 0.1 * i) for i, name in enumerate(names)]
    records += [make_record("image", "poisrf+-mm", test=0.35), make_record("image", "oprf-sorf", num_features=64)]
    found = heatmap(sections_of(*records)[0])
    assert found.components == ("posrf", "poisrf+") and found.weights == ("orf", "mm")
    drawn = [["posrf-orf", "posrf-mm"], ["poisrf+-orf", "poisrf+-mm"]]
    assert [[row.name for row in line] for line in found.rows] == drawn
    assert found.shade(found.rows[0][0]) == 0 and found.shade(found.rows[1][0]) == 1
    assert found.left_out == ("oprf-sorf (num_features=64)",)
    assert heatmap(sections_of(*records[:2])[0]) is None


def test_the_front_is_what_no_other_beats():
    points = [(1.0, 0.3), (2.0, 0.5), (2.0, 0.4), (3.0, 0.5), (0.5, 0.1), (2.0, 0.5)]
    assert pareto(points) == [True, True, False, False, True, True]


def test_labels_of_a_front_lie_on_no_dot_and_not_on_the_line():
    corners = [(10.0, 20.0), (60.0, 35.0), (90.0, 80.0)]
    line = pareto_steps(corners, 200.0)
    assert line == [
        (10.0, 20.0, 60.0, 20.0), (60.0, 35.0, 90.0, 35.0), (90.0, 80.0, 200.0, 80.0),
        (60.0, 20.0, 60.0, 35.0), (90.0, 35.0, 90.0, 80.0),
    ]  # fmt: skip
    # A steep front with others close below it: names would like to stand on both.
    front = [make_record("image", f"attention-{i:02}", test=0.3 + 0.05 * i, speed=20 / 1.35**i) for i in range(6)]
    below = [
        make_record("image", f"off-{i:02}-{j}", test=0.3 + 0.05 * i + lower, speed=20 / 1.35**i / slower)
        for i in range(6)
        for j, (slower, lower) in enumerate(((1.1, -0.004), (1.1, -0.02)))
    ]
    (section,) = sections_of(*front, *below, make_record("image", "softmax", test=0.52, speed=2.0))
    front = fronts(section)[0]
    figure = Figure(figsize=(5.4, 3.4))
    axes = figure.add_axes((0.105, 0.15, 0.86, 0.8))
    draw_front(axes, front)
    FigureCanvasAgg(figure).draw()
    names = [text for text in axes.texts if text.get_text()]
    assert 1 < len(names) < 7
    boxes = [text.get_window_extent().shrunk(0.95, 0.7) for text in names]
    dots = axes.transData.transform([(cost, 100 * row.test.mean) for row, cost in front.points])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    (drawn,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    path = drawn.get_path().interpolated(200).transformed(axes.transData)
    assert not any(box.contains(*place) for box in boxes for place in path.vertices)


def test_timed_seeds_far_apart_are_named_and_have_no_time():
    together = [make_record("image", "softmax", seed, speed=speed) for seed, speed in enumerate((10.0, 12.4, None))]
    apart = [make_record("image", "oprf-orf", seed, speed=speed) for seed, speed in enumerate((10.0, 25.0, None))]
    found = analyse(check_records([*together, *apart]), {}, "softmax")
    said = [note for note in footnotes(found) if "Timed seeds" in note]
    assert len(said) == 1 and said[0].endswith(": oprf-orf on image (jpeg), 10.0 to 25.0 steps/s.")
    rows = {row.name: row for row in found.sections[0].rows}
    assert rows["oprf-orf"].steps_per_second is rows["oprf-orf"].seconds is rows["oprf-orf"].speed_ratio is None
    assert rows["softmax"].steps_per_second == pytest.approx(11.2)
    assert rows["softmax"].seconds == pytest.approx((60.0 + 600 / 12.4) / 2)
    assert not any("Timed seeds" in note for note in footnotes(analyse(check_records(together), {}, "softmax")))


def test_fronts_compare_one_device_and_one_measure_only():
    (section,) = sections_of(
        make_record("image", "softmax", test=0.4, speed=5.0, memory=4 * 2**30),
        make_record("image", "oprf-orf", test=0.5, speed=10.0),
        make_record("image", "oprf-mm", test=0.3, speed=10.0, num_features=64),
        make_record("image", "posrf-mm", test=0.9, speed=99.0, device="other", memory_kind="cuda"),
    )
    time, memory, state = fronts(section)
    assert {row.name for row, _ in time.points} == {"softmax", "oprf-orf", "oprf-mm"} and time.best == {"oprf-orf"}
    assert time.note == "Without 1 row measured on other devices than CPU, made up, 2 threads."
    assert memory.note == "Without 1 row whose memory was measured in another way."
    assert {row.name: cost for row, cost in state.points} == {"oprf-mm": 2176, "oprf-orf": 4352, "posrf-mm": 4352}
    assert state.level == pytest.approx(0.4)  # softmax, whose state has no size


@pytest.mark.parametrize("name", ["oprf-orf", "trigrf-sgq", "hyprf-fastfoodl", "poisrf+-orf", "softmax", "no-such"])
def test_the_state_is_that_of_the_feature_map(name):
    found = state_numbers(AttentionConfig(name=name, num_features=40), ModelConfig())
    if name in ("softmax", "no-such", "poisrf+-orf"):  # grows; unknown; looks at the whole sequence
        assert found is None
        return
    component, _, weight = name.partition("-")
    state = FeatureMap(32, 40, component, weight, num_heads=2).init_state(1, 2, 32)
    assert found == sum(part.numel() for part in state if part is not None) // 2


def test_unfit_options_have_no_state():
    for options in ({"unknown": 1}, {"statistics": "batch"}, {"component_options": {"no": 1}}):
        assert state_numbers(AttentionConfig(name="oprf-orf", options=options), ModelConfig()) is None


def test_csv_files_are_at_full_precision_and_say_what_intervals_are_of():
    found = analyse(
        check_records([*seeds("softmax", [0.1, 0.2, 0.4]), make_record("image", "a", test=0.3)]), {}, "softmax"
    )
    rows = {line["attention"]: line for line in csv.DictReader(io.StringIO(leaderboard_csv(found.boards)))}
    assert float(rows["softmax"]["accuracy"]) == pytest.approx(0.7 / 3, abs=1e-15)
    assert rows["softmax"]["interval_of"] == "seeds" and rows["a"]["interval_of"] == "test set"
    assert rows["a"]["deviation"] == ""
    (part,) = found.parts
    (line,) = csv.DictReader(io.StringIO(comparisons_csv([(part.section, part.comparisons)])))
    assert line["test"] == "pooled" and float(line["p"]) == part.comparisons[0].difference.p


def test_a_sweep_cut_short_is_reported_without_nan_and_in_any_order_alike(tmp_path, published):
    """Some cells have two seeds, some one, some are missing; some runs shared their device."""
    names = ("softmax", "posrf-orf", "posrf-mm", "oprf-orf", "oprf-mm", "informer")
    records = [r for r in paper_records(range(2), evaluations=3) if r.run.attention.name in names]
    records = [r for r in records if r.run.task in ("listops", "text", "image")]
    records = [r for i, r in enumerate(records) if i not in (3, 8, 10, 11)]
    shared = dict.fromkeys(("steps_per_second", "seconds", "peak_memory_bytes"))
    records = [dataclasses.replace(r, content={**r.content, **shared}) if r.run.train.seed else r for r in records]
    paths = write_report(records, tmp_path / "out", published=published)
    texts = [paths.page, paths.markdown, paths.table, paths.leaderboard, paths.latex, paths.rows, paths.comparisons]
    for path in (*texts, *(p for p in (*paths.curves, *paths.drawings) if p.suffix == ".svg")):
        text = re.sub(r"<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.S)
        words = set(re.findall(r"[A-Za-z]+", text))
        assert not words & {"nan", "NaN", "inf", "None", "undefined"}, path
    assert {path.stem.partition("-")[0] for path in paths.drawings} == {"heatmap", "pareto", "ranks"}
    assert "Left out, for want of one of these tasks" in paths.leaderboard.read_text(encoding="utf-8")
    write_report(records[::-1], tmp_path / "again", published=published)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_the_summary_in_markdown_escapes_names():
    found = analyse(check_records([make_record("image", HOSTILE, 0), make_record("image", "b|c", 0)]), {}, "softmax")
    text = leaderboard_markdown(found, [])
    assert r"b\|c" in text and "<i>" not in text
