"""What `auto` stands for, and advice on what was chosen instead.

Published recipes are for a million images on eight GPUs. The values that do
harm on fewer images, in shorter runs or on one device are `auto` unless a
person sets them: `resolve` replaces them at the start of a run, from the number
of images and replicas, and the run records the result in its `run.flags`.
"""

import math

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.errors import UserError
from clsa_tf.methods.momentum import keys_per_step
from clsa_tf.options.fields import AUTO, unresolved

# Each query meets an older key of its own image, as a negative, with a
# probability of (K / N)^2 / 2 for K <= N: one epoch shows each of the N images
# once, so that a key of the epoch before is among the K newest only for the
# first K queries. A quarter makes that 3 %; a queue longer than the data set
# holds K / N keys of each image.
IMAGES_PER_KEY = 4

# The published statistics are those of 32 images on each of eight GPUs.
MOST_PARTS = 8
PART = 32  # images

# The momentum encoder forgets its initial weights as m^steps. The run has to be
# many times 1 / (1 - m) steps long: the quickstart's 1,900 steps at 0.98 are 38
# times as long. Below 0.9 MoCo was published to learn less (0.9: 55.2 %,
# 0.999: 59.0 %; 0: nothing; arXiv 1911.05722, section 4.1).
TIMES = 40
LEAST_MOMENTUM = 0.9


def recorded(config):
    """The `Config` that `config.workdir` was begun with; None if there is none.

    One that cannot be read counts as none: `workdir.claim` refuses it.
    """
    if not config.workdir:
        return None
    try:
        return config_lib.load(config.workdir)
    except UserError:
        return None


def resolve(config, *, images, replicas, recorded=None):
    """Returns `config` with a value in place of every `auto`.

    Args:
        config: `clsa_tf.config.Config`; what is not `auto` stays.
        images: N, how many there are to train on.
        replicas: R, devices that share each batch.
        recorded: `Config` that the run was begun with; its values come before
            those that would be chosen now. None: a new run.

    Raises:
        UserError: the values do not go together.
    """
    given = config
    if recorded and recorded.method == config.method:
        config = config.replace(
            **{
                name: getattr(old, name)
                for new, old in (
                    (config, recorded),
                    (config.options, recorded.options),
                )
                for name in unresolved(new)
            }
        )
    parts = _parts(config.batch_size, replicas * config.accumulation_steps)
    if config.batch_norm == AUTO:
        config = config.replace(batch_norm=_batch_norm(config, replicas, parts))
    if config.batch_norm == "split" and config.batch_norm_splits == AUTO:
        if not parts:
            raise UserError(
                "Expected a --batch_size that divides into parts for "
                f"--batch_norm=split, received {config.batch_size} for "
                f"{replicas} replica(s) and --accumulation_steps="
                f"{config.accumulation_steps}; use a multiple of {2 * PART}."
            )
        config = config.replace(batch_norm_splits=parts)
    if config.batch_norm_splits == AUTO:  # not used; as it always was
        config = config.replace(batch_norm_splits=MOST_PARTS)
    left = unresolved(config.options)
    if "queue_size" in left:
        config = config.replace(queue_size=_queue_size(config, images))
    if "key_momentum" in left:
        config = config.replace(key_momentum=_key_momentum(config, images))
    if config != given:
        config_lib.check(config)
    return config


def reasons(config, resolved, *, images, replicas, recorded=None):
    """What was chosen in place of `auto`, and why: a list of sentences.

    Args:
        config: as it was given to `resolve`.
        resolved: what that returned.
        images: as for `resolve`.
        replicas: as for `resolve`.
        recorded: as for `resolve`.
    """
    names = unresolved(config) + unresolved(config.options)
    if resolved.batch_norm != "split" and "batch_norm_splits" in names:
        names.remove("batch_norm_splits")
    if recorded and names:
        return [f"{_spell(resolved, names)}: as this run was begun"]
    found = []
    for prefix, why in (
        ("batch_norm", lambda: _why_batch_norm(resolved, replicas)),
        ("queue_size", lambda: _why_queue(resolved, images)),
        ("key_momentum", lambda: _why_momentum(resolved, images)),
    ):
        chosen = [name for name in names if name.startswith(prefix)]
        if chosen:
            found.append(f"{_spell(resolved, chosen)}: {why()}")
    return found


# ---- Values


def _batch_norm(config, replicas, parts):
    """The kind of statistics that the method is made for."""
    if config.batch_norm_splits != AUTO:
        return "split"
    if methods.load(config.method).METHOD.batch_statistics == "parts":
        return "split" if replicas == 1 and parts else "local"
    # Replicas cannot share the statistics of a micro-batch.
    return "local" if replicas > 1 < config.accumulation_steps else "sync"


def _parts(batch, multiple):
    """Parts of the batch with statistics of their own; None: it has none.

    As many as possible of `PART` images or more, but two at least; each of two
    images at least.

    Args:
        batch: images of the global batch.
        multiple: replicas times micro-batches.
    """
    fitting = [
        parts
        for parts in range(max(2, multiple), batch // 2 + 1)
        if batch % parts == 0 and parts % multiple == 0
    ]
    large = [p for p in fitting if p <= MOST_PARTS and batch // p >= PART]
    return max(large) if large else min(fitting, default=None)


def _queue_size(config, images):
    share = images // IMAGES_PER_KEY
    power = 2 ** int(math.log2(share)) if share else 1
    usual = _published(config)["queue_size"]
    return max(min(power, usual), keys_per_step(config))


def _key_momentum(config, images):
    most = 1 - TIMES / total_steps(config, images)
    usual = _published(config)["key_momentum"]
    return min(usual, max(LEAST_MOMENTUM, round(most, 3)))


def _published(config):
    """Option -> its published value, of the method's own options."""
    fields = type(config.options).__dataclass_fields__
    return {n: f.metadata.get("published") for n, f in fields.items()}


def total_steps(config, images):
    """Steps of a run on `images` images, at least 1."""
    return max(1, images // config.batch_size * config.total_epochs)


# ---- Words


def _spell(config, names):
    def value(name):
        holder = config if hasattr(config, name) else config.options
        return getattr(holder, name)

    return " ".join(f"--{name}={value(name)}" for name in names)


def _why_batch_norm(config, replicas):
    if config.batch_norm == "split":
        return (
            "statistics of parts of the batch, as of several devices; with "
            "those of the whole, a network can recognise the batch instead of "
            "the image"
        )
    in_parts = config.accumulation_steps > 1
    if config.batch_norm == "sync":
        if in_parts:
            return "statistics of each micro-batch, over all devices"
        return "statistics of the whole batch, as published"
    if replicas > 1:
        wanted = methods.load(config.method).METHOD.batch_statistics
        return (
            "statistics of each device"
            + (" and micro-batch" if in_parts else "")
            + (", as published" if wanted == "parts" else "")
        )
    return f"a batch of {config.batch_size} does not divide into parts"


def _why_queue(config, images):
    size, usual = config.options.queue_size, _published(config)["queue_size"]
    if size == usual:
        return "as published"
    if size == keys_per_step(config):
        return (
            f"the keys of one step, the fewest there can be, for {images:,} "
            f"images (published: {usual:,})"
        )
    return (
        f"at most a quarter of {images:,} images (published: {usual:,}), so "
        "that few negatives are older keys of a query's own image"
    )


def _why_momentum(config, images):
    usual = _published(config)["key_momentum"]
    if config.options.key_momentum == usual:
        return "as published"
    return (
        f"for a run of {total_steps(config, images):,} steps (published: "
        f"{usual}), within which the momentum encoder has to leave its initial "
        "weights"
    )
