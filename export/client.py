"""Request embeddings from TensorFlow Serving or `export.server`.

    python -m export.client --server=localhost:8500 photo.jpg other.png

The command prints one JSON object per photograph, `{"file": …, "embedding":
[…], "projection": […]}`, or `{"file": …, "error": …}` if the model rejected it.
With --output it writes a file instead, see `export.embedding.embeddings`. The
protocol is gRPC for `host:port` and `grpc://host:port`, and REST for
`http://host:port`. With TLS it is `grpcs://host:port` and `https://host:port`.

In Python:

    with Client("localhost:8500", model="photos") as client:
        rows = client.embed([open("photo.jpg", "rb").read()])["embedding"]
"""

import json

import numpy as np
import tenacity
from absl import flags

from clsa_tf.cli import launch
from clsa_tf.errors import UserError
from clsa_tf.options.flags import define_path, require
from export.embedding import address, embeddings, transports
from export.embedding.address import ModelReference
from export.embedding.rejected import ModelError, embed_each, read_image


class Client:
    """A client of TensorFlow Serving's protocols.

    Calls that fail because the server is unreachable or overloaded
    (UNAVAILABLE, RESOURCE_EXHAUSTED, HTTP 429 and 503) are retried after a
    random wait of at most 0.5 s, then 1 s, 2 s and so on up to 10 s. Other
    failures, such as an untrusted certificate, are not retried. Thread-safe.

    Args:
        server: `"host:port"` or `"grpc://host:port"` for gRPC,
            `"grpcs://host:port"` for gRPC over TLS, or `"http://host:port"`
            (or https) for REST. The address may contain the model:
            `"grpc://host:port/NAME"`,
            `"http://host:port/v1/models/NAME[/versions/N|/labels/L]"`.
        model: name of the model, if it is not part of the address.
        version: number of the version; None: the newest.
        label: label of the version, instead of a number.
        signature: name of a signature with the input `image_bytes`.
        timeout: seconds per attempt.
        attempts: attempts per call, >= 1.
        batch_size: maximum number of images per request.
        certificates: PEM file of the certificate authorities to trust with
            TLS; "": those that gRPC or `requests` trusts.

    Raises:
        UserError: the address has none of these forms, both a version and a
            label were given, or the certificates cannot be read.
    """

    def __init__(
        self,
        server,
        *,
        model="default",
        version=None,
        label=None,
        signature="serving_default",
        timeout=60.0,
        attempts=5,
        batch_size=32,
        certificates="",
    ):
        """See the class."""
        place, reference = address.parse(server)
        self.model = reference or ModelReference(model, version, label)
        if self.model.version is not None and self.model.label:
            raise UserError(
                "Expected a version or a label of the model, received version "
                f"{self.model.version} and label {self.model.label!r}; omit "
                "one."
            )
        self.signature = signature
        self._batch_size = batch_size
        self._has_signature = False  # whether that is known
        self._pinned = False
        self._transport = _connect(place, timeout, certificates)
        self._call = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=tenacity.wait_random_exponential(0.5, min=0.05, max=10),
            stop=tenacity.stop_after_attempt(attempts),
            reraise=True,
        )

    def embed(self, images, *, outputs=None):
        """Embeds encoded images.

        Args:
            images: list of N >= 1 `bytes`, JPEG, PNG, BMP or GIF files.
            outputs: names of the outputs to return; None: all.

        Returns:
            dictionary: `embedding` float32 `[N, F]`, `projection` float32
            `[N, D]`, unit rows, and for some models `valid` bool `[N]`.

        Raises:
            ModelError: the server could not be reached, does not have the
                model, or rejected the images.
            ValueError: there are no images.
        """
        if not images:
            raise ValueError(
                "Expected at least 1 image, received 0; pass one or more."
            )
        batches = []
        for start in range(0, len(images), self._batch_size):
            batch = list(images[start : start + self._batch_size])
            batches.append(self._predict(batch, outputs))
        return {
            name: np.concatenate([rows[name] for rows in batches])
            for name in batches[0]
        }

    def metadata(self):
        """Describes the served model.

        Returns:
            dictionary: `model`, its name; `version`, int; `signatures`, from
            names to `{"inputs": {name: {"dtype": …, "shape": …}}, "outputs":
            …}`, with -1 for variable sizes.

        Raises:
            ModelError: see `embed`.
        """
        return self._call(self._transport.metadata, self.model)

    def status(self):
        """Describes the versions of the model.

        Returns:
            list of dictionaries, newest first: `version`, int; `state`, START,
            LOADING, AVAILABLE, UNLOADING or END; `error`, "" if there is none.

        Raises:
            ModelError: see `embed`.
        """
        return self._call(self._transport.status, self.model)

    def pin(self):
        """Uses the version that is served now for all further calls.

        Returns:
            see `metadata`.

        Raises:
            ModelError: see `embed`.
        """
        metadata = self.metadata()
        self.model = ModelReference(self.model.name, metadata["version"])
        self._pinned = True
        return metadata

    def close(self):
        """Closes the connections."""
        self._transport.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _predict(self, images, outputs):
        try:
            rows = self._call(
                self._transport.predict,
                self.model,
                self.signature,
                images,
                outputs,
            )
        except ModelError as e:
            self._reinterpret(e)
            raise
        if "" in rows:  # REST omits the name of a single output
            signature = self.metadata()["signatures"][self.signature]
            rows = dict(zip(signature["outputs"], rows.values()))
        missing = set(outputs or ()) - set(rows)
        if missing or any(len(x) != len(images) for x in rows.values()):
            shapes = {name: list(x.shape) for name, x in rows.items()}
            raise ModelError(
                self._transport.place,
                "INTERNAL",
                f"outputs {shapes} for {len(images)} images",
            )
        return {name: rows[name] for name in outputs or rows}

    def _reinterpret(self, error):
        """Raises another `ModelError` if the images did not cause `error`.

        Servers use INVALID_ARGUMENT for bad images, but also for an unknown
        label and, by REST, for an unknown signature.
        """
        place, name = self._transport.place, self.model.name
        if self._pinned and error.status == "NOT_FOUND":
            newest = self._call(self._transport.metadata, ModelReference(name))
            raise ModelError(
                place,
                "NOT_FOUND",
                f"the server replaced version {self.model.version} of "
                f"{name!r} by version {newest['version']}",
                advice="start again with the new version, or serve both "
                "versions until all images are embedded",
            ) from error
        if not error.rejected or self._has_signature:
            return
        try:
            signatures = self.metadata()["signatures"]
        except ModelError as e:
            if not e.rejected:
                raise
            shown, _, message = e.reason.partition(": ")
            raise ModelError(place, "NOT_FOUND", message, shown=shown) from e
        if self.signature not in signatures:
            raise ModelError(
                place,
                "FAILED_PRECONDITION",
                f"the model has no signature {self.signature!r}, only "
                f"{', '.join(signatures)}",
            ) from error
        self._has_signature = True


