"""Flagfiles, home directories, similar names, and other lengths of runs."""

import os
import pathlib
import re
import shlex

import pytest
from absl import flags

from clsa_tf import config as config_lib
from clsa_tf import methods, train
from clsa_tf.api.load import load_encoder
from clsa_tf.api.pretrain import make_config
from clsa_tf.cli import flagfiles, other_method, parser
from clsa_tf.cli.parser import FlagError
from clsa_tf.data import open
from clsa_tf.errors import UserError
from export import client, embed, formats, savedmodel, server
from tests import runs

CHECKOUT = pathlib.Path(flagfiles.__file__).parents[2]


def parse(*arguments):
    return config_lib.parse(arguments)


def rejected(*arguments, kind=UserError):
    """Returns the error message, one sentence, for rejected arguments."""
    with pytest.raises(kind) as error:
        parse(*arguments)
    message = str(error.value)
    assert message.startswith("Expected ") and message.endswith(".")
    assert "\n" not in message and ", received " in message
    return message


def values_of(module, *arguments):
    """The flags of a command, parsed."""
    values = flags.FlagValues()
    module.define_flags(values)
    parser.parse(arguments, values)
    return values


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory without `configs`, also the home directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# ---- Files


@pytest.mark.parametrize(
    "name",
    ["clsa", "clsa.flags", "configs/clsa.flags"],
)
def test_recipes_are_found_by_name(elsewhere, name):
    assert parse(f"--flagfile={name}").dataset == "imagenet2012"
    assert parse("--flagfile", name).dataset == "imagenet2012"
    config = make_config("shapes", workdir="run", flagfile=name)
    assert config.backbone == "resnet50"


def test_included_recipes_are_found_from_any_directory(elsewhere):
    # It names configs/cifar10/common.flags.
    config = parse("--flagfile=cifar10/byol_ddm")
    assert (config.method, config.dataset) == ("byol", "cifar10")


def test_all_recipes_are_known():
    files = {p.resolve() for p in (CHECKOUT / "configs").rglob("*.flags")}
    assert {p.resolve() for p in flagfiles.recipes().values()} == files


def test_recipes_of_an_installed_package_are_found(tmp_path, monkeypatch):
    (tmp_path / "configs/small").mkdir(parents=True)
    (tmp_path / "configs/clsa.flags").write_text("--seed=1\n")
    (tmp_path / "configs/small/moco.flags").write_text("--seed=2\n")
    places = (tmp_path / "configs", *flagfiles._PLACES)
    monkeypatch.setattr(flagfiles, "_PLACES", places)
    assert list(flagfiles.recipes()) == ["clsa", "small/moco"]
    monkeypatch.chdir(tmp_path / "configs/small")
    assert parse("--flagfile=small/moco").seed == 2


def test_own_files_precede_recipes(elsewhere):
    pathlib.Path("sub").mkdir()
    pathlib.Path("sub/base.flags").write_text("--seed=3\n// no flag\n\n")
    pathlib.Path("sub/own.flags").write_text(
        "# --seed=9\n--flagfile=base\n  --log_steps=7\n"
    )
    config = parse("--flagfile=sub/own.flags")
    assert (config.seed, config.log_steps) == (3, 7)
    pathlib.Path("clsa.flags").write_text("--seed=4\n")
    assert parse("--flagfile=clsa").seed == 4
    assert parse("--flagfile=~/sub/own").seed == 3
    assert parse("--flagfile=sub/own.flags", "--seed=5").seed == 5
    assert parse("--seed=5", "--flagfile=sub/own.flags").seed == 3
    assert parse("--flagfile=").seed == 0
    # The path of anything that can be opened, here of a pipe.
    read, write = os.pipe()
    os.write(write, b"--seed=6\n")
    os.close(write)
    assert parse(f"--flagfile=/dev/fd/{read}").seed == 6
    os.close(read)


