"""Measuring attention: nothing wrong is timed, what fails is a row, and the record says all of it."""

import json
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from spectraformer.bench import autotuning
from spectraformer.bench.attention import Suite, failures_of_ours, run_attention_bench
from spectraformer.bench.command import bench, parse_shape
from spectraformer.bench.competitors import COMPETITORS, Built, materialised_features, omega_of, two_softmaxes
from spectraformer.bench.plots import drawings
from spectraformer.bench.references import largest_error, random_feature_reference, softmax_reference
from spectraformer.bench.table import markdown, read_attention_record
from spectraformer.bench.workload import Workload

CPU = torch.device("cpu")
SMALL = {"shapes": ((16, 32),), "batch": 2, "heads": 2, "dtype": "float32"}
QUICK = {"rounds": 3, "seconds": 0.01}
BOTH = ("forward", "forward+backward")


def workload(*, is_causal=False, backward=False, dtype=torch.float32):
    return Workload(16, 32, 2, 2, dtype, CPU, is_causal, backward)


def rows_of(record, **wanted):
    return [row for row in record["rows"] if all(row[name] == value for name, value in wanted.items())]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A record of all that runs here without a compiler, and its file."""
    out = tmp_path_factory.mktemp("bench") / "speed.json"
    names = tuple(name for name in COMPETITORS if name != "torch-compile")
    suite = Suite(**SMALL, lengths=(40, 80), causal=(False, True), competitors=names)
    return run_attention_bench([suite], CPU, **QUICK, out=out, command="test"), out


# -- what is timed is right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mode", BOTH)
def test_what_is_timed_agrees_with_float64(measured, causal, mode):
    timed = rows_of(measured[0], causal=causal, mode=mode, status="timed", tokens=80)
    expected = {"posrf-orf", "oprf-orf", "posrf-orf-torch", "sdpa-flash"}
    if not causal:
        expected |= {"torch"} | ({"performer-pytorch"} if find_spec("performer_pytorch") else set())
    assert {row["competitor"] for row in timed} == expected
    kinds = {"output"} if mode == "forward" else {"output", "query", "key", "value"}
    for row in timed:
        assert row["error"].keys() == kinds
        assert max(row["error"].values()) < 1e-5, row["competitor"]


def _without_key_norm(q, k, v, omega):
    s = q.shape[-1] ** -0.25
    weights = ((q * s) @ omega.mT).exp() @ ((k * s) @ omega.mT).exp().mT
    return weights @ v / weights.sum(-1, keepdim=True)


def _right(q, k, v, omega):
    phi_query, phi_key = materialised_features(q, k, omega)
    weights = phi_query @ phi_key.mT
    return weights @ v / weights.sum(-1, keepdim=True)


def _unnormalised(q, k, v, omega):
    phi_query, phi_key = materialised_features(q, k, omega)
    return phi_query @ (phi_key.mT @ v)


def _last_head_forgotten(q, k, v, omega):
    out = _right(q, k, v, omega)
    return torch.cat((out[:, :-1], torch.zeros_like(out[:, -1:])), 1)


def _last_row_unwritten(q, k, v, omega):
    out = _right(q, k, v, omega)
    return torch.cat((out[:, :, :-1], torch.full_like(out[:, :, -1:], float("nan"))), 2)


def _keys_detached(q, k, v, omega):
    return _right(q, k.detach() + 0 * k, v, omega)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (_without_key_norm, "output"),
        (_unnormalised, "output"),
        (_last_head_forgotten, "output"),
        (_last_row_unwritten, "output inf"),
        (_keys_detached, "key"),
        (_right, None),
    ],
)
def test_nobody_is_timed_while_wrong(monkeypatch, function, says):
    def build(workload, example):
        omega = omega_of(workload)
        return Built(lambda q, k, v: function(q, k, v, omega), random_feature_reference(omega, is_causal=False))

    monkeypatch.setitem(COMPETITORS, "torch", replace(COMPETITORS["torch"], build=build))
    suite = Suite(**SMALL, lengths=(40, 80), modes=BOTH[1:], competitors=("torch", "sdpa-flash"))
    record = run_attention_bench([suite], CPU, **QUICK)
    first, later = rows_of(record, competitor="torch")
    if says is None:
        assert first["status"] == later["status"] == "timed"
        return
    assert (first["status"], later["status"]) == ("failed", "skipped") and "milliseconds" not in first
    assert first["reason"].startswith("wrong: ") and says in first["reason"]
    assert all(row["status"] == "timed" for row in rows_of(record, competitor="sdpa-flash"))
    assert "wrong" in markdown(record) and failures_of_ours(record) == []
    json.dumps(record, allow_nan=False)


def test_attention_that_looks_ahead_is_wrong():
    given = workload(is_causal=True)
    inputs = given.inputs(40, 0)
    reference = softmax_reference(is_causal=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert largest_error(lambda *x: attend(*x), reference, inputs, most_rows=64)["output"] > 0.3
    assert largest_error(lambda *x: attend(*x, is_causal=True), reference, inputs, most_rows=64)["output"] < 1e-5
    # of long sequences some rows are compared, the last among them
    assert largest_error(lambda *x: attend(*x, is_causal=True), reference, inputs, most_rows=16)["output"] < 1e-5
    assert largest_error(lambda *x: attend(*x), reference, inputs, most_rows=16)["output"] > 0.3


def test_the_form_of_flex_attention_is_the_same_attention():
    given = workload()
    omega = omega_of(given)
    reference = random_feature_reference(omega, is_causal=False)
    inputs = given.inputs(128, 0)
    found = largest_error(lambda q, k, v: two_softmaxes(q, k, v, omega), reference, inputs, most_rows=128)
    assert found["output"] < 1e-5


def test_what_triton_searches_is_compiled_at_once(monkeypatch):
    """Two compilations wait for one another; one after the other, they would wait for ever."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.runtime._async_compile import active_mode
    from triton.runtime.autotuner import Autotuner, Config

    both, compiled, launched = threading.Barrier(2, timeout=30), [], []

    class Kernel:
        fn = staticmethod(lambda x: None)

        def warmup(self, x, *, grid, width, **options):
            active_mode.get().submit(width, both.wait, lambda kernel: compiled.append(width))

        def run(self, x, *, grid, warmup, width, **options):
            launched.append(width)

    tuner = Autotuner(Kernel(), ["x"], [Config({"width": 1}), Config({"width": 2})], ["x"], None, None)
    before = Autotuner.run
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *x, config, **options: config.kwargs["width"])
    with autotuning.compiled_at_once():
        tuner.run(3, grid=(1,), warmup=False)
    assert sorted(compiled) == [1, 2] and launched == [1] and Autotuner.run is before


