"""Scales a recipe's warm-up and milestones to another number of epochs.

Example: a recipe of 200 epochs lowers the learning rate after 120 and 160
epochs. With `--total_epochs=30` the milestones become 18 and 24. A warm-up
shrinks in proportion, but does not grow: published recipes warm up for ten
epochs whether they train for 100 or 1,000. Flags on the command line are never
changed.
"""

from clsa_tf.options.flags import spell
from clsa_tf.text import counted


def adapt(flag_values):
    """Scales the epochs that a flagfile sets to `--total_epochs`.

    Args:
        flag_values: the parsed flags of `clsa_tf.config`.

    Returns:
        (dict of the values that replace those of the flags, message for the
        terminal). Both are empty if nothing changes.
    """
    end = flag_values["total_epochs"].value
    values = {
        name: flag_values[name].value
        for name in ("warmup_epochs", "lr_schedule", "lr_milestones")
    }
    changed, lengths = {}, []

    planned = _planned(flag_values, "warmup_epochs")
    if values["warmup_epochs"] and planned > end:
        lengths.append(planned)
        scaled = values["warmup_epochs"] * end / planned
        changed["warmup_epochs"] = float(f"{scaled:.4g}")

    planned = _planned(flag_values, "lr_milestones")
    if not values["lr_milestones"]:
        pass
    elif values["lr_schedule"] != "steps":
        if _schedule_replaced(flag_values):
            changed["lr_milestones"] = ()
    elif planned and planned != end:
        lengths.append(planned)
        warm = changed.get("warmup_epochs", values["warmup_epochs"])
        changed["lr_milestones"] = _scale(
            values["lr_milestones"], end / planned, int(warm) + 1, end - 1
        )
        if not changed["lr_milestones"]:  # the run is too short for any
            changed["lr_schedule"] = "constant"
    return changed, _sentence(flag_values, changed, lengths, end)


def _planned(flag_values, name):
    """Number of epochs that the flagfile which sets flag `name` plans.

    0 if no flagfile sets the flag.
    """
    total, files = flag_values["total_epochs"], flag_values[name].files
    if not files:
        return 0
    flags = [flag_values[other] for other in flag_values]
    last = max(
        written.position
        for flag in flags
        for written in getattr(flag, "written", ())
        if files[-1] in written.files
    )
    planned = [w for w in total.written if w.position <= last]
    return int(planned[-1].value) if planned else total.default


def _schedule_replaced(flag_values):
    """Whether the flagfile's schedule with milestones was overridden."""
    files = flag_values["lr_milestones"].files
    return bool(files) and flag_values["lr_schedule"].files != files


def _scale(milestones, ratio, first, last):
    scaled = {min(max(round(m * ratio), first), last) for m in milestones}
    return tuple(sorted(m for m in scaled if first <= m <= last))


def _sentence(flag_values, changed, lengths, end):
    if not changed:
        return ""
    parts = []
    for name, value in changed.items():
        before = spell(flag_values[name].value)
        parts.append(f"--{name} {before} -> {spell(value) or 'none'}")
    why = f"--lr_schedule={flag_values['lr_schedule'].value}"
    if lengths:
        epochs = counted(end, "epoch")
        why = f"{epochs} instead of the recipe's {lengths[0]}"
    return f"{why}: {', '.join(parts)} (set these flags to override)"
