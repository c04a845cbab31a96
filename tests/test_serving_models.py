"""Versions of models: loaded, asked, replaced, broken."""

import asyncio
import os
import shutil
import struct
import threading
import time

import grpc
import numpy as np
import psutil
import pytest
import tensorflow as tf
from tensorflow_serving.apis import get_model_status_pb2, prediction_log_pb2

from clsa_tf.errors import UserError
from export.model import warmup
from export.serving import settings
from export.serving.errors import ServingError, reason
from export.serving.models import Models
from export.serving.servable import Servable
from export.serving.settings import BatchingParameters, ModelConfig
from export.serving.warmup import warm_up
from tests import exports

_STATE = get_model_status_pb2.ModelVersionStatus
_CODE = grpc.StatusCode
_X = np.arange(6, dtype=np.float32).reshape(2, 3)


class Module(tf.Module):
    """Multiplies by a factor; says so of rows that are negative.

    It fails when it is given `limit` rows.
    """

    def __init__(self, factor, size=1, limit=1000):
        super().__init__()
        self.limit = limit
        self.factor = tf.Variable(float(factor))
        self.ballast = tf.Variable(tf.ones([size]))

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def serving_default(self, x):
        bad = tf.reduce_any(x < 0, axis=1)
        first = tf.argmax(tf.cast(bad, tf.int32))
        message = tf.strings.join(["row ", tf.as_string(first), " is negative"])
        check = tf.debugging.Assert(~tf.reduce_any(bad), [message])
        few = tf.debugging.assert_less(tf.shape(x)[0], self.limit)
        with tf.control_dependencies([check, few]):
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
        """Takes its time."""
        one = tf.reshape(tf.cast(self.factor, tf.int32), [1])
        return {
            "to": tf.while_loop(
                lambda x: tf.reduce_all(x < to),
                lambda x: (x + one,),
                (tf.zeros_like(to),),
            )[0]
        }


def write(base, number, *, size=1, limit=1000):
    """Publishes a version, one that multiplies by its number."""
    draft = base / f".draft-{number}"
    module = Module(number, size, limit)
    names = ("serving_default", "words", "total", "count")
    tf.saved_model.save(
        module, str(draft), signatures={n: getattr(module, n) for n in names}
    )
    draft.rename(base / str(number))
    return base / str(number)


def write_warmup(version, *requests):
    """Puts records there: pairs of a signature and its inputs, or bytes."""
    (version / "assets.extra").mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(version / warmup.PATH)) as file:
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
    """Copies of a version below a base path; returns that of the copy."""

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
    """Starts `Models` that are stopped at the end."""
    started = []

    def start(*configs, **options):
        configs = configs or (config(tmp_path),)
        options = {"poll_seconds": 0.05, "retries": 0} | options
        models = Models(list(configs), **options)
        started.append(models)
        models.start()
        return models

    yield start
    for models in started:
        models.stop(10.0)


def config(tmp_path, name="m", **options):
    return ModelConfig(name, str(tmp_path / name), **options)


def ask(models, x=_X, signature="", name="m", **options):
    inputs = x if isinstance(x, dict) else {"x": np.asarray(x, np.float32)}
    return asyncio.run(models.predict(name, signature, inputs, **options))


def refusal(function, *args, **options):
    with pytest.raises(ServingError) as caught:
        function(*args, **options)
    return caught.value.code, caught.value.message


def states(models, name="m"):
    return {s.version: s.state for s in models.statuses(name)}


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


# --- requests ---------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[None, BatchingParameters(max_batch_size=2)],
    ids=["single", "batched"],
)
def models(request, ready_made):
    """One model, version 1; without and with batching."""
    only = ModelConfig("m", str(ready_made), versions=(1,))
    models = Models([only], batching=request.param)
    models.start()
    yield models
    models.stop(10.0)


