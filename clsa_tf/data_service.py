"""Reads images and makes views for trainings on other machines.

    python -m clsa_tf.data_service --expose
    python -m clsa_tf.train --flagfile=clsa --data_service=grpc://HOST:5050

A training with --data_service has its images read, decoded and augmented here.
Start one service per machine, or several with other ports; none knows of the
others. They have to see the dataset under the same paths as the training, and
run the same version of TensorFlow on the same kind of processor.

SIGTERM and SIGINT (Ctrl-C) end it, with exit status 0.
"""

import os
import signal
import socket

import tensorflow as tf
from absl import flags

from clsa_tf.cli import launch
from clsa_tf.errors import UserError, first_line

# What a training that was killed had ordered is thrown away after so long.
_ABANDONED_MS = 30_000


def define_flags(flag_values):
    """Defines this command's flags."""
    flags.DEFINE_integer(
        "port",
        5050,
        "port that trainings ask for datasets; they get them from the next "
        "one. 0: any two free ports",
        lower_bound=0,
        upper_bound=2**16 - 2,
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "host",
        "",
        "name or address by which trainings reach this machine; empty: its "
        "host name",
        flag_values,
    )
    flags.DEFINE_bool(
        "expose",
        False,
        "agree that both ports are open on all network interfaces, to everyone "
        "who can reach them, and that whatever dataset is sent there is run: "
        "it can read any file that this process can. For private networks only",
        flag_values,
    )


def check_free(port):
    """Raises `OSError` if a port is taken.

    TensorFlow would share it with whoever has it, each taking some calls.
    """
    with socket.socket() as probe:
        # But not for a minute after the last service there has ended.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))


def serve():
    """Serves until SIGTERM or SIGINT.

    Raises:
        UserError: without `--expose`, or a port is taken.
    """
    # A signal writes a byte here, whichever thread it reaches.
    end, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if not flags.FLAGS.expose:
        raise UserError(
            "Expected --expose, received none: tf.data's servers listen on all "
            "network interfaces and run whatever they are sent, which can read "
            "any file of this user; pass --expose if only you and those you "
            "trust can reach this machine."
        )
    service = tf.data.experimental.service
    # Not for the services, which leave them to the trainings.
    tf.config.set_visible_devices([], "GPU")
    host = flags.FLAGS.host or socket.gethostname()
    port = flags.FLAGS.port
    try:
        for number in (port, port + 1) if port else ():
            check_free(number)
        dispatcher = service.DispatchServer(
            service.DispatcherConfig(
                port=port,
                job_gc_check_interval_ms=_ABANDONED_MS,
                job_gc_timeout_ms=_ABANDONED_MS,
            )
        )
        address = dispatcher.target.split("//")[1]
        # (It serves for as long as something refers to it.)
        _worker = service.WorkerServer(
            service.WorkerConfig(
                dispatcher_address=address,
                worker_address=f"{host}:%port%",
                port=port + 1 if port else 0,
            )
        )
    except (OSError, tf.errors.OpError) as e:
        raise UserError(
            f"Expected the free ports {port} and {port + 1}, received: "
            f"{first_line(e)}; choose another --port."
        ) from e
    port = address.split(":")[1]
    print(
        f"serving on grpc://{host}:{port}; point --data_service at it",
        flush=True,
    )
    os.read(end, 1)
    # Not by `stop`, which waits for calls in progress, now and then for ever.
    # There is nothing to lose here: trainings see a closed connection.
    os._exit(0)


if __name__ == "__main__":
    launch.launch(serve, define_flags)
