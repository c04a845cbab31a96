"""A run: what it consists of, from data to the last checkpoint."""

import contextlib
import os

import tensorflow as tf

import clsa_tf.config
from clsa_tf import methods
from clsa_tf.augment.chain import complete_batch
from clsa_tf.data.checks import (
    check_drawn_sizes,
    check_readable_elsewhere,
    check_sizes,
)
from clsa_tf.data.open import open_train_source
from clsa_tf.data.order import ALONE, Worker
from clsa_tf.data.pipeline import training_batches
from clsa_tf.data.service_client import Services, parse
from clsa_tf.data.unreadable import UnreadableImages
from clsa_tf.distributed.strategy import (
    Workers,
    is_accelerated,
    is_lost_worker,
    loads_elsewhere,
    make_strategy,
)
from clsa_tf.errors import Stopped, UserError, WorkerLost, first_line
from clsa_tf.evaluation.dataset_features import DatasetFeatures
from clsa_tf.evaluation.features import Snapshot
from clsa_tf.evaluation.task import announcement, plan
from clsa_tf.methods.base import Method, RunInfo
from clsa_tf.networks import backbones, precision
from clsa_tf.optimizers import optimizers
from clsa_tf.optimizers.schedule import make_schedule
from clsa_tf.plots import views
from clsa_tf.terminal.signals import Interruption, ends_process
from clsa_tf.text import counted
from clsa_tf.training import (
    advice,
    auto,
    collapse,
    initial_weights,
    metrics_log,
    summary,
    workdir,
)
from clsa_tf.training.callbacks import EpochBegin, Log, Monitor, Save
from clsa_tf.training.checkpoint import Checkpoints, newest_step

# Several workers ask each other whether to stop every so many steps.
_STEPS_BETWEEN_TALKS = 10


