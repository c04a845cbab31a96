"""Warm-up requests, which a server runs before it serves a new version.

TensorFlow Serving replays `assets.extra/tf_serving_warmup_requests`, a
TFRecord file of `PredictionLog`s, so that no client waits for the work of a
first run. It ignores files with any other name.

Source: tensorflow/serving g3doc/saved_model_warmup.md.
"""

import os
import struct

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

PATH = os.path.join("assets.extra", "tf_serving_warmup_requests")
# TensorFlow Serving's limit.
MAX_RECORDS = 1000
# Images per request. On a CPU one request is enough for all batch sizes; on a
# GPU every batch size that clients send needs a request of its own.
BATCH_SIZES = (1,)


def write(model, *, image_size, batch_sizes=BATCH_SIZES):
    """Writes the warm-up requests of an exported model.

    Args:
        model: directory of the SavedModel, with the signatures of
            `export.model.served`.
        image_size: side of the encoder's images in px.
        batch_sizes: images in each request to `serving_default`. A server with
            batching cannot load a model if one of them exceeds its
            `max_batch_size`.
    """
    path = os.path.join(model, PATH)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tf.io.TFRecordWriter(path) as file:
        for signature, inputs in _requests(image_size, batch_sizes):
            file.write(_record(signature, inputs).SerializeToString())


def read(path):
    """Reads warm-up requests.

    Args:
        path: path of the TFRecord file.

    Yields:
        `predict_pb2.PredictRequest`.

    Raises:
        ValueError: a record is not a `PredictionLog` of a prediction, or there
            are more than `MAX_RECORDS`, or the file is truncated.
        tf.errors.DataLossError: the file is damaged.
    """
    _check_records(path)
    for count, record in enumerate(tf.data.TFRecordDataset(path)):
        if count == MAX_RECORDS:
            raise ValueError(f"more than {MAX_RECORDS} records")
        try:
            log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        except Exception as e:  # the class depends on protobuf's backend
            raise ValueError(f"record {count} cannot be parsed: {e}") from e
        if not log.HasField("predict_log"):
            raise ValueError(f"record {count} is not a prediction")
        yield log.predict_log.request


def _check_records(path):
    """Raises `ValueError` if a record would extend beyond the end of the file.

    TensorFlow's reader allocates the length that a record claims.

    Source: tensorflow/core/lib/io/record_writer.h: 8 bytes of length, 4 of
    its checksum, the data, 4 of its checksum.
    """
    remaining = tf.io.gfile.stat(path).length
    with tf.io.gfile.GFile(path, "rb") as file:
        while remaining:
            header = file.read(12)
            if len(header) < 12:
                raise ValueError("the file is truncated")
            (length,) = struct.unpack("<Q", header[:8])
            if length + 16 > remaining:
                raise ValueError("not a TFRecord file, or truncated")
            remaining -= length + 16
            file.seek(file.tell() + length + 4)


def _requests(size, batch_sizes):
    """Yields pairs of a signature and its inputs."""
    # Decoding takes time, too: as large as photographs on the web.
    images = _photographs(max(batch_sizes), 2 * size)
    encoded = [tf.io.encode_jpeg(image).numpy() for image in images]
    for count in batch_sizes:
        yield "serving_default", {"image_bytes": encoded[:count]}
    images = images[:1, :size, :size]
    yield "images_uint8", {"images": images}
    yield "images", {"images": np.float32(images) / np.float32(255)}


def _photographs(count, size):
    """Returns smooth, reproducible images, uint8 `[count, size, size, 3]`."""
    coarse = np.random.default_rng(0).uniform(0, 255, [count, 8, 8, 3])
    smooth = tf.image.resize(coarse, [size, size], "bicubic")
    return tf.cast(tf.clip_by_value(smooth, 0, 255), tf.uint8).numpy()


def _record(signature, inputs):
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return log