def _connect(place, timeout, certificates):
    rest = place.startswith(("http://", "https://"))
    if certificates and not place.startswith((address.TLS, "https://")):
        raise UserError(
            "Expected a server with TLS, grpcs:// or https://, for "
            f"certificates, received {place!r} with {certificates}; correct "
            "the address or omit them."
        )
    try:
        return (transports.Rest if rest else transports.Grpc)(
            place, timeout=timeout, certificates=certificates
        )
    except OSError as e:
        raise UserError(
            f"Expected a PEM file of certificates, received {certificates} "
            f"({e.strerror}); correct the path or the file."
        ) from e


def _is_transient(error):
    return isinstance(error, ModelError) and error.transient


def define_flags(flag_values):
    """Defines this command's flags."""

    def define(kind, *arguments):
        kind(*arguments, flag_values=flag_values)

    define(
        flags.DEFINE_string,
        "server",
        None,
        "address of the server: host:port or grpc://host:port for gRPC, "
        "http://host:port for REST; with TLS grpcs:// or https://",
    )
    define(flags.DEFINE_string, "model", "default", "name of the model")
    define(
        flags.DEFINE_integer,
        "version",
        None,
        "number of the version; empty: the newest",
        0,
    )
    define(flags.DEFINE_string, "label", None, "label of the version")
    define(
        flags.DEFINE_string,
        "signature",
        "serving_default",
        "name of the signature to call",
    )
    define(flags.DEFINE_float, "timeout", 60.0, "seconds per attempt", 0.001)
    define(flags.DEFINE_integer, "attempts", 5, "attempts per request", 1)
    define(flags.DEFINE_integer, "batch_size", 32, "images per request", 1)
    define(
        define_path,
        "output",
        None,
        "file to write: .npz, .parquet or .tfrecord; empty: print the "
        "embeddings",
    )
    define(
        define_path,
        "ca_certificates",
        "",
        "PEM file of the certificate authorities to trust with TLS; empty: "
        "those of gRPC and requests",
    )
    define(
        flags.DEFINE_bool,
        "metadata",
        False,
        "print the model's signatures and exit",
    )
    define(
        flags.DEFINE_bool,
        "status",
        False,
        "print the model's versions with their states and exit",
    )
    require(flag_values, "server")


def main(photographs):
    """Reads the flags and requests the embeddings of files.

    Args:
        photographs: list of paths.
    """
    values = flags.FLAGS
    if values.output:
        embeddings.check(values.output)
    if not photographs and not (values.metadata or values.status):
        raise UserError(
            "Expected at least 1 photograph, received 0; append their paths to "
            "the command."
        )
    with Client(
        values.server,
        model=values.model,
        version=values.version,
        label=values.label,
        signature=values.signature,
        timeout=values.timeout,
        attempts=values.attempts,
        batch_size=values.batch_size,
        certificates=values.ca_certificates,
    ) as client:
        if values.status:
            print(json.dumps(client.status(), indent=2))
            return
        if values.metadata:
            print(json.dumps(client.metadata(), indent=2))
            return
        blocks, files, bad = [], [], []
        for start in range(0, len(photographs), values.batch_size):
            paths = photographs[start : start + values.batch_size]
            contents = [read_image(path) for path in paths]
            rows, reasons = embed_each(client.embed, contents)
            good = [path for i, path in enumerate(paths) if i not in reasons]
            bad += [(paths[i], reason) for i, reason in reasons.items()]
            if values.output:
                blocks.append(rows)
                files += good
            else:
                _print(paths, rows, reasons)
    if files:
        blocks = [rows for rows in blocks if rows]
        widths = {name: x.shape[1] for name, x in blocks[0].items()}
        embeddings.write(values.output, files, widths, lambda _: blocks)
        print(f"wrote embeddings of {len(files)} images to {values.output}")
    if bad:
        raise UserError(
            f"The model rejected {len(bad)} of {len(photographs)} photographs, "
            f"such as {bad[0][0]} ({bad[0][1]}); remove, repair or convert "
            "them."
        )


def _print(paths, rows, reasons):
    """Prints one line per photograph, in their order."""
    good_rows = iter(range(len(paths)))
    for i, path in enumerate(paths):
        line = {"file": path}
        if i in reasons:
            line["error"] = reasons[i]
        else:
            row = next(good_rows)
            line |= {name: x[row].tolist() for name, x in rows.items()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    launch.launch(main, define_flags, positional=True)
