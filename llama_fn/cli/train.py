"""`llama-fn train`: from texts to a model."""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from llama_fn import random
from llama_fn.cli.options import device_of
from llama_fn.generation.completion import text_completion
from llama_fn.memory import keep_memory
from llama_fn.training.curve import plot_losses
from llama_fn.training.plan import Plan
from llama_fn.training.run import run


def train(texts: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXTS]")] = None, *,
          plan: Plan = Plan(), out: Path = Path("run"),  # noqa: B008, frozen
          resume: bool = False, evaluate_every: int = 500, device: str = "auto") -> None:
    """Train a tokenizer and a model, on the embedded stories or on texts of yours, and let it write.

    The folder gets the model in Meta's layout (`llama-fn generate --model FOLDER`), metrics.jsonl with a line a step,
    loss.png (if matplotlib is installed), and a snapshot at every evaluation. Ctrl-C writes a snapshot and stops.

    Args:
        texts: A text file, a JSON-lines file (the "text" of each line), or a folder of such files; by default stories.
        out: The folder of the run.
        resume: Go on with the run in that folder, with the same plan, to the same result as if it had not stopped.
        evaluate_every: Steps between two evaluations on held-out texts.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    keep_memory()
    with tqdm(total=plan.steps, unit="step", dynamic_ncols=True, delay=1e-9) as bar:

        def report(record: dict) -> None:
            if "parameters" in record:
                bar.initial = bar.n = record["step"]
                bar.write(f"{record['parameters']:,} parameters, {record['training_tokens']:,} tokens to learn from; "
                          "the first step compiles, which takes a minute or two", file=sys.stderr)
                bar.set_description("compiling")
            elif "valid_loss" in record:
                floor = f" (floor {record['floor']:.4f})" if "floor" in record else ""
                bar.write(f"step {record['step']}: validation loss {record['valid_loss']:.4f}{floor}", file=sys.stderr)
            else:
                bar.set_description("training", refresh=False)
                speed = f"{record['tokens_per_second']:,}"
                bar.set_postfix(loss=f"{record['loss']:.4f}", tokens_s=speed, refresh=False)
                bar.update()

        try:
            model = run(out, plan, texts, resume=resume, evaluate_every=evaluate_every,
                        device=device_of(device), report=report)
        except KeyboardInterrupt:
            if (out / "snapshot.pt").is_file():
                bar.write(f"stopped; go on with --resume --out {out} and the same options", file=sys.stderr)
            raise
    if not plot_losses(out / "metrics.jsonl", out / "loss.png"):
        print("no loss.png: matplotlib is not installed (pip install 'llama_fn[plot]')", file=sys.stderr)
    print(text_completion(model, [""], key=random.key(plan.seed))[0].text)
