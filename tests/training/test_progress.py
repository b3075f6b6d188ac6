"""What a run measures at each step, its samples, and the events that TensorBoard reads."""

import json
import mmap
import os
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs
from torch.utils.flop_counter import FlopCounterMode

import llama_fn as lf
from llama_fn.cli.samples import samples_of
from llama_fn.cli.training_bar import sample_line, step_line
from llama_fn.memory import resident_bytes
from llama_fn.ops import attend
from llama_fn.training import loop
from llama_fn.training.events import tensorboard_events
from llama_fn.training.plan import Plan
from llama_fn.training.progress import Samples, flops_per_token, measured_flops, memory_in_use, step_record
from llama_fn.training.run import run
from llama_fn.training.step import Metrics, make_step

SMALL = Plan(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=20, context=24, steps=5, batch=2, warmup=2,
             learning_rate=3e-3, final_learning_rate=1e-3)


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(loop, "jit_step", make_step)  # what compiles is tested elsewhere, and takes 15 s each time


@pytest.fixture
def texts_file(tmp_path) -> Path:
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n" * 90)
    return tmp_path / "a.txt"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the figures of a step

@given(configs(), st.integers(2, 20), st.integers(1, 3), st.booleans())
def test_the_operations_of_a_token_are_those_that_torch_counts(config, context, rows, frozen):
    params = lf.init_params(lf.random.key(0), config)
    tokens = torch.randint(config.vocab_size, (rows, context + 1))
    if frozen:  # the weights' own gradients are not computed: only those of the inputs, back to the embedding
        params = params._replace(embedding=params.embedding.requires_grad_())
    else:
        params = lf.tree.map(torch.Tensor.requires_grad_, params)
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(attend, "TABLE", ())  # torch cannot count in kernels of one's own
        lf.loss(params, tokens).backward()
    assert counter.get_total_flops() == rows * context * flops_per_token(config, context, frozen=frozen)


