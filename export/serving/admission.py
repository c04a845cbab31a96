"""How much a server takes on at the same time."""

import contextlib

import grpc

from export.serving.errors import ServingError


class Admission:
    """Counts requests in progress, of all transports, and their bytes.

    What is beyond the bounds is refused at once, not queued. To be used from
    one thread, that of the event loop.

    Args:
        max_requests: most requests at a time.
        max_bytes: most bytes of their bodies together.
    """

    def __init__(self, max_requests, max_bytes):
        """See the class."""
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0

    @contextlib.contextmanager
    def request(self):
        """Holds a place for a request (`with`).

        Yields:
            function that takes the number of bytes that were just received,
            and raises as this does.

        Raises:
            ServingError: RESOURCE_EXHAUSTED, there is no place.
        """
        if self._requests >= self._max_requests:
            raise _exhausted(f"{self._max_requests} requests are in progress")
        held = 0

        def receive(count):
            nonlocal held
            if self._bytes + count > self._max_bytes:
                raise _exhausted(
                    f"requests in progress have {self._bytes} bytes, and "
                    f"{count} more are over the limit of {self._max_bytes}"
                )
            self._bytes += count
            held += count

        self._requests += 1
        try:
            yield receive
        finally:
            self._requests -= 1
            self._bytes -= held


def _exhausted(reason):
    return ServingError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"The server is busy: {reason}; try again later.",
    )
