"""`llama-fn finetune`: from a model and examples to a better model, or to an adapter."""

import contextlib
import functools
import sys
from pathlib import Path
from typing import Annotated

import tyro

from llama_fn import lora
from llama_fn.checkpoint.load import Model, check_tokenizer, find, load, save
from llama_fn.cli.on_mesh import Mesh, MeshPlan, on_mesh
from llama_fn.cli.options import Dtype, device_of, dtype_of
from llama_fn.cli.training_bar import training_bar
from llama_fn.generation.dialog import dialog_tokens
from llama_fn.memory import keep_memory
from llama_fn.mesh.shard import unshard
from llama_fn.training.examples import read_examples, split
from llama_fn.training.run import has_snapshot
from llama_fn.training.texts import text_files
from llama_fn.training.tune import tune
from llama_fn.training.tuning import Tuning
from llama_fn.transforms.quantize import Bits


def finetune(model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
             data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")], *, out: Path,
             tuning: Tuning = Tuning(),  # noqa: B008, frozen
             adapter: Path | None = None, each: bool = False, resume: bool = False, evaluate_every: int | None = None,
             remat: bool = False, compile: bool = False, dtype: Dtype = "stored", quantize: Bits | None = None,
             device: str = "auto", mesh: Mesh = None, mesh_plan: MeshPlan = None) -> None:
    """Train the model in MODEL further on the examples in DATA: all its weights, or a LoRA adapter (--rank).

    OUT then holds the model in the format of MODEL, or the adapter in PEFT's format, with metrics.jsonl, which has a
    line for each step, and a snapshot. Ctrl-C writes a snapshot and stops.

    Args:
        model: The embedded model "stories", or the folder of a model.
        data: A file or a folder of *.txt, *.md, *.jsonl, *.ndjson, *.json. A record in JSON has a "text", of which all
            tokens are learned; a "prompt" and a "completion"; or "messages", as in a chat. Of the last two, only the
            answers are learned. With --dpo, a record has a "prompt" or "messages", and "chosen" and "rejected".
        out: The folder of the run and of its result.
        adapter: Train this LoRA adapter further, a folder as PEFT writes it.
        each: Train one adapter for each file of the folder DATA, all in one step; OUT then has a folder for each.
        resume: Continue the run in OUT, with the same arguments. The result is the same as without the interruption.
        evaluate_every: Steps between two snapshots, each after an evaluation on the examples that are held out; by
            default a quarter of all steps. Of 40 examples or more, about one in twenty is held out.
        remat: Compute each layer again in the backward, which takes less memory and more time.
        compile: Compile the step, which is then faster. The first one takes half a minute; with --each, minutes.
        dtype: Compute in this dtype, or as the weights are stored. Trained weights are float32 meanwhile.
        quantize: Hold the matrices under an adapter in 8 or 4 bits ("int8", "int4").
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        mesh: The processes that torchrun started, such as "dp=2,tp=2", as in "llama-fn train".
        mesh_plan: How the model and the adapter are divided: as in "llama-fn train".
    """
    keep_memory()
    tuning.check()
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1, got {evaluate_every}")
    format, _ = find(model)
    files = text_files(data) if each else [data]
    names = [out / file.stem for file in files] if each else [out]
    if len(set(names)) < len(names):
        raise ValueError(f"{data}: two files have one name but for their endings; --each needs different ones")
    place = device_of(device)
    with on_mesh(mesh, mesh_plan, place) as world:
        world.check_rows(tuning.batch)
        base = load(model, dtype=dtype_of(dtype), device=place, quantize=quantize, mesh=world.mesh,
                    plan=None if world.mesh is None else world.plan)
        check_tokenizer(base)
        start = None if adapter is None else lora.load(adapter, base.params)
        context = tuning.context or base.params.config.max_seq_len
        parts = [split(read_examples(file, base.tokenizer, dialog_tokens, context, pairs=tuning.dpo)) for file in files]
        examples, held_out = [part for part, _ in parts], [valid for _, valid in parts if valid is not None]
        is_adapter = tuning.rank is not None or start is not None
        tuning = tuning.filled(max(len(part.tokens) for part in examples), context, is_adapter)

        try:
            with training_bar(functools.partial(_sizes, compile), "compiling" if compile else "training") as report:
                result = tune(out, base.params, examples, tuning, valid=held_out if len(held_out) == len(files) else (),
                              start=start, resume=resume, evaluate_every=evaluate_every, compiled=compile,
                              recompute=remat, report=report, world=world)
        except (KeyboardInterrupt, SystemExit):
            if has_snapshot(out):
                with contextlib.suppress(OSError):  # the terminal may be closed
                    print(f"stopped; go on with --resume and the same arguments ({out})", file=sys.stderr)
            raise
        if not is_adapter:
            save(Model(result, base.tokenizer), out, format=format)
            print(f"{out}: the model, {format}", file=sys.stderr)
            return
        for tuned, name in zip(result if len(files) > 1 else [result], names, strict=True):
            whole, of = unshard(tuned), model if format == "hf" else None
            world.from_first(functools.partial(lora.save, whole, name, base.params, base=of))
            print(f"{name}: an adapter of {model} (--adapter {name})", file=sys.stderr)


def _sizes(compiles: bool, record: dict) -> str:
    """The sizes of what is trained and of the examples, from the first record of a run."""
    size = f"{record['parameters']:,} numbers are trained on {record['examples']:,} examples"
    if record["step"] == record["steps"]:
        return f"{size}; all steps are taken"
    return f"{size}; the first step compiles" if compiles else size
