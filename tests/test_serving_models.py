"""Versions of models: requests, replacement, damage and configuration."""

import functools
import os
import shutil
import struct
import threading
import time
import typing

import grpc
import numpy as np
import psutil
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import model_pb2, prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2

from clsa_tf.data import headers
from clsa_tf.errors import UserError
from export.messages import reason
from export.model import warmup_requests
from export.serving import config_files
from export.serving.models import STATE as _STATE
from export.serving.models import Models
from export.serving.servable import open_version
from export.serving.serving_error import ServingError
from tests import exports

_CODE = grpc.StatusCode
_X = np.arange(6, dtype=np.float32).reshape(2, 3)


class Module(tf.Module):
    """Multiplies by a factor; reports rows that are negative."""

    def __init__(self, factor, size=1):
        super().__init__()
        self.factor = tf.Variable(float(factor))
        self.ballast = tf.Variable(tf.ones([size]))

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def serving_default(self, x):
        bad = tf.reduce_any(x < 0, axis=1)
        first = tf.argmax(tf.cast(bad, tf.int32))
        message = tf.strings.join(["row ", tf.as_string(first), " is negative"])
        check = tf.debugging.Assert(~tf.reduce_any(bad), [message])
        with tf.control_dependencies([check]):
            y = x * self.factor * self.ballast[0]
        return {"y": y, "sum": tf.reduce_sum(y, axis=1)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string),
            tf.TensorSpec([None], tf.int32),
        ]
    )
    def words(self, word, times):
        length = tf.strings.length(word) * times
        return {"length": tf.cast(length, tf.float32) * self.factor}

    @tf.function(input_signature=[tf.TensorSpec([3], tf.float32)])
    def total(self, x):
        return {"total": tf.reduce_sum(x) * self.factor}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32)])
    def count(self, to):
        """Counts slowly."""
        one = tf.reshape(tf.cast(self.factor, tf.int32), [1])
        return {
            "to": tf.while_loop(
                lambda x: tf.reduce_all(x < to),
                lambda x: (x + one,),
                (tf.zeros_like(to),),
            )[0]
        }


def write(base, number, *, size=1):
    """Publishes a version that multiplies by its number."""
    draft = base / f".draft-{number}"
    module = Module(number, size)
    names = ("serving_default", "words", "total", "count")
    tf.saved_model.save(
        module, str(draft), signatures={n: getattr(module, n) for n in names}
    )
    draft.rename(base / str(number))
    return base / str(number)


def write_warmup(version, *requests):
    """Writes warm-up records: pairs of signature and inputs, or bytes."""
    (version / "assets.extra").mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(version / warmup_requests.PATH)) as file:
        for request in requests:
            log = prediction_log_pb2.PredictionLog()
            if not isinstance(request, bytes):
                spec = log.predict_log.request
                spec.model_spec.signature_name = request[0]
                for name, value in request[1].items():
                    spec.inputs[name].CopyFrom(tf.make_tensor_proto(value))
                request = log.SerializeToString()
            file.write(request)


@pytest.fixture(scope="module")
def ready_made(tmp_path_factory):
    """Versions 1 to 3, to be copied."""
    base = tmp_path_factory.mktemp("made")
    for number in (1, 2, 3):
        write(base, number)
    return base


@pytest.fixture
def publish(ready_made, tmp_path):
    """Copies a version below a base path; returns the path of the copy."""

    def copy(number, *, model="m", source=None):
        base = tmp_path / model
        base.mkdir(exist_ok=True)
        draft = base / f"draft-{number}"
        shutil.copytree(ready_made / str(source or min(number, 3)), draft)
        draft.rename(base / str(number))
        return base / str(number)

    return copy


@pytest.fixture
def serve(tmp_path):
    """Starts `Models`, which end with the test."""
    started = []

    def start(*configs, batching=None, warm_up=True, on_event=None, **options):
        configs = configs or (config(tmp_path),)
        options = {"poll_seconds": 0.05, "retries": 0} | options
        load = functools.partial(
            open_version, batching=batching, warm_up=warm_up
        )
        on_event = on_event or (lambda *event: None)
        models = Models(list(configs), load, on_event, **options)
        started.append(models)
        models.wait()
        return models

    yield start
    for models in started:
        models.end()


