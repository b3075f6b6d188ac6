"""What inductor is told, and what it asks of the machine before it compiles."""

import contextlib
import gc
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from llama_fn import private
from llama_fn.modes import far
from llama_fn.ops.cpu import build as avx2

OPTIONS = {"size_asserts": False}  # each call looks first whether its tensors fit
CPU = {"cpp.enable_floating_point_contract_flag": "fast",  # inductor multiplies and adds apart
       "cpp.min_chunk_size": 8192}  # a loop over a row is done sooner than a second thread has begun: 4 % of a step
# Block sizes are measured; and a kernel begins to load while the one before it ends: 4 % of a step of 7B (H200).
CUDA = {"coordinate_descent_tuning": True, "triton.enable_pdl": True}
# A sum of products is to be one loop: inductor breaks an expression of more than 30 operations or 4 reads in two.
ONE_LOOP = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 1000}
# The rounds of a random number are to be many: put into each other, they take inductor 14 seconds more, or forever.
MANY_ROUNDS = {"realize_opcount_threshold": 10}


def prepared(x: Tensor, cpu: Mapping[str, Any]) -> dict[str, Any]:
    """The options for where x is; `cpu` are those there, beside the ones that are always set.

    What inductor asks once in a process it is told meanwhile: which sources torch has, and Triton, half a second of any
    start; and whether g++ knows the processor's instructions, three of a first one. Of AVX2 there is no doubt.
    """
    inductor = private.inductor()
    asked = [*inductor.questions]
    if far(x):
        options = OPTIONS | CUDA
    else:
        options = {**OPTIONS, **CPU, **cpu, "cpp_cache_precompile_headers": _keeps_headers(inductor.headers)}
        if avx2.level() == "AVX2":
            options["cpp.vec_isa_ok"] = True
        else:
            asked.append(inductor.instructions)
    for question in asked:
        threading.Thread(target=question).start()
    return options


def _keeps_headers(folder: str) -> bool:
    """Whether inductor's headers may be compiled once, in this folder: a machine's first start takes 15 s and not 20,
    and every loop from then on a half and not two and a half. For that torch calls openssl, and writes 154 MB.
    """
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    return os.path.isdir(folder) and os.access(folder, os.W_OK) and shutil.which("openssl") is not None


_ALONE = threading.RLock()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within it, no other thread makes a graph, since torch traces one at a time; and Python looks for no garbage: what
    is imported and traced is none, and to look at it takes 7 % of a cached start.
    """
    with _ALONE:
        before = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if before:
                gc.enable()
