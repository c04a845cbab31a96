"""Pretrains: `python -m clsa_tf.train --flagfile=configs/clsa.flags`.

The same command again resumes where it stopped. Everything the run leaves is in
`--workdir`; `--flagfile=<workdir>/run.flags` repeats it.
"""

import contextlib
import os

import tensorflow as tf
from absl import flags

import clsa_tf.config
from clsa_tf import collapse, entry, methods, metrics, optimizer, pictures
from clsa_tf.augment.chain import finish_batch
from clsa_tf.callbacks import Log, Monitor, Save, Stop
from clsa_tf.checkpoint import Checkpoints
from clsa_tf.data.checks import check_sizes
from clsa_tf.data.faults import Faults
from clsa_tf.data.offload import Services, parse
from clsa_tf.data.order import ALONE, Worker
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.sources import open_train_source
from clsa_tf.errors import Stopped, UserError, WorkerLost, first_line
from clsa_tf.evaluation.features import compiled
from clsa_tf.evaluation.task import knn_task
from clsa_tf.interruption import Interruption
from clsa_tf.lock import acquire
from clsa_tf.strategy import LOST, Workers, make_strategy

# Several workers ask each other whether to stop every so many steps.
_STEPS_BETWEEN_TALKS = 10


def run(config):
    """Trains as `config` says until the last epoch, resuming if it was begun.

    Args:
        config: `clsa_tf.config.Config`.

    Returns:
        the trained `Method`.

    Raises:
        UserError: something from outside was wrong; its message says what.
        Stopped: it was asked to stop by a signal, and is saved.
        WorkerLost: another process of the same job is gone.
    """
    # First of all: workers connect when TensorFlow starts.
    strategy = make_strategy(config.strategy, tpu=config.tpu)
    workers = Workers(strategy)

    # ---- Data
    source = open_train_source(config)
    views = methods.load(config.method).METHOD.views(config.options)
    check_batch(config, source.size, strategy)
    check_sizes(source, views, allow_upscaling=config.allow_upscaling)
    services, advice = None, ""
    if config.data_service:
        services = Services(parse(config.data_service))
        services.check()
        advice = "see that the services of --data_service find them there"
    faults = Faults(max_bad_share=config.max_bad_share, advice=advice)
    task = knn_task(config, source, faults) if config.knn_epochs else None

    with contextlib.ExitStack() as stack:
        if workers.chief:
            stack.enter_context(claim(config))
        if services:
            stack.enter_context(services)
        interruption = stack.enter_context(Interruption())
        try:
            return _train(
                config,
                strategy,
                workers,
                source,
                faults,
                services,
                task,
                interruption,
            )
        except tf.errors.OpError as e:
            if faults.error():
                # The input pipeline stops the step with an error of its own.
                raise faults.error() from e
            if services and services.lost():
                raise WorkerLost(services.lost()) from e
            if services and isinstance(e, tf.errors.NotFoundError):
                raise UserError(
                    "Expected services of --data_service that run without a "
                    "break and find the dataset's files where this process "
                    f"does, received: {first_line(e)}; see to that, and start "
                    "the same command again: it goes on from the last "
                    "checkpoint."
                ) from e
            if workers.count == 1 or not isinstance(e, LOST):
                raise
            if interruption.signal:  # so were the others, and are gone
                raise Stopped(interruption.signal) from e
            raise WorkerLost(first_line(e)) from e


