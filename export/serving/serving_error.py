"""Errors with a status code for the client."""

import grpc

from export.messages import reason

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ServingError(Exception):
    """A request failed, or a version could not be loaded.

    Attributes:
        code: `grpc.StatusCode`.
        message: one line for the client.
        http: HTTP status, if it differs from the one for `code`.
    """

    def __init__(self, code, message, http=None):
        """See the class."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.http = http


def invalid(message):
    """Returns a `ServingError` for an invalid request."""
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def predict_only():
    """Returns the `ServingError` for Classify and Regress requests."""
    return invalid("The signatures of this model are for Predict only.")


def as_serving_error(error):
    """Converts any exception to a `ServingError`.

    TensorFlow's errors keep their code, which has the same number in gRPC.
    Other exceptions get the code INTERNAL.
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
