"""Copies lines to standard error, without the notes of TensorFlow's C++ code.

`clsa_tf.terminal.console` starts this file as a process of its own, at the
other end of a pipe, so that what a dying process still writes is not lost with
it. It needs the standard library only.

Only whole lines in the form of a log message of severity INFO or WARNING are
left out, and the errors listed here: those that come with every start that goes
well, and those of decoders, of which a command says more itself; and lines
with nothing in them. Everything else passes unchanged: errors, fatal errors,
messages of `assert` and of the operating system, reports of sanitizers.
"""

import contextlib
import os
import re
import select

# Without a driver of NVIDIA this is no error.
_NO_GPU = (
    rb"" if os.path.exists("/dev/nvidiactl") else rb"|failed call to cuInit"
)

_NOTE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called"
    # 2026-11-28 18:35:39.602838: I external/local_tsl/tsl/cuda/x.cc:31] …
    # Of libjpeg, which comes once per attempt as well.
    rb"|Improper call to JPEG library in state \d+$"
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+: [IW] [\w./-]+:\d+\] "
    # I0000 00:00:1795891145.393970    8047 cudart_stub.cc:31] …
    rb"|[IW]\d{4} \d\d:\d\d:\d+\.\d+ +\d+ [\w./-]+:\d+\] "
    rb"|(\d{4}-\d\d-\d\d \S+ E|E\d{4} \S+ +\d+) ("
    # Of images, which come once per attempt, without a name. We name each.
    rb"([\w./-]*/)?(jpeg_mem|jpeg_handle|png_io|gif_io)\.cc:\d+\] "
    rb"|[\w./-]+:\d+\] (Unable to register cu\w+ (factory|plugin)"
    # TensorFlow 2.21, on processors without AVX-512.
    rb"|oneDNN supports DT_\w+ only on platforms with "
    rb"|SetPriority unimplemented for this stream" + _NO_GPU + rb"))"
    # TFLite, of what it was asked for.
    rb"|INFO: Created TensorFlow Lite \w+ delegate for CPU\."
    rb"|fully_quantize: \d, inference_type: \d+, input_inference_type: \w+, "
    # A table that its converter prints of what it need not convert, with empty
    # lines in it; these are left out wherever they are.
    rb"|$"
    rb"|Summary on the non-converted ops:$|-{33}$"
    rb"| \* (Accepted dialects: |Non-Converted Ops: \d|\d+ [A-Z]+ ops$)"
    rb"|- [a-z]+\.\w+: +\d+ occurrences  \(|  \((\w+: \d+(, )?)+\)$"
)
# For so long the rest of a line is waited for, in seconds.
_PATIENCE = 0.2


def is_note(line):
    """Whether a line, bytes, is to be left out."""
    return _NOTE.match(line) is not None


def copy(source, target):
    """Copies from one file descriptor to another until the first one ends."""
    waiting = b""  # a line without its end
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
    # A terminal that is gone must not stop those who write to this process.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(target, data) :]


if __name__ == "__main__":
    copy(0, 2)
