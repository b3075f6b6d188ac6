"""`llama-fn convert`: a model from one format to another."""

import bisect
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from llama_fn.checkpoint.convert import convert as converted
from llama_fn.checkpoint.load import Format
from llama_fn.cli.options import Dtype, dtype_of
from llama_fn.transforms.quantize import Bits


def convert(src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
            dst: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")], *, to: Format,
            adapter: Path | None = None, shards: int | None = None, dtype: Dtype = "stored",
            quantize: Bits | None = None, force: bool = False) -> None:
    """Write the model in SRC to the folder DST in another format, number of shards or dtype.

    An adapter can be merged into it, and it can be quantized. One weight is read at a time. Everything is written to a
    folder beside DST and moved to DST at the end, so that an interrupted run leaves nothing behind.

    Args:
        src: The embedded model "stories", or the folder of a model. For llama2.c also its file.
        dst: The folder to write to.
        to: "meta" (params.json, consolidated.*.pth), "hf" (config.json, *.safetensors) or "llama2c" (model.bin).
        adapter: A folder with a LoRA adapter of the model (as PEFT writes it), which is added to the weights.
        shards: The number of files for the weights; by default one, and for "hf" one for each 5 GB.
        dtype: Cast the weights to this dtype, or leave them as they are stored; llama2.c's file is always float32.
        quantize: Write every matrix but the embedding in 8 or 4 bits ("int8", "int4"). Only the format "meta" can hold
            them, and only llama-fn reads them.
        force: Replace a model of the same format that is in DST.
    """
    bar: tqdm | None = None
    with ExitStack() as stack:

        def report(done: int, ends: list[int]) -> None:
            nonlocal bar
            bar = bar or stack.enter_context(tqdm(total=ends[-1], unit="B", unit_scale=True, dynamic_ncols=True))
            bar.update(done - bar.n)
            bar.set_description(f"{bisect.bisect(ends, done)} of {len(ends)} tensors", refresh=False)

        config = converted(src, dst, to, adapter=adapter, shards=shards, dtype=dtype_of(dtype), bits=quantize,
                           force=force, report=report)
    print(f"{dst}: {config.n_params:,} parameters, {to}", file=sys.stderr)
