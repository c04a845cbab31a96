import pathlib
import re
from unittest import mock

import pytest
from absl import flags

import clsa_tf
from clsa_tf import config as config_lib
from clsa_tf import methods, train
from clsa_tf.cli.parser import FlagError
from clsa_tf.errors import UserError
from clsa_tf.optimizers.schedule import make_schedule
from clsa_tf.options.fields import Crop
from clsa_tf.training import run as run_lib
from clsa_tf.training import workdir

CONFIGS = pathlib.Path("configs")
FLAGFILES = sorted(CONFIGS.rglob("*.flags"))
CIFAR = sorted((CONFIGS / "cifar10").glob("*.flags"))
COMMON = CONFIGS / "cifar10/common.flags"
SMALL = [CONFIGS / "quickstart.flags", CONFIGS / "photos.flags"]
# Flagfiles of papers and comparisons, neither included by others nor for a CPU.
RECIPES = [path for path in FLAGFILES if path not in (COMMON, *SMALL)]
CIFAR_RECIPES = [path for path in RECIPES if path in CIFAR]


def parse(*arguments):
    return config_lib.parse(arguments)


def recipe(name):
    """The configuration of a flagfile, by its name in `configs`."""
    return parse(f"--flagfile={CONFIGS}/{name}.flags")


def views_of(config):
    """The views of a run, by name."""
    views = methods.class_of(config).views(config.options)
    return {view.name: view for view in views}


def comments(path):
    """The comments of a flagfile and of the files that it includes."""
    text = path.read_text()
    own = re.findall("^#(.*)", text, re.M)
    included = re.findall("^--flagfile=(.*)$", text, re.M)
    parts = [*own, *(comments(pathlib.Path(other)) for other in included)]
    return " ".join(" ".join(parts).split())


def test_defaults_are_the_published_recipe():
    config = parse()
    assert config.options.query_crops == (Crop(224, 0.2, 1.0),)
    assert config.options.strong_crops == (Crop(96, 0.086, 0.429),)
    assert (config.batch_size, config.total_epochs) == (256, 200)
    assert config == config_lib.default()


@pytest.mark.parametrize("path", FLAGFILES, ids=str)
def test_flagfiles_are_read_and_round_trip(path):
    config = parse(f"--flagfile={path}")
    text = config_lib.to_flagfile(config)
    assert parse(*text.split("\n")[:-1]) == config
    assert path.read_text().startswith("# ")  # describes itself
    assert views_of(config)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipes_name_paper_and_command(path):
    command = f"python -m clsa_tf.train --flagfile={path}"
    head = path.read_text().split("\n--")[0]
    assert f"#   {command}\n" in head
    assert re.search(r"arXiv \d{4}\.\d{5}", comments(path))
    # No two recipes share a directory.
    name = path.relative_to(CONFIGS).with_suffix("")
    assert parse(f"--flagfile={path}").workdir == f"runs/{name}"


@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_a_published_recipe(method):
    published = [path for path in RECIPES if path not in CIFAR]
    assert method in {parse(f"--flagfile={p}").method for p in published}


def test_methods_are_compared_on_cifar10():
    compared = {parse(f"--flagfile={p}").method for p in CIFAR_RECIPES}
    assert compared >= {
        *("byol", "cacr", "cacr_moco", "cacr_mocov3"),
        *("clsa", "looc", "moco", "simclr"),
    }


@pytest.mark.parametrize("path", CIFAR_RECIPES, ids=str)
def test_methods_are_compared_on_equal_terms(path):
    config, common = parse(f"--flagfile={path}"), parse(f"--flagfile={COMMON}")
    for name in (
        "dataset",
        "backbone",
        "width",
        "stem",
        "total_epochs",
        "batch_size",
        "lr_schedule",
        "sgd_momentum",
        "image_size",
        "eval_keep",
        "knn_k",
        "knn_temperature",
    ):
        assert getattr(config, name) == getattr(common, name), name
    for view in views_of(config).values():
        assert (view.size, view.min_area, view.max_area) == (32, 0.2, 1)
        assert view.jitter == (0.4, 0.4, 0.4, 0.1)
        assert (view.jitter_probability, view.gray, view.blur) == (0.8, 0.2, 0)
    if hasattr(config.options, "queue_size") and config.method != "byol":
        assert config.options.queue_size == 4096
    if hasattr(config.options, "key_momentum"):
        assert config.options.key_momentum == 0.99
    # Without shuffled keys, statistics of parts of the batch would reveal
    # which images of the batch are negatives.
    shuffles = config.method in ("moco", "clsa", "looc", "cacr_moco")
    assert config.batch_norm == ("split" if shuffles else "sync")


