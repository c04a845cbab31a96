"""Choice of the devices and hosts of a run."""

import json
import os
import re
import sys

import numpy as np
import tensorflow as tf

from clsa_tf.distributed import collectives
from clsa_tf.errors import UserError

# Exceptions of TensorFlow if another process of the job has stopped.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)
# An InternalError has the same cause only if its message has one of these.
_CONNECTION = re.compile(
    r"collective ops is aborted|connection (reset|refused|closed)|socket closed"
    r"|failed to connect|reset by peer|\brpc\b|\bbarrier\b"
    r"|coordination service",
    re.IGNORECASE,
)

STRATEGIES = ("auto", "one", "mirrored", "multiworker", "tpu")


def make_strategy(name, *, tpu=""):
    """Returns the `tf.distribute.Strategy` called `name`.

    Must be called before TensorFlow computes anything, because the processes of
    a multi-worker job connect to each other when TensorFlow starts.

    Args:
        name: `"one"` (first GPU, else the CPU), `"mirrored"` (all GPUs of this
            machine), `"multiworker"` (all GPUs, else the CPU, of every process
            in `TF_CONFIG` or in the SLURM step), `"tpu"`, or `"auto"` (chosen
            by `tpu`, the environment and the GPUs of this machine).
        tpu: name or address of the TPU; `"local"` on a TPU VM.

    Raises:
        UserError: the name is unknown, or the machine or the environment does
            not support this strategy.
    """
    if name not in STRATEGIES:
        raise UserError(
            f"Expected one of {', '.join(STRATEGIES)}, received {name!r}; "
            "change --strategy."
        )
    if name == "auto":
        name = _suggested(tpu)
    if name == "tpu":
        return _tpu_strategy(tpu or "local")
    if tpu:
        raise UserError(
            f"Expected --strategy=tpu or auto with --tpu={tpu}, received "
            f"--strategy={name}; change --strategy or omit --tpu."
        )
    if name == "multiworker":
        return _multiworker_strategy()
    gpus = tf.config.list_logical_devices("GPU")
    # Tests use several logical CPUs as replicas.
    devices = gpus or tf.config.list_logical_devices("CPU")
    if name == "mirrored":
        if len(devices) == 1 and not gpus:
            raise UserError(
                "Expected GPUs for --strategy=mirrored, received a machine "
                "without GPUs; use --strategy=auto or --strategy=one."
            )
        return tf.distribute.MirroredStrategy([d.name for d in devices])
    return tf.distribute.OneDeviceStrategy(devices[0].name)


def make_deterministic():
    """Makes equal runs of this process and of others equal bit for bit.

    TensorFlow runs one operation at a time, each on all threads: a gradient of
    a large convolution depends in its last digits on concurrent operations.
    On GPUs, operations that add in varying order are replaced or rejected.

    Must be called before TensorFlow computes anything.

    Raises:
        UserError: TensorFlow has started already.
    """
    threading = tf.config.threading
    if threading.get_inter_op_parallelism_threads() != 1:
        try:
            threading.set_inter_op_parallelism_threads(1)
        except RuntimeError as error:
            raise UserError(
                "Cannot make this process deterministic: TensorFlow has "
                "computed something already; call "
                "`tf.config.threading.set_inter_op_parallelism_threads(1)` at "
                "the start of the program."
            ) from error
    tf.config.experimental.enable_op_determinism()


def loads_elsewhere(strategy):
    """Whether the data are loaded on the remote hosts of a TPU."""
    devices = strategy.extended.worker_devices
    return isinstance(strategy, tf.distribute.TPUStrategy) and not any(
        "/job:localhost" in device for device in devices
    )


def is_lost_worker(error):
    """Whether the cause of an error is a stopped process of the same job.

    Args:
        error: exception raised by TensorFlow.
    """
    if isinstance(error, tf.errors.InternalError):
        return bool(_CONNECTION.search(str(error)))
    return isinstance(error, _LOST)


def is_accelerated(strategy):
    """Whether the replicas of a strategy are GPUs or TPUs."""
    return not any("CPU" in d for d in strategy.extended.worker_devices)