def test_unreadable_flagfiles_are_rejected(elsewhere):
    message = rejected("--flagfile=quickstrat.flags")
    assert "--flagfile=quickstrat.flags" in message
    assert " quickstart? " in message and "cifar10/byol" in message
    pathlib.Path("runs").mkdir()
    assert "received --flagfile=runs;" in rejected("--flagfile=runs")
    pathlib.Path("runs/run.flags").write_text("--seed=1\n")
    assert " runs/run.flags? " in rejected("--flagfile=runs")
    pathlib.Path("a.flags").write_text("--flagfile=b.flags\n")
    pathlib.Path("b.flags").write_text("--flagfile=a.flags\n")
    message = rejected("--flagfile=a.flags")
    assert "a.flags" in message and "b.flags" in message
    pathlib.Path("image.flags").write_bytes(b"\xff\xd8\xff\xe0")
    assert "image.flags" in rejected("--flagfile=image.flags")
    assert "--flagfile=FILE" in rejected("--flagfile")


def test_errors_name_the_file(elsewhere):
    pathlib.Path("own.flags").write_text("--batch_size=x\n")
    message = rejected("--flagfile=own.flags", kind=FlagError)
    for value in ("'x'", "--batch_size", "own.flags"):
        assert value in message
    pathlib.Path("own.flags").write_text("--bath_size=8\n")
    message = rejected("--flagfile=own.flags", kind=FlagError)
    for value in ("--bath_size", "own.flags", "--batch_size?"):
        assert value in message
    # The file is not named for values from the command line.
    pathlib.Path("own.flags").write_text("--batch_size=8\n")
    assert "own" not in rejected("--flagfile=own.flags", "--batch_size=x")


# ---- Home directories


@pytest.mark.parametrize(
    "text, path",
    [
        ("~/x", "{}/x"),
        ("~", "{}"),
        ("folder:~/x", "folder:{}/x"),
        ("tfrecord:~/x-*", "tfrecord:{}/x-*"),
        ("a/~/x", "a/~/x"),
        ("cifar10", "cifar10"),
        ("gs://bucket/~x", "gs://bucket/~x"),
    ],
)
def test_home_directories_in_paths_are_expanded(elsewhere, text, path):
    path = path.format(elsewhere)
    config = parse(
        f"--dataset={text}", f"--eval_dataset={text}", f"--workdir={text}"
    )
    assert (config.dataset, config.eval_dataset) == (path, path)
    assert config.workdir == path
    assert parse("--data_dir", text).data_dir == path


@pytest.mark.parametrize(
    "module, names",
    [
        (savedmodel, ("workdir", "output")),
        (embed, ("encoder", "images", "output")),
        (server, ("model_base_path", "batching_parameters_file")),
    ],
)
def test_home_directories_in_flags_of_other_commands_are_expanded(
    elsewhere, module, names
):
    values = values_of(module, *(f"--{name}=~/x" for name in names))
    assert {values[name].value for name in names} == {f"{elsewhere}/x"}


def test_home_directories_in_python_arguments_are_expanded(elsewhere):
    (elsewhere / "photos").mkdir()
    config = make_config(
        "~/photos", workdir="~/run", data_dir="~/data", flagfile="clsa"
    )
    assert config.dataset == f"folder:{elsewhere}/photos"
    assert config.workdir == f"{elsewhere}/run"
    assert config.data_dir == f"{elsewhere}/data"
    again = make_config(pathlib.Path("~/photos"), workdir=pathlib.Path("~/run"))
    assert (again.dataset, again.workdir) == (config.dataset, config.workdir)
    with pytest.raises(UserError, match=f"{elsewhere}/none"):
        load_encoder("~/none")


# ---- Similar names


@pytest.mark.parametrize(
    "typed, ours",
    [
        ("epochs", "total_epochs"),
        ("lr", "base_lr"),
        ("bs", "batch_size"),
        ("batch", "batch_size"),
        ("output", "workdir"),
        ("data", "dataset"),
        ("name", "workdir"),
        ("weight-decay", "l2"),
        ("batchsize", "batch_size"),
        ("milestones", "lr_milestones"),
    ],
)
def test_common_other_names_get_a_suggestion(typed, ours):
    message = rejected(f"--{typed}=3", kind=FlagError)
    assert f"--{typed};" in message and re.search(rf"--{ours}\b.*\?", message)
    name = typed.replace("-", "_")
    if name == "data":  # in Python the name of the first argument
        return
    with pytest.raises(UserError, match=f"did you mean {ours}"):
        make_config("shapes", workdir="run", **{name: 3})


