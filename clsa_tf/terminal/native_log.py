"""Copies lines to standard error without harmless messages of TensorFlow.

`clsa_tf.terminal.console` starts this file as a separate process at the other
end of a pipe, so that the last output of a crashing process is not lost. It
needs the standard library only.

It drops

* whole lines in the form of a log message of severity INFO or WARNING,
* the errors listed here: errors that every successful start logs, and errors of
  image decoders, which commands report in more detail themselves,
* empty lines.

Everything else passes unchanged: other errors, fatal errors, messages of
`assert` and of the operating system, reports of sanitizers.
"""

import contextlib
import os
import re
import select

# Without an NVIDIA driver this is not an error.
_NO_GPU = (
    rb"" if os.path.exists("/dev/nvidiactl") else rb"|failed call to cuInit"
)

_NOTE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called"
    # libjpeg, once per attempt to decode.
    rb"|Improper call to JPEG library in state \d+$"
    # 2026-11-28 18:35:39.602838: I external/local_tsl/tsl/cuda/x.cc:31] …
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IW] [\w./-]+:\d+\] "
    # I0000 00:00:1795891145.393970    8047 cudart_stub.cc:31] …
    rb"|[IW]\d{4} \d\d:\d\d:\d+\.\d+ +\d+ [\w./-]+:\d+\] "
    rb"|(\d{4}-\d\d-\d\d \S+ E|E\d{4} \S+ +\d+) ("
    # Decoders, once per attempt and without a name. Commands name each image.
    rb"([\w./-]*/)?(jpeg_mem|jpeg_handle|png_io|gif_io)\.cc:\d+\] "
    rb"|[\w./-]+:\d+\] (Unable to register cu\w+ (factory|plugin)"
    # TensorFlow 2.21, on processors without AVX-512.
    rb"|oneDNN supports DT_\w+ only on platforms with "
    rb"|SetPriority unimplemented for this stream" + _NO_GPU + rb"))"
    # TFLite, about the options that it got.
    rb"|INFO: Created TensorFlow Lite \w+ delegate for CPU\."
    rb"|fully_quantize: \d, inference_type: \d+, input_inference_type: \w+, "
    # A table of TFLite's converter about operations that need no conversion.
    # It contains empty lines; all empty lines are dropped.
    rb"|$"
    rb"|Summary on the non-converted ops:$|-{33}$"
    rb"| \* (Accepted dialects: |Non-Converted Ops: \d|\d+ [A-Z]+ ops$)"
    rb"|- [a-z]+\.\w+: +\d+ occurrences  \(|  \((\w+: \d+(, )?)+\)$"
)
# Seconds to wait for the rest of a line.
_PATIENCE = 0.2


def is_note(line):
    """Whether to drop a line, given as bytes."""
    return _NOTE.match(line) is not None


def copy(source, target):
    """Copies from one file descriptor to another until the first one closes."""
    waiting = b""  # an incomplete line
    while True:
        ready, _, _ = select.select(
            [source], [], [], _PATIENCE if waiting else None
        )
        if not ready:
            _write(target, waiting)
            waiting = b""
            continue
        received = os.read(source, 1 << 16)
        *lines, waiting = (waiting + received).split(b"\n")
        for line in lines:
            if not is_note(line):
                _write(target, line + b"\n")
        if not received:
            if not is_note(waiting):
                _write(target, waiting)
            return


def _write(target, data):
    # A closed terminal must not stop the process that writes to this one.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(target, data) :]


if __name__ == "__main__":
    copy(0, 2)
