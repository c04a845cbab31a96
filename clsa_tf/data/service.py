"""A tf.data service, which makes views for training runs elsewhere."""

import os
import signal
import socket

import tensorflow as tf

from clsa_tf.errors import UserError, first_line

# Time after which the data of a run that was killed are discarded.
_ABANDONED_MS = 30_000


def serve(host, port):
    """Serves until SIGTERM or SIGINT, then ends the process with status 0.

    TensorFlow's servers listen on all network interfaces and execute every
    dataset that they receive.

    Args:
        host: name or address under which runs reach this machine; "": its
            host name.
        port: port where runs request datasets; the next port delivers them.
            0: any two free ports.

    Raises:
        UserError: a port is in use.
    """
    # A signal writes a byte to this pipe, in whichever thread it arrives.
    end, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # Services leave the GPUs to training runs.
    tf.config.set_visible_devices([], "GPU")
    host = host or socket.gethostname()
    try:
        # The references keep the servers alive.
        dispatcher, _worker = _start(host, port)
    except (OSError, tf.errors.OpError) as e:
        ports = f"the ports {port} and {port + 1}" if port else "two free ports"
        raise UserError(
            f"Cannot listen on {ports}: {first_line(e)}; choose another --port."
        ) from e
    print(
        f"serving on grpc://{host}:{_address(dispatcher).split(':')[1]}; point "
        "--data_service at it",
        flush=True,
    )
    os.read(end, 1)
    # `stop` waits for calls in progress, sometimes for ever. Nothing is lost
    # without it: runs see a closed connection.
    os._exit(0)


def _start(host, port):
    """Returns the running dispatcher and worker."""
    for number in (port, port + 1) if port else ():
        _check_free(number)
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer(
        service.DispatcherConfig(
            port=port,
            job_gc_check_interval_ms=_ABANDONED_MS,
            job_gc_timeout_ms=_ABANDONED_MS,
        )
    )
    worker = service.WorkerServer(
        service.WorkerConfig(
            dispatcher_address=_address(dispatcher),
            worker_address=f"{host}:%port%",
            port=port + 1 if port else 0,
        )
    )
    return dispatcher, worker


def _address(dispatcher):
    return dispatcher.target.split("//")[1]


def _check_free(port):
    """Raises `OSError` if a port is in use.

    TensorFlow would share the port with the other process, and each would get
    some of the calls.
    """
    with socket.socket() as probe:
        # Allow a port whose last service ended within the last minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