def config(tmp_path, name="m", policy="latest {}", **labels):
    """A `ModelConfig`, with a version policy in text format."""
    found = model_server_config_pb2.ModelConfig(
        name=name,
        base_path=str(tmp_path / name),
        model_platform="tensorflow",
        version_labels=labels,
    )
    text_format.Parse(policy, found.model_version_policy)
    return found


class Answer(typing.NamedTuple):
    """Result of `ask`."""

    version: int
    outputs: dict


def spec(name="m", version=None, label=None):
    found = model_pb2.ModelSpec(name=name)
    if version is not None:
        found.version.value = version
    if label is not None:
        found.version_label = label
    return found


def ask(models, x=_X, signature="serving_default", outputs=(), **choice):
    inputs = x if isinstance(x, dict) else {"x": np.asarray(x, np.float32)}
    with models.pinned(spec(**choice)) as version:
        found = version.servable.run(signature, inputs, outputs)
        return Answer(version.number, found)


def statuses(models, **choice):
    return models.statuses(spec(**choice)).model_version_status


def rejected(function, *args, **options):
    with pytest.raises(ServingError) as caught:
        function(*args, **options)
    return caught.value.code, caught.value.message


def states(models, name="m"):
    return {s.version: s.state for s in statuses(models, name=name)}


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


# --- requests ---------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["single", "batched"])
def models(request, ready_made):
    """One model, version 1; without and with batching."""
    batching = (
        config_files.read_batching_parameters() if request.param else None
    )
    only = config(ready_made.parent, ready_made.name, "specific {versions: 1}")
    only.name = "m"
    models = Models(
        [only],
        functools.partial(open_version, batching=batching),
        lambda *event: None,
    )
    models.wait()
    yield models
    models.end()


@pytest.mark.parametrize("sizes", [None, [4], [2, 4]], ids=str)
def test_answers_equal_those_of_the_saved_model(exported, sizes):
    """Bit for bit where no rows are added."""
    loaded = tf.saved_model.load(exported.path)
    images = exports.noise(3)
    encoded = np.array([exports.encode(image) for image in images], object)
    requests = {
        "serving_default": {"image_bytes": encoded},
        "images": {"images": np.float32(images) / 255},
        "images_uint8": {"images": images},
    }
    batching = None
    if sizes:
        batching = config_files.read_batching_parameters()
        batching |= {"max_batch_size": 4}
        batching |= {"allowed_batch_sizes": sizes if len(sizes) > 1 else None}
    servable = open_version(exported.path, batching=batching)
    for signature, inputs in requests.items():
        found = servable.run(signature, inputs)
        run = loaded.signatures[signature]
        expected = run(**{k: tf.constant(v) for k, v in inputs.items()})
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype.as_numpy_dtype
            if sizes == [2, 4]:
                np.testing.assert_allclose(found[name], value, 1e-5, 1e-5)
            else:
                np.testing.assert_array_equal(found[name], value)


