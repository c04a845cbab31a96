"""The encoder as the graph that is served: its signatures."""

import tensorflow as tf

from clsa_tf.networks.encoder import weight_name
from export.model import untrusted

OUTPUTS = ("embedding", "projection")
BAD_IMAGES = ("error", "nan")


class ServedEncoder(tf.Module):
    """An encoder with the signatures that it is served with.

    Nothing of Keras is saved with it: only these functions, for inference, and
    the variables, once.

    Args:
        encoder: `clsa_tf.networks.encoder.Encoder`.
        image_size: side that encoded images are brought to, in px.
        keep: share of the short side that the centre crop keeps, in (0, 1].
        outputs: those of `OUTPUTS` to return.
        bad_images: what a bad image does: `"error"` fails its request, and
            names it; `"nan"` gives a row of NaN and an output `valid`.
        limits: `export.model.untrusted.Limits`.

    Attributes:
        weights: the encoder's variables by name.
    """

    def __init__(
        self,
        encoder,
        *,
        image_size,
        keep,
        outputs=OUTPUTS,
        bad_images="error",
        limits=untrusted.DEFAULT,
    ):
        """See the class."""
        super().__init__(name="encoder")
        self.weights = {weight_name(v): v for v in encoder.variables}
        # A function, because a model would be saved, layer by layer.
        self._encoder = lambda: encoder
        self._image_size = image_size
        self._keep = keep
        self._outputs = tuple(outputs)
        self._bad_images = bad_images
        self._limits = limits

    @property
    def signatures(self):
        """Name -> concrete function."""
        return {
            "serving_default": self.image_bytes.get_concrete_function(),
            "images": self.images.get_concrete_function(),
            "images_uint8": self.images_uint8.get_concrete_function(),
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def image_bytes(self, image_bytes):
        """Embeds encoded images: decoded, resized, centre-cropped.

        Args:
            image_bytes: string `[N]`, JPEG, PNG, BMP or GIF files of any size.

        Returns:
            `embedding` float32 `[N, F]`, the encoder's features,
            `projection` float32 `[N, D]`, unit rows, and perhaps `valid`
            bool `[N]`.
        """
        image_bytes = self._not_too_many(image_bytes, tf.size(image_bytes))
        with tf.device("CPU:0"):
            images, reason = untrusted.prepare(
                image_bytes,
                size=self._image_size,
                keep=self._keep,
                limits=self._limits,
            )
        return self._embed(images, reason)

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)]
    )
    def images(self, images):
        """Embeds images as they are: float32 `[N, H, W, 3]` in [0, 1]."""
        images = self._not_too_large(images)
        return self._embed(*untrusted.check_values(images))

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)]
    )
    def images_uint8(self, images):
        """Embeds images as they are: uint8 `[N, H, W, 3]`."""
        images = self._not_too_large(images)
        return self._embed(images, tf.zeros([tf.shape(images)[0]], tf.int32))

    def _embed(self, images, reason):
        """Outputs for images, of which some are bad for a `reason` > 0."""
        if self._bad_images == "error":
            checked = self._all_good(reason)
            with tf.control_dependencies([checked]):
                images = tf.identity(images)
        rows = dict(zip(OUTPUTS, self._encoder().embed(images)))
        rows = {name: rows[name] for name in self._outputs}
        if self._bad_images == "error":
            return rows
        valid = reason == 0
        nan = tf.constant(float("nan"))
        return {
            name: tf.where(valid[:, tf.newaxis], x, nan)
            for name, x in rows.items()
        } | {"valid": valid}

    def _all_good(self, reason):
        """An operation that fails unless no image has a reason against it."""
        words = untrusted.reasons(self._limits)
        table = tf.constant([words[i] for i in range(len(words))])
        # One good one behind them, as there may be none at all.
        padded = tf.concat([reason, [0]], axis=0)
        first = tf.argmax(tf.cast(padded > 0, tf.int32))
        message = tf.strings.join(
            [
                "Expected good images, received image ",
                tf.strings.as_string(first),
                " (counted from 0), which ",
                tf.gather(table, padded[first]),
                "; leave it out, or mend or convert it.",
            ]
        )
        return tf.debugging.Assert(tf.reduce_all(reason == 0), [message])

    def _not_too_many(self, tensor, count):
        most = self._limits.batch_images
        message = tf.strings.join(
            [
                f"Expected 1 to {most} images in a request, received ",
                tf.strings.as_string(count),
                "; send several requests.",
            ]
        )
        checked = tf.debugging.Assert((count > 0) & (count <= most), [message])
        with tf.control_dependencies([checked]):
            return tf.identity(tensor)

    def _not_too_large(self, images):
        shape = tf.shape(images, out_type=tf.int64)
        pixels = tf.reduce_prod(shape[:3])
        most = self._limits.batch_images * self._image_size**2
        message = tf.strings.join(
            [
                f"Expected 1 to {most} pixels in a request, received the shape"
                " [",
                tf.strings.reduce_join(
                    tf.strings.as_string(shape), separator=", "
                ),
                "]; send several requests, or smaller images.",
            ]
        )
        checked = tf.debugging.Assert(
            (pixels > 0) & (pixels <= most), [message]
        )
        with tf.control_dependencies([checked]):
            return tf.identity(images)
