"""Pictures of a run: its views, its curves, neighbours its encoder finds."""

import os

import matplotlib
import numpy as np
import tensorflow as tf

matplotlib.use("Agg")  # files only; no screen is needed

from matplotlib.figure import Figure  # noqa: E402


def views(batch, names, path, *, rows=6):
    """Draws what each view makes of the same images.

    Args:
        batch: dictionary, view name -> uint8 `[G, S, S, 3]`, as
            `training_batches` yields it.
        names: views to show, one column each.
        path: PNG file to write.
        rows: images to show, at most.

    Returns:
        uint8 `[H, W, 3]`, the picture.
    """
    columns = []
    for name in names:
        images = np.asarray(batch[name])
        if f"{name}_rows" in batch:
            # A shuffled view: put its rows back into the batch's order.
            images = images[np.argsort(batch[f"{name}_rows"])]
        columns.append(images[:rows])
    side = max(images.shape[1] for images in columns)
    columns = [
        tf.image.resize(images, [side, side], "nearest").numpy()
        for images in columns
    ]
    titles = [
        f"{name}, {batch[name].shape[1]} px".replace("_", " ") for name in names
    ]
    cells = np.stack(columns, axis=1)  # [rows, columns, side, side, 3]
    return gallery(cells, titles, path)


def gallery(cells, titles, path):
    """Draws a grid of images with a title over each column.

    Args:
        cells: uint8 `[rows, columns, H, W, 3]`.
        titles: a string for each column.
        path: PNG file to write.

    Returns:
        uint8 `[H, W, 3]`, the picture.
    """
    from keras_cv import visualization  # slow to import

    rows, columns = cells.shape[:2]
    figure = visualization.plot_image_gallery(
        cells.reshape(-1, *cells.shape[2:]),
        value_range=(0, 255),
        rows=rows,
        cols=columns,
    )
    for axes, title in zip(figure.axes, titles):
        axes.set_title(title)
    picture = _write(figure, path)
    matplotlib.pyplot.close(figure)
    return picture


def curves(entries, path, *, useless, baselines):
    """Draws the curves of a run over its epochs.

    Args:
        entries: dictionaries of `metrics.jsonl`.
        path: PNG file to write.
        useless: contrast of an encoder that tells nothing apart, in nats.
        baselines: dictionary, name -> kNN accuracy, drawn as level lines.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    contrast, divergence, accuracy = figure.subplots(1, 3)
    contrast.axhline(
        useless, color="gray", linestyle=":", label=f"useless: {useless:.2f}"
    )
    # A method without DDM has nothing but the contrast in its loss.
    name = "contrast" if any("contrast" in e for e in entries) else "loss"
    _line(contrast, entries, name)
    contrast.set_ylabel("nats")
    _line(divergence, entries, "ddm_kl", "divergence from the weak views")
    divergence.set_ylabel("nats")
    _line(accuracy, entries, "contrast_accuracy", "contrast accuracy")
    _line(accuracy, entries, "knn", "kNN accuracy")
    for (label, level), style in zip(baselines.items(), (":", "--")):
        accuracy.axhline(
            level, color="gray", linestyle=style, label=f"kNN, {label}"
        )
    accuracy.set_ylim(0, 1)
    for axes in (contrast, divergence, accuracy):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    _write(figure, path)


def neighbours(queries, found, path):
    """Draws images beside the images nearest to them.

    Args:
        queries: uint8 `[Q, S, S, 3]`.
        found: uint8 `[Q, k, S, S, 3]`, nearest first.
        path: PNG file to write.
    """
    cells = np.concatenate([queries[:, np.newaxis], found], axis=1)
    titles = ["image"] + [f"nearest {i + 1}" for i in range(found.shape[1])]
    gallery(cells, titles, path)


def _line(axes, entries, name, label=None):
    points = [(e["epoch"], e[name]) for e in entries if name in e]
    if points:
        marker = "o" if name == "knn" else None
        axes.plot(*zip(*points), label=label or name, marker=marker, ms=3)


def _write(figure, path):
    """Writes a figure atomically; returns it as uint8 `[H, W, 3]`."""
    draft = path + ".tmp"
    figure.savefig(draft, format="png", dpi=100)
    os.replace(draft, path)
    return tf.io.decode_png(tf.io.read_file(path), channels=3).numpy()
