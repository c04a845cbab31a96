"""The encoders of `export.embed`: local models and models on servers."""

import contextlib
import hashlib
import json
import os
import re

from clsa_tf.config import RUN_FLAGS
from clsa_tf.errors import UserError, first_line
from clsa_tf.files import MODEL_CARD, export_written_by, newest_savedmodel
from export.client import Client
from export.embedding import address
from export.embedding.rejected import ModelError

_SIGNATURE = "serving_default"
_INPUT = "image_bytes"
# Keys of the model card on which embeddings depend.
_IDENTITY = ("fingerprint", "image_size", "keep", "precision")
_BLOCK = 2**20  # bytes per read when hashing


def open_encoder(
    name, *, outputs, batch_size, timeout, attempts, certificates=""
):
    """Opens an encoder.

    Args:
        name: directory of a SavedModel, of its versions (the newest is used)
            or of a run; or the address of a model on a server, see
            `address.of_model`.
        outputs: names of the outputs to return.
        batch_size: images per request to a server.
        timeout: seconds per request to a server.
        attempts: attempts per request to a server.
        certificates: see `export.client.Client`.

    Returns:
        `SavedModelEncoder`, `CheckpointEncoder` or `RemoteEncoder`.

    Raises:
        UserError: it does not exist or does not have the outputs.
    """
    if re.match(r"(grpcs?|https?)://", name):
        name = address.of_model(name)
        client = Client(
            name,
            batch_size=batch_size,
            timeout=timeout,
            attempts=attempts,
            certificates=certificates,
        )
        return RemoteEncoder(client, name, outputs)
    if certificates:
        raise UserError(
            "Expected an --encoder on a server with TLS, grpcs:// or https://, "
            f"for --ca_certificates={certificates}, received {name!r}; omit "
            "--ca_certificates or correct --encoder."
        )
    path = newest_savedmodel(name)
    if path:
        return SavedModelEncoder(path, outputs)
    if os.path.exists(os.path.join(name, RUN_FLAGS)):
        return CheckpointEncoder(name, outputs)
    advice = "correct --encoder"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", name):
        place, _, model = name.partition("/")
        advice = (
            f"did you mean grpc://{place}/{model or 'MODEL'} (the gRPC port)"
        )
    raise UserError(
        "Expected an --encoder that is the directory of a SavedModel, of its "
        "versions or of a run, or an address, grpc[s]://host:port/MODEL or "
        f"http://host:port/MODEL, received {name!r}; "
        f"{advice}."
    )


class SavedModelEncoder:
    """A SavedModel in this process.

    Args:
        path: directory of the SavedModel.
        outputs: names of the outputs to return.

    Attributes:
        identity: text that differs for models with other embeddings.
        widths: dictionary from the outputs' names to their widths.

    Raises:
        UserError: it cannot be loaded or does not have the outputs.
    """

    def __init__(self, path, outputs):
        """See the class."""
        import tensorflow as tf

        self.path = path
        try:
            # An attribute, because it owns the variables.
            self._model = tf.saved_model.load(path)
            self._function = self._model.signatures[_SIGNATURE]
            # TensorFlow optimizes a function at its first call; threads that
            # call it at the same time would each do so.
            with contextlib.suppress(tf.errors.InvalidArgumentError):
                black = tf.io.encode_png(tf.zeros([64, 64, 3], tf.uint8))
                self._function(image_bytes=black[tf.newaxis])
        # The exception class depends on which file is damaged.
        except Exception as e:
            raise UserError(
                f"Cannot load the signature {_SIGNATURE!r} of {_INPUT} of the "
                f"SavedModel in {path}: {first_line(e)}; export it again."
                + export_written_by(path)
            ) from e
        inputs = self._function.structured_input_signature[1]
        tensors = self._function.structured_outputs
        shapes = {name: x.shape.as_list() for name, x in tensors.items()}
        self.widths = _widths(path, outputs, inputs, shapes)
        self._outputs = [*outputs, *({"valid"} & {*shapes})]
        self.identity = fingerprint(path)

    def __call__(self, images):
        """Embeds images, see `Client.embed`."""
        rows = _call(self._function, images, self.path)
        return {name: rows[name].numpy() for name in self._outputs}

    def close(self):
        """Does nothing."""


