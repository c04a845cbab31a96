"""The lines that a run prints before its first step."""

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.evaluation import task
from clsa_tf.optimizers.schedule import make_schedule
from clsa_tf.text import counted
from clsa_tf.training.advice import advice


def announce(
    config,
    *,
    source,
    evaluation,
    claim,
    step,
    steps_per_epoch,
    replicas,
    chosen,
    taken,
    remote,
    accelerated,
):
    """Prints what a run is about to do.

    Args:
        config: `clsa_tf.config.Config`, resolved.
        source: `Source` of the training images.
        evaluation: `Evaluation`, or None with `--knn_epochs=0`.
        claim: `clsa_tf.training.workdir.Claim`.
        step: steps taken so far.
        steps_per_epoch: int.
        replicas: number of devices that share each batch.
        chosen: list of sentences about `auto` values, see `auto.reasons`.
        taken: list of `initial_weights.Part`; empty without --init_from.
        remote: whether the hosts of a TPU read the images.
        accelerated: whether the replicas are GPUs or TPUs.
    """
    total = config.total_epochs * steps_per_epoch
    print(
        f"{config.method}: {config.backbone} on {source.size} images "
        f"of {source.name}, {counted(config.total_epochs, 'epoch')} "
        f"of {counted(steps_per_epoch, 'step')} of "
        f"{config.batch_size} images on " + counted(replicas, "device")
    )
    for note in source.notes:
        print(f"  {note}")
    if remote:
        print(
            "  the hosts of the TPU read the images: unreadable ones are "
            "replaced by others of the batch, neither named nor counted"
        )
    begun = config_lib.older_in(config.workdir)
    if begun:
        flags_then = config_lib.as_flags(begun)
        print(f"  started by an earlier version; it keeps {flags_then}")
    method_class = methods.class_of(config)
    chance = method_class.chance_loss(config)
    if chance is not None:
        print(f"  {method_class.chance_text.format(chance)}")
    for sentence in chosen:
        print(f"  auto: {sentence}")
    if step < total:
        warnings = advice(
            config,
            images=source.size,
            replicas=replicas,
            bank=evaluation.bank_size if evaluation else 0,
            accelerated=accelerated,
        )
        for sentence in warnings:
            print(f"  warning: {sentence}")
    for line in task.announcement(config, source, evaluation):
        print(f"  {line}")
    if step >= total:
        done = counted(step, "step")
        if step > total:
            done += f", more than the {total} asked for"
        print(
            f"  {config.workdir} is complete ({done}); raise "
            "--total_epochs to go on, or choose another --workdir to train "
            "again"
        )
    elif step:
        print(f"  resuming {config.workdir} at step {step} of {total}")
    else:
        print(f"  writing to {config.workdir}")
    for part in taken:
        print(f"  weights of {config.init_from}: {part}")
    for note in claim.notes:
        print(f"  note: {note}")
    for change in claim.changes:
        consequence = _consequence(config, change, step, steps_per_epoch)
        print(f"  changed: {change}{consequence}")


def _consequence(config, change, step, steps_per_epoch):
    """Describes the effect of another --total_epochs; "" for other flags."""
    if change.flag != "total_epochs" or not step:
        return ""
    before = config.replace(total_epochs=int(change.before))
    rates = [
        float(make_schedule(c, steps_per_epoch)(s))
        for c, s in ((before, step - 1), (config, step))
    ]
    schedule = getattr(config.options, "key_momentum_schedule", "constant")
    momentum = (
        f"; so does --key_momentum with its {schedule} schedule"
        if schedule != "constant"
        else ""
    )
    return (
        f"; from step {step} on, the learning rate follows --lr_schedule="
        f"{config.lr_schedule} over {change.now} epochs: {rates[1]:.4g} in "
        f"the next step, after {rates[0]:.4g} in step {step}" + momentum
    )
