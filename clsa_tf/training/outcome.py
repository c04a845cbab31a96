"""Describes the state of a run: its progress and the quality of its encoder.

Reports, model cards and exports use it.
"""

from clsa_tf.training import collapse, metrics_log, workdir


def of(directory, trained):
    """Describes a run at one of its checkpoints.

    Args:
        directory: directory of the run.
        trained: `clsa_tf.training.checkpoint.Trained` of the run.

    Returns:
        dict of values that JSON supports:

        * `steps`, taken until the checkpoint, and `total_steps` of the whole
          run (None if the number of images is not recorded);
        * `finished`, whether all steps are done (None if unknown);
        * `embeddings`, None if nothing was logged; otherwise a dict about the
          projections (the key is of earlier versions) with `step`, `spread`,
          `rank` and `uniformity` of the last entry of the metrics (see
          `statistics.measures`), `state` and `words` of the
          `collapse.Verdict`, and `good`, whether the projections of different
          images differ;
        * `changes`, see `workdir.read_changes`.
    """
    images = workdir.images(directory)
    total = trained.config.total_steps(images) if images else None
    return {
        "steps": trained.step,
        "total_steps": total,
        "finished": None if total is None else trained.step >= total,
        "embeddings": _projections(directory, trained),
        "changes": workdir.read_changes(directory),
    }


def _projections(directory, trained):
    entries = [
        e for e in metrics_log.read(directory) if e["step"] <= trained.step
    ]
    dimension = trained.config.options.projection_size
    verdict = collapse.verdict(entries, dimension)
    if not verdict:
        return None
    figures = [e for e in entries if "spread" in e][-1]
    # "narrow" is normal at the beginning of a run, but an encoder from that
    # time is not good.
    good = not verdict.unusable and verdict.state != "narrow"
    return {
        "state": verdict.state,
        "good": good,
        "words": verdict.words,
        **{k: figures[k] for k in ("step", "spread", "rank", "uniformity")},
    }


def warnings(outcome):
    """Lists the problems of an encoder.

    Args:
        outcome: dict returned by `of`.

    Returns:
        list of (name of the problem in a few words, explanation).
    """
    found = []
    projections = outcome["embeddings"]  # the key of earlier versions
    if projections and not projections["good"]:
        collapsed = projections["state"] == "collapsed"
        found.append(
            (
                "collapsed" if collapsed else "projections not spread out",
                f"{projections['words']}, at step {projections['step']:,}: the "
                "encoder hardly distinguishes images, which no check of the "
                "export detects; compare kNN accuracies before you use it",
            )
        )
    if outcome["finished"] is False:
        done = f"{outcome['steps']:,} of {outcome['total_steps']:,} steps"
        found.append(
            (
                f"not finished: {done}",
                f"the run is not finished ({done}); the command that started "
                "it resumes it",
            )
        )
    return found


def show(outcome):
    """Prints and returns `warnings`."""
    found = warnings(outcome)
    for _, sentence in found:
        print(f"warning: {sentence}")
    return found


def history(outcome):
    """Lists, as sentences, the flags that later starts of the run changed."""
    return [
        f"from step {change['step']} on --{change['flag']}={change['now']} "
        f"instead of {change['before']}"
        for change in outcome["changes"]
    ]
