"""LooC and LooC++: for each augmentation a head that does not ignore it.

Head 0 learns to ignore all augmentations, as MoCo does. Each further head has
to tell apart what differs in one augmentation, and to ignore the others: its
positive key was augmented by it exactly as the query, and the other keys of the
same image, which were not, are negatives. All heads share the backbone, whose
features LooC uses; LooC++ uses the hidden layers of the heads, side by side.

Source: Xiao et al. (arXiv 2008.05659); they published no code. Other images'
keys of the same batch as negatives: SeCo (arXiv 2103.16607).
"""

import dataclasses
import math

import tensorflow as tf

from clsa_tf import losses
from clsa_tf.errors import UserError
from clsa_tf.losses.contrast import top1
from clsa_tf.methods import moco
from clsa_tf.methods.momentum import MomentumMethod
from clsa_tf.options import groups
from clsa_tf.options.fields import AUTO, Crop, option, override

# Parts of a view (see `clsa_tf.augment.views`) that make up an augmentation.
AUGMENTATIONS = {
    "color": ("jitter", "gray"),
    "rotation": ("rotation",),
    "texture": ("texture",),
}


@dataclasses.dataclass(frozen=True)
class Options(groups.Momentum, groups.Projection, groups.AugmentationOptions):
    """Flags of LooC."""

    # Keys are never queries: their views share augmentations with them.
    symmetric = False

    augmentations: tuple[str, ...] = option(
        ("color", "rotation"),
        "augmentations with a head each that does not ignore them: color "
        "(jitter and greyscale, which are there in any case), rotation (by "
        "quarter turns), texture (random convolutions)",
        choices=tuple(AUGMENTATIONS),
        group="views",
    )
    texture_probability: float = option(
        0.5,
        "probability, in (0, 1], of a random texture, if it is one of "
        "--augmentations",
        above=0.0,
        maximum=1.0,
        group="views",
    )
    concatenate_heads: bool = option(
        False,
        "LooC++: what is evaluated and exported are the hidden layers of all "
        "heads, side by side, instead of the backbone's features",
    )
    key_crop: Crop = override(moco.Options, "key_crop", Crop(224, 0.2, 1.0))
    query_crops: tuple[Crop, ...] = override(
        moco.Options, "query_crops", (Crop(224, 0.2, 1.0),)
    )
    temperature: float = override(moco.Options, "temperature", 0.2)
    queue_size: int = override(
        moco.Options, "queue_size", AUTO, published=16_384
    )
    inbatch_negatives: bool = override(moco.Options, "inbatch_negatives", False)

    @property
    def heads(self):
        """One that ignores everything, and one for each augmentation."""
        return 1 + len(self.augmentations)

    @property
    def concatenate(self):
        """See `clsa_tf.networks.encoder.Encoder`."""
        return self.concatenate_heads

    def view(self, name, crop, **details):
        """Returns the `View` called `name`, with all augmentations."""
        texture = "texture" in self.augmentations
        added = dict(
            rotation="rotation" in self.augmentations,
            texture=self.texture_probability if texture else 0.0,
        )
        return super().view(name, crop, **added | details)


def check(config):
    """Raises `UserError` for options that do not go together."""
    options = config.options
    moco.check(config)
    given = options.augmentations
    if not given or len(set(given)) < len(given):
        raise UserError(
            "Expected one or more different --augmentations of "
            f"{', '.join(AUGMENTATIONS)}, received "
            f"{','.join(given) or 'none'}; name each once, or use "
            "--method=moco to have none."
        )
    jitter = options.jitter_probability and any(options.jitter)
    if "color" in given and not (jitter or options.gray):
        raise UserError(
            "Expected a colour jitter or greyscale for the head that does not "
            "ignore color, received --gray=0 and no jitter; allow one, or "
            "take color out of --augmentations."
        )
    if options.concatenate and options.projection_layers < 2:
        raise UserError(
            "Expected heads with a hidden layer for --concatenate_heads, "
            f"received --projection_layers={options.projection_layers}; set "
            "2 or leave --concatenate_heads out."
        )