class CheckpointEncoder:
    """The newest checkpoint of a run, with the outputs of its export.

    Args:
        workdir: directory of the run.
        outputs: names of the outputs to return.

    Attributes:
        identity: see `SavedModelEncoder`; equals the identity of the export.
        widths: see `SavedModelEncoder`.

    Raises:
        UserError: it cannot be loaded or does not have the outputs.
    """

    def __init__(self, workdir, outputs):
        """See the class."""
        from clsa_tf.training import outcome
        from clsa_tf.training.checkpoint import load_trained
        from export.model import card, served

        self._workdir = workdir
        trained = load_trained(workdir)
        outcome.show(outcome.of(workdir, trained))
        config, encoder = trained.config, trained.encoder
        shapes = {
            "embedding": [None, encoder.features],
            "projection": [None, encoder.projections],
        }
        self.widths = _widths(workdir, outputs, [_INPUT], shapes)
        # An attribute, because it owns the variables.
        self._module = served.ServedEncoder(
            encoder,
            image_size=config.image_size,
            crop_ratio=config.eval_keep,
            outputs=outputs,
        )
        # Traced here, before threads call it.
        self._function = self._module.signatures[_SIGNATURE]
        self.identity = _identity(
            {
                "fingerprint": card.fingerprint(encoder.variables),
                "image_size": config.image_size,
                "keep": config.eval_keep,
                "precision": "float32",
            }
        )

    def __call__(self, images):
        """Embeds images, see `Client.embed`."""
        rows = _call(self._function, images, self._workdir)
        return {name: x.numpy() for name, x in rows.items()}

    def close(self):
        """Does nothing."""


class RemoteEncoder:
    """A model on a server, pinned to the version that is served first.

    Args:
        client: `export.client.Client`.
        address: address of the model, for messages.
        outputs: names of the outputs to return.

    Attributes:
        identity: text that differs for other servers, models and versions.
        widths: see `SavedModelEncoder`.

    Raises:
        UserError: it cannot be reached or does not have the outputs.
    """

    def __init__(self, client, address, outputs):
        """See the class."""
        self._client = client
        metadata = client.pin()
        self.identity = f"{address} version {metadata['version']}"
        signature = metadata["signatures"].get(_SIGNATURE)
        signature = signature or {"inputs": {}, "outputs": {}}
        shapes = {k: x["shape"] for k, x in signature["outputs"].items()}
        self.widths = _widths(address, outputs, signature["inputs"], shapes)
        self._outputs = [*outputs, *({"valid"} & {*shapes})]

    def __call__(self, images):
        """Embeds images, see `Client.embed`."""
        return self._client.embed(images, outputs=self._outputs)

    def close(self):
        """Closes the connections."""
        self._client.close()


def _call(function, images, place):
    """Calls a local model; raises `ModelError` as for a server."""
    import grpc
    import tensorflow as tf

    try:
        return function(image_bytes=tf.constant(images))
    except tf.errors.OpError as e:
        # TensorFlow and gRPC use the same numbers.
        statuses = {code.value[0]: code.name for code in grpc.StatusCode}
        status = statuses[e.error_code]
        raise ModelError(place, status, first_line(e).rstrip(".")) from e


def _identity(card):
    values = [card["fingerprint"], *(card.get(key) for key in _IDENTITY)]
    return f"sha256:{hashlib.sha256(json.dumps(values).encode()).hexdigest()}"


def fingerprint(path):
    """Returns a digest that differs for SavedModels with other embeddings.

    Args:
        path: directory of the SavedModel.

    Returns:
        `"sha256:…"`, the digest of its model card's identity or, without a
        card, of its files.
    """
    try:
        with open(os.path.join(path, MODEL_CARD), encoding="utf-8") as file:
            return _identity(json.load(file))
    except (OSError, ValueError, LookupError, TypeError):
        digest = hashlib.sha256()
        for name in ("saved_model.pb", *_variables(path)):
            with open(os.path.join(path, name), "rb") as file:
                digest.update(name.encode())
                while block := file.read(_BLOCK):
                    digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _variables(path):
    names = sorted(os.listdir(os.path.join(path, "variables")))
    return [os.path.join("variables", name) for name in names]


def _widths(place, outputs, inputs, shapes):
    """Returns the widths of `outputs`, from the shapes of all outputs."""
    widths = {
        name: shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and (shape[1] or -1) > 0
    }
    if list(inputs) == [_INPUT] and outputs and {*outputs} <= {*widths}:
        return {name: widths[name] for name in outputs}
    raise UserError(
        f"Expected a model in {place} with the input {_INPUT} and the outputs "
        f"{', '.join(outputs) or '(none)'}, received the inputs "
        f"{', '.join(inputs) or '(none)'} and the outputs "
        f"{', '.join(widths) or '(none)'}; check --encoder and --outputs."
    )
