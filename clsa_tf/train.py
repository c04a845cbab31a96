"""Pretrains: `python -m clsa_tf.train --flagfile=configs/clsa.flags`.

The same command again resumes where it stopped. Everything the run leaves is in
`--workdir`; `--flagfile=<workdir>/run.flags` repeats it.
"""

import contextlib
import os

import tensorflow as tf
from absl import flags

import clsa_tf.config
from clsa_tf import (
    catalogue,
    collapse,
    entry,
    methods,
    metrics,
    optimizer,
    pictures,
    workdir,
)
from clsa_tf.augment.chain import finish_batch
from clsa_tf.callbacks import Log, Monitor, Save
from clsa_tf.checkpoint import Checkpoints
from clsa_tf.data.checks import check_sizes
from clsa_tf.data.faults import Faults
from clsa_tf.data.offload import Services, parse
from clsa_tf.data.order import ALONE, Worker
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.sources import open_train_source
from clsa_tf.errors import Stopped, UserError, WorkerLost, first_line
from clsa_tf.evaluation.features import Snapshot
from clsa_tf.evaluation.task import knn_task
from clsa_tf.interruption import Interruption
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
    begun = clsa_tf.config.older_in(config.workdir) if config.workdir else {}
    return _Run(config.replace(**begun)).train()


