"""The log and the streams of commands."""

import os
import pathlib
import pty
import signal
import subprocess
import sys
import threading

import pytest

from clsa_tf.terminal import console, native_log
from tests import exports

# Lines from runs in which nothing failed, except for a damaged image.
NOTES = b"""\
2026-11-28 18:35:39.602838: I external/local_tsl/tsl/cuda/cudart_stub.cc:31] C
2026-11-28 18:35:39.822641: E external/local_xla/xla/stream_executor/cuda/cuda_\
dnn.cc:9261] Unable to register cuDNN factory: Attempting to register factory
2026-11-28 18:36:38.758679: E external/local_xla/xla/stream_executor/stream_\
executor_internal.h:177] SetPriority unimplemented for this stream.
2026-11-28 18:35:41.772337: W tensorflow/compiler/tf2tensorrt/utils/py_utils.cc\
:38] TF-TRT Warning: Could not find TensorRT
WARNING: All log messages before absl::InitializeLog() is called are written to\
 STDERR
I0000 00:00:1795890998.745820    7359 device_compiler.h:186] Compiled cluster u
Summary on the non-converted ops:
---------------------------------
 * Accepted dialects: tfl, builtin, func
 * Non-Converted Ops: 49, Total Ops 151, % non-converted = 32.45 %
 * 49 ARITH ops
- arith.constant:   49 occurrences  (f16: 46, i32: 3)
  (f32: 9)
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
fully_quantize: 0, inference_type: 6, input_inference_type: UINT8, output_infer\
ence_type: FLOAT32
2026-11-29 00:51:17.763269: E tensorflow/core/lib/jpeg/jpeg_mem.cc:327] Prematu\
re end of JPEG data. Stopped at line 14/300
E0000 00:00:1795890998.745820    7359 png_io.cc:98] PNG error: CRC error
E0000 00:00:1795944214.601622   25884 util.cc:131] oneDNN supports DT_UINT8 onl\
y on platforms with AVX-512. Falling back to the default Eigen-based implementa\
tion if present.
"""
MESSAGES = b"""\
2026-11-28 18:35:39.822641: E tensorflow/core/x.cc:9] Could not create handle
E0000 00:00:1795890998.745820    7359 server_chttp2.cc:40] Failed to bind
F0000 00:00:1795890998.745820    7359 tensor.cc:1] Check failed: a == b
2026-11-28 18:35:39.822641: F tensorflow/core/tensor.cc:1] Check failed: a == b
terminate called after throwing an instance of 'std::bad_alloc'
python: x.c:3: main: Assertion `0' failed.
double free or corruption (!prev)
Fatal Python error: Segmentation fault
W1128 tells of nothing in the form of a log
  (f32: 9) of them
"""


def copied(data):
    """Returns the copy of bytes that are written at once, or in pieces."""
    found = []
    for size in (len(data), 7):
        source, sink = os.pipe()
        output, end = os.pipe()

        def write(sink=sink, size=size):
            with open(sink, "wb", buffering=0) as file:
                for start in range(0, len(data), size):
                    file.write(data[start : start + size])

        writer = threading.Thread(target=write)
        writer.start()
        native_log.copy(source, end)
        writer.join()
        os.close(source)
        os.close(end)
        with open(output, "rb") as file:
            found.append(file.read())
    assert found[0] == found[1]
    return found[0]


def test_only_notes_are_left_out(monkeypatch):
    monkeypatch.setattr(native_log, "_PATIENCE", 60)  # for a busy machine
    assert copied(NOTES) == b""
    assert copied(MESSAGES) == MESSAGES
    mixed = NOTES + MESSAGES + b"without an end"
    assert copied(mixed) == MESSAGES + b"without an end"


def test_a_prompt_is_passed_on_before_its_line_ends():
    source, sink = os.pipe()
    output, end = os.pipe()
    copier = threading.Thread(target=native_log.copy, args=[source, end])
    copier.start()
    os.write(sink, b"Password: ")
    assert os.read(output, 100) == b"Password: "
    os.close(sink)
    copier.join()
    for descriptor in (source, output, end):
        os.close(descriptor)


def test_copying_ends_without_a_reader():
    source, sink = os.pipe()
    output, end = os.pipe()
    os.close(output)
    os.write(sink, MESSAGES)
    os.close(sink)
    native_log.copy(source, end)
    os.close(source)
    os.close(end)


GROWTH = "TF_FORCE_GPU_ALLOW_GROWTH"


def run(script, level=None, **settings):
    """Runs Python code that may print; TensorFlow is not imported."""
    ours = (console._LEVEL, GROWTH)
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    if level:
        environment[console._LEVEL] = level
    return subprocess.run(
        [sys.executable, "-c", "import os, sys\n" + script],
        env=environment,
        capture_output=True,
        timeout=60,
        **settings,
    )


WRITE = f"os.write(2, {NOTES + MESSAGES!r})\n"
QUIETEN = "import clsa_tf; clsa_tf.quieten()\n"


def test_output_of_an_aborting_process_is_kept():
    result = run(
        QUIETEN
        + "import faulthandler; faulthandler.enable()\n"
        + WRITE
        + "os.abort()"
    )
    assert result.returncode == -signal.SIGABRT
    assert MESSAGES in result.stderr  # by native code
    assert b"Fatal Python error: Aborted" in result.stderr
    assert not {*NOTES.splitlines()} & {*result.stderr.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "length, words",
    [(0.2, b"Improper call"), (0.5, b"Premature end")],
)
def test_messages_about_damaged_images_are_left_out(tmp_path, length, words):
    image = exports.encode(exports.noise(1)[0], "JPEG")
    (tmp_path / "x.jpg").write_bytes(image[: int(length * len(image))])
    script = (
        "import tensorflow as tf\n"
        f"content = tf.io.read_file({str(tmp_path / 'x.jpg')!r})\n"
        "try: tf.io.decode_jpeg(content)\n"
        "except tf.errors.InvalidArgumentError: print('refused')"
    )
    for prefix, message in (("", words), (QUIETEN, b"")):
        result = run(prefix + script)
        assert result.stdout == b"refused\n"
        assert message in result.stderr
    assert b"jpeg" not in result.stderr.lower()


