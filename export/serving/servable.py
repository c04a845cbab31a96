"""One version of a model in memory: loaded, run, closed."""

import functools
import threading
import typing

import grpc
import numpy as np
import tensorflow as tf

from export.serving.errors import ServingError, as_serving_error, reason

DEFAULT_SIGNATURE = "serving_default"
_INVALID = grpc.StatusCode.INVALID_ARGUMENT


class Call(typing.NamedTuple):
    """A checked request.

    Attributes:
        run: function of `{name: array}` that returns the outputs, the same.
        key: calls of equal keys can be run as one, their inputs joined along
            the first axis; None: only alone.
        inputs: arrays by name.
        rows: their size along the first axis.
        size: their bytes.
    """

    run: typing.Callable
    key: typing.Any
    inputs: typing.Dict[str, np.ndarray]
    rows: int
    size: int


class Servable:
    """A SavedModel in a graph and a session of its own.

    TensorFlow 1's loader is the one that TensorFlow Serving uses, too: nothing
    of the Python objects that were saved comes back, and what it takes is
    freed by `close`.

    Args:
        path: directory of the SavedModel.
        intra_op: threads within an operation; 0: TensorFlow decides.
        inter_op: operations at the same time; 0: TensorFlow decides.

    Attributes:
        signatures: `SignatureDef`s by name.

    Raises:
        ServingError: it cannot be loaded.
    """

    def __init__(self, path, *, intra_op=0, inter_op=0):
        """See the class."""
        self._idle = threading.Condition()
        self._runs = 0
        self._closed = False
        options = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=intra_op,
            inter_op_parallelism_threads=inter_op,
            allow_soft_placement=True,
        )
        if not tf.config.list_physical_devices("GPU"):
            # Rewriting the graph takes longer than loading it, and on a CPU
            # gains nothing (benchmarks/README.md).
            rewrite = options.graph_options.rewrite_options
            rewrite.disable_meta_optimizer = True
        # Two versions are in memory during a swap.
        options.gpu_options.allow_growth = True
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=options)
        try:
            meta = tf.compat.v1.saved_model.load(
                self._session, [tf.saved_model.SERVING], path
            )
            graph.finalize()
            self.signatures = dict(meta.signature_def)
            self._callable = {
                name: _Signature(name, definition, graph)
                for name, definition in self.signatures.items()
                if _can_be_called(definition)
            }
        except Exception as e:  # of any class, from files that are anything
            self._session.close()
            raise _not_loaded(path, e) from e

    def prepare(self, signature, inputs, outputs=()):
        """Checks a request.

        Args:
            signature: name of one; "": `serving_default`.
            inputs: arrays by name; strings as arrays of bytes objects.
            outputs: names of those wanted; (): all.

        Returns:
            `Call`.

        Raises:
            ServingError: FAILED_PRECONDITION without such a signature,
                INVALID_ARGUMENT if inputs or outputs are not its own.
        """
        name = signature or DEFAULT_SIGNATURE
        if name not in self._callable:
            raise ServingError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f'Serving signature key "{name}" not found.',
            )
        found = self._callable[name]
        outputs = found.check_outputs(outputs)
        inputs = found.check_inputs(inputs)
        rows, key = 1, None
        if found.has_rows:
            rows = _rows(inputs)
            shapes = tuple((n, x.shape[1:]) for n, x in sorted(inputs.items()))
            key = (self, name, outputs, shapes)
        run = functools.partial(self._run, found, outputs)
        return Call(run, key, inputs, rows, sum(map(_size, inputs.values())))

    def close(self):
        """Frees the memory, once the runs in progress have ended."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._runs)
        self._session.close()
        self._callable.clear()
        self._session = None

    def _run(self, signature, outputs, inputs):
        with self._idle:
            if self._closed:
                raise ServingError(
                    grpc.StatusCode.UNAVAILABLE, "This version is unloaded."
                )
            self._runs += 1
        try:
            feed = {signature.feeds[name]: x for name, x in inputs.items()}
            fetches = [signature.fetches[name] for name in outputs]
            return dict(zip(outputs, self._session.run(fetches, feed)))
        except tf.errors.OpError as e:
            raise as_serving_error(e) from e
        except (TypeError, ValueError) as e:  # from converting the inputs
            raise ServingError(_INVALID, reason(str(e))) from e
        finally:
            with self._idle:
                self._runs -= 1
                self._idle.notify_all()


class _Signature:
    """What a `SignatureDef` asks of inputs and outputs.

    The messages are TensorFlow Serving's where it has one.
    Source: tensorflow_serving/servables/tensorflow/predict_util.cc;
    tensorflow/cc/saved_model/util.cc, GetInputValues.
    """

    def __init__(self, name, definition, graph):
        self.name = name
        self._inputs = {
            key: (tf.as_dtype(info.dtype), tf.TensorShape(info.tensor_shape))
            for key, info in definition.inputs.items()
        }
        self.feeds = _tensors(definition.inputs, graph)
        self.fetches = _tensors(definition.outputs, graph)
        shapes = [shape for _, shape in self._inputs.values()]
        shapes += [tensor.shape for tensor in self.fetches.values()]
        # Rows that are independent of each other, as far as shapes can say.
        self.has_rows = bool(self._inputs) and all(
            shape.rank is None or (shape.rank > 0 and shape[0] is None)
            for shape in shapes
        )

    def check_outputs(self, names):
        for name in names:
            if name not in self.fetches:
                raise ServingError(
                    _INVALID,
                    f"output tensor alias not found in signature: {name} "
                    f"Outputs expected to be in the set {_set(self.fetches)}.",
                )
            if names.count(name) > 1:
                raise ServingError(
                    _INVALID, f"duplicate output tensor alias: {name}"
                )
        return tuple(sorted(names or self.fetches))

    def check_inputs(self, inputs):
        extra = inputs.keys() - self._inputs.keys()
        missing = self._inputs.keys() - inputs.keys()
        if len(inputs) != len(self._inputs):
            raise ServingError(
                _INVALID,
                "input size does not match signature: "
                f"{len(inputs)}!={len(self._inputs)} len({_set(inputs)}) != "
                f"len({_set(self._inputs)}). Sent extra: {_set(extra)}. "
                f"Missing but required: {_set(missing)}.",
            )
        if extra:
            raise ServingError(
                _INVALID,
                f"input tensor alias not found in signature: {min(extra)}. "
                f"Inputs expected to be in the set {_set(self._inputs)}.",
            )
        return {
            name: _check(name, value, *self._inputs[name])
            for name, value in inputs.items()
        }


def _check(name, value, dtype, shape):
    value = np.asarray(value)
    if _is_text(dtype) and value.dtype.kind == "S":
        value = value.astype(object)
    if _is_text(dtype):
        good = value.dtype == object and all(
            isinstance(item, (bytes, str)) for item in value.flat
        )
    else:
        good = value.dtype == dtype.as_numpy_dtype
    if not good:
        kind = "string" if value.dtype.kind in "SUO" else value.dtype.name
        raise ServingError(
            _INVALID,
            f"Expects input {name} to be {dtype.name} but {kind} is provided",
        )
    if not shape.is_compatible_with(value.shape):
        raise ServingError(
            _INVALID,
            f"Expects input {name} to be of shape {_shape(shape.as_list())} "
            f"but {_shape(value.shape)} is provided",
        )
    return value


def _rows(inputs):
    """The size along the first axis, which has to be everybody's.

    Source: tensorflow_serving/batching/batching_util.h,
    ComputeTensorBatchSize.
    """
    if any(value.ndim == 0 for value in inputs.values()):
        raise ServingError(
            _INVALID,
            "Batching Run() input tensors must have at least one dimension",
        )
    rows = {len(value) for value in inputs.values()}
    if len(rows) > 1:
        raise ServingError(
            _INVALID,
            "Batching Run() input tensors must have equal 0th-dimension size",
        )
    if rows == {0}:
        raise ServingError(_INVALID, "The request has no rows; send at least 1")
    return rows.pop()


def _size(value):
    if value.dtype == object:
        return sum(map(len, value.flat)) + value.nbytes
    return value.nbytes


def _can_be_called(definition):
    """Whether it is of plain tensors; that of initialization is not."""
    tensors = [*definition.inputs.values(), *definition.outputs.values()]
    return bool(definition.outputs) and all(":" in x.name for x in tensors)


def _tensors(infos, graph):
    return {
        key: graph.get_tensor_by_name(info.name) for key, info in infos.items()
    }


def _is_text(dtype):
    return dtype == tf.string


def _set(names):
    return "{" + ",".join(sorted(names)) + "}"


def _shape(sizes):
    return f"[{','.join('?' if s is None else str(s) for s in sizes)}]"


def _not_loaded(path, error):
    if isinstance(error, tf.errors.OpError):
        found = as_serving_error(error)
    elif isinstance(error, RuntimeError):  # no graph with the tag
        found = ServingError(grpc.StatusCode.NOT_FOUND, reason(str(error)))
    elif isinstance(error, OSError):
        found = ServingError(grpc.StatusCode.DATA_LOSS, reason(str(error)))
    else:
        found = ServingError(grpc.StatusCode.UNKNOWN, reason(str(error)))
    return ServingError(found.code, f"{path}: {found.message}")