def test_features_for_tokens_first_are_the_same_features():
    given = workload(is_causal=True, backward=True)
    omega = omega_of(given)
    inputs = given.inputs(40, 0, tokens_first=True)
    assert inputs.query.transpose(1, 2).is_contiguous()
    assert torch.equal(inputs.query, given.inputs(40, 0).query)

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        phi_query, phi_key = materialised_features(q, k, omega, token_dim=1)
        weights = torch.einsum("bnhm,bshm->bhns", phi_query, phi_key).tril()
        return (weights / weights.sum(-1, keepdim=True)) @ v.transpose(1, 2)

    found = largest_error(run, random_feature_reference(omega, is_causal=True), inputs, most_rows=64)
    assert max(found.values()) < 1e-5


def test_our_own_mistakes_are_named(monkeypatch):
    build = lambda *_: Built(lambda q, k, v: v, softmax_reference(is_causal=False))  # noqa: E731
    monkeypatch.setitem(COMPETITORS, "posrf-orf", replace(COMPETITORS["posrf-orf"], build=build))
    suite = Suite(**SMALL, lengths=(40,), modes=BOTH[:1], competitors=("posrf-orf",))
    (failure,) = failures_of_ours(run_attention_bench([suite], CPU, **QUICK))
    assert "posrf-orf" in failure and "wrong" in failure


# -- what cannot run is a row ----------------------------------------------------------------------------------------


