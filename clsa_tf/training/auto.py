"""Chooses values for flags that are `auto`, and explains the choice.

Published recipes are for a million images on eight GPUs. Flags whose published
values do harm on fewer images, in shorter runs or on one device are `auto`
unless they are set. At the start of a run `resolve` replaces `auto` with
values that suit the number of images and replicas. The run records the values
in its `run.flags`. A method resolves options of its own, see
`Method.resolve_auto`.
"""

import math

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.errors import UserError
from clsa_tf.methods.base import RunInfo
from clsa_tf.methods.momentum import keys_per_step
from clsa_tf.networks import precision
from clsa_tf.options.fields import AUTO, unresolved

# For a queue of K keys and a dataset of N >= K images, a query has an older key
# of its own image among its negatives with a probability of (K / N)^2 / 2. An
# epoch shows each image once, so a key of the epoch before is among the K
# newest only for the first K queries. With K = N / 4 the probability is 3 %. A
# queue longer than the dataset holds K / N keys of each image.
IMAGES_PER_KEY = 4

# The published batch statistics are those of 32 images on each of eight GPUs.
MOST_PARTS = 8
IMAGES_PER_PART = 32

# The share of the initial weights in the momentum encoder is m^steps. A run
# needs many times 1 / (1 - m) steps; the quickstart's 1,900 steps at 0.98 are
# 38 times as many. Below 0.9, MoCo was published to learn less (0.9: 55.2 %,
# 0.999: 59.0 %; 0: nothing; arXiv 1911.05722, section 4.1).
TIMES = 40
LEAST_MOMENTUM = 0.9


def recorded_config(config):
    """Returns the `Config` that the run in `config.workdir` was started with.

    None if there is no run, or its flags cannot be read. In the latter case
    `workdir.claim` raises an error later.
    """
    if not config.workdir:
        return None
    try:
        return config_lib.load(config.workdir)
    except UserError:
        return None