def test_unlike_names_get_no_suggestion():
    assert "?" not in rejected("--zzzzz=3", kind=FlagError)


def test_every_suggestion_exists():
    values = flags.FlagValues()
    known = {"flagfile", *config_lib.names()}
    for module in (savedmodel, embed, client):
        values = flags.FlagValues()
        module.define_flags(values)
        known |= {*values}
    known |= {"model_base_path", "accelerator", "model_name"}
    for typed, ours in parser._ALIASES.items():
        assert {*ours} <= known, typed


@pytest.mark.parametrize(
    "module, arguments, words",
    [
        (embed, ["--images=a"], ["--encoder and --output"]),
        (client, [], ["--server"]),
        (
            savedmodel,
            ["--workdir=a", "--output=b", "--precision=x"],
            ["float32, mixed_bfloat16, mixed_float16", "'x'", "--precision"],
        ),
        (
            savedmodel,
            ["--workdir=a", "--output=b", "--version=-1"],
            ["non-negative", "'-1'", "--version"],
        ),
        (
            savedmodel,
            ["--workdir=a", "--output=b", "--outputs=x"],
            ["embedding, projection", "'x'", "--outputs"],
        ),
        (
            formats,
            ["--workdir=a", "--output=b", "--formats=keras,tflite"],
            ["'keras,tflite'", "--formats"],
        ),
        (
            server,
            ["--enable_batching=x"],
            ["true or false", "'x'", "--enable_batching"],
        ),
        (server, ["--noport"], ["--noport"]),
        (embed, ["--model=a"], ["--model", "--encoder?"]),
        (savedmodel, ["--workdir"], ["--workdir"]),
        (savedmodel, ["somewhere"], ["'somewhere'"]),
    ],
)
def test_wrong_flags_of_other_commands_are_rejected(module, arguments, words):
    with pytest.raises(FlagError) as error:
        values_of(module, *arguments)
    message = str(error.value)
    for word in words:
        assert word in message
    assert message.endswith(".") and "; " in message and "\n" not in message


# ---- A recipe and another method


@pytest.mark.parametrize(
    "recipe, method, better",
    [
        ("clsa", "byol", "byol.flags"),
        ("configs/cifar10/clsa.flags", "simclr", "cifar10/simclr.flags"),
        ("cifar10/byol", "moco", "cifar10/moco.flags"),
        ("clsa", "moco", "moco_v1.flags"),
        ("quickstart", "byol", "cifar10/byol.flags"),
    ],
)
def test_another_method_than_the_recipe_s_gets_a_suggestion(
    recipe, method, better
):
    message = rejected(
        f"--flagfile={recipe}",
        f"--method={method}",
        "--dataset=folder:/my photos",
        "--data_dir=there",
        "--workdir=runs/photos",
    )
    assert f"--method={method}" in message
    assert recipe.removesuffix(".flags") + ".flags" in message
    (command,) = re.findall("`(.*)`", message)
    assert command == (
        f"--flagfile={better} '--dataset=folder:/my photos' "
        "--data_dir=there --workdir=runs/photos"
    )
    assert parse(*shlex.split(command)).method == method


def test_another_recipe_keeps_the_data_and_no_flag_of_other_methods():
    message = rejected(
        "--flagfile=quickstart",
        "--method=byol",
        "--temperature=0.3",
        "--total_epochs=9",
    )
    (command,) = re.findall("`(.*)`", message)
    assert command == (
        "--flagfile=cifar10/byol.flags --dataset=shapes --data_dir=runs/data "
        "--total_epochs=9"
    )
    assert "--temperature" in message.partition(f"`{command}`")[2]
    config = parse(*shlex.split(command))
    assert (config.method, config.dataset) == ("byol", "shapes")


@pytest.mark.slow
def test_the_suggested_command_is_complete():
    words = ["--flagfile=clsa", "--method=byol", "--workdir=my run"]
    result = runs.call(runs.command("clsa_tf.train", *words), status=1)
    assert (
        " -m clsa_tf.train --flagfile=byol.flags '--workdir=my run'`"
        in result.stderr
    )


def test_all_foreign_flags_are_named_at_once():
    message = rejected("--flagfile=quickstart", "--method=byol")
    assert "quickstart.flags" in message and "clsa" in message
    for name in ("key_crop", "query_crops", "temperature"):
        assert f"--{name}" in message
    assert "--batch_size" not in message


