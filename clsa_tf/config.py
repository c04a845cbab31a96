"""The configuration of a run, as a frozen dataclass and as a flagfile.

`Config` holds the options of every run. Each method adds the dataclass
`Options` of its own file. Every field is a flag of the same name and is defined
in one place only. `to_flagfile` writes a configuration that `--flagfile` reads.
"""

import copy
import dataclasses
import os
import re
import typing
import zlib

from absl import flags

import clsa_tf
from clsa_tf import methods
from clsa_tf.cli import other_method, parser, recipe_length
from clsa_tf.data import service_client
from clsa_tf.data.headers import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from clsa_tf.distributed.strategy import STRATEGIES
from clsa_tf.errors import UserError
from clsa_tf.networks import backbones
from clsa_tf.networks.backbones.resnet import STEMS
from clsa_tf.networks.batchnorm import KINDS
from clsa_tf.networks.precision import TRAINING_PRECISIONS
from clsa_tf.optimizers.optimizers import L2_ON, OPTIMIZERS
from clsa_tf.optimizers.schedule import (
    LR_PER,
    LR_SCALINGS,
    SCHEDULES,
    check_schedule,
)
from clsa_tf.options.fields import AUTO, option
from clsa_tf.options.flags import Flag, spell

# Name of the flagfile in a run's directory. It repeats the run.
RUN_FLAGS = "run.flags"
# Begins its first line, before the version that wrote it.
_HEADER = "# clsa_tf "


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a run. `options` holds the options of its method."""

    # Data
    dataset: str = option(
        "",
        "dataset to train on; has to be set: folder:/photos, a name in "
        "tensorflow-datasets (cifar10, imagenet2012, the embedded shapes), the "
        "directory of a prepared one, or tfrecord:gs://bucket/train-*",
        on_resume="to another path of the same images",
        group="data",
        path=True,
    )
    split: str = option(
        "train",
        "training split of a tensorflow-datasets dataset",
        group="data",
    )
    eval_dataset: str = option(
        "",
        "labelled dataset for the kNN evaluation, in the format of --dataset; "
        "empty: evaluation images of --dataset. Neighbours are training "
        "images if the classes are the same, otherwise images of this "
        "dataset's training split or, without one, all its other images",
        on_resume="to another path of the same images",
        group="evaluation",
        path=True,
    )
    eval_split: str = option(
        "",
        "split for the kNN evaluation; empty: test or validation, whichever "
        "exists",
        group="evaluation",
    )
    data_dir: str = option(
        "",
        "directory of tensorflow-datasets; empty: $TFDS_DATA_DIR or "
        "~/tensorflow_datasets",
        mutable_on_resume=True,
        group="data",
        path=True,
    )
    download: bool = option(
        False,
        "allow tensorflow-datasets to download a missing dataset",
        mutable_on_resume=True,
        group="data",
    )
    labels: str = option(
        "auto",
        "labels of --dataset: its own (auto; for a folder, the names of its "
        "first-level directories), or none",
        choices=("auto", "none"),
        group="data",
    )
    holdout: float = option(
        0.1,
        "share, in [0, 1), of the images of a labelled folder to hold out for "
        "the kNN evaluation, if it has no test directory",
        minimum=0.0,
        below=1.0,
        group="data",
    )
    num_examples: int = option(
        0,
        "number of records in the files of a tfrecord: pattern; 0: count them",
        minimum=0,
        group="data",
    )
    max_bad_share: float = option(
        0.05,
        "largest share, in [0, 1], of unreadable images. Above it the run "
        "stops",
        minimum=0.0,
        maximum=1.0,
        mutable_on_resume=True,
        group="data",
    )
    exif_rotation: bool = option(
        True,
        "rotate photographs of a folder according to their EXIF orientation",
        before=False,
        group="data",
    )
    more_formats: bool = option(
        True,
        "also read WebP, TIFF, HEIC and AVIF files of a folder, and images "
        "with other or no extensions. Otherwise only .jpg .jpeg .png .bmp .gif",
        before=False,
        group="data",
    )
    max_image_bytes: int = option(
        MAX_IMAGE_BYTES,
        "largest image file, in bytes; 0: no limit. Larger files count as "
        "unreadable",
        minimum=0,
        before=0,
        group="data",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "largest image, in pixels (height times width); 0: no limit. Larger "
        "images count as unreadable and are not decoded",
        minimum=0,
        before=0,
        group="data",
    )
    allow_upscaling: bool = option(
        False,
        "allow crops larger than the images",
        mutable_on_resume=True,
        group="views",
    )
    augment_on: str = option(
        "host",
        "where to augment the resized crops: on the host, or on the device "
        "within the training step. Use device if the host is the bottleneck",
        choices=("host", "device"),
        mutable_on_resume=True,
        group="views",
    )
    data_service: str = option(
        "",
        "addresses grpc://host:port, separated by commas, of tf.data services "
        "(`python -m clsa_tf.data_service`) that read the images and make the "
        "views instead of this process. They need the dataset under the same "
        "paths; the views are the same",
        mutable_on_resume=True,
        group="data",
    )
    whole_epochs: bool = option(
        True,
        "drop the incomplete last batch of an epoch, as published, so that no "
        "batch contains an image twice. Otherwise a batch may continue into "
        "the next epoch",
        before=False,
        group="data",
    )
    prefetch_batches: int = option(
        2,
        "number of batches that the host prepares ahead, in memory",
        minimum=1,
        mutable_on_resume=True,
        group="data",
    )
    # What is learned
    method: str = option(
        "clsa",
        "training method; --list_methods describes them",
        choices=methods.names,
    )
    backbone: str = option(
        "resnet50",
        "architecture of the encoder: resnet18, resnet34, resnet50, or one of "
        "a library with random weights, keras_applications:NAME (such as "
        "MobileNetV2) or keras_cv:NAME (such as DenseNet121)",
        problem=backbones.problem,
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
        "first layers of the backbone: imagenet (stride 4) or small (stride 1, "
        "for images of about 32 px)",
        choices=STEMS,
        group="network",
    )
    batch_norm: str = option(
        AUTO,
        "batch statistics over each replica (local), the global batch (sync), "
        "or --batch_norm_splits parts of it (split); with --accumulation_steps "
        "over each micro-batch. auto: sync, except for methods with a queue: "
        "local on several replicas, split on one",
        choices=(AUTO, *KINDS),
        published="local",
        group="network",
    )
    batch_norm_splits: int = option(
        AUTO,
        "parts of the global batch for --batch_norm=split; a divisor of "
        "--batch_size and a multiple of replicas x --accumulation_steps. auto: "
        "up to 8 parts of at least 32 images",
        minimum=1,
        published=8,
        group="network",
    )
    # How it is learned
    total_epochs: int = option(
        200,
        "epochs to train, passes over the dataset",
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
        "optimizer. Use lars or lamb for batches of thousands of images",
        choices=OPTIMIZERS,
        group="optimization",
    )
    base_lr: float = option(
        0.03,
        "peak learning rate for a --batch_size of 256; see --lr_scaling",
        above=0.0,
        group="optimization",
    )
    lr_scaling: str = option(
        "linear",
        "factor on --base_lr: --batch_size / 256 (linear), the square root of "
        "--batch_size (sqrt), or 1 (none)",
        choices=tuple(LR_SCALINGS),
        group="optimization",
    )
    lr_schedule: str = option(
        "cosine",
        "learning rate after the warm-up: falls to 0 along half a cosine, "
        "falls to a tenth at each of --lr_milestones (steps), or constant",
        choices=SCHEDULES,
        group="optimization",
        on_resume="with a larger --total_epochs",
    )
    lr_per: str = option(
        "epoch",
        "when the cosine schedule advances: every epoch (as in CLSA and MoCo) "
        "or every step",
        choices=LR_PER,
        group="optimization",
    )
    lr_milestones: tuple[int, ...] = option(
        (),
        "epochs, from the start of the run, of the decays of "
        "--lr_schedule=steps, such as 120,160",
        group="optimization",
        on_resume="with a larger --total_epochs",
    )
    warmup_epochs: float = option(
        0.0,
        "length of the linear warm-up of the learning rate from 0, in epochs; "
        "may be fractional",
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
        "L2 coefficient of the weights: in the gradient (sgd, and lars before "
        "its trust ratio), in the update (lamb, before its trust ratio), or, "
        "times the learning rate, the share of the weights subtracted per step "
        "(adamw)",
        minimum=0.0,
        group="optimization",
    )
    l2_on: str = option(
        "all",
        "weights that --l2 applies to: all (as in CLSA and MoCo), or kernels "
        "without normalisation and biases (as in SimCLR and BYOL). lars always "
        "uses kernels",
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
        "precision of convolutions: float32, bfloat16, float16 with loss "
        "scaling, or bfloat16 if the processor or accelerator supports it "
        "(auto). Everything else is float32. tf32: float32 that NVIDIA GPUs "
        "round to TF32 in convolutions and heads, not in similarities",
        choices=TRAINING_PRECISIONS,
        group="network",
    )
    accumulation_steps: int = option(
        1,
        "micro-batches per step and replica (gradient accumulation), for "
        "batches larger than the memory",
        minimum=1,
        group="optimization",
    )
    # Evaluation and export
    image_size: int = option(
        224,
        "side of the images for evaluation and export, in px",
        minimum=8,
        group="evaluation",
    )
    eval_keep: float = option(
        0.875,
        "crop ratio for evaluation and export: share, in (0, 1], of the short "
        "side that the centre crop covers",
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
        "number k of nearest neighbours that vote in the kNN evaluation",
        minimum=1,
        mutable_on_resume=True,
        group="evaluation",
    )
    knn_temperature: float = option(
        0.1,
        "temperature T of the neighbours' weights exp(cosine / T)",
        above=0.0,
        mutable_on_resume=True,
        group="evaluation",
    )
    knn_bank: int = option(
        50_000,
        "largest number of images in the bank that neighbours come from",
        minimum=1,
        mutable_on_resume=True,
        group="evaluation",
    )
    # Where and with what
    workdir: str = option(
        "",
        "directory of the run, for checkpoints, metrics and pictures; has to "
        "be set",
        mutable_on_resume=True,
        group="run",
        path=True,
    )
    init_from: str = option(
        "",
        "initial weights of a new run: the directory of another run, an "
        "exported version or an encoder.keras; empty: random weights. A "
        "resumed run ignores it",
        on_resume="without effect",
        group="run",
        path=True,
    )
    init_what: str = option(
        "encoder",
        "weights to load from --init_from: encoder (backbone, and heads if "
        "they fit), or all of a run of the same method (also momentum encoder, "
        "predictor and queue). Step and optimizer always start at zero",
        choices=("encoder", "all"),
        on_resume="without effect",
        group="run",
    )
    strategy: str = option(
        "auto",
        "devices: one, all GPUs of the machine (mirrored), several machines "
        "(multiworker, set up by TF_CONFIG or SLURM), a TPU, or all that are "
        "found (auto)",
        choices=STRATEGIES,
        mutable_on_resume=True,
        group="run",
    )
    tpu: str = option(
        "",
        "name or address of the TPU for --strategy=tpu; local on a TPU VM",
        mutable_on_resume=True,
        group="run",
    )
    jit_compile: bool = option(
        False,
        "compile the training step with XLA. For GPUs; slower on CPUs, always "
        "on with TPUs",
        mutable_on_resume=True,
        group="run",
    )
    log_steps: int = option(
        50,
        "steps between entries of metrics.jsonl",
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
        "number of newest checkpoints to keep",
        minimum=1,
        mutable_on_resume=True,
        group="run",
    )
    options: typing.Any = None  # of the method, a methods.*.Options

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
                f"warning: --{flag.name}={typed[-1]} has no effect, because "
                f"the later --flagfile={written[-1].files[0]} sets "
                f"{written[-1].value}; put it after --flagfile"
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
                raise UserError(f"{problem} for --{field.name}; change it.")
    service_client.parse(config.data_service)
    check_schedule(config)
    if (
        config.batch_norm == "split"
        and config.batch_norm_splits != AUTO
        and config.batch_size % config.batch_norm_splits
    ):
        raise UserError(
            "Expected --batch_norm_splits to divide --batch_size="
            f"{config.batch_size}, received {config.batch_norm_splits}; change "
            "one of the two flags."
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


def header():
    """The line above the flags in a run's flagfile: who wrote it."""
    return f"{_HEADER}{clsa_tf.__version__}\n"


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
            f"{RUN_FLAGS} ({e.strerror}); set --workdir to the directory of a "
            "training."
        ) from e
    return recorded(text, path)