def test_moco_v1_and_v2_differ_as_published():
    one, two = recipe("moco_v1"), recipe("moco_v2")
    assert (one.options.head.layers, two.options.head.layers) == (1, 2)
    assert (one.options.temperature, two.options.temperature) == (0.07, 0.2)
    assert (one.options.gray_first, two.options.gray_first) == (True, False)
    for view in views_of(one).values():
        assert view.jitter == (0.4,) * 4
        assert (view.jitter_probability, view.blur) == (1, 0)
    for view in views_of(two).values():
        assert view.jitter == (0.4, 0.4, 0.4, 0.1)
        assert (view.jitter_probability, view.blur) == (0.8, 0.5)
    rate = make_schedule(one, steps_per_epoch=5_004)
    rates = [float(rate(5_004 * epoch)) for epoch in (0, 119, 120, 159, 160)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003])


@pytest.mark.parametrize(
    "name, peak",
    [
        ("simclr", 4.8),
        ("simclr_v2", 4.8),
        ("simclr_ddm", 4.8),
        ("byol", 3.2),
        ("byol_ddm", 3.2),
        ("cacr_mocov3", 4.8),
    ],
)
def test_large_batches_have_the_published_learning_rates(name, peak):
    config = recipe(name)
    rate = make_schedule(config, steps_per_epoch=312)
    end = 312 * config.total_epochs
    middle = 312 * (10 + config.total_epochs) // 2
    steps = (0, 1_560, 3_120, middle, end - 1)
    assert [float(rate(step)) for step in steps] == pytest.approx(
        [0, peak / 2, peak, peak / 2, 0], abs=1e-5 * peak
    )
    assert (config.batch_size, config.optimizer) == (4096, "lars")
    assert (config.batch_norm, config.l2_on) == ("sync", "kernels")


def test_byol_and_moco_v3_raise_the_momentum():
    for name, start in (
        ("byol", 0.996),
        ("byol_ddm", 0.996),
        ("cacr_mocov3", 0.996),
        ("cifar10/byol", 0.99),
        ("cifar10/cacr_mocov3", 0.99),
    ):
        options = recipe(name).options
        assert options.key_momentum == start
        assert options.key_momentum_schedule == "cosine"
    assert recipe("moco_v2").options.key_momentum_schedule == "constant"


def test_byol_presets_in_comments_are_as_published():
    text = (CONFIGS / "byol.flags").read_text()
    presets = re.findall(r"^#\s+(--total_epochs=.*)$", text, re.M)
    found = [
        parse("--flagfile=configs/byol.flags", *preset.split())
        for preset in presets
    ]
    assert [
        (x.total_epochs, x.base_lr, x.l2, x.options.key_momentum)
        for x in [recipe("byol"), *found]
    ] == [
        (1000, 0.2, 1.5e-6, 0.996),
        (300, 0.3, 1e-6, 0.99),
        (100, 0.45, 1e-6, 0.99),
        (40, 0.45, 1e-6, 0.97),
    ]
    # The published warm-up is the same for all lengths.
    assert {x.warmup_epochs for x in found} == {10}


@pytest.mark.parametrize("name", ["byol", "cacr_mocov3"])
def test_only_one_of_two_views_is_always_blurred(name):
    one, two = views_of(recipe(name)).values()
    assert (one.blur, one.solarize) == (1, 0)
    assert (two.blur, two.solarize) == (0.1, 0.2)


