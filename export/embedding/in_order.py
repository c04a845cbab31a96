"""`map` by threads that work ahead, but not too far."""

import collections
import contextlib
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def in_order(function, items, *, workers, ahead):
    """A context manager for `map(function, items)` in threads.

    Leaving it waits for what is under way, and begins nothing more.

    Args:
        function: of an item.
        items: iterable; gone through by the thread that asks for results.
        workers: how many threads.
        ahead: how many more results may be begun than were asked for.

    Yields:
        an iterator of the results, in the order of the items.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        yield _results(pool, function, items, ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(pool, function, items, ahead):
    waiting = collections.deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