def test_the_answer_is_that_of_the_saved_model(exported, serve):
    loaded = tf.saved_model.load(exported.path)
    images = exports.noise(3)
    encoded = np.array([exports.encode(image) for image in images], object)
    requests = {
        "": {"image_bytes": encoded},
        "images": {"images": np.float32(images) / 255},
        "images_uint8": {"images": images},
    }
    sizes = BatchingParameters(max_batch_size=4, allowed_batch_sizes=(2, 4))
    for batching in (None, sizes):
        models = serve(
            ModelConfig("encoder", str(exported.base)),
            batching=batching,
            warmup=False,
        )
        for signature, inputs in requests.items():
            found = ask(models, inputs, signature, "encoder")
            run = loaded.signatures[signature or "serving_default"]
            expected = run(**{k: tf.constant(v) for k, v in inputs.items()})
            assert found.version == 1
            assert found.outputs.keys() == expected.keys()
            for name, value in expected.items():
                assert found.outputs[name].dtype == value.dtype.as_numpy_dtype
                np.testing.assert_allclose(
                    found.outputs[name], value, rtol=1e-5, atol=1e-5
                )


def test_a_bad_image_is_named_with_the_reason(exported, serve):
    models = serve(
        ModelConfig("encoder", str(exported.base)),
        batching=BatchingParameters(),
    )
    good = exports.encode(exports.noise(1)[0])
    files = np.array([good, good, good[: len(good) // 2]], object)
    code, message = refusal(ask, models, {"image_bytes": files}, "", "encoder")
    assert code == _CODE.INVALID_ARGUMENT
    assert "image 2" in message and "damaged" in message
    assert "node" not in message and "{{" not in message
    # In the second piece of a request that is larger than a batch.
    files = np.array([good] * 40 + [b"text"], object)
    _, message = refusal(ask, models, {"image_bytes": files}, "", "encoder")
    assert "image 40" in message and "JPEG" in message


def test_outputs_can_be_chosen(models):
    assert ask(models, outputs=("sum",)).outputs.keys() == {"sum"}
    assert ask(models).outputs.keys() == {"y", "sum"}
    code, message = refusal(ask, models, outputs=("z",))
    assert code == _CODE.INVALID_ARGUMENT
    assert message == (
        "output tensor alias not found in signature: z Outputs expected to be "
        "in the set {sum,y}."
    )
    code, message = refusal(ask, models, outputs=("y", "y"))
    assert code == _CODE.INVALID_ARGUMENT and "duplicate" in message


def test_a_signature_without_rows_is_run_as_it_is(models):
    answer = ask(models, [1, 2, 3], "total")
    assert answer.outputs["total"] == 6.0


def test_strings_keep_their_zeros(models):
    word = np.array([b"ab\0\0", b""], object)
    times = np.array([1, 2], np.int32)
    answer = ask(models, {"word": word, "times": times}, "words")
    assert answer.outputs["length"].tolist() == [4.0, 0.0]


@pytest.mark.parametrize(
    "signature, inputs, code, said",
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
            _CODE.FAILED_PRECONDITION,
            'Serving signature key "__saved_model_init_op" not found.',
        ),
        (
            "",
            {},
            _CODE.INVALID_ARGUMENT,
            "input size does not match signature: 0!=1 len({}) != len({x}). "
            "Sent extra: {}. Missing but required: {x}.",
        ),
        (
            "",
            {"x": _X, "z": _X},
            _CODE.INVALID_ARGUMENT,
            "input size does not match signature: 2!=1 len({x,z}) != len({x})."
            " Sent extra: {z}. Missing but required: {}.",
        ),
        (
            "",
            {"z": _X},
            _CODE.INVALID_ARGUMENT,
            "input tensor alias not found in signature: z. Inputs expected to "
            "be in the set {x}.",
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
            "words",
            {
                "word": np.array([b"a", 7], object),
                "times": np.array([1, 2], np.int32),
            },
            _CODE.INVALID_ARGUMENT,
            "Expects input word to be string but string is provided",
        ),
        (
            "",
            {"x": _X[0]},
            _CODE.INVALID_ARGUMENT,
            "Expects input x to be of shape [?,3] but [3] is provided",
        ),
        (
            "",
            {"x": _X[:, :2]},
            _CODE.INVALID_ARGUMENT,
            "Expects input x to be of shape [?,3] but [2,2] is provided",
        ),
        ("", {"x": _X[:0]}, _CODE.INVALID_ARGUMENT, "no rows"),
        (
            "words",
            {
                "word": np.array([b"a"], object),
                "times": np.array([1, 2], np.int32),
            },
            _CODE.INVALID_ARGUMENT,
            "equal 0th-dimension size",
        ),
        (
            "",
            {"x": _X - 4},
            _CODE.INVALID_ARGUMENT,
            "row 0 is negative",
        ),
    ],
)
def test_wrong_requests_are_refused(models, signature, inputs, code, said):
    found, message = refusal(ask, models, inputs, signature)
    assert found == code
    assert said in message
    assert ask(models).version == 1  # and nothing else happened


def test_unknown_models_versions_and_labels(models):
    assert refusal(ask, models, name="nope") == (
        _CODE.NOT_FOUND,
        "Servable not found for request: Latest(nope)",
    )
    assert refusal(ask, models, version=7) == (
        _CODE.NOT_FOUND,
        "Servable not found for request: Specific(m, 7)",
    )
    assert refusal(ask, models, version=0)[0] == _CODE.NOT_FOUND
    for label in ("nope", ""):
        assert refusal(ask, models, label=label) == (
            _CODE.INVALID_ARGUMENT,
            f"Unrecognized servable version label: {label}",
        )
    assert refusal(ask, models, name="")[0] == _CODE.INVALID_ARGUMENT
    assert refusal(ask, models, name="../m")[0] == _CODE.NOT_FOUND
    assert refusal(models.statuses, "nope") == (
        _CODE.NOT_FOUND,
        "Could not find any versions of model nope",
    )
    assert refusal(models.statuses, "m", version=7) == (
        _CODE.NOT_FOUND,
        "Could not find version 7 of model m",
    )
    assert refusal(models.signatures, "nope")[0] == _CODE.NOT_FOUND


def test_signatures_are_told(models):
    version, signatures = models.signatures("m")
    assert version == 1
    assert {"serving_default", "words", "total"} <= signatures.keys()
    assert signatures["serving_default"].inputs["x"].dtype == tf.float32


def test_many_mixed_requests_of_which_one_is_poisoned(publish, serve):
    publish(1)
    models = serve(batching=BatchingParameters(max_enqueued_batches=1000))
    rng = np.random.default_rng(0)
    sent = [
        np.float32(rng.uniform(0, 9, [rng.integers(1, 70), 3]))
        for _ in range(200)
    ]
    sent[77][1:, 2] = -1
    assert len(sent[77]) > 1
    wanted = [("y",), ("sum", "y"), ()]

    async def clients():
        return await asyncio.gather(
            *(
                models.predict("m", "", {"x": x}, outputs=wanted[n % 3])
                for n, x in enumerate(sent)
            ),
            return_exceptions=True,
        )

    found = asyncio.run(clients())
    assert found[77].code == _CODE.INVALID_ARGUMENT
    assert "row 1 is negative" in found[77].message
    for number, (x, answer) in enumerate(zip(sent, found)):
        if number != 77:
            names = set(wanted[number % 3]) or {"y", "sum"}
            assert answer.outputs.keys() == names
            np.testing.assert_array_equal(answer.outputs["y"], x)


def test_what_is_in_the_queue_is_bounded(publish, serve):
    publish(1)
    parameters = BatchingParameters(max_batch_size=4, max_enqueued_batches=2)
    models = serve(batching=parameters)

    async def clients():
        return await asyncio.gather(
            *(models.predict("m", "", {"x": _X}) for _ in range(300)),
            return_exceptions=True,
        )

    found = asyncio.run(clients())
    codes = {getattr(answer, "code", None) for answer in found}
    assert codes == {None, _CODE.UNAVAILABLE}
    assert ask(models).version == 1
    many = np.ones([9, 3], np.float32)
    assert refusal(ask, models, many)[0] == _CODE.INVALID_ARGUMENT


# --- versions ---------------------------------------------------------------


def test_a_newer_version_takes_over_and_is_taken_back(publish, serve):
    publish(1)
    models = serve()
    assert ask(models).version == 1
    newer = publish(2)
    until(lambda: ask(models).version == 2)
    np.testing.assert_array_equal(ask(models).outputs["y"], _X * 2)
    until(lambda: states(models) == {2: _STATE.AVAILABLE, 1: _STATE.END})
    assert refusal(ask, models, version=1)[0] == _CODE.NOT_FOUND
    shutil.rmtree(newer)
    until(lambda: states(models) == {2: _STATE.END, 1: _STATE.AVAILABLE})
    np.testing.assert_array_equal(ask(models).outputs["y"], _X)
    assert [s.version for s in models.statuses("m")] == [2, 1]
    assert all(not s.status.error_code for s in models.statuses("m"))


@pytest.mark.parametrize("batching", [None, BatchingParameters()])
def test_no_request_fails_while_versions_change(batching, publish, serve):
    publish(1)
    models = serve(batching=batching)
    over, answers, failures = threading.Event(), [], []

    async def client():
        while not over.is_set():
            try:
                answer = await models.predict("m", "", {"x": _X})
            except ServingError as e:
                failures.append(e)
                return
            expected = _X * min(answer.version, 3)
            if not np.array_equal(answer.outputs["y"], expected):
                failures.append(answer)
            answers.append(answer.version)

    async def clients():
        await asyncio.gather(*(client() for _ in range(8)))

    thread = threading.Thread(target=lambda: asyncio.run(clients()))
    thread.start()
    try:
        for number in range(2, 6):
            publish(number)
            until(lambda n=number: n in answers[-1:] or failures)
        shutil.rmtree(publish(6).parent / "6")
        until(lambda: states(models)[4] == _STATE.END)
    finally:
        over.set()
        thread.join(60)
    assert failures == []
    assert set(answers) >= {1, 2, 3, 4, 5}


def test_a_version_is_closed_after_its_last_run(ready_made):
    servable = Servable(str(ready_made / "1"))
    call = servable.prepare("count", {"to": np.array([300_000], np.int32)})
    found = []
    thread = threading.Thread(
        target=lambda: found.append(call.run(call.inputs))
    )
    thread.start()
    time.sleep(0.2)  # so that it runs: that takes a second
    servable.close()
    thread.join(60)
    assert found[0]["to"] == [300_000]
    with pytest.raises(ServingError, match="unloaded"):
        call.run(call.inputs)


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
    (path / warmup.PATH).write_bytes(bytes(range(256)) * 4)


def _warmup_endless(path):
    # A length that is more than there is, with the right checksum.
    write_warmup(path)
    length = struct.pack("<Q", 2**62)
    record = struct.pack("<I", _masked_crc(length))
    (path / warmup.PATH).write_bytes(length + record + b"x" * 100)


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
    write_warmup(path, *[("", {"x": _X})] * (warmup.MAX_RECORDS + 1))


@pytest.mark.parametrize(
    "damage, said",
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
        (_warmup_wrong_name, "alias"),
        (_warmup_fails, "is negative"),
        (_warmup_too_many, "1000"),
    ],
)
def test_a_broken_version_is_not_served(damage, said, publish, serve, tmp_path):
    publish(1)
    broken = publish(2, model="elsewhere")
    damage(broken)
    broken.rename(tmp_path / "m" / "2")
    models = serve()
    newest, older = models.statuses("m")
    assert (newest.version, newest.state) == (2, _STATE.END)
    assert newest.status.error_code != 0
    assert said in newest.status.error_message
    # The server was started with both, and has to serve something.
    assert (older.version, older.state) == (1, _STATE.AVAILABLE)
    assert ask(models).version == 1
    assert refusal(ask, models, version=2)[0] == _CODE.NOT_FOUND


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
    assert models.ready
    publish(3)
    until(lambda: ask(models).version == 3)
    assert states(models)[2] == _STATE.END


