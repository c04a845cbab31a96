"""The commands of the README, on a small folder."""

import contextlib
import json
import signal

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf.training import metrics_log
from clsa_tf.training.checkpoint import list_checkpoints
from tests.marks import slow_but
from tests.photos import write_folder
from tests.runs import (
    assert_only_a_bar,
    call,
    command,
    final_state,
    leave_out_pictures,
    lines,
    start,
    train,
    wait_until,
)
from tests.service import Service


def test_training_prints_logs_and_saves(finished):
    workdir, result = finished
    assert "clsa: resnet18 on" in result.stdout
    # 60 photographs, a tenth held out, in batches of 16: 3 steps an epoch.
    entries = metrics_log.read(workdir)
    assert [e["step"] for e in entries if "loss" in e] == [2, 4, 6, 8, 9]
    assert [e["epoch"] for e in entries if "knn" in e] == [1, 2, 3]
    for name in ("ddm", "ddm_kl", "contrast_accuracy", "lr"):
        assert all(np.isfinite(e[name]) for e in entries if "loss" in e)
    assert "kNN=" in result.stderr  # in the progress bar
    assert (workdir / "views.png").stat().st_size > 1000
    assert list((workdir / "tensorboard").glob("events*"))
    assert len(list_checkpoints(str(workdir / "checkpoints"))) == 3


def test_no_output_of_libraries_is_printed(finished):
    workdir, result = finished
    first, *more, _, report, export = result.stdout.splitlines()
    assert first.startswith("clsa: ") and "-m clsa_tf.report" in report
    assert "-m export.savedmodel" in export and str(workdir) in export
    assert any("contrast" in line and "chance level" in line for line in more)
    # Two lines about preparations, then the bar, which overwrites itself.
    drawn, compiled, *bar = result.stderr.splitlines()
    assert drawn == "drawing views.png …" and compiled.startswith("compiling")
    assert_only_a_bar("\n".join(bar))


@pytest.mark.slow
def test_run_flags_repeat_the_run(finished, tmp_path):
    again = tmp_path / "again"
    leave_out_pictures(again)
    call(
        command(
            "clsa_tf.train",
            f"--flagfile={finished[0]}/run.flags",
            f"--workdir={again}",
        )
    )
    assert lines(again) == lines(finished[0])


@pytest.mark.slow
def test_data_services_do_not_change_a_run(photos, finished, tmp_path):
    with Service() as service:
        workdir = tmp_path / "run"
        flags = ["--checkpoint_steps=1", f"--data_service={service.address}"]
        call(train(photos, workdir, *flags))
        assert lines(workdir) == lines(finished[0])
        # The same command again, after the service has ended.
        assert service.end() == 0
    error = call(train(photos, workdir, *flags), status=1).stderr
    assert f"Expected a tf.data service at {service.address}" in error
    assert "Traceback" not in error


def test_export_and_report_print_their_results(photos, finished):
    workdir, _ = finished
    output = workdir / "savedmodel"
    exported = call(
        command(
            "export.savedmodel", f"--workdir={workdir}", f"--output={output}"
        )
    )
    assert exported.stdout.startswith(f"exported and verified: {output}/1\n")
    assert "--bad_images=nan" in exported.stdout
    assert f"export.server --model_name=encoder --model_base_path={output}" in (
        exported.stdout
    )
    assert f"--encoder={output}/1" in exported.stdout
    # Progress only.
    assert len(exported.stderr.splitlines()) == 1
    assert exported.stderr.startswith("exporting ")
    assert f"--images={photos} --output=embeddings.npz" in exported.stdout
    assert "-m export.client --server=localhost:8500 --model=encoder" in (
        exported.stdout
    )
    result = call(command("clsa_tf.report", f"--workdir={workdir}"))
    printed = result.stdout
    assert printed.startswith("  kNN accuracy, pixels ")
    assert result.stderr.splitlines() == [
        "loading the encoder …",
        "encoding images, for the neighbours of each …",
        "kNN accuracy of raw pixels …",
        "kNN accuracy of the untrained encoder …",
    ]
    assert "Using" not in printed  # a library's backend
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["savedmodel"] == f"{output}/1"
    assert summary["train_seconds"] > 0
    knn = [e["knn"] for e in metrics_log.read(workdir) if "knn" in e]
    assert summary["knn_trained"] == pytest.approx(knn[-1])
    # Pixels distinguish bright and dark photographs.
    assert summary["knn_pixels"] == 1.0
    assert 0 <= summary["knn_untrained"] <= 1
    for path in summary["pictures"]:
        assert path in printed
        assert tf.io.decode_png(tf.io.read_file(path)).shape[1] > 100


@pytest.mark.slow
def test_a_folder_without_labels_is_trained_on_and_reported(tmp_path):
    photos = write_folder(tmp_path / "photos", classes=("",), each=40)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 not a photograph")
    workdir = tmp_path / "run"
    result = call(train(photos, workdir, "--total_epochs=1"))
    assert "no kNN accuracy" in result.stdout
    assert "broken.jpg" in result.stderr
    assert "1 unreadable image was left out" in result.stdout
    names = (workdir / "unreadable.txt").read_text().splitlines()
    (line,) = names
    assert line.startswith(f"{photos / 'broken.jpg'}\tis ")
    call(command("clsa_tf.report", f"--workdir={workdir}"))
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["knn_trained"] is None and summary["savedmodel"] is None


@pytest.mark.slow
def test_other_flags_in_the_same_workdir_are_rejected(photos, finished):
    before = final_state(finished[0])[0]
    arguments = train(
        photos, finished[0], "--checkpoint_steps=1", "--temperature=0.3"
    )
    error = call(arguments, status=1).stderr
    assert "error: Expected the flags that" in error
    assert "--temperature=0.3 instead of 0.2" in error
    assert "Traceback" not in error
    assert final_state(finished[0])[0] == before


@pytest.mark.parametrize(
    "flag, words",
    slow_but(
        1,
        [
            ("--batchsize=3", ["--batchsize;", "did you mean --batch_size"]),
            ("--batch_size=x", ["batch_size", "whole number", "'x'"]),
            ("--method=simsiam", ["method", "clsa, looc, moco", "simsiam"]),
            ("folder", ["Expected only flags", "'folder'"]),
            ("--flagfile=configs/no.flags", ["configs/no.flags"]),
        ],
    ),
)
def test_wrong_flags_are_reported_without_a_traceback(flag, words):
    error = call(command("clsa_tf.train", flag), status=1).stderr
    for word in words:
        assert word in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    "restarted, status, words",
    [
        (False, 138, "silent for 30 s"),
        (True, 1, "--data_service: Failed to get tasks: Unknown iteration"),
    ],
)
def test_training_ends_when_its_service_dies(
    photos, tmp_path, restarted, status, words
):
    """It does not wait for ever, and its iterators are deleted."""
    with Service() as service, open(tmp_path / "log", "w+") as log:
        process = start(
            train(
                photos,
                tmp_path / "run",
                "--total_epochs=100000",
                "--log_steps=1",
                "--knn_epochs=0",
                f"--data_service={service.address}",
            ),
            log,
        )
        try:
            assert wait_until(
                lambda: len(metrics_log.read(tmp_path / "run")) >= 50,
                process,
                pause=0.1,
            )
            assert service.end(signal.SIGKILL) == -signal.SIGKILL
            with contextlib.ExitStack() as stack:
                if restarted:
                    port = service.address.split(":")[-1]
                    stack.enter_context(Service(f"--port={port}"))
                assert process.wait(120) == status
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        error = log.read()
    assert words in error and "Traceback" not in error
