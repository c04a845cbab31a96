"""What a run is evaluated on."""

import dataclasses
import typing

from clsa_tf.data.evaluation_batches import evaluation_batches
from clsa_tf.data.open import open_bank_source, open_eval_source
from clsa_tf.data.source import Absent, Source
from clsa_tf.evaluation.knn import KnnTask


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Images whose nearest neighbours are looked for, and among which.

    Attributes:
        config: `clsa_tf.config.Config` of the run.
        bank: `Source` that neighbours are taken from.
        queries: `Source` of images to find neighbours of; None: those of the
            bank, each among all others.
        no_accuracy: why there is no kNN accuracy, a clause; "" if there is.
    """

    config: typing.Any
    bank: Source
    queries: typing.Optional[Source]
    no_accuracy: str = ""

    @property
    def fingerprint(self):
        """Of the labelled images, see `Source`; None if there are none."""
        labelled = None if self.no_accuracy else self.queries or self.bank
        return labelled and labelled.fingerprint

    def task(self, unreadable):
        """Returns the `KnnTask` with these images, labelled or not.

        Args:
            unreadable: `clsa_tf.data.unreadable.UnreadableImages`.
        """
        return KnnTask(
            self.bank_batches(unreadable),
            self.query_batches(unreadable) if self.queries else None,
            k=self.config.knn_k,
            temperature=self.config.knn_temperature,
        )

    def bank_batches(self, unreadable, *, names=False):
        """The bank as `evaluation_batches`, at most `--knn_bank` images."""
        limit = self.config.knn_bank
        return self._batches(self.bank, unreadable, names=names, limit=limit)

    def query_batches(self, unreadable, *, names=False):
        """The queries as `evaluation_batches`; the bank if it is these."""
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


def plan(config, train):
    """Decides which images a run is evaluated on.

    Queries are the labelled images of `--eval_dataset`, or those that the
    training dataset has or keeps for that. The bank are the training images if
    they have the same classes; otherwise the training split that stands beside
    the queries, or, where there is none, the queries themselves, each among
    all others. Without labelled images it is the training images, for which
    neighbours can be found and no accuracy.

    Args:
        config: `clsa_tf.config.Config`.
        train: `Source` that the run trains on.

    Returns:
        `Evaluation`.

    Raises:
        UserError: a dataset is missing, or not as it has to be.
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
        reason = f"one image of {test.name} has none to be compared with"
        return Evaluation(config, train, None, reason)
    return Evaluation(config, test, None)


def announcement(config, train, evaluation):
    """Says what is held out of training, and what a run is evaluated on.

    Args:
        config: `clsa_tf.config.Config`.
        train: `Source` that the run trains on.
        evaluation: `Evaluation`, or None with `--knn_epochs=0`.

    Returns:
        list of lines; empty if all is as usual.
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
    if config.eval_dataset and evaluation and not evaluation.no_accuracy:
        lines += (evaluation.queries or evaluation.bank).notes
    if evaluation is None:
        lines.append("no kNN accuracy while training: --knn_epochs=0")
        if train.unlabelled:
            lines.append(f"no labels in {train.name}: {train.unlabelled}")
    elif evaluation.no_accuracy:
        lines.append(f"no kNN accuracy: {evaluation.no_accuracy}")
    elif evaluation.queries is None:
        size = min(evaluation.bank.size, config.knn_bank)
        lines.append(
            f"kNN accuracy: of {size} images of {evaluation.bank.name}, each "
            f"among all others, because {other}"
        )
    elif evaluation.bank is not train:
        lines.append(
            f"kNN accuracy: of {evaluation.queries.size} images of "
            f"{evaluation.queries.name} among those of {evaluation.bank.name}, "
            f"because {other}"
        )
    elif config.eval_dataset:
        lines.append(
            f"kNN accuracy: of {evaluation.queries.size} images of "
            f"{evaluation.queries.name} among the training images"
        )
    return lines