def test_a_version_that_is_still_being_copied_is_tried_again(publish, serve):
    publish(1)
    failures = []

    def on_event(name, labels, value):
        if name == "load_failures":
            failures.append(labels)

    models = serve(retries=1000, retry_seconds=0.05, on_event=on_event)
    complete = publish(2, model="elsewhere")
    copied = complete.parent.parent / "m" / "2"
    copied.mkdir()
    shutil.copy(complete / "saved_model.pb", copied)
    until(lambda: len(failures) > 1)
    assert failures[0] == {"model": "m", "version": "2"}
    assert states(models)[2] == _STATE.LOADING
    assert models.statuses("m", version=2)[0].status.error_message
    shutil.copytree(complete / "variables", copied / "variables")
    until(lambda: ask(models).version == 2)
    assert not models.statuses("m", version=2)[0].status.error_message


def test_what_is_served_survives_an_empty_base_path(publish, serve, tmp_path):
    publish(1)
    models = serve()
    (tmp_path / "m").rename(tmp_path / "gone")
    models.reconfigure([config(tmp_path)])  # returns when it has looked
    assert ask(models).version == 1
    (tmp_path / "m").mkdir()
    models.reconfigure([config(tmp_path)])
    assert ask(models).version == 1
    publish(2)
    until(lambda: ask(models).version == 2)


