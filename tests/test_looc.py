"""Properties of LooC and LooC++ beyond those of every method."""

import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from clsa_tf import config as config_lib
from clsa_tf.api import load
from clsa_tf.augment import chain, views
from clsa_tf.errors import UserError
from clsa_tf.methods import looc
from clsa_tf.networks import functional
from clsa_tf.networks.encoder import make_encoder
from clsa_tf.options.fields import Crop
from clsa_tf.training.checkpoint import Checkpoints
from export import savedmodel
from tests import exports, golden, tiny

ALL = ("color", "rotation", "texture")
# Entries of `augment.views.draw` for each augmentation, and for all others.
DRAWN = {
    "color": ("jitter", "factors", "order", "gray"),
    "rotation": ("rotation",),
    "texture": ("texture",),
    "": ("box", "flip", "sigma"),
}
CROPS = (Crop(16, 0.2, 1.0), Crop(12, 0.1, 0.8))


def golden_method(**changes):
    """A tiny method with the golden queues, of two augmentations."""
    settings = dict(batch_size=4, queue_size=16, projection_size=8)
    method = tiny.make(tiny.config("looc", **settings | changes))
    for queue, keys in zip(method.queues, golden.LOOC_QUEUES):
        queue.keys.assign(keys)
    return method


def stacked(tables):
    """One space per head -> float32 `[4, H, 8]`."""
    return tf.constant(np.stack(tables, axis=1), tf.float32)


TARGETS = {
    f"key_{j}": stacked([keys[j] for keys in golden.LOOC_KEYS])
    for j in range(3)
}
# Of the same heads.
QUERIES = {
    "query_0": stacked(golden.LOOC_QUERIES),
    "query_1": stacked([golden.family(4, 8, 0.05 + h) for h in range(3)]),
}


def oracle(queries, *, inbatch, temperature=0.2):
    """The formula, term by term: the mean over the heads for each image."""
    total = np.zeros(4)
    for h in range(3):
        for i, q in enumerate(np.float64(queries[:, h])):
            candidates = {
                (k, j): np.exp(q @ golden.LOOC_KEYS[h][j][k] / temperature)
                for j in (range(3) if h else [0])
                for k in (range(4) if inbatch else [i])
            }
            old = np.exp(golden.LOOC_QUEUES[h] @ q / temperature).sum()
            share = candidates[i, h] / (sum(candidates.values()) + old)
            total[i] -= np.log(share) / 3
    return total


def test_objective_equals_golden_values():
    method = golden_method()
    projections = {"query_0": QUERIES["query_0"]}
    loss, reports = method.loss(
        projections, TARGETS, {"example_ids": tf.range(4)}
    )
    assert loss.shape == [4]
    assert np.mean(loss) == pytest.approx(1.9132705564478745, abs=1e-6)
    assert list(reports) == [
        "contrast_accuracy",
        "color_accuracy",
        "rotation_accuracy",
    ]
    # One head after the other.
    for head, expected in enumerate(
        [1.4571956530113974, 1.945528610617122, 2.3370874057151045]
    ):
        keys = [TARGETS[f"key_{j}"][:, head] for j in range(3 if head else 1)]
        similarities, positive = method.similarities(
            QUERIES["query_0"][:, head],
            tf.stack(keys, axis=1),
            tf.range(4),
            head,
        )
        rows = tf.nn.log_softmax(similarities / 0.2)
        found = -np.mean(tf.gather(rows, positive, batch_dims=1))
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("over_crops", ["mean", "sum"])
@pytest.mark.parametrize("inbatch", [False, True])
def test_objective_equals_the_formula(inbatch, over_crops):
    method = golden_method(
        inbatch_negatives=inbatch, query_crops=CROPS, over_crops=over_crops
    )
    # Two of the four images, out of order, as a replica may hold them.
    rows = [3, 1]
    projections = {name: tf.gather(x, rows) for name, x in QUERIES.items()}
    loss, _ = method.loss(
        projections, TARGETS, {"example_ids": tf.constant(rows)}
    )
    expected = sum(oracle(x, inbatch=inbatch) for x in QUERIES.values())
    expected /= 2 if over_crops == "mean" else 1
    np.testing.assert_allclose(loss, expected[rows], rtol=1e-5)


