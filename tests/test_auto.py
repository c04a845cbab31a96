"""The values that `auto` resolves to, and the warnings of a run."""

import json
import math
import re
import types

import numpy as np
import pytest

from clsa_tf import config as config_lib
from clsa_tf import methods, train
from clsa_tf.errors import UserError
from clsa_tf.methods.base import RunInfo
from clsa_tf.networks import precision
from clsa_tf.training import advice, auto, config_checks, workdir
from tests import tiny
from tests.photos import TINY_FLAGS

IMAGENET = dict(images=1_281_167, replicas=8)
IMAGENET_100 = dict(images=126_689, replicas=8)
PHOTOS = dict(images=680, replicas=1)
WITH_QUEUE = ("cacr_moco", "clsa", "looc", "moco")


def parse(*arguments):
    return config_lib.parse(arguments)


def chosen(config):
    options = config.options
    return {
        "bn": config.batch_norm,
        "splits": config.batch_norm_splits,
        "queue": getattr(options, "queue_size", None),
        "m": getattr(options, "key_momentum", None),
    }


@pytest.mark.parametrize(
    "recipe, data, expected",
    [
        ("clsa", IMAGENET, ("local", 65_536, 0.999)),
        ("clsa_multicrop", IMAGENET, ("local", 65_536, 0.999)),
        ("moco_v1", IMAGENET, ("local", 65_536, 0.999)),
        ("moco_v2", IMAGENET, ("local", 65_536, 0.999)),
        ("cacr_moco", IMAGENET, ("local", 65_536, 0.999)),
        ("looc", IMAGENET_100, ("local", 16_384, 0.999)),
        ("looc_plus", IMAGENET_100, ("local", 16_384, 0.999)),
        ("byol", IMAGENET, ("sync", 0, 0.996)),
        ("cacr_mocov3", IMAGENET, ("sync", None, 0.996)),
        ("simclr", IMAGENET, ("sync", None, None)),
        ("cacr", dict(images=50_000, replicas=1), ("sync", None, None)),
    ],
)
def test_auto_gives_published_recipes_their_published_values(
    recipe, data, expected
):
    config = parse(f"--flagfile=configs/{recipe}.flags")
    resolved = auto.resolve(config, **data)
    found = chosen(resolved)
    assert (found["bn"], found["queue"], found["m"]) == expected
    assert advice.advice(resolved, **data) == []


def test_one_gpu_gets_the_batch_statistics_of_eight():
    config = parse("--flagfile=configs/clsa.flags")
    resolved = auto.resolve(config, images=1_281_167, replicas=1)
    assert chosen(resolved) == dict(bn="split", splits=8, queue=65_536, m=0.999)
    assert advice.advice(resolved, images=1_281_167, replicas=1) == []


def test_readme_command_gets_values_for_680_photographs():
    config = parse("--flagfile=configs/clsa.flags", "--total_epochs=100")
    resolved = auto.resolve(config, **PHOTOS)
    assert chosen(resolved) == dict(bn="split", splits=8, queue=256, m=0.9)
    warned = " ".join(advice.advice(resolved, **PHOTOS))
    for flag in ("batch_norm", "queue_size", "key_momentum"):
        assert f"--{flag}" not in warned
    assert "200 steps" in warned and "--knn_k=200" in warned


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("replicas, micro", [(1, 1), (1, 4), (4, 1), (2, 2)])
@pytest.mark.parametrize("images", [1, 70, 700, 60_000, 10**7])
def test_resolved_values_can_be_run(method, replicas, micro, images):
    config = config_lib.default(method, batch_size=64, accumulation_steps=micro)
    data = dict(images=images, replicas=replicas)
    resolved = auto.resolve(config, **data)
    assert "auto" not in config_lib.to_flagfile(resolved).replace(
        "--labels=auto", ""
    ).replace("--strategy=auto", "")
    strategy = types.SimpleNamespace(
        num_replicas_in_sync=replicas,
        extended=types.SimpleNamespace(worker_devices=()),
    )
    config_checks.check_batch(resolved, strategy)
    # No resolved value causes a warning.
    warned = " ".join(advice.advice(resolved, **data))
    for flag in ("--batch_norm", "longer than the data", "--key_momentum"):
        assert flag not in warned or images == 1, warned
    if method in WITH_QUEUE:
        queue = resolved.options.queue_size
        assert queue == 64 or queue <= images / 4
        assert queue >= 64
        parts = resolved.batch_norm_splits
        assert resolved.batch_norm == ("split" if replicas == 1 else "local")
        assert replicas > 1 or (parts >= 2 and 64 % parts == 0)
    else:
        wide = replicas > 1 and micro > 1
        assert resolved.batch_norm == ("local" if wide else "sync")