def test_only_directories_named_by_numbers_are_versions(
    publish, serve, tmp_path
):
    publish(1)
    for name in ("draft", "2.tmp", "-2", "+2", "2_0", "²", "1e3", "0x9", " 3"):
        shutil.copytree(tmp_path / "m" / "1", tmp_path / "m" / name)
    shutil.copytree(tmp_path / "m" / "1", tmp_path / "m" / str(2**63))
    os.mkdir(os.fsencode(tmp_path) + b"/m/\xff7")
    (tmp_path / "m" / "9").write_text("a file")
    models = serve(config(tmp_path, all_versions=True))
    assert states(models) == {1: _STATE.AVAILABLE}


def test_version_zero_and_leading_zeros(publish, serve, tmp_path):
    shutil.copytree(publish(1, model="x"), tmp_path / "m" / "0")
    models = serve()
    assert ask(models).version == 0
    assert ask(models, version=0).version == 0
    shutil.copytree(tmp_path / "x" / "1", tmp_path / "m" / "0003")
    until(lambda: ask(models).version == 3)


@pytest.mark.parametrize(
    "policy, served",
    [
        ({}, {3}),
        ({"latest": 2}, {2, 3}),
        ({"all_versions": True}, {1, 2, 3}),
        ({"versions": (1, 3)}, {1, 3}),
        ({"versions": (2, 7)}, {2}),
    ],
)
def test_policies(policy, served, publish, serve, tmp_path):
    for number in (1, 2, 3):
        publish(number)
    models = serve(config(tmp_path, **policy))
    assert set(states(models)) == served
    for number in (1, 2, 3):
        answer = ask_or_none(models, version=number)
        assert answer == (number if number in served else None)
    assert ask(models).version == max(served)


