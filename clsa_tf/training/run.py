"""One training run, from the data to the last checkpoint."""

import contextlib
import os

import tensorflow as tf

import clsa_tf.config
from clsa_tf import methods
from clsa_tf.augment.chain import complete_batch
from clsa_tf.data.open import open_train_source
from clsa_tf.data.order import ALONE, Worker
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.service_client import Services, parse
from clsa_tf.data.source_checks import (
    check_batch_size,
    check_drawn_sizes,
    check_sizes,
)
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.distributed.strategy import (
    Workers,
    is_accelerated,
    is_lost_worker,
    loads_elsewhere,
    make_deterministic,
    make_strategy,
)
from clsa_tf.errors import Stopped, UserError, WorkerLost, first_line
from clsa_tf.evaluation.dataset_features import DatasetFeatures
from clsa_tf.evaluation.features import Snapshot
from clsa_tf.evaluation.task import plan
from clsa_tf.methods.base import Method, RunInfo
from clsa_tf.networks import backbones, precision
from clsa_tf.optimizers import optimizers
from clsa_tf.optimizers.schedule import make_schedule
from clsa_tf.plots import views
from clsa_tf.terminal.signals import Interruption, ends_process
from clsa_tf.training import (
    announcement,
    auto,
    collapse,
    initial_weights,
    metrics_log,
    summary,
    workdir,
)
from clsa_tf.training.callbacks import EpochBegin, Log, Monitor, Save
from clsa_tf.training.checkpoint import Checkpoints, newest_step
from clsa_tf.training.config_checks import (
    check_batch,
    check_needs,
    check_remote_hosts,
)

# Steps, or batches of a pass over the dataset, after which several workers
# compare the signals that they received.
_STEPS_BETWEEN_TALKS = 10

# Printed when a signal arrives before the first step.
_NOT_BEGUN = (
    "stopped before the first step; nothing is lost: the same command starts "
    "the run"
)


def run(config):
    """Trains until the last epoch; resumes the run if it was started before.

    Args:
        config: `clsa_tf.config.Config`.

    Returns:
        the trained `Method`.

    Raises:
        UserError: invalid input, such as a flag, an image or a checkpoint.
        Stopped: a signal asked the run to stop; its progress is saved.
        WorkerLost: another process of the same job has stopped.
    """
    begun = clsa_tf.config.older_in(config.workdir) if config.workdir else {}
    return _Run(config.replace(**begun)).train()


