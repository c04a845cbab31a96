"""Views made by real processes of `clsa_tf.data_service`, byte for byte."""

import signal
import socket
import time

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf.augment.views import View
from clsa_tf.data import service_client
from clsa_tf.data.open import open_source
from clsa_tf.data.order import Worker
from clsa_tf.data.service_client import Services
from clsa_tf.data.sources.records import Format, from_getter
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.errors import UserError
from tests.runs import call
from tests.service import COMMAND, Service
from tests.test_data_pipeline import (
    assert_same,
    batches,
    contents,
    one_sentence,
    photo_folder,
    picture,
)

VIEWS = (
    View("query", 8, 0.2, 1.0),
    View("key", 8, 0.2, 1.0, shuffle=True),
    View("strong", 6, 0.2, 1.0, strong_ops=1),
)


@pytest.fixture(scope="module")
def addresses():
    with Service() as one, Service() as two:
        yield one.address, two.address


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve PNGs, a small JPEG, and a JPEG that is decoded in part."""
    path = tmp_path_factory.mktemp("photos")
    for name, size in (("b.jpg", (31, 23)), ("c.jpg", (90, 70))):
        (path / name).write_bytes(contents(picture(5, size), "JPEG"))
    return photo_folder(path)


@pytest.fixture(scope="module")
def whole(source):
    """Steps 0 … 6 without a service."""
    return batches(source, 7, views=VIEWS)


@pytest.mark.slow
def test_batches_equal_those_without_a_service(addresses, source, whole):
    services = Services(addresses)
    services.check()
    assert_same(batches(source, 7, views=VIEWS, services=services), whole)


@pytest.mark.slow
def test_batches_after_a_restart_are_the_same(addresses, source, whole):
    tail = batches(source, 4, start=3, services=Services(addresses[:1]))
    assert len(tail) == 4
    for batch, expected in zip(tail, whole[3:]):
        assert batch.keys() == {"query", "key", "key_order", "index"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])


def record_files(folder, each):
    """Writes two files of `each` records, whose labels are their numbers."""
    for part in range(2):
        with tf.io.TFRecordWriter(str(folder / f"r-{part}")) as writer:
            for n in range(each):
                image = contents(picture(each * part + n), "JPEG")
                writer.write(record(image, each * part + n))
    return f"tfrecord:{folder}/r-*"


def record(image, label):
    image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))
    label = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
    features = tf.train.Features(feature={"image": image, "label": label})
    return tf.train.Example(features=features).SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes, count", [(0, 1), (10**9, 2)])
def test_incomplete_batches_of_records_are_the_same(
    tmp_path, addresses, memory_bytes, count
):
    """Streamed in a shuffled order, and from a table sent to the service."""
    source = open_source(
        record_files(tmp_path, 7), window=4, memory_bytes=memory_bytes
    )
    options = dict(batch_size=6, worker=Worker(1, 2), completed=False)
    expected = batches(source, 5, start=1, **options)
    services = Services(addresses[:count])
    steps = batches(source, 5, start=1, services=services, **options)
    assert_same(steps, expected)


@pytest.mark.slow
def test_each_service_reads_its_own_files_of_a_stream(tmp_path, addresses):
    source = open_source(record_files(tmp_path, 8), window=4, memory_bytes=0)
    options = dict(batch_size=4)
    steps = batches(source, 8, services=Services(addresses), **options)
    labels = [step["label"] for step in steps]
    for epoch in (labels[:4], labels[4:]):
        assert sorted(np.concatenate(epoch)) == list(range(16))
        # One service made steps 0 and 2, the other one 1 and 3.
        for mine in (epoch[::2], epoch[1::2]):
            assert len({label // 8 for label in np.concatenate(mine)}) == 1
    # Steps after a restart are the same, whichever service makes them.
    for start in (1, 4, 6):
        tail = batches(
            source, 2, start=start, services=Services(addresses), **options
        )
        assert_same(tail, steps[start : start + 2])


@pytest.mark.slow
def test_unreadable_files_are_reported_and_replaced(tmp_path, addresses):
    source = photo_folder(tmp_path, bad=("text.jpg", "truncated.png"))
    results = []
    for services in (None, Services(addresses[1:])):
        unreadable = UnreadableImages(max_bad_share=0.5)
        steps = batches(
            source,
            4,
            unreadable=unreadable,
            services=services,
            completed=False,
            whole_epochs=False,  # all of the images
        )
        results.append((steps, unreadable.count))
    (expected, count), (steps, counted) = results
    assert count == counted == 2
    assert_same(steps, expected)
    strict = UnreadableImages(max_bad_share=0.1, advice="look")
    with pytest.raises(tf.errors.OpError):
        batches(
            source,
            4,
            unreadable=strict,
            services=services,
            completed=False,
            whole_epochs=False,
        )
    text = one_sentence(strict.error())
    assert "2 among 14" in text and "; look, repair" in text


def test_sources_that_a_service_cannot_read_are_rejected():
    """The service is not asked: it would fail or read other records."""
    form = Format("image", "")
    get = [record(contents(picture(n), "PNG"), n) for n in range(6)].__getitem__
    options = dict(name="few", size=6, form=form)
    looked_up = from_getter(get, memory=False, **options)
    with pytest.raises(UserError, match="few") as caught:
        batches(looked_up, 1, services=Services(("grpc://localhost:1",)))
    assert "--data_service" in one_sentence(caught.value)
    assert not from_getter(get, memory=True, **options).local


@pytest.mark.slow
def test_batches_in_another_order_are_an_error(source):
    class Wrong:
        def distribute(self, make):
            return make(0, 2)

    with pytest.raises(tf.errors.InvalidArgumentError, match="another step"):
        batches(source, 2, services=Wrong(), completed=False)


def numbers(k, n):
    return tf.data.Dataset.counter(k, n)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGSTOP])
def test_a_lost_service_is_an_error(number, addresses, monkeypatch):
    monkeypatch.setattr(service_client, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(service_client, "_LOOK_SECONDS", 0.5)
    with Service() as short:
        services = Services((addresses[0], short.address))
        found = iter(services.distribute(numbers))
        assert [int(next(found)) for _ in range(5)] == [0, 1, 2, 3, 4]
        time.sleep(3)
        assert not services.lost()
        if number == signal.SIGSTOP:
            short.send(number)
        else:
            assert short.end(number) == 0
        with pytest.raises(tf.errors.InvalidArgumentError):
            for _ in range(100):
                next(found)
        assert short.address in services.lost()
        assert addresses[0] not in services.lost()


@pytest.mark.slow
def test_a_restarted_service_does_not_resume_a_job():
    """The first service ends during a job, with status 0."""
    with Service() as first:
        found = iter(Services((first.address,)).distribute(numbers))
        assert int(next(found)) == 0
        assert first.end() == 0 and first.errors() == ""
        with Service(f"--port={first.address.split(':')[-1]}") as second:
            assert second.address == first.address
            with pytest.raises(tf.errors.NotFoundError):
                for _ in range(100):
                    next(found)


def test_services_that_do_not_answer_are_an_error(monkeypatch):
    monkeypatch.setattr(service_client, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("localhost", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UserError, match="no answer within 1 s") as caught:
            Services((f"grpc://localhost:{port}",)).check()
        one_sentence(caught.value)
    with pytest.raises(UserError, match="no connection") as caught:
        Services((f"grpc://localhost:{port}",)).check()
    text = one_sentence(caught.value)
    assert f"grpc://localhost:{port}" in text
    assert "python -m clsa_tf.data_service" in text


@pytest.mark.parametrize(
    "text", ["localhost:5050", "grpc://a", "grpc://a:0", "grpc://a:1,", "x,y"]
)
def test_addresses_are_checked_with_the_flags(text):
    with pytest.raises(UserError, match="grpc://host:port"):
        config_lib.check(config_lib.default(data_service=text))
    good = config_lib.default(data_service="grpc://a-b.c:1,grpc://[::1]:65535")
    config_lib.check(good)
    assert config_lib.identity(good) == config_lib.identity(
        config_lib.default()
    )


def fails(command):
    result = call(command, status=1, timeout=60)
    assert "Traceback" not in result.stderr
    assert "serving" not in result.stdout
    return result.stderr


@pytest.mark.slow
def test_a_service_listens_only_with_expose_and_on_a_free_port(addresses):
    assert "Expected --expose" in fails([*COMMAND, "--port=0"])
    # TensorFlow itself would share the port.
    taken = f"--port={addresses[0].split(':')[-1]}"
    assert "Cannot listen on the ports" in fails([*COMMAND, "--expose", taken])
