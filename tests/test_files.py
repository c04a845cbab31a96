import os
import stat

import pytest

from clsa_tf import files


def test_a_draft_directory_is_always_removed(tmp_path):
    with files.draft_directory(tmp_path) as draft:
        name = os.path.relpath(draft, tmp_path)
        assert os.sep not in name and name.startswith(".draft-")
        assert stat.S_IMODE(os.stat(draft).st_mode) == 0o700
        for kept in ("file", "folder"):
            os.makedirs(os.path.join(draft, kept))
        os.rename(os.path.join(draft, "file"), tmp_path / "kept")
    assert os.listdir(tmp_path) == ["kept"]
    with pytest.raises(KeyboardInterrupt):
        with files.draft_directory(tmp_path) as draft:
            (tmp_path / draft / "half").touch()
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["kept"]
    # The block may rename the directory itself.
    with files.draft_directory(tmp_path) as draft:
        os.rename(draft, tmp_path / "1")
    assert sorted(os.listdir(tmp_path)) == ["1", "kept"]


def test_a_draft_directory_needs_a_parent(tmp_path):
    with pytest.raises(FileNotFoundError):
        with files.draft_directory(tmp_path / "none"):
            pass