@pytest.mark.parametrize(
    "name, base",
    [
        ("simclr_ddm", "simclr"),
        ("byol_ddm", "byol"),
        ("cifar10/simclr_ddm", "cifar10/simclr"),
        ("cifar10/byol_ddm", "cifar10/byol"),
    ],
)
def test_divergence_adds_a_strong_view_and_nothing_else(name, base):
    config, base = recipe(name), recipe(base)
    taught = views_of(config)
    strong = taught.pop("strong_0")
    assert taught == views_of(base)
    clsa = recipe("cifar10/clsa" if "cifar10" in name else "clsa")
    like = views_of(clsa)["strong_0"]
    assert (strong.size, strong.strong_ops) == (like.size, like.strong_ops)
    assert config.options.ddm_weight == 1
    assert config.options.ddm_temperature == clsa.options.ddm_temperature
    plain = config.replace(
        ddm_weight=0.0,
        workdir=base.workdir,
        **{
            option: getattr(base.options, option)
            for option in ("ddm_temperature", "strong_crops", "queue_size")
            if hasattr(base.options, option)
        },
    )
    assert plain == base


def test_naive_use_of_strong_views_has_no_divergence():
    for folder in ("", "cifar10/"):
        options = recipe(f"{folder}clsa_strong_naive").options
        assert (options.ddm_weight, options.strong_contrast) == (0, True)
        assert options.contrasts == 2


def test_looc_and_looc_plus_differ_only_in_their_features():
    one, two = recipe("looc"), recipe("looc_plus")
    assert (one.options.concatenate, two.options.concatenate) == (False, True)
    assert two == one.replace(concatenate_heads=True, workdir=two.workdir)
    assert one.options.heads == 3


def test_clsa_flagfile_equals_the_defaults():
    config = parse("--flagfile=configs/clsa.flags")
    assert config == config_lib.default(
        dataset="imagenet2012", workdir="runs/clsa"
    )


def test_multicrop_has_five_weak_and_five_strong_views():
    config = parse("--flagfile=configs/clsa_multicrop.flags")
    views = methods.load("clsa").METHOD.views(config.options)
    assert [(v.name, v.size) for v in views] == (
        [("key", 224)]
        + [(f"query_{i}", s) for i, s in enumerate((224, 192, 160, 128, 96))]
        + [(f"strong_{i}", s) for i, s in enumerate((224, 192, 160, 128, 96))]
    )
    assert [v.shuffle for v in views] == [True] + 10 * [False]


def test_swav_crops_are_two_large_and_six_small_ones():
    config = recipe("clsa_swav_crops")
    weak = [v for v in views_of(config).values() if not v.strong_ops]
    assert [(v.size, v.min_area, v.max_area) for v in weak] == (
        2 * [(224, 0.14, 1)] + 6 * [(96, 0.05, 0.14)]
    )
    options = config.options
    assert (options.over_crops, options.join_crops) == ("mean", True)
    # Both large crops are keys, for each other and for all small crops.
    assert options.symmetric
    assert recipe("clsa_multicrop").options.over_crops == "sum"


def test_cacr_has_five_views():
    for name in ("cacr", "cacr_moco", "cifar10/cacr", "cifar10/cacr_moco"):
        assert len(views_of(recipe(name))) == 5
    assert recipe("cacr").options.repulsion_sharpness == 0.9
    assert recipe("cacr_moco").options.repulsion_sharpness == 2


def test_a_flag_after_the_flagfile_overrides_it():
    config = parse("--flagfile=configs/clsa.flags", "--dataset=cifar10")
    assert config.dataset == "cifar10"


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--jit_compile", True),
        ("--jit_compile=true", True),
        ("--nojit_compile", False),
        ("--jit_compile=0", False),
    ],
)
def test_switches_need_no_value(argument, value):
    # The next argument is another flag.
    config = parse(argument, "--dataset=cifar10")
    assert (config.jit_compile, config.dataset) == (value, "cifar10")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--batch_size=many", ["'many'"]),
        ("--batch_size=1", [" 2,", "received 1 "]),
        ("--base_lr=0", [" 0.0,", "received 0.0 "]),
        ("--sgd_momentum=1", [" 1.0,", "received 1.0 "]),
        ("--temperature=0", [" 0.0,", "received 0.0 "]),
        ("--backbone=resnet9", ["resnet18, resnet34", "'resnet9'"]),
        ("--query_crops=224", ["size:min_area:max_area", "'224'"]),
        ("--query_crops=8:0.9:0.1", ["'8:0.9:0.1'"]),
        ("--download=perhaps", ["true or false", "'perhaps'"]),
        ("--method=mocov9", ["clsa, looc, moco", "'mocov9'"]),
        ("--gray=1.5", [" 1.0,", "received 1.5 "]),
        ("--key_momentum=-1", [" 0.0,", "received -1.0 "]),
        ("--ddm_temperature=0", [" 0.0,", "received 0.0 "]),
        ("--ddm_weight=-2", [" 0.0,", "received -2.0 "]),
        ("--strong_level=11", [" 10,", "received 11 "]),
        ("--over_crops=max", ["sum, mean", "'max'"]),
        ("--ddm_teacher=both", ["online, momentum", "'both'"]),
        ("--augmentations=blur", ["rotation", "'blur'"]),
        ("--jitter=strong", ["'strong'"]),
        ("--crops=0x32:0.2:1", ["100", "'0x32:0.2:1'"]),
    ],
)
def test_wrong_values_are_rejected_with_the_expected_ones(argument, words):
    with pytest.raises(FlagError) as error:
        parse(argument)
    for word in [argument.partition("=")[0], *words]:
        assert word in str(error.value)


