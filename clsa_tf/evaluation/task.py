"""Choice of the images on which a run is evaluated."""

import dataclasses
import typing

import numpy as np

from clsa_tf.data.evaluation_batches import evaluation_batches
from clsa_tf.data.open import open_bank_source, open_eval_source
from clsa_tf.data.source import Absent, Source
from clsa_tf.evaluation import protocols
from clsa_tf.evaluation.features import extract

# Bytes of decoded images to keep in memory, of the bank and of the queries.
# Larger datasets are decoded again for each evaluation.
CACHE_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The images of a kNN evaluation.

    Attributes:
        config: `clsa_tf.config.Config` of the run.
        bank: `Source` of the candidate neighbours.
        queries: `Source` of the images whose neighbours are searched; None: the
            images of the bank, each among all others.
        no_accuracy: clause that explains why there is no kNN accuracy; "" if
            there is one.
    """

    config: typing.Any
    bank: Source
    queries: typing.Optional[Source]
    no_accuracy: str = ""

    @property
    def has_accuracy(self):
        """Whether there are labels for a kNN accuracy."""
        return not self.no_accuracy

    @property
    def bank_size(self):
        """Images that neighbours come from; 0 without a kNN accuracy."""
        return self.bank.size if self.has_accuracy else 0

    @property
    def fingerprint(self):
        """Fingerprint of the labelled images, see `Source`; None without."""
        labelled = (self.queries or self.bank) if self.has_accuracy else None
        return labelled and labelled.fingerprint

    def task(self, unreadable):
        """Returns the `Task` of these images, with or without labels.

        The first evaluation decodes them. Later ones find them in memory,
        unless they are more than `CACHE_BYTES`.

        Args:
            unreadable: `clsa_tf.data.unreadable.UnreadableImages`.
        """
        bank = self.bank_batches(unreadable)
        size = min(self.bank.size, self.config.knn_bank)
        queries = None
        if self.queries:
            queries = self.query_batches(unreadable)
            queries = self._cached(queries, self.queries.size)
        return Task(self.config, self._cached(bank, size), queries)

    def _cached(self, batches, images):
        fits = images * self.config.image_size**2 * 3 <= CACHE_BYTES
        return batches.cache() if fits else batches

    def bank_batches(self, unreadable, *, names=False):
        """The bank as `evaluation_batches`, at most `--knn_bank` images."""
        limit = self.config.knn_bank
        return self._batches(self.bank, unreadable, names=names, limit=limit)

    def query_batches(self, unreadable, *, names=False):
        """The queries as `evaluation_batches`; the bank if there are none."""
        if not self.queries:
            return self.bank_batches(unreadable, names=names)
        return self._batches(self.queries, unreadable, names=names)

    def _batches(self, source, unreadable, **options):
        return evaluation_batches(
            source,
            image_size=self.config.image_size,
            crop_ratio=self.config.eval_keep,
            batch_size=256,
            unreadable=unreadable,
            **options,
        )


class Task:
    """The evaluation of a run, with the same images for every encoder.

    Args:
        config: `clsa_tf.config.Config` of the run.
        bank: dataset of (images uint8 `[B, S, S, 3]`, labels int64 `[B]`), the
            labelled images.
        queries: dataset of the same form, the images to classify; None:
            classify each image of the bank by all others.

    Attributes:
        bank: the argument.
        queries: the argument.
    """

    def __init__(self, config, bank, queries):
        """See the class."""
        self.bank = bank
        self.queries = queries
        self._config = config

    def features(self, function):
        """Features and labels of the bank and of the queries.

        Args:
            function: uint8 `[B, S, S, 3]` -> float `[B, F]`.

        Returns:
            two pairs of float32 `[M, F]` and int64 `[M]`.
        """
        bank = extract(function, self.bank)
        if self.queries is None:
            return bank, bank
        return bank, extract(function, self.queries)

    def own(self, count):
        """Rows of the `count` queries in the bank; None if not in the bank."""
        return np.arange(count) if self.queries is None else None

    def accuracy(self, function, protocol="knn"):
        """Accuracy in [0, 1] of the features that `function` returns.

        Args:
            function: uint8 `[B, S, S, 3]` -> float `[B, F]`.
            protocol: a key of `protocols.PROTOCOLS`.
        """
        return self.accuracy_of(*self.features(function), protocol)

    def accuracy_of(self, bank, queries, protocol="knn"):
        """Accuracy in [0, 1] of the results of `features`."""
        return protocols.load(protocol).accuracy(
            bank,
            queries,
            own=self.own(len(queries[0])),
            config=self._config,
        )


def plan(config, train):
    """Chooses the images on which a run is evaluated.

    Queries are the labelled images of `--eval_dataset`, or the test split or
    held-out images of the training dataset. The bank is the first of these with
    the same classes as the queries:

    1. the training images;
    2. the training split of the queries' dataset;
    3. the queries themselves, each among all others.

    Without labelled images, the bank is the training images; neighbours can be
    shown, but there is no accuracy.

    Args:
        config: `clsa_tf.config.Config`.
        train: `Source` of the training images.

    Returns:
        `Evaluation`.

    Raises:
        UserError: a dataset is missing or invalid.
    """
    test = open_eval_source(config)
    if isinstance(test, Absent):
        return Evaluation(config, train, None, test.reason)
    if train.class_names == test.class_names:
        return Evaluation(config, train, test)
    bank = open_bank_source(config)
    if not isinstance(bank, Absent) and bank.class_names == test.class_names:
        return Evaluation(config, bank, test)
    if min(test.size, config.knn_bank) < 2:
        reason = f"one image of {test.name} has no other to compare with"
        return Evaluation(config, train, None, reason)
    return Evaluation(config, test, None)


def announcement(config, train, evaluation):
    """Describes held-out images and the images of the evaluation.

    Args:
        config: `clsa_tf.config.Config`.
        train: `Source` of the training images.
        evaluation: `Evaluation`, or None with `--knn_epochs=0`.

    Returns:
        list of lines to print; empty in the default case.
    """
    lines = [train.about] if train.about else []
    if train.held_out:
        purpose = "for the kNN accuracy"
        if config.eval_dataset:
            purpose = "and not used, because of --eval_dataset"
        elif evaluation is None:
            purpose = "for the report"
        lines[-1] += (
            f": {train.held_out} of {train.held_out + train.size} images are "
            f"held out {purpose}; --labels=none or --holdout=0 trains on all"
        )
    other = "the training images do not have its classes"
    if train.unlabelled:
        other = f"the training images have no labels: {train.unlabelled}"
    if config.eval_dataset and evaluation and evaluation.has_accuracy:
        lines += (evaluation.queries or evaluation.bank).notes
    if evaluation is None:
        lines.append("no kNN accuracy while training: --knn_epochs=0")
        if train.unlabelled:
            lines.append(f"no labels in {train.name}: {train.unlabelled}")
    elif not evaluation.has_accuracy:
        lines.append(f"no kNN accuracy: {evaluation.no_accuracy}")
    elif evaluation.queries is None:
        size = min(evaluation.bank.size, config.knn_bank)
        lines.append(
            f"kNN accuracy of {size} images of {evaluation.bank.name}, each "
            f"compared with all others, because {other}"
        )
    elif evaluation.bank is not train:
        lines.append(
            f"kNN accuracy of {evaluation.queries.size} images of "
            f"{evaluation.queries.name} among those of {evaluation.bank.name}, "
            f"because {other}"
        )
    elif config.eval_dataset:
        lines.append(
            f"kNN accuracy of {evaluation.queries.size} images of "
            f"{evaluation.queries.name} among the training images"
        )
    return lines