def resolve(config, *, images, replicas, classes=0, recorded=None):
    """Returns `config` with a value in place of every `auto`.

    Args:
        config: `clsa_tf.config.Config`; values other than `auto` are kept.
        images: N, number of training images.
        replicas: R, number of devices that share each batch.
        classes: number of classes of the training images; 0 without labels.
        recorded: `Config` that the run was started with. Its values take
            precedence over those that would be chosen now. None: a new run.

    Raises:
        UserError: the values contradict each other.
        ValueError: the method does not choose a value of one of its options.
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
                "Expected a --batch_size that can be divided into parts for "
                f"--batch_norm=split, received {config.batch_size} for "
                f"{replicas} replica(s) and --accumulation_steps="
                f"{config.accumulation_steps}; use a multiple of "
                f"{2 * IMAGES_PER_PART}."
            )
        config = config.replace(batch_norm_splits=parts)
    if config.batch_norm_splits == AUTO:  # not used; the published value
        config = config.replace(batch_norm_splits=MOST_PARTS)
    left = unresolved(config.options)
    if "queue_size" in left:
        config = config.replace(queue_size=_queue_size(config, images))
    if "key_momentum" in left:
        config = config.replace(key_momentum=_key_momentum(config, images))
    if config.precision == AUTO:
        config = config.replace(precision=precision.resolve(AUTO))
    config = config.replace(**_own(config, images, classes))
    if config != given:
        config_lib.check(config)
    return config


def reasons(config, resolved, *, images, replicas, recorded=None):
    """Explains the values that `resolve` chose.

    Args:
        config: argument of `resolve`.
        resolved: result of `resolve`.
        images: see `resolve`.
        replicas: see `resolve`.
        recorded: see `resolve`.

    Returns:
        list of sentences.
    """
    names = unresolved(config) + unresolved(config.options)
    if resolved.batch_norm != "split" and "batch_norm_splits" in names:
        names.remove("batch_norm_splits")
    if recorded and names:
        return [f"{_spell(resolved, names)}: recorded at the first start"]
    found = []
    for prefix, why in (
        ("batch_norm", lambda: _why_batch_norm(resolved, replicas)),
        ("queue_size", lambda: _why_queue(resolved, images)),
        ("key_momentum", lambda: _why_momentum(resolved, images)),
    ):
        chosen = [name for name in names if name.startswith(prefix)]
        names = [name for name in names if name not in chosen]
        if chosen:
            found.append(f"{_spell(resolved, chosen)}: {why()}")
    if "precision" in names:
        names.remove("precision")
        found.append(f"{_spell(resolved, ['precision'])}: for this device")
    if names:
        found.append(
            f"{_spell(resolved, names)}: chosen by {resolved.method} for "
            f"{images:,} images and {resolved.total_steps(images):,} steps"
        )
    return found


# ---- Values


def _batch_norm(config, replicas, parts):
    """Returns the kind of batch statistics that suits the method."""
    if config.batch_norm_splits != AUTO:
        return "split"
    if methods.class_of(config).batch_statistics == "parts":
        return "split" if replicas == 1 and parts else "local"
    # Replicas cannot share the statistics of a micro-batch.
    return "local" if replicas > 1 < config.accumulation_steps else "sync"


def _parts(batch, multiple):
    """Returns the number of parts of the batch for `--batch_norm=split`.

    It is the largest number, up to `MOST_PARTS`, with parts of at least
    `IMAGES_PER_PART` images. If there is none, it is the smallest number with
    parts of at least two images. There are at least two parts.

    Args:
        batch: number of images of the global batch.
        multiple: replicas times micro-batches; it divides the number of parts.

    Returns:
        int, or None if the batch cannot be divided.
    """
    fitting = [
        parts
        for parts in range(max(2, multiple), batch // 2 + 1)
        if batch % parts == 0 and parts % multiple == 0
    ]
    large = [
        p for p in fitting if p <= MOST_PARTS and batch // p >= IMAGES_PER_PART
    ]
    return max(large) if large else min(fitting, default=None)


def _queue_size(config, images):
    share = images // IMAGES_PER_KEY
    power = 2 ** int(math.log2(share)) if share else 1
    usual = _published(config)["queue_size"]
    return max(min(power, usual), keys_per_step(config))


def _key_momentum(config, images):
    most = 1 - TIMES / config.total_steps(images)
    usual = _published(config)["key_momentum"]
    return min(usual, max(LEAST_MOMENTUM, round(most, 3)))


def _own(config, images, classes):
    """Values of the options that the method resolves; dict, name -> value."""
    names = unresolved(config.options)
    if not names:
        return {}
    run = RunInfo.of(config, images=images, classes=classes)
    found = methods.class_of(config).resolve_auto(config, run)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"Expected values of {', '.join(missing)} from resolve_auto of "
            f"--method={config.method}, received {found}; return a value of "
            "each option that can be auto."
        )
    return {name: found[name] for name in names}


def _published(config):
    """Published values of the method's options, dict: name -> value."""
    fields = type(config.options).__dataclass_fields__
    return {n: f.metadata.get("published") for n, f in fields.items()}


# ---- Words


def _spell(config, names):
    def value(name):
        holder = config if hasattr(config, name) else config.options
        return getattr(holder, name)

    return " ".join(f"--{name}={value(name)}" for name in names)


def _why_batch_norm(config, replicas):
    if config.batch_norm == "split":
        return (
            "statistics of parts of the batch, as on several devices; with "
            "statistics of the whole batch, a network can recognise the batch "
            "instead of the image"
        )
    accumulates = config.accumulation_steps > 1
    if config.batch_norm == "sync":
        if accumulates:
            return "statistics of each micro-batch, over all devices"
        return "statistics of the whole batch, as published"
    if replicas > 1:
        wanted = methods.class_of(config).batch_statistics
        return (
            "statistics of each device"
            + (" and micro-batch" if accumulates else "")
            + (", as published" if wanted == "parts" else "")
        )
    return f"a batch of {config.batch_size} cannot be divided into parts"


def _why_queue(config, images):
    size, usual = config.options.queue_size, _published(config)["queue_size"]
    if size == usual:
        return "as published"
    if size == keys_per_step(config):
        return (
            f"the keys of one step, the smallest possible queue, for "
            f"{images:,} images (published: {usual:,})"
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
        f"for a run of {config.total_steps(images):,} steps (published: "
        f"{usual}), within which the momentum encoder has to leave its initial "
        "weights"
    )
