"""Plots the curves of a run over its epochs."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from clsa_tf.plots.sheet import FAMILY, drawable, write_png


def curves(entries, path, *, title, chance_loss, unit, baselines):
    """Plots loss, divergence and accuracies of a run over its epochs.

    Args:
        entries: list of the dicts of `metrics.jsonl`.
        path: PNG file to write.
        title: title of the figure.
        chance_loss: chance-level loss of the contrast; None: unknown.
        unit: unit of the contrast.
        baselines: dict, name -> kNN accuracy in [0, 1], drawn as horizontal
            lines.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(
        drawable(title), weight="bold", family=FAMILY, parse_math=False
    )
    # Methods whose loss is the contrast alone log no separate "contrast" and no
    # divergence.
    name = "contrast" if any("contrast" in e for e in entries) else "loss"
    divergent = any("ddm_kl" in e for e in entries)
    panels = list(figure.subplots(1, 2 + divergent))
    contrast, accuracy = panels[0], panels[-1]
    if chance_loss is not None:
        contrast.axhline(
            chance_loss,
            color="gray",
            linestyle=":",
            label=f"chance level: {chance_loss:.2f}",
        )
    _line(contrast, entries, name)
    contrast.set(title=name, ylabel=unit)
    if divergent:
        _line(panels[1], entries, "ddm_kl", "from the weak views")
        panels[1].set(title="divergence", ylabel="nats")
    _line(accuracy, entries, "contrast_accuracy", "contrast accuracy")
    _line(accuracy, entries, "knn", "kNN accuracy")
    for (label, level), style in zip(baselines.items(), (":", "--")):
        accuracy.axhline(
            level, color="gray", linestyle=style, label=f"kNN, {label}"
        )
    accuracy.set(title="accuracy", ylim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    last = max((e["epoch"] for e in entries), default=1)
    for axes in panels:
        axes.set(xlabel="epoch", xlim=(0, 1.03 * last))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    write_png(figure, path)


def _line(axes, entries, name, label=None):
    points = [(e["epoch"], e[name]) for e in entries if name in e]
    if points:
        # Markers, because a line of one point is invisible.
        marker = "o" if name == "knn" or len(points) < 10 else None
        axes.plot(*zip(*points), label=label or name, marker=marker, ms=3)
