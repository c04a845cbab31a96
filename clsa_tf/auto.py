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
from clsa_tf.options import AUTO, unresolved

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

# Where `advice` begins.
FEW_STEPS = 1000
INITIAL_SHARE = 0.05  # of the weights, at the end of a run
BANK_PER_NEIGHBOUR = 10
# What a processor is too slow for: views of so many px, a network so wide.
PROCESSOR_SIZE, PROCESSOR_WIDTH = 96, 0.5
SMALL_QUEUE = 1024  # of LooC, whose run with so many keys collapsed


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


def advice(config, *, images, replicas, bank=None, accelerated=True):
    """What in a configuration does harm here: a list of sentences.

    Args:
        config: `clsa_tf.config.Config`, resolved.
        images: N, how many there are to train on.
        replicas: R, devices that share each batch.
        bank: images that the kNN evaluation takes neighbours from; None: those
            to train on; 0: there is no such evaluation.
        accelerated: whether the replicas are GPUs or TPUs.

    Returns:
        list of str, each with what to change; the run is possible anyway.
    """
    checks = (
        "" if accelerated else _on_processor(config),
        _on_batch_norm(config, replicas),
        _on_queue(config, images),
        _on_loocs_queue(config),
        _on_momentum(config, images),
        _on_steps(config, images),
        _on_neighbours(config, images if bank is None else bank),
    )
    return [sentence for sentence in checks if sentence]


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
    most = 1 - TIMES / _steps(config, images)
    usual = _published(config)["key_momentum"]
    return min(usual, max(LEAST_MOMENTUM, round(most, 3)))


def _published(config):
    """Option -> its published value, of the method's own options."""
    fields = type(config.options).__dataclass_fields__
    return {n: f.metadata.get("published") for n, f in fields.items()}


def _steps(config, images):
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
        f"for a run of {_steps(config, images):,} steps (published: {usual}), "
        "within which the momentum encoder has to leave its initial weights"
    )


def _on_processor(config):
    views = methods.load(config.method).METHOD.views(config.options)
    size = max(view.size for view in views)
    if size < PROCESSOR_SIZE or config.width < PROCESSOR_WIDTH:
        return ""
    return (
        f"without a GPU or TPU a step of {config.backbone} on "
        f"{config.batch_size} images at {size} px takes minutes; a small "
        "network on small views is for processors: --flagfile=photos in place "
        "of this recipe"
    )


def _on_batch_norm(config, replicas):
    parts = replicas * config.accumulation_steps
    if config.batch_norm == "split":
        parts = config.batch_norm_splits
    whole = parts == 1 or config.batch_norm == "sync"
    wanted = methods.load(config.method).METHOD.batch_statistics
    if wanted == "parts" and whole:
        return (
            f"--batch_norm={config.batch_norm} on {replicas} device(s) "
            "normalises a query and its key with statistics of the same "
            "images, by which a network can recognise the batch instead of "
            "the image; use --batch_norm=split with a --batch_size that is a "
            f"multiple of {2 * PART}"
        )
    if wanted == "whole" and not whole and config.accumulation_steps == 1:
        return (
            f"--batch_norm={config.batch_norm} takes statistics of {parts} "
            f"parts of the batch, and {config.method} is published with those "
            "of the whole; use --batch_norm=sync"
        )
    return ""


def _on_queue(config, images):
    size = getattr(config.options, "queue_size", 0)
    if size <= images:
        return ""
    return (
        f"--queue_size={size} is longer than the data set of {images:,} "
        f"images: {size / images:.3g} keys of every query's own image are "
        f"among its negatives; use --queue_size={AUTO}, or at most "
        f"{max(images // IMAGES_PER_KEY, keys_per_step(config))}"
    )


def _on_loocs_queue(config):
    options = config.options
    if (
        config.method != "looc"
        or options.inbatch_negatives
        or options.queue_size > SMALL_QUEUE
    ):
        return ""
    return (
        f"--queue_size={options.queue_size} is small: with 1,024 keys LooC's "
        "embeddings collapsed on the embedded data set; add "
        "--inbatch_negatives"
    )


def _on_momentum(config, images):
    m = getattr(config.options, "key_momentum", 0.0)
    steps = _steps(config, images)
    if m <= LEAST_MOMENTUM:
        return ""
    # Scheduled to rise to 1, it is half as far from it on average.
    half = config.options.key_momentum_schedule == "cosine"
    left = m ** (steps / 2 if half else steps)
    if left <= INITIAL_SHARE:
        return ""
    return (
        f"--key_momentum={m} leaves {left:.0%} of its initial weights to the "
        f"momentum encoder after all {steps:,} steps; use --key_momentum="
        f"{AUTO}, or train for longer"
    )


def _on_steps(config, images):
    steps = _steps(config, images)
    if steps >= FEW_STEPS:
        return ""
    epochs = math.ceil(FEW_STEPS / (images // config.batch_size or 1))
    return (
        f"{steps:,} steps are few: raise --total_epochs to {epochs} or more, "
        "or lower --batch_size"
    )


def _on_neighbours(config, bank):
    bank = min(bank, config.knn_bank)
    if (
        not (bank and config.knn_epochs)
        or config.knn_k * BANK_PER_NEIGHBOUR <= bank
    ):
        return ""
    return (
        f"--knn_k={config.knn_k} of {bank:,} images vote in the kNN "
        "evaluation, distant ones too; use --knn_k="
        f"{max(1, bank // BANK_PER_NEIGHBOUR // 5)} or so"
    )