def _train(
    config, strategy, workers, source, faults, services, task, interruption
):
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
            method,
            config.workdir,
            keep=config.keep_checkpoints,
            schedule=schedule,
            chief=workers.chief,
        )
    step = checkpoints.restore()
    workers.check_same(
        number_of_images=source.size,
        flags=clsa_tf.config.identity(config),
        step_to_resume_from=step,
    )
    if workers.chief:
        metrics.rewind(config.workdir, step)
        announce(config, source, strategy, step, steps_per_epoch, task)

    # ---- Train
    log = Log(
        config.workdir,
        step,
        config=config,
        steps_per_epoch=steps_per_epoch,
        schedule=schedule,
        checkpoints=checkpoints,
        watch=collapse.Watch(
            config.options.projection_size, patience=max(500, steps_per_epoch)
        ),
        chief=workers.chief,
    )
    save = Save(
        checkpoints,
        log,
        every=config.checkpoint_steps,
        steps_per_epoch=steps_per_epoch,
    )
    stop = Stop(
        checkpoints,
        log,
        interruption,
        workers.maximum,
        every=1 if workers.count == 1 else _STEPS_BETWEEN_TALKS,
    )
    # Logged, saved, then evaluated: see `callbacks`.
    callbacks = [log, save, stop]
    if task:
        monitor = make_monitor(
            config, strategy, workers, method, log, task, interruption
        )
        monitor.catch_up()
        callbacks.insert(2, monitor)

    views = method.views(config.options)

    def batches(start_step, worker=ALONE, replicas=1):
        return training_batches(
            source,
            views,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=start_step,
            faults=faults,
            finished=config.augment_on == "host",
            prefetch=config.prefetch_batches,
            worker=worker,
            replicas=replicas,
            services=services,
        )

    def distributed(start_step):
        def of_worker(context):
            count = context.num_input_pipelines
            return batches(
                start_step,
                Worker(context.input_pipeline_id, count),
                context.num_replicas_in_sync // count,
            )

        return strategy.distribute_datasets_from_function(of_worker)

    if workers.chief:
        draw_views(config, views, batches(step), log)
    with contextlib.closing(log):
        fit(
            method,
            distributed,
            callbacks,
            legs(step, steps_per_epoch, config.total_epochs),
        )
    # All leave together: one that is gone while the chief still evaluates
    # would be taken for lost.
    workers.maximum(0)
    if faults.count:
        print(f"{faults.count} unreadable images were left out.")
    return method


def make_monitor(config, strategy, workers, method, log, task, interruption):
    """Returns the `Monitor` of the kNN accuracy."""
    # A copy, because batch statistics of an encoder under a strategy are read
    # by all workers at once, and one of them is enough for the evaluation.
    with tf.device(strategy.extended.worker_devices[0]):
        copy = method.make_encoder("evaluated")
    return Monitor(
        log,
        task,
        method.encoder,
        copy,
        compiled(lambda images: copy(images, training=False)),
        every=config.knn_epochs,
        steps_per_epoch=log.steps_per_epoch,
        interruption=interruption,
        evaluated={
            entry["step"]
            for entry in metrics.read(config.workdir)
            if "knn" in entry
        },
        chief=workers.chief,
    )


def check_batch(config, size, strategy):
    """Raises `UserError` unless the batch suits the dataset and replicas."""
    replicas = strategy.num_replicas_in_sync
    if config.batch_size > size:
        raise UserError(
            f"Expected a batch no larger than the dataset of {size} images, "
            f"received --batch_size={config.batch_size}; lower it."
        )
    parts = replicas * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            "Expected a batch that divides among the replicas and micro-"
            f"batches, received --batch_size={config.batch_size} for "
            f"{replicas} replica(s) and --accumulation_steps="
            f"{config.accumulation_steps}; change one."
        )
    if config.batch_norm == "split" and config.batch_norm_splits % parts:
        raise UserError(
            "Expected --batch_norm_splits of the global batch that divide "
            "among the replicas and micro-batches, received "
            f"{config.batch_norm_splits} for {replicas} replica(s) and "
            f"--accumulation_steps={config.accumulation_steps}; change one."
        )
    if replicas == 1:
        return
    if config.batch_norm == "sync" and config.accumulation_steps > 1:
        raise UserError(
            "Expected --batch_norm=local or split with --accumulation_steps on "
            "several replicas, which cannot share the statistics of a micro-"
            "batch, received sync; change one."
        )
    on_cpu = any("CPU" in d for d in strategy.extended.worker_devices)
    if config.jit_compile and on_cpu:
        raise UserError(
            "Expected one replica, GPUs or TPUs with --jit_compile, received "
            f"{replicas} CPUs, between which XLA cannot compile an exchange; "
            "leave it out."
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
        precision=method.precision,
    )
    optimizer.build(sgd, method.learned)
    method.compile(optimizer=sgd, jit_compile=config.jit_compile)
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

    Returns:
        the lock: a context manager that gives the directory back.

    Raises:
        UserError: it belongs to a run with other flags, is used by another
            process, or cannot be written.
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
        lock = acquire(config.workdir)
        metrics.write_atomically(path, text)
    except OSError as e:
        raise UserError(
            f"Expected a --workdir that can be written, received "
            f"{config.workdir!r} ({e.strerror}); make room, fix its "
            "permissions or choose another."
        ) from e
    return lock


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