def recorded(text, path):
    """Returns the `Config` that a run's flagfile spells.

    Flags that did not exist when it was written have the values of `older`, or
    their defaults.

    Args:
        text: what `to_flagfile` once returned.
        path: of the file, for messages.

    Raises:
        UserError: it has flags or values that this version does not know.
    """
    try:
        lines = [x for x in text.splitlines() if not x.startswith("#")]
        return parse(lines).replace(**older(text))
    except parser.FlagError as e:
        reason = str(e).split(";")[0].removeprefix("Expected ")
        raise UserError(
            f"{path} is not from this version of clsa_tf, "
            f"{clsa_tf.__version__}: expected {reason}; use the version that "
            f"wrote the file, {_version(text)}."
        ) from e


def _version(text):
    """The version of clsa_tf that wrote a flagfile, for messages."""
    match = re.match(re.escape(_HEADER) + r"(\S+)$", text, re.MULTILINE)
    return match[1] if match else "0.1.0 or earlier"


def differences(before, now):
    """Fields that make two configurations different runs.

    Args:
        before: `Config` of the one run.
        now: `Config` of the other.

    Returns:
        list of `(flag, value before, value now)`, as flags spell them,
        `--method` first, then in the order of the fields; None where the
        method has no such flag. Flags that may change between two starts of
        one run, such as `--log_steps`, are left out.
    """
    one, two = _compared(before), _compared(now)
    return [
        (name, one.get(name), two.get(name))
        for name in dict.fromkeys(["method", *one, *two])
        if one.get(name) != two.get(name)
    ]


def _compared(config):
    """Flag -> value as spelled, of those that make a run what it is."""
    return {
        field.name: spell(getattr(holder, field.name))
        for holder in (config, config.options)
        for field in _fields(type(holder))
        if not field.metadata["mutable_on_resume"]
    }


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
    values = [f"{name}={value}" for name, value in _compared(config).items()]
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
