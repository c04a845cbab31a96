"""The graph that is served: an encoder with its signatures."""

import tensorflow as tf

from clsa_tf.networks.encoder import weight_name
from export.model import untrusted

OUTPUTS = ("embedding", "projection")
BAD_IMAGES = ("error", "nan")


class ServedEncoder(tf.Module):
    """An encoder with the signatures that are served.

    Its SavedModel contains these functions, for inference, and the variables
    once. It contains no Keras objects.

    Args:
        encoder: `clsa_tf.networks.encoder.Encoder`.
        image_size: side of encoded images after preprocessing, in px.
        crop_ratio: share of the short side within the centre crop, in (0, 1].
        outputs: names out of `OUTPUTS` to return.
        bad_images: effect of a bad image: `"error"` fails its request with the
            image's number and the reason; `"nan"` gives a row of NaN and an
            output `valid`.
        limits: `export.model.untrusted.Limits`.

    Attributes:
        weights: the encoder's variables by name.
    """

    def __init__(
        self,
        encoder,
        *,
        image_size,
        crop_ratio,
        outputs=OUTPUTS,
        bad_images="error",
        limits=untrusted.DEFAULT,
    ):
        """See the class."""
        super().__init__(name="encoder")
        self.weights = {weight_name(v): v for v in encoder.variables}
        # A function: a model as attribute would be saved layer by layer.
        self._encoder = lambda: encoder
        self._image_size = image_size
        self._crop_ratio = crop_ratio
        self._outputs = tuple(outputs)
        self._bad_images = bad_images
        self._limits = limits

    @property
    def signatures(self):
        """Concrete functions by signature name."""
        return {
            "serving_default": self.image_bytes.get_concrete_function(),
            "images": self.images.get_concrete_function(),
            "images_uint8": self.images_uint8.get_concrete_function(),
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def image_bytes(self, image_bytes):
        """Decodes, resizes, centre-crops and embeds encoded images.

        Args:
            image_bytes: string `[N]`, JPEG, PNG, BMP or GIF files of any size.

        Returns:
            `embedding` float32 `[N, F]`, the encoder's features; `projection`
            float32 `[N, D]`, unit rows; with `bad_images="nan"` also `valid`,
            bool `[N]`.
        """
        image_bytes = self._check_count(image_bytes, tf.size(image_bytes))
        with tf.device("CPU:0"):
            images, reason = untrusted.prepare(
                image_bytes,
                size=self._image_size,
                crop_ratio=self._crop_ratio,
                limits=self._limits,
            )
        return self._embed(images, reason)

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)]
    )
    def images(self, images):
        """Embeds float32 `[N, H, W, 3]` images in [0, 1] without resizing."""
        images = self._check_pixels(images)
        return self._embed(*untrusted.check_values(images))

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)]
    )
    def images_uint8(self, images):
        """Embeds uint8 `[N, H, W, 3]` images without resizing."""
        images = self._check_pixels(images)
        return self._embed(images, tf.zeros([tf.shape(images)[0]], tf.int32))

    def _embed(self, images, reason):
        """Returns the outputs; an image with `reason` > 0 is bad."""
        if self._bad_images == "error":
            check = self._assert_all_good(reason)
            with tf.control_dependencies([check]):
                images = tf.identity(images)
        rows = dict(
            zip(OUTPUTS, self._encoder().features_and_projections(images))
        )
        rows = {name: rows[name] for name in self._outputs}
        if self._bad_images == "error":
            return rows
        valid = reason == 0
        nan = tf.constant(float("nan"))
        return {
            name: tf.where(valid[:, tf.newaxis], x, nan)
            for name, x in rows.items()
        } | {"valid": valid}

    def _assert_all_good(self, reason):
        """Returns an operation that fails if any `reason` is not 0."""
        texts = untrusted.reasons(self._limits)
        table = tf.constant([texts[i] for i in range(len(texts))])
        # Appends a good image, as the request may have none.
        padded = tf.concat([reason, [0]], axis=0)
        first = tf.argmax(tf.cast(padded > 0, tf.int32))
        # `export.embedding.rejected` finds the reason in this message.
        message = tf.strings.join(
            [
                "Expected good images, received image ",
                tf.strings.as_string(first),
                " (counted from 0), which ",
                tf.gather(table, padded[first]),
                "; leave it out, or repair or convert it.",
            ]
        )
        return tf.debugging.Assert(tf.reduce_all(reason == 0), [message])

    def _check_count(self, tensor, count):
        """Returns `tensor` unless there are no or too many images."""
        limit = self._limits.batch_images
        message = tf.strings.join(
            [
                f"Expected 1 to {limit} images in a request, received ",
                tf.strings.as_string(count),
                "; send several requests.",
            ]
        )
        check = tf.debugging.Assert((count > 0) & (count <= limit), [message])
        with tf.control_dependencies([check]):
            return tf.identity(tensor)

    def _check_pixels(self, images):
        """Returns `images` unless they have no or too many pixels."""
        shape = tf.shape(images, out_type=tf.int64)
        pixels = tf.reduce_prod(shape[:3])
        limit = self._limits.batch_images * self._image_size**2
        message = tf.strings.join(
            [
                f"Expected 1 to {limit} pixels in a request, received the "
                "shape [",
                tf.strings.reduce_join(
                    tf.strings.as_string(shape), separator=", "
                ),
                "]; send several requests, or smaller images.",
            ]
        )
        check = tf.debugging.Assert((pixels > 0) & (pixels <= limit), [message])
        with tf.control_dependencies([check]):
            return tf.identity(images)
