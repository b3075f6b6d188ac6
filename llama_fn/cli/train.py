"""`llama-fn train`: from texts to a model."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from llama_fn import random
from llama_fn.cli.options import device_of
from llama_fn.cli.preparing_bar import preparing_bar
from llama_fn.generation.completion import text_completion
from llama_fn.generation.dialog import dialog_tokens
from llama_fn.memory import keep_memory
from llama_fn.training.curve import plot_losses
from llama_fn.training.manifest import MANIFEST
from llama_fn.training.plan import Plan
from llama_fn.training.run import METRICS, SNAPSHOT, run


def train(texts: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXTS]")] = None, *,
          plan: Plan = Plan(), out: Path = Path("run"),  # noqa: B008, frozen
          resume: bool = False, evaluate_every: int | None = None, device: str = "auto") -> None:
    """Train a tokenizer and a model on the embedded stories or on your own texts, and print a sample.

    The output folder then holds the model in Meta's layout (for "llama-fn generate --model FOLDER"), metrics.jsonl with
    a line for each step, loss.png (if matplotlib is installed), and a snapshot, which each evaluation replaces. Ctrl-C
    writes a snapshot and stops.

    Args:
        texts: A text file, a JSON or JSON-lines file, or a folder of such files; by default the stories. A record has a
            "text", or a "prompt" and a "completion", or chat "messages"; completions and answers are then learned.
        out: The folder of the run.
        resume: Continue the run in that folder. The result is the same as without the interruption. The plan and the
            texts must be the same; the texts may be left out, because the folder holds their tokens. A larger number of
            steps makes a finished run longer.
        evaluate_every: Steps between two evaluations on held-out texts; by default 500, or a quarter of all steps if
            that is less.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    keep_memory()
    bar: tqdm | None = None

    def report(record: dict) -> None:
        nonlocal bar
        if bar is None:  # the first record comes after options and texts were checked
            bar = tqdm(total=record["steps"], initial=record["step"], unit="step", dynamic_ncols=True)
            size = f"{record['parameters']:,} parameters, {record['training_tokens']:,} tokens to learn from"
            if record["step"] == record["steps"]:
                bar.write(f"{size}; all steps are taken", file=sys.stderr)
                return
            bar.write(f"{size}; the first step compiles, which takes a minute or two", file=sys.stderr)
            bar.set_description("compiling")
        elif "valid_loss" in record:
            floor = f" (floor {record['floor']:.4f})" if "floor" in record else ""
            bar.write(f"step {record['step']}: validation loss {record['valid_loss']:.4f}{floor}", file=sys.stderr)
        else:
            bar.set_description("training", refresh=False)
            bar.set_postfix(loss=f"{record['loss']:.4f}", tokens_s=f"{record['tokens_per_second']:,}", refresh=False)
            bar.update()

    stopped = ""
    try:
        with preparing_bar() as preparing:
            model = run(out, plan, texts, resume=resume, evaluate_every=evaluate_every, device=device_of(device),
                        report=report, dialog_tokens=dialog_tokens, preparing=preparing)
    except KeyboardInterrupt:
        again = f"with --resume --out {out} and the same options"
        if (out / SNAPSHOT).is_file():
            stopped = f"stopped; go on {again}"
        elif (out / MANIFEST).is_file():
            stopped = f"stopped before the first snapshot; begin again {again}"
        else:
            stopped = "stopped before the first step; nothing was kept"
        raise
    finally:
        if bar is not None:
            bar.close()
        if stopped:
            print(stopped, file=sys.stderr)
    if not plot_losses(out / METRICS, out / "loss.png"):
        print("no loss.png: matplotlib is not installed (pip install 'llama_fn[plot]')", file=sys.stderr)
    print(text_completion(model, [""], key=random.key(plan.seed))[0].text)
