"""A progress bar that is drawn at its first use, so that an error before any progress stands alone."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def late_bar(**settings: Any) -> Iterator[Callable[[], tqdm]]:
    """A function that returns the bar. Its first call draws the bar, and the end of the block closes it."""
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(tqdm(dynamic_ncols=True, **settings)))