class LooC(MomentumMethod):
    """Each head's query against its own key, the image's others and a queue.

    Attributes:
        queues: a `KeyQueue` for each head `h`, of keys like its positive ones:
            of view `key_h`.
    """

    batch_statistics = "parts"

    def __init__(self, *args):
        """See `Method`."""
        super().__init__(*args)
        self.queues = [
            self.make_queue(head) for head in range(self.options.heads)
        ]

    @classmethod
    def views(cls, options):
        """Queries; a key that shares nothing; one per augmentation shared.

        Queries differ in what no head is to tell apart, so that each key is
        to all of them what it is to the first.
        """
        shared = [AUGMENTATIONS[name] for name in options.augmentations]
        everything = sum(shared, ())
        views = []
        for i, crop in enumerate(options.query_crops):
            like = dict(like="query_0", shared=everything) if i else {}
            views.append(options.view(f"query_{i}", crop, **like))
        for i, parts in enumerate([(), *shared]):
            like = dict(like="query_0", shared=parts) if i else {}
            views.append(
                options.view(f"key_{i}", options.key_crop, shuffle=True, **like)
            )
        return views

    @classmethod
    def chance_loss(cls, config):
        """Mean over the heads of `ln C`; for each query if they are summed."""
        options = config.options
        images = config.batch_size if options.inbatch_negatives else 1
        logs = [
            math.log(images * views + options.queue_size)
            for views in [1] + [options.heads] * (options.heads - 1)
        ]
        terms = len(options.query_crops)
        return (terms if options.over_crops == "sum" else 1) * (
            sum(logs) / len(logs)
        )

    def project_keys(self, images):
        """Unit projections float32 `[n, H, D]` of uint8 `[n, S, S, 3]`."""
        return self.momentum_encoder.project_heads(images, training=True)

    def targets(self, batch):
        """Keys float32 `[G, H, D]` of all heads, by view."""
        return self.shuffled_keys(batch, self.view_names("key_"))

    def forward(self, batch):
        """Unit projections `[n, H, D]` of all queries; see `Method.forward`."""
        return self.encode_views(
            lambda x: self.encoder.project_heads(x, training=True),
            batch,
            self.view_names("query_"),
        )

    def loss(self, outputs, targets, batch):
        """Mean of the heads' contrasts; see `Method.loss`.

        Reports how often each head of the first query recognises its key; of
        a head with an augmentation of its own, among the image's other keys.
        """
        ids = batch["example_ids"]
        keys = tf.stack([targets[x] for x in self.view_names("key_")], axis=1)
        found = [
            self.contrast(outputs[name], keys, ids)
            for name in self.view_names("query_")
        ]
        terms, hits = zip(*found)
        names = [f"{name}_accuracy" for name in self.options.augmentations]
        return self.options.reduce(terms), dict(
            zip(["contrast_accuracy", *names], hits[0])
        )

    def contrast(self, queries, keys, example_ids):
        """Mean loss of the heads and hits of each, for queries of one crop.

        Args:
            queries: float32 `[n, H, D]`.
            keys: float32 `[G, V, H, D]`, of the `V = H` key views.
            example_ids: int32 `[n]`, of the queries in the global batch.

        Returns:
            float32 `[n]`, and a list of `H` float32 `[n]` of 0 and 1.
        """
        terms, hits = [], []
        for head in range(self.options.heads):
            # Head 0 ignores all that the other views differ in.
            views = keys[:, :, head] if head else keys[:, :1, head]
            similarities, positive = self.similarities(
                queries[:, head], views, example_ids, head
            )
            terms.append(
                losses.info_nce(
                    similarities,
                    positive,
                    temperature=self.options.temperature,
                )
            )
            hits.append(top1(similarities, positive))
        return sum(terms) / len(terms), hits

    def similarities(self, queries, keys, example_ids, head):
        """Cosines of one head's queries with their candidates.

        Args:
            queries: float32 `[n, D]`.
            keys: float32 `[G, V, D]`, of the views that are candidates.
            example_ids: int32 `[n]`, of the queries in the global batch.
            head: index of the head, and of the view with its positive keys.

        Returns:
            float32 `[n, C]`, `C = V + K`, or `G V + K` with the batch's other
            images; and int32 `[n]`, the column of the positive key.
        """
        views = keys.shape[1]
        if self.options.inbatch_negatives:
            flat = tf.reshape(keys, [-1, keys.shape[2]])
            new = losses.cosines(queries, flat)
            positive = example_ids * views + head
        else:
            own = tf.gather(keys, example_ids)
            new = tf.reduce_sum(queries[:, tf.newaxis] * own, axis=2)
            positive = tf.fill(tf.shape(example_ids), head)
        old = losses.cosines(queries, self.queues[head].keys)
        return tf.concat([new, old], axis=1), positive

    def collapse_embeddings(self, targets, outputs):
        """Head 0's keys of the global batch."""
        return targets["key_0"][:, 0]

    def update(self, batch, targets, outputs):
        """Moves the momentum encoder, then stores each head's positive keys."""
        super().update(batch, targets, outputs)
        for head, queue in enumerate(self.queues):
            queue.enqueue(targets[f"key_{head}"][:, head])


METHOD = LooC