def test_a_typed_flag_of_another_method_is_rejected():
    message = rejected("--flagfile=moco_v2", "--ddm_weight=2")
    for value in ("--method=moco", "moco_v2.flags", "--ddm_weight"):
        assert value in message
    assert "byol and clsa" in message


def test_a_flagfile_without_a_method_has_flags_of_the_default_method(tmp_path):
    (tmp_path / "x.flags").write_text("--view_solarize=0,0.2\n")
    message = rejected(f"--flagfile={tmp_path / 'x.flags'}")
    assert "--method=clsa" in message and "--view_solarize" in message
    assert "`" not in message  # no other recipe is suggested


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("like", ["clsa", "cifar10/clsa"])
def test_every_method_has_a_recipe_to_suggest(method, like):
    values = flags.FlagValues()
    config_lib.define_flags(values)
    parser.parse([f"--method={method}"], values)
    path = flagfiles.recipes()[like]
    name = other_method.recipe_for(values, like=path)
    assert parse(f"--flagfile={name}").method == method
    assert name.startswith("cifar10/") == ("cifar10" in like)


def test_errors_about_two_recipes_name_the_file_of_each_flag():
    with pytest.raises(UserError) as error:
        parse("--flagfile=clsa", "--flagfile=byol")
    message = str(error.value)
    assert re.search(r"\S*byol.flags with --method=byol ", message)
    assert re.search(r"\S*clsa.flags with --temperature", message)
    assert "`" not in message  # no other recipe is suggested


def test_flags_that_a_flagfile_overrides_cause_a_warning(capsys):
    assert parse("--seed=5", "--batch_size=64", "--flagfile=clsa").seed == 5
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ")
    for value in ("--batch_size=64", "--flagfile=", "256"):
        assert value in line
    assert parse("--flagfile=clsa", "--batch_size=64").batch_size == 64
    assert parse("--batch_size=256", "--flagfile=clsa").batch_size == 256
    assert capsys.readouterr().out == ""


# ---- Other lengths


@pytest.mark.parametrize(
    "epochs, milestones",
    [
        (30, (18, 24)),
        (400, (240, 320)),
        (100, (60, 80)),
        (3, (2,)),
        (2, (1,)),
    ],
)
def test_milestones_move_with_the_length(capsys, epochs, milestones):
    config = parse("--flagfile=moco_v1", f"--total_epochs={epochs}")
    assert config.lr_milestones == milestones
    assert config.lr_schedule == "steps"
    (line,) = capsys.readouterr().out.splitlines()
    spelled = ",".join(map(str, milestones))
    assert f"{epochs} epochs" in line and "200" in line
    assert f"--lr_milestones 120,160 -> {spelled}" in line


def test_one_epoch_has_no_milestones(capsys):
    config = parse("--flagfile=moco_v1", "--total_epochs=1")
    assert (config.lr_milestones, config.lr_schedule) == ((), "constant")
    assert "--lr_schedule steps -> constant" in capsys.readouterr().out


def test_a_warm_up_shrinks_and_does_not_grow(capsys):
    def warm_up(*arguments):
        return parse("--flagfile=byol", *arguments).warmup_epochs

    assert warm_up("--total_epochs=30") == 0.3
    assert "--warmup_epochs 10.0 -> 0.3" in capsys.readouterr().out
    assert warm_up("--total_epochs=2000") == 10
    assert warm_up() == warm_up("--total_epochs=1000") == 10
    assert capsys.readouterr().out == ""
    # From a file that includes the one with the length.
    config = parse("--flagfile=cifar10/byol", "--total_epochs=20")
    assert config.warmup_epochs == 1


def test_typed_values_are_not_scaled(capsys):
    config = parse(
        "--flagfile=moco_v1", "--total_epochs=30", "--lr_milestones=20,25"
    )
    assert config.lr_milestones == (20, 25)
    config = parse("--flagfile=byol", "--total_epochs=30", "--warmup_epochs=5")
    assert config.warmup_epochs == 5
    assert capsys.readouterr().out == ""
    message = rejected(
        "--flagfile=moco_v1", "--total_epochs=30", "--lr_milestones=20,40"
    )
    assert "20,40" in message
    # Only typed flags: there is no recipe to scale.
    assert "--warmup_epochs" in rejected(
        "--total_epochs=10", "--warmup_epochs=20"
    )


