"""Training: what a step does, what is evaluated and selected, what stops it; a saved model is the tested one."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from small_runs import prepared, small_run
from spectraformer import config, records
from spectraformer.checkpoint import load_tensors
from spectraformer.evaluation import Evaluator, evaluate, load_model, make_model, resolve_device
from spectraformer.files import only_process
from spectraformer.interruption import Interrupted
from spectraformer.nonfinite import NonFiniteError
from spectraformer.step import learning_rate
from spectraformer.tasks.dataset import BatchOrder, Loader
from spectraformer.train import Trainer, train
from spectraformer.watch import Silent

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "counting")


def trainer_of(run, dataset, path):
    path.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(run, dataset, CPU, path, "key", Silent())
    trainer.resume()
    return trainer


def test_a_run_learns_and_is_recorded(dataset, tmp_path):
    run = small_run(steps=120, eval_every=20, warmup=20)
    record = train(run, dataset, tmp_path, device="cpu")
    content = record.content
    assert content["accuracy"]["test"] > content["data"]["majority"]["test"] + 0.15
    assert content["data"]["counts"] == {"train": 120, "dev": 50, "test": 30}
    assert [row["step"] for row in content["history"]] == [20, 40, 60, 80, 100, 120]
    assert content["history"][-1]["train_loss"] < content["history"][0]["train_loss"] - 0.1
    assert content["parameters"] == sum(x.numel() for x in make_model(run, dataset).parameters())
    assert content["run"]["train"]["precision"] == "float32" and content["sessions"] == 1
    assert content["steps_per_second"] > 0 and content["peak_memory_bytes"] > 1 << 20
    assert record.path.name == f"counting-tiny.posrf-orf.seed0.{content['key']}"
    best = max(row["dev_accuracy"] for row in content["history"] if row["step"] >= 24)
    chosen = next(row for row in content["history"] if row["step"] >= 24 and row["dev_accuracy"] == best)
    assert (content["best_step"], content["accuracy"]["dev"]) == (chosen["step"], best)


def test_a_finished_run_is_not_repeated(dataset, tmp_path):
    first = train(small_run(), dataset, tmp_path, device="cpu")
    before = (first.path / records.RESULT).stat().st_mtime_ns
    again = train(small_run(), dataset, tmp_path, device="cpu")
    assert again.content == first.content and (first.path / records.RESULT).stat().st_mtime_ns == before


def test_the_key_is_of_configuration_and_data(dataset):
    run = small_run()
    keys = {
        records.run_key(run, "a"),
        records.run_key(run, "b"),
        records.run_key(replace(run, train=replace(run.train, seed=1)), "a"),
        records.run_key(replace(run, attention=replace(run.attention, options={"center": True})), "a"),
    }
    assert len(keys) == 4
    same = config.from_json(config.Run, json.loads(json.dumps(config.to_json(run))))
    assert same == run and records.run_key(same, "a") in keys


def test_one_step_is_adamw_with_clipped_gradients(dataset, tmp_path):
    """Against the same written out: forward, cross-entropy, clipping by value, AdamW, one-cycle."""
    run = small_run(model={"dropout": 0.0}, clip=0.01, weight_decay=0.1)
    trainer = trainer_of(run, dataset, tmp_path)
    oracle = make_model(run, dataset)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=24, pct_start=(4 + 1) / 24, anneal_strategy="linear", cycle_momentum=False
    )
    order = BatchOrder(120, 16, 0)
    for step in range(3):
        rows, labels = dataset.splits["train"]
        (examples,) = order(step)
        chosen = rows[examples][:, 0]
        tokens = torch.from_numpy(np.asarray(dataset.tokens[chosen]))[:, None]
        lengths = torch.from_numpy(dataset.lengths[chosen])[:, None]
        loss = functional.cross_entropy(oracle(tokens, lengths), torch.from_numpy(labels[examples].astype(np.int64)))
        optimizer.zero_grad()
        loss.backward()
        for parameter in oracle.parameters():
            parameter.grad.clamp_(-0.01, 0.01)
        assert schedule.get_last_lr()[0] == pytest.approx(learning_rate(run.train, step), rel=1e-6)
        optimizer.step()
        schedule.step()
        trainer.train_step()
    for ours, theirs in zip(trainer.model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_learning_rate_is_torchs_one_cycle():
    run = small_run(steps=200, warmup=30).train
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch's peak is at step pct_start * total - 1.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, run.learning_rate, total_steps=200, pct_start=31 / 200, anneal_strategy="linear"
    )
    for step in range(200):
        assert learning_rate(run, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-6, abs=1e-12), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("attention", ["posrf-orf", "softmax"])
def test_accumulated_gradients_are_those_of_the_batch(dataset, tmp_path, attention):
    ends = []
    for parts in (1, 4):
        run = small_run(attention, accumulate=parts, model={"dropout": 0.0})
        trainer = trainer_of(run, dataset, tmp_path / f"{parts}")
        for _ in range(4):
            trainer.train_step()
        ends.append(trainer.model.state_dict())
    for name, whole in ends[0].items():
        torch.testing.assert_close(ends[1][name], whole, rtol=2e-4, atol=2e-5, msg=name)


def test_batches_are_permutations_of_epochs():
    order = BatchOrder(50, 16, seed=3)
    drawn = np.concatenate([order(step)[0] for step in range(25)])  # eight epochs
    assert (BatchOrder(50, 16, seed=3)(0, 25).ravel() == drawn).all(), "steps asked for together differ"
    for epoch in range(8):
        assert sorted(drawn[50 * epoch : 50 * epoch + 50]) == list(range(50))
    assert not (drawn[:50] == drawn[50:100]).all()
    fresh = BatchOrder(50, 16, seed=3)
    assert (fresh(17) == order(17)).all(), "the order depends on what was asked before"
    assert not (BatchOrder(50, 16, seed=4)(17) == order(17)).all()


def test_every_example_is_evaluated_once(dataset):
    """The last part batch counts, and so does every document once."""
    loader = Loader(dataset, "dev", CPU)
    evaluator = Evaluator(make_model(small_run(), dataset), loader, 16, "float32")
    assert evaluator.counts.sum(1).tolist() == [16, 16, 16, 2]
    assert sorted(evaluator.examples[evaluator.counts].tolist()) == list(range(50))
    model = make_model(small_run("softmax"), dataset).eval()
    # Classified right, so that examples that fill up a batch would show.
    with torch.no_grad():
        model.classifier[2].bias[loader.labels[loader.by_length[-1]]] += 9.0
    one, many = (evaluate(model, loader, size, "float32") for size in (1, 16))
    assert one.accuracy == many.accuracy and one.loss == pytest.approx(many.loss, rel=1e-5)
    with torch.no_grad():
        rows, labels = dataset.splits["dev"]
        logits = model(torch.from_numpy(np.asarray(dataset.tokens[rows])), torch.from_numpy(dataset.lengths[rows]))
    assert one.accuracy == pytest.approx((logits.argmax(-1).numpy() == labels).mean())


@pytest.mark.parametrize("protocol", ["strict", "published"])
@pytest.mark.parametrize("attention", ["softmax", "oprf-orf", "trigrf-mc"])
def test_padding_changes_nothing(dataset, attention, protocol):
    run = small_run(attention, protocol=protocol)
    model = make_model(run, dataset).eval()
    tokens = torch.randint(1, 8, (3, 1, 12), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[12], [5], [9]])
    with torch.no_grad():
        short = model(tokens, lengths)
        garbage = torch.randint(1, 8, (3, 1, 24), generator=torch.Generator().manual_seed(1))
        garbage[..., :12] = tokens
        long = model(garbage, lengths)
        alone = model(tokens[1:2, :, :5], lengths[1:2])
    torch.testing.assert_close(long, short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, short[1:2], rtol=1e-4, atol=1e-5)


def test_published_pooling_divides_by_the_padded_length(dataset):
    masked, padded = (make_model(small_run(protocol=protocol), dataset).eval() for protocol in ("strict", "published"))
    tokens, lengths = torch.randint(1, 8, (2, 6)), torch.tensor([6, 3])
    with torch.no_grad():
        expected = masked.encoder(tokens, lengths) * lengths[:, None] / 24
        torch.testing.assert_close(padded.encoder(tokens, lengths), expected)


@pytest.mark.parametrize("protocol", ["strict", "published"])
def test_the_norm_is_of_every_real_token(dataset, protocol):
    """Its weight and bias, which are applied after the sum, act as if on each token before."""
    encoder = make_model(small_run(protocol=protocol), dataset).eval().encoder
    tokens, lengths = torch.randint(1, 8, (2, 6)), torch.tensor([6, 3])
    with torch.no_grad():
        plain = encoder(tokens, lengths)
        encoder.norm.weight.uniform_(0.5, 2)
        encoder.norm.bias.uniform_(-1, 1)
        share = 1.0 if protocol == "strict" else lengths[:, None] / 24
        torch.testing.assert_close(encoder(tokens, lengths), plain * encoder.norm.weight + share * encoder.norm.bias)


def test_a_saved_model_has_bitwise_the_same_logits(dataset, tmp_path):
    for attention, options in (
        ("oprf-fastfoodl", {}),
        ("gerf-mc", {"redraw_every": 3}),
        ("trigrf-orf", {}),
        ("softmax", {}),
    ):
        run = small_run(attention, options)
        trainer = trainer_of(run, dataset, tmp_path / attention)
        trainer.fit()
        tokens, lengths = torch.randint(1, 8, (5, 1, 24)), torch.tensor([[24], [3], [8], [17], [1]])
        record = train(run, dataset, tmp_path / "runs", device="cpu")
        trainer.model.load_state_dict(trainer.best)
        with torch.no_grad():
            expected = trainer.model.eval()(tokens, lengths)
            assert torch.equal(load_model(record, dataset)(tokens, lengths), expected), attention
        loader = Loader(dataset, "test", CPU)
        again = evaluate(load_model(record, dataset), loader, 32, "float32")
        assert again.accuracy == record.content["accuracy"]["test"] and again.loss == record.content["loss"]["test"]


def test_the_same_run_twice_is_bitwise_the_same(dataset, tmp_path):
    run = small_run("oprf-fastfoodl")
    first, second = (train(run, dataset, tmp_path / name, device="cpu") for name in "ab")
    weights = [load_tensors(record.path / records.MODEL) for record in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [[row["train_loss"] for row in record.content["history"]] for record in (first, second)]
    assert losses[0] == losses[1]


def test_another_seed_is_another_run(dataset, tmp_path):
    first, second = (train(small_run(seed=seed), dataset, tmp_path, device="cpu") for seed in (0, 1))
    assert first.path != second.path
    assert first.content["history"][-1]["train_loss"] != second.content["history"][-1]["train_loss"]


def test_training_leaves_global_state_alone(dataset, tmp_path):
    torch.use_deterministic_algorithms(False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(small_run(), dataset, tmp_path, device="cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


class Saboteur(Silent):
    """Does something after a step."""

    def __init__(self, at, act):
        self.at, self.act = at, act
        self.notes = []

    def stepped(self, step, loss):
        if step == self.at:
            self.act()

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_rest_is_the_same(dataset, tmp_path, number):
    run = small_run("gerf-mc", {"redraw_every": 3})
    whole = train(run, dataset, tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted) as stop:
        train(
            run, dataset, tmp_path / "stopped", device="cpu", watcher=Saboteur(8, lambda: signal.raise_signal(number))
        )
    assert stop.value.exit_status == 128 + number
    (directory,) = (tmp_path / "stopped").iterdir()
    assert not (directory / records.RESULT).exists()
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]
    record = train(run, dataset, tmp_path / "stopped", device="cpu")
    assert record.content["sessions"] == 2
    for name in ("accuracy", "loss", "best_step"):
        assert record.content[name] == whole.content[name]
    ours, theirs = (load_tensors(x.path / records.MODEL) for x in (record, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Poisoned(torch.nn.Module):
    """Spoils what passes through it, forward or backward, from one step on."""

    def __init__(self, inner, value, backward, after):
        super().__init__()
        self.inner, self.value, self.backward_only, self.after, self.calls = inner, value, backward, after, 0

    def forward(self, x):
        out = self.inner(x)
        self.calls += self.training
        if self.calls <= self.after:
            return out
        if not self.backward_only:
            return out + self.value
        out.register_hook(lambda gradient: gradient + self.value)
        return out


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backward", [False, True])
def test_nan_and_infinity_stop_before_the_step(dataset, tmp_path, value, backward):
    run = small_run()
    trainer = trainer_of(run, dataset, tmp_path)
    layer = trainer.model.encoder.layers[1]
    layer.feed_forward[0] = Poisoned(layer.feed_forward[0], value, backward, after=5)
    before = {}

    class Keep(Silent):
        def stepped(self, step, loss):
            before.update({name: x.clone() for name, x in trainer.model.state_dict().items()})

    trainer.watcher = Keep()
    with pytest.raises(NonFiniteError) as error:
        trainer.fit()
    text = str(error.value)
    assert "step 6" in text and f"learning rate {learning_rate(run.train, 5):.3g}" in text
    assert "encoder.layers.1.feed_forward.0" in text or ("encoder.layers.1.feed_forward_norm" in text and backward)
    assert ("the gradient is not finite" if backward else "the loss is not finite") in text
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_nan_weights_are_named(dataset, tmp_path):
    trainer = trainer_of(small_run(), dataset, tmp_path)
    with torch.no_grad():
        trainer.model.encoder.layers[0].attention.out.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"parameter encoder.layers.0.attention.out.weight holds 1 NaN"):
        trainer.train_step()


def test_large_finite_gradients_are_clipped_not_refused(dataset, tmp_path):
    trainer = trainer_of(small_run(), dataset, tmp_path)
    layer = trainer.model.encoder.layers[1]
    layer.feed_forward[0] = Poisoned(layer.feed_forward[0], 1e30, backward=True, after=0)
    trainer.train_step()
    assert all(x.isfinite().all() for x in trainer.model.parameters())


def test_one_process_a_run(dataset, tmp_path):
    run = small_run()
    directory, _ = records.open_run(
        tmp_path, replace(run, train=replace(run.train, precision="float32")), data_of(dataset)
    )
    with only_process(directory), pytest.raises(ValueError, match="another process is working on"):
        train(run, dataset, tmp_path, device="cpu")
    train(run, dataset, tmp_path, device="cpu")


def data_of(dataset):
    return {"sha256": dataset.fingerprint, "label": dataset.label, "source": dataset.manifest["source"]}


def test_bfloat16_trains(dataset, tmp_path):
    record = train(small_run("oprf-orf", precision="bfloat16"), dataset, tmp_path, device="cpu")
    assert math.isfinite(record.content["loss"]["test"]) and record.content["run"]["train"]["precision"] == "bfloat16"


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match=r"device is 'gpu'; expected auto, cpu, cuda or cuda:N"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match="device is 'meta'"):
        resolve_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"no GPU that torch can use; nearest: cpu"):
            resolve_device("cuda")
