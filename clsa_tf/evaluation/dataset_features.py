"""Features of all training images, in the order of their index."""

import functools

import numpy as np
import tensorflow as tf

from clsa_tf.data.evaluation_batches import indexed_batches
from clsa_tf.data.order import Worker
from clsa_tf.distributed import collectives
from clsa_tf.errors import Stopped, UserError
from clsa_tf.networks.encoder import copy_variables

# Number of images that a replica encodes at once.
_BATCH = 128


class DatasetFeatures:
    """Encodes a whole dataset with an encoder in training, on all replicas.

    Args:
        method: the trained `Method`.
        source: `clsa_tf.data.source.Source` of the training images.
        strategy: the strategy of the run.
        unreadable: `clsa_tf.data.unreadable.UnreadableImages`.
        stop_signal: function of the number of batches encoded in a pass that
            returns the number of the signal that asks to stop, or 0 to
            continue; the same on all workers.
    """

    def __init__(self, method, source, strategy, unreadable, *, stop_signal):
        """See the class."""
        self._method = method
        self._source = source
        self._strategy = strategy
        self._unreadable = unreadable
        self._stop_signal = stop_signal
        self._copy = None
        # Made once, because each `tf.function` is traced again.
        self._step = tf.function(self._encode_on_replicas)

    def once(self):
        """Returns the function `features` of `Method.on_epoch_begin`.

        It computes each result once and caches it. It raises `Stopped` after a
        signal.
        """
        return functools.lru_cache(maxsize=None)(self._features)

    def _features(self, encoder=None, *, projections=False):
        if not self._source.random_access:
            raise UserError(
                "Expected a dataset with an index per image for features of "
                f"all images, received {self._source.name}, which is read as a "
                "stream; use a folder, array_record files or a smaller dataset."
            )
        self._take(encoder or self._method.encoder)
        found = None
        for done, (index, rows) in enumerate(self._batches(projections)):
            number = self._stop_signal(done)
            if number:
                raise Stopped(number)
            if found is None:
                found = np.zeros([self._source.size, rows.shape[1]], np.float32)
            known = index >= 0
            found[index[known]] = rows[known]
        return found

    def _take(self, encoder):
        """Copies an encoder's variables; all workers must call it.

        Running statistics differ between replicas. Reading them here averages
        them, so the result does not depend on the number of replicas.
        """
        if self._copy is None:
            with self._strategy.scope():
                self._copy = self._method.make_encoder("dataset_features")
        copy_variables(encoder, self._copy)

    def _batches(self, projections):
        """Yields (indices, rows) of each global batch; index -1 is padding."""
        replicas = self._strategy.num_replicas_in_sync
        config = self._method.config

        def of_worker(context):
            count = context.num_input_pipelines
            batches = indexed_batches(
                self._source,
                image_size=config.image_size,
                crop_ratio=config.eval_keep,
                batch_size=_BATCH * replicas,
                unreadable=self._unreadable,
                worker=Worker(context.input_pipeline_id, count),
            )
            return batches.unbatch().batch(_BATCH, drop_remainder=True)

        for batch in self._strategy.distribute_datasets_from_function(
            of_worker
        ):
            yield tuple(
                self._strategy.experimental_local_results(x)[0].numpy()
                for x in self._step(*batch, projections=projections)
            )

    def _encode_on_replicas(self, images, index, *, projections):
        def encode(images, index):
            network = self._copy.project if projections else self._copy
            rows = network(images, training=False)
            rows = tf.where(index[:, tf.newaxis] >= 0, rows, 0.0)
            return collectives.gather(index), collectives.gather(rows)

        return self._strategy.run(encode, args=(images, index))
