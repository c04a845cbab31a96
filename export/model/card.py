"""The model card of an export, as JSON and as Markdown."""

import datetime
import hashlib
import json
import os

import numpy as np

from clsa_tf import config as config_lib
from clsa_tf import stack
from clsa_tf.files import MODEL_CARD
from clsa_tf.networks.encoder import weight_name
from clsa_tf.networks.functional import architecture
from clsa_tf.training import metrics_log, outcome
from clsa_tf.training.workdir import DATASET

TEXT = "README.md"

# Name -> dtype, shape, meaning.
_OUTPUTS = {
    "embedding": ("float32", "[N, {features}]", "the backbone's features"),
    "projection": (
        "float32",
        "[N, {projection}]",
        "output of the head, unit vectors",
    ),
    "valid": ("bool", "[N]", "false for a bad image, whose rows are NaN"),
}
# Signature -> name, dtype, shape and meaning of its input.
_INPUTS = {
    "serving_default": (
        "image_bytes",
        "string",
        "[N]",
        "JPEG, PNG, BMP or GIF files of any size (first frame of a GIF)",
    ),
    "images": (
        "images",
        "float32",
        "[N, H, W, 3]",
        "RGB in 0..1, not resized",
    ),
    "images_uint8": (
        "images",
        "uint8",
        "[N, H, W, 3]",
        "RGB in 0..255, not resized",
    ),
}


def fingerprint(variables):
    """Returns a digest of the names, shapes and values of variables.

    A run and its exports have the same digest.

    Args:
        variables: the encoder's variables.

    Returns:
        `"sha256:…"`.
    """
    digest = hashlib.sha256()
    for variable in sorted(variables, key=weight_name):
        value = np.ascontiguousarray(variable.numpy())
        head = f"{weight_name(variable)} {value.dtype} {value.shape}\n"
        digest.update(head.encode())
        digest.update(value.tobytes())
    return f"sha256:{digest.hexdigest()}"


def describe(workdir, trained, served_as, *, license_):
    """Describes an export.

    Args:
        workdir: directory of the run.
        trained: `clsa_tf.training.checkpoint.Trained` of that run.
        served_as: dictionary of `image_size` (px), `keep` (the crop ratio),
            `precision`, `outputs`, `bad_images` and `limits`.
        license_: licence of the weights, text.

    Returns:
        dictionary of JSON values, the model card.
    """
    config, encoder = trained.config, trained.encoder
    return {
        "format": 1,
        "method": config.method,
        "license": license_,
        "fingerprint": fingerprint(encoder.variables),
        "encoder": architecture(config),
        "parameters": sum(v.shape.num_elements() for v in encoder.variables),
        **outcome.of(workdir, trained),
        "train_seconds": round(trained.seconds, 1),
        "data": {"dataset": config.dataset} | _read(workdir, DATASET),
        "evaluation": _evaluation(workdir),
        **served_as,
        "signatures": _signatures(encoder, served_as),
        "flags": _flags(config),
        "exported": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
        "made_with": stack.versions(),
    }


