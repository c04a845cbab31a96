"""What a run is evaluated on."""

from clsa_tf.data.pipeline import evaluation_batches
from clsa_tf.data.sources import open_eval_source
from clsa_tf.errors import UserError
from clsa_tf.evaluation.knn import KnnTask


def knn_task(config, train, faults):
    """Returns the kNN evaluation that `config` describes, or None.

    Args:
        config: `clsa_tf.config.Config`.
        train: `Source` that the run trains on.
        faults: `clsa_tf.data.faults.Faults` that counts unreadable images.

    Returns:
        `KnnTask`, or None where training or evaluation images have no labels.

    Raises:
        UserError: a dataset is missing, or their classes differ.
    """
    test = open_eval_source(config)
    if test is None or train.class_names is None or test.class_names is None:
        return None
    if config.eval_dataset:  # otherwise the same folder as `train`
        for note in test.notes:
            print(f"  {note}")
    if train.class_names != test.class_names:
        raise UserError(
            f"Expected the same classes in {train.name} and {test.name}, "
            f"received {len(train.class_names)} and {len(test.class_names)}, "
            "or other names; choose another --eval_dataset or --labels=none."
        )

    def batches(source, limit=None):
        return evaluation_batches(
            source,
            image_size=config.image_size,
            keep=config.eval_keep,
            batch_size=256,
            faults=faults,
            limit=limit,
        )

    return KnnTask(
        batches(train, config.knn_bank),
        batches(test),
        k=config.knn_k,
        temperature=config.knn_temperature,
    )