class Workers:
    """The processes of a job, and values that they exchange.

    All workers must call the same methods in the same order.

    Args:
        strategy: the run's strategy.

    Attributes:
        count: number of workers.
        chief: whether this worker writes files and prints.
    """

    def __init__(self, strategy):
        """See the class."""
        self.count = collectives.num_loaders(strategy)
        self.chief = strategy.extended.should_checkpoint
        self._strategy = strategy
        self._gather = tf.function(
            lambda row: strategy.run(collectives.gather, args=(row,))
        )

    def maximum(self, number):
        """The largest of the workers' numbers; each passes one int32."""
        if self.count == 1:
            return number
        return int(np.max(self._table([number])))

    def check_same(self, **numbers):
        """Checks that numbers are the same on all workers.

        Args:
            **numbers: int32 values. Error messages use their names, with spaces
                instead of underscores.

        Raises:
            UserError: a number differs between workers.
        """
        if self.count == 1:
            return
        table = self._table(list(numbers.values()))
        for name, column in zip(numbers, table.T):
            if len(set(column.tolist())) > 1:
                raise UserError(
                    f"Expected the same {name.replace('_', ' ')} on all "
                    f"workers, received {', '.join(map(str, column))}; start "
                    "all workers with the same flags and data, and with "
                    "--workdir on shared storage."
                )

    def _table(self, numbers):
        """Gathers int32 numbers of every replica: `[R, len(numbers)]`."""
        gathered = self._gather(tf.constant([numbers], tf.int32))
        return np.array(self._strategy.experimental_local_results(gathered)[0])


def _suggested(tpu):
    if tpu:
        return "tpu"
    if _tf_config_tasks() > 1 or _slurm_tasks() > 1:
        return "multiworker"
    several = len(tf.config.list_physical_devices("GPU")) > 1
    return "mirrored" if several else "one"


def _tf_config():
    """The value of `TF_CONFIG`, parsed; {} if it is not set."""
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        return {}
    try:
        config = json.loads(text)
        cluster = config.get("cluster", {})
        if cluster:
            task = config["task"]
            cluster[task["type"]][int(task["index"])]  # raises if missing
        return config
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(
            'Expected TF_CONFIG like {"cluster": {"worker": ["a:1", "b:1"]}, '
            f'"task": {{"type": "worker", "index": 0}}}}, received {text!r}; '
            "correct or unset TF_CONFIG."
        ) from e


def _tf_config_tasks():
    cluster = _tf_config().get("cluster", {})
    return sum(len(cluster.get(job, [])) for job in ("chief", "worker"))


def _slurm_tasks():
    # Set only within a step (`srun`); the script around it is not a worker.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 0))


def _multiworker_strategy():
    resolvers = tf.distribute.cluster_resolver
    if _tf_config_tasks():
        resolver = resolvers.TFConfigClusterResolver()
    elif _slurm_tasks():
        resolver = _slurm_resolver()
    else:
        raise UserError(
            "Expected TF_CONFIG or a SLURM step (srun) for "
            "--strategy=multiworker, received neither; set TF_CONFIG on each "
            "worker (see configs/cluster for examples) or use --strategy=auto."
        )
    cluster = resolver.cluster_spec().as_dict()
    workers = [f"{job} {', '.join(hosts)}" for job, hosts in cluster.items()]
    print(f"  waiting for all workers: {'; '.join(workers)}", file=sys.stderr)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except RuntimeError as e:
        if "startup" not in str(e):
            raise
        raise UserError(
            "Expected the workers to connect before TensorFlow computes "
            "anything, received a program that has already used TensorFlow; "
            "start the training first, or use python -m clsa_tf.train."
        ) from e


def _slurm_resolver():
    resolvers = tf.distribute.cluster_resolver
    # Jobs on the same machine need different ports.
    job = int(os.environ.get("SLURM_JOB_ID", 0))
    port = 20_000 + 100 * (job % 100)
    tasks = _slurm_tasks()
    # SLURM assigns the GPUs of a task (--gpus-per-task). The resolver requires
    # these numbers but assigns nothing.
    cluster = resolvers.SlurmClusterResolver(
        port_base=port,
        gpus_per_node=tasks,
        gpus_per_task=1,
        auto_set_gpu=False,
    ).cluster_spec()
    # The resolver sorts machines by name, so node10 precedes node2, and its
    # task numbers can differ from SLURM's.
    host = os.environ.get("SLURMD_NODENAME", "")
    address = f"{host}:{port + int(os.environ.get('SLURM_LOCALID', 0))}"
    addresses = cluster.as_dict()["worker"]
    if address not in addresses:
        raise UserError(
            f"Expected this task's machine in {', '.join(addresses)}, received "
            f"SLURMD_NODENAME={host!r}; start the training with srun."
        )
    return resolvers.SimpleClusterResolver(
        cluster,
        task_type="worker",
        task_id=addresses.index(address),
        rpc_layer="grpc",
    )


def _tpu_strategy(name):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, OSError) as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"Expected a TPU called {name!r}, received: {reason}; set --tpu to "
            "its name, or to local on a TPU VM."
        ) from e
    return tf.distribute.TPUStrategy(resolver)