def write(card, directory):
    """Writes a card (see `describe`) into a directory, as JSON and Markdown."""
    for name, text in (
        (MODEL_CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n"),
        (TEXT, _text(card)),
    ):
        path = os.path.join(directory, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _flags(config):
    """Returns the run's flagfile without the paths of its machine."""
    private = ("--workdir=", "--data_dir=", "--data_service=")
    lines = config_lib.to_flagfile(config).splitlines(keepends=True)
    return "".join(x for x in lines if not x.startswith(private))


def _signatures(encoder, served_as):
    sizes = {
        "features": encoder.features,
        "projection": encoder.projections,
    }

    def tensor(dtype, shape, meaning):
        shape = shape.format(**sizes)
        return {"dtype": dtype, "shape": shape, "meaning": meaning}

    names = list(served_as["outputs"])
    names += ["valid"] if served_as["bad_images"] == "nan" else []
    outputs = {name: tensor(*_OUTPUTS[name]) for name in names}
    return {
        signature: {"inputs": {name: tensor(*rest)}, "outputs": outputs}
        for signature, (name, *rest) in _INPUTS.items()
    }


def _evaluation(workdir):
    """Returns accuracies in [0, 1], from the report if there is one."""
    summary = _read(workdir, "summary.json")
    reported = {k: v for k, v in summary.items() if k.startswith("knn_") and v}
    logged = [e["knn"] for e in metrics_log.read(workdir) if "knn" in e]
    return reported or ({"knn_trained": logged[-1]} if logged else {})


def _read(workdir, name):
    try:
        with open(os.path.join(workdir, name), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}  # the file is optional


def _text(card):
    data, limits = card["data"], card["limits"]
    images = f", {data['images']:,} images" if "images" in data else ""
    accuracies = [
        (f"kNN accuracy, {name[len('knn_') :]}", f"{100 * value:.1f} %")
        for name, value in card["evaluation"].items()
    ]

    def tensor_row(name, tensor):
        kind = f"{tensor['dtype']} {tensor['shape']}"
        return f"`{name}`", kind, tensor["meaning"]

    inputs = [
        (f"`{name}`", *tensor_row(*item))
        for name, signature in card["signatures"].items()
        for item in signature["inputs"].items()
    ]
    signature = card["signatures"]["images"]  # all have the same outputs
    outputs = [tensor_row(*item) for item in signature["outputs"].items()]
    bad_images = {
        "error": (
            "A bad image fails its request; the error names the image and the "
            "reason."
        ),
        "nan": "A bad image gives rows of NaN, and `valid` is false for it.",
    }[card["bad_images"]]
    return "\n".join(
        [
            "# An image encoder",
            "",
            f"Pretrained without labels by **{card['method']}**, "
            f"{card['steps']:,} steps on `{data['dataset']}`{images}.",
            "",
            *_warnings(card),
            *_table("", "", rows=_facts(card)),
            "",
            "## Evaluation",
            "",
            *(
                _table("measure", "", rows=accuracies)
                if accuracies
                else ["Not evaluated: the run measured no accuracy."]
            ),
            "",
            "## Inputs",
            "",
            *_table("signature", "input", "type", "meaning", rows=inputs),
            "",
            f"Encoded images are resized so that {card['image_size']} px are "
            f"{100 * card['keep']:g} % of their shorter side, and "
            f"centre-cropped to {card['image_size']} x {card['image_size']} "
            "px. The EXIF orientation is not applied. WebP, TIFF, HEIC and "
            "AVIF files are rejected; `export.embed` rotates and converts "
            "photographs before it sends them.",
            "",
            f"{bad_images} The model rejects files of more than "
            f"{limits['image_bytes']:,} bytes or {limits['image_pixels']:,} "
            f"pixels, and requests of more than {limits['batch_images']} "
            "images (or as many pixels).",
            "",
            "## Outputs",
            "",
            *_table("output", "type", "meaning", rows=outputs),
            "",
            "## Training flags",
            "",
            "```",
            card["flags"].strip(),
            "```",
            "",
        ]
    )


def _warnings(card):
    """Returns the lines of warnings, to be shown first."""
    return [
        line
        for _, sentence in outcome.warnings(card)
        for line in (f"> **Warning:** {sentence}.", "")
    ]


def _facts(card):
    encoder, made = card["encoder"], card["made_with"]
    total = card["total_steps"]
    return [
        ("licence", card["license"]),
        (
            "steps",
            f"{card['steps']:,}" + (f" of {total:,}" if total else ""),
        ),
        *(("changed", change) for change in outcome.history(card)),
        *_embeddings(card["embeddings"]),
        (
            "backbone",
            f"{encoder['backbone']}, width {encoder['width']:g}, stem "
            f"{encoder['stem']}",
        ),
        ("parameters", f"{card['parameters']:,}"),
        ("precision", card["precision"]),
        ("fingerprint of the weights", f"`{card['fingerprint']}`"),
        (
            "exported",
            f"{card['exported']}, clsa_tf {made['clsa_tf']}, TensorFlow "
            f"{made['tensorflow']}",
        ),
    ]


def _embeddings(statistics):
    if not statistics:
        return []
    return [
        (
            "projections",
            f"spread {statistics['spread']:.3f} of 1, rank "
            f"{statistics['rank']:.1f}, at step {statistics['step']:,}",
        )
    ]


def _table(*head, rows):
    """Returns the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
