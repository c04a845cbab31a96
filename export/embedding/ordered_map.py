"""A threaded `map` that keeps the order and limits the work ahead."""

import collections
import contextlib
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def ordered_map(function, items, *, workers, ahead):
    """Runs `map(function, items)` in threads, as a context manager.

    On exit it waits for running calls and cancels all others.

    Args:
        function: function of one item.
        items: iterable; the thread that reads the results iterates over it.
        workers: number of threads.
        ahead: how many results may be started before they are read.

    Yields:
        an iterator over the results, in the order of the items.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        yield _results(pool, function, items, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(pool, function, items, ahead):
    pending = collections.deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
