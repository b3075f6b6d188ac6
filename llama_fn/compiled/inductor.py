"""What inductor gets before it compiles: its options, and facts about the machine that it would look up itself."""

import contextlib
import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from llama_fn import private_inductor
from llama_fn.modes import on_gpu
from llama_fn.ops.cpu import build

OPTIONS = {"size_asserts": False}  # each call checks first whether its tensors fit
CPU = {"cpp.enable_floating_point_contract_flag": "fast",  # otherwise inductor multiplies and adds in two instructions
       "cpp.min_chunk_size": 8192}  # a loop over one row ends sooner than a second thread starts: 4 % of a step
# Block sizes are measured. Programmatic dependent launch (PDL) lets a kernel begin to load while the one before it
# still runs: 4 % of a step of 7B (H200).
CUDA = {"coordinate_descent_tuning": True, "triton.enable_pdl": True}
# Keeps a sum of products in one loop: by default inductor splits an expression of more than 30 operations or 4 reads.
ONE_LOOP = {"realize_opcount_threshold": 1000, "realize_reads_threshold": 1000}
# Splits the rounds of a random number into many loops: as one expression they take inductor 14 s longer, or forever.
MANY_ROUNDS = {"realize_opcount_threshold": 10}


class Prepared(NamedTuple):
    """Options for inductor, and the threads that find out what it asks."""

    options: dict[str, Any]
    threads: list[threading.Thread]


def prepared(x: Tensor, cpu: Mapping[str, Any]) -> Prepared:
    """The options for the device of `x`; on a CPU, the options `cpu` are added to those that are always set.

    Threads find out meanwhile what inductor asks once in a process: a hash of torch's and Triton's sources, which takes
    half a second of every start, and whether g++ knows the processor's instructions, which takes 3 s of a first start.
    With AVX2 that answer is known.
    """
    inductor = private_inductor.inductor()
    questions = [*inductor.questions]
    if on_gpu(x):
        options = OPTIONS | CUDA
    else:
        options = {**OPTIONS, **CPU, **cpu, "cpp_cache_precompile_headers": _can_keep_headers(inductor.headers)}
        if build.vector_instructions() == "AVX2":
            options["cpp.vec_isa_ok"] = True
        else:
            questions.append(inductor.instructions)
    threads = [threading.Thread(target=question) for question in questions]
    for thread in threads:
        thread.start()
    return Prepared(options, threads)


def by_inductor(graph: GraphModule, inputs: Sequence[Any], fake_mode: Any, ready: Prepared) -> Callable:
    """The code of a graph, as a function of the list of its inputs. Its values are fake tensors of `fake_mode`.

    It first waits for the threads of `prepared`. If two threads look up the processor's instructions at once, torch may
    find others than in an earlier process, and then it misses the code which that process left on disk.
    """
    inductor = private_inductor.inductor()
    for thread in ready.threads:
        thread.join()
    with torch.no_grad(), inductor.set_fakes(fake_mode), inductor.config.patch(ready.options), \
            inductor.tracing(fake_mode):
        return inductor.compile(graph, inputs, is_inference=True)


def _can_keep_headers(folder: str) -> bool:
    """Whether inductor can keep its precompiled headers in this folder.

    With them a machine's first start takes 15 s instead of 20, and each loop compiled later 0.5 s instead of 2.5. Torch
    needs openssl for it, and writes 154 MB.
    """
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    return os.path.isdir(folder) and os.access(folder, os.W_OK) and shutil.which("openssl") is not None


_LOCK = threading.RLock()


@contextlib.contextmanager
def compile_lock() -> Iterator[None]:
    """Within it, no other thread compiles, and Python's garbage collector is off.

    Torch traces one graph at a time. The collector would find nothing in what is imported and traced, and takes 7 % of
    a start with a warm cache.
    """
    with _LOCK:
        before = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if before:
                gc.enable()