# What a signal before the first step of this start is answered with.
_NOT_BEGUN = (
    "ended before the first step; nothing is lost, and the same command starts "
    "again"
)


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
        precision.set_tf32(config.precision)
        # Before anything is computed: workers connect when TensorFlow starts.
        self._strategy = make_strategy(config.strategy, tpu=config.tpu)
        self._workers = Workers(self._strategy)
        self._views = methods.load(config.method).METHOD.views(config.options)
        check_drawn_sizes(
            config.dataset, self._views, allow_upscaling=config.allow_upscaling
        )
        self._source = open_train_source(config)
        config = self._config = self._resolve(config)
        self._steps_per_epoch = self._source.size // config.batch_size
        check_batch(config, self._source.size, self._strategy)
        check_needs(config, self._source)
        check_sizes(
            self._source, self._views, allow_upscaling=config.allow_upscaling
        )
        backbones.check_sizes(
            config.backbone,
            [*(view.size for view in self._views), config.image_size],
        )
        self._services, advice = None, ""
        if config.data_service:
            self._services = Services(parse(config.data_service))
            self._services.check()
            advice = "see that the services of --data_service find them there"
        self._remote = loads_elsewhere(self._strategy)
        if self._remote:
            check_readable_elsewhere(
                self._source,
                "on the hosts of the TPU",
                "train on a TPU VM with --tpu=local",
            )
        self._unreadable = UnreadableImages(
            max_bad_share=config.max_bad_share,
            advice=advice,
            remote=self._remote,
        )
        self._evaluation = None
        if config.knn_epochs:
            self._evaluation = plan(config, self._source)
        self._interruption = Interruption()
        self._claim = None  # of the chief
        # Before anything is written: what does not fit leaves no trace.
        self._weights = None
        if config.init_from:
            initial_weights.check(config)
            if not newest_step(config.workdir):
                self._weights = initial_weights.read(config)

    def _has_accuracy(self):
        """Whether the run is evaluated by its kNN accuracy."""
        return bool(self._evaluation and not self._evaluation.no_accuracy)

    def _resolve(self, config):
        """`config` with a value for every `auto`, of which `_chosen` tells."""
        self._facts = dict(
            images=self._source.size,
            replicas=self._strategy.num_replicas_in_sync,
        )
        known = self._facts | {"recorded": auto.recorded(config)}
        resolved = auto.resolve(config, **known)
        self._chosen = auto.reasons(config, resolved, **known)
        return resolved

    def train(self):
        """See `run`."""
        with contextlib.ExitStack() as stack:
            if self._workers.chief:
                self._claim = stack.enter_context(self._claimed())
                self._unreadable.record(
                    self._config.workdir, moved=self._claim.moved
                )
            if self._services:
                stack.enter_context(self._services)
            stack.enter_context(self._interruption)
            # Other workers would take this process for lost.
            if self._workers.count == 1 and ends_process():
                self._interruption.lose_nothing(_NOT_BEGUN)
            try:
                return self._train()
            except tf.errors.OpError as e:
                cause = self._cause(e)
                if not cause:
                    raise
                raise cause from e

    def _claimed(self):
        fingerprints = {
            "dataset": self._source.fingerprint,
            "eval_dataset": self._evaluation and self._evaluation.fingerprint,
        }
        return workdir.claim(
            self._config,
            images=self._source.size,
            step=newest_step(self._config.workdir),
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
                RunInfo(
                    num_images=self._source.size,
                    num_classes=len(self._source.class_names or ()),
                    steps_per_epoch=self._steps_per_epoch,
                    total_steps=config.total_epochs * self._steps_per_epoch,
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
            self._announce(step, taken)

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
        if workers.chief:
            self._draw_views(step, log)
        with contextlib.closing(log):
            callbacks = self._callbacks(log, checkpoints, method)
            ahead = fit_segments(
                step, self._steps_per_epoch, config.total_epochs
            )
            if ahead:
                log.begin()
            fit(method, self._distributed, callbacks, ahead)
        # All leave together: one that is gone while the chief still evaluates
        # would be taken for lost.
        workers.maximum(0)
        if workers.chief:
            self._sum_up(checkpoints)
        return method

    def _check_still_complete(self, step):
        """Fewer epochs are accepted only where there is nothing left to do."""
        total = self._config.total_epochs * self._steps_per_epoch
        if self._claim.shorter and step < total:
            raise UserError(
                f"Expected at least {total} steps in {self._config.workdir}, "
                f"received {step}, as newer checkpoints cannot be read; put "
                "--total_epochs back to what the run was started with."
            )

    def _callbacks(self, log, checkpoints, method):
        """Logged, saved, then evaluated: see `callbacks`."""
        callbacks = []
        if type(method).on_epoch_begin is not Method.on_epoch_begin:
            features = DatasetFeatures(
                method, self._source, self._strategy, self._unreadable
            )
            callbacks.append(EpochBegin(log, method, features))
        save = Save(
            checkpoints,
            log,
            every=self._config.checkpoint_steps,
            stop_signal=self._stop_signal,
        )
        callbacks += [log, save]
        if not self._has_accuracy():
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
        """The signal after which to stop at `step`, of any worker; or 0."""
        self._interruption.lose_nothing("")
        if self._workers.count > 1 and step % _STEPS_BETWEEN_TALKS:
            return 0
        return self._workers.maximum(self._interruption.signal)

    # ---- Data

    def _batches(
        self, start_step, worker=ALONE, replicas=1, *, keep_params=False
    ):
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
            with log.doing("drawing views.png"):
                batch = next(iter(self._batches(step, keep_params=True)))
                if self._config.augment_on == "device":
                    batch = complete_batch(batch, views=self._views)
                picture = views.draw_batch(
                    self._config, self._source, self._views, batch, step, path
                )
                log.picture("views", picture)

    # ---- Words

    def _announce(self, step, taken):
        """Prints what is about to happen.

        Args:
            step: steps taken so far.
            taken: list of `initial_weights.Part`.
        """
        config = self._config
        total = config.total_epochs * self._steps_per_epoch
        print(
            f"{config.method}: {config.backbone} on {self._source.size} images "
            f"of {self._source.name}, {counted(config.total_epochs, 'epoch')} "
            f"of {counted(self._steps_per_epoch, 'step')} of "
            f"{config.batch_size} images on "
            + counted(self._strategy.num_replicas_in_sync, "device")
        )
        for note in self._source.notes:
            print(f"  {note}")
        if self._remote:
            print(
                "  the hosts of the TPU read the images: unreadable ones are "
                "replaced by others of the batch, neither named nor counted"
            )
        begun = clsa_tf.config.older_in(config.workdir)
        if begun:
            flags_then = clsa_tf.config.as_flags(begun)
            print(f"  begun by an earlier version, so it keeps {flags_then}")
        method_class = methods.load(config.method).METHOD
        chance = method_class.chance_loss(config)
        print(f"  {method_class.chance_text.format(chance)}")
        for sentence in self._chosen:
            print(f"  auto: {sentence}")
        for sentence in self._advice() if step < total else ():
            print(f"  warning: {sentence}")
        for line in announcement(config, self._source, self._evaluation):
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
        for note in self._claim.notes:
            print(f"  note: {note}")
        for change in self._claim.changes:
            print(f"  changed: {change}{self._consequence(change, step)}")

    def _advice(self):
        return advice.advice(
            self._config,
            **self._facts,
            bank=self._evaluation.bank.size if self._has_accuracy() else 0,
            accelerated=is_accelerated(self._strategy),
        )

    def _consequence(self, change, step):
        """What another --total_epochs does, in words."""
        if change.flag != "total_epochs" or not step:
            return ""
        config = self._config
        before = config.replace(total_epochs=int(change.before))
        rates = [
            float(make_schedule(c, self._steps_per_epoch)(s))
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

    def _sum_up(self, checkpoints):
        """Prints what the run reached, and what to type next."""
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
        """What an error of TensorFlow came from, if anything is known."""
        if self._unreadable.error():
            # The input pipeline stops the step with an error of its own.
            return self._unreadable.error()
        if self._services and self._services.lost():
            return WorkerLost(self._services.lost())
        if self._services and isinstance(error, tf.errors.NotFoundError):
            return UserError(
                "Expected services of --data_service that run without a "
                "break and find the dataset's files where this process "
                f"does, received: {first_line(error)}; see to that, and start "
                "the same command again: it goes on from the last checkpoint."
            )
        if self._workers.count == 1 or not is_lost_worker(error):
            return None
        if self._interruption.signal:  # so were the others, and are gone
            return Stopped(self._interruption.signal, saved=False)
        return WorkerLost(first_line(error))


def check_needs(config, source):
    """Raises `UserError` unless the source has what the method needs."""
    method_class = methods.load(config.method).METHOD
    if method_class.needs_index and not source.random_access:
        raise UserError(
            f"Expected images that have a number each for --method="
            f"{config.method}, received {source.name}, which is read as a "
            "stream; use a folder, array_record files or a smaller dataset."
        )
    if method_class.needs_label and not source.class_names:
        raise UserError(
            f"Expected labels for --method={config.method}, received "
            f"{source.name} without any: {source.unlabelled}; train on a "
            "labelled dataset."
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
    if config.jit_compile and not is_accelerated(strategy):
        raise UserError(
            "Expected one replica, GPUs or TPUs with --jit_compile, received "
            f"{replicas} CPUs, between which XLA cannot compile an exchange; "
            "leave it out."
        )


def fit(method, batches, callbacks, segments):
    """Calls Keras' `fit` for each segment; `batches(step)` is its data."""
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
    """Returns the compiled `Method` of `config`, its optimizer built.

    Args:
        config: `clsa_tf.config.Config`.
        schedule: step -> learning rate.
        run: `clsa_tf.methods.base.RunInfo`.
    """
    method = methods.load(config.method).METHOD(config, run)
    sgd = optimizers.make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.sgd_momentum,
        l2=config.l2,
        l2_on=config.l2_on,
        precision=method.precision,
    )
    optimizers.build(sgd, method.learned)
    method.compile(optimizer=sgd, jit_compile=config.jit_compile)
    return method


def fit_segments(step, steps_per_epoch, total_epochs):
    """Calls of `fit` that lead from `step` to the end.

    Keras counts whole epochs of equal length; a run resumed within an epoch
    first finishes that.

    Returns:
        list of (first step, first epoch, epoch to stop before, steps per
        epoch).
    """
    epoch, done = divmod(step, steps_per_epoch)
    found = []
    if done and epoch < total_epochs:
        found.append((step, epoch, epoch + 1, steps_per_epoch - done))
        epoch += 1
    if epoch < total_epochs:
        found.append(
            (epoch * steps_per_epoch, epoch, total_epochs, steps_per_epoch)
        )
    return found