def patched(monkeypatch, run):
    def build(workload, example):
        return Built(run, softmax_reference(is_causal=False))

    monkeypatch.setitem(COMPETITORS, "sdpa-flash", replace(COMPETITORS["sdpa-flash"], build=build))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("tried to allocate 80 GiB"), RuntimeError("can't allocate memory: 80 GiB")]
)
def test_out_of_memory_is_a_row_and_others_go_on(monkeypatch, error):
    attend = torch.nn.functional.scaled_dot_product_attention

    def run(q, k, v):
        if q.shape[2] > 40:
            raise error
        return attend(q, k, v)

    patched(monkeypatch, run)
    suite = Suite(**SMALL, lengths=(40, 80, 120), modes=BOTH[:1], competitors=("sdpa-flash", "posrf-orf"))
    record = run_attention_bench([suite], CPU, **QUICK)
    found = rows_of(record, competitor="sdpa-flash")
    assert [row["status"] for row in found] == ["timed", "failed", "skipped"]
    assert found[1]["reason"].startswith("out of memory") and "80 GiB" in found[2]["reason"]
    assert [row["status"] for row in rows_of(record, competitor="posrf-orf")] == ["timed"] * 3


def test_what_would_take_too_long_is_left_out(monkeypatch):
    attend = torch.nn.functional.scaled_dot_product_attention

    def run(q, k, v):
        time.sleep(1e-5 * q.shape[2] ** 2)  # 4 ms, then 16 ms, then 0.26 s
        return attend(q, k, v)

    patched(monkeypatch, run)
    suite = Suite(**SMALL, lengths=(20, 40, 160), modes=BOTH[:1], competitors=("sdpa-flash",))
    record = run_attention_bench([suite], CPU, **QUICK, longest=0.1)
    assert [row["status"] for row in record["rows"]] == ["timed", "timed", "skipped"]
    assert "would take about 0.2" in record["rows"][2]["reason"] and "0.1 s" in record["rows"][2]["reason"]
    straight = run_attention_bench([replace(suite, lengths=(160,))], CPU, **QUICK, longest=0.1)
    assert straight["rows"][0]["status"] == "failed" and "the limit is 0.1 s" in straight["rows"][0]["reason"]


def test_a_budget_ends_the_measuring_and_says_so():
    suite = Suite(**SMALL, lengths=(40,), competitors=("posrf-orf",))
    record = run_attention_bench([suite], CPU, **QUICK, budget=1e-6)
    assert [row["status"] for row in record["rows"]] == ["skipped", "skipped"]
    assert "1e-06 s for all were over" in record["rows"][0]["reason"]


def test_reasons_to_refuse_are_given(measured):
    reasons = {row["competitor"]: row["reason"] for row in rows_of(measured[0], causal=False, status="skipped")}
    assert {"flex-attention", "fla", "sdpa-cudnn"} <= reasons.keys()
    assert reasons["fla"] == "it is causal only" and "GPU" in reasons["sdpa-cudnn"]
    assert "no causal form" in rows_of(measured[0], causal=True, competitor="torch")[0]["reason"]


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_record_is_on_disk_and_complete(measured):
    record, out = measured
    assert read_attention_record(out) == json.loads(json.dumps(record))
    for name in ("command", "device", "finished", "git_commit", "started", "versions"):
        assert name in record
    assert record["finished"] and record["versions"]["torch"] == torch.__version__
    assert len(record["rows"]) == 2 * 2 * 2 * 9  # kinds, modes, lengths, competitors
    row = rows_of(record, competitor="posrf-orf", status="timed")[0]
    assert row["backend"] in ("cpu", "torch") and row["bursts"] >= 3 and row["calls"] >= 1
    assert 0 < row["milliseconds"]["least"] <= row["milliseconds"]["median"] <= row["milliseconds"]["most"]
    assert row["picoseconds"] == pytest.approx(1e9 * row["milliseconds"]["median"] / (4 * 40), rel=1e-3)