@pytest.mark.parametrize("fast", [True, False])
def test_precision_is_resolved_and_recorded(fast, tmp_path, monkeypatch):
    """Otherwise a run that resumes on other devices would change silently."""
    monkeypatch.setattr(precision, "_fast_bfloat16", lambda: fast)
    value = "mixed_bfloat16" if fast else "float32"
    config = config_lib.default(precision="auto", workdir=str(tmp_path))
    resolved = auto.resolve(config, **PHOTOS)
    assert resolved.precision == value
    words = auto.reasons(config, resolved, **PHOTOS)[-1]
    assert words.startswith(f"--precision={value}: ")
    # A run that an earlier version recorded as `auto`.
    with workdir.claim(resolved.replace(precision="auto"), images=5):
        pass
    recorded = auto.recorded_config(config)
    assert recorded.precision == "auto"
    again = auto.resolve(config, recorded=recorded, **PHOTOS)
    assert again == resolved
    with workdir.claim(again, images=5) as claim:
        assert [c.flag for c in claim.changes] == ["precision"]
    # From now on the value is fixed.
    monkeypatch.setattr(precision, "_fast_bfloat16", lambda: not fast)
    recorded = auto.recorded_config(config)
    assert auto.resolve(config, recorded=recorded, **PHOTOS) == resolved


@pytest.mark.parametrize(
    "batch, multiple, parts",
    [
        (256, 1, 8),
        (512, 1, 8),
        (128, 1, 4),  # of 32 images, as in the quickstart
        (64, 1, 2),
        (32, 1, 2),  # at least two
        (48, 1, 2),
        (100, 1, 2),
        (99, 1, 3),
        (16, 1, 2),
        (4, 1, 2),
        (3, 1, None),
        (251, 1, None),  # a prime
        (256, 4, 8),
        (256, 8, 8),
        (256, 16, 16),
        (1000, 3, None),
    ],
)
def test_number_of_parts_depends_on_the_batch_size(batch, multiple, parts):
    assert auto._parts(batch, multiple) == parts


@pytest.mark.parametrize(
    "images, size",
    [
        (680, 256),
        (1_831, 256),
        (9_469, 2_048),
        (50_000, 8_192),
        (126_689, 16_384),
        (262_143, 32_768),
        (262_144, 65_536),
        (10**8, 65_536),
    ],
)
def test_queue_size_depends_on_the_number_of_images(images, size):
    config = config_lib.default("moco")
    assert auto.resolve(config, images=images, replicas=1).options == (
        auto.resolve(
            config.replace(queue_size=size), images=images, replicas=1
        ).options
    )


def test_symmetric_queue_holds_the_keys_of_one_step():
    config = config_lib.default("clsa", symmetric=True)
    assert auto.resolve(config, **PHOTOS).options.queue_size == 512


def test_older_keys_of_the_query_s_own_image_are_rare():
    """Their probability is (K / N)^2 / 2; counted in shuffled epochs."""
    images = 400
    config = config_lib.default("moco", batch_size=20)
    resolved = auto.resolve(config, images=images, replicas=1)
    queue = resolved.options.queue_size
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(images) for _ in range(30)])
    met = [order[i] in order[i - queue : i] for i in range(images, len(order))]
    assert np.mean(met) == pytest.approx((queue / images) ** 2 / 2, abs=0.01)
    assert 0 < np.mean(met) < 0.04


@pytest.mark.parametrize(
    "epochs, m", [(10, 0.9), (60, 0.944), (1000, 0.997), (10_000, 0.999)]
)
def test_momentum_follows_the_length_of_the_run(epochs, m):
    config = config_lib.default("moco", total_epochs=epochs)
    data = dict(images=12 * 256, replicas=1)
    resolved = auto.resolve(config, **data)
    assert resolved.options.key_momentum == m
    steps = 12 * epochs
    if m > 0.9:
        assert m**steps < math.exp(-auto.TIMES * 0.85)  # rounded


def test_explicit_values_are_kept():
    settings = dict(batch_norm="local", queue_size=65_536, key_momentum=0.999)
    config = config_lib.default("clsa", **settings)
    resolved = auto.resolve(config, **PHOTOS)
    assert (resolved.batch_norm, resolved.options) == ("local", config.options)
    assert auto.reasons(config, resolved, **PHOTOS) == []
    given = config_lib.default("clsa", batch_norm_splits=4)
    found = auto.resolve(given, images=10**6, replicas=4)
    assert (found.batch_norm, found.batch_norm_splits) == ("split", 4)


