"""Starts the processes of a job on this machine, as a cluster does."""

import contextlib
import json
import socket

from tests import runs


def free_ports(count):
    """Returns unused ports of the loopback interface."""
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
        list of `subprocess.Popen`.
    """
    processes = []
    for i, variables in enumerate(environments or _tf_configs(workers)):
        with open(f"{log}.{i}", "w") as file:
            processes.append(
                runs.start(runs.command(*arguments), file, **variables)
            )
    return processes


def _tf_configs(workers):
    if workers == 1:
        return [{}]
    hosts = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    tasks = [{"type": "worker", "index": i} for i in range(workers)]
    return [
        {"TF_CONFIG": json.dumps({"cluster": {"worker": hosts}, "task": task})}
        for task in tasks
    ]


def wait(processes, *, timeout):
    """Waits for all; returns their exit statuses. Kills any still running."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