def test_polling_once_or_never(publish, serve, tmp_path):
    publish(1)
    once = serve(poll_seconds=0)
    never = serve(poll_seconds=-1)
    assert ask(once).version == 1
    assert refusal(ask, never)[0] == _CODE.NOT_FOUND
    publish(2)
    time.sleep(0.3)
    assert ask(once).version == 1
    once.reconfigure([config(tmp_path)])
    assert ask(once).version == 2
    never.reconfigure([config(tmp_path)])
    assert not never.ready


def test_a_model_without_versions_is_not_ready(publish, serve, tmp_path):
    publish(1)
    models = serve(config(tmp_path), config(tmp_path, "later"))
    assert not models.ready
    assert ask(models).version == 1
    assert refusal(models.statuses, "later")[0] == _CODE.NOT_FOUND
    publish(1, model="later")
    until(lambda: models.ready)
    assert ask(models, name="later").version == 1


def test_stopping_ends_everything(publish, serve):
    publish(1)
    before = set(threading.enumerate())
    models = serve(batching=BatchingParameters())
    assert ask(models).version == 1
    assert set(threading.enumerate()) > before
    models.stop(10.0)
    assert set(threading.enumerate()) == before
    assert refusal(ask, models)[0] == _CODE.NOT_FOUND
    assert states(models) == {1: _STATE.END}


