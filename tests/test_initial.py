"""`--init_from`: which weights are loaded, and which are rejected."""

import shutil

import numpy as np
import pytest

from clsa_tf import config as config_lib
from clsa_tf.api import pretrain
from clsa_tf.errors import UserError
from clsa_tf.methods.base import RunInfo
from clsa_tf.training import initial_weights, workdir
from clsa_tf.training.checkpoint import Checkpoints
from export import formats
from tests import tiny
from tests.marks import slow_but


def make(method="clsa", **changes):
    settings = dict(backbone="resnet18", workdir="/new", seed=9)
    return tiny.config(method, **settings | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of CLSA; all its variables differ from those of `make`."""
    path = tmp_path_factory.mktemp("source")
    config = make(seed=1, workdir=str(path))
    method = tiny.make(config)
    for i, variable in enumerate(method.variables):
        if variable.dtype.is_floating:
            variable.assign_add(np.full(variable.shape, 1e-3 * (i + 1)))
    method.queue.pointer.assign(16)
    method.steps_taken.assign(5)
    Checkpoints(method, str(path), keep=1).save()
    (path / "run.flags").write_text(config_lib.to_flagfile(config))
    return path, method


def start(path, method="clsa", **changes):
    """Returns a new method with the weights at `path`, and parts left out."""
    config = make(method, init_from=str(path), **changes)
    weights = initial_weights.read(config)
    new = tiny.make(config)
    parts = weights.give_to(new)
    assert len(parts) > 1
    return new, {p.name: p.reason for p in parts if p.reason}


def assert_equal(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        np.testing.assert_array_equal(a, b)


def test_the_encoder_of_a_run_initialises_both_encoders(source):
    path, trained = source
    method, left_out = start(path)
    assert not left_out
    assert_equal(method.encoder.variables, trained.encoder.variables)
    assert_equal(method.momentum_encoder.variables, trained.encoder.variables)
    assert np.any(method.queue.keys != trained.queue.keys)
    assert method.steps_taken == 0 and method.queue.pointer == 0


def test_init_what_all_loads_all_except_step_and_optimizer(source):
    path, trained = source
    method, left_out = start(path, init_what="all")
    assert not left_out
    assert_equal(method.encoder.variables, trained.encoder.variables)
    assert_equal(
        method.momentum_encoder.variables, trained.momentum_encoder.variables
    )
    assert_equal(method.queue.variables, trained.queue.variables)
    assert np.any(
        trained.momentum_encoder.variables[0] != trained.encoder.variables[0]
    )
    assert method.steps_taken == 0 and method.optimizer.iterations == 0


def test_a_queue_of_another_length_is_left_out(source):
    method, left_out = start(source[0], init_what="all", queue_size=48)
    assert list(left_out) == ["queue"]
    assert "[40, 16]" in left_out["queue"] and "[48, 16]" in left_out["queue"]


def test_variables_whose_shapes_depend_on_the_data_are_loaded(
    toy_method, tmp_path
):
    """A bank with a row per image, and prototypes and means per class."""
    config = make("toy", workdir=str(tmp_path / "run"))
    run = RunInfo.of(config, images=50, classes=3)
    trained = tiny.make(config, run)
    own = (trained.bank, trained.prototypes, trained.means)
    for i, variable in enumerate(own):
        variable.assign(np.full(variable.shape, i + 1.0))
    with workdir.claim(config, images=50, classes=3):
        Checkpoints(trained, config.workdir, keep=1).save()
    wanted = make("toy", init_from=config.workdir, init_what="all")
    weights = initial_weights.read(wanted)
    new = tiny.make(wanted, run)
    parts = weights.give_to(new)
    assert {str(part).rpartition(": ")[2] for part in parts} == {"loaded"}
    assert_equal((new.bank, new.prototypes, new.means), own)
    # More images: their bank is another one.
    new = tiny.make(wanted, RunInfo.of(wanted, images=60, classes=3))
    left_out = {p.name: p.reason for p in weights.give_to(new) if p.reason}
    assert left_out == {"bank": "[50, 16] instead of [60, 16]"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, names",
    [
        ("encoder", {"projection head"}),
        (
            "all",
            {
                "encoder, projection head",
                "momentum_encoder, projection head",
                "queue",
            },
        ),
    ],
)
def test_a_head_that_does_not_fit_is_left_out(source, what, names):
    path, trained = source
    method, left_out = start(path, init_what=what, projection_size=8)
    assert set(left_out) == names
    assert_equal(
        method.encoder.backbone.variables, trained.encoder.backbone.variables
    )


def test_a_queue_of_another_head_is_left_out_despite_its_shape(source):
    path, trained = source
    method, left_out = start(path, init_what="all", projection_hidden=24)
    assert method.queue.keys.shape == trained.queue.keys.shape
    assert left_out["queue"] == "made for another projection head"
    assert np.any(method.queue.keys != trained.queue.keys)


def test_another_method_loads_the_encoder(source):
    path, trained = source
    method, _ = start(path, "byol")
    assert_equal(
        method.encoder.backbone.variables, trained.encoder.backbone.variables
    )


@pytest.mark.parametrize("place", slow_but(1, ["versions", "version", "keras"]))
def test_exports_are_loaded(exported, tmp_path, place):
    path = {"version": exported.path, "versions": exported.base}.get(place)
    if not path:
        formats.export(str(exported.workdir), str(tmp_path), formats=["keras"])
        path = tmp_path / "encoder.keras"
    method, left_out = start(path)
    assert not left_out
    assert_equal(method.encoder.variables, exported.encoder.variables)
    assert_equal(method.momentum_encoder.variables, exported.encoder.variables)
    if place == "keras":  # does not state its width
        with pytest.raises(UserError, match="--width .*|.*instead of"):
            initial_weights.read(make(init_from=str(path), width=0.25))
    with pytest.raises(UserError, match="directory of a run"):
        initial_weights.read(make(init_from=str(path), init_what="all"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encoder", "all"])
@pytest.mark.parametrize(
    "flag, value, received",
    [
        ("width", 0.25, "0.125"),
        ("stem", "imagenet", "small"),
        ("backbone", "resnet34", "resnet18"),
    ],
)
def test_another_backbone_is_rejected(source, what, flag, value, received):
    config = make(init_from=str(source[0]), init_what=what)
    with pytest.raises(UserError) as error:
        initial_weights.read(config.replace(**{flag: value}))
    assert f"--{flag}={value}, received" in str(error.value)
    assert f"--{flag}={received}" in str(error.value)


def test_init_what_all_rejects_another_method(source):
    config = make("moco", init_from=str(source[0]), init_what="all")
    with pytest.raises(UserError, match="--method=moco .* a run of clsa"):
        initial_weights.read(config)


def test_a_run_cannot_start_from_itself(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for one in ("run", "run/", "../" + tmp_path.name + "/run", "link"):
        config = make(
            workdir=str(tmp_path / "run"), init_from=f"{tmp_path}/{one}"
        )
        with pytest.raises(UserError, match="--init_from of another run"):
            initial_weights.check(config)
    initial_weights.check(config.replace(init_from=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "damage",
    slow_but(2, ["keras", "cut", "nothing", "text", "nan", "no checkpoint"]),
)
def test_damaged_weights_are_rejected(source, tmp_path, damage):
    path = tmp_path / "place"
    if damage == "text":
        path.write_text("weights")
    elif damage == "keras":
        path = tmp_path / "encoder.keras"
        path.write_bytes(b"PK\3\4 not a zip file")
    elif damage != "nothing":
        shutil.copytree(source[0], path)
    if damage == "cut":
        (data,) = (path / "checkpoints").glob("*.data-*")
        data.write_bytes(data.read_bytes()[:1000])
    if damage == "no checkpoint":
        shutil.rmtree(path / "checkpoints")
    if damage == "nan":
        config = config_lib.load(str(path))
        method = tiny.make(config)
        shutil.rmtree(path / "checkpoints")
        # (`Checkpoints.save` would reject these values.)
        saver = Checkpoints(method, str(path), keep=1)
        variable = method.momentum_encoder.variables[0]
        method.encoder.variables[0].assign(np.full(variable.shape, np.nan))
        saver._write()
    for what in ("encoder", "all"):
        with pytest.raises(UserError) as error:
            initial_weights.read(make(init_from=str(path), init_what=what))
        assert str(path) in str(error.value)


def test_init_from_is_set_from_python(tmp_path):
    config = pretrain.make_config(
        "shapes", workdir=tmp_path, init_from=tmp_path / "other"
    )
    assert config.init_from == str(tmp_path / "other")
    assert config.init_what == "encoder"