def test_accuracies_are_measured_per_head():
    method = golden_method()
    keys = np.stack([TARGETS[f"key_{j}"] for j in range(3)])  # [V, G, H, D]
    # Queries equal each head's own key, except for some of the first two
    # images, which equal the key of another view.
    queries = np.stack([keys[h][:, h] for h in range(3)], axis=1)
    queries[0] = np.stack([keys[1][0, 0], keys[2][0, 1], keys[0][0, 2]])
    queries[1, 2] = keys[1][1, 2]
    for queue in method.queues:
        queue.keys.assign(tf.zeros([16, 8]))
    projections = {"query_0": tf.constant(queries)}
    _, reports = method.loss(projections, TARGETS, {"example_ids": tf.range(4)})
    found = {name: x.numpy().tolist() for name, x in reports.items()}
    assert found == {
        "contrast_accuracy": [1, 1, 1, 1],  # no other view is a candidate
        "color_accuracy": [0, 1, 1, 1],
        "rotation_accuracy": [0, 0, 1, 1],
    }


@pytest.mark.parametrize("over_crops", ["mean", "sum"])
@pytest.mark.parametrize("inbatch", [False, True])
def test_chance_loss_is_the_loss_of_equal_similarities(inbatch, over_crops):
    method = golden_method(
        inbatch_negatives=inbatch, query_crops=CROPS, over_crops=over_crops
    )
    projections = {name: tf.zeros([4, 3, 8]) for name in QUERIES}
    loss, _ = method.loss(projections, TARGETS, {"example_ids": tf.range(4)})
    chance = type(method).chance_loss(method.config)
    np.testing.assert_allclose(loss, [chance] * 4, rtol=1e-6)


def test_queues_hold_each_heads_keys_of_its_own_view():
    config = tiny.config("looc", query_crops=CROPS)
    method = tiny.make(config)
    batch = next(iter(tiny.batches(config, 1)))
    expected = []
    for head in range(3):
        order = np.argsort(batch[f"key_{head}_order"])
        in_order = tf.gather(batch[f"key_{head}"], order)
        # Before the step the two encoders are equal.
        rows = method.encoder.project_heads(in_order, training=True)
        expected.append(rows[:, head])
    tiny.fit(method, tiny.batches(config, 1))
    for queue, rows in zip(method.queues, expected):
        np.testing.assert_allclose(queue.keys[: tiny.ROWS], rows, atol=1e-5)
        assert queue.pointer == tiny.ROWS


@pytest.mark.slow
def test_queues_survive_a_restart(tmp_path):
    config = tiny.config("looc")
    first = tiny.make(config)
    tiny.fit(first, tiny.batches(config, 1))
    Checkpoints(first, str(tmp_path), keep=1).save()
    second = tiny.make(config.replace(seed=9))
    Checkpoints(second, str(tmp_path), keep=1).restore()
    for one, two in zip(first.queues, second.queues):
        np.testing.assert_array_equal(one.keys, two.keys)
        assert two.pointer == tiny.ROWS


# --- views ------------------------------------------------------------------


def drawn(options, count=64):
    """Draws for each view of some images, by view."""
    sequence = tuple(looc.LooC.views(options))
    seeds = np.stack([np.full(count, 3), np.arange(count)], axis=1)
    sizes = np.full([count, 2], 500)
    _, packed = chain.compiled_draw(sequence)(
        tf.constant(seeds, tf.int32), tf.constant(sizes, tf.int32)
    )
    parts = views.split_packed(packed, views=sequence)
    return {
        v.name: tf.nest.map_structure(
            lambda x: x.numpy(), views.unpack(parts[v.name], v)
        )
        for v in sequence
    }


def test_keys_share_with_the_query_the_augmentation_of_their_head():
    found = drawn(looc.Options(augmentations=ALL, query_crops=CROPS))
    shared = {"key_0": (), "query_1": ALL}
    shared |= {f"key_{i}": (name,) for i, name in enumerate(ALL, start=1)}
    assert set(found) == {"query_0", *shared}
    for view, names in shared.items():
        for name, entries in DRAWN.items():
            for entry in entries:
                one, two = (
                    np.concatenate(
                        [
                            np.reshape(x, [64, -1])
                            for x in tf.nest.flatten(found[v][entry])
                        ],
                        axis=1,
                    )
                    for v in ("query_0", view)
                )
                same = np.mean(np.all(one == two, axis=1))
                # By chance: both without greyscale, 0.68.
                assert same == 1 if name in names else same < 0.9, (view, entry)


def test_only_named_augmentations_are_used():
    plain = looc.Options(augmentations=("color",))
    assert plain.heads == 2
    for view in looc.LooC.views(plain):
        assert not view.rotation and not view.texture
        assert view.shuffle == view.name.startswith("key_")
    named = looc.Options(augmentations=("texture",), texture_probability=0.25)
    for view in looc.LooC.views(named):
        assert not view.rotation and view.texture == 0.25
    assert [view.shared for view in looc.LooC.views(named)] == [
        (),
        (),
        ("texture",),
    ]