def test_a_bad_image_is_named_with_the_reason(exported):
    servable = open_version(exported.path, warm_up=False)
    good = exports.encode(exports.noise(1)[0])
    files = np.array([good, good, good[: len(good) // 2]], object)
    code, message = rejected(
        servable.run, "serving_default", {"image_bytes": files}
    )
    assert code == _CODE.INVALID_ARGUMENT
    expected = headers.reasons(headers.DEFAULT)[headers.DAMAGED]
    assert "image 2 " in message and expected in message
    assert "node" not in message and "{{" not in message


def test_outputs_can_be_chosen(models):
    assert ask(models, outputs=("sum",)).outputs.keys() == {"sum"}
    assert ask(models).outputs.keys() == {"y", "sum"}
    code, message = rejected(ask, models, outputs=("z",))
    assert code == _CODE.INVALID_ARGUMENT
    assert message == (
        "output tensor alias not found in signature: z Outputs expected to be "
        "in the set {sum,y}."
    )
    code, message = rejected(ask, models, outputs=("y", "y"))
    assert code == _CODE.INVALID_ARGUMENT and "duplicate" in message


def test_a_signature_without_rows_cannot_be_batched(ready_made):
    """It runs alone; in a batch it fails, as in TensorFlow Serving."""
    path, x = str(ready_made / "1"), {"x": np.float32([1, 2, 3])}
    assert open_version(path).run("total", x)["total"] == 6.0
    batching = config_files.read_batching_parameters()
    rejected(open_version(path, batching=batching).run, "total", x)


def test_strings_keep_their_zeros(models):
    word = np.array([b"ab\0\0", b""], object)
    times = np.array([1, 2], np.int32)
    answer = ask(models, {"word": word, "times": times}, "words")
    assert answer.outputs["length"].tolist() == [4.0, 0.0]


@pytest.mark.parametrize(
    "signature, inputs, code, expected",
    [
        (
            "nope",
            {"x": _X},
            _CODE.FAILED_PRECONDITION,
            'Serving signature key "nope" not found.',
        ),
        (
            "__saved_model_init_op",
            {},
            _CODE.OUT_OF_RANGE,  # (as in TensorFlow Serving)
            'Serving signature key "__saved_model_init_op" not found.',
        ),
        (
            "",
            {},
            _CODE.INVALID_ARGUMENT,
            "Sent extra: {}. Missing but required: {x}.",
        ),
        (
            "",
            {"x": _X, "z": _X},
            _CODE.INVALID_ARGUMENT,
            "Sent extra: {z}. Missing but required: {}.",
        ),
        (
            "",
            {"z": _X},
            _CODE.INVALID_ARGUMENT,
            "Sent extra: {z}. Missing but required: {x}.",
        ),
        (
            "",
            {"x": _X.astype(np.uint8)},
            _CODE.INVALID_ARGUMENT,
            "Expects input x to be float32 but uint8 is provided",
        ),
        (
            "",
            {"x": np.array([[b"a", b"b", b"c"]], object)},
            _CODE.INVALID_ARGUMENT,
            "Expects input x to be float32 but string is provided",
        ),
        (
            "words",
            {"word": _X[:, 0], "times": np.array([1, 2], np.int32)},
            _CODE.INVALID_ARGUMENT,
            "Expects input word to be string but float32 is provided",
        ),
        (
            "",
            {"x": _X[0]},
            _CODE.INVALID_ARGUMENT,
            "Cannot feed value of shape (3,)",
        ),
        (
            "",
            {"x": _X[:, :2]},
            _CODE.INVALID_ARGUMENT,
            "Cannot feed value of shape (2, 2)",
        ),
        (
            "",
            {"x": _X - 4},
            _CODE.INVALID_ARGUMENT,
            "row 0 is negative",
        ),
    ],
)
def test_wrong_requests_are_rejected(models, signature, inputs, code, expected):
    signature = signature or "serving_default"
    found, message = rejected(ask, models, inputs, signature)
    assert found == code
    assert expected in message
    assert ask(models).version == 1  # and nothing else happened


def test_unknown_models_versions_and_labels_are_rejected(models):
    assert rejected(ask, models, name="nope") == (
        _CODE.NOT_FOUND,
        "Servable not found for request: Latest(nope)",
    )
    assert rejected(ask, models, version=7) == (
        _CODE.NOT_FOUND,
        "Servable not found for request: Specific(m, 7)",
    )
    assert rejected(ask, models, version=0)[0] == _CODE.NOT_FOUND
    for label in ("nope", ""):
        assert rejected(ask, models, label=label) == (
            _CODE.INVALID_ARGUMENT,
            f"Unrecognized servable version label: {label}",
        )
    assert rejected(ask, models, name="")[0] == _CODE.INVALID_ARGUMENT
    assert rejected(ask, models, name="../m")[0] == _CODE.NOT_FOUND
    assert rejected(statuses, models, name="nope") == (
        _CODE.NOT_FOUND,
        "Could not find any versions of model nope",
    )
    assert rejected(statuses, models, version=7) == (
        _CODE.NOT_FOUND,
        "Could not find version 7 of model m",
    )


def test_signatures_are_listed(models):
    with models.pinned(spec()) as version:
        assert version.number == 1
        signatures = version.servable.signatures
    assert {"serving_default", "words", "total"} <= signatures.keys()
    assert signatures["serving_default"].inputs["x"].dtype == tf.float32


# --- versions ---------------------------------------------------------------


def test_a_newer_version_takes_over_until_it_is_removed(publish, serve):
    publish(1)
    models = serve()
    assert ask(models).version == 1
    newer = publish(2)
    until(lambda: ask(models).version == 2)
    np.testing.assert_array_equal(ask(models).outputs["y"], _X * 2)
    until(lambda: states(models) == {2: _STATE.AVAILABLE, 1: _STATE.END})
    assert rejected(ask, models, version=1)[0] == _CODE.NOT_FOUND
    shutil.rmtree(newer)
    until(lambda: states(models) == {2: _STATE.END, 1: _STATE.AVAILABLE})
    np.testing.assert_array_equal(ask(models).outputs["y"], _X)
    assert [s.version for s in statuses(models)] == [2, 1]
    assert all(not s.status.error_code for s in statuses(models))


@pytest.mark.parametrize("batched", [False, True])
def test_no_request_fails_while_versions_change(batched, publish, serve):
    publish(1)
    batching = config_files.read_batching_parameters() if batched else None
    models = serve(batching=batching)
    over, answers, failures = threading.Event(), [], []

    def client():
        while not over.is_set():
            try:
                answer = ask(models)
            except ServingError as e:
                failures.append(e)
                return
            expected = _X * min(answer.version, 3)
            if not np.array_equal(answer.outputs["y"], expected):
                failures.append(answer)
            answers.append(answer.version)

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for number in range(2, 6):
            publish(number)
            until(lambda n=number: n in answers[-1:] or failures)
        until(lambda: states(models)[4] == _STATE.END)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert set(answers) >= {1, 2, 3, 4, 5}


def test_a_version_is_closed_after_its_last_run(publish, serve):
    publish(1)
    models = serve()
    found = []
    to = {"to": np.array([300_000], np.int32)}
    thread = threading.Thread(
        target=lambda: found.append(ask(models, to, "count"))
    )
    thread.start()
    time.sleep(0.2)  # it runs for a second
    publish(2)
    until(lambda: states(models)[1] == _STATE.UNLOADING)
    assert not found
    thread.join(60)
    assert found[0].outputs["to"] == [300_000] and found[0].version == 1
    until(lambda: states(models)[1] == _STATE.END)


def _no_variables(path):
    shutil.rmtree(path / "variables")


def _no_data(path):
    next((path / "variables").glob("*.data*")).unlink()


def _half_of_the_data(path):
    data = next((path / "variables").glob("*.data*"))
    os.truncate(data, data.stat().st_size // 2)


def _garbage(path):
    (path / "saved_model.pb").write_bytes(b"\xff" * 1000)


def _empty_file(path):
    (path / "saved_model.pb").write_bytes(b"")


def _no_model(path):
    (path / "saved_model.pb").unlink()


def _wrong_tags(path):
    file = path / "saved_model.pb"
    file.write_bytes(file.read_bytes().replace(b"\x05serve", b"\x05other"))


def _unknown_operation(path):
    file = path / "saved_model.pb"
    data = file.read_bytes()
    assert b"StatefulPartitionedCall" in data
    file.write_bytes(
        data.replace(b"StatefulPartitionedCall", b"StatefulPartitionedMail")
    )


def _warmup_garbage(path):
    write_warmup(path)
    (path / warmup_requests.PATH).write_bytes(bytes(range(256)) * 4)


def _warmup_endless(path):
    # A length beyond the end of the file, with a correct checksum.
    write_warmup(path)
    length = struct.pack("<Q", 2**62)
    record = struct.pack("<I", _masked_crc(length))
    (path / warmup_requests.PATH).write_bytes(length + record + b"x" * 100)


def _masked_crc(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _warmup_no_log(path):
    write_warmup(path, b"\xff\xff\xff")


def _warmup_other_log(path):
    log = prediction_log_pb2.PredictionLog()
    log.classify_log.request.model_spec.name = "m"
    write_warmup(path, log.SerializeToString())


def _warmup_wrong_name(path):
    write_warmup(path, ("", {"z": _X}))


def _warmup_fails(path):
    write_warmup(path, ("", {"x": -_X}))


def _warmup_too_many(path):
    write_warmup(path, *[("", {"x": _X})] * (warmup_requests.MAX_RECORDS + 1))


@pytest.mark.parametrize(
    "damage, expected",
    [
        (_no_variables, "variables"),
        (_no_data, "variables"),
        (_half_of_the_data, "Read less bytes"),
        (_garbage, "pars"),
        (_empty_file, "serve"),
        (_no_model, "does not exist"),
        (_wrong_tags, "serve"),
        (_unknown_operation, "Mail"),
        (_warmup_garbage, "TFRecord"),
        (_warmup_endless, "TFRecord"),
        (_warmup_no_log, "record 0"),
        (_warmup_other_log, "record 0"),
        (_warmup_wrong_name, "Sent extra: {z}"),
        (_warmup_fails, "is negative"),
        (_warmup_too_many, "1000"),
    ],
)
def test_a_broken_version_is_not_served(damage, expected, publish, serve):
    publish(1)
    models = serve()
    broken = publish(2, model="elsewhere")
    damage(broken)
    broken.rename(broken.parent.parent / "m" / "2")
    until(lambda: states(models).get(2) == _STATE.END)
    newest, older = statuses(models)
    assert newest.status.error_code != 0
    assert expected in newest.status.error_message
    assert (older.version, older.state) == (1, _STATE.AVAILABLE)
    assert ask(models).version == 1
    assert rejected(ask, models, version=2)[0] == _CODE.NOT_FOUND


def ask_or_none(models, **options):
    try:
        return ask(models, **options).version
    except ServingError:
        return None


def test_a_broken_newer_version_leaves_the_older_in_service(publish, serve):
    publish(1)
    models = serve(retries=2, retry_seconds=0.05)
    broken = publish(2, model="elsewhere")
    _no_variables(broken)
    broken.rename(broken.parent.parent / "m" / "2")
    until(lambda: states(models).get(2) == _STATE.END)
    assert ask(models).version == 1
    publish(3)
    until(lambda: ask(models).version == 3)
    assert states(models)[2] == _STATE.END


def test_a_version_that_is_still_being_copied_is_retried(publish, serve):
    publish(1)
    failures = []

    def on_event(what, name, version, value):
        if what == "failed":
            failures.append((name, version))

    models = serve(retries=1000, retry_seconds=0.05, on_event=on_event)
    complete = publish(2, model="elsewhere")
    copied = complete.parent.parent / "m" / "2"
    copied.mkdir()
    shutil.copy(complete / "saved_model.pb", copied)
    until(lambda: len(failures) > 1)
    assert failures[0] == ("m", 2)
    assert states(models)[2] == _STATE.LOADING
    assert statuses(models, version=2)[0].status.error_message
    shutil.copytree(complete / "variables", copied / "variables")
    until(lambda: ask(models).version == 2)
    assert not statuses(models, version=2)[0].status.error_message


def test_an_empty_base_path_removes_versions_and_a_missing_one_does_not(
    publish, serve, tmp_path
):
    publish(1)
    warnings = []
    models = serve(on_event=lambda *event: warnings.append(event))
    (tmp_path / "m").rename(tmp_path / "gone")
    models.reconfigure([config(tmp_path)])  # returns after a poll
    assert ask(models).version == 1
    assert warnings[-1][:2] == ("warning", "m")
    (tmp_path / "m").mkdir()
    models.reconfigure([config(tmp_path)])
    assert rejected(ask, models)[0] == _CODE.NOT_FOUND  # as in TF Serving
    publish(2)
    until(lambda: ask_or_none(models) == 2)


def test_only_directories_named_by_numbers_are_versions(
    publish, serve, tmp_path
):
    publish(1)
    for name in ("draft", "2.tmp", "-2", "+2", "2_0", "²", "1e3", "0x9", " 3"):
        shutil.copytree(tmp_path / "m" / "1", tmp_path / "m" / name)
    shutil.copytree(tmp_path / "m" / "1", tmp_path / "m" / str(2**63))
    os.mkdir(os.fsencode(tmp_path) + b"/m/\xff7")
    (tmp_path / "m" / "9").write_text("a file")
    models = serve(config(tmp_path, policy="all {}"))
    assert states(models) == {1: _STATE.AVAILABLE}


def test_version_zero_and_leading_zeros_are_accepted(publish, serve, tmp_path):
    shutil.copytree(publish(1, model="x"), tmp_path / "m" / "0")
    models = serve()
    assert ask(models).version == 0
    assert ask(models, version=0).version == 0
    shutil.copytree(tmp_path / "x" / "1", tmp_path / "m" / "0003")
    until(lambda: ask(models).version == 3)


def test_versions_that_failed_are_not_retried_for_ever(tmp_path, serve):
    for number in range(1, 26):
        (tmp_path / "m" / str(number)).mkdir(parents=True)
    failed = []

    def on_event(what, name, version, value):
        failed.append(version)

    models = serve(config(tmp_path, policy="all {}"), on_event=on_event)
    for _ in range(3):
        models.wait()
    assert sorted(failed) == list(range(1, 26))


def test_errors_of_event_handlers_do_not_stop_polling(publish, serve):
    publish(1)

    def on_event(*event):
        raise BrokenPipeError("nobody reads it")

    models = serve(on_event=on_event)
    publish(2)
    until(lambda: ask_or_none(models) == 2)


@pytest.mark.parametrize(
    "policy, served",
    [
        ("latest {}", {3}),
        ("latest { num_versions: 2 }", {2, 3}),
        ("all {}", {1, 2, 3}),
        ("specific { versions: 1 versions: 3 }", {1, 3}),
        ("specific { versions: 2 versions: 7 }", {2}),
    ],
)
def test_policies_select_versions(policy, served, publish, serve, tmp_path):
    for number in (1, 2, 3):
        publish(number)
    models = serve(config(tmp_path, policy=policy))
    assert set(states(models)) == served
    for number in (1, 2, 3):
        answer = ask_or_none(models, version=number)
        assert answer == (number if number in served else None)
    assert ask(models).version == max(served)


def test_without_polling_versions_change_on_reconfiguration(
    publish, serve, tmp_path
):
    publish(1)
    once = serve(poll_seconds=0)
    assert ask(once).version == 1
    publish(2)
    time.sleep(0.3)
    assert ask(once).version == 1
    once.reconfigure([config(tmp_path)])
    assert ask(once).version == 2


def test_a_model_may_get_its_first_version_later(publish, serve, tmp_path):
    publish(1)
    models = serve(config(tmp_path), config(tmp_path, "later"))
    assert ask(models).version == 1
    assert rejected(statuses, models, name="later")[0] == _CODE.NOT_FOUND
    publish(1, model="later")
    until(lambda: ask_or_none(models, name="later") == 1)


# --- warm-up ----------------------------------------------------------------


def test_versions_are_warmed_up_before_they_serve(tmp_path):
    version = write(tmp_path, 1)
    write_warmup(
        version,
        ("total", {"x": _X[0]}),
        ("", {"x": _X}),
        ("serving_default", {"x": -_X}),
    )
    with pytest.raises(ServingError, match="is negative"):
        open_version(str(version))
    open_version(str(version), warm_up=False).close()


# --- labels and other configurations ----------------------------------------


def test_labels_name_versions(publish, serve, tmp_path):
    for number in (1, 2, 3):
        publish(number)
    every = functools.partial(config, tmp_path, policy="all {}")
    models = serve(every())
    models.reconfigure([every(stable=1, canary=3)])
    assert ask(models, label="stable").version == 1
    assert ask(models, label="canary").version == 3
    # (TensorFlow Serving, too, lists all versions then.)
    assert [s.version for s in statuses(models, label="stable")] == [3, 2, 1]
    models.reconfigure([every(stable=2)])
    assert ask(models, label="stable").version == 2
    assert rejected(ask, models, label="canary")[0] == _CODE.INVALID_ARGUMENT


def test_labels_of_unavailable_versions_need_a_flag(publish, serve, tmp_path):
    publish(1)
    labelled = config(tmp_path, canary=2)
    with pytest.raises(UserError, match="'canary'.*'m'.* 2;"):
        serve(labelled)
    # As in TensorFlow Serving: no version is available yet at the start.
    with pytest.raises(UserError, match="--allow_version_labels"):
        serve(config(tmp_path, stable=1))
    models = serve()
    with pytest.raises(UserError, match="'canary'.*'m'.* 2;"):
        models.reconfigure([labelled])
    assert rejected(ask, models, label="canary")[0] == _CODE.INVALID_ARGUMENT
    models = serve(labelled, allow_unavailable_labels=True)
    assert rejected(ask, models, label="canary") == (
        _CODE.NOT_FOUND,
        "Servable not found for request: Specific(m, 2)",
    )
    publish(2)
    until(lambda: ask_or_none(models, label="canary") == 2)


def test_a_label_in_use_does_not_move_to_an_unloaded_version(
    publish, serve, tmp_path
):
    publish(1)
    models = serve(config(tmp_path, stable=1), allow_unavailable_labels=True)
    publish(2)
    later = config(tmp_path, policy="specific { versions: 2 }", stable=3)
    with pytest.raises(UserError, match="'stable'.*'m'.* 3;"):
        models.reconfigure([later])
    assert ask(models, label="stable").version == 1  # and nothing else moved


def test_models_can_be_added_and_removed(publish, serve, tmp_path):
    publish(1)
    publish(2, model="other")
    publish(3, model="guest")
    models = serve()
    models.reconfigure([config(tmp_path), config(tmp_path, "guest")])
    assert ask(models, name="guest").version == 3
    models.reconfigure([config(tmp_path), config(tmp_path, "other")])
    assert states(models, "guest") == {3: _STATE.END}
    assert ask(models, name="other").version == 2
    assert ask(models).version == 1
    models.reconfigure([config(tmp_path, "other")])
    assert rejected(ask, models)[0] == _CODE.NOT_FOUND
    assert ask(models, name="other").version == 2
    models.reconfigure([config(tmp_path), config(tmp_path, "other")])
    assert ask(models).version == 1


def test_policies_and_paths_can_change(publish, serve, tmp_path):
    publish(1)
    publish(2)
    publish(2, model="elsewhere", source=3)
    models = serve()
    assert ask(models).version == 2
    models.reconfigure([config(tmp_path, policy="specific { versions: 1 }")])
    until(lambda: ask(models).version == 1)
    until(lambda: states(models)[2] == _STATE.END)
    moved = config(tmp_path)
    moved.base_path = str(tmp_path / "elsewhere")
    models.reconfigure([moved])
    until(lambda: ask(models).version == 2)
    # The same number elsewhere is the same version, as in TensorFlow Serving.
    models.reconfigure([config(tmp_path)])
    assert ask(models).version == 2
    np.testing.assert_array_equal(ask(models).outputs["y"], _X * 3)


def test_model_configs_are_read(tmp_path):
    path = tmp_path / "models.config"
    path.write_text(
        """
        model_config_list {
          config { name: "a" base_path: "/a" model_platform: "tensorflow" }
          config {
            name: "b" base_path: "gs://bucket/b" model_platform: "tensorflow"
            model_version_policy { specific { versions: 1 versions: 4 } }
            version_labels { key: "stable" value: 1 }
            version_labels { key: "canary" value: 4 }
          }
          config {
            name: "c" base_path: "/c" model_type: TENSORFLOW
            model_version_policy { all {} }
          }
          config {
            name: "d" base_path: "/d" model_platform: "tensorflow"
            model_version_policy { latest { num_versions: 3 } }
          }
        }
        """
    )
    found = config_files.read_model_configs(path)
    assert [one.name for one in found] == ["a", "b", "c", "d"]
    assert found[1].base_path == "gs://bucket/b"
    assert found[1].version_labels == {"stable": 1, "canary": 4}
    wanted = [config_files.wanted_versions(one, [9, 4, 1, 7]) for one in found]
    assert wanted == [[9], [1, 4], [1, 4, 7, 9], [4, 7, 9]]


@pytest.mark.parametrize(
    "text, values",
    [
        ("", "model_config_list"),
        ("custom_model_config {}", "custom_model_config"),
        ("model_config_list { config { nam: 'a' } }", "ModelServerConfig"),
        ("{", "ModelServerConfig"),
        ("model_config_list { config { base_path: '/a' P } }", "name.* '';"),
        (
            "model_config_list { config { name: 'a/b' base_path: '/' P }}",
            "'a/b'",
        ),
        (
            "model_config_list { config { name: 'a' base_path: 'b' P }}",
            "'a'.* 'b';",
        ),
        (
            "model_config_list { config { name: 'a' base_path: '/a' } }",
            "model_platform 'tensorflow'.*'a'.* '';",
        ),
        (
            "model_config_list { config { name: 'a' base_path: '/a' "
            "model_platform: 'sklearn' } }",
            "sklearn",
        ),
        (
            "model_config_list { config { name: 'a' base_path: '/a' P } "
            "config { name: 'a' base_path: '/b' P } }",
            "'a' ",
        ),
        (
            "model_config_list { config { name: 'a' base_path: '/a' P "
            "model_version_policy { specific {} } } }",
            "specific.*'a'",
        ),
    ],
)
def test_wrong_model_configs_are_rejected(text, values, tmp_path):
    path = tmp_path / "models.config"
    path.write_text(text.replace(" P", " model_platform: 'tensorflow'"))
    with pytest.raises(UserError, match=values):
        config_files.read_model_configs(path)


# --- messages of TensorFlow -------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "Graph execution error:\n\nassertion failed: [row 3 is bad]\n\t "
            "[[{{node Assert/AssertGuard/Assert}}]]",
            "row 3 is bad",
        ),
        (
            "Graph execution error:\n\n2 root error(s) found.\n  (0) "
            "INVALID_ARGUMENT: assertion failed: [row] [0]\n\t [[{{node a}}]]"
            "\n\t [[b/_7]]\n  (1) INVALID_ARGUMENT: assertion failed: [row] [0]"
            "\n\t [[{{node a}}]]\n0 successful operations.\n0 derived errors "
            "ignored.",
            "row 0",
        ),
        (
            "Matrix size-incompatible: In[0]: [2,4], In[1]: [3,2]\n\t [[{{node "
            "x/MatMul}}]] [Op:__inference_f_1]\n\nDetected at node 'x' defined "
            "at (most recent call last):\n  File 'a.py'",
            "Matrix size-incompatible: In[0]: [2,4], In[1]: [3,2]",
        ),
        (
            "Graph execution error:\n\nDetected at node 'b/BatchFunction' "
            "defined at (most recent call last):\n    File 'a.py', line 7\n"
            "Node: 'b/BatchFunction'\nTask size 36 is larger than 32\n\t "
            "[[{{node b/BatchFunction}}]]",
            "Task size 36 is larger than 32",
        ),
        ("", "no reason given"),
    ],
)
def test_reasons_survive_without_the_names_of_nodes(text, expected):
    assert reason(text) == expected


# --- memory -----------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_flat_over_swaps_and_requests(tmp_path, serve):
    base = tmp_path / "m"
    base.mkdir()
    size = 5_000_000  # 20 MB a version
    write(base, 1, size=size)
    models = serve(batching=config_files.read_batching_parameters())
    process, resident = psutil.Process(), []
    for number in range(2, 28):
        shutil.copytree(base / str(number - 1), base / f"draft-{number}")
        (base / f"draft-{number}").rename(base / str(number))
        until(lambda n=number: states(models).get(n - 1) == _STATE.END)
        shutil.rmtree(base / str(number - 1))
        for _ in range(200):
            ask(models)
        rejected(ask, models, -_X - 1)
        resident.append(process.memory_info().rss / 1e6)
    print([round(megabytes) for megabytes in resident])
    # The first swaps fill pools that are kept.
    assert max(resident[-5:]) < max(resident[4:8]) + 15
