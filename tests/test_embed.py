import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from clsa_tf.data import converted, decode, headers
from clsa_tf.errors import UserError
from clsa_tf.files import newest_savedmodel
from export import embed
from export.embedding import embeddings, encoders
from export.embedding.ordered_map import ordered_map
from export.embedding.parts import Parts
from export.embedding.photographs import prepare
from export.embedding.rejected import ModelError, embed_each, read_image
from tests import exports
from tests.runs import (
    assert_only_a_bar,
    call,
    command,
    environment,
    start,
    wait_until,
)
from tests.server import ServerProcess

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="root mounts a disk")
FORMATS = (".npz", ".parquet", ".tfrecord")
GOOD, BAD = 40, 3
# Small parts, which do not always end with a batch.
SIZES = ("--batch_size=3", "--shard_size=5")
LENIENT = "--max_bad_share=0.1"
STRANGE = [b"not utf-8 \xff.jpg", b"line\nbreak.jpg", "für.jpg".encode()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs large enough to interrupt a process that embeds them."""
    root = tmp_path_factory.mktemp("folder")
    names = [os.fsencode(f"{i % 3}/{i:02d}.jpg") for i in range(GOOD)]
    names[-len(STRANGE) :] = STRANGE
    for i, name in enumerate(names):
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        image = Image.fromarray(exports.noise(1, 6, seed=i)[0])
        image = image.resize((1500, 1200), Image.BICUBIC)
        with open(path, "wb") as file:
            file.write(exports.encode(image, "JPEG"))
    (root / "1" / "empty.png").touch()
    (root / "1" / "text.jpg").write_text("not an image")
    (root / "gone.jpg").symlink_to("nowhere")
    (root / "notes.txt").write_text("of no interest")
    return root


def arguments(encoder, folder, output, *more):
    return command(
        "export.embed",
        f"--encoder={encoder}",
        f"--images={folder}",
        f"--output={output}",
        LENIENT,
        *SIZES,
        *more,
    )


@pytest.fixture(scope="module")
def straight(exported, folder, tmp_path_factory):
    """The file and the output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("straight") / "e.npz"
    result = call(arguments(exported.base, folder, output))
    return output, result


def error_of(result):
    """Returns the only error line of a command that failed."""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    return sentence


def counts(result):
    """Returns the printed counts of images: all, embedded before, bad."""
    (line,) = [x for x in result.stdout.splitlines() if " images/s" in x]
    return tuple(map(int, re.findall(r"\d+", line)[:3]))


def unreadable(output):
    """Returns the listed names and reasons."""
    with open(f"{output}.unreadable.txt", errors="surrogateescape") as file:
        return dict(line.rstrip("\n").split("\t") for line in file)


def parts_of(output):
    try:
        names = os.listdir(f"{output}.parts")
    except FileNotFoundError:
        return []
    return [name for name in names if name.endswith(".npz")]


# ---- Results


def test_rows_equal_the_outputs_of_the_encoder(exported, folder, straight):
    output, result = straight
    with np.load(output, allow_pickle=False) as data:
        assert set(data) == {"files", "embedding", "projection"}
        files, rows = data["files"].tolist(), dict(data)
    assert len(files) == GOOD and files == sorted(files)
    assert set(STRANGE) <= set(map(os.fsencode, files))
    paths = [os.path.join(folder, file) for file in files]
    function = tf.saved_model.load(exported.path).signatures["serving_default"]
    images = tf.constant([read_image(path) for path in paths])
    for name, value in function(images).items():
        assert rows[name].dtype == np.float32
        np.testing.assert_allclose(rows[name], value, rtol=1e-4, atol=1e-5)
    *_, good, listed = result.stdout.splitlines()
    assert f" {GOOD} " in good and good.endswith(f" {output}")
    assert listed.endswith(f" {output}.unreadable.txt")
    assert counts(result) == (GOOD + BAD, 0, BAD)
    assert_only_a_bar(result.stderr)


def test_bad_images_are_listed(straight):
    output, _ = straight
    found = unreadable(output)
    assert set(found) == {"1/empty.png", "1/text.jpg", "gone.jpg"}
    assert found["gone.jpg"] == "No such file or directory"
    reasons = headers.reasons(headers.DEFAULT)
    assert found["1/text.jpg"] == reasons[headers.UNKNOWN]
    assert found["1/empty.png"] == reasons[headers.EMPTY]
    assert sorted(os.listdir(output.parent)) == [
        "e.npz",
        "e.npz.unreadable.txt",
    ]


def read_back(path):
    """Returns (names as bytes, outputs), read as documented."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            rows = dict(data)
        return list(map(os.fsencode, rows.pop("files").tolist())), rows
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        rows = {
            name: np.stack(table[name].to_numpy())
            for name in table.column_names
            if name != "file"
        }
        return list(map(os.fsencode, table["file"].to_pylist())), rows
    form = {
        "file": tf.io.FixedLenFeature([], tf.string),
        "embedding": tf.io.FixedLenFeature([4], tf.float32),
        "projection": tf.io.FixedLenFeature([2], tf.float32),
    }
    records = tf.data.TFRecordDataset(str(path)).map(
        lambda record: tf.io.parse_single_example(record, form)
    )
    rows = list(records.as_numpy_iterator())
    columns = {name: np.stack([row[name] for row in rows]) for name in form}
    return columns.pop("file").tolist(), columns


@pytest.mark.parametrize("strange", [False, True])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_keeps_names_and_rows(suffix, strange, tmp_path):
    names = [b"%d.jpg" % i for i in range(7)] + [STRANGE[2]]
    names += STRANGE if strange else []
    rng = np.random.default_rng(0)
    widths = {"embedding": 4, "projection": 2}
    whole = {
        name: rng.normal(size=[len(names), width]).astype(np.float32)
        for name, width in widths.items()
    }

    def blocks(wanted):
        for i, j in ((0, 3), (3, 4), (4, len(names))):
            yield {name: whole[name][i:j] for name in wanted}

    path = tmp_path / f"e{suffix}"
    files = list(map(os.fsdecode, names))
    embeddings.write(str(path), files, widths, blocks)
    found, rows = read_back(path)
    assert found == names and os.listdir(tmp_path) == [path.name]
    assert rows.keys() == widths.keys()
    for name in widths:
        assert rows[name].dtype == np.float32
        np.testing.assert_array_equal(rows[name], whole[name])


def test_joining_needs_little_memory(tmp_path):
    rows, width = 256, 2**12  # 4 MiB
    code = f"""
import resource, numpy as np
from export.embedding import embeddings
block = np.ones([{rows}, {width}], np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = list(map(str, range(64 * {rows})))
embeddings.write("e.npz", files, {{"embedding": {width}}},
                 lambda names: ({{"embedding": block}} for _ in range(64)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment()
        | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "e.npz").stat().st_size > 256 * 2**20
    assert int(result.stdout) < 64 * 2**10  # KiB
    data = np.load(tmp_path / "e.npz")["embedding"]
    assert data.shape == (64 * rows, width) and data.min() == 1


# ---- Kills, signals and resuming


@pytest.mark.slow
@pytest.mark.parametrize(
    "ends",
    [
        (signal.SIGKILL, signal.SIGTERM),
        pytest.param(
            (signal.SIGINT, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_exactly(
    ends, exported, folder, straight, tmp_path
):
    output = tmp_path / "e.npz"
    log = tmp_path / "log"
    for number in ends:
        before = len(parts_of(output))
        with open(log, "w") as file:
            process = start(arguments(exported.base, folder, output), file)
        assert wait_until(
            lambda n=before: len(parts_of(output)) > n, process, pause=0.001
        )
        process.send_signal(number)
        status = process.wait(60)
        assert not output.exists()
        if number == signal.SIGKILL:
            assert status == -9
        else:
            assert status == 128 + number
            assert f"--output={output}" in log.read_text()  # to resume
            assert "Traceback" not in log.read_text()
    result = call(arguments(exported.base, folder, output))
    assert counts(result)[1] > 0
    assert output.read_bytes() == straight[0].read_bytes()
    assert unreadable(output) == unreadable(straight[0])
    assert not os.path.exists(f"{output}.parts")


@pytest.mark.slow
def test_too_many_bad_images_and_other_settings_are_errors(
    exported, folder, straight, tmp_path
):
    output = tmp_path / "e.npz"
    command = arguments(exported.path, folder, output)
    strict = error_of(call([*command, "--max_bad_share=0.01"], status=1))
    assert " 0.01 " in strict and f" {BAD} of {GOOD + BAD}" in strict
    assert unreadable(output) == unreadable(straight[0])
    assert not output.exists()
    other = error_of(call([*command, "--outputs=embedding"], status=1))
    assert "outputs" in other and f"{output}.parts" in other
    # Nothing is computed again, even with another batch size.
    result = call([*command, "--batch_size=4"])
    assert counts(result)[1] == GOOD + BAD
    assert output.read_bytes() == straight[0].read_bytes()


def test_batches_after_a_restart_are_the_same():
    undisturbed = list(embed.batches(0, 23, 3, 7))
    assert undisturbed[:4] == [(0, 3), (3, 6), (6, 7), (7, 10)]
    assert undisturbed[-1] == (21, 23)
    for number, (first, _) in enumerate(undisturbed):
        assert list(embed.batches(first, 23, 3, 7)) == undisturbed[number:]
    assert list(embed.batches(23, 23, 3, 7)) == []


MANIFEST = {"encoder": "a", "images": "b", "outputs": {"e": 2}}


def filled_parts(path):
    parts = Parts(str(path), MANIFEST, {"e": 2})
    for i in range(0, 6, 2):
        rows = np.full([1, 2], i, np.float32)
        parts.add(i, i + 2, {"e": rows}, {1: f"bad {i + 1}"})
        parts.save()
    return parts


def test_parts_resume_after_the_last_whole_one(tmp_path):
    path = tmp_path / "parts"
    parts = filled_parts(path)
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        Parts(str(path), MANIFEST, {"e": 2})
    parts.close()
    first, second, _ = sorted(path.glob("*.npz"))
    second.write_bytes(second.read_bytes()[:100])
    (path / "part-x.npz.draft").touch()
    again = Parts(str(path), MANIFEST, {"e": 2})
    # Parts after a damaged one cannot be used.
    assert again.done == 2 and list(path.glob("*.npz")) == [first]
    assert not list(path.glob("*.draft"))
    assert again.rows() == [0] and again.bad() == {1: "bad 1"}
    again.add(2, 4, {}, {0: "x", 1: "y"})
    again.save()
    again.save()  # there is nothing new
    assert again.done == 4 and again.bad() == {1: "bad 1", 2: "x", 3: "y"}
    (block,) = again.blocks(["e"])
    np.testing.assert_array_equal(block["e"], [[0, 0]])


@pytest.mark.parametrize("word", MANIFEST)
def test_parts_of_other_settings_are_rejected(word, tmp_path):
    path = str(tmp_path / "parts")
    filled_parts(path).close()
    with pytest.raises(UserError, match=f"{word}.*{path}.*other"):
        Parts(path, MANIFEST | {word: "other"}, {"e": 2})
    with open(f"{path}/manifest.json", "w") as file:
        file.write("[1]")
    with pytest.raises(UserError, match=f"{path}/manifest.json"):
        Parts(path, MANIFEST, {"e": 2})


# ---- Servers


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol", ["grpc", pytest.param("http", marks=pytest.mark.slow)]
)
def test_a_run_resumes_after_its_server_died(
    protocol, exported, folder, straight, tmp_path
):
    output = tmp_path / "e.npz"
    base = f"--model_base_path={exported.base}"
    with ServerProcess(base) as server:
        ports = (
            f"--port={server.grpc.rpartition(':')[2]}",
            f"--rest_api_port={server.rest.rpartition(':')[2]}",
        )
        address = {
            "grpc": f"grpc://{server.grpc}/default",
            "http": f"{server.rest}/v1/models/default",
        }[protocol]
        command = arguments(address, folder, output, "--attempts=3")
        process = subprocess.Popen(
            [*command, "--concurrency=2"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert wait_until(lambda: parts_of(output), process, pause=0.001)
        server.send(signal.SIGKILL)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in printed
    place = server.grpc if protocol == "grpc" else server.rest
    assert "UNAVAILABLE" in printed and place in printed
    assert parts_of(output) and not output.exists()
    with ServerProcess(base, *ports):
        result = call(command)
    assert counts(result)[1] > 0
    with np.load(output) as mine, np.load(straight[0]) as others:
        np.testing.assert_array_equal(mine["files"], others["files"])
        for name in ("embedding", "projection"):
            np.testing.assert_allclose(
                mine[name], others[name], rtol=1e-4, atol=1e-5
            )
    assert unreadable(output).keys() == unreadable(straight[0]).keys()


# ---- Encoders


def open_encoder(name, outputs=("embedding",), **options):
    options = dict(batch_size=4, timeout=5.0, attempts=1) | options
    return encoders.open_encoder(str(name), outputs=outputs, **options)


class Lengths(tf.Module):
    """A model that returns the lengths of images; 0 bytes are invalid."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def lengths(self, image_bytes):
        length = tf.cast(tf.strings.length(image_bytes), tf.float32)
        return {
            "embedding": tf.stack([length, -length], axis=1),
            "valid": length > 0,
        }


def write_lengths(path, signature="serving_default"):
    model = Lengths()
    tf.saved_model.save(
        model, str(path), {signature: model.lengths.get_concrete_function()}
    )
    return path


def test_the_output_valid_marks_bad_images(tmp_path):
    encoder = open_encoder(write_lengths(tmp_path / "1"))
    assert encoder.widths == {"embedding": 2}
    rows, bad = embed_each(encoder, [b"a", b"", b"abc"])
    assert list(bad) == [1]
    np.testing.assert_array_equal(rows["embedding"], [[1, -1], [3, -3]])


def test_a_bad_image_is_a_model_error(exported):
    encoder = open_encoder(exported.base)
    with pytest.raises(ModelError, match="INVALID_ARGUMENT") as e:
        encoder([exports.encode(exports.noise(1)[0]), b"x"])
    assert e.value.rejected


def test_the_newest_complete_version_is_used(tmp_path):
    for version in ("9", "10", "11", "draft"):
        (tmp_path / version).mkdir()
    for version in ("9", "10", "draft"):
        (tmp_path / version / "saved_model.pb").touch()
    newest = str(tmp_path / "10")
    assert newest_savedmodel(str(tmp_path)) == newest
    assert newest_savedmodel(newest) == newest


def test_fingerprints_depend_on_card_and_files(exported, tmp_path):
    whole = encoders.fingerprint(exported.path)
    copy = tmp_path / "1"
    shutil.copytree(exported.path, copy)
    assert encoders.fingerprint(str(copy)) == whole
    card = json.loads((copy / "model_card.json").read_text())
    for key in ("fingerprint", "image_size", "keep"):
        changed = card | {key: "other"}
        (copy / "model_card.json").write_text(json.dumps(changed))
        assert encoders.fingerprint(str(copy)) != whole
    (copy / "model_card.json").unlink()
    of_files = encoders.fingerprint(str(copy))
    data = next((copy / "variables").glob("*.data*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert whole != of_files != encoders.fingerprint(str(copy))


def test_a_run_and_its_export_give_equal_rows(exported):
    images = [exports.encode(x) for x in exports.noise(3)]
    run, model = open_encoder(exported.workdir), open_encoder(exported.path)
    assert run.identity == model.identity and run.widths == model.widths
    found, expected = run(images), model(images)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="INVALID_ARGUMENT.*image 1"):
        run([images[0], b"x"])
    with pytest.raises(UserError, match="image_bytes.*nothing_such"):
        open_encoder(exported.workdir, ["nothing_such"])


def test_certificates_are_rejected_for_local_models(tmp_path):
    model = write_lengths(tmp_path / "model")
    assert open_encoder(model).widths
    with pytest.raises(UserError, match="--ca_certificates=ca.pem.*/model'"):
        open_encoder(model, certificates="ca.pem")
    with pytest.raises(UserError, match="TLS.*ca.pem"):
        open_encoder("grpc://localhost:1/m", certificates="ca.pem")


def test_invalid_encoders_are_rejected(exported, tmp_path):
    with pytest.raises(UserError, match="/no_such'.*--encoder"):
        open_encoder(tmp_path / "no_such")
    with pytest.raises(UserError, match="grpc://host:8500/MODEL"):
        open_encoder("host:8500")
    with pytest.raises(UserError, match="grpc://10.0.0.1:1/m "):
        open_encoder("10.0.0.1:1/m")
    with pytest.raises(UserError, match="image_bytes.*nothing_such"):
        open_encoder(exported.base, ["nothing_such"])
    broken = tmp_path / "broken"
    shutil.copytree(exported.path, broken)
    shutil.rmtree(broken / "variables")
    with pytest.raises(UserError, match=str(broken)):
        open_encoder(broken)
    with pytest.raises(UserError, match="serving_default"):
        open_encoder(write_lengths(tmp_path / "other", "else"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ModelError, match="UNAVAILABLE"):
            open_encoder(f"grpc://127.0.0.1:{silent.getsockname()[1]}/m")


# ---- Files and threads


def test_folders_without_images_are_rejected(tmp_path):
    (tmp_path / "notes.txt").touch()

    def error(path):
        with pytest.raises(UserError) as error:
            embed.images(str(path), more_formats=True)
        return str(error.value)

    assert str(tmp_path) in error(tmp_path) and "1 .txt" in error(tmp_path)
    for name in ("none", "notes.txt"):
        assert str(tmp_path / name) in error(tmp_path / name)
    assert "--images=~/x" in error("folder:~/x")
    assert "s3://bucket/x" in error("s3://bucket/x")
    assert "gs://bucket/x" in error("gs://bucket/x")


@pytest.mark.slow
def test_an_empty_folder_is_an_error_of_the_command(exported, tmp_path):
    result = call(
        arguments(exported.base, tmp_path, tmp_path / "e.npz"), status=1
    )
    assert str(tmp_path) in error_of(result)
    assert os.listdir(tmp_path) == []


def test_the_description_of_a_folder_follows_its_files(tmp_path):
    def described():
        return embed.images(str(tmp_path), more_formats=True)[1]

    (tmp_path / "a.jpg").write_bytes(b"123")
    found = [described()]
    (tmp_path / "a.jpg").write_bytes(b"1234")
    found.append(described())
    (tmp_path / "a.jpg").rename(tmp_path / "b.jpg")
    found.append(described())
    (tmp_path / "c.jpg").symlink_to("nowhere")
    found.append(described())
    assert len({*found}) == 4 and described() == found[-1]


@pytest.mark.parametrize(
    "name, words",
    [
        ("e.txt", r"\.npz, \.parquet, \.tfrecord"),
        ("none/e.npz", "--output.*/none/e.npz"),
        ("there.npz", "--output.*/there.npz"),
    ],
)
def test_impossible_outputs_are_rejected(name, words, tmp_path):
    (tmp_path / "there.npz").touch()
    with pytest.raises(UserError, match=words):
        embeddings.check(str(tmp_path / name))


def test_parquet_needs_a_pyarrow_that_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pyarrow.*\.npz"):
        embeddings.check(str(tmp_path / "e.parquet"))


@pytest.fixture
def disk(tmp_path):
    """A directory on a file system of 256 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path]
    subprocess.run(mount, check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@needs_root
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_leaves_no_incomplete_file(suffix, disk):
    rows = np.random.default_rng(0).normal(size=[100, 1000])
    block = {"e": rows.astype(np.float32)}
    files = list(map(str, range(100)))
    with pytest.raises(OSError) as e:
        embeddings.write(
            str(disk / f"e{suffix}"), files, {"e": 1000}, lambda _: [block]
        )
    assert e.value.errno == errno.ENOSPC and os.listdir(disk) == []


@needs_root
def test_a_full_disk_keeps_earlier_parts(disk):
    parts = Parts(str(disk / "parts"), MANIFEST, {"e": 1000})
    rows = np.ones([50, 1000], np.float32)
    parts.add(0, 50, {"e": rows}, {})
    parts.save()
    parts.add(50, 100, {"e": rows}, {})
    with pytest.raises(OSError) as e:
        parts.save()
    assert e.value.errno == errno.ENOSPC
    parts.close()
    assert Parts(str(disk / "parts"), MANIFEST, {"e": 1000}).done == 50


def written(path, image, kind, **options):
    path.write_bytes(exports.encode(image, kind, **options))
    return read_image(path)


def test_photographs_are_converted_for_models(tmp_path):
    """The encoder gets the pixels that training gets."""
    image = Image.fromarray(exports.noise(1, 6)[0]).resize([80, 50])
    exif = Image.Exif()
    exif[0x0112] = 6
    rules = headers.DEFAULT
    for kind in ("JPEG", "PNG", "BMP", "GIF"):
        content = written(tmp_path / "x", image, kind)
        assert prepare(content, rules) is content
    rotated = written(tmp_path / "x", image, "JPEG", exif=exif)
    found = Image.open(io.BytesIO(prepare(rotated, rules)))
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "x"))
    assert found.format == "PNG"
    np.testing.assert_array_equal(found, expected)
    as_stored = rules._replace(exif_rotation=False)
    assert prepare(rotated, as_stored) is rotated
    for kind in ("WEBP", "TIFF", "HEIF", "AVIF"):
        content = written(tmp_path / "x", image, kind)
        found = Image.open(io.BytesIO(prepare(content, rules)))
        assert found.format == "PNG"
        # Training converts them to the same pixels.
        encoded, code = converted.read(str(tmp_path / "x"), rules)
        assert code == headers.CHECKED
        np.testing.assert_array_equal(found, decode.decode(encoded))
        plain = rules._replace(more_formats=False)
        assert prepare(content, plain) is content


def test_large_photographs_become_jpeg_files(tmp_path):
    image = Image.fromarray(exports.noise(1, 40)[0])
    image = image.resize([2400, 1800], Image.BICUBIC)
    content = written(tmp_path / "x", image, "TIFF")
    found = Image.open(io.BytesIO(prepare(content, headers.DEFAULT)))
    assert found.format == "JPEG" and found.size == image.size
    difference = np.int32(found) - np.int32(image)
    assert np.abs(difference).mean() < 1 and np.abs(difference).max() < 8


def test_photographs_that_cannot_be_converted_are_errors(tmp_path):
    rules = headers.DEFAULT._replace(image_pixels=4000)
    image = Image.fromarray(exports.noise(1, 80)[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("WEBP", "JPEG"):
        content = written(tmp_path / "x", image, kind, exif=exif)
        found = prepare(content, rules)
        assert isinstance(found, OSError) and "4000 pixels" in str(found)
        found = prepare(content, rules._replace(image_bytes=10))
        assert isinstance(found, OSError) and "10 bytes" in str(found)
        found = prepare(content[:-100], headers.DEFAULT)
        reason = headers.reasons(headers.DEFAULT)[headers.DAMAGED]
        assert isinstance(found, OSError) and reason in str(found)
    error = OSError("gone")
    assert prepare(error, rules) is error


def test_files_that_are_not_images_are_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert isinstance(read_image(tmp_path / "pipe.jpg"), OSError)
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(2**28 + 1)
    assert str(2**28 + 1) in str(read_image(tmp_path / "large.jpg"))
    assert isinstance(read_image(tmp_path), OSError)


def test_ordered_map_limits_the_work_ahead():
    begun, release = [], threading.Semaphore(0)

    def work(i):
        begun.append(i)
        assert release.acquire(timeout=5)  # instead of waiting for ever
        return i * i

    with ordered_map(work, iter(range(10)), workers=8, ahead=3) as results:
        release.release()
        assert next(results) == 0
        # The first, and three that were not requested yet.
        assert sorted(begun) == [0, 1, 2, 3]
        for _ in range(10):
            release.release()
        assert list(results) == [i * i for i in range(1, 10)]


def test_ordered_map_raises_errors_of_its_threads():
    def fail(i):
        return 1 // (3 - i)

    found = []
    with pytest.raises(ZeroDivisionError):
        with ordered_map(fail, range(9), workers=2, ahead=1) as results:
            found.extend(results)
    assert found == [0, 0, 1]
