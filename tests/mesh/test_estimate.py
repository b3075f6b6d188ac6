"""The estimates of `llama-fn plan`: from what the memory and the time of a step are added up, and what is chosen."""

from pathlib import Path

import pytest
import torch
from program import cli

import llama_fn as lf
from llama_fn.cli.plan import KNOWN
from llama_fn.mesh.estimate import LOGITS, Decoding, Training, _parts, _saved, best, enough, estimates, fits
from llama_fn.mesh.machine import GPUS, INFINIBAND, LINKS, START, sending
from llama_fn.training import chunked_loss

H100, HALF = GPUS["h100"], torch.bfloat16
README = (Path(lf.__file__).parent / "mesh" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("config", [
    lf.Config(dim=768, n_layers=3, n_heads=12, n_kv_heads=4, vocab_size=40, hidden_dim=2048),
    lf.Config(dim=512, n_layers=2, n_heads=8, n_kv_heads=8, vocab_size=40, hidden_dim=1376)])
def test_activations_are_what_autograd_saves(config, dtype):
    params = lf.tree.map(lambda x: x.requires_grad_(), lf.init_params(lf.random.key(0), config, dtype))
    weights = {x.data_ptr() for x in lf.tree.leaves(params)}
    tokens, saved = lf.random.randint(lf.random.key(1), (2, 257), 0, 40), {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        total = lf.loss_sum(params, tokens)
    assert total[1] == 512
    size = sum(size for place, size in saved.items() if place not in weights)
    layer, _ = _parts(config, {"dp": 1}, "replicated")
    # The rest: RoPE's tables, the softmax's sums, the logits.
    assert size == pytest.approx(512 * config.n_layers * _saved(config, layer, dtype.itemsize), rel=0.15)


def test_the_loss_holds_as_many_logits_as_the_estimate_says():
    assert LOGITS == chunked_loss.LOGITS


@pytest.mark.parametrize("config", [lf.LLAMA2_7B, lf.LLAMA2_13B, lf.LLAMA2_70B])
@pytest.mark.parametrize("devices", [1, 2, 8, 64])
def test_fsdp_and_tensor_divide_the_memory_by_the_devices(config, devices):
    for job in (Training(64, 4096, torch.float32, HALF), Decoding(64, 4096, HALF)):
        for one in estimates(config, H100, devices, job):
            whole = config.n_params * (6 if isinstance(job, Training) else 2)  # a copy in bfloat16 is computed with
            parts = devices if one.plan in ("fsdp", "tensor", "fsdp+tensor") else one.mesh.get("tp", 1)
            assert one.memory["parameters"] == pytest.approx(whole / parts, rel=0.002)  # norms are whole under tensor
            assert one.size == sum(one.memory.values()) and one.time == sum(one.seconds.values())


@pytest.mark.parametrize("job", [Training(64, 4096, torch.float32, HALF), Decoding(8, 4096, HALF)])
def test_the_choice_fits_and_is_the_fastest(job):
    found = estimates(lf.LLAMA2_7B, H100, 8, job)
    chosen = best(found, H100)
    assert chosen is not None and fits(chosen, H100)
    assert chosen.time == min(one.time for one in found if fits(one, H100))


def test_eight_h100_decode_70b_by_tensor_and_do_not_train_it():
    found = estimates(lf.LLAMA2_70B, H100, 8, Decoding(8, 4096, HALF))
    chosen = best(found, H100)
    assert chosen is not None and (chosen.plan, chosen.mesh) == ("tensor", {"tp": 8})
    assert not fits(next(one for one in found if one.plan == "replicated"), H100)  # 138 GB
    job = Training(64, 4096, torch.float32, HALF)
    assert best(estimates(lf.LLAMA2_70B, H100, 8, job), H100) is None
    assert enough(lf.LLAMA2_70B, H100, 8, job)[0] == 32


def test_the_table_in_the_document_has_the_choices():
    def choice(config, devices, job):
        one = best(estimates(config, H100, devices, job), H100)
        return one and f"{one.plan} {','.join(f'{x}={n}' for x, n in one.mesh.items())}: {one.tokens / one.time:,.0f}"

    jobs = Training(64, 4096, torch.float32, HALF), Decoding(8, 4096, HALF)
    for devices in (1, 2, 4, 8, 16, 32, 64):
        cells = [choice(config, devices, job) or "none fits" for job in jobs for config in KNOWN.values()]
        assert f"| {devices} | {' | '.join(cells)} |" in README.splitlines()


def test_decoding_one_row_on_one_device_takes_the_time_that_was_measured():
    """examples/bench: 4.643 ms on one H100, with 1,024 slots of which 129 are seen."""
    (one,) = estimates(lf.LLAMA2_7B, H100, 1, Decoding(1, 129, HALF))
    assert one.time == pytest.approx(4.643e-3, rel=0.05) and one.traffic == {}


def test_an_axis_within_a_host_sends_over_its_links_and_one_between_hosts_over_the_network():
    mesh = {"dp": 16, "tp": 4}
    assert sending(H100, mesh, "tp", 3, 9e9) == pytest.approx(START + 3 * H100.latency + 9e9 / (LINKS * 450e9))
    # Two devices of dp in each of 8 hosts, with a card each: 7 of 15 steps are from host to host.
    assert sending(H100, mesh, "dp", 15, 9e9) == pytest.approx(
        START + 7 * INFINIBAND + 8 * H100.latency + 9e9 / (LINKS * 100e9))


@pytest.mark.parametrize("devices", ["1", "8", "48", "64"])
def test_plan_prints_a_table_and_a_reason(monkeypatch, capsys, devices):
    status, out, err = cli(monkeypatch, capsys, "plan", "--model", "70b", "--devices", devices, "--gpu", "h200")
    assert (status, err) == (0, "")
    assert out.startswith(f"70b, 68,976,648,192 parameters, on {devices} x h200: 989.4 TFLOP/s, 141 GB, 4800 GB/s")
    train, decode = out.split("\n\n")[1:]
    assert ("devices are enough" in train) == (devices in ("1", "8"))
    assert ("\nchoose" in train) == (devices == "64")
    assert decode.count("*") == ("\nchoose" in decode)
    if devices == "48":
        assert train.splitlines()[2:4] == [
            "  replicated: 64 rows cannot be divided evenly over 48 devices",
            "  fsdp: embedding has 8192 numbers along d, and 48 devices (dp) cannot divide them evenly; choose a size "
            "of dp that divides 8192"]


def test_plan_takes_a_folder_and_other_speeds(monkeypatch, capsys, model, tmp_path):
    lf.save(model, tmp_path / "there")
    slow = ["--tflops", "0.05", "--memory", "8", "--bandwidth", "20", "--link", "1.5", "--network", "0.1"]
    status, out, err = cli(monkeypatch, capsys, "plan", "--model", str(tmp_path / "there"), *slow, "--host", "2")
    assert (status, err) == (0, "")
    assert "0.05 TFLOP/s, 8 GB, 20 GB/s; links of 1.5 GB/s and 0.1 GB/s between hosts of 2" in out and "tokens; " in out


@pytest.mark.parametrize(("args", "said"), [
    (["--model", "nowhere"], "nowhere: no model there"),
    (["--devices", "0"], "--devices must be at least 1, got 0"),
    (["--batch", "0"], "--batch must be at least 1, got 0"),
    (["--rows", "-1"], "--rows must be at least 1, got -1"),
    (["--context", "1"], "--context must be at least 2, got 1"),
    (["--link", "string"], '--link must be "nvlink", "pcie" or a speed in GB/s above 0, got \'string\''),
    (["--link", "nan"], '--link must be "nvlink", "pcie" or a speed in GB/s above 0, got \'nan\''),
    (["--tflops", "0"], "--tflops must lie in (0, inf)"),
    (["--memory", "-3"], "--memory must lie in (0, inf)"),
    (["--network", "inf"], "--network must lie in (0, inf)"),
    (["--host", "0"], "--host must be at least 1, got 0"),
    (["--gpu", "z80"], "invalid choice")])
def test_bad_input_is_one_line_and_status_2(monkeypatch, capsys, args, said):
    status, out, err = cli(monkeypatch, capsys, "plan", *args)
    assert (status, out) == (2, "") and err.count("\n") == 1 and said in err, err
