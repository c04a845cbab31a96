import glob

import pytest
from absl import flags

from clsa_tf import config as config_lib
from clsa_tf import methods
from clsa_tf.errors import UserError
from clsa_tf.options import Crop

FLAGFILES = sorted(glob.glob("configs/*.flags"))


def parse(*arguments):
    values = flags.FlagValues()
    config_lib.define_flags(values)
    values(["program", *arguments], known_only=False)
    return config_lib.from_flags(values)


def test_defaults_are_the_published_recipe():
    config = parse()
    assert config.options.query_crops == (Crop(224, 0.2, 1.0),)
    assert config.options.strong_crops == (Crop(96, 0.086, 0.429),)
    assert (config.batch_size, config.total_epochs) == (256, 200)
    assert config == config_lib.default()


@pytest.mark.parametrize("path", FLAGFILES)
def test_flagfiles_are_read_and_round_trip(path):
    config = parse(f"--flagfile={path}")
    text = config_lib.to_flagfile(config)
    assert parse(*text.split("\n")[:-1]) == config
    with open(path) as file:
        assert file.read().startswith("# ")  # says what it is


def test_command_of_record_spells_the_defaults():
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
    # What follows is a flag of its own.
    config = parse(argument, "--dataset=cifar10")
    assert (config.jit_compile, config.dataset) == (value, "cifar10")


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--batch_size=many", ["batch_size", "whole number", "'many'"]),
        ("--batch_size=1", ["batch_size", "at least 2", "received 1"]),
        ("--base_lr=0", ["base_lr", "above 0", "received 0"]),
        ("--sgd_momentum=1", ["sgd_momentum", "below 1", "received 1"]),
        ("--temperature=0", ["temperature", "above 0"]),
        ("--backbone=resnet9", ["backbone", "resnet18, resnet34", "resnet9"]),
        ("--query_crops=224", ["query_crops", "size:min_area:max_area"]),
        ("--query_crops=8:0.9:0.1", ["query_crops", "min_area <= max_area"]),
        ("--download=perhaps", ["download", "true or false", "'perhaps'"]),
    ],
)
def test_ill_typed_flags_say_what_was_expected(argument, words):
    with pytest.raises(flags.IllegalFlagValueError) as error:
        parse(argument)
    for word in words:
        assert word in str(error.value)


def test_a_misspelt_flag_gets_a_suggestion():
    with pytest.raises(flags.UnrecognizedFlagError, match="batch_size"):
        parse("--batchsize=3")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--method=moco", "--ddm_weight=2"], ["--ddm_weight", "clsa", "moco"]),
        (["--queue_size=100"], ["--queue_size=100", "256"]),
        (
            ["--batch_norm=split", "--batch_norm_splits=7"],
            ["--batch_norm_splits", "7", "256"],
        ),
    ],
)
def test_values_that_do_not_go_together(arguments, words):
    with pytest.raises(UserError) as error:
        parse(*arguments)
    for word in words:
        assert word in str(error.value)


def test_differences_ignore_what_may_change_between_two_starts():
    one = config_lib.default(workdir="a")
    same = one.replace(workdir="b", log_steps=3, keep_checkpoints=9)
    other = one.replace(temperature=0.5, seed=4)
    text = config_lib.to_flagfile
    assert config_lib.differences(text(one), text(same)) == []
    assert config_lib.differences(text(one), text(other)) == [
        ("seed", "0", "4"),
        ("temperature", "0.2", "0.5"),
    ]


def test_load_explains_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="--workdir"):
        config_lib.load(str(tmp_path))
    (tmp_path / "run.flags").write_text("--no_such_flag=1\n")
    with pytest.raises(UserError, match="version"):
        config_lib.load(str(tmp_path))


def test_every_flag_has_a_help_text():
    values = flags.FlagValues()
    config_lib.define_flags(values)
    for name in values:
        assert len(values[name].help) > 8, name
