"""The progress bar of a training run."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from llama_fn.text import visible
from llama_fn.training.measurements import clock, finite, seconds_left

FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
GIB = 2**30


@contextmanager
def training_bar(first_line: Callable[[dict], str], waiting: str = "compiling") -> Iterator[Callable[[dict], None]]:
    """A context manager that yields a function, which shows a record of a run on standard error.

    The bar is drawn at the first record, which comes after options and texts were checked. ``first_line`` makes the
    line above the bar from it. ``waiting`` stands before the bar until the first step is taken.
    """
    with ExitStack() as stack:
        bar: tqdm | None = None
        first: tuple[int, float] | None = None  # the first step of this session, and when it ended: it compiles

        def show(record: dict) -> None:
            nonlocal bar, first
            if bar is None:
                bar = stack.enter_context(tqdm(total=record["steps"], initial=record["step"], unit="step",
                                               dynamic_ncols=True, bar_format=FORMAT))
                bar.write(first_line(record), file=sys.stderr)
                if record["step"] < record["steps"]:
                    bar.set_description(waiting)
            elif "valid_loss" in record:
                bar.write(evaluation_line(record), file=sys.stderr)
            elif "sample" in record:
                bar.write(sample_line(record), file=sys.stderr)
            elif "loss" in record:
                step, now = record["step"], time.perf_counter()
                first = first or (step, now)
                left = seconds_left(now - first[1], step - first[0], bar.total - step)  # evaluations count
                bar.set_description("training", refresh=False)
                bar.set_postfix_str(step_line(record, left), refresh=False)
                bar.update()

        yield show


def step_line(record: dict, left: float | None) -> str:
    """The figures of a step, with the time left if it is known."""
    parts = [f"loss {losses(record['loss'])}"]
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,} tokens/s")
    if "learned_per_second" in record:
        parts.append(f"{record['learned_per_second']:,.0f} learned/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    elif "tflops" in record:
        parts.append(f"{record['tflops']:.3g} TFLOP/s")
    if "memory" in record:
        parts.append(f"{record['memory'] / GIB:.1f} GiB")
    if "gpu_memory" in record:
        parts.append(f"GPU {record['gpu_memory'] / GIB:.1f} GiB")
    return ", ".join(parts if left is None else [f"{clock(left)} left", *parts])


def evaluation_line(record: dict) -> str:
    """The result of an evaluation."""
    floor = f" (floor {record['floor']:.4f})" if "floor" in record else ""
    return f"step {record['step']}: validation loss {losses(record['valid_loss'])}{floor}"


def losses(value: float | list[float]) -> str:
    """The loss of one model, or those of several adapters."""
    numbers = map(finite, value if isinstance(value, list) else [value])
    return " ".join("not finite" if x is None else f"{x:.4f}" for x in numbers)


def sample_line(record: dict) -> str:
    """A sampled text after its prompt. Control characters do not reach the terminal."""
    return f"step {record['step']}: {visible(record.get('prompt', '') + record['sample'])}"