@given(st.integers(0, 10**6), st.floats(1e-6, 1e4), st.integers(1, 10**12), st.none() | st.floats(1e9, 1e16))
def test_the_speed_of_a_step_is_that_of_its_own_interval(count, interval, flops, peak):
    metrics = Metrics(torch.tensor(2.5), torch.tensor(0.5), torch.tensor(count))
    record = step_record(7, metrics, learning_rate=1e-3, interval=interval, seconds=9.876, flops=flops, peak=peak,
                         memory={"memory": 3})
    speed = count / interval
    assert abs(record["tokens_per_second"] - speed) <= 0.5 + 1e-9 * speed
    assert record["tflops"] == pytest.approx(speed * flops / 1e12, rel=1e-3)
    assert ("mfu" in record) == (peak is not None)
    assert peak is None or record["mfu"] == pytest.approx(speed * flops / peak, rel=1e-3)
    assert {name: record[name] for name in ("step", "loss", "grad_norm", "learning_rate", "seconds", "memory")} == {
        "step": 7, "loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-3, "seconds": 9.88, "memory": 3}


def test_the_memory_of_a_tensor_is_seen():
    before = memory_in_use("cpu")
    assert before.keys() == {"memory"} and resident_bytes() is not None
    kept = torch.frombuffer(mmap.mmap(-1, 2**26), dtype=torch.float32).fill_(1)  # malloc may reuse pages
    assert memory_in_use("cpu")["memory"] - before["memory"] > kept.nbytes // 2
    assert 1e7 < measured_flops("cpu", torch.float32, seconds=0) < 1e15


def test_a_run_measures_the_rate_of_each_step_and_goes_on_counting_time(eager, tmp_path, texts_file):
    def stop(record: dict) -> None:
        if record["step"] == 3 and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", SMALL, texts_file, report=stop, peak=1e12)
    run(tmp_path / "run", SMALL, texts_file, resume=True)
    steps = [record for record in lines(tmp_path / "run") if "loss" in record]
    rate = SMALL.schedule()
    assert [record["learning_rate"] for record in steps] == [float(rate(step)) for step in range(5)]
    assert [record["learning_rate"] for record in steps][:3] == pytest.approx([0, 1.5e-3, 3e-3])
    assert ["mfu" in record for record in steps] == [True] * 3 + [False] * 2
    seconds = [record["seconds"] for record in steps]
    assert seconds == sorted(seconds)


# --- samples

def test_samples_are_drawn_at_their_steps_and_again_by_a_resumed_run(eager, tmp_path, texts_file):
    def samples() -> Samples | None:
        return samples_of(2, ["the cat", ""], 5, seed=3)

    def stop(record: dict) -> None:
        if record["step"] == 2 and "loss" in record:
            signal.raise_signal(signal.SIGINT)

    model = run(tmp_path / "whole", SMALL, texts_file, samples=samples())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", SMALL, texts_file, samples=samples(), report=stop)
    run(tmp_path / "two", SMALL, texts_file, samples=samples(), resume=True)
    drawn = [[record for record in lines(tmp_path / name) if "sample" in record] for name in ("whole", "two")]
    assert drawn[0] == drawn[1]
    assert [(record["step"], record["prompt"]) for record in drawn[0]] == [
        (step, prompt) for step in (2, 4, 5) for prompt in ("the cat", "")]  # and after the last step
    key = lf.random.split(lf.random.fold_in(lf.random.key(3), 5), 2)[1]
    (text,) = lf.text_completion(model, [""], key=key, max_new_tokens=5)
    assert drawn[0][-1]["sample"] == text.text
    assert len({record["sample"] for record in drawn[0]}) > 1


def test_a_prompt_that_cannot_be_continued_does_not_stop_the_training(model):
    samples = samples_of(1, ["Once " * 200, "\udc80", "Once"], 2, seed=0)
    assert samples is not None
    with pytest.warns(UserWarning, match="no sample for the prompt") as warned:
        assert [record["prompt"] for record in samples.draw(model, 1)] == ["Once"]
    assert len(warned) == 2
    assert samples_of(None, [""], 5, 0) is None
    for every, tokens, name in ((0, 5, "sample_every"), (1, 0, "sample_tokens")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            samples_of(every, [""], tokens, 0)


# --- the bar

def test_the_bar_names_what_is_known():
    record = {"step": 1, "loss": 2.0, "tokens_per_second": 1234}
    assert step_line(record, None) == "loss 2.0000, 1,234 tokens/s"
    assert step_line({"loss": [2.0, 1.5], "learned_per_second": 33.5}, None) == "loss 2.0000 1.5000, 34 learned/s"
    assert step_line({**record, "tflops": 0.5}, 61.4) == "1:01 left, loss 2.0000, 1,234 tokens/s, 0.5 TFLOP/s"
    known = {**record, "loss": None, "tflops": 0.5, "mfu": 0.123, "memory": 2**30, "gpu_memory": 3 * 2**30}
    assert step_line(known, 3723) == ("1:02:03 left, loss not finite, 1,234 tokens/s, MFU 12.3%, 1.0 GiB, GPU 3.0 GiB")
    assert sample_line({"step": 5, "prompt": "a\x1b[2J", "sample": "b\r\u009bc\n"}) == (
        "step 5: a\ufffd[2Jb\ufffd\ufffdc\n")


# --- TensorBoard

def crc32c(data: bytes) -> int:
    """The checksum of RFC 3720, appendix B.4, one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def fields(message: bytes) -> dict[int, list]:
    """The fields of a message of protocol buffers, by their numbers."""
    found: dict[int, list] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            value: object = varint()
        else:
            size = {1: 8, 5: 4}[kind] if kind != 2 else varint()
            value, at = message[at:at + size], at + size
        found.setdefault(number, []).append(value)
    return found


def events(folder: Path) -> list[tuple[str, int, object]]:
    """Names, steps and values in the event files, as TensorBoard shows them after restarts (event.proto)."""
    shown: list[tuple[str, int, object]] = []
    for file in sorted(folder.iterdir(), key=os.path.getmtime):
        data = file.read_bytes()
        while data:
            (size,), (check,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
            event, (after,) = data[12:12 + size], struct.unpack("<I", data[12 + size:16 + size])
            assert (check, after) == (masked(data[:8]), masked(event))
            data = data[16 + size:]
            message = fields(event)
            step = message.get(2, [0])[0]
            if 7 in message and fields(message[7][0]).get(1) == [1]:  # a session begins: later steps are hidden
                shown = [entry for entry in shown if entry[1] < step]
            for summary in message.get(5, []):
                for value in map(fields, fields(summary)[1]):
                    tensor = fields(value[8][0]) if 8 in value else {}
                    shown.append((value[1][0].decode(), step,
                                  tensor[8][0].decode() if 8 in tensor else struct.unpack("<f", value[2][0])[0]))
    return shown


def test_events_are_the_measurements_each_step_once_after_a_resume(tmp_path):
    def step(number: int, session: int) -> list[dict]:
        return [{"step": number, "loss": float(number + session), "learning_rate": 0.5, "seconds": 1.0, "mfu": None},
                {"step": number, "prompt": "a ", "sample": f"text {number + session}"}]

    for session, (first, last) in enumerate([(0, 4), (2, 6)]):  # killed after step 4, resumed from step 2
        with tensorboard_events(tmp_path / "events") as write:
            write({"step": first, "steps": 6, "parameters": 3})
            for number in range(first + 1, last + 1):
                for record in step(number, 10 * session):
                    write(record)
    seen = events(tmp_path / "events")
    losses = [(number, value) for name, number, value in seen if name == "loss"]
    assert losses == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0), (6, 16.0)]
    assert [value for name, _, value in seen if name == "sample/text_summary"] == [
        f"a text {n}" for n in (1, 2, 13, 14, 15, 16)]
    assert {name for name, _, _ in seen} == {"loss", "learning_rate", "sample/text_summary"}


def test_without_tensorboard_there_is_one_clear_error_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with (pytest.raises(ValueError, match=r"need the package tensorboard, .*llama_fn\[tensorboard\]"),
          tensorboard_events(tmp_path / "events")):
        raise AssertionError("the block is not entered")
    assert not (tmp_path / "events").exists()