def test_files_with_their_own_length_are_scaled(elsewhere, capsys):
    own = pathlib.Path("own.flags")
    own.write_text("--flagfile=moco_v1\n--total_epochs=30\n")
    assert parse("--flagfile=own").lr_milestones == (18, 24)
    assert parse("--flagfile=own", "--total_epochs=10").lr_milestones == (6, 8)
    capsys.readouterr()
    own.write_text(
        "--flagfile=moco_v1\n--lr_milestones=20,25\n--total_epochs=30\n"
    )
    assert parse("--flagfile=own").lr_milestones == (20, 25)
    assert capsys.readouterr().out == ""
    config = parse("--flagfile=own", "--total_epochs=60")
    assert config.lr_milestones == (40, 50)


def test_another_schedule_drops_the_milestones(capsys):
    config = parse("--flagfile=moco_v1", "--lr_schedule=cosine")
    assert (config.lr_schedule, config.lr_milestones) == ("cosine", ())
    line = capsys.readouterr().out
    assert line.startswith("--lr_schedule=cosine: --lr_milestones 120,160 -> ")
    # Typed milestones are still an error.
    rejected("--lr_schedule=cosine", "--lr_milestones=20")


def test_a_warm_up_ends_before_the_first_milestone():
    config = parse(
        "--flagfile=moco_v1", "--warmup_epochs=4", "--total_epochs=6"
    )
    assert config.lr_milestones == (5,)


@pytest.mark.parametrize("name", flagfiles.recipes())
@pytest.mark.parametrize("epochs", [1, 2, 5, 30, 5000])
def test_every_recipe_can_have_any_length(name, epochs):
    config = parse(f"--flagfile={name}", f"--total_epochs={epochs}")
    assert config.total_epochs == epochs
    # The flagfile in the run's directory is complete.
    again = parse(*config_lib.to_flagfile(config).splitlines())
    assert again == config


# ---- First commands


def test_rejected_commands_write_nothing(elsewhere):
    config = parse()
    with pytest.raises(UserError, match="--dataset and --workdir") as error:
        train.check_required(config)
    for command in re.findall("clsa_tf.train (.*)", str(error.value)):
        train.check_required(parse(*command.split()))
    with pytest.raises(UserError, match="--workdir, received none"):
        train.check_required(parse("--dataset=cifar10"))
    # ImageNet's crops with the small embedded images, which are not generated.
    with pytest.raises(UserError, match="at least 224 px.* 64x64 .*quickstart"):
        train.run(parse("--dataset=shapes", "--workdir=run"))
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["{}/photos", "photos", "./photos", "~/photos"]
)
def test_folders_without_the_prefix_are_rejected(elsewhere, name):
    (elsewhere / "photos").mkdir()
    path = parse(f"--dataset={name.format(elsewhere)}").dataset
    with pytest.raises(UserError, match=f"write folder:{path}"):
        open.open_source(path, data_dir="data")


@pytest.mark.parametrize(
    "dataset",
    ["s3://bucket/x", "http://host/photos", "tfrecord:s3://bucket/x-*"],
)
def test_schemes_that_cannot_be_read_are_rejected(elsewhere, dataset):
    words = "s3://bucket/x|http://host/photos"
    with pytest.raises(UserError, match=rf"received.*({words}).*(scheme|File)"):
        open.open_source(dataset, data_dir="data")


@pytest.mark.parametrize(
    "name, near",
    [
        ("cifar-10", "cifar10"),
        ("cifar_10", "cifar10"),
        ("imagenet", "imagenet2012"),
        ("imagenet-1k", "imagenet2012"),
    ],
)
def test_similar_names_of_datasets_are_suggested(elsewhere, name, near):
    with pytest.raises(UserError, match=f"; use .*{near}"):
        open.open_source(name, data_dir="data")


@pytest.mark.parametrize("name", ["photos", "pictures", "my_images"])
def test_unlike_names_of_datasets_get_no_suggestion(elsewhere, name):
    with pytest.raises(UserError, match="; correct the name, or"):
        open.open_source(name, data_dir="data")
