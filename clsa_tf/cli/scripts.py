"""Console commands: `clsa-train` is `python -m clsa_tf.train`, and so on.

setup.py maps the names of the commands to these functions.
"""

import functools
import runpy


def _run(module):
    # As `python -m`, because multiprocessing's child processes depend on it.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


train = functools.partial(_run, "clsa_tf.train")
gallery = functools.partial(_run, "clsa_tf.gallery")
report = functools.partial(_run, "clsa_tf.report")
data_service = functools.partial(_run, "clsa_tf.data_service")
export = functools.partial(_run, "export.savedmodel")
formats = functools.partial(_run, "export.formats")
embed = functools.partial(_run, "export.embed")
serve = functools.partial(_run, "export.server")
client = functools.partial(_run, "export.client")
deploy = functools.partial(_run, "export.deploy")
