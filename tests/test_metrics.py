import json

from clsa_tf import files
from clsa_tf.training import metrics_log


def test_lines_are_read_back_in_order(tmp_path):
    assert metrics_log.read(tmp_path) == []
    for step in (1, 2):
        metrics_log.append(tmp_path, {"step": step, "loss": 0.5})
    assert metrics_log.read(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
    ]


def test_rewind_drops_later_and_incomplete_lines(tmp_path):
    for step in (1, 2, 2, 3):
        metrics_log.append(tmp_path, {"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    metrics_log.rewind(tmp_path, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]


def test_atomic_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    files.write_atomically(str(path), "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