class _Run:
    """Creates the parts of a run, connects them and trains."""

    def __init__(self, config):
        precision.set_tf32(config.precision)
        if config.deterministic:
            make_deterministic()
        # First, because workers connect when TensorFlow initialises.
        self._strategy = make_strategy(config.strategy, tpu=config.tpu)
        self._workers = Workers(self._strategy)
        self._views = methods.class_of(config).views(config.options)
        check_drawn_sizes(
            config.dataset, self._views, allow_upscaling=config.allow_upscaling
        )
        self._source = open_train_source(config)
        self._classes = len(self._source.class_names or ())
        config = self._config = self._resolve(config)
        self._steps_per_epoch = config.steps_per_epoch(self._source.size)
        check_batch_size(self._source, config.batch_size)
        check_batch(config, self._strategy)
        check_needs(config, self._source)
        check_sizes(
            self._source, self._views, allow_upscaling=config.allow_upscaling
        )
        backbones.check_sizes(
            config.backbone,
            [*(view.size for view in self._views), config.image_size],
        )
        self._remote = loads_elsewhere(self._strategy)
        if self._remote:
            check_remote_hosts(config, self._source)
        self._services, advice = None, ""
        if config.data_service:
            self._services = Services(parse(config.data_service))
            self._services.check()
            advice = "check that the services of --data_service find them there"
        self._unreadable = UnreadableImages(
            max_bad_share=config.max_bad_share,
            advice=advice,
            remote=self._remote,
        )
        self._evaluation = None
        if config.knn_epochs:
            self._evaluation = plan(config, self._source)
        self._interruption = Interruption()
        self._claim = None  # only the chief has one
        # Checked before anything is written, so that a failed start leaves no
        # files.
        self._weights = None
        if config.init_from:
            initial_weights.check(config)
            if not newest_step(config.workdir):
                self._weights = initial_weights.read(config)

    def _resolve(self, config):
        """Returns `config` without `auto`; the reasons go to `_chosen`."""
        known = dict(
            images=self._source.size,
            replicas=self._strategy.num_replicas_in_sync,
            recorded=auto.recorded_config(config),
        )
        with self._strategy.scope():  # `--precision` depends on the devices
            resolved = auto.resolve(config, classes=self._classes, **known)
        self._chosen = auto.reasons(config, resolved, **known)
        return resolved

    def train(self):
        """Trains, see `run`."""
        with contextlib.ExitStack() as stack:
            if self._workers.chief:
                self._claim = stack.enter_context(self._claimed())
                self._unreadable.record(
                    self._config.workdir, moved=self._claim.moved
                )
            if self._services:
                stack.enter_context(self._services)
            stack.enter_context(self._interruption)
            # With several workers, the others would report this one as lost.
            if self._workers.count == 1 and ends_process():
                self._interruption.set_at_once(_NOT_BEGUN)
            try:
                return self._train()
            except tf.errors.OpError as e:
                cause = self._cause(e)
                if not cause:
                    raise
                raise cause from e

    def _claimed(self):
        """Returns the `workdir.Claim` on the directory of the run."""
        fingerprints = {
            "dataset": self._source.fingerprint,
            "eval_dataset": self._evaluation and self._evaluation.fingerprint,
        }
        return workdir.claim(
            self._config,
            images=self._source.size,
            classes=self._classes,
            newest_step=lambda: newest_step(self._config.workdir),
            steps_per_epoch=self._steps_per_epoch,
            fingerprints={n: f() for n, f in fingerprints.items() if f},
        )

    def _train(self):
        config, workers = self._config, self._workers

        # ---- Model
        schedule = make_schedule(config, self._steps_per_epoch)
        with self._strategy.scope():
            method = make_method(
                config,
                schedule,
                RunInfo.of(
                    config,
                    images=self._source.size,
                    classes=self._classes,
                ),
            )
            checkpoints = Checkpoints(
                method,
                config.workdir,
                keep=config.keep_checkpoints,
                schedule=schedule,
                chief=workers.chief,
            )
        step = checkpoints.restore()
        taken = []
        if self._weights and not step:
            taken = self._weights.give_to(method)
        workers.check_same(
            number_of_images=self._source.size,
            flags=clsa_tf.config.identity(config),
            step_to_resume_from=step,
        )
        if workers.chief:
            self._check_still_complete(step)
            metrics_log.rewind(config.workdir, step)
            announcement.announce(
                config,
                source=self._source,
                evaluation=self._evaluation,
                claim=self._claim,
                step=step,
                steps_per_epoch=self._steps_per_epoch,
                replicas=self._strategy.num_replicas_in_sync,
                chosen=self._chosen,
                taken=taken,
                remote=self._remote,
                accelerated=is_accelerated(self._strategy),
            )

        # ---- Train
        log = Log(
            config,
            step,
            steps_per_epoch=self._steps_per_epoch,
            schedule=schedule,
            checkpoints=checkpoints,
            watch=collapse.Watch(
                config.options.projection_size,
                patience=max(collapse.PATIENCE, self._steps_per_epoch),
            ),
            chief=workers.chief,
        )
        with contextlib.closing(log):
            if workers.chief:
                self._draw_views(step, log)
            callbacks = self._callbacks(log, checkpoints, method)
            segments = fit_segments(
                step, self._steps_per_epoch, config.total_epochs
            )
            if segments:
                log.begin()
            fit(method, self._distributed, callbacks, segments)
        # All workers wait for the chief, which may still evaluate. It would
        # report a worker that has ended as lost.
        workers.maximum(0)
        if workers.chief:
            self._sum_up(checkpoints)
        return method

    def _check_still_complete(self, step):
        """Raises `UserError` if a lowered `--total_epochs` leaves steps to do.

        That happens if the newest checkpoints cannot be read.
        """
        total = self._config.total_epochs * self._steps_per_epoch
        if self._claim.shorter and step < total:
            raise UserError(
                f"Expected at least {total} steps in {self._config.workdir}, "
                f"received {step}, because newer checkpoints cannot be read; "
                "set --total_epochs to the value that the run was started "
                "with." + clsa_tf.config.written_by(self._config.workdir)
            )

    def _callbacks(self, log, checkpoints, method):
        """Returns the callbacks; for their order see `callbacks.py`."""
        callbacks = []
        if type(method).on_epoch_begin is not Method.on_epoch_begin:
            features = DatasetFeatures(
                method,
                self._source,
                self._strategy,
                self._unreadable,
                stop_signal=self._agreed_signal,
            )
            alone = self._workers.count == 1
            interruption = self._interruption if alone else None
            callbacks.append(
                EpochBegin(log, method, features, interruption=interruption)
            )
        save = Save(
            checkpoints,
            log,
            every=self._config.checkpoint_steps,
            stop_signal=self._stop_signal,
        )
        callbacks += [log, save]
        if not (self._evaluation and self._evaluation.has_accuracy):
            return callbacks
        monitor = Monitor(
            log,
            self._evaluation.task(self._unreadable),
            Snapshot(method, self._strategy),
            every=self._config.knn_epochs,
            last=self._config.total_epochs,
            interruption=self._interruption,
        )
        monitor.catch_up()
        return [*callbacks, monitor]

    def _stop_signal(self, step):
        """Returns the signal that asks to stop after `step`; 0: none."""
        self._interruption.set_at_once("")
        return self._agreed_signal(step)

    def _agreed_signal(self, step):
        """Returns the signal that has reached any of the workers; 0: none."""
        if self._workers.count > 1 and step % _STEPS_BETWEEN_TALKS:
            return 0
        return self._workers.maximum(self._interruption.signal)

    # ---- Data

    def _batches(
        self, start_step, worker=ALONE, replicas=1, *, keep_params=False
    ):
        # The picture shows images in their order without services.
        services = None if keep_params else self._services
        return training_batches(
            self._source,
            self._views,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            start_step=start_step,
            unreadable=self._unreadable,
            completed=self._config.augment_on == "host",
            keep_params=keep_params,
            whole_epochs=self._config.whole_epochs,
            prefetch=self._config.prefetch_batches,
            worker=worker,
            replicas=replicas,
            services=services,
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
        """Writes views.png with the first images, once per run."""
        path = os.path.join(self._config.workdir, "views.png")
        if not os.path.exists(path):
            with log.doing("drawing views.png"):
                batch = next(iter(self._batches(step, keep_params=True)))
                if self._config.augment_on == "device":
                    batch = complete_batch(batch, views=self._views)
                picture = views.draw_batch(
                    self._config, self._source, self._views, batch, step, path
                )
                log.picture("views", picture)

    # ---- End

    def _sum_up(self, checkpoints):
        """Prints the results, and the commands to evaluate and export."""
        print(
            summary.of_run(
                self._config,
                step=checkpoints.step,
                steps_per_epoch=self._steps_per_epoch,
                seconds=float(checkpoints.seconds.numpy()),
                unreadable=self._unreadable.count
                and self._unreadable.summary(),
            )
        )

    def _cause(self, error):
        """Returns the exception that explains an error of TensorFlow.

        None if the cause is not known.
        """
        if self._unreadable.error():
            # The input pipeline fails with a less specific error.
            return self._unreadable.error()
        if self._services and self._services.lost():
            return WorkerLost(self._services.lost())
        if self._services and isinstance(error, tf.errors.NotFoundError):
            return UserError(
                "Cannot read from the services of --data_service: "
                f"{first_line(error)}; check that no service was restarted and "
                "that all find the dataset under the same paths, then start "
                "the same command again. It resumes from the last checkpoint."
            )
        if self._workers.count == 1 or not is_lost_worker(error):
            return None
        # The other workers received the signal, too, and have ended.
        if self._interruption.signal:
            return Stopped(self._interruption.signal, saved=False)
        return WorkerLost(first_line(error))


def fit(method, batches, callbacks, segments):
    """Calls `fit` of Keras for each of the segments.

    Args:
        method: compiled `Method`.
        batches: function of the first step that returns the dataset.
        callbacks: list of Keras callbacks.
        segments: see `fit_segments`.
    """
    for start_step, epoch, last_epoch, steps in segments:
        method.fit(
            batches(start_step),
            initial_epoch=epoch,
            epochs=last_epoch,
            steps_per_epoch=steps,
            callbacks=callbacks,
            verbose=0,
        )


def make_method(config, schedule, run):
    """Returns the compiled `Method` of `config`, with its optimizer built.

    Args:
        config: `clsa_tf.config.Config`.
        schedule: function of the step that returns the learning rate.
        run: `clsa_tf.methods.base.RunInfo`.
    """
    method = methods.class_of(config)(config, run)
    optimizer = optimizers.make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.sgd_momentum,
        l2=config.l2,
        l2_on=config.l2_on,
        precision=method.precision,
    )
    optimizers.build(optimizer, method.learned)
    method.compile(optimizer=optimizer, jit_compile=config.jit_compile)
    return method


def fit_segments(step, steps_per_epoch, total_epochs):
    """Plans the calls of `fit` from `step` to the end of the run.

    Keras needs epochs of equal length. A run that resumes within an epoch
    completes it in a call of its own.

    Returns:
        list of tuples (first step, first epoch, epoch to stop before, steps
        per epoch).
    """
    epoch, done = divmod(step, steps_per_epoch)
    segments = []
    if done and epoch < total_epochs:
        segments.append((step, epoch, epoch + 1, steps_per_epoch - done))
        epoch += 1
    if epoch < total_epochs:
        segments.append(
            (epoch * steps_per_epoch, epoch, total_epochs, steps_per_epoch)
        )
    return segments
