"""Fine-tuning as pure functions: steps of all weights, of one adapter and of many, and runs that are resumed."""

import dataclasses
import itertools
import json
import signal
from types import SimpleNamespace

import pytest
import torch
from adapters import trained
from folders import same
from hypothesis import given
from hypothesis import strategies as st
from numerics import close
from strategies import keys, models, random_params, token_rows

import llama_fn as lf
from llama_fn import lora, tree
from llama_fn.training import finetune, supervise, tune
from llama_fn.training.examples import Examples
from llama_fn.training.snapshots import snapshot_steps
from llama_fn.training.tuning import Tuning

CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70, max_seq_len=64)
TUNING = Tuning(rank=2, alpha=3.0, batch=3, steps=6, learning_rate=1e-2, context=64, warmup=1)


def rows(config: lf.Config, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and masks that are true at different numbers of them."""
    tokens = token_rows(config, *shape, seed=seed)
    return tokens, token_rows(config, *shape, seed=seed + 100) % 3 > 0


def examples(config: lf.Config, count: int = 7, pairs: bool = False, seed: int = 0) -> Examples:
    return Examples(*rows(config, count, *[2] * pairs, 9, seed=seed))


def taken(task: finetune.Task, optimizer: lf.optim.Optimizer, batches: list, **settings) -> tuple:
    """The state after some steps, and their metrics."""
    state, step, metrics = finetune.begin(task, optimizer), finetune.step_of(task, optimizer, **settings), []
    for tokens, mask in batches:
        params, opt_state, measured = step(state.params, state.opt_state, tokens, mask, task.frozen)
        state = state._replace(params=params, opt_state=opt_state)
        metrics.append(measured)
    return state.params, metrics


def by_hand(loss, start: object, optimizer: lf.optim.Optimizer, batches: list) -> object:
    """The same by `torch.func.grad` and the optimizer, for batches of one micro-batch."""
    params, state = start, optimizer.init(start)
    for tokens, mask in batches:
        updates, state = optimizer.update(torch.func.grad(loss)(params, tokens[0], mask[0]), state, params)
        params = lf.optim.apply_updates(params, updates)
    return params


def all_close(one: object, other: object, tolerance: float = 1e-9) -> bool:
    return all(close(a, b, tolerance) for a, b in zip(*map(tree.leaves, (one, other)), strict=True))


@given(models(max_layers=2))
def test_all_weights_are_trained_as_by_hand(params):
    optimizer, batches = lf.optim.adamw(1e-2), [rows(params.config, 1, 3, 7, seed=i) for i in range(3)]
    now, metrics = taken(finetune.full(params), optimizer, batches)
    assert all_close(now, by_hand(lf.loss, params, optimizer, batches))
    assert close(metrics[0].loss, lf.loss(params, *(x[0] for x in batches[0])))


@given(models(max_layers=2), keys(), st.booleans())
def test_an_adapter_is_trained_as_by_hand_and_its_model_stays(params, key, remat):
    optimizer, batches = lf.optim.adamw(1e-2), [rows(params.config, 1, 3, 7, seed=i) for i in range(3)]
    start, before = trained(key, params), tree.map(torch.clone, params)
    now, _ = taken(finetune.adapter(params, start), optimizer, batches, layer=lf.remat(lf.block) if remat else lf.block)
    expected = by_hand(lambda a, *rows: lf.loss(lora.apply(params, a), *rows), start, optimizer, batches)
    assert all_close(now, expected) and same(before, params)


@given(models(max_layers=1), keys(), st.booleans())
def test_preferences_are_learned_as_by_hand(params, key, low_rank):
    optimizer = lf.optim.adamw(1e-2)
    tokens, mask = rows(params.config, 1, 3, 2, 7)
    mask[..., 1] = True
    pair = [(tokens[0, :, i], mask[0, :, i]) for i in range(2)]
    start = trained(key, params)
    if low_rank:
        now, metrics = taken(finetune.adapter(params, start, 0.3), optimizer, [(tokens, mask)])

        def loss(adapter: lora.Lora) -> torch.Tensor:
            return lf.dpo_loss(lora.apply(params, adapter), params, *pair, beta=0.3)
    else:
        start = params
        now, metrics = taken(finetune.full(params, 0.3), optimizer, [(tokens, mask)])

        def loss(policy: lf.Params) -> torch.Tensor:
            return lf.dpo_loss(policy, params, *pair, beta=0.3)

    updates, _ = optimizer.update(torch.func.grad(loss)(start), optimizer.init(start), start)
    assert all_close(now, lf.optim.apply_updates(start, updates)) and close(metrics[0].loss, loss(start))
    assert int(metrics[0].count) == 3


@given(models(max_layers=2), keys())
def test_an_adapter_that_is_given_begins_as_its_own_reference(params, key):
    start = trained(key, params)
    tuning = Tuning(dpo=True, beta=0.2, batch=3, steps=1, learning_rate=1e-3, context=64, warmup=0)
    task = tune.task_of(params, tuning, 1, start)
    _, (metrics,) = taken(task, lf.optim.sgd(0.1), [rows(params.config, 1, 3, 2, 7)])
    assert float(metrics.loss) == pytest.approx(0.6931471805599453, abs=1e-9)


@given(models(max_layers=2), keys(), st.booleans())
def test_many_adapters_are_each_trained_as_if_alone(params, key, preferences):
    """Each has its own rows, its own number of tokens that count, and is clipped by its own norm."""
    optimizer = lf.optim.chain(lf.optim.clip_by_global_norm(0.01), lf.optim.adamw(1e-2))
    beta, starts = 0.1 if preferences else None, [trained(each, params) for each in lf.random.split(key, 3)]
    batches = [rows(params.config, 3, 2, 2, *[2] * preferences, 7, seed=i) for i in range(2)]  # "n a b t"
    task = finetune.adapters(params, lora.stack(starts), beta)
    now, metrics = taken(task, optimizer, batches)
    for i, (start, found) in enumerate(zip(starts, task.finish(now), strict=True)):
        alone, measured = taken(finetune.adapter(params, start, beta), optimizer,
                                [(tokens[i], mask[i]) for tokens, mask in batches])
        assert all_close(found, alone)
        assert all(close(a.loss[i], b.loss) and close(a.grad_norm[i], b.grad_norm)
                   for a, b in zip(metrics, measured, strict=True))


@given(keys())
def test_small_updates_of_bfloat16_weights_add_up(key):
    """Weights near 1 in bfloat16 lie 2^-8 apart: a hundred updates of a hundredth of that would all be rounded away."""
    params = random_params(CONFIG, key, torch.bfloat16)
    task = finetune.full(params)
    assert {x.dtype for x in tree.leaves(task.trained)} == {torch.float32}
    assert same(task.finish(task.trained), params)
    tokens, mask = rows(CONFIG, 1, 3, 7)
    total, _ = task.loss_sum(task.trained, tokens[0], mask[0])
    assert torch.equal(total, lf.loss_sum(params, tokens[0], mask[0])[0])  # computed in bfloat16
    now, _ = taken(task, lf.optim.adamw(1e-4, weight_decay=0.0), [(tokens, mask)] * 8)
    moved = (now.norm - task.trained.norm).abs()
    assert 0 < moved.max() < 1e-3 and {x.dtype for x in tree.leaves(task.finish(now))} == {torch.bfloat16}


@given(keys())
def test_an_adapter_is_trained_on_integers_and_integers_are_not(key):
    params = lf.quantize(random_params(CONFIG, key, torch.float32), "int4")
    with pytest.raises(ValueError, match="holds integers: quantized weights are not trained; train an adapter"):
        finetune.full(params)
    start = lora.init(key, params, 2, lora.LINEAR)
    now, metrics = taken(finetune.adapter(params, start), lf.optim.adamw(1e-2), [rows(CONFIG, 1, 3, 7)] * 4,
                         layer=lf.remat(lf.block))
    assert float(metrics[-1].loss) < float(metrics[0].loss)
    plain, _ = taken(finetune.adapter(lf.dequantize(params), start), lf.optim.adamw(1e-2), [rows(CONFIG, 1, 3, 7)] * 4)
    assert all_close(now, plain, 1e-4)


def tensors_in(value: object, seen: set) -> list[torch.Tensor]:
    """The tensors of a tree, and of the trees that the functions in it close over."""
    found = []
    for leaf in tree.leaves(value):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            for cell in getattr(leaf, "__closure__", None) or ():
                found += tensors_in(cell.cell_contents, seen)
    return found


@pytest.mark.parametrize("beta", [None, 0.1])
def test_what_stays_as_it_is_is_an_argument_of_the_step(beta):
    params = random_params(CONFIG, lf.random.key(0))
    start = trained(lf.random.key(1), params)
    for task in (finetune.full(params, beta), finetune.adapter(params, start, beta),
                 finetune.adapters(params, lora.stack([start, start]), beta)):
        assert tensors_in(finetune.step_of(task, lf.optim.adamw(1e-2)), set()) == []
    assert len(tensors_in(lambda: params, set())) == len(tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "many", "int4", "preferences by adapter"])
def test_compiled_steps_are_the_eager_ones(kind):
    """For several adapters the step is one graph, and for all others it is compiled by its parts."""
    config = dataclasses.replace(CONFIG, n_layers=1) if kind == "many" else CONFIG
    params = random_params(config, lf.random.key(0), torch.float32 if kind == "int4" else torch.float64)
    params = lf.quantize(params, kind) if kind == "int4" else params
    optimizer = lf.optim.sgd(0.1) if kind == "int4" else lf.optim.adamw(1e-2)
    targets = ("wq",) if kind == "many" else ("wq", "w_down", "output")
    start, other = (trained(lf.random.key(i), params, names=targets) for i in (1, 2))
    beta = 0.3 if kind == "preferences by adapter" else None
    tokens, mask = rows(CONFIG, *[2] * (kind == "many"), 2, 3, *[2] * (beta is not None), 7)
    if kind == "full":
        task = finetune.full(params, beta)
    elif kind == "many":
        task = finetune.adapters(params, lora.stack([start, other]))
    else:
        task = finetune.adapter(params, start, beta)
    state = finetune.begin(task, optimizer)
    eager = tune.step_for(task, optimizer)(state.params, state.opt_state, tokens, mask)
    assert all(map(torch.equal, *map(tree.leaves, (state.params, finetune.begin(task, optimizer).params))))
    compiled = tune.step_for(task, optimizer, compiled=True)(state.params, state.opt_state, tokens, mask)
    assert all(map(torch.equal, *map(tree.leaves, (state.params, compiled[0]))))  # its memory was donated
    assert all_close(compiled, eager, 1e-3 if kind == "int4" else 1e-9)


# --- runs in a folder


def records(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "learned_per_second")}
            for line in lines if "parameters" not in line]


@pytest.mark.parametrize("kind", [
    "full", "adapter", "many", "given", "preferences", pytest.param("compiled", marks=pytest.mark.slow),
    pytest.param("compiled preferences", marks=pytest.mark.slow)])
def test_a_run_that_is_resumed_is_one_that_was_not_stopped(tmp_path, kind):
    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    tuning = TUNING if kind in ("adapter", "many", "compiled") else Tuning(**{**vars(TUNING), "rank": None})
    tuning = Tuning(**{**vars(tuning), "dpo": "preferences" in kind})
    start = trained(lf.random.key(3), params) if kind == "given" else None
    data = [examples(CONFIG, 7 + i, "preferences" in kind, i) for i in range(1 + 2 * (kind == "many"))]
    how = {"valid": [one._replace(tokens=one.tokens.flip(0)) for one in data], "start": start, "evaluate_every": 2,
           "compiled": "compiled" in kind}
    whole = tune.tune(tmp_path / "whole", params, data, tuning, **how)

    def stop_after_three(record: dict) -> None:
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune.tune(tmp_path / "two", params, data, tuning, **how, report=stop_after_three)
    seen = []
    halves = tune.tune(tmp_path / "two", params, data, tuning, **how, resume=True, report=seen.append)
    assert [record["step"] for record in seen if "loss" in record] == [4, 5, 6]
    assert same(whole, halves) and records(tmp_path / "whole") == records(tmp_path / "two")
    assert [record["step"] for record in records(tmp_path / "two") if "valid_loss" in record] == [2, 4, 6]

    with pytest.raises(ValueError, match="holds a fine-tuning already; go on with it"):
        tune.tune(tmp_path / "two", params, data, tuning, **how)
    with pytest.raises(ValueError, match="holds a run with another batch; give the same"):
        tune.tune(tmp_path / "two", params, data, Tuning(**{**vars(tuning), "batch": 2}), **how, resume=True)
    with pytest.raises(ValueError, match="holds a run with another examples"):
        tune.tune(tmp_path / "two", params, [*data[1:], examples(CONFIG, 5)], tuning, **how, resume=True)
    with pytest.raises(ValueError, match="holds a run with another model"):
        tune.tune(tmp_path / "two", params._replace(norm=2 * params.norm), data, tuning, **how, resume=True)
    last = params.blocks[-1]
    other = params._replace(blocks=(*params.blocks[:-1], last._replace(ffn_norm=2 * last.ffn_norm)))
    with pytest.raises(ValueError, match="holds a run with another model"):
        tune.tune(tmp_path / "two", other, data, tuning, **how, resume=True)
    if kind == "given":
        with pytest.raises(ValueError, match="holds a run with another start"):
            tune.tune(tmp_path / "two", params, data, tuning, **{**how, "start": trained(lf.random.key(4), params)},
                      resume=True)


def test_the_seconds_of_a_run_are_those_of_all_its_steps(tmp_path, monkeypatch):
    """Each step takes a second by this clock, and the steps before the run was resumed count."""
    monkeypatch.setattr(supervise, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    params = random_params(CONFIG, lf.random.key(0), torch.float32)

    def stop_after_three(record: dict) -> None:
        if record["step"] == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        tune.tune(tmp_path / "run", params, [examples(CONFIG)], TUNING, report=stop_after_three)
    tune.tune(tmp_path / "run", params, [examples(CONFIG)], TUNING, resume=True)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["seconds"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_closed_terminal_loses_no_step(tmp_path):
    """After SIGHUP nothing can be printed any more, and the step is saved all the same."""
    def closed(record: dict) -> None:
        if record["step"] == 3:
            signal.raise_signal(signal.SIGHUP)
            raise OSError("the terminal is gone")

    params = random_params(CONFIG, lf.random.key(0), torch.float32)
    with pytest.raises(SystemExit) as stopped:
        tune.tune(tmp_path / "run", params, [examples(CONFIG)], TUNING, report=closed)
    assert stopped.value.code == 129 and snapshot_steps(tmp_path / "run")[-1] == 3
    with pytest.raises(OSError, match="the terminal is gone"):
        tune.tune(tmp_path / "other", params, [examples(CONFIG)], TUNING, report=failing)


def failing(record: dict) -> None:
    raise OSError("the terminal is gone")


def test_micro_batches_are_one_batch(tmp_path):
    params = random_params(CONFIG, lf.random.key(0))
    one, two = (tune.tune(tmp_path / str(a), params, [examples(CONFIG)], Tuning(
        **{**vars(TUNING), "batch": 6 // a, "micro_batches": a})) for a in (1, 2))
    assert all_close(one, two)


def test_the_loss_on_what_is_held_out_is_that_of_all_its_tokens(tmp_path):
    params, valid = random_params(CONFIG, lf.random.key(0)), examples(CONFIG, 5, seed=9)
    tune.tune(tmp_path / "run", params, [examples(CONFIG)], Tuning(**{**vars(TUNING), "steps": 1, "warmup": 0,
              "learning_rate": 1e-30}), valid=[valid])
    (found,) = [record["valid_loss"] for record in records(tmp_path / "run") if "valid_loss" in record]
    assert found == pytest.approx(float(lf.loss(params, *valid)), abs=1e-9)


def test_numbers_that_do_not_go_together_are_refused():
    params = random_params(CONFIG, lf.random.key(0))
    start = trained(lf.random.key(1), params)
    with pytest.raises(ValueError, match="an adapter that is given is trained further: leave out --rank"):
        tune.task_of(params, TUNING, 1, start)
    with pytest.raises(ValueError, match="only adapters are trained side by side: give their --rank"):
        tune.task_of(params, Tuning(), 2)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    params = random_params(CONFIG, lf.random.key(0))
    with pytest.raises(ValueError, match="is not empty and holds no fine-tuning; choose another folder"):
        tune.tune(tmp_path, params, [examples(CONFIG)], TUNING)
    with pytest.raises(FileNotFoundError, match="there is no run to go on with"):
        tune.tune(tmp_path / "new", params, [examples(CONFIG)], TUNING, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
