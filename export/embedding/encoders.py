"""What `export.embed` computes with: a model of this machine, or a server."""

import contextlib
import hashlib
import json
import os
import re

from clsa_tf.config import RUN_FLAGS
from clsa_tf.errors import UserError, first_line
from clsa_tf.files import MODEL_CARD, newest_savedmodel
from export.client import Client
from export.embedding import address
from export.embedding.refusal import ModelError

_SIGNATURE = "serving_default"
_INPUT = "image_bytes"
# Of what a model card says, that on which embeddings depend.
_IDENTITY = ("fingerprint", "image_size", "keep", "precision")
_BLOCK = 2**20  # bytes that are hashed at once


def open_encoder(name, *, outputs, batch_size, timeout, attempts):
    """Opens an encoder.

    Args:
        name: directory of a SavedModel, of its versions, of which the newest
            is taken, or of a run; or the address of a model of a server, see
            `address.of_model`.
        outputs: names of those that are wanted.
        batch_size: images per request to a server.
        timeout: seconds per request.
        attempts: how often to make one.

    Returns:
        `SavedModel`, `Checkpoint` or `Server`.

    Raises:
        UserError: there is none, or it has no such outputs.
    """
    if re.match(r"(grpc|https?)://", name):
        name = address.of_model(name)
        client = Client(
            name, batch_size=batch_size, timeout=timeout, attempts=attempts
        )
        return Server(client, name, outputs)
    path = newest_savedmodel(name)
    if path:
        return SavedModel(path, outputs)
    if os.path.exists(os.path.join(name, RUN_FLAGS)):
        return Checkpoint(name, outputs)
    advice = "name one"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", name):
        place, _, model = name.partition("/")
        advice = (
            f"did you mean grpc://{place}/{model or 'MODEL'} (the port of gRPC)"
        )
    raise UserError(
        "Expected an --encoder that is the directory of a SavedModel, of its "
        "versions or of a run, or the address of a server, "
        f"grpc://host:port/MODEL or http://host:port/MODEL, received {name!r}; "
        f"{advice}."
    )


class SavedModel:
    """A SavedModel in this process.

    Args:
        path: its directory.
        outputs: names of those that are wanted.

    Attributes:
        identity: differs from those of models that give other embeddings.
        widths: from the outputs' names to their widths.

    Raises:
        UserError: it cannot be loaded or has no such outputs.
    """

    def __init__(self, path, outputs):
        """See the class."""
        import tensorflow as tf

        self.path = path
        try:
            # It has to be kept for its variables to be.
            self._model = tf.saved_model.load(path)
            self._function = self._model.signatures[_SIGNATURE]
            # TensorFlow prepares a function when it is first called, and in
            # each of several threads if these are the first.
            with contextlib.suppress(tf.errors.InvalidArgumentError):
                black = tf.io.encode_png(tf.zeros([64, 64, 3], tf.uint8))
                self._function(image_bytes=black[tf.newaxis])
        # What is thrown depends on which file is damaged.
        except Exception as e:
            raise UserError(
                f"Expected a SavedModel with the signature {_SIGNATURE!r} of "
                f"{_INPUT} in {path}, received: {first_line(e)}; export it "
                "again."
            ) from e
        inputs = self._function.structured_input_signature[1]
        found = self._function.structured_outputs
        shapes = {name: x.shape.as_list() for name, x in found.items()}
        self.widths = _widths(path, outputs, inputs, shapes)
        self._outputs = [*outputs, *({"valid"} & {*shapes})]
        self.identity = fingerprint(path)

    def __call__(self, images):
        """Embeds images; as `Client.embed`."""
        found = _call(self._function, images, self.path)
        return {name: found[name].numpy() for name in self._outputs}

    def close(self):
        """Does nothing."""


class Checkpoint:
    """The newest checkpoint of a run, as `export.savedmodel` would export it.

    Args:
        workdir: directory of the run.
        outputs: names of those that are wanted.

    Attributes:
        identity: as of `SavedModel`; that of the export is the same.
        widths: likewise.

    Raises:
        UserError: it cannot be loaded or has no such outputs.
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
        known = {
            "embedding": [None, encoder.features],
            "projection": [None, encoder.projections],
        }
        self.widths = _widths(workdir, outputs, [_INPUT], known)
        # It has to be kept for its variables to be.
        self._module = served.ServedEncoder(
            encoder,
            image_size=config.image_size,
            keep=config.eval_keep,
            outputs=outputs,
        )
        # Not prepared by several threads at once.
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
        """Embeds images; as `Client.embed`."""
        found = _call(self._function, images, self._workdir)
        return {name: x.numpy() for name, x in found.items()}

    def close(self):
        """Does nothing."""


class Server:
    """A model of a server, always the version that was there first.

    Args:
        client: `export.client.Client`.
        address: its server, for messages.
        outputs: names of those that are wanted.

    Attributes:
        identity: differs from those of other servers, models and versions.
        widths: as of `SavedModel`.

    Raises:
        UserError: it cannot be reached or has no such outputs.
    """

    def __init__(self, client, address, outputs):
        """See the class."""
        self._client = client
        found = client.pin()
        self.identity = f"{address} version {found['version']}"
        signature = found["signatures"].get(_SIGNATURE)
        signature = signature or {"inputs": {}, "outputs": {}}
        shapes = {k: x["shape"] for k, x in signature["outputs"].items()}
        self.widths = _widths(address, outputs, signature["inputs"], shapes)
        self._outputs = [*outputs, *({"valid"} & {*shapes})]

    def __call__(self, images):
        """Embeds images; as `Client.embed`."""
        return self._client.embed(images, outputs=self._outputs)

    def close(self):
        """Closes the connections."""
        self._client.close()


def _call(function, images, place):
    """Calls a model of this process; raises `ModelError` as a server's do."""
    import grpc
    import tensorflow as tf

    try:
        return function(image_bytes=tf.constant(images))
    except tf.errors.OpError as e:
        # Numbered as by gRPC.
        statuses = {code.value[0]: code.name for code in grpc.StatusCode}
        status = statuses[e.error_code]
        raise ModelError(place, status, first_line(e).rstrip(".")) from e


def _identity(card):
    said = [card["fingerprint"], *(card.get(key) for key in _IDENTITY)]
    return f"sha256:{hashlib.sha256(json.dumps(said).encode()).hexdigest()}"


def fingerprint(path):
    """What tells a SavedModel from those that give other embeddings.

    Args:
        path: its directory.

    Returns:
        `"sha256:…"`, of what its model card says or, without one, of its
        files.
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
    """The outputs' widths, from the shapes of all outputs."""
    widths = {
        name: shape[1]
        for name, shape in shapes.items()
        if len(shape) == 2 and (shape[1] or -1) > 0
    }
    if list(inputs) == [_INPUT] and outputs and {*outputs} <= {*widths}:
        return {name: widths[name] for name in outputs}
    raise UserError(
        f"Expected {place} to make {', '.join(outputs) or 'an output'} of "
        f"{_INPUT}, received "
        f"a model that makes {', '.join(widths) or 'nothing'} of "
        f"{', '.join(inputs) or 'nothing'}; check --encoder and --outputs."
    )
