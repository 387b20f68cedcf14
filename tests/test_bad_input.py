"""Wrong configurations, data and arguments: a clear error, an exit status, no traceback, and nothing written half."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from faults import TRAIN, assert_refused, counting_task, status_of
from spectraformer import registry
from spectraformer.cli import main
from spectraformer.tasks import TASKS


@pytest.fixture(autouse=True)
def _a_small_task(monkeypatch, tmp_path):
    monkeypatch.setitem(TASKS.own, "counting", counting_task())
    monkeypatch.delenv("SPECTRAFORMER_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def setting(*values):
    return (*TRAIN, "--set", *values)


NAMES = {
    "task": (("train", "--task", "countin"), ["unknown task 'countin'", "expected one of listops", "'counting'?"]),
    "attention": ((*TRAIN, "--attention", "softmx"), ["unknown attention 'softmx'", "did you mean 'softmax'?"]),
    "component": ((*TRAIN, "--attention", "oprff-orf"), ["component function 'oprff'", "did you mean 'oprf'?"]),
    "weight": ((*TRAIN, "--attention", "oprf-orff"), ["weight matrix 'orff'", "did you mean 'orf'?"]),
    "second of two": ((*TRAIN, "--attention", "softmax", "oprf-orff"), ["weight matrix 'orff'", "mean 'orf'?"]),
    "empty attention": ((*TRAIN, "--attention", ""), ["attention.name is ''", "expected a name such as 'oprf-orf'"]),
    "half a variant": ((*TRAIN, "--attention", "oprf-"), ["'oprf-'; expected 'component-weight'"]),
    "attention by --set": (setting("attention.name=softmx"), ["unknown attention 'softmx'", "'softmax'?"]),
    "refused pair": ((*TRAIN, "--attention", "poisrf-gq"), ["exactly N(0, I)", "the estimate would be of no kernel"]),
    "size": (("train", "--task", "counting", "--size", "tinny"), ["size is 'tinny'", "full, tiny", "nearest: 'tiny'"]),
    "protocol": ((*TRAIN, "--protocol", "strikt"), ["protocol is 'strikt'", "strict, published", "nearest: 'strict'"]),
    "precision": (setting("train.precision=bfloat"), ["train.precision is 'bfloat'", "nearest: 'bfloat16'"]),
    "device": ((*TRAIN[:5], "--device", "gpu"), ["device is 'gpu'", "expected auto, cpu, cuda or cuda:N"]),
    "absent device": ((*TRAIN[:5], "--device", "cuda:99"), ["device is 'cuda:99', but this machine has", "nearest: "]),
    "split": (("eval", ".", "--split", "tset"), ["split is 'tset'", "dev, test", "nearest: 'test'"]),
    "command": (("trian", "--task", "counting"), ["Unrecognized options", "train"]),
    "no command": ((), ["Expected one of {data, train, sweep, eval, report, list, check, bench}"]),
    "action": (("data", "prep", "counting"), ["invalid choice 'prep'", "'prepare', 'show'"]),
    "option": ((*TRAIN, "--step", "3"), ["--step", "--steps"]),
    "list": (("list", "run"), ["invalid choice 'run'", "'runs'"]),
    "data task": (("data", "prepare", "countin"), ["unknown task 'countin'", "did you mean 'counting'?"]),
    "data size": (("data", "prepare", "counting", "--size", "Tiny"), ["size is 'Tiny'", "nearest: 'tiny'"]),
    "shown size": (("data", "show", "counting", "--size", "Tiny"), ["size is 'Tiny'", "nearest: 'tiny'"]),
}
NUMBERS = {
    "steps 0": ((*TRAIN, "--steps", "0"), ["steps is 0; expected an integer of at least 1"]),
    "steps -1": ((*TRAIN, "--steps", "-1"), ["steps is -1; expected an integer of at least 1"]),
    "steps 1.5": ((*TRAIN, "--steps", "1.5"), ["--steps", "INT", "1.5"]),
    "steps abc": ((*TRAIN, "--steps", "abc"), ["--steps", "INT", "abc"]),
    "batch size 0": ((*TRAIN, "--batch-size", "0"), ["train.batch_size is 0; expected an integer of at least 1"]),
    "learning rate 0": ((*TRAIN, "--learning-rate", "0"), ["train.learning_rate is 0.0; expected a positive finite"]),
    "learning rate -1": ((*TRAIN, "--learning-rate", "-1"), ["train.learning_rate is -1.0; expected a positive"]),
    "learning rate nan": ((*TRAIN, "--learning-rate", "nan"), ["train.learning_rate is nan; expected a positive"]),
    "learning rate inf": ((*TRAIN, "--learning-rate", "inf"), ["train.learning_rate is inf; expected a positive"]),
    "num features 0": ((*TRAIN, "--num-features", "0"), ["attention.num_features is 0; expected an integer"]),
    "seed -1": ((*TRAIN, "--seed", "-1"), ["train.seed is -1; expected an integer of at least 0"]),
    "warmup": (setting("train.warmup=24"), ["train.warmup is 24; expected fewer than train.steps=24"]),
    "accumulate": (setting("train.accumulate=3"), ["batch_size is 16; expected a multiple of train.accumulate=3"]),
    "select after": (setting("train.select_after=1"), ["train.select_after is 1.0; expected a fraction in [0, 1)"]),
    "clip": (setting("train.clip=0"), ["train.clip is 0.0; expected a positive finite number"]),
    "decay": (setting("train.weight_decay=-1"), ["train.weight_decay is -1.0; expected a finite number, 0 or more"]),
    "width": (setting("model.width=33"), ["model.width is 33; expected a multiple of model.num_heads=2"]),
    "no heads": (setting("model.num_heads=0"), ["model.num_heads is 0; expected an integer of at least 1"]),
    "huge width": (setting(f"model.width={10**14}"), ["model.width=100000000000000", "cannot be made"]),
    "dropout 1.5": (setting("model.dropout=1.5"), ["dropout is 1.5; expected a probability in [0, 1)"]),
    "dropout -0.1": (setting("model.dropout=-0.1"), ["dropout is -0.1; expected a probability in [0, 1)"]),
    "dropout nan": (setting("model.dropout=NaN"), ["dropout is nan; expected a probability in [0, 1)"]),
    "data seed": (("data", "prepare", "counting", "--seed", "-1"), ["seed is -1; expected an integer of at least 0"]),
    "workers 0": (("data", "prepare", "counting", "--workers", "0"), ["workers is 0; expected an integer of at least"]),
}
SETTINGS = {
    "unknown": (setting("train.step=3"), ["unknown setting 'train.step'", "did you mean 'train.steps'?"]),
    "unknown part": (setting("modle.depth=3"), ["unknown setting 'modle.depth'", "did you mean 'model'?"]),
    "nothing inside": (setting("train.steps.more=3"), ["'train.steps' has no settings inside"]),
    "no equals sign": (setting("model.depth"), ["setting 'model.depth'; expected NAME=VALUE"]),
    "no name": (setting("=3"), ["setting '=3'; expected NAME=VALUE"]),
    "whole object": (setting("model=3"), ["model is 3; expected one of its fields", "model.depth, model.width"]),
    "unknown in object": (setting('model={"dpth": 1}'), ["unknown setting 'model.dpth'", "mean 'model.depth'?"]),
    "all options": (setting("attention.options=3"), ["expected one of its fields", "attention.options.NAME"]),
    "word for number": (setting("model.depth=two"), ["model.depth is 'two'; expected an integer"]),
    "truth for number": (setting("model.depth=true"), ["model.depth is True; expected an integer"]),
    "text for number": (setting('model.depth="3"'), ["model.depth is '3'; expected an integer"]),
    "half a step": (setting("train.steps=1.5"), ["train.steps is 1.5; expected an integer"]),
    "list for number": (setting("train.clip=[1]"), ["train.clip is [1]; expected a number"]),
    "number for text": (setting("train.precision=16"), ["train.precision is 16; expected text"]),
    "other task": (setting("task=countin"), ["unknown task 'countin'", "did you mean 'counting'?"]),
    "unknown option": (setting("attention.options.centre=true"), ["'oprf-orf' has no option 'centre'", "center"]),
    "softmax option": (
        (*TRAIN, "--attention", "softmax", "--set", "attention.options.center=true"),
        ["attention 'softmax' has no option 'center'; its options: dropout"],
    ),
    "option's type": (setting("attention.options.center=3"), ["center is 3; expected True or False"]),
    "option's value": (setting("attention.options.redraw_every=0"), ["redraw_every is 0; expected an integer"]),
}
CONFIG = ("train", "--config", "run.json")
FILES = {
    "missing": (None, ["run.json cannot be read: No such file"]),
    "empty": ("", ["run.json is not JSON"]),
    "not JSON": ("task: listops", ["run.json is not JSON"]),
    "truncated": ('{"task": "counting", "size"', ["run.json is not JSON"]),
    "not text": (b"\xff\xfe\x00\x80\x81", ["run.json is not JSON"]),
    "nested": ("[" * 200_000, ["run.json is not JSON"]),
    "NaN": ('{"task": "counting", "train": {"clip": NaN}}', ["run.json", "train.clip is nan", "positive finite"]),
    "list": ("[]", ["run.json: Run is []; expected an object with the fields of Run"]),
    "number": ("3", ["run.json: Run is 3; expected an object"]),
    "no task": ('{"size": "tiny"}', ["run.json: Run has no task"]),
    "unknown key": ('{"task": "counting", "sise": 3}', ["unknown setting 'sise'", "did you mean 'size'?"]),
    "unknown inside": ('{"task": "counting", "train": {"step": 3}}', ["'train.step'", "mean 'train.steps'?"]),
    "wrong type": ('{"task": "counting", "train": {"steps": "3"}}', ["train.steps is '3'; expected an integer"]),
    "no object": (
        '{"task": "counting", "model": 3}',
        ["model. is 3; expected an object with the fields of ModelConfig"],
    ),
    "task is a list": ('{"task": ["counting"]}', ["task is ['counting']; expected text"]),
    "wrong task": ('{"task": "countin"}', ["unknown task 'countin'", "did you mean 'counting'?"]),
    "wrong size": ('{"task": "counting", "size": "tinny"}', ["size is 'tinny'", "nearest: 'tiny'"]),
    "options": (
        '{"task": "counting", "attention": {"options": [1]}}',
        ["attention.options is [1]; expected a mapping from option names to values"],
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case, capsys, tmp_path):
    assert_refused(*NAMES[case], capsys, tmp_path)


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers(case, capsys, tmp_path):
    assert_refused(*NUMBERS[case], capsys, tmp_path)


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case, capsys, tmp_path):
    assert_refused(*SETTINGS[case], capsys, tmp_path)


@pytest.mark.parametrize("case", FILES)
def test_configuration_files(case, capsys, tmp_path):
    content, expected = FILES[case]
    if content is not None:
        (tmp_path / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(CONFIG, expected, capsys, tmp_path)


def test_configuration_and_task(capsys, tmp_path):
    (tmp_path / "run.json").write_text('{"task": "counting"}')
    assert_refused((*CONFIG, "--task", "counting"), ["expected either --task", "or --config"], capsys, tmp_path)
    assert_refused(("train",), ["expected either --task, such as --task listops, or --config"], capsys, tmp_path)
    assert_refused(
        (*CONFIG, "--steps", "3"), ["--config has a size, a protocol and steps of its own"], capsys, tmp_path
    )


def test_so_many_cases():
    assert len(NAMES) + len(NUMBERS) + len(SETTINGS) + len(FILES) >= 80


@pytest.fixture
def data(capsys, tmp_path):
    assert main(["data", "prepare", "counting", "--size", "tiny"]) == 0
    return tmp_path / "data" / "counting-tiny"


# -- runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(data, capsys, tmp_path):
    assert main([*TRAIN, "--attention", "softmax"]) == 0
    (path,) = (tmp_path / "runs").iterdir()
    return path


def test_reports(run, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("in the way")
    assert_refused(("report", "empty"), ["no finished run in empty"], capsys, tmp_path)
    assert_refused(("report", "nowhere"), ["nowhere does not exist; expected a directory of runs"], capsys, tmp_path)
    assert_refused(("report",), ["no folder of runs is given"], capsys, tmp_path)
    expected = ["out is 'taken', where a file is in the way; expected a folder"]
    assert_refused(("report", "runs", "--out", "taken"), expected, capsys, tmp_path)
    (run / "result.json").write_text("{")
    expected = ["left out: ", "result.json is not JSON", "no finished run in runs"]
    assert_refused(("report", "runs"), expected, capsys, tmp_path)


def test_evaluations(run, data, capsys, tmp_path):
    assert_refused(("eval", "nowhere"), ["nowhere does not exist"], capsys, tmp_path)
    assert_refused(("eval",), ["no folder of runs is given"], capsys, tmp_path)
    expected = ["elsewhere/counting-tiny does not exist", "data prepare counting --size tiny` makes it"]
    assert_refused(("eval", "runs", "--data", "elsewhere"), expected, capsys, tmp_path)
    main(["data", "prepare", "counting", "--size", "tiny", "--seed", "1", "--data", "others"])
    assert_refused(("eval", "runs", "--data", "others"), ["was trained on other data than counting"], capsys, tmp_path)
    (run / "model.safetensors").write_bytes(b"")
    assert_refused(("eval", "runs"), ["model.safetensors is not what the run tested"], capsys, tmp_path)
    (run / "result.json").unlink()
    assert_refused(("eval", "runs"), ["no finished run in runs"], capsys, tmp_path)


def test_lists_and_checks(run, capsys, tmp_path):
    assert_refused(("list", "runs", "--runs", "none"), ["none is not a folder of runs"], capsys, tmp_path)
    for name, text in {
        "nothing": "neither a folder nor a variant such as 'oprf-orf'",
        "softmx": "did you mean 'softmax'?",
        "oprf-orff": "did you mean 'orf'?",
        "poisrf-gq": "the estimate would be of no kernel",
        "": "neither",
    }.items():
        printed = assert_refused(("check", name), ["1 of 1 checks failed"], capsys, tmp_path)
        assert f"FAILED  {name}: " in printed.out and text in printed.out
    (tmp_path / "empty").mkdir()
    printed = assert_refused(("check", "empty", "runs"), ["1 of 2 checks failed"], capsys, tmp_path)
    assert "neither prepared data, nor a run, nor a folder of them" in printed.out and "ok      runs" in printed.out


# -- packages that add their own -----------------------------------------------------------------------------


def test_entry_points_that_cannot_be_loaded(monkeypatch, capsys, tmp_path):
    broken = EntryPoint("lottery", "no_such_package:TASK", "spectraformer.tasks")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken] if group == broken.group else [])
    assert status_of(("train", "--task", "lottery")) in (1, 2)
    printed = capsys.readouterr()
    assert "no_such_package" in printed.err and "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["attentions", "tasks"])
def test_lists_leave_out_what_cannot_be_loaded_and_say_why(kind, monkeypatch, capsys):
    groups = {"attentions": "spectraformer.weights", "tasks": "spectraformer.tasks"}
    broken = EntryPoint("lottery", "no_such_package:THING", groups[kind])
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken] if group == broken.group else [])
    assert status_of(("list", kind)) == 0
    printed = capsys.readouterr().out
    assert "lottery' cannot be loaded from no_such_package:THING: ModuleNotFoundError" in printed
    assert "listops" in printed or "orf" in printed


# -- the installed program -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["train", "--task", "listop"], 2, "did you mean 'listops'?"),
        (["data", "show", "listops"], 2, "data/listops does not exist"),
        (["report", "nowhere"], 2, "nowhere does not exist"),
    ],
)
def test_the_program_itself(arguments, status, expected, tmp_path):
    program = [sys.executable, "-c", "from spectraformer.command import main; main()", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == status and done.stdout == ""
    assert done.stderr.startswith("error: ") and expected in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_task_of_these_tests_trains(run):
    """Else everything above would be refused for another reason."""
    assert (run / "result.json").exists() and run.name.startswith("counting-tiny.softmax")
