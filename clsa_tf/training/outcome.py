"""Where a run stands: how far it got, and whether its encoder is any good.

What reports, model cards and exports say about it comes from here.
"""

from clsa_tf.training import collapse, metrics_log, workdir


def of(directory, trained):
    """What there is to say about a run at one of its checkpoints.

    Args:
        directory: of the run.
        trained: `clsa_tf.training.checkpoint.Trained`, of that run.

    Returns:
        dictionary that JSON can hold:

        * `steps`, taken until the checkpoint, and `total_steps`, of the whole
          run (None where the number of images is not recorded);
        * `finished`, whether these are the same (None where not known);
        * `embeddings`, None where nothing was logged; else `step`, `spread`,
          `rank`, `uniformity` (see `statistics.measures`) of the last line of
          the metrics, `state` and `words` of the `collapse.Verdict`, and
          `good`, whether they tell images apart;
        * `changes`, see `workdir.read_changes`.
    """
    config, total = trained.config, None
    images = workdir.images(directory)
    if images:
        total = config.total_epochs * (images // config.batch_size)
    return {
        "steps": trained.step,
        "total_steps": total,
        "finished": None if total is None else trained.step >= total,
        "embeddings": _embeddings(directory, trained),
        "changes": workdir.read_changes(directory),
    }


def _embeddings(directory, trained):
    entries = [
        e for e in metrics_log.read(directory) if e["step"] <= trained.step
    ]
    dimension = trained.config.options.projection_size
    verdict = collapse.verdict(entries, dimension)
    if not verdict:
        return None
    figures = [e for e in entries if "spread" in e][-1]
    # At the beginning of a run "narrow" is as it should be; an encoder that is
    # taken from there is no better for it.
    good = not verdict.unusable and verdict.state != "narrow"
    return {
        "state": verdict.state,
        "good": good,
        "words": verdict.words,
        **{k: figures[k] for k in ("step", "spread", "rank", "uniformity")},
    }


def warnings(outcome):
    """What a person has to know before using the encoder.

    Args:
        outcome: what `of` returned.

    Returns:
        list of (short, sentence): a word or two, and what it means.
    """
    found = []
    embeddings = outcome["embeddings"]
    if embeddings and not embeddings["good"]:
        collapsed = embeddings["state"] == "collapsed"
        found.append(
            (
                "collapsed" if collapsed else "embeddings not spread out",
                f"{embeddings['words']}, at step {embeddings['step']:,}: the "
                "features hardly tell images apart, which no check of the "
                "export can see; compare kNN accuracies before you use them",
            )
        )
    if outcome["finished"] is False:
        done = f"{outcome['steps']:,} of {outcome['total_steps']:,} steps"
        found.append(
            (
                f"not finished: {done}",
                f"the run is not finished ({done}); the command that started "
                "it goes on",
            )
        )
    return found


def show(outcome):
    """Prints `warnings`, and returns them."""
    found = warnings(outcome)
    for _, sentence in found:
        print(f"warning: {sentence}")
    return found


def history(outcome):
    """Sentences about flags that were changed while the run went on."""
    return [
        f"from step {change['step']} on --{change['flag']}={change['now']} "
        f"instead of {change['before']}"
        for change in outcome["changes"]
    ]
