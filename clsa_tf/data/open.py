"""Opens the dataset that a user names, whatever it is."""

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

    * `folder:/photos`: images anywhere below: .jpg .jpeg .png .bmp .gif and,
      with `rules.more_formats`, .webp .tif .tiff .heic .heif .avif and what
      begins as an image does, whatever its name (see `listing`). It is
      labelled if every image lies below one of two or more first-level
      folders, the classes. If it has the folders `train` and one of `test`,
      `val`, `validation`, these are the splits, and the classes are below
      them. Otherwise a share `holdout` of a labelled folder, chosen by a hash
      of the path, is for role "eval", the rest for role "train".
    * `tfrecord:gs://bucket/train-*`: `tf.train.Example` with `image/encoded`
      or `image`, and maybe `image/class/label` or `label`. For role "eval"
      there are records only if `holdout` is 1: all of them.
    * `shapes`, which is drawn when first used.
    * a tensorflow-datasets name (`cifar10`, `imagenet2012:5.1.0`, `a/b`) or
      the directory of a prepared one. Role "eval" means `split` or, if that
      is empty, the first of `test`, `validation` that has labels.

    Role "bank" is the training split that stands beside the split of role
    "eval", if the dataset has splits.

    Files up to `memory_bytes` are read into memory, larger record files are
    streamed; folders are read file by file.

    Args:
        dataset: one of the above.
        split: which part; empty for the usual one of the role.
        data_dir: where tensorflow-datasets are prepared; empty for theirs.
        labels: "auto", or "none" to ignore labels.
        holdout: share for evaluation, in [0, 1]; 1 to evaluate on all of it.
        role: "train", "eval" or "bank".
        num_examples: records behind a tfrecord pattern; 0 to count them.
        download: whether tensorflow-datasets may download what is missing.
        window: records among which a streamed source is shuffled.
        memory_bytes: size up to which records are read into memory.
        rules: how files are read. `exif_rotation` and `more_formats` are for
            folders only: other datasets were made for training.

    Returns:
        A `Source`; for role "eval", which needs labels, and "bank" the reason
        why there is none, if so.

    Raises:
        UserError: there is no such dataset, or it holds no images.
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
                f"Expected no split with {dataset}, received {split}; name "
                "the files of the split in the pattern."
            )
        if role == "bank":
            return Absent(f"{dataset} has no splits")
        if role == "eval" and holdout < 1:
            return Absent(
                f"all images of {dataset} are trained on; name others that "
                "have labels with --eval_dataset"
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
    """Opens what a run trains on; see `open_source` for what it raises."""
    return open_source(
        config.dataset,
        split=config.split,
        role="train",
        num_examples=config.num_examples,
        **_common(config),
    )


def open_eval_source(config) -> Union[Source, Absent]:
    """Opens the labelled images that a run is evaluated on, if there are."""
    return _open_evaluation(config, "eval")


def open_bank_source(config) -> Union[Source, Absent]:
    """Opens the training split of what a run is evaluated on, if it has one."""
    return _open_evaluation(config, "bank")


def _open_evaluation(config, role):
    settings = _common(config)
    if config.eval_dataset:
        # A dataset of its own: all of it, and named for its labels.
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