def test_explicit_split_of_an_indivisible_batch_is_rejected():
    config = config_lib.default("moco", batch_norm="split", batch_size=251)
    with pytest.raises(UserError, match="^Expected.*251.*; use a multiple"):
        auto.resolve(config, images=10**6, replicas=1)
    # With `auto` it can be run, with a warning.
    resolved = auto.resolve(
        config.replace(batch_norm="auto"), images=10**6, replicas=1
    )
    assert resolved.batch_norm == "local"
    assert "--batch_norm=local" in " ".join(
        advice.advice(resolved, images=10**6, replicas=1)
    )


def test_reasons_name_value_number_and_published_value():
    config = config_lib.default("clsa", total_epochs=100)
    resolved = auto.resolve(config, **PHOTOS)
    one, two, three = auto.reasons(config, resolved, **PHOTOS)
    assert one.startswith("--batch_norm=split --batch_norm_splits=8: ")
    assert two.startswith("--queue_size=256: ")
    assert "680 images" in two and "65,536" in two
    assert three.startswith("--key_momentum=0.9: ")
    assert "200 steps" in three and "0.999" in three


@pytest.mark.parametrize(
    "method, changes, data, words",
    [
        ("clsa", dict(batch_norm="local"), PHOTOS, ["--batch_norm=local", "1"]),
        ("moco", dict(batch_norm="sync"), IMAGENET, ["--batch_norm=sync"]),
        (
            "looc",
            dict(batch_norm="split", batch_norm_splits=1),
            PHOTOS,
            ["--batch_norm=split"],
        ),
        ("simclr", dict(batch_norm="local"), IMAGENET, ["=sync", "8 parts"]),
        (
            "clsa",
            dict(queue_size=65_536),
            PHOTOS,
            ["--queue_size=65536", "680 images", "96.4", "=auto", "256"],
        ),
        (
            "moco",
            dict(key_momentum=0.999, total_epochs=100),
            PHOTOS,
            ["--key_momentum=0.999", "82%", "200 steps"],
        ),
        (
            "byol",
            dict(key_momentum=0.996, total_epochs=250),
            PHOTOS,
            ["--key_momentum=0.996", "37%", "500 steps"],
        ),
        ("moco", dict(total_epochs=300), PHOTOS, ["600 steps", "500"]),
        ("moco", dict(knn_k=200), PHOTOS, ["--knn_k=200", "680", "=13"]),
        ("looc", dict(queue_size=1024), IMAGENET, ["--inbatch_negatives"]),
    ],
)
def test_each_unsuitable_value_causes_one_warning(method, changes, data, words):
    config = config_lib.default(method)
    before = advice.advice(auto.resolve(config, **IMAGENET), **IMAGENET)
    assert before == []
    resolved = auto.resolve(config.replace(**changes), **data)
    found = [
        sentence
        for sentence in advice.advice(resolved, **data)
        if all(word in sentence for word in words)
    ]
    assert len(found) == 1, advice.advice(resolved, **data)
    assert not re.search(r"[.]\Z|\n", found[0])


@pytest.mark.parametrize(
    "recipe, slow",
    [("clsa", True), ("byol", True), ("quickstart", False), ("photos", False)],
)
def test_large_networks_without_an_accelerator_cause_a_warning(recipe, slow):
    config = auto.resolve(parse(f"--flagfile={recipe}"), **PHOTOS)
    new = set(advice.advice(config, **PHOTOS, accelerated=False)) - set(
        advice.advice(config, **PHOTOS)
    )
    assert len(new) == slow
    assert all("resnet50" in x and "--flagfile=photos" in x for x in new)


def test_without_labels_there_is_no_advice_on_neighbours():
    resolved = auto.resolve(config_lib.default("moco"), **PHOTOS)
    assert "knn" in " ".join(advice.advice(resolved, **PHOTOS))
    found = advice.advice(resolved, **PHOTOS, bank=0)
    assert "knn" not in " ".join(found)
    # Neighbours may come from another dataset.
    found = advice.advice(resolved, **PHOTOS, bank=50)
    assert "of 50 images vote" in " ".join(found)


@pytest.mark.parametrize(
    "method, replicas, accumulation, words",
    [
        ("byol", 1, 1, "the whole batch, as published"),
        ("byol", 1, 2, "each micro-batch"),
        ("byol", 2, 2, "each device and micro-batch"),
        ("clsa", 2, 1, "each device, as published"),
        ("clsa", 2, 2, "each device and micro-batch, as published"),
    ],
)
def test_reasons_state_the_scope_of_batch_statistics(
    method, replicas, accumulation, words
):
    config = config_lib.default(method, accumulation_steps=accumulation)
    facts = PHOTOS | {"replicas": replicas}
    resolved = auto.resolve(config, **facts)
    reason = auto.reasons(config, resolved, **facts)[0]
    assert reason.startswith("--batch_norm="), reason
    found = reason.partition("statistics of ")[2]
    assert found.removesuffix(", over all devices") == words


