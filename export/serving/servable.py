"""A loaded version of a model: load, warm up, run, close."""

import concurrent.futures
import os

import grpc
import tensorflow as tf

from clsa_tf.files import export_written_by
from export.model import warmup_requests
from export.serving.serving_error import ServingError, as_serving_error, invalid
from export.serving.tensor_proto import to_array

DEFAULT_SIGNATURE = tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY
_INITIALIZER = "__saved_model_init_op"  # not callable
_MAX_WARMUP_BYTES = 2**30  # per tensor


def open_version(path, *, warm_up=True, **options):
    """Loads a `Servable` and runs its warm-up requests.

    Args:
        path: directory of the SavedModel.
        warm_up: whether to run the warm-up requests.
        **options: see `Servable`.

    Returns:
        `Servable`.

    Raises:
        ServingError: it cannot be loaded, or a warm-up request is invalid or
            fails.

    Source: tensorflow_serving/servables/tensorflow/saved_model_warmup_util.cc
    """
    servable = Servable(path, **options)

    def run(request):
        inputs = {
            name: to_array(proto, name, max_bytes=_MAX_WARMUP_BYTES)
            for name, proto in request.inputs.items()
        }
        name = request.model_spec.signature_name or DEFAULT_SIGNATURE
        servable.run(name, inputs, request.output_filter)

    requests = os.path.join(path, warmup_requests.PATH)
    try:
        if warm_up and tf.io.gfile.exists(requests):
            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(run, warmup_requests.read(requests)))
    except Exception as e:  # any class: the file may be damaged
        servable.close()
        error = as_serving_error(e)
        message = f"warm-up with {requests} failed: {error.message}"
        raise ServingError(error.code, _with_version(path, message)) from e
    return servable


class Servable:
    """A SavedModel in its own graph and session.

    It uses TensorFlow 1's loader, as TensorFlow Serving does. This loader does
    not restore Python objects, and `close` frees all memory.

    Args:
        path: directory of the SavedModel.
        batching: result of `config_files.read_batching_parameters`; None: no
            batching.
        intra_op: threads within an operation; 0: TensorFlow decides.
        inter_op: operations at the same time; 0: TensorFlow decides.

    Attributes:
        signatures: `SignatureDef`s by name.

    Raises:
        ServingError: it cannot be loaded.
    """

    def __init__(self, path, *, batching=None, intra_op=0, inter_op=0):
        """See the class."""
        options = tf.compat.v1.ConfigProto(
            intra_op_parallelism_threads=intra_op,
            inter_op_parallelism_threads=inter_op,
            allow_soft_placement=True,
        )
        if not tf.config.list_physical_devices("GPU"):
            # On a CPU graph optimization takes longer than loading and does
            # not speed up requests (benchmarks/README.md).
            rewrite = options.graph_options.rewrite_options
            rewrite.disable_meta_optimizer = True
        # While versions are swapped, both are in memory.
        options.gpu_options.allow_growth = True
        graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=graph, config=options)
        try:
            meta = tf.compat.v1.saved_model.load(
                self._session, [tf.saved_model.SERVING], path
            )
            self.signatures = dict(meta.signature_def)
            definition = graph.as_graph_def() if batching else None
            self._calls = {
                name: _Signature(signature, graph, definition, batching)
                for name, signature in self.signatures.items()
                if name != _INITIALIZER
            }
            graph.finalize()
        except Exception as e:  # any class: files may be damaged
            self._session.close()
            error = as_serving_error(e)
            message = _with_version(path, f"{path}: {error.message}")
            raise ServingError(error.code, message) from e

    def run(self, name, inputs, outputs=()):
        """Runs a signature; thread-safe.

        Args:
            name: name of the signature.
            inputs: arrays by name; strings as arrays of `bytes` objects.
            outputs: names of the outputs to return; (): all.

        Returns:
            arrays by name.

        Raises:
            ServingError: the signature, an input or an output does not exist,
                or the run fails.
        """
        if name not in self._calls:
            message = f'Serving signature key "{name}" not found.'
            code = (
                "FAILED_PRECONDITION"
                if name != _INITIALIZER
                else "OUT_OF_RANGE"
            )
            raise ServingError(grpc.StatusCode[code], message)
        signature = self._calls[name]
        fetches = signature.fetches(outputs)
        try:
            return self._session.run(fetches, signature.feed(inputs))
        except tf.errors.OpError as e:
            raise as_serving_error(e) from e
        except (TypeError, ValueError) as e:  # inputs cannot be converted
            raise invalid(as_serving_error(e).message) from e

    def close(self):
        """Frees the memory; no request may run any more."""
        self._session.close()
        self._session = self._calls = None


class _Signature:
    """The inputs and outputs of a `SignatureDef`.

    Source: tensorflow/cc/saved_model/util.cc, GetInputValues;
    tensorflow_serving/servables/tensorflow/predict_util.cc.
    """

    def __init__(self, signature, graph, definition, batching):
        self._inputs = _tensors(signature.inputs, graph)
        self._outputs = _tensors(signature.outputs, graph)
        if batching and self._inputs:
            self._outputs = _batched(
                definition, self._inputs, self._outputs, batching
            )

    def fetches(self, names):
        for name in names:
            if name not in self._outputs:
                raise invalid(
                    f"output tensor alias not found in signature: {name} "
                    f"Outputs expected to be in the set {_set(self._outputs)}."
                )
            if list(names).count(name) > 1:
                raise invalid(f"duplicate output tensor alias: {name}")
        return {name: self._outputs[name] for name in names or self._outputs}

    def feed(self, inputs):
        extra = inputs.keys() - self._inputs.keys()
        missing = self._inputs.keys() - inputs.keys()
        if extra or missing:
            raise invalid(
                f"input size does not match signature. Sent extra: "
                f"{_set(extra)}. Missing but required: {_set(missing)}."
            )
        return {
            tensor: _check_dtype(name, inputs[name], tensor)
            for name, tensor in self._inputs.items()
        }


def _check_dtype(name, value, tensor):
    expected = tensor.dtype.base_dtype
    received = tf.as_dtype(value.dtype)
    if received != expected:
        raise invalid(
            f"Expects input {name} to be {expected.name} but {received.name} "
            "is provided"
        )
    return value


def _batched(definition, inputs, outputs, batching):
    """Returns outputs that are computed for batches of several requests.

    The scheduler is the same as in TensorFlow Serving.

    Args:
        definition: the `GraphDef`; the session finds variables by name.
        inputs: tensors by name.
        outputs: tensors by name.
        batching: result of `config_files.read_batching_parameters`.
    """
    subgraph = tf.compat.v1.graph_util.extract_sub_graph(
        definition, [tensor.op.name for tensor in outputs.values()]
    )

    @tf.nondifferentiable_batch_function(
        **batching, autograph=False, enable_large_batch_splitting=False
    )
    def run(*tensors):
        return tf.graph_util.import_graph_def(
            subgraph,
            {old.name: new for old, new in zip(inputs.values(), tensors)},
            [tensor.name for tensor in outputs.values()],
            name="",
        )

    with next(iter(inputs.values())).graph.as_default():
        return dict(zip(outputs, run(*inputs.values())))


def _with_version(path, message):
    """Appends which version wrote an export, if that is recorded."""
    written = export_written_by(path)
    return f"{message.rstrip('.')}.{written}" if written else message


def _tensors(infos, graph):
    return {
        key: graph.get_tensor_by_name(info.name) for key, info in infos.items()
    }


def _set(names):
    return "{" + ",".join(sorted(names)) + "}"
