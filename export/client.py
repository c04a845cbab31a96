"""Asks a server for embeddings: TensorFlow Serving, or `export.server`.

    python -m export.client --server=localhost:8500 photo.jpg other.png

prints one JSON object per photograph, `{"file": …, "embedding": […],
"projection": […]}`, or `{"file": …, "error": …}` where the model refused it;
with --output they go to a file, see `export.embedding.embeddings`. gRPC is
spoken to `host:port` and `grpc://host:port`, REST to `http://host:port`.

From Python:

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
from export.embedding.address import Model
from export.embedding.refusal import ModelError, embed_each, read_image


class Client:
    """Asks a server that speaks TensorFlow Serving's protocols.

    Calls that fail for want of a connection or of room (UNAVAILABLE,
    RESOURCE_EXHAUSTED, HTTP 429 and 503) are made again after a random wait,
    of at most 0.5 s, then 1 s, 2 s and so on up to 10 s. Others are not: they
    would fail again. May be used by several threads at once.

    Args:
        server: `"host:port"` or `"grpc://host:port"` for gRPC, or
            `"http://host:port"` (or https) for REST. The model may be part of
            it: `"grpc://host:port/NAME"`,
            `"http://host:port/v1/models/NAME[/versions/N|/labels/L]"`.
        model: name of the model, if the address does not say it.
        version: number of the version; None: the newest.
        label: label of the version, instead of a number.
        signature: name of the signature; it takes `image_bytes`.
        timeout: seconds that one attempt may take.
        attempts: how often to try, >= 1.
        batch_size: images per request, at most.

    Raises:
        UserError: the address has none of these forms, or both a version and
            a label were given.
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
    ):
        """See the class."""
        place, found = address.parse(server)
        self.model = found or Model(model, version, label)
        if self.model.version is not None and self.model.label:
            raise UserError(
                "Expected a version or a label of the model, received both; "
                "leave one out."
            )
        self.signature = signature
        self._batch_size = batch_size
        self._known = False  # whether the signature is there
        self._pinned = False
        protocol = transports.Rest if "://" in place else transports.Grpc
        self._transport = protocol(place, timeout=timeout)
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
            outputs: names of those wanted; None: all that the model has.

        Returns:
            dictionary: `embedding` float32 `[N, F]`, `projection` float32
            `[N, D]`, unit rows, and of some models `valid` bool `[N]`.

        Raises:
            ModelError: it could not be reached, has no such model, or refused
                the images.
        """
        if not images:
            raise ValueError("Expected at least one image, received none.")
        found = []
        for start in range(0, len(images), self._batch_size):
            batch = list(images[start : start + self._batch_size])
            found.append(self._predict(batch, outputs))
        return {
            name: np.concatenate([rows[name] for rows in found])
            for name in found[0]
        }

    def metadata(self):
        """Describes the model that is served.

        Returns:
            dictionary: `model`, its name; `version`, int; `signatures`, from
            names to `{"inputs": {name: {"dtype": …, "shape": …}}, "outputs":
            …}`, with -1 for sizes that are open.

        Raises:
            ModelError: as `embed`.
        """
        return self._call(self._transport.metadata, self.model)

    def status(self):
        """Describes the versions of the model.

        Returns:
            list of dictionaries, newest first: `version`, int; `state`, START,
            LOADING, AVAILABLE, UNLOADING or END; `error`, "" if there is none.

        Raises:
            ModelError: as `embed`.
        """
        return self._call(self._transport.status, self.model)

    def pin(self):
        """Keeps to the version that is served now, whatever is added later.

        Returns:
            as `metadata`.

        Raises:
            ModelError: as `embed`.
        """
        found = self.metadata()
        self.model = Model(self.model.name, found["version"])
        self._pinned = True
        return found

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
            self._check(e)
            raise
        if "" in rows:  # REST does not name a signature's only output
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

    def _check(self, error):
        """Raises a `ModelError` if it was not the fault of the images.

        A server calls both INVALID_ARGUMENT: bad images, and an unknown label
        or, by REST, signature.
        """
        place, name = self._transport.place, self.model.name
        if self._pinned and error.status == "NOT_FOUND":
            newest = self._call(self._transport.metadata, Model(name))
            raise ModelError(
                place,
                "NOT_FOUND",
                f"version {self.model.version} of {name!r}, with which this "
                "began, is not served any more, version "
                f"{newest['version']} is",
                advice="begin again with that one, or have both served until "
                "this is done",
            ) from error
        if not error.refused or self._known:
            return
        try:
            found = self.metadata()["signatures"]
        except ModelError as e:
            if not e.refused:
                raise
            shown, _, said = e.reason.partition(": ")
            raise ModelError(place, "NOT_FOUND", said, shown=shown) from e
        if self.signature not in found:
            raise ModelError(
                place,
                "FAILED_PRECONDITION",
                f"no signature {self.signature!r}, but {', '.join(found)}",
            ) from error
        self._known = True


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
        "whom to ask: host:port or grpc://host:port for gRPC, "
        "http://host:port for REST",
    )
    define(flags.DEFINE_string, "model", "default", "name of the model there")
    define(
        flags.DEFINE_integer,
        "version",
        None,
        "number of its version; none: the newest",
        0,
    )
    define(flags.DEFINE_string, "label", None, "label of its version")
    define(flags.DEFINE_string, "signature", "serving_default", "what to call")
    define(flags.DEFINE_float, "timeout", 60.0, "seconds per attempt", 0.001)
    define(flags.DEFINE_integer, "attempts", 5, "how often to try", 1)
    define(flags.DEFINE_integer, "batch_size", 32, "images per request", 1)
    define(
        define_path,
        "output",
        None,
        "file to write: .npz, .parquet or .tfrecord; none: print",
    )
    define(
        flags.DEFINE_bool,
        "metadata",
        False,
        "print what the model takes and gives instead",
    )
    define(
        flags.DEFINE_bool,
        "status",
        False,
        "print the model's versions and their states instead",
    )
    require(flag_values, "server")


def main(photographs):
    """Reads the flags and asks for the embeddings of files.

    Args:
        photographs: their paths.
    """
    values = flags.FLAGS
    if values.output:
        embeddings.check(values.output)
    if not photographs and not (values.metadata or values.status):
        raise UserError(
            "Expected photographs, received none; name them behind the flags."
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
        print(f"the embeddings of {len(files)} images are in {values.output}")
    if bad:
        raise UserError(
            "Expected photographs that the model takes, received "
            f"{len(bad)} of {len(photographs)} that it does not take, such as "
            f"{bad[0][0]} ({bad[0][1]}); leave out, mend or convert them."
        )


def _print(paths, rows, reasons):
    """Prints a line per photograph, in their order."""
    of_good = iter(range(len(paths)))
    for i, path in enumerate(paths):
        line = {"file": path}
        if i in reasons:
            line["error"] = reasons[i]
        else:
            row = next(of_good)
            line |= {name: x[row].tolist() for name, x in rows.items()}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    launch.launch(main, define_flags, positional=True)
