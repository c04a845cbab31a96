"""Images in a folder are recognised by name or by content."""

import os
import socket

import pytest

from clsa_tf.data import converted
from clsa_tf.data.sources.listing import list_images

CONTENTS = {
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "png": b"\x89PNG\r\n\x1a\n",
    "gif": b"GIF89a",
    "bmp": b"BM\x9a\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0",
    "webp": b"RIFF\x24\0\0\0WEBPVP8 ",
    "tiff": b"II*\0\x08\0\0\0",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0",
    "avif": b"\0\0\0\x18ftypavif\0\0\0\0",
    "mp4": b"\0\0\0\x18ftypisom\0\0\0\0",
    "text": b"BMW is a brand, and this is no bitmap",
}


def write(folder, **files):
    """Writes files of these kinds; in names `_` is a dot and `0` a slash."""
    for name, kind in files.items():
        path = folder / name.replace("_", ".").replace("0", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENTS.get(kind, b""))


def test_images_are_recognised_by_name(tmp_path):
    write(tmp_path, a_jpg="", x0b_JPEG="", x0y0c_WebP="", d_tif="", e_AVIF="")
    write(tmp_path, _hidden_jpg="", _hidden0f_jpg="")
    found = list_images(str(tmp_path))
    assert found.images == [
        "a.jpg",
        "d.tif",
        "e.AVIF",
        "x/b.JPEG",
        "x/y/c.WebP",
    ]
    assert found.converted == {"d.tif", "e.AVIF", "x/y/c.WebP"}
    assert not found.left_out and not found.recognised
    assert found.notes("here") == []
    found = list_images(str(tmp_path), more_formats=False)
    assert found.images == ["a.jpg", "x/b.JPEG"] and not found.converted
    assert found.left_out == {".webp": 1, ".tif": 1, ".avif": 1}


def test_other_files_are_counted_by_kind(tmp_path):
    write(
        tmp_path, a_jpg="", b_txt="", x0c_TXT="", d_mp4="mp4", x0README="text"
    )
    write(tmp_path, e_psd="", f_quitelongsuffix="", Mr_0Smith="text")
    found = list_images(str(tmp_path))
    assert found.images == ["a.jpg"]
    (note,) = found.notes("/photos")
    assert note == (
        "left out of /photos: 7 files: 3 without extension that are not images"
        ", 2 .txt, 1 .mp4, 1 .psd"
    )


def test_many_kinds_are_summarised(tmp_path):
    (tmp_path / "a.jpg").touch()
    for n in range(20):
        (tmp_path / f"a.x{n:02d}").touch()
    text = list_images(str(tmp_path)).describe()
    assert text.startswith("20 files: 1 .x00, ")
    assert text.endswith("1 .x07, 12 of other kinds")


def test_images_are_recognised_by_content(tmp_path):
    kinds = [*CONTENTS]
    for kind in kinds:
        (tmp_path / kind).write_bytes(CONTENTS[kind])
        (tmp_path / f"{kind}.dat").write_bytes(CONTENTS[kind])
    found = list_images(str(tmp_path))
    bare = {"jpeg", "png", "gif", "bmp", "webp", "tiff", "heic", "avif"}
    # Raw files of cameras begin like TIFF files.
    named = {f"{kind}.dat" for kind in bare - {"tiff"}}
    assert set(found.images) == bare | named
    to_convert = {"webp", "heic", "avif", "webp.dat", "heic.dat", "avif.dat"}
    assert found.converted == to_convert | {"tiff"}
    assert found.recognised == {"without extension": 8, ".dat": 7}
    assert found.left_out == {
        "without extension that are not images": 2,
        ".dat": 3,
    }
    assert len(found.notes("here")) == 2
    plain = list_images(str(tmp_path / "."), more_formats=False)
    assert not plain.images and sum(plain.left_out.values()) == 20


def test_heic_files_need_pillow_heif(tmp_path, monkeypatch):
    write(tmp_path, a_jpg="", b_heic="heic", c_HEIF="heic", d="heic")
    monkeypatch.setattr(converted, "_with_heif", lambda: False)
    converted.missing.cache_clear()
    try:
        found = list_images(str(tmp_path))
    finally:
        converted.missing.cache_clear()
    assert found.images == ["a.jpg"] and not found.recognised
    assert "1 .heic (HEIC: needs pip install 'clsa_tf[heif]')" in (
        found.describe()
    )
    assert "3 files" in found.describe()


def test_pipes_sockets_and_devices_are_never_opened(tmp_path):
    write(tmp_path, a_jpg="")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null.png").symlink_to("/dev/zero")
    (tmp_path / "again.gif").symlink_to("pipe.jpg")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "s.jpg"))
        found = list_images(str(tmp_path))
    assert found.images == ["a.jpg"]
    assert found.describe() == (
        "5 files: 5 that are not files (pipes, sockets, devices)"
    )


def test_links_are_followed_without_cycles(tmp_path):
    write(tmp_path, x0a_jpg="")
    (tmp_path / "x" / "up").symlink_to("..")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "link.png").symlink_to("x/a.jpg")
    found = list_images(str(tmp_path))
    # Broken links stay in the list, as unreadable images.
    assert found.images == ["gone.jpg", "link.png", "self.jpg", "x/a.jpg"]
    assert found.left_out == {"without extension that are not images": 1}


@pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
def test_folders_that_cannot_be_opened_are_counted(tmp_path):
    write(tmp_path, a_jpg="", x0b_jpg="")
    (tmp_path / "x").chmod(0)
    try:
        found = list_images(str(tmp_path))
    finally:
        (tmp_path / "x").chmod(0o755)
    assert "1 folder that cannot be opened" in found.describe()
