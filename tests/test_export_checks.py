"""Each check accepts the good model and rejects one with its defect."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from clsa_tf.errors import UserError
from export.model import savedmodel_checks, warmup_requests
from tests import exports


@pytest.fixture(scope="module")
def expected(exported):
    return savedmodel_checks.examples(
        exported.encoder,
        image_size=exports.SIZE,
        crop_ratio=1.0,
        outputs=["embedding", "projection"],
    )


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the good model that a test may break."""
    shutil.copytree(exported.path, tmp_path / "1")
    return tmp_path / "1"


@pytest.mark.slow
def test_the_verifying_process_uses_the_cpu(exported, expected, monkeypatch):
    devices, call = [], subprocess.run

    def run(*arguments, **options):
        devices.append(options["env"]["CUDA_VISIBLE_DEVICES"])
        return call(*arguments, **options)

    monkeypatch.setattr(savedmodel_checks.subprocess, "run", run)
    savedmodel_checks.check_c_loader(exported.path, expected)
    assert devices == ["-1"]


LOADERS = [
    savedmodel_checks.check_clean_process,
    savedmodel_checks.check_c_loader,
]


def test_examples_are_computed_on_the_cpu():
    """Also if the process works on another device, here one that is missing."""

    class Encoder:
        def project(self, images, training=False):
            tf.config.set_soft_device_placement(False)
            try:
                return tf.zeros([len(images), 4])
            finally:
                tf.config.set_soft_device_placement(True)

        __call__ = project

    with tf.device("GPU:7"):
        found = savedmodel_checks.examples(
            Encoder(), image_size=8, crop_ratio=1.0, outputs=["embedding"]
        )
    assert len(found) == 3


def test_examples_use_every_signature(exported, expected):
    names = tf.saved_model.load(exported.path).signatures
    assert {example.signature for example in expected} == set(names)
    for example in expected:
        assert np.ptp(example.outputs["embedding"], axis=0).max() > 1e-3


@pytest.mark.parametrize("check", LOADERS)
def test_loaders_accept_the_good_model(exported, expected, check):
    check(exported.path, expected)


def with_outputs(expected, **outputs):
    """Examples whose last signature has other outputs."""
    return [*expected[:-1], expected[-1]._replace(outputs=outputs)]


def one_number_off(expected):
    """Examples with one wrong number, in the last signature checked."""
    outputs = {k: v.copy() for k, v in expected[-1].outputs.items()}
    outputs["projection"][1, 3] += 0.01
    return with_outputs(expected, **outputs)


@pytest.mark.slow
@pytest.mark.parametrize("check", LOADERS)
def test_loaders_detect_other_numbers(exported, expected, check):
    with pytest.raises(UserError, match="projection.*images_uint8") as caught:
        check(exported.path, one_number_off(expected))
    assert "VerificationError" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("check", LOADERS)
def test_loaders_detect_other_shapes(exported, expected, check):
    outputs = expected[-1].outputs
    wrong = with_outputs(
        expected, **outputs | {"embedding": outputs["embedding"][:1]}
    )
    with pytest.raises(UserError, match="embedding.*images_uint8") as caught:
        check(exported.path, wrong)
    for rows in (outputs["embedding"], outputs["embedding"][:1]):
        assert str(rows.shape) in str(caught.value)


@pytest.mark.slow
def test_nan_is_detected(exported, expected):
    outputs = {k: v.copy() for k, v in expected[-1].outputs.items()}
    outputs["projection"][1, 3] = np.nan
    wrong = with_outputs(expected, **outputs)
    with pytest.raises(UserError, match="projection.*images_uint8.*nan"):
        savedmodel_checks.check_clean_process(exported.path, wrong)


@pytest.mark.slow
def test_missing_outputs_are_detected(exported, expected):
    wrong = with_outputs(expected, embedding=expected[-1].outputs["embedding"])
    with pytest.raises(UserError, match="images_uint8.*projection"):
        savedmodel_checks.check_clean_process(exported.path, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["python", "c"])
def test_checks_work_in_an_optimizing_python(
    exported, expected, kind, tmp_path
):
    """`python -O` removes `assert` statements, but not the checks."""
    path = str(tmp_path / "examples.npz")
    for examples, status in ((expected, 0), (one_number_off(expected), 1)):
        savedmodel_checks.write_examples(path, exported.path, examples, 1e-4)
        result = subprocess.run(
            [
                *(sys.executable, "-O", "-I", "export/model/verify.py"),
                *(kind, exported.path, path),
            ],
            capture_output=True,
            text=True,
        )
        assert result.returncode == status, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("VerificationError: ")
    assert "projection" in last and "images_uint8" in last


@pytest.mark.parametrize("check", LOADERS)
def test_loaders_detect_missing_variables(copy, expected, check):
    shutil.rmtree(copy / "variables")
    with pytest.raises(UserError, match=r"\((python|c)\).* status 1: "):
        check(str(copy), expected)


def test_models_that_need_python_functions_are_detected(tmp_path, expected):
    """Such a model is not self-contained and fails in a clean process."""

    class NotSelfContained(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
        def call(self, image_bytes):
            size = tf.numpy_function(
                lambda x: np.float32([len(x)]), [image_bytes], tf.float32
            )
            size = tf.ensure_shape(size, [None])
            return {"embedding": size, "projection": size}

    model = NotSelfContained()
    signatures = {"serving_default": model.call.get_concrete_function()}
    tf.saved_model.save(model, str(tmp_path), signatures=signatures)
    for check in LOADERS:
        with pytest.raises(UserError, match=r"\((python|c)\).* status 1: "):
            check(str(tmp_path), expected[:1])


def test_the_graph_is_for_inference_and_has_its_weights_once(exported):
    savedmodel_checks.check_graph(exported.path, exported.encoder)


class Trains(tf.Module):
    """Uses batch normalisation in training mode."""

    def __init__(self, encoder):
        super().__init__()
        self.weights = encoder.variables
        self._encoder = lambda: encoder

    @tf.function(input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.float32)])
    def call(self, images):
        return {"embedding": self._encoder()(images, training=True)}