def test_processes_of_this_project_let_gpu_memory_grow():
    """The processes that they start need GPU memory, too."""
    show = f"print(os.environ.get('{GROWTH}'))"
    begin = "from clsa_tf.terminal import console; console.begin()\n"
    own = f"os.environ['{GROWTH}'] = 'false'\n"
    assert run(begin + show).stdout == b"true\n"
    assert run(own + begin + show).stdout == b"false\n"
    for module in ("benchmarks", "tests"):
        begin = f"import {module}\n"
        assert run(begin + show).stdout == b"true\n"
        assert run(own + begin + show).stdout == b"false\n"
    # A user's program keeps its own setting.
    assert run(QUIETEN + show).stdout == b"None\n"


@pytest.mark.parametrize(
    "path", sorted(pathlib.Path("examples").glob("*.py")), ids=str
)
def test_examples_set_variables_before_they_import_tensorflow(path):
    result = run(
        "import runpy\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('tensorflow', 'keras_cv'):\n"
        f"            names = ('{GROWTH}', '{console._LEVEL}')\n"
        "            print([os.environ.get(x) for x in names], flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"runpy.run_path({str(path)!r}, run_name='__main__')\n",
    )
    assert result.stdout == b"['true', '2']\n", result.stderr


def test_quieten_is_also_where_version_0_1_0_documented_it():
    result = run("from clsa_tf import console; console.quieten()\n" + WRITE)
    assert result.stderr == MESSAGES


def test_errors_of_python_stay_visible():
    result = run(QUIETEN + WRITE + "raise ValueError('of ours')")
    assert result.returncode == 1
    assert b"Traceback" in result.stderr and b"of ours" in result.stderr
    assert MESSAGES in result.stderr


def test_an_explicit_log_level_turns_off_the_filter():
    show = f"print(os.environ['{console._LEVEL}'])"
    result = run(QUIETEN + WRITE + show, "0")
    assert result.stderr == NOTES + MESSAGES and result.stdout == b"0\n"


def test_importing_the_library_changes_no_streams_and_signals():
    result = run(
        "import signal\n"
        "before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT)\n"
        "import clsa_tf, export\n"
        "now = sys.stdout, sys.stderr, signal.getsignal(signal.SIGINT)\n"
        "print(before == now, 'TF_CPP_MIN_LOG_LEVEL' in os.environ)\n" + WRITE
    )
    assert result.stdout == b"True False\n"
    assert result.stderr == NOTES + MESSAGES


def test_replaced_and_closed_streams_are_kept():
    result = run(
        "import io; sys.stderr = notebook = io.StringIO()\n"
        + QUIETEN
        + "print(sys.stderr is notebook)"
    )
    assert result.stdout == b"True\n"
    closed = run(
        "sys.stderr = None\n"
        "from clsa_tf.terminal import console; console.begin(); print('here')"
    )
    assert closed.stdout == b"here\n"


def test_notes_of_libraries_are_left_out_and_warnings_are_not():
    result = run(
        "import logging\n"
        "from clsa_tf.terminal import console; console.begin()\n"
        "say = logging.getLogger('tensorflow').warning\n"
        "say('Callback method `x` is slow compared to the batch time')\n"
        "logging.getLogger('matplotlib.font_manager').warning('cache')\n"
        "say('something %s', 'else'); sys.exit(3)\n"
    )
    assert result.returncode == 3 and result.stderr == b"something else\n"


@pytest.mark.parametrize(
    "argv, started, expected",
    [
        (["-m", "--x"], ["python", "-m", "clsa_tf.train", "--x"], True),
        (["-m"], ["python", "-W", "error", "-m", "export.server"], True),
        (["-m"], ["python", "-m", "pytest", "-m", "slow"], False),
        (["-m"], ["python", "-um", "clsa_tf.train"], True),
        (["-m"], ["python", "-mclsa_tf.train"], True),
        (["-m"], ["python", "-um", "pytest", "clsa_tf.train"], False),
        (["-m"], None, True),  # Python 3.9
        (["/bin/clsa-train"], ["python", "/bin/clsa-train"], True),
        (["-c"], ["python", "-c", "import clsa_tf"], False),
        (["/home/me/train.py"], ["python", "train.py", "-m"], False),
        ([], [], False),
    ],
)
def test_commands_are_distinguished_from_programs(
    argv, started, expected, monkeypatch
):
    monkeypatch.setattr(sys, "argv", argv)
    if started is None:
        monkeypatch.delattr(sys, "orig_argv", raising=False)
    else:
        monkeypatch.setattr(sys, "orig_argv", started, raising=False)
    assert console.is_command() is expected


def test_a_closed_terminal_does_not_stop_a_command(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from clsa_tf.terminal import console; console.begin()\n"
            "print('ready'); sys.stdin.read()\n"
            "print('lost'); print('lost', file=sys.stderr)\n"
            f"open({str(tmp_path / 'saved')!r}, 'w').close()",
        ],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    assert b"ready" in os.read(ours, 100)
    os.close(ours)
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "saved").exists()
