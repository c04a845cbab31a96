"""Warnings about unfinished runs and poor encoders."""

import json

import pytest

from clsa_tf import config as config_lib
from clsa_tf import report
from clsa_tf.training import metrics_log, outcome
from clsa_tf.training.checkpoint import Trained
from export import formats, savedmodel
from export.embedding import encoders
from export.model import card
from tests import exports


def trained(workdir, *, step=12, spreads=(0.02, 0.6, 0.7), images=35, **flags):
    """Makes a run of 6 epochs with 2 steps each, and its log."""
    config = config_lib.default(batch_size=16, total_epochs=6, **flags)
    (workdir / "dataset.json").write_text(json.dumps({"images": images}))
    for i, spread in enumerate(spreads, 1):
        entry = {"step": 4 * i, "epoch": 2.0 * i, "spread": spread}
        metrics_log.append(
            str(workdir), entry | {"rank": 9.0, "uniformity": -1.0}
        )
    return Trained(config, None, step, 60.0)


def test_a_good_run_has_no_warnings(tmp_path):
    found = outcome.of(str(tmp_path), trained(tmp_path))
    assert found["steps"] == found["total_steps"] == 12 and found["finished"]
    assert found["embeddings"]["good"]
    assert found["embeddings"]["spread"] == 0.7
    assert outcome.warnings(found) == []


@pytest.mark.parametrize(
    "spreads, short",
    [
        ((0.6, 0.7, 0.02), "collapsed"),
        ((0.02,) * 3, "projections not spread out"),
    ],
)
def test_a_collapse_causes_a_warning(tmp_path, spreads, short):
    found = outcome.of(str(tmp_path), trained(tmp_path, spreads=spreads))
    ((words, sentence),) = outcome.warnings(found)
    assert short in words
    for figure in ("spread 0.020", "rank 9.0", "step 12"):
        assert figure in sentence
    assert json.loads(json.dumps(found)) == found


def test_an_unfinished_run_is_judged_at_its_checkpoint(
    tmp_path,
):
    # It collapsed later, which does not concern this checkpoint.
    run = trained(tmp_path, step=8, spreads=(0.6, 0.7, 0.02))
    found = outcome.of(str(tmp_path), run)
    assert found["embeddings"]["step"] == 8
    ((short, sentence),) = outcome.warnings(found)
    assert "8 of 12 steps" in short and "8 of 12 steps" in sentence


def test_a_run_without_a_log_has_no_warnings(tmp_path):
    config = config_lib.default()
    found = outcome.of(str(tmp_path), Trained(config, None, 3, 1.0))
    assert found["total_steps"] is found["finished"] is None
    assert found["embeddings"] is None and outcome.warnings(found) == []


@pytest.fixture(scope="module")
def poor(tmp_path_factory):
    """The export of an unfinished run with a poor encoder."""
    workdir = tmp_path_factory.mktemp("run")
    trained(workdir, spreads=())
    entry = {"step": 2, "epoch": 1.0, "spread": 0.02, "rank": 1.4}
    metrics_log.append(str(workdir), entry | {"uniformity": -0.1})
    change = {"step": 1, "flag": "total_epochs", "before": "5", "now": "200"}
    (workdir / "changes.jsonl").write_text(json.dumps(change) + "\n")
    return exports.make(workdir)


@pytest.mark.slow
def test_export_and_card_of_a_poor_run_have_warnings(poor, capsys):
    path = poor.path
    savedmodel.show(path)
    last = capsys.readouterr().out.strip().splitlines()
    assert "verified" not in last[-1] and last[-1].endswith(path)
    assert "2 of 400 steps" in last[-1] and "spread" in last[-1]
    with open(f"{path}/model_card.json", encoding="utf-8") as file:
        described = json.load(file)
    assert described["steps"] == 2 and described["total_steps"] == 400
    assert described["finished"] is False
    assert described["embeddings"]["good"] is False
    assert described["embeddings"]["spread"] == 0.02
    with open(f"{path}/{card.TEXT}", encoding="utf-8") as file:
        text = file.read()
    assert text.count("> **Warning:**") == 2
    assert "spread 0.020 of 1" in text and "| steps | 2 of 400 |" in text
    assert "--total_epochs=200 instead of 5" in text


@pytest.mark.slow
def test_other_formats_and_embeddings_of_a_poor_run_have_warnings(
    poor, capsys, tmp_path
):
    formats.export(str(poor.workdir), str(tmp_path), formats=["weights"])
    encoders.CheckpointEncoder(str(poor.workdir), ["embedding"])
    printed = capsys.readouterr().out
    assert printed.count("warning: the run is not finished (2 of 400 st") == 2
    assert printed.count("the encoder hardly distinguishes images") == 2


def test_a_good_export_is_called_verified(exported, capsys):
    savedmodel.show(exported.path)
    assert (
        capsys.readouterr().out == f"exported and verified: {exported.path}\n"
    )


def test_the_report_of_a_poor_run_has_warnings(tmp_path, capsys):
    summary = {f"knn_{x}": None for x in ("pixels", "untrained", "trained")}
    summary |= {"no_knn_because": None, "train_seconds": 60.0}
    summary |= {"savedmodel": None, "pictures": []}
    run = trained(tmp_path, step=8, spreads=(0.6, 0.02))
    report.show(summary | outcome.of(str(tmp_path), run))
    printed = capsys.readouterr().out
    assert "8 of 12 steps" in printed and "spread 0.020" in printed