class _Run:
    """What a run consists of, and how its parts are joined."""

    def __init__(self, config):
        self._config = config
        # First of all: workers connect when TensorFlow starts.
        self._strategy = make_strategy(config.strategy, tpu=config.tpu)
        self._workers = Workers(self._strategy)
        self._source = open_train_source(config)
        self._views = methods.load(config.method).METHOD.views(config.options)
        self._steps_per_epoch = self._source.size // config.batch_size
        check_batch(config, self._source.size, self._strategy)
        check_sizes(
            self._source, self._views, allow_upscaling=config.allow_upscaling
        )
        self._services, advice = None, ""
        if config.data_service:
            self._services = Services(parse(config.data_service))
            self._services.check()
            advice = "see that the services of --data_service find them there"
        self._faults = Faults(max_bad_share=config.max_bad_share, advice=advice)
        self._task = None
        if config.knn_epochs:
            self._task = knn_task(config, self._source, self._faults)
        self._interruption = Interruption()

    def train(self):
        """See `run`."""
        with contextlib.ExitStack() as stack:
            if self._workers.chief:
                stack.enter_context(
                    workdir.claim(self._config, images=self._source.size)
                )
                self._faults.record(self._config.workdir)
            if self._services:
                stack.enter_context(self._services)
            stack.enter_context(self._interruption)
            try:
                return self._train()
            except tf.errors.OpError as e:
                cause = self._cause(e)
                if not cause:
                    raise
                raise cause from e

    def _train(self):
        config, workers = self._config, self._workers

        # ---- Model
        schedule = optimizer.make_schedule(config, self._steps_per_epoch)
        with self._strategy.scope():
            method = make_method(
                config,
                schedule,
                total_steps=config.total_epochs * self._steps_per_epoch,
            )
            checkpoints = Checkpoints(
                method,
                config.workdir,
                keep=config.keep_checkpoints,
                schedule=schedule,
                chief=workers.chief,
            )
        step = checkpoints.restore()
        workers.check_same(
            number_of_images=self._source.size,
            flags=clsa_tf.config.identity(config),
            step_to_resume_from=step,
        )
        if workers.chief:
            metrics.rewind(config.workdir, step)
            self._announce(step)

        # ---- Train
        log = Log(
            config,
            step,
            steps_per_epoch=self._steps_per_epoch,
            schedule=schedule,
            checkpoints=checkpoints,
            watch=collapse.Watch(
                config.options.projection_size,
                patience=max(500, self._steps_per_epoch),
            ),
            chief=workers.chief,
        )
        if workers.chief:
            self._draw_views(step, log)
        with contextlib.closing(log):
            fit(
                method,
                self._distributed,
                self._callbacks(log, checkpoints, method),
                legs(step, self._steps_per_epoch, config.total_epochs),
            )
        # All leave together: one that is gone while the chief still evaluates
        # would be taken for lost.
        workers.maximum(0)
        if self._faults.count:
            print(self._faults.summary())
        return method

    def _callbacks(self, log, checkpoints, method):
        """Logged, saved, then evaluated: see `callbacks`."""
        save = Save(
            checkpoints,
            log,
            every=self._config.checkpoint_steps,
            stop_signal=self._stop_signal,
        )
        if not self._task:
            return [log, save]
        monitor = Monitor(
            log,
            self._task,
            Snapshot(method, self._strategy),
            every=self._config.knn_epochs,
            interruption=self._interruption,
        )
        monitor.catch_up()
        return [log, save, monitor]

    def _stop_signal(self, step):
        """The signal after which to stop at `step`, of any worker; or 0."""
        if self._workers.count > 1 and step % _STEPS_BETWEEN_TALKS:
            return 0
        return self._workers.maximum(self._interruption.signal)

    # ---- Data

    def _batches(self, start_step, worker=ALONE, replicas=1):
        return training_batches(
            self._source,
            self._views,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            start_step=start_step,
            faults=self._faults,
            finished=self._config.augment_on == "host",
            prefetch=self._config.prefetch_batches,
            worker=worker,
            replicas=replicas,
            services=self._services,
        )

    def _distributed(self, start_step):
        def of_worker(context):
            count = context.num_input_pipelines
            return self._batches(
                start_step,
                Worker(context.input_pipeline_id, count),
                context.num_replicas_in_sync // count,
            )

        return self._strategy.distribute_datasets_from_function(of_worker)

    def _draw_views(self, step, log):
        """Draws the views of the first images, once per run."""
        path = os.path.join(self._config.workdir, "views.png")
        if not os.path.exists(path):
            batch = next(iter(self._batches(step)))
            if self._config.augment_on == "device":
                batch = finish_batch(batch, views=self._views)
            names = [view.name for view in self._views]
            log.picture("views", pictures.views(batch, names, path))

    # ---- Words

    def _announce(self, step):
        """Prints what is about to happen."""
        config = self._config
        total = config.total_epochs * self._steps_per_epoch
        print(
            f"{config.method}: {config.backbone} on {self._source.size} images "
            f"of {self._source.name}, {config.total_epochs} epochs of "
            f"{self._steps_per_epoch} steps of {config.batch_size} images on "
            f"{self._strategy.num_replicas_in_sync} device(s)"
        )
        for note in self._source.notes:
            print(f"  {note}")
        begun = clsa_tf.config.older_in(config.workdir)
        if begun:
            flags_then = clsa_tf.config.as_flags(begun)
            print(f"  begun by an earlier version, so it keeps {flags_then}")
        learner = methods.load(config.method).METHOD
        print(f"  {learner.useless_words.format(learner.useless(config))}")
        if not self._task:
            print("  no kNN evaluation: no labels, or --knn_epochs=0")
        if step >= total:
            print(
                f"  {config.workdir} is complete ({total} steps); choose "
                "another --workdir to train again"
            )
        elif step:
            print(f"  resuming {config.workdir} at step {step} of {total}")
        else:
            print(f"  writing to {config.workdir}")

    def _cause(self, error):
        """What an error of TensorFlow came from, if anything is known."""
        if self._faults.error():
            # The input pipeline stops the step with an error of its own.
            return self._faults.error()
        if self._services and self._services.lost():
            return WorkerLost(self._services.lost())
        if self._services and isinstance(error, tf.errors.NotFoundError):
            return UserError(
                "Expected services of --data_service that run without a "
                "break and find the dataset's files where this process "
                f"does, received: {first_line(error)}; see to that, and start "
                "the same command again: it goes on from the last checkpoint."
            )
        if self._workers.count == 1 or not isinstance(error, LOST):
            return None
        if self._interruption.signal:  # so were the others, and are gone
            return Stopped(self._interruption.signal, saved=False)
        return WorkerLost(first_line(error))


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


def make_method(config, schedule, *, total_steps):
    """Returns the compiled `Method` of `config`, its optimizer built."""
    learner = methods.load(config.method).METHOD
    method = learner(config, total_steps=total_steps)
    sgd = optimizer.make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.sgd_momentum,
        l2=config.l2,
        l2_on=config.l2_on,
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


def main():
    """Reads the flags and trains."""
    if flags.FLAGS.list_methods:
        print(catalogue.describe())
        return
    run(clsa_tf.config.from_flags())


if __name__ == "__main__":
    clsa_tf.config.define_flags()
    flags.adopt_module_key_flags(clsa_tf.config)
    flags.DEFINE_bool("list_methods", False, "print what there is, and exit")
    entry.launch(main)
