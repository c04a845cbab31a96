"""Reads images and makes views for training runs on other machines.

    python -m clsa_tf.data_service --expose
    python -m clsa_tf.train --flagfile=clsa --data_service=grpc://HOST:5050

For a run with --data_service, this process reads, decodes and augments the
images. Start one service per machine, or several with different ports; they are
independent. They need the dataset under the same paths as the run, and the same
version of TensorFlow on the same kind of processor.

SIGTERM and SIGINT (Ctrl-C) end it with exit status 0.
"""

import os
import signal
import socket

import tensorflow as tf
from absl import flags

from clsa_tf.cli import launch
from clsa_tf.errors import UserError, first_line

# Time after which the data of a run that was killed are discarded.
_ABANDONED_MS = 30_000


def define_flags(flag_values):
    """Defines this command's flags."""
    flags.DEFINE_integer(
        "port",
        5050,
        "port where runs request datasets; the next port delivers them. 0: any "
        "two free ports",
        lower_bound=0,
        upper_bound=2**16 - 2,
        flag_values=flag_values,
    )
    flags.DEFINE_string(
        "host",
        "",
        "name or address under which runs reach this machine; empty: its host "
        "name",
        flag_values,
    )
    flags.DEFINE_bool(
        "expose",
        False,
        "agree that both ports are open on all network interfaces, to everyone "
        "who can reach them, and that every dataset sent there is executed: it "
        "can read any file that this process can. For private networks only",
        flag_values,
    )


def check_free(port):
    """Raises `OSError` if a port is in use.

    TensorFlow would share the port with the other process, and each would get
    some of the calls.
    """
    with socket.socket() as probe:
        # Allow a port whose last service ended within the last minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))


def serve():
    """Serves until SIGTERM or SIGINT.

    Raises:
        UserError: `--expose` is missing, or a port is in use.
    """
    # A signal writes a byte to this pipe, in whichever thread it arrives.
    end, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    if not flags.FLAGS.expose:
        raise UserError(
            "Expected --expose, received none: tf.data's servers listen on all "
            "network interfaces and execute any dataset that they receive, "
            "which can read any file of this user; pass --expose if only "
            "people whom you trust can reach this machine."
        )
    service = tf.data.experimental.service
    # Services leave the GPUs to training runs.
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
        # The reference keeps the server alive.
        _worker = service.WorkerServer(
            service.WorkerConfig(
                dispatcher_address=address,
                worker_address=f"{host}:%port%",
                port=port + 1 if port else 0,
            )
        )
    except (OSError, tf.errors.OpError) as e:
        raise UserError(
            f"Cannot listen on the ports {port} and {port + 1}: "
            f"{first_line(e)}; choose another --port."
        ) from e
    port = address.split(":")[1]
    print(
        f"serving on grpc://{host}:{port}; point --data_service at it",
        flush=True,
    )
    os.read(end, 1)
    # `stop` waits for calls in progress, sometimes for ever. Nothing is lost
    # without it: runs see a closed connection.
    os._exit(0)


if __name__ == "__main__":
    launch.launch(serve, define_flags)
