"""Starting the processes of a job on this machine, as a cluster would."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys


def free_ports(count):
    """Returns ports of the loopback interface that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def start(arguments, *, workers=1, log, environments=None):
    """Starts `python -m <arguments>` once per worker.

    Args:
        arguments: list of strings.
        workers: number of processes; more than one get a `TF_CONFIG` each.
        log: path; process `i` writes to `<log>.<i>`.
        environments: variables for each worker instead of `TF_CONFIG`.

    Returns:
        list of `subprocess.Popen`, each leader of a session of its own.
    """
    if environments is None:
        environments = [{}]
        if workers > 1:
            hosts = [f"127.0.0.1:{port}" for port in free_ports(workers)]
            environments = [
                {
                    "TF_CONFIG": json.dumps(
                        {
                            "cluster": {"worker": hosts},
                            "task": {"type": "worker", "index": i},
                        }
                    )
                }
                for i in range(workers)
            ]
    processes = []
    for i, environment in enumerate(environments):
        with open(f"{log}.{i}", "w") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *map(str, arguments)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ
                    | {"TF_CPP_MIN_LOG_LEVEL": "2"}
                    | environment,
                )
            )
    return processes


def wait(processes, *, timeout):
    """Waits for all; returns their exit statuses. Leaves none behind."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
