"""Requests that fail, with a code for the client."""

import grpc

from export.messages import reason

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ServingError(Exception):
    """A request that failed, or a version that could not be loaded.

    Attributes:
        code: `grpc.StatusCode`.
        message: one line for the client.
        http: status of HTTP, if that is not the one for `code`.
    """

    def __init__(self, code, message, http=None):
        """See the class."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.http = http


def invalid(message):
    """A `ServingError` for a request that is wrong in itself."""
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def not_for_predict():
    """The `ServingError` for those who classify or regress."""
    return invalid("The signatures of this model are for Predict only.")


def as_serving_error(error):
    """Makes a `ServingError` of any other.

    An error of TensorFlow keeps its code, which is the same number as gRPC's;
    others become INTERNAL.
    """
    if isinstance(error, ServingError):
        return error
    code = _CODES.get(getattr(error, "error_code", None))
    if code:
        return ServingError(code, reason(error.message or str(error)))
    return ServingError(
        grpc.StatusCode.INTERNAL,
        f"{type(error).__name__}: {reason(str(error))}",
    )