def test_a_misspelt_flag_gets_a_suggestion():
    with pytest.raises(FlagError, match=r"--batch_size\?"):
        parse("--batchsize=3")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method=moco", "--ddm_weight=2"], ["--ddm_weight", "clsa", "moco"]),
        (["--queue_size=100"], ["--queue_size=100", "256"]),
        (["--queue_size=511", "--symmetric"], ["--queue_size=511", "512"]),
        (["--method=looc", "--queue_size=9"], ["--queue_size=9", "256"]),
        (["--method=cacr_moco", "--queue_size=9"], ["--queue_size=9", "256"]),
        (
            ["--method=byol", "--ddm_weight=1", "--queue_size=9"],
            ["--queue_size=9", "256"],
        ),
        (
            ["--method=byol", "--queue_size=900"],
            ["--queue_size=0", "--ddm_weight", "900"],
        ),
        (["--strong_crops="], ["--ddm_weight=1", "--strong_crops"]),
        (
            ["--method=byol", "--ddm_weight=1", "--strong_crops="],
            ["--ddm_weight=1", "--strong_crops"],
        ),
        (
            ["--strong_contrast", "--ddm_weight=0", "--strong_crops="],
            ["--strong_contrast", "--strong_crops"],
        ),
        (
            ["--method=simclr", "--ddm_weight=1", "--ddm_teacher=momentum"],
            ["--ddm_teacher=online", "received momentum"],
        ),
        (["--query_crops="], ["--query_crops"]),
        (["--method=cacr", "--crops=32:0.2:1"], ["--crops", "1"]),
        (
            ["--method=simclr", "--query_crops=32:0.2:1"],
            ["--query_crops", "--method=simclr", "clsa"],
        ),
        (["--method=byol", "--view_blur=1"], ["--view_blur", "received 1.0"]),
        (
            ["--method=cacr_mocov3", "--view_solarize=0,0,0.2"],
            ["--view_solarize", "0.0,0.0,0.2"],
        ),
        (["--jitter=0.4,0.4,0.4"], ["jitter", "(0.4, 0.4, 0.4)"]),
        (["--jitter=0.4,0.4,0.4,0.9"], ["[0, 0.5]", "0.9"]),
        (
            ["--method=cacr_mocov3", "--local_keys"],
            ["--local_keys", "--local_crops"],
        ),
        (["--method=looc", "--augmentations="], ["--augmentations"]),
        (
            ["--batch_norm=split", "--batch_norm_splits=7"],
            ["--batch_norm_splits", "7", "256"],
        ),
    ],
)
def test_inconsistent_values_are_rejected(arguments, words):
    with pytest.raises(UserError) as error:
        views_of(parse(*arguments))
    message = str(error.value)
    for word in words:
        assert word in message
    # One sentence, which ends with the remedy.
    assert message.startswith("Expected ") and ", received " in message
    assert "; " in message and message.endswith(".") and ". " not in message


def test_differences_ignore_options_that_may_change_on_resume():
    one = config_lib.default(workdir="a")
    same = one.replace(workdir="b", log_steps=3, keep_checkpoints=9)
    other = one.replace(temperature=0.5, seed=4)
    assert config_lib.differences(one, same) == []
    assert config_lib.differences(one, other) == [
        ("seed", "0", "4"),
        ("temperature", "0.2", "0.5"),
    ]


