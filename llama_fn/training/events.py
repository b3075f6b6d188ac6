"""TensorBoard's event files, written from the records of a run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llama_fn.training.measurements import finite

SCALARS = ("loss", "valid_loss", "grad_norm", "learning_rate", "tokens_per_second", "tflops", "mfu", "memory",
           "gpu_memory")


@contextmanager
def tensorboard_events(folder: str | os.PathLike) -> Iterator[Callable[[dict], None]]:
    """A context manager that yields a function, which writes a record of a run to event files in ``folder``.

    Numbers become scalars, and samples become texts. The file is created at the first record. TensorBoard then hides
    what an earlier session wrote for later steps: a resumed run takes them again. Raises `ValueError` if tensorboard is
    not installed.

    Example: ``with tensorboard_events("run/events") as write: run("run", plan, report=write)``.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard's events need the package tensorboard, which is not installed "
                         "(pip install 'llama_fn[tensorboard]')") from None
    writer: Any = None

    def write(record: dict) -> None:
        nonlocal writer
        step = record["step"]
        if writer is None:
            writer = SummaryWriter(os.fspath(folder), purge_step=step + 1)
        for name in SCALARS:
            if (value := finite(record.get(name))) is not None:
                writer.add_scalar(name, value, step)
        if isinstance(record.get("sample"), str):
            writer.add_text("sample", f"{record.get('prompt', '')}{record['sample']}", step)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