# --- warm-up ----------------------------------------------------------------


def test_versions_are_warmed_up_before_they_serve(tmp_path):
    version = write(tmp_path, 1, limit=8)
    write_warmup(
        version,
        ("total", {"x": _X[0]}),
        ("", {"x": _X}),
        ("serving_default", {"x": _X}),
    )
    servable = Servable(str(version))
    for each_size in (False, True):
        warm_up(servable, str(version), (1, 4), each_size=each_size)
    # One size is too many for this model: it is tried where that matters.
    warm_up(servable, str(version), (1, 8), each_size=False)
    with pytest.raises(ServingError, match="warm-up"):
        warm_up(servable, str(version), (1, 8), each_size=True)
    # And so are the requests behind the first.
    write_warmup(version, ("", {"x": _X}), ("", {"x": -_X}))
    warm_up(servable, str(version), each_size=False)
    with pytest.raises(ServingError, match="is negative"):
        warm_up(servable, str(version), each_size=True)
    servable.close()


# --- labels and other configurations ----------------------------------------


def test_labels_name_versions(publish, serve, tmp_path):
    for number in (1, 2, 3):
        publish(number)
    both = {"all_versions": True, "labels": {"stable": 1, "canary": 3}}
    models = serve(config(tmp_path, **both))
    assert ask(models, label="stable").version == 1
    assert ask(models, label="canary").version == 3
    assert models.signatures("m", label="stable")[0] == 1
    assert [s.version for s in models.statuses("m", label="stable")] == [1]
    models.reconfigure(
        [config(tmp_path, all_versions=True, labels={"stable": 2})]
    )
    assert ask(models, label="stable").version == 2
    assert refusal(ask, models, label="canary")[0] == _CODE.INVALID_ARGUMENT


def test_labels_of_unavailable_versions(publish, serve, tmp_path):
    publish(1)
    labelled = config(tmp_path, labels={"canary": 2})
    with pytest.raises(UserError, match="'canary' of model 'm'"):
        serve(labelled)
    models = serve()
    with pytest.raises(UserError, match="version that is available"):
        models.reconfigure([labelled])
    assert refusal(ask, models, label="canary")[0] == _CODE.INVALID_ARGUMENT
    models = serve(labelled, allow_unavailable_labels=True)
    assert refusal(ask, models, label="canary") == (
        _CODE.NOT_FOUND,
        "Servable not found for request: Specific(m, 2)",
    )
    publish(2)
    until(lambda: ask_or_none(models, label="canary") == 2)


def test_models_come_and_go(publish, serve, tmp_path):
    publish(1)
    publish(2, model="other")
    publish(3, model="guest")
    models = serve()
    models.reconfigure([config(tmp_path), config(tmp_path, "guest")])
    assert ask(models, name="guest").version == 3
    models.reconfigure([config(tmp_path), config(tmp_path, "other")])
    assert "versions-guest" not in {t.name for t in threading.enumerate()}
    assert ask(models, name="other").version == 2
    assert ask(models).version == 1
    models.reconfigure([config(tmp_path, "other")])
    assert refusal(ask, models)[0] == _CODE.NOT_FOUND
    assert ask(models, name="other").version == 2
    models.reconfigure([config(tmp_path), config(tmp_path, "other")])
    assert ask(models).version == 1 and models.ready


