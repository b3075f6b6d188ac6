"""Tests in a copy of the tree. Each run is a process forked from one that has imported torch, and llama_fn not yet."""

import compileall
import contextlib
import gc
import importlib
import math
import os
import py_compile
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

LEFT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "run", "shared")
MODULES = ("torch.func", "torch.export", "torch._dynamo", "torch._inductor.compile_fx", "torch.testing", "numpy",
           "einops", "jaxtyping", "safetensors.torch", "hypothesis.strategies", "pytest", "xdist.plugin",
           "_hypothesis_pytestplugin", "hypothesis.internal.conjecture.engine", "hypothesis.extra.numpy",
           "sentencepiece", "beartype.door", "pdb", "tyro", "jinja2.sandbox",
           "transformers.models.llama.modeling_llama")
WAITING = 5  # by the clock a run may take so many times its limit: on a busy machine it gets little of the processor
OPTIONS = ["-n", "0", "-W", "ignore::pytest.PytestAssertRewriteWarning",  # its plugins are imported already
           "-p", "no:cacheprovider",
           "-p", "no:unraisableexception", "-p", "no:threadexception"]  # they collect garbage five times at the end


def warm() -> None:
    """Import what most tests need. Nothing is computed here: a process with threads cannot be forked."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
                   "HF_HUB_OFFLINE": "1"}
    sys.dont_write_bytecode = True
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as conftest.py does, for triton is imported here
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every process looks through all of it for garbage, and has a copy of its own


def copy(root: Path, parent: str) -> Path:
    """The tree in a new folder. Python recompiles a file whose contents changed, whatever its time says."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    shutil.copytree(root, folder / "tree", ignore=LEFT)
    compileall.compile_dir(folder / "tree/llama_fn", quiet=2,
                           invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return folder / "tree"


@contextlib.contextmanager
def pool(workers: int, begin: Callable[[str], None]) -> Iterator[ProcessPoolExecutor]:
    """Processes forked from this one. Each begins with a folder for its copy, which is removed at the end."""
    warm()
    with (tempfile.TemporaryDirectory(prefix="planted-") as folder,
          ProcessPoolExecutor(workers, get_context("fork"), begin, (folder,)) as executor):
        yield executor


@contextlib.contextmanager
def edited(file: Path, text: str) -> Iterator[None]:
    """The file with this text, for a while."""
    old = file.read_bytes()
    file.write_text(text)
    try:
        yield
    finally:
        file.write_bytes(old)


class Clock:
    """A plugin of pytest: the seconds that each test takes, all its parameters together; infinite if one fails.

    The tests in `first` run before the others, in that order.
    """

    def __init__(self, first: Sequence[str]):
        self.seconds, self.places = Counter(), {test: place for place, test in enumerate(first)}

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: self.places.get(item.nodeid.split("[")[0], len(self.places)))

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid.split("[")[0]] += math.inf if report.failed else report.duration


def run(tree: Path, arguments: Sequence[str], limit: float, first: Sequence[str] = ()) -> tuple[int | None, str]:
    """pytest's status, or None if it took longer than `limit` seconds; and what it printed, the seconds of each test
    last. The tests in `first` run before the others.

    The seconds are those of the processor. A run that waits for what never comes ends by the clock, `WAITING` times as
    late.
    """
    output = tree.parent / "output"
    child = os.fork()
    if child == 0:
        _run(tree, arguments, output, math.ceil(limit), first)
    deadline, done = time.monotonic() + WAITING * limit, 0
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what a test started and left
    if not done:
        os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status) if done else None
    return None if code == -signal.SIGXCPU else code, output.read_text(errors="replace")


def _run(tree: Path, arguments: Sequence[str], output: Path, limit: int, first: Sequence[str]) -> None:
    """In the child: become pytest, and never return."""
    import pytest
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        os.chdir(tree)
        os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        clock = Clock(first)
        status = pytest.main([*OPTIONS, *arguments], plugins=[clock])
        for test, seconds in clock.seconds.items():
            print(seconds, test)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 3
    os._exit(status)
