"""Write embeddings to files. How to read the files:

    data = np.load("e.npz")
    data["files"], data["embedding"]

    table = pyarrow.parquet.read_table("e.parquet")
    table["file"].to_pylist(), np.stack(table["embedding"].to_numpy())

    form = {"file": tf.io.FixedLenFeature([], tf.string),
            "embedding": tf.io.FixedLenFeature([F], tf.float32)}
    records = tf.data.TFRecordDataset("e.tfrecord")
    records.map(lambda record: tf.io.parse_single_example(record, form))

If an .npz file does not fit in memory, unzip `embedding.npy` and open it with
`np.load(…, mmap_mode="r")`.

File names are relative to the folder and may be invalid UTF-8. In .npz files
`files` is text with `surrogateescape`. In .parquet files `file` is text, or
bytes if any name is invalid UTF-8. `os.fsencode` converts both to bytes. In
.tfrecord files `file` is bytes.
"""

import errno
import itertools
import os
import zipfile

import numpy as np

from clsa_tf.errors import UserError
from clsa_tf.files import replacing

SUFFIXES = (".npz", ".parquet", ".tfrecord")
_NAMES_PER_WRITE = 2**16


def check(path):
    """Raises `UserError` unless `write` can write to `path`."""
    suffix = os.path.splitext(path)[1]
    if suffix not in SUFFIXES:
        raise UserError(
            f"Expected an --output that ends in {', '.join(SUFFIXES)}, "
            f"received {path!r}; choose one of these formats."
        )
    if os.path.exists(path):
        raise UserError(
            f"Expected an --output that does not exist yet, received {path}; "
            "move the file or choose another --output."
        )
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UserError(
            f"Expected an --output in an existing directory, received {path}; "
            "create the directory first."
        )
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as e:
            raise UserError(
                "Cannot import pyarrow, which .parquet needs: "
                f"{str(e).splitlines()[0]}; install a version that is "
                "compatible with this NumPy, or write .npz or .tfrecord."
            ) from e


def write(path, files, widths, blocks):
    """Writes all embeddings, or no file if it fails.

    Args:
        path: path of the file; its suffix, one of `SUFFIXES`, is the format.
        files: list of R file names.
        widths: dictionary from output names to their widths.
        blocks: function from a list of output names to an iterator over
            dictionaries with these outputs, float32 `[B, width]`, R rows in
            total. It is called once per pass, so that not all embeddings have
            to be in memory.
    """
    suffix = os.path.splitext(path)[1]
    with replacing(path) as draft:
        _WRITERS[suffix](draft, files, widths, blocks)


def _write_npz(path, files, widths, blocks):
    with zipfile.ZipFile(path, "w") as archive:
        longest = max(map(len, files), default=1)
        dtype = np.dtype(f"U{longest}")
        names = (
            np.array(files[start : start + _NAMES_PER_WRITE], dtype)
            for start in range(0, len(files), _NAMES_PER_WRITE)
        )
        # Compressed: an array of text is mostly zeros.
        _write_array(
            archive, "files", [len(files)], dtype, names, zipfile.ZIP_DEFLATED
        )
        for name, width in widths.items():
            _write_array(
                archive,
                name,
                [len(files), width],
                np.dtype(np.float32),
                (block[name] for block in blocks([name])),
                zipfile.ZIP_STORED,
            )


def _write_array(archive, name, shape, dtype, pieces, compression):
    # Without a time stamp, so that equal embeddings give equal files.
    member = zipfile.ZipInfo(f"{name}.npy")
    member.compress_type = compression
    member.external_attr = 0o644 << 16
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())


def _write_parquet(path, files, widths, blocks):
    import pyarrow as pa
    import pyarrow.parquet

    is_text = all(map(_is_text, files))
    schema = pa.schema(
        [("file", pa.string() if is_text else pa.binary())]
        + [(name, pa.list_(pa.float32(), w)) for name, w in widths.items()]
    )
    with pa.parquet.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for names, block in _rows(files, widths, blocks):
            names = names if is_text else [os.fsencode(name) for name in names]
            columns = [pa.array(names, schema.field("file").type)]
            for name, width in widths.items():
                flat = pa.array(np.ascontiguousarray(block[name]).reshape(-1))
                columns.append(pa.FixedSizeListArray.from_arrays(flat, width))
            writer.write_table(pa.table(columns, schema=schema))


def _write_tfrecord(path, files, widths, blocks):
    import tensorflow as tf

    try:
        with tf.io.TFRecordWriter(path) as writer:
            for names, block in _rows(files, widths, blocks):
                for row, file in enumerate(names):
                    rows = {name: block[name][row] for name in widths}
                    writer.write(_example(file, rows))
    except tf.errors.ResourceExhaustedError as e:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from e


def _example(file, rows):
    import tensorflow as tf

    example = tf.train.Example()
    feature = example.features.feature
    feature["file"].bytes_list.value.append(os.fsencode(file))
    for name, row in rows.items():
        feature[name].float_list.value.extend(row)
    return example.SerializeToString(deterministic=True)


def _rows(files, widths, blocks):
    """Yields (list of B names, block of B rows of all outputs)."""
    names = iter(files)
    for block in blocks(list(widths)):
        count = len(next(iter(block.values())))
        if count:
            yield list(itertools.islice(names, count)), block


def _is_text(name):
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


_WRITERS = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
    ".tfrecord": _write_tfrecord,
}
