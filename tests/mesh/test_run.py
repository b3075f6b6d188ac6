"""A training on a mesh is the training of one process: steps, evaluations, texts, and how it goes on."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from runs import eager, metrics, model
from worlds import world

import llama_fn as lf
from llama_fn.checkpoint.load import load
from llama_fn.cli.samples import samples_of
from llama_fn.generation.completion import text_completion
from llama_fn.mesh.world import ALONE, join
from llama_fn.training.examples import Examples
from llama_fn.training.placement import goes_on
from llama_fn.training.plan import Plan
from llama_fn.training.progress import Samples
from llama_fn.training.run import run
from llama_fn.training.snapshots import snapshot_steps
from llama_fn.training.tune import tune
from llama_fn.training.tuning import Tuning

PLAN = Plan(dim=16, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=24, context=24, vocab_size=288, steps=10, batch=4)
MESHES = [("replicated", {"dp": 2}), ("fsdp", {"dp": 2}), ("tensor", {"tp": 2}),
          ("replicated+tensor", {"dp": 2, "tp": 2}), ("fsdp+tensor", {"dp": 2, "tp": 2})]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "a.txt"
    file.write_text("the cat sat on the mat.\nthe dog ran to the cat.\n" * 60)
    return file


def train_here(folder: Path, texts: Path, plan: Plan = PLAN, **options) -> None:
    with pytest.MonkeyPatch.context() as patch:
        eager(patch)
        samples = options.pop("samples", samples_of(5, ["the cat", "a"], 12, 0))
        run(folder, plan, texts, evaluate_every=5, samples=samples, **options)


def on_ranks(folder: Path, texts: Path, mesh: dict, plan: str, stops: int | None = None, resume: bool = False,
             **changes) -> bool:
    """A run of this process and the others of the mesh; the last one gets Ctrl-C at the step `stops`."""
    here = join(mesh, plan)
    options = {"world": here, "resume": resume}
    if stops is not None:
        def draw(model, step: int) -> tuple:
            if step == stops and here.ranks.rank == here.ranks.size - 1:
                signal.raise_signal(signal.SIGINT)
            return ()
        options["samples"] = Samples(1, draw)
    try:
        train_here(folder, texts, dataclasses.replace(PLAN, **changes), **options)
    except KeyboardInterrupt:
        return False
    return True


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "consolidated.00.pth")


def assert_alike(ours: list[dict], theirs: list[dict]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert x == {name: pytest.approx(y[name], rel=1e-5) if isinstance(y[name], float) else y[name] for name in y}


def assert_close(folder: Path, other: Path, without: str = "") -> None:
    """Two runs have the same losses and norms up to 1e-5, the same texts, and parameters up to 1e-4 at a rate of 2e-3.

    Each sum is taken in another order: the losses of rows by rank, and products over parts of heads.
    """
    ours, theirs = ([x for x in metrics(each) if without not in x] for each in (folder, other))
    assert_alike(ours, theirs)
    torch.testing.assert_close(weights(folder), weights(other), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_here(folder, texts)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "mesh"), MESHES)
def test_ten_steps_on_a_mesh_are_those_of_one_process(plan, mesh, alone, texts, tmp_path):
    assert all(world(2 ** len(mesh))(on_ranks, tmp_path / "run", texts, mesh, plan))
    assert_close(tmp_path / "run", alone)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["on"] == {"mesh": mesh, "plan": plan, "job": None} and written["batch"] == 4
    trained, expected = load(tmp_path / "run"), load(alone)
    greedy = {"key": lf.random.key(0), "max_new_tokens": 12, "sampler": lf.sampler(0.0)}
    assert text_completion(trained, ["the"], **greedy)[0].text == text_completion(expected, ["the"], **greedy)[0].text
    assert not (tmp_path / "run" / "lock").exists()


def tuned_on_ranks(folder: Path, mesh: dict | None, plan: str, tuning: Tuning) -> list[torch.Tensor]:
    """The leaves of what a fine-tuning gives, whole."""
    config = lf.Config(dim=16, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=40, hidden_dim=24, max_seq_len=12)
    params, shape = lf.init_params(lf.random.key(0), config), (14, 2, 9) if tuning.dpo else (14, 9)
    tokens = lf.random.randint(lf.random.key(1), shape, 0, 40)
    examples, valid = (Examples(x, x > 5) for x in (tokens, tokens[:5]))
    here = ALONE if mesh is None else join(mesh, plan)
    tuned = tune(folder, here.part(params), [examples], tuning.filled(14, 8, tuning.rank is not None), valid=[valid],
                 world=here)
    return lf.tree.leaves(lf.mesh.unshard(tuned))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "plan", "tuning"), [
    ({"dp": 2}, "fsdp", Tuning(steps=4, batch=4)), ({"tp": 2}, "tensor", Tuning(steps=4, batch=4, rank=2)),
    ({"dp": 2}, "fsdp", Tuning(steps=4, batch=4, rank=2, dpo=True))])
def test_a_fine_tuning_on_a_mesh_is_that_of_one_process(mesh, plan, tuning, tmp_path):
    tuning = dataclasses.replace(tuning, learning_rate=1e-2)
    expected = tuned_on_ranks(tmp_path / "alone", None, plan, tuning)
    for result in world(2)(tuned_on_ranks, tmp_path / "mesh", mesh, plan, tuning):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert_alike(*([{name: x[name] for name in x if name != "learned_per_second"} for x in metrics(tmp_path / each)]
                   for each in ("mesh", "alone")))


@pytest.mark.slow
def test_replicated_data_are_micro_batches_bit_for_bit(texts, tmp_path):
    train_here(tmp_path / "micro", texts, dataclasses.replace(PLAN, batch=2, micro_batches=2))
    world(2)(on_ranks, tmp_path / "mesh", texts, {"dp": 2}, "replicated")
    assert metrics(tmp_path / "mesh") == metrics(tmp_path / "micro")
    assert model(tmp_path / "mesh") == model(tmp_path / "micro")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step_and_any_mesh_goes_on(alone, texts, tmp_path):
    two, four = {"dp": 2}, {"dp": 2, "tp": 2}
    assert world(2)(on_ranks, tmp_path / "run", texts, two, "fsdp", 3) == [False, False]
    assert snapshot_steps(tmp_path / "run") == [3] and metrics(tmp_path / "run")[-1]["step"] == 3
    assert world(4)(on_ranks, tmp_path / "run", texts, four, "fsdp+tensor", 7, True) == [False] * 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["on"]["mesh"] == four
    assert world(2)(on_ranks, tmp_path / "run", texts, {"tp": 2}, "tensor", None, True) == [True, True]
    assert_close(tmp_path / "run", alone, without="sample")


def resumed(folder: Path, texts: Path) -> None:
    """A run that is stopped and resumed on the same mesh, beside one that is not."""
    for step, name in ((4, "run"), (None, "run"), (None, "whole")):
        on_ranks(folder / name, texts, {"dp": 2}, "fsdp", step, resume=step is None and name == "run")


@pytest.mark.slow
def test_resume_on_the_same_mesh_equals_not_stopping_bit_for_bit(texts, tmp_path):
    world(2)(resumed, tmp_path, texts)
    ours, whole = ([x for x in metrics(tmp_path / name) if "sample" not in x] for name in ("run", "whole"))
    assert ours == whole and model(tmp_path / "run") == model(tmp_path / "whole")
    names = [max((tmp_path / name / "snapshots").iterdir()) for name in ("run", "whole")]
    ours, whole = ({file.name: file.read_bytes() for file in last.glob("*.safetensors")} for last in names)
    assert len(ours) == 2 and ours == whole


def refused(folder: Path, texts: Path, mesh: dict, plan: str, changes: dict) -> str:
    try:
        on_ranks(folder, texts, mesh, plan, **changes)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("mesh", "plan", "changes", "message"), [
    ({"dp": 2}, "replicated", {"batch": 3}, "a batch of 3 rows cannot be divided over 2 devices; choose a multiple"),
    ({"tp": 2}, "tensor", {"n_kv_heads": 1}, "blocks.0.attention.wq has 1 numbers along k, and 2 devices (tp) cannot"),
    ({"tp": 2}, "fsdp", {}, "*b is divided over 'dp', and the mesh has tp"),
])
def test_what_cannot_be_divided_is_refused_by_all_before_any_work(mesh, plan, changes, message, texts, tmp_path):
    for said in world(2)(refused, tmp_path / "run", texts, mesh, plan, changes):
        assert message in said
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_of_the_texts_that_cannot_be_divided_is_refused_and_leaves_nothing(texts, tmp_path):
    for said in world(2)(refused, tmp_path / "run", texts, {"tp": 2}, "tensor", {"vocab_size": 289}):
        assert "embedding has 289 numbers along v" in said
    for said in world(2)(refused, tmp_path / "run", texts.parent, {"tp": 2}, "tensor", {"vocab_size": None}):
        assert "embedding has 307 numbers" in said and "choose another size of the vocabulary (--vocab-size)" in said
    assert not (tmp_path / "run" / "lock").exists()


def only_this_job_goes_on(folder: Path, texts: Path) -> list[bool]:
    """Whether a run goes on by itself: in the job that began it, in another one, and before anything was restarted."""
    here = join({"dp": 2}, "replicated")._replace(job="ours", restarts=0)
    train_here(folder, texts, dataclasses.replace(PLAN, steps=1), world=here)
    worlds = here._replace(restarts=1), here._replace(restarts=1, job="theirs"), here
    return [goes_on(folder / "run.json", each) for each in worlds]


@pytest.mark.slow
def test_a_run_goes_on_by_itself_in_the_job_that_began_it(texts, tmp_path):
    assert world(2)(only_this_job_goes_on, tmp_path / "run", texts) == [[True, False, False]] * 2
