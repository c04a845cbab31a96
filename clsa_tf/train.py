"""Pretrains: `python -m clsa_tf.train --flagfile=configs/clsa.flags`.

The same command again resumes where it stopped. Everything the run leaves is in
`--workdir`; `--flagfile=<workdir>/run.flags` repeats it.
"""

import os
import sys

from absl import flags

import clsa_tf.config
from clsa_tf import distribute, entry, methods, metrics, optimizer, pictures
from clsa_tf.augment.chain import finish_batch
from clsa_tf.callbacks import Log, Monitor, Save
from clsa_tf.checkpoint import Checkpoints
from clsa_tf.data.checks import check_sizes
from clsa_tf.data.faults import Faults
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.sources import open_train_source
from clsa_tf.errors import UserError
from clsa_tf.evaluation.features import compiled
from clsa_tf.evaluation.task import knn_task


def run(config):
    """Trains as `config` says until the last epoch, resuming if it was begun.

    Args:
        config: `clsa_tf.config.Config`.

    Returns:
        the trained `Method`.

    Raises:
        UserError: something from outside was wrong; its message says what.
    """
    # ---- Data
    source = open_train_source(config)
    views = methods.load(config.method).METHOD.views(config.options)
    strategy = distribute.make_strategy(config.strategy)
    check_batch(config, source.size, strategy.num_replicas_in_sync)
    check_sizes(source, views, allow_upscaling=config.allow_upscaling)
    faults = Faults(max_bad_share=config.max_bad_share)
    task = knn_task(config, source, faults) if config.knn_epochs else None
    claim(config)

    # ---- Model
    steps_per_epoch = source.size // config.batch_size
    schedule = optimizer.CosineByEpoch(
        config.base_lr * config.batch_size / 256,
        steps_per_epoch=steps_per_epoch,
        total_epochs=config.total_epochs,
    )
    with strategy.scope():
        method = make_method(config, schedule)
        checkpoints = Checkpoints(
            method, config.workdir, keep=config.keep_checkpoints
        )
    step = checkpoints.restore()
    metrics.rewind(config.workdir, step)
    announce(config, source, strategy, step, steps_per_epoch, task)

    # ---- Train
    log = Log(
        config.workdir,
        step,
        config=config,
        steps_per_epoch=steps_per_epoch,
        schedule=schedule,
        seconds=checkpoints.seconds,
    )
    save = Save(
        checkpoints,
        step,
        every=config.checkpoint_steps,
        steps_per_epoch=steps_per_epoch,
    )

    encode = compiled(lambda images: method.encoder(images, training=False))

    # Logged, evaluated, then saved: see `callbacks`.
    callbacks = [log, save]
    if task:
        callbacks.insert(1, Monitor(log, task, encode, every=config.knn_epochs))

    def batches(start_step):
        return training_batches(
            source,
            views,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            faults=faults,
            finished=config.augment_on == "host",
            prefetch=config.prefetch_batches,
        )

    try:
        draw_views(config, views, batches(step), log)
        fit(
            method,
            batches,
            callbacks,
            legs(step, steps_per_epoch, config.total_epochs),
        )
    except KeyboardInterrupt:
        checkpoints.save()
        print(
            f"\nStopped and saved at step {checkpoints.step}; the same command "
            "goes on from there.",
            file=sys.stderr,
        )
        sys.exit(130)
    except Exception as e:
        # The input pipeline stops the step with an error of its own.
        if faults.error():
            raise faults.error() from e
        raise
    if faults.count:
        print(f"{faults.count} unreadable images were left out.")
    return method


def check_batch(config, size, replicas):
    """Raises `UserError` unless the batch suits the dataset and replicas."""
    if config.batch_size > size:
        raise UserError(
            f"Expected a batch no larger than the dataset of {size} images, "
            f"received --batch_size={config.batch_size}; lower it."
        )
    if config.batch_size % replicas:
        raise UserError(
            "Expected a batch that divides among the replicas, received "
            f"--batch_size={config.batch_size} for {replicas}; change it."
        )


