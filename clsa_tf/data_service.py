"""Reads images and makes views for training runs on other machines.

    python -m clsa_tf.data_service --expose
    python -m clsa_tf.train --flagfile=clsa --data_service=grpc://HOST:5050

For a run with --data_service, this process reads, decodes and augments the
images. Start one service per machine, or several with different ports; they are
independent. They need the dataset under the same paths as the run, and the same
version of TensorFlow on the same kind of processor.

SIGTERM and SIGINT (Ctrl-C) end it with exit status 0.
"""

from absl import flags

from clsa_tf.cli import launch
from clsa_tf.data import service
from clsa_tf.errors import UserError


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
        "allow the service to listen on all network interfaces. Everyone who "
        "reaches its ports can run any dataset there, and so read every file "
        "that this process can read. For private networks only",
        flag_values,
    )


def main():
    """Reads the flags and serves until a signal."""
    if not flags.FLAGS.expose:
        raise UserError(
            "Expected --expose, received none: tf.data's servers listen on all "
            "network interfaces and execute any dataset that they receive, "
            "which can read any file of this user; pass --expose if only "
            "people whom you trust can reach this machine."
        )
    service.serve(flags.FLAGS.host, flags.FLAGS.port)


if __name__ == "__main__":
    launch.launch(main, define_flags)
