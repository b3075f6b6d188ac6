"""`llama-fn train`: from texts to a model."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from llama_fn import random
from llama_fn.cli.on_mesh import Mesh, MeshPlan, on_mesh
from llama_fn.cli.options import device_of
from llama_fn.cli.preparing_bar import preparing_bar
from llama_fn.cli.samples import samples_of
from llama_fn.cli.training_bar import training_bar
from llama_fn.generation.completion import text_completion
from llama_fn.generation.dialog import dialog_tokens
from llama_fn.memory import keep_memory
from llama_fn.ranges import number
from llama_fn.training.curve import INSTALL, plot_curves
from llama_fn.training.events import tensorboard_events
from llama_fn.training.manifest import MANIFEST
from llama_fn.training.plan import Plan
from llama_fn.training.progress import measured_flops
from llama_fn.training.record import METRICS
from llama_fn.training.run import has_snapshot, run

EVENTS, CURVES = "events", "curves.png"


def train(texts: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXTS]")] = None, *,
          plan: Plan = Plan(), out: Path = Path("run"),  # noqa: B008, frozen
          resume: bool = False, evaluate_every: int | None = None, keep: int = 3,
          sample_every: int | None = None, prompts: tuple[str, ...] = ("",), sample_tokens: int = 100,
          tensorboard: bool = False, peak_tflops: float | None = None, device: str = "auto", mesh: Mesh = None,
          mesh_plan: MeshPlan = None) -> None:
    """Train a tokenizer and a model on the embedded stories or on your own texts, and print a sample.

    The output folder then holds the model in Meta's layout (for "llama-fn generate --model FOLDER"), metrics.jsonl with
    a line for each step, curves.png (if matplotlib is installed), and snapshots, one after each evaluation. Ctrl-C,
    SIGTERM and SIGHUP write a snapshot and stop; the exit status is then 130, 143 or 129. "llama-fn report FOLDER"
    makes a page about the run.

    Args:
        texts: A text file, a JSON or JSON-lines file, or a folder of such files; by default the stories. A record has a
            "text", or a "prompt" and a "completion", or chat "messages"; completions and answers are then learned.
        out: The folder of the run.
        resume: Continue the run in that folder. The result is the same as without the interruption. The plan and the
            texts must be the same; the texts may be left out, because the folder holds their tokens. A larger number of
            steps makes a finished run longer.
        evaluate_every: Steps between two evaluations on held-out texts; by default 500, or a quarter of all steps if
            that is less.
        keep: The number of snapshots to keep, the newest ones; the best one is kept as well.
        sample_every: Steps between two samples of the model, which go to standard error and to metrics.jsonl; by
            default there are none.
        prompts: The beginnings of these samples.
        sample_tokens: The most tokens of each of these samples.
        tensorboard: Also write TensorBoard's events, to the folder "events" of the run (for "tensorboard --logdir
            FOLDER").
        peak_tflops: The machine's highest speed in TFLOP/s, by which MFU divides. By default the speed of a large
            matrix product, which is measured when the run begins; 0 gives TFLOP/s and no MFU.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        mesh: The processes that torchrun started, such as "dp=2,tp=2": the batch is divided over 2, and so are heads,
            hidden numbers and vocabulary. The run is the same as on one device, and may be resumed on another mesh.
        mesh_plan: How the model is divided: "replicated" (each device has all of it), "fsdp" (over dp), "tensor" (over
            tp), "replicated+tensor" or "fsdp+tensor". By default over all axes of the mesh.
    """
    keep_memory()
    place = device_of(device)
    samples = samples_of(sample_every, prompts, sample_tokens, plan.seed)
    stated = None if peak_tflops is None else 1e12 * number("peak_tflops", peak_tflops)
    with on_mesh(mesh, mesh_plan, place) as world:
        stopped = ""
        try:
            with (tensorboard_events(out / EVENTS) if tensorboard and world.is_first else contextlib.nullcontext()
                  as write_events, contextlib.ExitStack() as until_begun, training_bar(_sizes) as show):
                preparing = until_begun.enter_context(preparing_bar())

                def report(record: dict) -> None:
                    until_begun.close()  # the first record comes when the texts are prepared
                    show(record)
                    if write_events is not None:
                        write_events(record)

                peak = measured_flops(place, torch.float32) if stated is None else stated or None
                model = run(out, plan, texts, resume=resume, evaluate_every=evaluate_every, keep=keep, device=place,
                            report=report, samples=samples, peak=peak, dialog_tokens=dialog_tokens,
                            preparing=preparing, world=world)
        except (KeyboardInterrupt, SystemExit):
            again = f"with --resume --out {out} and the same options"
            if has_snapshot(out):
                stopped = f"stopped; go on {again}"
            elif (out / MANIFEST).is_file():
                stopped = f"stopped before the first snapshot; begin again {again}"
            else:
                stopped = "stopped before the first step; nothing was kept"
            raise
        finally:
            if stopped:
                with contextlib.suppress(OSError):  # the terminal may be closed
                    print(stopped, file=sys.stderr)
        if world.is_first and not plot_curves(out / METRICS, out / CURVES):
            print(f"no {CURVES}: matplotlib is not installed ({INSTALL})", file=sys.stderr)
        print(text_completion(model, [""], key=random.key(plan.seed))[0].text)


def _sizes(record: dict) -> str:
    """The sizes of the model and of its texts, from the first record of a run."""
    size = f"{record['parameters']:,} parameters, {record['training_tokens']:,} tokens to learn from"
    done = record["step"] == record["steps"]
    return f"{size}; {'all steps are taken' if done else 'the first step compiles, which takes up to a minute'}"