def test_the_record_is_written_after_each_length(tmp_path):
    def stop(text):
        assert "40 tokens" in text
        raise KeyboardInterrupt

    suite = Suite(**SMALL, lengths=(40, 80), modes=BOTH[:1], competitors=("posrf-orf",))
    with pytest.raises(KeyboardInterrupt):
        run_attention_bench([suite], CPU, **QUICK, out=tmp_path / "speed.json", say=stop)
    found = read_attention_record(tmp_path / "speed.json")
    assert [row["tokens"] for row in found["rows"]] == [40] and found["finished"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x | {"kind": "recipe"}, "not the record"),
        (lambda x: x | {"format": 99}, "format 99"),
        (lambda x: x | {"rows": [{"tokens": 3}]}, "changed or cut"),
        (lambda x: x | {"rows": [row | {"status": "timed"} for row in x["rows"]]}, "changed or cut"),
        (lambda x: [x], "not the record"),
    ],
)
def test_another_file_is_refused(measured, tmp_path, change, says):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(change(json.loads(measured[1].read_text()))))
    with pytest.raises(ValueError, match=says):
        read_attention_record(path)


def test_each_kind_has_a_drawing(measured):
    record = measured[0]
    made = drawings(record)
    assert [drawing.name for drawing in made] == ["d16-m32", "d16-m32-causal"]
    assert "Peak memory" not in made[0].svg.decode()  # not counted on a CPU
    assert drawings(record | {"rows": rows_of(record, status="skipped")}) == []


def test_one_length_is_measured_and_not_drawn(tmp_path, capsys):
    options = {"shapes": ("16x32",), "batch": 1, "heads": 1, "device": "cpu", "modes": BOTH[:1]}
    bench("attention", **options, **QUICK, lengths=(40,), competitors=("posrf-orf",), out=tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and "nothing to draw" in capsys.readouterr().out


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_measures_draws_and_draws_again(tmp_path, capsys):
    out = tmp_path / "new" / "speed.json"
    options = {"shapes": ("16x32",), "batch": 1, "heads": 2, "device": "cpu", "rounds": 3, "seconds": 0.01}
    bench("attention", **options, lengths=(40, 80), competitors=("posrf-orf", "sdpa-flash"), out=out)
    drawn = sorted(path.name for path in out.parent.iterdir())
    assert drawn == ["speed-d16-m32.png", "speed-d16-m32.svg", "speed.json"]
    assert "| posrf-orf |" in capsys.readouterr().out
    (out.parent / "speed-d16-m32.png").unlink()
    before = out.read_bytes()
    bench("attention", plot=out)
    assert (out.parent / "speed-d16-m32.png").stat().st_size > 20_000 and out.read_bytes() == before


@pytest.mark.parametrize(
    ("action", "options", "says"),
    [
        ("attention", {"shapes": ("64by128",)}, "shape is '64by128'; expected .* 64x128"),
        ("attention", {"shapes": ("0x128",)}, "head dim is 0"),
        ("attention", {"kind": "casual"}, "kind is 'casual'.*nearest: 'causal'"),
        ("attention", {"competitors": ("sdpa-cuddn",)}, "nearest: 'sdpa-cudnn'"),
        ("attention", {"lengths": (0,)}, "length is 0"),
        ("attention", {"modes": ("backward",)}, "mode is 'backward'"),
        ("attention", {"dtype": "float8"}, "dtype is 'float8'"),
        ("attention", {"device": "tpu"}, "device is 'tpu'"),
        ("attention", {"rounds": 0}, "rounds is 0"),
        ("attention", {"longest": -1.0}, "longest is -1.0"),
        ("attention", {"plot": Path("missing.json")}, "missing.json cannot be read"),
        ("tune", {"plot": Path("missing.json")}, "--plot draws figures of `bench attention`"),
        ("tune", {"device": "cpu", "passes": ("kyes",)}, "pass is 'kyes'.*nearest: 'keys'"),
        ("tune", {"lengths": (64, 128)}, "expected one"),
        ("tune", {"device": "cpu", "lengths": (64,), "batch": 1, "heads": 1}, "kernels cannot run here"),
    ],
)
def test_mistakes_are_refused_in_words(action, options, says):
    with pytest.raises(ValueError, match=says):
        bench(action, **options)


def test_shapes_are_read():
    assert parse_shape("64x128") == (64, 128)
    for text in ("64", "x", "64x", "64x128x2", "-1x2", "²x3"):
        with pytest.raises(ValueError, match="expected head dim and features"):
            parse_shape(text)
