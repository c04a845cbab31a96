"""What a recipe says in epochs, when the run is given another length.

A recipe of 200 epochs lowers the learning rate after 120 and 160. With
`--total_epochs=30` these become 18 and 24, in proportion. A warm-up shrinks in
proportion, too, but does not grow: published recipes warm up for ten epochs
whether they last 100 or 1,000. What was typed is never changed.
"""

from clsa_tf.options.flags import spell


def adapt(flag_values):
    """Fits the epochs that a flagfile speaks of to the run's length.

    Args:
        flag_values: the parsed flags of `clsa_tf.config`.

    Returns:
        dictionary of the values that are to replace those of the flags; a
        sentence that says so, "" if there are none.
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
        if _outlived(flag_values):
            changed["lr_milestones"] = ()
    elif planned and planned != end:
        lengths.append(planned)
        warm = changed.get("warmup_epochs", values["warmup_epochs"])
        changed["lr_milestones"] = _scale(
            values["lr_milestones"], end / planned, int(warm) + 1, end - 1
        )
        if not changed["lr_milestones"]:  # no room in so short a run
            changed["lr_schedule"] = "constant"
    return changed, _sentence(flag_values, changed, lengths, end)


def _planned(flag_values, name):
    """Epochs of the run that the flagfile with `name` was written for.

    0 if the value is not from a flagfile.
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


def _outlived(flag_values):
    """Whether another schedule was chosen over the one with milestones."""
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
        unit = "epoch" if end == 1 else "epochs"
        why = f"{end} {unit} instead of the recipe's {lengths[0]}"
    return f"{why}: {', '.join(parts)} (type a flag to set it yourself)"
