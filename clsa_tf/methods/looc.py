"""LooC and LooC++: one head per augmentation that stays sensitive to it.

Head 0 learns to ignore all augmentations, as MoCo does. Each other head is
sensitive to one augmentation and ignores the others. Its positive key has the
same parameters of this augmentation as the query. The other keys of the same
image, which have other parameters, are negatives. All heads share the backbone.
LooC uses the backbone's features; LooC++ concatenates the hidden layers of the
heads.

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
from clsa_tf.methods.base import own_rows
from clsa_tf.methods.momentum import MomentumMethod
from clsa_tf.options import groups
from clsa_tf.options.fields import AUTO, Crop, option, override

# Augmentation -> its parts of a view, see `clsa_tf.augment.views`.
AUGMENTATIONS = {
    "color": ("jitter", "gray"),
    "rotation": ("rotation",),
    "texture": ("texture",),
}
SMALL_QUEUE = 1024  # keys; a run with a queue of this size collapsed


@dataclasses.dataclass(frozen=True)
class Options(groups.Momentum, groups.Projection, groups.AugmentationOptions):
    """Flags of LooC."""

    augmentations: tuple[str, ...] = option(
        ("color", "rotation"),
        "augmentations that have a head sensitive to them: color (jitter and "
        "greyscale, which are applied in any case), rotation (by quarter "
        "turns), texture (random convolutions)",
        choices=tuple(AUGMENTATIONS),
        group="views",
    )
    texture_probability: float = option(
        0.5,
        "probability, in (0, 1], of a random texture, if texture is one of "
        "--augmentations",
        above=0.0,
        maximum=1.0,
        group="views",
    )
    concatenate_heads: bool = option(
        False,
        "LooC++: evaluate and export the concatenated hidden layers of all "
        "heads instead of the backbone's features",
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
        """Number of heads: head 0, and one for each augmentation."""
        return 1 + len(self.augmentations)

    @property
    def concatenate(self):
        """See `clsa_tf.networks.encoder.Encoder`."""
        return self.concatenate_heads

    def view(self, name, crop, **details):
        """Makes the `View` called `name` with all `augmentations`."""
        texture = "texture" in self.augmentations
        added = dict(
            rotation="rotation" in self.augmentations,
            texture=self.texture_probability if texture else 0.0,
        )
        return super().view(name, crop, **added | details)


def check(config):
    """Raises `UserError` for options that conflict."""
    options = config.options
    moco.check(config)
    given = options.augmentations
    if not given or len(set(given)) < len(given):
        raise UserError(
            "Expected one or more different --augmentations of "
            f"{', '.join(AUGMENTATIONS)}, received "
            f"{','.join(given) or 'none'}; name each once, or set "
            "--method=moco to use none."
        )
    jitter = options.jitter_probability and any(options.jitter)
    if "color" in given and not (jitter or options.gray):
        raise UserError(
            "Expected colour jitter or greyscale for the head of color, "
            "received --gray=0 and no jitter; enable one, or remove color from "
            "--augmentations."
        )
    if options.concatenate and options.projection_layers < 2:
        raise UserError(
            "Expected heads with a hidden layer for --concatenate_heads, "
            f"received --projection_layers={options.projection_layers}; set "
            "--projection_layers=2 or omit --concatenate_heads."
        )


class LooC(MomentumMethod):
    """Per head: a query against its key, other keys of the image and a queue.

    Attributes:
        queues: list of a `KeyQueue` for each head `h`; it holds keys of view
            `key_h`, as the head's positive keys are.
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
        """Queries, then the keys.

        `key_0` shares no augmentation with the queries; each further key shares
        one. All queries have the same parameters of `augmentations` and differ
        in the rest, which no head is sensitive to. So a key has the same
        relation to all queries.
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
    def advice(cls, config):
        """Warns of a small queue without in-batch negatives."""
        options = config.options
        if options.inbatch_negatives or options.queue_size > SMALL_QUEUE:
            return []
        return [
            f"--queue_size={options.queue_size} is small: with 1,024 keys "
            "LooC's projections collapsed on the dataset shapes; add "
            "--inbatch_negatives"
        ]

    @classmethod
    def chance_loss(cls, config):
        """Mean over the heads of `ln C`; times the queries if summed."""
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
        """Mean of the heads' contrastive losses; see `Method.loss`.

        Reports the top-1 accuracy of each head for the first query. Candidates
        of the heads with an augmentation include the image's other keys.
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
        """Mean loss over the heads and hits of each, for queries of one crop.

        Args:
            queries: float32 `[n, H, D]`.
            keys: float32 `[G, V, H, D]`, of the `V = H` key views.
            example_ids: int32 `[n]`, position of each query in the global
                batch.

        Returns:
            float32 `[n]`, and a list of `H` float32 `[n]` of 0 and 1.
        """
        terms, hits = [], []
        for head in range(self.options.heads):
            # Head 0 ignores all differences between the key views.
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
            keys: float32 `[G, V, D]`, of the candidate views.
            example_ids: int32 `[n]`, position of each query in the global
                batch.
            head: index of the head, and of the view with its positive keys.

        Returns:
            float32 `[n, C]`, `C = V + K`, or `G V + K` with in-batch negatives;
            and int32 `[n]`, the column of the positive key.
        """
        views = keys.shape[1]
        if self.options.inbatch_negatives:
            flat = tf.reshape(keys, [-1, keys.shape[2]])
            new = losses.cosines(queries, flat)
            positive = example_ids * views + head
        else:
            own = own_rows(keys, example_ids)
            new = tf.reduce_sum(queries[:, tf.newaxis] * own, axis=2)
            positive = tf.fill(tf.shape(example_ids), head)
        old = losses.cosines(queries, self.queues[head].keys)
        return tf.concat([new, old], axis=1), positive

    def collapse_projections(self, targets, outputs):
        """Keys of head 0, of the global batch."""
        return targets["key_0"][:, 0]

    def update(self, batch, targets, outputs):
        """Moves the momentum encoder, then stores each head's positive keys."""
        super().update(batch, targets, outputs)
        for head, queue in enumerate(self.queues):
            queue.enqueue(targets[f"key_{head}"][:, head])


METHOD = LooC