def fit(method, batches, callbacks, legs):
    """Calls Keras' `fit` for each of `legs`; `batches(step)` is its data."""
    for start_step, epoch, last_epoch, steps in legs:
        method.fit(
            batches(start_step),
            initial_epoch=epoch,
            epochs=last_epoch,
            steps_per_epoch=steps,
            callbacks=callbacks,
            verbose=0,
        )


def make_method(config, schedule):
    """Returns the compiled `Method` of `config`, its optimizer built."""
    method = methods.load(config.method).METHOD(config)
    sgd = optimizer.make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.sgd_momentum,
        l2=config.l2,
    )
    optimizer.build(sgd, method.learned)
    method.compile(optimizer=sgd)
    return method


def legs(step, steps_per_epoch, total_epochs):
    """Calls of `fit` that lead from `step` to the end.

    Keras counts whole epochs of equal length; a run resumed within an epoch
    first finishes that.

    Returns:
        list of (first step, first epoch, epoch to stop before, steps per
        epoch).
    """
    epoch, done = divmod(step, steps_per_epoch)
    found = []
    if done:
        found.append((step, epoch, epoch + 1, steps_per_epoch - done))
        epoch += 1
    if epoch < total_epochs:
        found.append(
            (epoch * steps_per_epoch, epoch, total_epochs, steps_per_epoch)
        )
    return found


def claim(config):
    """Makes the working directory this run's; writes `run.flags` into it.

    Raises:
        UserError: it belongs to a run with other flags, or cannot be written.
    """
    text = clsa_tf.config.to_flagfile(config)
    path = os.path.join(config.workdir, clsa_tf.config.RUN_FLAGS)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            found = clsa_tf.config.differences(file.read(), text)
        if found:
            name, before, now = found[0]
            raise UserError(
                f"Expected the flags that {config.workdir} was started with, "
                f"received --{name}={now} instead of {before}"
                + (f" and {len(found) - 1} more" if len(found) > 1 else "")
                + "; choose another --workdir or put the flags back."
            )
    try:
        os.makedirs(config.workdir, exist_ok=True)
        metrics.write_atomically(path, text)
    except OSError as e:
        raise UserError(
            f"Expected a --workdir that can be written, received "
            f"{config.workdir!r} ({e.strerror}); choose another or fix its "
            "permissions."
        ) from e


def announce(config, source, strategy, step, steps_per_epoch, task):
    """Prints what is about to happen."""
    total = config.total_epochs * steps_per_epoch
    print(
        f"{config.method}: {config.backbone} on {source.size} images of "
        f"{source.name}, {config.total_epochs} epochs of {steps_per_epoch} "
        f"steps of {config.batch_size} images on "
        f"{strategy.num_replicas_in_sync} device(s)"
    )
    useless = methods.load(config.method).METHOD.useless(config)
    print(
        f"  the contrast of an encoder that tells nothing apart is "
        f"{useless:.2f} nats"
    )
    if not task:
        print("  no kNN evaluation: no labels, or --knn_epochs=0")
    if step >= total:
        print(
            f"  {config.workdir} is complete ({total} steps); choose another "
            "--workdir to train again"
        )
    elif step:
        print(f"  resuming {config.workdir} at step {step} of {total}")
    else:
        print(f"  writing to {config.workdir}")


def draw_views(config, views, batches, log):
    """Draws the views of the first images, once per run."""
    path = os.path.join(config.workdir, "views.png")
    if not os.path.exists(path):
        batch = next(iter(batches))
        if config.augment_on == "device":
            batch = finish_batch(batch, views=views)
        log.picture(
            "views", pictures.views(batch, [v.name for v in views], path)
        )


def main():
    """Reads the flags and trains."""
    run(clsa_tf.config.from_flags())


if __name__ == "__main__":
    clsa_tf.config.define_flags()
    flags.adopt_module_key_flags(clsa_tf.config)
    entry.launch(main)