NEW = {
    "whole_epochs": False,
    "exif_rotation": False,
    "more_formats": False,
    "max_image_bytes": 0,
    "max_image_pixels": 0,
}


def begun_before(path, config):
    """Makes a workdir of an earlier version without the flags in `NEW`."""
    path.mkdir()
    (path / "run.flags").write_text(config_lib.to_flagfile(config, without=NEW))
    return str(path)


def test_runs_begun_before_a_flag_keep_their_behaviour(tmp_path):
    config = config_lib.default(workdir=str(tmp_path / "run"))
    assert config.exif_rotation and config.max_image_bytes == 20_000_000
    path = begun_before(tmp_path / "run", config)
    for _ in range(2):  # the same command repeatedly
        assert config_lib.older_in(path) == NEW
        found = config_lib.load(path)
        assert found == config.replace(**NEW)
        assert config_lib.differences(found, found) == []
        other = config_lib.differences(found, config)
        assert {name for name, _, _ in other} == {*NEW}
        with workdir.claim(found, images=5):
            pass
    with pytest.raises(UserError, match="exif_rotation"):
        workdir.claim(found.replace(exif_rotation=True), images=5)
    # A new run records all flags.
    with workdir.claim(config.replace(workdir=str(tmp_path / "new")), images=5):
        pass
    assert config_lib.older_in(str(tmp_path / "new")) == {}


def test_a_flag_that_a_run_was_begun_without_has_its_default(tmp_path):
    """This holds for every flag that the library adds in future."""
    config = config_lib.default(workdir=str(tmp_path))
    lines = config_lib.to_flagfile(config).splitlines(keepends=True)
    added = ("--lr_per=", "--join_crops=", "--stem=")
    kept = [line for line in lines if not line.startswith(added)]
    assert len(kept) == len(lines) - 3
    (tmp_path / "run.flags").write_text("".join(kept))
    with workdir.claim(config, images=5) as claim:
        assert claim.changes == []
    (tmp_path / "run.flags").write_text("".join(kept))
    with pytest.raises(UserError, match="--lr_per=step instead of epoch"):
        workdir.claim(config.replace(lr_per="step"), images=5)


def test_the_version_that_wrote_unknown_flags_is_named(tmp_path):
    config = config_lib.default(workdir=str(tmp_path))
    with workdir.claim(config, images=5):
        text = (tmp_path / "run.flags").read_text() + "--of_the_future=1\n"
    assert text.startswith(f"# clsa_tf {clsa_tf.__version__}\n--")
    newer = text.replace(clsa_tf.__version__, "7.8.9", 1)
    older = text.split("\n", 1)[1]
    for written, version in ((newer, "7.8.9"), (older, "0.1.0")):
        (tmp_path / "run.flags").write_text(written)
        for use in (
            lambda: config_lib.load(str(tmp_path)),
            lambda: workdir.claim(config, images=5),
        ):
            with pytest.raises(UserError) as error:
                use()
            for word in (version, "--of_the_future", clsa_tf.__version__):
                assert word in str(error.value)


def test_a_resumed_run_keeps_its_recorded_flags(tmp_path, monkeypatch):
    config = config_lib.default(workdir=str(tmp_path / "run"))
    begun_before(tmp_path / "run", config)
    used = []
    monkeypatch.setattr(
        run_lib, "_Run", lambda x: used.append(x) or mock.Mock()
    )
    train.run(config)
    train.run(config.replace(workdir=str(tmp_path / "new")))
    assert used[0] == config.replace(**NEW)
    assert used[1].exif_rotation and used[1].max_image_pixels == 50_000_000


def test_load_rejects_missing_and_unknown_flags(tmp_path):
    with pytest.raises(UserError, match="--workdir"):
        config_lib.load(str(tmp_path))
    (tmp_path / "run.flags").write_text("--no_such_flag=1\n")
    with pytest.raises(UserError, match="run.flags.* --no_such_flag"):
        config_lib.load(str(tmp_path))


def test_every_flag_has_a_help_text():
    values = flags.FlagValues()
    config_lib.define_flags(values)
    for name in values:
        assert len(values[name].help) > 8, name
