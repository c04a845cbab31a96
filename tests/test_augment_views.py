import dataclasses
import functools
import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import pillow_chain
from clsa_tf.augment import chain, strong, views
from clsa_tf.augment.views import View
from clsa_tf.errors import UserError
from tests.modules import copied

# The accelerator completes two pairs of these views together.
VIEWS = (
    View("query", 32, 0.2, 1.0),
    View("key", 32, 0.2, 1.0, like="query", shared=("jitter",), shuffle=True),
    View("strong_0", 24, 0.2, 1.0, strong_ops=5),
    View(
        "strong_1",
        24,
        0.2,
        1.0,
        strong_ops=5,
        strong_pool="paper",
        strong_level=7,
        like="strong_0",
        shared=("crop", "flip"),
    ),
    View("strong_2", 16, 0.05, 0.2, strong_ops=3, blur=0.1),
    # All other settings: one more pair, and a view that is completed alone.
    View(
        "full_0",
        16,
        0.2,
        1.0,
        jitter=(0.8, 0.6, 1.2, 0.5),
        gray=0.4,
        rotation=True,
        texture=0.7,
        solarize=0.5,
    ),
    View(
        "full_1",
        16,
        0.2,
        1.0,
        jitter_probability=0.3,
        blur=0.1,
        flip=0.1,
        rotation=True,
        texture=0.7,
        solarize=0.2,
        like="full_0",
        shared=("rotation", "texture"),
    ),
    View(
        "full_2",
        16,
        0.2,
        1.0,
        gray=0.6,
        gray_first=True,
        rotation=True,
        texture=0.5,
        solarize=0.5,
        strong_ops=2,
    ),
)
FULL = VIEWS[-1]
# An odd number of sizes, so that each occurs with different seeds.
SIZES = [(90, 70), (64, 64), (33, 48), (1, 1), (3, 2), (50, 61), (24, 32)]
COUNT = 84
IMAGES = [
    pillow_chain.photograph(*SIZES[i % len(SIZES)], seed=i)
    for i in range(COUNT)
]


def seed_of(i):
    return np.array([11, i], np.int32)


def drawn(seeds, sizes, sequence=VIEWS):
    """Draws for several images: boxes, packed parts, unpacked parameters."""
    boxes, packed = chain.compiled_draw(tuple(sequence))(seeds, sizes)
    parts = views.split_packed(packed, views=sequence)
    params = {v.name: views.unpack(parts[v.name], v) for v in sequence}
    return boxes, parts, params


def make(images, seeds, sequence=VIEWS):
    """Returns the pipeline's views of some images, and their parameters."""
    sizes = tf.stack([tf.shape(image)[:2] for image in images])
    boxes, packed, params = drawn(seeds, sizes, sequence)
    result = {"boxes": boxes, "packed": packed, "params": params}
    for kind, completed in ("crops", False), ("completed", True):
        result[kind] = chain.make_views(
            images, boxes, packed, views=sequence, completed=completed
        )
    return result


