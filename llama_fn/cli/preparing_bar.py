"""The progress bar while texts become tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def preparing_bar() -> Iterator[Callable[[str, int, int | None], None]]:
    """A context manager that yields a function for `prepare` to report to, which draws a bar for each file.

    A bar is drawn after half a second of progress, and goes when the next file is begun or at the end.
    """
    bar: tqdm | None = None

    def report(name: str, count: int, size: int | None) -> None:
        nonlocal bar
        if bar is None or bar.desc != f"{name}: ":
            if bar is not None:
                bar.close()
            bar = tqdm(desc=name, total=size, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, delay=0.5)
        bar.total = None if size is None else max(size, bar.n + count)  # the size is estimated
        bar.update(count)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()
