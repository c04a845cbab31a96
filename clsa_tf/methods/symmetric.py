"""The symmetric loss (`--symmetric`) of MoCo and of methods derived from it."""

import dataclasses

import tensorflow as tf


class Symmetric:
    """Each of `key` and `query_0` is once the query and once the key.

    A mixin, see `symmetric`. The loss is the mean over both roles, and the
    queue stores the keys of both views.

    Source: the CIFAR-10 notebook of facebookresearch/moco. It sums the losses.
    """

    @classmethod
    def views(cls, options):
        """Those of the method; both encoders use `key` and `query_0`."""
        return [
            dataclasses.replace(view, shuffle=True, both_orders=True)
            if view.name in ("key", "query_0")
            else view
            for view in super().views(options)
        ]

    def query_names(self):
        """Names of the views that `forward` encodes."""
        return [*super().query_names(), "key"]

    def loss(self, outputs, targets, batch):
        """Mean of the method's loss in both directions; see `Method.loss`."""
        one = super().loss(outputs, targets, batch)
        other = super().loss(_swap(outputs), _swap(targets), batch)
        return tf.nest.map_structure(lambda *x: sum(x) / 2, one, other)

    def update(self, batch, targets, outputs):
        """Stores the keys of `query_0` after those of `key`."""
        super().update(batch, targets, outputs)
        self.queue.enqueue(targets["query_0"])


def symmetric(method_class):
    """Returns the symmetric subclass of `MoCo` or of a derived class."""
    name = f"Symmetric{method_class.__name__}"
    return type(name, (Symmetric, method_class), {})


def _swap(views):
    """The views with the roles of `key` and `query_0` exchanged."""
    return views | {"key": views["query_0"], "query_0": views["key"]}
