"""One configuration, two spellings: a frozen dataclass and a flagfile.

`Config` holds what every run has; each method adds the dataclass `Options` of
its own file. Every field is a flag of the same name, defined here and nowhere
else, and `to_flagfile` writes a configuration that `--flagfile` reads back.
"""

import copy
import dataclasses
import os
import typing
import zlib

from absl import flags

from clsa_tf import methods
from clsa_tf.cli import other_method, parser, recipe_length
from clsa_tf.data import service_client
from clsa_tf.data.headers import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from clsa_tf.distributed.strategy import STRATEGIES
from clsa_tf.errors import UserError
from clsa_tf.networks.backbones.resnet import BLOCKS, STEMS
from clsa_tf.networks.batchnorm import KINDS
from clsa_tf.networks.precision import PRECISIONS
from clsa_tf.optimizers.optimizers import L2_ON, OPTIMIZERS
from clsa_tf.optimizers.schedule import (
    LR_PER,
    LR_SCALINGS,
    SCHEDULES,
    check_schedule,
)
from clsa_tf.options.fields import AUTO, option
from clsa_tf.options.flags import Flag, spell

# Within the run's directory: the flagfile that repeats it.
RUN_FLAGS = "run.flags"


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is. `option`s of a method are in `options`."""

    # Data
    dataset: str = option(
        "",
        "what to train on, always to be named: folder:/photos, a name of "
        "tensorflow-datasets (cifar10, imagenet2012, the embedded shapes), the "
        "directory of a prepared one, or tfrecord:gs://bucket/train-*",
        on_resume="to another path of the same images",
        group="data",
        path=True,
    )
    split: str = option(
        "train",
        "split of a tensorflow-datasets dataset to train on",
        group="data",
    )
    eval_dataset: str = option(
        "",
        "labelled dataset for the kNN evaluation, spelled as --dataset; empty: "
        "the training dataset's own. Neighbours are training images if these "
        "have the same classes; otherwise those of the evaluation dataset's "
        "own training split or, where it has none, each of its images is "
        "classified by all others",
        on_resume="to another path of the same images",
        group="evaluation",
        path=True,
    )
    eval_split: str = option(
        "",
        "split of the evaluation dataset; empty: test or validation, "
        "whichever exists",
        group="evaluation",
    )
    data_dir: str = option(
        "",
        "directory of prepared tensorflow-datasets; empty: $TFDS_DATA_DIR or "
        "~/tensorflow_datasets",
        mutable_on_resume=True,
        group="data",
        path=True,
    )
    download: bool = option(
        False,
        "let tensorflow-datasets download a missing dataset",
        mutable_on_resume=True,
        group="data",
    )
    labels: str = option(
        "auto",
        "labels of --dataset: auto (of a folder: the names of its first-level "
        "directories) or none",
        choices=("auto", "none"),
        group="data",
    )
    holdout: float = option(
        0.1,
        "share, in [0, 1), of a labelled folder without test directory that is "
        "kept out of training for the kNN evaluation",
        minimum=0.0,
        below=1.0,
        group="data",
    )
    num_examples: int = option(
        0,
        "records in the files of a tfrecord: pattern; 0: count them",
        minimum=0,
        group="data",
    )
    max_bad_share: float = option(
        0.05,
        "share, in [0, 1], of unreadable images above which the run stops",
        minimum=0.0,
        maximum=1.0,
        mutable_on_resume=True,
        group="data",
    )
    exif_rotation: bool = option(
        True,
        "of a folder: turn photographs upright as their EXIF data say",
        before=False,
        group="data",
    )
    more_formats: bool = option(
        True,
        "of a folder: also read WebP, TIFF, HEIC and AVIF files, and images "
        "whose names do not say that they are; otherwise only .jpg .jpeg .png "
        ".bmp .gif",
        before=False,
        group="data",
    )
    max_image_bytes: int = option(
        MAX_IMAGE_BYTES,
        "largest image file, in bytes; larger ones are left out as unreadable; "
        "0: no limit",
        minimum=0,
        before=0,
        group="data",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "largest image, in pixels, height times width; larger ones are left "
        "out as unreadable before they are decoded; 0: no limit",
        minimum=0,
        before=0,
        group="data",
    )
    allow_upscaling: bool = option(
        False,
        "accept crops larger than the images",
        mutable_on_resume=True,
        group="views",
    )
    augment_on: str = option(
        "host",
        "where views are made after decoding, cropping and resizing: on the "
        "host, or on the device, within the training step; a device with time "
        "to spare relieves a host that cannot keep up",
        choices=("host", "device"),
        mutable_on_resume=True,
        group="views",
    )
    data_service: str = option(
        "",
        "tf.data services that read the images and make the views instead of "
        "this process, with the same result: grpc://host:port as printed by "
        "`python -m clsa_tf.data_service`, several separated by commas; they "
        "have to see the dataset under the same paths",
        mutable_on_resume=True,
        group="data",
    )
    whole_epochs: bool = option(
        True,
        "end each epoch with its last whole batch, as published, so that no "
        "batch holds an image twice; otherwise a batch may continue into the "
        "next epoch",
        before=False,
        group="data",
    )
    prefetch_batches: int = option(
        2,
        "finished batches that the host keeps ready, in memory",
        minimum=1,
        mutable_on_resume=True,
        group="data",
    )
    # What is learned
    method: str = option(
        "clsa",
        "method of learning; --list_methods describes them",
        choices=methods.names,
    )
    backbone: str = option(
        "resnet50",
        "architecture of the encoder",
        choices=tuple(BLOCKS),
        group="network",
    )
    width: float = option(
        1.0,
        "factor, in [1/16, 4], on the channels of the backbone",
        minimum=1 / 16,
        maximum=4,
        group="network",
    )
    stem: str = option(
        "imagenet",
        "first layers: imagenet (stride 4), small (stride 1, for about 32 px)",
        choices=STEMS,
        group="network",
    )
    batch_norm: str = option(
        AUTO,
        "statistics of: each replica (local), the global batch (sync), or "
        "--batch_norm_splits parts of the global batch (split), on as many or "
        "fewer replicas; of each micro-batch with --accumulation_steps; auto: "
        "as the method needs, for methods with a queue local on several "
        "replicas and split on one, for the others sync",
        choices=(AUTO, *KINDS),
        published="local",
        group="network",
    )
    batch_norm_splits: int = option(
        AUTO,
        "parts for --batch_norm=split; divides the global batch, and is a "
        "multiple of replicas x --accumulation_steps; auto: up to 8 parts of "
        "at least 32 images",
        minimum=1,
        published=8,
        group="network",
    )
    # How it is learned
    total_epochs: int = option(
        200,
        "passes over the dataset",
        minimum=1,
        group="optimization",
        on_resume="to a larger number",
    )
    batch_size: int = option(
        256,
        "images per step, over all replicas",
        minimum=2,
        group="optimization",
    )
    optimizer: str = option(
        "sgd",
        "optimizer; lars or lamb for batches of thousands",
        choices=OPTIMIZERS,
        group="optimization",
    )
    base_lr: float = option(
        0.03,
        "learning rate per 256 images of --batch_size, see --lr_scaling; the "
        "highest of the run",
        above=0.0,
        group="optimization",
    )
    lr_scaling: str = option(
        "linear",
        "the learning rate is --base_lr times: --batch_size / 256 (linear), "
        "the root of --batch_size (sqrt), or 1 (none)",
        choices=tuple(LR_SCALINGS),
        group="optimization",
    )
    lr_schedule: str = option(
        "cosine",
        "learning rate after the warm-up: falls to 0 along half a cosine, to "
        "a tenth at each of --lr_milestones (steps), or stays (constant)",
        choices=SCHEDULES,
        group="optimization",
        on_resume="with a larger --total_epochs",
    )
    lr_per: str = option(
        "epoch",
        "when the cosine advances: every epoch (as in CLSA and MoCo) or every "
        "step",
        choices=LR_PER,
        group="optimization",
    )
    lr_milestones: tuple[int, ...] = option(
        (),
        "epochs, from the start of the run, for --lr_schedule=steps, such as "
        "120,160",
        group="optimization",
        on_resume="with a larger --total_epochs",
    )
    warmup_epochs: float = option(
        0.0,
        "epochs, or parts of one, in which the learning rate first rises "
        "linearly from 0",
        minimum=0.0,
        group="optimization",
        on_resume="with a larger --total_epochs",
    )
    sgd_momentum: float = option(
        0.9,
        "momentum of sgd and lars, in [0, 1)",
        minimum=0.0,
        below=1.0,
        group="optimization",
    )
    l2: float = option(
        1e-4,
        "coefficient of the weights: in the gradient (coupled L2; sgd, and "
        "lars before its trust ratio), in the update (lamb, before its trust "
        "ratio), or, times the learning rate, the share of them that each "
        "step takes off (adamw)",
        minimum=0.0,
        group="optimization",
    )
    l2_on: str = option(
        "all",
        "what --l2 acts on: all weights (as CLSA and MoCo publish) or kernels, "
        "without normalisation and biases (as SimCLR and BYOL do); lars acts "
        "on kernels whatever this says",
        choices=L2_ON,
        group="optimization",
    )
    seed: int = option(
        0,
        "seed of all random numbers",
        minimum=0,
        group="run",
    )
    precision: str = option(
        "float32",
        "numbers that convolutions are computed in: float32, bfloat16, float16 "
        "with loss scaling, or bfloat16 where the processor or accelerator "
        "supports it (auto); everything else is float32",
        choices=PRECISIONS,
        group="network",
    )
    accumulation_steps: int = option(
        1,
        "micro-batches that each replica's share of the batch goes through "
        "one after the other, for batches larger than its memory",
        minimum=1,
        group="optimization",
    )
    # Evaluation and export
    image_size: int = option(
        224,
        "side of images for evaluation and export, in px",
        minimum=8,
        group="evaluation",
    )
    eval_keep: float = option(
        0.875,
        "share, in (0, 1], of the short side that the centre crop for "
        "evaluation and export keeps",
        above=0.0,
        maximum=1.0,
        group="evaluation",
    )
    knn_epochs: int = option(
        1,
        "epochs between kNN evaluations; 0: none",
        minimum=0,
        mutable_on_resume=True,
        group="evaluation",
    )
    knn_k: int = option(
        200,
        "k, nearest neighbours that vote in the evaluation",
        minimum=1,
        mutable_on_resume=True,
        group="evaluation",
    )
    knn_temperature: float = option(
        0.1,
        "T of the neighbours' weights exp(cosine / T)",
        above=0.0,
        mutable_on_resume=True,
        group="evaluation",
    )
    knn_bank: int = option(
        50_000,
        "images that the neighbours are taken from, at most",
        minimum=1,
        mutable_on_resume=True,
        group="evaluation",
    )
    # Where and with what
    workdir: str = option(
        "",
        "directory of the run, for checkpoints, metrics and pictures; always "
        "to be named",
        mutable_on_resume=True,
        group="run",
        path=True,
    )
    init_from: str = option(
        "",
        "weights that a new run starts from: the directory of another run, an "
        "exported version or an encoder.keras; empty: random ones. A run that "
        "is resumed ignores it",
        on_resume="without effect",
        group="run",
        path=True,
    )
    init_what: str = option(
        "encoder",
        "what --init_from takes: encoder (backbone, and heads if they fit), or "
        "all of another run of the same method that fits: momentum encoder, "
        "predictor and queue, too. Step and optimizer always start at zero",
        choices=("encoder", "all"),
        on_resume="without effect",
        group="run",
    )
    strategy: str = option(
        "auto",
        "devices: one, all GPUs of the machine (mirrored), several machines "
        "(multiworker, by TF_CONFIG or SLURM), a TPU, or what there is (auto)",
        choices=STRATEGIES,
        mutable_on_resume=True,
        group="run",
    )
    tpu: str = option(
        "",
        "name or address of the TPU, local on a TPU VM; for --strategy=tpu",
        mutable_on_resume=True,
        group="run",
    )
    jit_compile: bool = option(
        False,
        "compile the whole training step with XLA: for GPUs (TPUs always do); "
        "slower on CPUs",
        mutable_on_resume=True,
        group="run",
    )
    log_steps: int = option(
        50,
        "steps between lines of metrics.jsonl",
        minimum=1,
        mutable_on_resume=True,
        group="run",
    )
    checkpoint_steps: int = option(
        0,
        "steps between checkpoints; 0: one per epoch",
        minimum=0,
        mutable_on_resume=True,
        group="run",
    )
    keep_checkpoints: int = option(
        3,
        "newest checkpoints to keep",
        minimum=1,
        mutable_on_resume=True,
        group="run",
    )
    options: typing.Any = None  # the method's own, a methods.*.Options

    def replace(self, **changes):
        """Returns a copy with some fields or options of the method changed."""
        mine = {f.name for f in _fields(Config)}
        options = {k: v for k, v in changes.items() if k not in mine}
        return dataclasses.replace(
            self,
            **{k: v for k, v in changes.items() if k in mine},
            options=dataclasses.replace(self.options, **options),
        )


def default(method="clsa", **changes):
    """Returns the default configuration of `method`, some fields changed."""
    options = methods.load(method).Options()
    return Config(method=method, options=options).replace(**changes)


def default_of(name):
    """The default of a field of `Config`, as flags spell it."""
    return spell(Config.__dataclass_fields__[name].default)


def define_flags(flag_values=flags.FLAGS):
    """Defines a flag for every field of `Config` and of all `Options`."""
    for field in _fields(Config):
        flags.DEFINE_flag(Flag(field), flag_values)
    for name, owned in _method_fields().items():
        if name not in flag_values:
            flag = Flag(_for_all(owned), owners=owned)
            flags.DEFINE_flag(flag, flag_values)


def from_flags(flag_values=flags.FLAGS):
    """Returns the `Config` that the parsed flags spell.

    What a recipe says in epochs is fitted to another `--total_epochs`, and
    printed, see `clsa_tf.cli.recipe_length`.

    Raises:
        UserError: a flag that belongs to another method, or values that do not
            go together.
    """
    method = flag_values["method"].value
    options = methods.load(method).Options
    mine = {f.name for f in _fields(options)}
    foreign = [
        flag_values[name]
        for name in _method_fields()
        if name not in mine and flag_values[name].present
    ]
    if foreign:
        raise UserError(other_method.rejected_flags(flag_values, foreign))
    # A flag that two methods share has one default per method: only what the
    # person wrote overrides it.
    own = {n: flag_values[n].value for n in mine if flag_values[n].present}
    common = {f.name: flag_values[f.name].value for f in _fields(Config)}
    fitted, sentence = recipe_length.adapt(flag_values)
    config = Config(**common | fitted, options=options(**own))
    check(config)
    for line in (*_overridden(flag_values), sentence):
        if line:
            print(line)
    return config


def _overridden(flag_values):
    """Sentences about typed flags whose values a flagfile behind them changes.

    Args:
        flag_values: the parsed flags.
    """
    found = []
    for flag in map(flag_values.__getitem__, flag_values):
        written = getattr(flag, "written", ())
        typed = [w.value for w in written if not w.files]
        if typed and written[-1].files and typed[-1] != written[-1].value:
            found.append(
                f"warning: --{flag.name}={typed[-1]} stands before "
                f"--flagfile={written[-1].files[0]}, which sets "
                f"{written[-1].value}; type it behind to override that"
            )
    return found


def parse(arguments):
    """Returns the `Config` that a list of flags spells.

    Args:
        arguments: list of str, such as `"--total_epochs=9"`.

    Raises:
        command_line.FlagError: an unknown flag or an ill-typed value, or
            something that is no flag.
        UserError: no such flagfile, or see `from_flags`.
    """
    values = flags.FlagValues()
    define_flags(values)
    parser.parse(arguments, values)
    return from_flags(values)


def names():
    """Names of all flags, of whatever method."""
    return [field.name for field in _fields(Config)] + list(_method_fields())


def check(config):
    """Raises `UserError` for values that do not go together."""
    for option_value in (config, config.options):
        for field in _fields(type(option_value)):
            problem = field.metadata["check"](getattr(option_value, field.name))
            if problem:
                raise UserError(f"{problem} for --{field.name}.")
    service_client.parse(config.data_service)
    check_schedule(config)
    if (
        config.batch_norm == "split"
        and config.batch_norm_splits != AUTO
        and config.batch_size % config.batch_norm_splits
    ):
        raise UserError(
            "Expected --batch_norm_splits that divides --batch_size, received "
            f"{config.batch_norm_splits} and {config.batch_size}; change one."
        )
    methods.load(config.method).check(config)


def to_flagfile(config, *, without=()):
    """Returns the text of a flagfile that spells `config`.

    Args:
        config: `Config`.
        without: names of flags to leave out.
    """
    lines = [
        f"--{field.name}={spell(getattr(holder, field.name))}"
        for holder in (config, config.options)
        for field in _fields(type(holder))
        if field.name not in without
    ]
    return "\n".join(lines) + "\n"


def older(text):
    """What a run does whose flagfile was written before there were some flags.

    Args:
        text: the flagfile.

    Returns:
        dictionary from the names of these flags to values.
    """
    names = _values(text)
    return {
        field.name: field.metadata["before"]
        for field in _fields(Config)
        if field.metadata["before"] is not None and field.name not in names
    }


def as_flags(values):
    """Spells a dictionary from names of flags to values."""
    return " ".join(f"--{name}={spell(x)}" for name, x in values.items())


def older_in(workdir):
    """What `older` says of the run in `workdir`; {} if there is none."""
    try:
        with open(os.path.join(workdir, RUN_FLAGS), encoding="utf-8") as file:
            return older(file.read())
    except OSError:
        return {}


def _values(text):
    """Flag -> value, of a flagfile that `to_flagfile` wrote."""
    lines = [line[2:] for line in text.split("\n") if line.startswith("--")]
    return dict(line.split("=", 1) for line in lines if "=" in line)


def load(workdir):
    """Returns the `Config` of the run in `workdir`.

    Raises:
        UserError: no run was started there, or by another version.
    """
    path = os.path.join(workdir, RUN_FLAGS)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as e:
        raise UserError(
            f"Expected the directory of a run, received {workdir!r} without "
            f"{RUN_FLAGS} ({e.strerror}); set --workdir to what a training "
            "was started with."
        ) from e
    try:
        return parse(text.splitlines()).replace(**older(text))
    except parser.FlagError as e:
        reason = str(e).split(";")[0].removeprefix("Expected ")
        raise UserError(
            f"Expected flags that this version knows in {path}, not "
            f"{reason}; use the version of clsa_tf that started the run."
        ) from e


def differences(text, other):
    """Fields that make two flagfiles of `to_flagfile` different runs.

    Args:
        text: flagfile of the one run.
        other: flagfile of the other.

    Returns:
        list of `(flag, value in text, value in other)`, `--method` first, then
        in the order of the fields; None where a flagfile has no such flag.
        Flags that may change between two starts of one run, such as
        `--log_steps`, are left out.
    """
    one, two = (
        _values(t) | {name: spell(value) for name, value in older(t).items()}
        for t in (text, other)
    )
    mutable = {
        f.name for f in _fields(Config) if f.metadata["mutable_on_resume"]
    }
    # Both are in the order of the fields; options of one method come last.
    order = ["method", *dict.fromkeys([*one, *two])]
    return [
        (name, one.get(name), two.get(name))
        for name in dict.fromkeys(order)
        if name not in mutable and one.get(name) != two.get(name)
    ]


def changeable():
    """Flags that may differ between two starts of one run.

    Returns:
        dictionary, flag -> condition in words; empty: none.
    """
    return {
        f.name: f.metadata["on_resume"]
        for f in _fields(Config)
        if f.metadata["mutable_on_resume"] or f.metadata["on_resume"]
    }


def identity(config):
    """A 31-bit number that tells different runs apart; see `differences`."""
    values = [
        f"{field.name}={spell(getattr(holder, field.name))}"
        for holder in (config, config.options)
        for field in _fields(type(holder))
        if not field.metadata["mutable_on_resume"]
    ]
    return zlib.crc32("\n".join(values).encode()) >> 1


def _fields(dataclass):
    return [f for f in dataclasses.fields(dataclass) if f.metadata]


def _method_fields():
    """Flag name -> method that has it -> field."""
    found = {}
    for method in methods.names():
        for field in _fields(methods.load(method).Options):
            found.setdefault(field.name, {})[method] = field
    return found


def _shown(owned):
    """Of the methods that have a flag the one whose default is shown."""
    usual = Config.__dataclass_fields__["method"].default
    return usual if usual in owned else next(iter(owned))


def _for_all(owned):
    """A field with the shown default that takes what any method accepts.

    `check` asks the run's own method.
    """

    def check(value):
        found = [f.metadata["check"](value) for f in owned.values()]
        return "" if "" in found else found[0]

    field = copy.copy(owned[_shown(owned)])
    field.metadata = dict(field.metadata) | {"check": check}
    return field