@pytest.fixture(scope="module")
def made():
    """Results of `make` in a dataset, three images at a time: COUNT rows."""

    def triples():
        for i in range(0, COUNT, 3):
            rows = range(i, i + 3)
            yield tuple(IMAGES[j] for j in rows), [seed_of(j) for j in rows]

    image = tf.TensorSpec([None, None, 3], tf.uint8)
    examples = tf.data.Dataset.from_generator(
        triples,
        output_signature=((image,) * 3, tf.TensorSpec([3, 2], tf.int32)),
    )
    groups = examples.map(lambda x, seeds: make(list(x), seeds), 2)
    rows = next(iter(groups.batch(COUNT // 3)))
    return tf.nest.map_structure(
        lambda x: x.numpy().reshape(COUNT, *x.shape[2:]), rows
    )


def row(nest, i):
    return tf.nest.map_structure(lambda x: x[i], nest)


def assert_equal(one, other):
    tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def draws(count, sequence, seed=5, size=(500, 500)):
    """Parameters of many images, as arrays with a leading axis."""

    def draw(i):
        return views.draw(tf.stack([seed, i]), size, views=sequence)

    seeds = tf.data.Dataset.range(count, output_type=tf.int32)
    drawn = next(iter(seeds.map(draw).batch(count)))
    return tf.nest.map_structure(lambda x: x.numpy(), drawn)


# --- from the image to the view ----------------------------------------------


def test_views_are_functions_of_their_seed(made):
    """In a dataset with several threads or outside, together or alone."""
    first, name = VIEWS[:1], VIEWS[0].name
    for i in reversed(range(COUNT)):
        alone = make([tf.constant(IMAGES[i])], seed_of(i)[np.newaxis], first)
        np.testing.assert_array_equal(alone["boxes"][0, 0], made["boxes"][i, 0])
        for kind in ("crops", "params", "completed"):
            assert_equal(row(alone[kind][name], 0), row(made[kind][name], i))
    for view in VIEWS:
        images = made["completed"][view.name]
        assert images.shape == (COUNT, view.size, view.size, 3)
        assert images.dtype == np.uint8
        large = [x.tobytes() for x in images[:: len(SIZES)]]
        assert len(set(large)) == len(large)


def test_draws_survive_packing(made):
    """Compiled, packed and unpacked draws equal single eager draws."""
    # Compilers may fuse products and sums of floats.
    assert_near = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    for i in range(0, COUNT, 7):
        size = tf.constant(IMAGES[i].shape[:2])
        one = views.draw(seed_of(i), size, views=VIEWS)
        one = tf.nest.map_structure(lambda x: x.numpy(), one)
        tf.nest.map_structure(assert_near, one, row(made["params"], i))


def test_boxes_equal_those_of_the_full_draw(made):
    for i, view in enumerate(VIEWS):
        boxes = made["params"][view.name]["box"]
        np.testing.assert_array_equal(made["boxes"][:, i], boxes)


def upright(cut):
    """u8[x,c,y] -> u8[y,x,c]."""
    return cut.transpose(2, 0, 1)


def test_crops_equal_pillow(made):
    """Within 1/255, each view's own box at its own size."""
    for view in VIEWS:
        boxes = made["params"][view.name]["box"]
        for image, box, cut in zip(IMAGES, boxes, made["crops"][view.name]):
            expected = pillow_chain.resize_box(image, box, view.size)
            difference = upright(cut).astype(int) - expected
            assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_the_chain_from_the_crop_on_equals_pillow(made, view):
    """Bit for bit: the weak chain, then the strong sequence."""
    params = made["params"][view.name]
    assert ("strong" in params) == bool(view.strong_ops)
    for i, image in enumerate(made["completed"][view.name]):
        cut = upright(made["crops"][view.name][i])
        expected = pillow_chain.chain(cut, row(params, i), view.gray_first)
        np.testing.assert_array_equal(image, expected)


def test_weak_views_equal_pillow_up_to_the_rounding_of_the_crop(made):
    differences = []
    for i, image in enumerate(IMAGES):
        params = row(made["params"]["query"], i)
        expected = pillow_chain.view(image, params, 32)
        difference = np.abs(
            made["completed"]["query"][i].astype(int) - expected
        )
        # A difference of one in the crop may reach the next step of the hue.
        assert np.mean(difference) < 1.0 and np.mean(difference > 3) < 0.05
        differences.append(difference)
    assert np.mean(differences) < 0.2


def batch_of(made, **others):
    """An incomplete batch, as the pipeline passes it to accelerators."""
    packed = {views.params_key(v): made["packed"][v.name] for v in VIEWS}
    batch = made["crops"] | packed | others
    return tf.nest.map_structure(tf.constant, batch)


@pytest.mark.slow
def test_host_equals_device(made):
    """The host takes each image's own branches, the device all of them."""
    batch = batch_of(made, key_order=np.arange(COUNT))
    step = tf.function(lambda x: chain.complete_batch(x, views=list(VIEWS)))
    completed = step(batch)
    assert set(completed) == set(batch)
    for view in VIEWS:
        np.testing.assert_array_equal(
            completed[view.name], made["completed"][view.name], view.name
        )
        key = views.params_key(view)
        assert_equal(completed[key], batch[key])
    np.testing.assert_array_equal(completed["key_order"], np.arange(COUNT))


@pytest.mark.parametrize("begin, count", [(7, 1), (0, 6)])
def test_eager_completion_equals_compiled(made, begin, count):
    some = row(made, slice(begin, begin + count))
    crops = tf.nest.map_structure(tf.constant, some["crops"])
    completed = chain.complete(crops, some["packed"], views=VIEWS)
    assert_equal(completed, some["completed"])


# --- draws -------------------------------------------------------------------


def columns_of(params):
    """Independent random numbers of one view, by part."""
    height, width = params["box"][:, 2], params["box"][:, 3]
    order = 1000 * params["order"][:, 0] + params["order"][:, 1]
    result = {
        "crop": [height * width, np.log(width / height)],
        "jitter": [params["jitter"], order, *params["factors"].T],
        "gray": [params["gray"]],
        "blur": [params["blur"], params["sigma"]],
        "flip": [params["flip"]],
    }
    for name in {"rotation", "solarize"} & set(params):
        result[name] = [params[name]]
    if "texture" in params:
        texture = params["texture"]
        # The sum of a kernel's numbers is fixed; their differences are free.
        kernel = texture["kernel"][:, [0, 2, 5, 7]]
        kernel = kernel - texture["kernel"][:, [1, 3, 6, 8]]
        result["texture"] = [texture["apply"], texture["alpha"], *kernel.T]
    if "strong" in params:
        keys = ("op", "level", "apply", "sign")
        result["strong"] = [x for k in keys for x in params["strong"][k].T]
    return {
        k: np.array(v, float).reshape(len(v), -1) for k, v in result.items()
    }


def correlations(one, other):
    """Correlations of each row of `one` with each row of `other`."""
    count = len(one)
    return np.abs(np.corrcoef(np.r_[one, other])[:count, count:])


def test_all_parts_of_all_views_are_drawn_independently():
    plain = [dataclasses.replace(v, like="", shared=()) for v in VIEWS]
    params = draws(1000, plain)
    rows = [np.concatenate([*columns_of(p).values()]) for p in params.values()]
    rows = np.concatenate(rows)
    assert len(rows) == 8 * 12 + 4 * (5 + 5 + 3 + 2) + 3 * 8
    # About 16000 pairs; 5 standard deviations.
    assert np.max(correlations(rows, rows) - np.eye(len(rows))) < 0.158


def test_only_the_shared_part_is_equal():
    first = dataclasses.replace(FULL, name="first")
    like_first = [
        dataclasses.replace(
            first, name=part, size=16, like="first", shared=(part,)
        )
        for part in views.PARTS
    ]
    drawn = draws(400, [first, *like_first])
    one = columns_of(drawn["first"])
    for part in views.PARTS:
        other = columns_of(drawn[part])
        np.testing.assert_array_equal(one.pop(part), other.pop(part))
        for name, columns in one.items():
            # 5 standard deviations; 1 where anything else is shared.
            assert correlations(columns, other[name]).max() < 0.25
        one = columns_of(drawn["first"])
    assert_equal(drawn["first"]["box"], drawn["crop"]["box"])


def test_query_and_key_share_only_the_jitter(made):
    query, key = (made["params"][name] for name in ("query", "key"))
    for name in ("jitter", "factors", "order"):
        np.testing.assert_array_equal(query[name], key[name])
    for name in ("gray", "blur", "flip", "sigma", "box"):
        assert (query[name] != key[name]).any(), name


def test_two_views_share_only_rotation_and_texture(made):
    one, two = (made["params"][f"full_{i}"] for i in (0, 1))
    np.testing.assert_array_equal(one["rotation"], two["rotation"])
    assert_equal(one["texture"], two["texture"])
    for name in ("jitter", "factors", "gray", "solarize", "flip", "box"):
        assert (one[name] != two[name]).any(), name


def test_sharing_everything_gives_the_same_view():
    one = dataclasses.replace(FULL, name="one")
    two = dataclasses.replace(one, name="two", like="one", shared=views.PARTS)
    # Also with a view that itself shares.
    three = dataclasses.replace(two, name="three", like="two")
    drawn = draws(50, [one, two, three])
    assert_equal(drawn["one"], drawn["two"])
    assert_equal(drawn["one"], drawn["three"])


def test_a_view_does_not_depend_on_later_views():
    everything = draws(20, VIEWS)
    for count in (1, 3):
        some = draws(20, VIEWS[:count])
        assert list(some) == [view.name for view in VIEWS[:count]]
        assert_equal(some, {name: everything[name] for name in some})
    some = drawn([[5, 3]], [[500, 500]], VIEWS[:1])[2]["query"]
    assert_equal(row(some, 0), row(everything["query"], 3))


def test_draws_follow_the_settings():
    drawn = draws(1000, VIEWS)
    full = drawn["full_1"]
    shares = [full[k].mean() for k in ("jitter", "blur", "flip", "solarize")]
    np.testing.assert_allclose(shares, [0.3, 0.1, 0.1, 0.2], atol=0.048)
    shares = [full["texture"]["apply"].mean(), drawn["full_0"]["gray"].mean()]
    np.testing.assert_allclose(shares, [0.7, 0.4], atol=0.051)
    factors = drawn["full_0"]["factors"]
    low, high = factors.min(axis=0), factors.max(axis=0)
    np.testing.assert_allclose(low, [0.2, 0.4, 0.0, -0.5], atol=0.02)
    np.testing.assert_allclose(high, [1.8, 1.6, 2.2, 0.5], atol=0.02)
    released, paper = (drawn[f"strong_{i}"]["strong"] for i in (0, 1))
    assert released["op"].shape == (1000, 5)
    assert drawn["strong_2"]["strong"]["op"].shape == (1000, 3)
    invert, identity = map(strong.NAMES.index, ("Invert", "Identity"))
    assert invert not in released["op"] and identity in released["op"]
    assert invert in paper["op"] and identity not in paper["op"]
    assert released["level"].min() == 100 and released["level"].max() == 900
    assert paper["level"].min() < 5 and 695 < paper["level"].max() <= 700
    shares = [drawn["query"]["blur"].mean(), drawn["strong_2"]["blur"].mean()]
    np.testing.assert_allclose(shares, [0.5, 0.1], atol=0.053)
    height, width = drawn["strong_2"]["box"][:, 2:].T
    area = height * width / 500**2
    assert 0.049 < area.min() < 0.06 and 0.19 < area.max() < 0.201


def test_absent_parts_cost_nothing():
    """They need no numbers and no columns, and change no other draws."""
    plain = VIEWS[0]
    assert views.number_slices([plain])[1] == 32
    assert views.packed_width(plain) == 17
    (key,) = {
        chain._kind(dataclasses.replace(plain, name="other", **settings))
        for settings in (
            {},
            dict(jitter=(0.8, 0.8, 0.8, 0.2), jitter_probability=1.0),
            dict(gray=0.1, blur=0.1, flip=0.1),
        )
    }
    for part, more in ("rotation", 1), ("texture", 11), ("solarize", 1):
        full = dataclasses.replace(plain, **{part: 1})
        assert views.number_slices([full])[1] == 32 + more
        assert views.packed_width(full) == 17 + more
        assert chain._kind(full) != key
    parts = dict(rotation=True, texture=0.5, solarize=0.5)
    full = dataclasses.replace(plain, **parts)
    one, other = (draws(10, [view])["query"] for view in (plain, full))
    assert set(other) - set(one) == set(parts)
    assert_equal(one, {name: other[name] for name in one})


def test_draws_equal_golden_values():
    """With other values, earlier runs could not be repeated."""
    view = View("query", 32, 0.2, 1.0, strong_ops=5)
    params = draws(1, [view, dataclasses.replace(view, name="key")])["key"]
    np.testing.assert_array_equal(params["box"], [[125, 43, 331, 389]])
    np.testing.assert_array_equal(params["order"], [[3, 2, 1, 0]])
    factors = [[1.1279479, 1.3355881, 1.1275275, -0.09174936]]
    np.testing.assert_allclose(params["factors"], factors, atol=1e-6)
    np.testing.assert_array_equal(params["strong"]["op"], [[5, 1, 9, 5, 0]])


def test_programs_of_earlier_views_are_freed():
    fresh = copied(chain)  # with empty caches
    view = View("", 8, 0.2, 1.0)
    many = [dataclasses.replace(view, name=str(i)) for i in range(65)]
    for compiled, arguments in (
        (fresh.compiled_draw, [((x,),) for x in many]),
        (fresh._compiled_view, [(view, count) for count in range(65)]),
        (fresh._compiled_complete, [((x,),) for x in many]),
    ):
        first, *_ = [weakref.ref(compiled(*x)) for x in arguments]
        assert compiled.cache_info().currsize == 64
        gc.collect()
        assert first() is None


# --- rejected views ----------------------------------------------------------


def assert_one_sentence(error, word):
    message = str(error.value)
    assert message.startswith("Expected ") and message.endswith(".")
    assert message.index("received ") < message.index("; ")
    assert word in message and ". " not in message


@pytest.mark.parametrize(
    "change, word",
    [
        ({"size": 0}, "received 0"),
        ({"min_area": 0.0}, "min_area"),
        ({"min_area": 0.5, "max_area": 0.4}, "min_area"),
        ({"max_area": 1.1}, "min_area"),
        ({"strong_ops": -1}, "strong_ops"),
        ({"blur": 1.5}, "blur"),
        ({"gray": -0.1}, "gray"),
        ({"flip": 1.1}, "flip"),
        ({"jitter_probability": 2}, "jitter_probability"),
        ({"texture": float("nan")}, "texture"),
        ({"solarize": 128}, "solarize"),
        ({"jitter": (0.4, 0.4, 0.4)}, "(0.4, 0.4, 0.4)"),
        ({"jitter": (0.4, 0.4, -0.4, 0.1)}, "(0.4, 0.4, -0.4, 0.1)"),
        ({"jitter": (0.4, 11, 0.4, 0.1)}, "(0.4, 11, 0.4, 0.1)"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, "(0.4, 0.4, 0.4, 0.6)"),
        ({"strong_pool": "published"}, "'published'"),
        ({"strong_level": 1}, "strong_level"),
        ({"strong_level": 11}, "strong_level"),
        ({"like": "key", "shared": ("colour",)}, "('colour',)"),
        ({"like": "key"}, "like='key'"),
        ({"shared": ("crop",)}, "like=''"),
    ],
)
def test_impossible_views_are_rejected(change, word):
    settings = dict(name="query", size=8, min_area=0.2, max_area=1.0)
    View(**settings)
    with pytest.raises(UserError) as error:
        View(**{**settings, **change})
    assert_one_sentence(error, word)


def assert_rejected(sequence, word):
    with pytest.raises(UserError) as error:
        views.draw([1, 2], [50, 50], views=sequence)
    assert_one_sentence(error, word)
    assert "'b'" in str(error.value)
    with pytest.raises(UserError):
        chain.compiled_draw(tuple(sequence))([[1, 2]], [[50, 50]])
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        pass  # Models can still be built.


@pytest.mark.parametrize(
    "changes",
    [
        [{"name": "b", "like": "a", "shared": ("jitter",)}, {"name": "a"}],
        [{"name": "a"}, {"name": "b", "like": "c", "shared": ("crop",)}],
        [{"name": "b", "like": "b", "shared": ("blur",)}],
    ],
    ids=["after", "unknown", "itself"],
)
def test_views_that_share_with_no_earlier_view_are_rejected(changes):
    sequence = [dataclasses.replace(VIEWS[0], **change) for change in changes]
    (like,) = {repr(view.like) for view in sequence if view.like}
    assert_rejected(sequence, like)


@pytest.mark.parametrize(
    "part, change",
    [
        ("crop", {"min_area": 0.1}),
        ("jitter", {"jitter": (0.4, 0.4, 0.2, 0.1)}),
        ("jitter", {"jitter_probability": 0.5}),
        ("gray", {"gray": 0.5}),
        ("blur", {"blur": 0.1}),
        ("flip", {"flip": 0.4}),
        ("rotation", {"rotation": True}),
        ("texture", {"texture": 0.5}),
        ("solarize", {"solarize": 0.5}),
        ("strong", {"strong_ops": 4}),
        ("strong", {"strong_pool": "paper"}),
        ("strong", {"strong_level": 9}),
    ],
)
def test_views_that_differ_in_a_shared_part_are_rejected(part, change):
    a = dataclasses.replace(VIEWS[0], name="a")
    b = dataclasses.replace(
        a, name="b", like="a", shared=tuple(p for p in views.PARTS if p != part)
    )
    everything = dataclasses.replace(b, shared=views.PARTS)
    views.number_slices([a, dataclasses.replace(b, **change), everything])
    differs = dataclasses.replace(b, shared=views.PARTS, **change)
    (setting,) = change
    assert_rejected([a, differs], setting)
    # Either of the two views may have the other setting.
    assert_rejected([dataclasses.replace(a, **change), everything], setting)
