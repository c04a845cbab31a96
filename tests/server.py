"""Processes of `export.server` for tests, and small models for them."""

import re
import signal
import subprocess
import tempfile

import grpc
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests import runs

_LINE = re.compile(
    r"serving (\S+) version (\d+): grpc (127\.0\.0\.1:\d+), "
    r"REST (http://127\.0\.0\.1:\d+)\n"
)


def command(*flags):
    """Returns the command of a server, by default on free ports."""
    return runs.command(
        "export.server", "--port=-1", "--rest_api_port=-1", *flags
    )


class ServerProcess:
    """A server that runs within a `with` statement.

    Attributes:
        grpc: host:port.
        rest: http://host:port.
    """

    def __init__(self, *flags):
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command(*flags),
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=runs.environment() | {"CUDA_VISIBLE_DEVICES": ""},
        )

    def __enter__(self):
        try:
            self.grpc, self.rest = self.next_served()[2:]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()

    def next_served(self):
        """Waits for the next model; returns name, version and addresses."""
        line = self._process.stdout.readline()
        match = _LINE.fullmatch(line)
        assert match, line + self.errors()
        return match.groups()

    def wait_for_error(self, text):
        """Waits until it has printed `text` to stderr."""
        assert runs.wait_until(lambda: text in self.errors(), self._process)

    def errors(self):
        """Returns its stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def is_alive(self):
        return self._process.poll() is None

    def send(self, number):
        self._process.send_signal(number)

    def wait(self):
        """Waits for its end; returns its exit status."""
        return self._process.wait(60)

    def end(self, number=signal.SIGTERM):
        """Asks it to end; returns its exit status."""
        self.send(number)
        return self.wait()


def request(inputs, signature="", model="default", **spec):
    """Returns a `PredictRequest` of arrays or values for arrays."""
    message = predict_pb2.PredictRequest()
    message.model_spec.name = model
    message.model_spec.signature_name = signature
    if "version" in spec:
        message.model_spec.version.value = spec["version"]
    if "label" in spec:
        message.model_spec.version_label = spec["label"]
    for name, value in inputs.items():
        message.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return message


def predict(address, message, timeout=60):
    """Sends a `PredictRequest`; returns model spec and outputs as arrays."""
    with grpc.insecure_channel(address) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        response = stub.Predict(message, timeout=timeout)
    outputs = {
        name: tf.make_ndarray(proto) for name, proto in response.outputs.items()
    }
    return response.model_spec, outputs


def outcome(server, message):
    """Returns the name of the status that answers a `PredictRequest`."""
    try:
        predict(server.grpc, message)
    except grpc.RpcError as e:
        return e.code().name
    return "OK"


class _Toy(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "seconds")])
    def wait(self, seconds):
        end = tf.timestamp() + tf.cast(tf.reduce_max(seconds), tf.float64)
        now = tf.while_loop(
            lambda now: now < end,
            lambda now: [tf.timestamp()],
            [tf.timestamp()],
        )
        with tf.control_dependencies(now):
            return {"seconds": tf.identity(seconds)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 2], tf.float32, "numbers"),
            tf.TensorSpec([None], tf.int64, "count"),
            tf.TensorSpec([None], tf.bool, "flag"),
            tf.TensorSpec([None], tf.string, "some_bytes"),
        ]
    )
    def echo(self, numbers, count, flag, some_bytes):
        return {
            "numbers": numbers + 0.0,
            "count": count + 0,
            "flag": flag ^ False,
            "some_bytes": some_bytes + "",
        }


def write_toy(path):
    """Writes a SavedModel that waits (`serving_default`) or echoes (`echo`)."""
    toy = _Toy()
    tf.saved_model.save(
        toy,
        str(path),
        signatures={"serving_default": toy.wait, "echo": toy.echo},
    )


def monitoring_flag(folder):
    """Writes a MonitoringConfig; returns the flag that names it."""
    path = folder / "monitoring.config"
    path.write_text("prometheus_config { enable: true }")
    return f"--monitoring_config_file={path}"


def models_config(**models):
    """Returns a ModelServerConfig of name -> (base path, more text)."""
    text = "".join(
        f'config {{ name: "{name}" base_path: "{path}" '
        f'model_platform: "tensorflow" {more} }}\n'
        for name, (path, more) in models.items()
    )
    return f"model_config_list {{\n{text}}}\n"