def test_a_run_keeps_its_recorded_values():
    """Also on other numbers of devices and in runs of earlier versions."""
    config = config_lib.default("clsa")
    begun = auto.resolve(config, **PHOTOS)
    again = auto.resolve(config, images=680, replicas=4, recorded=begun)
    assert again == begun
    (reason,) = auto.reasons(
        config, again, images=680, replicas=4, recorded=begun
    )
    assert "--queue_size=256" in reason and "recorded" in reason
    earlier = config.replace(
        batch_norm="local",
        batch_norm_splits=8,
        queue_size=65_536,
        key_momentum=0.999,
    )
    assert auto.resolve(config, **PHOTOS, recorded=earlier) == earlier
    # Explicit values are not replaced here; the work directory rejects them.
    given = config.replace(queue_size=512)
    found = auto.resolve(given, **PHOTOS, recorded=begun)
    assert found == begun.replace(queue_size=512)
    # Values of another method are ignored.
    other = config_lib.default("byol", key_momentum=0.5, batch_norm="local")
    assert auto.resolve(config, **PHOTOS, recorded=other) == begun


def test_a_method_resolves_options_of_its_own(toy_method, monkeypatch):
    config = tiny.config("toy", frozen_steps="auto", total_epochs=1)
    for images, steps in ((60, 2), (32, 1)):
        data = dict(images=images, replicas=1)
        resolved = auto.resolve(config, classes=2, **data)
        assert resolved == config.replace(frozen_steps=steps)
        (reason,) = auto.reasons(config, resolved, **data)
        assert reason.startswith(f"--frozen_steps={steps}: ")
        assert "toy" in reason and f"{images} images" in reason
    method = toy_method.METHOD(resolved, RunInfo(num_classes=2))
    assert method.options.frozen_steps == 1
    # The base class chooses nothing.
    monkeypatch.delattr(toy_method.METHOD, "resolve_auto")
    with pytest.raises(ValueError, match="frozen_steps from resolve_auto"):
        auto.resolve(config, **data)


def test_only_flags_with_auto_accept_it():
    config = parse("--queue_size=auto", "--key_momentum=auto")
    assert config == config_lib.default()
    text = config_lib.to_flagfile(config)
    assert "--queue_size=auto\n" in text and "--batch_norm=auto\n" in text
    assert parse(*text.splitlines()) == config
    for wrong in ("--batch_size=auto", "--temperature=auto"):
        with pytest.raises(Exception, match="number.*'auto'"):
            parse(wrong)
    with pytest.raises(UserError, match="--queue_size"):
        parse("--method=byol", "--ddm_weight=1", "--queue_size=auto")


def test_a_method_rejects_unresolved_values():
    config = tiny.config("moco", queue_size="auto", batch_norm="auto")
    with pytest.raises(ValueError, match="batch_norm, queue_size"):
        methods.load("moco").METHOD(config)


@pytest.mark.slow
def test_a_run_prints_and_records_resolved_values(photos, tmp_path, capsys):
    arguments = [
        *(x for x in TINY_FLAGS if "queue" not in x),
        f"--dataset=folder:{photos}",
        "--total_epochs=1",
        f"--workdir={tmp_path}",
    ]
    (tmp_path / "views.png").touch()
    method = train.run(parse(*arguments))
    printed = capsys.readouterr().out
    assert "auto: --batch_norm=split --batch_norm_splits=2: " in printed
    assert "auto: --queue_size=16: " in printed
    assert "auto: --key_momentum=0.9: " in printed
    assert "warning: 3 steps are few" in printed
    assert method.queue.keys.shape[0] == 16
    recorded = config_lib.load(str(tmp_path))
    assert chosen(recorded) == dict(bn="split", splits=2, queue=16, m=0.9)

    # As an earlier version would have recorded it; the same command resumes.
    text = (tmp_path / "run.flags").read_text()
    text = text.replace("--batch_norm=split\n", "--batch_norm=local\n")
    (tmp_path / "run.flags").write_text(text)
    train.run(parse(*arguments))
    printed = capsys.readouterr().out
    assert "is complete (3 steps)" in printed
    assert "recorded at the first start" in printed and "warning" not in printed
    arguments.append("--total_epochs=2")
    train.run(parse(*arguments))
    printed = capsys.readouterr().out
    assert "recorded at the first start" in printed
    assert "warning: --batch_norm=local on 1 device(s)" in printed
    text = text.replace("--total_epochs=1\n", "--total_epochs=2\n")
    assert (tmp_path / "run.flags").read_text() == text
    assert json.loads((tmp_path / "dataset.json").read_text())["images"]
    with pytest.raises(UserError, match="--queue_size=40 instead of 16"):
        train.run(parse(*arguments, "--queue_size=40"))