def test_policies_and_paths_can_change(publish, serve, tmp_path):
    publish(1)
    publish(2)
    publish(2, model="elsewhere", source=3)
    models = serve()
    assert ask(models).version == 2
    models.reconfigure([config(tmp_path, versions=(1,))])
    until(lambda: ask(models).version == 1)
    until(lambda: states(models)[2] == _STATE.END)
    moved = ModelConfig("m", str(tmp_path / "elsewhere"))
    models.reconfigure([moved])
    until(lambda: ask(models).version == 2)
    np.testing.assert_array_equal(ask(models).outputs["y"], _X * 3)


@pytest.mark.parametrize(
    "wrong",
    [
        [ModelConfig("", "/a")],
        [ModelConfig("a/b", "/a")],
        [ModelConfig("a", "relative")],
        [ModelConfig("a", "")],
        [ModelConfig("a", "/a"), ModelConfig("a", "/b")],
    ],
)
def test_a_wrong_configuration_changes_nothing(wrong, publish, serve):
    publish(1)
    models = serve()
    with pytest.raises(UserError):
        models.reconfigure(wrong)
    with pytest.raises(UserError):
        Models(wrong)
    assert ask(models).version == 1


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
    labels = {"stable": 1, "canary": 4}
    assert settings.read_model_configs(path) == [
        ModelConfig("a", "/a"),
        ModelConfig("b", "gs://bucket/b", versions=(1, 4), labels=labels),
        ModelConfig("c", "/c", all_versions=True),
        ModelConfig("d", "/d", latest=3),
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "model_config_list"),
        ("custom_model_config {}", "custom_model_config"),
        ("model_config_list { config { nam: 'a' } }", "text format"),
        ("{", "text format"),
        ("model_config_list { config { base_path: '/a' P } }", "without a"),
        ("model_config_list { config { name: 'a/b' base_path: '/' P }}", "a/b"),
        ("model_config_list { config { name: 'a' base_path: 'a' P }}", "absol"),
        ("model_config_list { config { name: 'a' base_path: '/a' } }", "platf"),
        (
            "model_config_list { config { name: 'a' base_path: '/a' "
            "model_platform: 'sklearn' } }",
            "sklearn",
        ),
        (
            "model_config_list { config { name: 'a' base_path: '/a' P } "
            "config { name: 'a' base_path: '/b' P } }",
            "several times",
        ),
        (
            "model_config_list { config { name: 'a' base_path: '/a' P "
            "model_version_policy { specific {} } } }",
            "empty specific",
        ),
    ],
)
def test_wrong_model_configs_are_refused(text, said, tmp_path):
    path = tmp_path / "models.config"
    path.write_text(text.replace(" P", " model_platform: 'tensorflow'"))
    with pytest.raises(UserError, match=said):
        settings.read_model_configs(path)


# --- what TensorFlow says ---------------------------------------------------


@pytest.mark.parametrize(
    "text, said",
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
        ("", "no reason given"),
    ],
)
def test_reasons_survive_without_the_names_of_nodes(text, said):
    assert reason(text) == said


# --- memory -----------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_flat_over_swaps_and_requests(tmp_path, serve):
    base = tmp_path / "m"
    base.mkdir()
    size = 5_000_000  # 20 MB a version
    write(base, 1, size=size)
    models = serve(batching=BatchingParameters())
    process, resident = psutil.Process(), []

    async def clients():
        await asyncio.gather(
            *(models.predict("m", "", {"x": _X}) for _ in range(500)),
            *(models.predict("m", "", {"x": -_X}) for _ in range(5)),
            return_exceptions=True,
        )

    for number in range(2, 28):
        shutil.copytree(base / str(number - 1), base / f"draft-{number}")
        (base / f"draft-{number}").rename(base / str(number))
        until(lambda n=number: states(models).get(n - 1) == _STATE.END)
        shutil.rmtree(base / str(number - 1))
        asyncio.run(clients())
        resident.append(process.memory_info().rss / 1e6)
    print([round(megabytes) for megabytes in resident])
    # The first of them fill pools that are kept.
    assert max(resident[-5:]) < max(resident[4:8]) + 15