def test_a_graph_in_training_mode_is_detected(exported, tmp_path):
    module = Trains(exported.encoder)
    tf.saved_model.save(module, str(tmp_path), signatures=module.call)
    with pytest.raises(UserError, match="FusedBatchNorm"):
        savedmodel_checks.check_graph(str(tmp_path), exported.encoder)


def test_duplicate_weights_are_detected(exported, tmp_path):
    encoder = exported.encoder
    twice = tf.Module()
    twice.weights = encoder.variables
    twice.others = [tf.Variable(v) for v in encoder.variables]
    tf.saved_model.save(twice, str(tmp_path / "variables"))
    frozen = tf.Module()
    frozen.weights = encoder.variables
    constant = tf.constant(np.random.default_rng(0).random([200, 200]))
    frozen.call = tf.function(lambda x: x * constant)
    frozen.call.get_concrete_function(tf.TensorSpec([], tf.float64))
    tf.saved_model.save(frozen, str(tmp_path / "constants"))
    size = sum(v.numpy().nbytes for v in encoder.variables)
    for name in ("variables", "constants"):
        with pytest.raises(UserError, match=f"{size} bytes"):
            savedmodel_checks.check_graph(str(tmp_path / name), encoder)


def test_the_warm_up_fits_the_signatures(exported):
    savedmodel_checks.check_warmup(exported.path)
    path = os.path.join(exported.path, warmup_requests.PATH)
    requests = list(warmup_requests.read(path))
    assert len(requests) <= warmup_requests.MAX_RECORDS
    # The model can answer them.
    signatures = tf.saved_model.load(exported.path).signatures
    for request in requests:
        function = signatures[request.model_spec.signature_name]
        inputs = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
        outputs = function(**{k: tf.constant(v) for k, v in inputs.items()})
        assert np.isfinite(outputs["embedding"]).all()


def test_the_warm_up_has_the_given_batch_sizes(tmp_path):
    for sizes in ((1,), (1, 4)):
        options = {} if sizes == (1,) else {"batch_sizes": sizes}
        warmup_requests.write(str(tmp_path), image_size=8, **options)
        found = [
            request.inputs["image_bytes"].tensor_shape.dim[0].size
            for request in warmup_requests.read(
                str(tmp_path / warmup_requests.PATH)
            )
            if request.model_spec.signature_name == "serving_default"
        ]
        assert tuple(found) == sizes


def records(path):
    raw = [r.numpy() for r in tf.data.TFRecordDataset(str(path))]
    return [prediction_log_pb2.PredictionLog.FromString(r) for r in raw]


def rename_signature(logs):
    logs[0].predict_log.request.model_spec.signature_name = "default"


def rename_input(logs):
    inputs = logs[-1].predict_log.request.inputs
    inputs["pixels"].CopyFrom(inputs.pop("images"))


def change_type(logs):
    tensor = tf.make_tensor_proto(np.zeros([1, 32, 32, 3], np.float64))
    logs[-1].predict_log.request.inputs["images"].CopyFrom(tensor)


def change_rank(logs):
    tensor = tf.make_tensor_proto(np.zeros([32, 32, 3], np.float32))
    logs[-1].predict_log.request.inputs["images"].CopyFrom(tensor)


def leave_one_out(logs):
    del logs[-1]


def add_another_kind(logs):
    logs.append(prediction_log_pb2.PredictionLog())
    logs[-1].classify_log.request.model_spec.name = "x"


@pytest.mark.parametrize(
    "change, words",
    [
        (rename_signature, "record 0 .*'default'"),
        (rename_input, "record 2 .*{'pixels'}"),
        (change_type, "record 2: images .*float64"),
        (change_rank, r"record 2: images .*float32 \(32, 32, 3\)"),
        (leave_one_out, " images_uint8, serving_default;"),
        (add_another_kind, "record 3 "),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_warm_up_requests_are_detected(copy, change, words):
    path = copy / warmup_requests.PATH
    logs = records(path)
    change(logs)
    with tf.io.TFRecordWriter(str(path)) as file:
        for log in logs:
            file.write(log.SerializeToString())
    with pytest.raises(UserError, match=words):
        savedmodel_checks.check_warmup(str(copy))


def test_unreadable_warm_ups_are_detected(copy):
    path = copy / warmup_requests.PATH
    good = path.read_bytes()
    path.write_bytes(good[:-5])
    with pytest.raises(UserError, match=str(path)):
        savedmodel_checks.check_warmup(str(copy))
    with tf.io.TFRecordWriter(str(path)) as file:
        file.write(b"\xff\xff\xff not a message")
    with pytest.raises(UserError, match=f"{path}.*record 0 "):
        savedmodel_checks.check_warmup(str(copy))
    (copy / "good").write_bytes(good)
    record = records(copy / "good")[0].SerializeToString()
    with tf.io.TFRecordWriter(str(path)) as file:
        for _ in range(warmup_requests.MAX_RECORDS + 1):
            file.write(record)
    with pytest.raises(UserError, match=f"{path}.* 1000 records"):
        savedmodel_checks.check_warmup(str(copy))
    path.unlink()
    with pytest.raises(UserError, match=str(path)):
        savedmodel_checks.check_warmup(str(copy))