# --- flags ------------------------------------------------------------------


def parse(*arguments):
    return config_lib.parse(["--method=looc", *arguments])


def test_flags_spell_the_augmentations():
    config = parse("--augmentations=rotation,texture", "--concatenate_heads")
    assert config.options.augmentations == ("rotation", "texture")
    assert config.options.concatenate
    lines = config_lib.to_flagfile(config).splitlines()
    assert "--augmentations=rotation,texture" in lines
    assert parse(*lines) == config
    assert parse().options.augmentations == ("color", "rotation")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--augmentations=color,hue"], "color, rotation, texture.*'hue'"),
        (["--augmentations="], "received none"),
        (["--augmentations=color,color"], "received color,color"),
        (["--texture_probability=0"], "above 0"),
        (["--jitter_probability=0", "--gray=0"], "--augmentations"),
        (["--jitter=0,0,0,0", "--gray=0"], "--augmentations"),
        (["--concatenate_heads", "--projection_layers=1"], "hidden layer"),
        (["--queue_size=100"], "--queue_size=100"),
        (["--query_crops="], "--query_crops"),
        (["--symmetric"], "--symmetric"),
    ],
)
def test_wrong_flags_are_rejected_in_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        parse(*arguments)
    assert "Expected" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_color_need_not_vary_if_no_head_keeps_it():
    parse("--augmentations=rotation", "--jitter_probability=0", "--gray=0")


# --- LooC++ -----------------------------------------------------------------


def plus_plus():
    return tiny.config(
        "looc",
        backbone="resnet18",  # valid for --backbone
        augmentations=ALL,
        concatenate_heads=True,
        projection_hidden=24,
        image_size=exports.SIZE,
        eval_keep=1.0,
    )


def test_loaded_encoder_equals_the_trained_one():
    config = plus_plus()
    encoder = make_encoder(config, name="encoder")
    rng = np.random.default_rng(0)
    for variable in encoder.variables:  # statistics, too
        variable.assign(rng.uniform(0.5, 1.5, variable.shape) * variable + 0.01)
    model = functional.from_encoder(encoder, config)
    images = exports.noise(3)
    found = model(np.float32(images))
    features, projections = encoder.features_and_projections(images)
    assert features.shape == [3, 4 * 24]
    assert projections.shape == [3, 4 * 16]
    np.testing.assert_allclose(found["embedding"], features, rtol=1e-4)
    np.testing.assert_allclose(
        found["projection"], projections, rtol=1e-3, atol=1e-5
    )
    # Each head's projection follows from its own hidden layer.
    heads = encoder.project_heads(images)
    joined = tf.reshape(heads, [3, -1]) / 2  # the length of 4 unit vectors
    np.testing.assert_allclose(joined, projections, rtol=1e-4, atol=1e-6)
    for i, head in enumerate(encoder.heads):
        last = head.layers[-1](features[:, 24 * i : 24 * (i + 1)])
        length = tf.norm(last, axis=1, keepdims=True)
        np.testing.assert_allclose(
            heads[:, i], last / length, rtol=1e-3, atol=1e-5
        )


@pytest.mark.slow
def test_export_contains_all_heads(tmp_path):
    config = plus_plus().replace(workdir=str(tmp_path))
    method = tiny.make(config)
    tiny.fit(method, tiny.batches(config, 1))
    Checkpoints(method, str(tmp_path), keep=1).save()
    (tmp_path / "run.flags").write_text(config_lib.to_flagfile(config))
    path = savedmodel.export(str(tmp_path), str(tmp_path / "export"))
    pixels = exports.noise(2)
    outputs = tf.saved_model.load(path).signatures["images_uint8"](
        tf.constant(pixels)
    )
    features, projections = method.encoder.features_and_projections(pixels)
    assert outputs["embedding"].shape == features.shape == [2, 96]
    np.testing.assert_allclose(
        outputs["embedding"], features, rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        outputs["projection"], projections, rtol=1e-3, atol=1e-5
    )
    card = json.loads(pathlib.Path(path, "model_card.json").read_text())
    assert card["encoder"]["heads"] == 4 and card["encoder"]["concatenate"]
    loaded = load.load_encoder(path)
    np.testing.assert_allclose(loaded(pixels), features, rtol=1e-3, atol=1e-5)
