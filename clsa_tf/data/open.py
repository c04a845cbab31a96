"""Opens the dataset that the user names."""

from dataclasses import replace
from typing import Union

from clsa_tf.data import headers
from clsa_tf.data.source import Absent, Source
from clsa_tf.data.sources.folder import open_folder
from clsa_tf.data.sources.records import MEMORY_BYTES, WINDOW_RECORDS
from clsa_tf.data.sources.tfds import open_tfds
from clsa_tf.data.sources.tfrecord import open_tfrecords
from clsa_tf.errors import UserError

FOLDER, TFRECORD = "folder:", "tfrecord:"


def open_source(
    dataset: str,
    *,
    split: str = "",
    data_dir: str = "",
    labels: str = "auto",
    holdout: float = 0.1,
    role: str = "train",
    num_examples: int = 0,
    download: bool = False,
    window: int = WINDOW_RECORDS,
    memory_bytes: int = MEMORY_BYTES,
    rules: headers.Rules = headers.DEFAULT,
) -> Union[Source, Absent]:
    """Opens a dataset of images.

    Spellings of `dataset`:

    * `folder:/photos`: all images anywhere below the folder. These are files
      named .jpg .jpeg .png .bmp .gif. With `rules.more_formats` they are also
      files named .webp .tif .tiff .heic .heif .avif, and files that start like
      an image, whatever their names (see `listing`). The folder is labelled if
      every image is in one of at least two first-level folders, the classes.
      If it has the folders `train` and one of `test`, `val`, `validation`,
      these are the splits, and the classes are the folders in them. Otherwise
      a share `holdout` of a labelled folder, chosen by a hash of the path, is
      for role "eval", and the rest is for role "train".
    * `tfrecord:gs://bucket/train-*`: `tf.train.Example` with `image/encoded`
      or `image`, and optionally `image/class/label` or `label`. Role "eval"
      gets all records if `holdout` is 1, and none otherwise.
    * `shapes`: the embedded dataset, rendered on first use.
    * a tensorflow-datasets name (`cifar10`, `imagenet2012:5.1.0`, `a/b`) or
      the directory of a prepared dataset. Role "eval" gets `split` or, if that
      is empty, the first of `test`, `validation`, `val` that has labels.

    Role "bank" gets the training split that belongs to the split of role
    "eval", if the dataset has splits.

    Record files up to `memory_bytes` are read into memory, and larger ones are
    streamed. Folders are read file by file.

    Args:
        dataset: one of the above.
        split: name of the split; empty for the default of the role.
        data_dir: directory of the prepared tensorflow-datasets; empty for
            their default.
        labels: "auto", or "none" to ignore labels.
        holdout: share for evaluation, in [0, 1]; 1 to evaluate on all images.
        role: "train", "eval" or "bank".
        num_examples: number of records of a tfrecord pattern; 0 to count them.
        download: whether tensorflow-datasets may download missing data.
        window: number of records among which a streamed source is shuffled.
        memory_bytes: largest size of records to read into memory.
        rules: how files are read. `exif_rotation` and `more_formats` apply to
            folders only, because other datasets were prepared for training.

    Returns:
        A `Source`. For the roles "eval", which needs labels, and "bank", it
        may be an `Absent` with the reason why there is none.

    Raises:
        UserError: the dataset does not exist, or has no images.
    """
    memory = {"window": window, "memory_bytes": memory_bytes}
    if dataset.startswith(FOLDER):
        source = open_folder(
            dataset[len(FOLDER) :],
            split=split,
            labels=labels,
            holdout=holdout,
            role=role,
            rules=rules,
        )
    elif dataset.startswith(TFRECORD):
        if split not in ("", "train"):
            raise UserError(
                f"Expected no split with {dataset}, received {split}; "
                "choose the files of the split by the pattern."
            )
        if role == "bank":
            return Absent(f"{dataset} has no splits")
        if role == "eval" and holdout < 1:
            return Absent(
                f"training uses all images of {dataset}; pass other images "
                "with labels as --eval_dataset"
            )
        source = open_tfrecords(
            dataset[len(TFRECORD) :],
            labels=labels,
            num_examples=num_examples if role == "train" else 0,
            **memory,
        )
    else:
        source = open_tfds(
            dataset,
            split=split,
            data_dir=data_dir,
            labels=labels,
            role=role,
            download=download,
            **memory,
        )
    if isinstance(source, Absent):
        return source
    if role == "eval" and source.unlabelled:
        return Absent(f"no labels in {source.name}: {source.unlabelled}")
    if not dataset.startswith(FOLDER):
        rules = rules._replace(exif_rotation=False, more_formats=False)
    return replace(source, rules=rules)


def open_train_source(config) -> Source:
    """Opens the training images of a run; see `open_source` for errors."""
    return open_source(
        config.dataset,
        split=config.split,
        role="train",
        num_examples=config.num_examples,
        **_common(config),
    )


def open_eval_source(config) -> Union[Source, Absent]:
    """Opens the labelled images for the evaluation of a run, if any."""
    return _open_evaluation(config, "eval")


def open_bank_source(config) -> Union[Source, Absent]:
    """Opens the training split of the evaluation dataset, if it has one."""
    return _open_evaluation(config, "bank")


def _open_evaluation(config, role):
    settings = _common(config)
    if config.eval_dataset:
        # A dataset only for evaluation: use all of it, with its labels.
        settings |= {"holdout": 1.0, "labels": "auto"}
    return open_source(
        config.eval_dataset or config.dataset,
        split=config.eval_split,
        role=role,
        **settings,
    )


def _common(config):
    return {
        "data_dir": config.data_dir,
        "labels": config.labels,
        "holdout": config.holdout,
        "download": config.download,
        "rules": headers.Rules(
            image_bytes=config.max_image_bytes,
            image_pixels=config.max_image_pixels,
            exif_rotation=config.exif_rotation,
            more_formats=config.more_formats,
        ),
    }
