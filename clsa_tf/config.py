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
from clsa_tf.data import offload
from clsa_tf.data.headers import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from clsa_tf.errors import UserError
from clsa_tf.networks.batchnorm import KINDS
from clsa_tf.networks.resnet import BLOCKS, STEMS
from clsa_tf.optimizer import (
    L2_ON,
    LR_PER,
    LR_SCALINGS,
    OPTIMIZERS,
    SCHEDULES,
    check_schedule,
)
from clsa_tf.options import option
from clsa_tf.precision import PRECISIONS
from clsa_tf.spelling import define, spell
from clsa_tf.strategy import STRATEGIES

# Within the run's directory: the flagfile that repeats it.
RUN_FLAGS = "run.flags"


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run is. `option`s of a method are in `options`."""

    # Data
    dataset: str = option(
        "shapes",
        "what to train on: a tensorflow-datasets name (cifar10, imagenet2012, "
        "the embedded shapes), a directory of a prepared one, folder:/photos, "
        "or tfrecord:gs://bucket/train-*",
    )
    split: str = option(
        "train", "split of a tensorflow-datasets dataset to train on"
    )
    eval_dataset: str = option(
        "", "dataset for the kNN evaluation; empty: the training dataset's own"
    )
    eval_split: str = option(
        "", "its split; empty: test or validation, whichever exists"
    )
    data_dir: str = option(
        "",
        "directory of prepared tensorflow-datasets; empty: their default",
        portable=True,
    )
    download: bool = option(
        False,
        "let tensorflow-datasets download a missing dataset",
        portable=True,
    )
    labels: str = option(
        "auto",
        "of a folder: auto (names of the first-level directories) or none",
        choices=("auto", "none"),
    )
    holdout: float = option(
        0.1,
        "share, in [0, 1), of a labelled folder without test directory that is "
        "kept out of training for the kNN evaluation",
        minimum=0.0,
        below=1.0,
    )
    num_examples: int = option(
        0, "records behind a tfrecord: pattern; 0: count them", minimum=0
    )
    max_bad_share: float = option(
        0.05,
        "share, in [0, 1], of unreadable images above which the run stops",
        minimum=0.0,
        maximum=1.0,
        portable=True,
    )
    exif_rotation: bool = option(
        True,
        "of a folder: turn photographs upright as their EXIF data say",
        before=False,
    )
    more_formats: bool = option(
        True,
        "of a folder: also read WebP, TIFF, HEIC and AVIF files, and images "
        "whose names do not say that they are; otherwise only .jpg .jpeg .png "
        ".bmp .gif",
        before=False,
    )
    max_image_bytes: int = option(
        MAX_IMAGE_BYTES,
        "largest image file, in bytes; larger ones are left out as unreadable; "
        "0: no limit",
        minimum=0,
        before=0,
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "largest image, in pixels, height times width; larger ones are left "
        "out as unreadable before they are decoded; 0: no limit",
        minimum=0,
        before=0,
    )
    allow_upscaling: bool = option(
        False, "accept crops larger than the images", portable=True
    )
    augment_on: str = option(
        "host",
        "where views are made after decoding, cropping and resizing: on the "
        "host, or on the device, within the training step; a device with time "
        "to spare relieves a host that cannot keep up",
        choices=("host", "device"),
        portable=True,
    )
    data_service: str = option(
        "",
        "tf.data services that read the images and make the views instead of "
        "this process, with the same result: grpc://host:port as printed by "
        "`python -m clsa_tf.data_service`, several separated by commas; they "
        "have to see the dataset under the same paths",
        portable=True,
    )
    prefetch_batches: int = option(
        2,
        "finished batches that the host keeps ready, in memory",
        minimum=1,
        portable=True,
    )
    # What is learned
    method: str = option("clsa", "how to learn", choices=methods.NAMES)
    backbone: str = option(
        "resnet50", "architecture of the encoder", choices=tuple(BLOCKS)
    )
    width: float = option(
        1.0, "factor, in [1/16, 4], on its channels", minimum=1 / 16, maximum=4
    )
    stem: str = option(
        "imagenet",
        "first layers: imagenet (stride 4), small (stride 1, for about 32 px)",
        choices=STEMS,
    )
    batch_norm: str = option(
        "local",
        "statistics of: each replica (local), the global batch (sync), or "
        "--batch_norm_splits parts of the global batch (split), on as many or "
        "fewer replicas; of each micro-batch with --accumulation_steps",
        choices=KINDS,
    )
    batch_norm_splits: int = option(
        8,
        "parts for --batch_norm=split; divides the global batch, and is a "
        "multiple of replicas x --accumulation_steps",
        minimum=1,
    )
    # How it is learned
    total_epochs: int = option(200, "passes over the dataset", minimum=1)
    batch_size: int = option(
        256, "images per step, over all replicas", minimum=2
    )
    optimizer: str = option(
        "sgd",
        "optimizer; lars or lamb for batches of thousands",
        choices=OPTIMIZERS,
    )
    base_lr: float = option(
        0.03,
        "learning rate per 256 images of --batch_size, see --lr_scaling; the "
        "highest of the run",
        above=0.0,
    )
    lr_scaling: str = option(
        "linear",
        "the learning rate is --base_lr times: --batch_size / 256 (linear), "
        "the root of --batch_size (sqrt), or 1 (none)",
        choices=tuple(LR_SCALINGS),
    )
    lr_schedule: str = option(
        "cosine",
        "of the learning rate after the warm-up: half a cosine down to 0, a "
        "tenth of it from each of --lr_milestones on (steps), or constant",
        choices=SCHEDULES,
    )
    lr_per: str = option(
        "epoch",
        "when the cosine goes on: with every epoch (as CLSA and MoCo do) or "
        "with every step",
        choices=LR_PER,
    )
    lr_milestones: tuple[int, ...] = option(
        (),
        "for --lr_schedule=steps: epochs, from the start of the run, such as "
        "120,160",
    )
    warmup_epochs: float = option(
        0.0,
        "epochs, or parts of one, in which the learning rate first rises "
        "linearly from 0, with every step",
        minimum=0.0,
    )
    sgd_momentum: float = option(
        0.9, "momentum of sgd and lars, in [0, 1)", minimum=0.0, below=1.0
    )
    l2: float = option(
        1e-4,
        "coefficient of the weights: in the gradient (coupled L2; sgd, and "
        "lars before its trust ratio), in the update (lamb, before its trust "
        "ratio), or, times the learning rate, the share of them that each "
        "step takes off (adamw)",
        minimum=0.0,
    )
    l2_on: str = option(
        "all",
        "what --l2 acts on: all weights (as CLSA and MoCo publish) or kernels, "
        "without normalisation and biases (as SimCLR and BYOL do); lars acts "
        "on kernels whatever this says",
        choices=L2_ON,
    )
    seed: int = option(0, "seed of everything random", minimum=0)
    precision: str = option(
        "float32",
        "of the convolutions: float32, bfloat16, float16 with loss scaling, or "
        "bfloat16 where processor or accelerator is made for it (auto); all "
        "else is float32",
        choices=PRECISIONS,
    )
    accumulation_steps: int = option(
        1,
        "micro-batches that each replica's share of the batch goes through "
        "one after the other, for batches larger than its memory",
        minimum=1,
    )
    # Evaluation and export
    image_size: int = option(
        224, "side of images for evaluation and export, in px", minimum=8
    )
    eval_keep: float = option(
        0.875,
        "share, in (0, 1], of the short side that their centre crop keeps",
        above=0.0,
        maximum=1.0,
    )
    knn_epochs: int = option(
        1,
        "epochs between kNN evaluations; 0: none",
        minimum=0,
        portable=True,
    )
    knn_k: int = option(200, "neighbours that vote", minimum=1, portable=True)
    knn_temperature: float = option(
        0.1, "T of their weights exp(cosine / T)", above=0.0, portable=True
    )
    knn_bank: int = option(
        50_000,
        "labelled training images that the neighbours are taken from, at most",
        minimum=1,
        portable=True,
    )
    # Where and with what
    workdir: str = option(
        "",
        "directory of the run: checkpoints, metrics, pictures",
        portable=True,
    )
    strategy: str = option(
        "auto",
        "one device, all GPUs of the machine (mirrored), of several machines "
        "(multiworker, by TF_CONFIG or SLURM), a TPU, or what there is (auto)",
        choices=STRATEGIES,
        portable=True,
    )
    tpu: str = option(
        "",
        "name or address of the TPU, local on a TPU VM; for --strategy=tpu",
        portable=True,
    )
    jit_compile: bool = option(
        False,
        "compile the whole training step with XLA: for GPUs (TPUs always do); "
        "slower on CPUs",
        portable=True,
    )
    log_steps: int = option(
        50, "steps between lines of metrics.jsonl", minimum=1, portable=True
    )
    checkpoint_steps: int = option(
        0,
        "steps between checkpoints; 0: one per epoch",
        minimum=0,
        portable=True,
    )
    keep_checkpoints: int = option(
        3, "newest checkpoints to keep", minimum=1, portable=True
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


def define_flags(flag_values=flags.FLAGS):
    """Defines a flag for every field of `Config` and of all `Options`."""
    for field in _fields(Config):
        define(field, "", flag_values)
    for name, owned in _method_fields().items():
        if name not in flag_values:
            define(_for_all(owned), _of_methods(owned), flag_values)


def from_flags(flag_values=flags.FLAGS):
    """Returns the `Config` that the parsed flags spell.

    Raises:
        UserError: a flag that belongs to another method, or values that do not
            go together.
    """
    method = flag_values["method"].value
    options = methods.load(method).Options
    mine = {f.name for f in _fields(options)}
    for name, owned in _method_fields().items():
        if name not in mine and flag_values[name].present:
            raise UserError(
                f"Expected flags of --method={method}, received --{name}, "
                f"which belongs to {' and '.join(owned)}; remove it or "
                "change --method."
            )
    # A flag that two methods share has one default per method: only what the
    # person wrote overrides it.
    own = {n: flag_values[n].value for n in mine if flag_values[n].present}
    common = {f.name: flag_values[f.name].value for f in _fields(Config)}
    config = Config(**common, options=options(**own))
    check(config)
    return config


def parse(arguments):
    """Returns the `Config` that a list of flags spells.

    Args:
        arguments: list of str, such as `"--total_epochs=9"`.

    Raises:
        absl.flags.Error: an unknown flag or an ill-typed value.
        UserError: something that is no flag, or see `from_flags`.
    """
    values = flags.FlagValues()
    define_flags(values)
    rest = values(["", *arguments])[1:]
    if rest:
        raise UserError(
            f"Expected only flags, received {rest[0]!r}; write them as "
            "--name=value."
        )
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
    offload.parse(config.data_service)
    check_schedule(config)
    if config.batch_norm == "split" and (
        config.batch_size % config.batch_norm_splits
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
    except flags.Error as e:
        raise UserError(
            f"Expected flags that this version knows in {path}, received: {e}; "
            "use the version of clsa_tf that started the run."
        ) from e


def differences(text, other):
    """Fields that make two flagfiles of `to_flagfile` different runs.

    Args:
        text: flagfile of the one run.
        other: flagfile of the other.

    Returns:
        list of `(flag, value in text, value in other)`; flags that may change
        between two starts of one run, such as `--log_steps`, left out.
    """
    one, two = (
        _values(t) | {name: spell(value) for name, value in older(t).items()}
        for t in (text, other)
    )
    portable = {f.name for f in _fields(Config) if f.metadata["portable"]}
    return [
        (name, one.get(name), two.get(name))
        for name in sorted(one.keys() | two.keys())
        if name not in portable and one.get(name) != two.get(name)
    ]


def identity(config):
    """A 31-bit number that tells different runs apart; see `differences`."""
    values = [
        f"{field.name}={spell(getattr(holder, field.name))}"
        for holder in (config, config.options)
        for field in _fields(type(holder))
        if not field.metadata["portable"]
    ]
    return zlib.crc32("\n".join(values).encode()) >> 1


def _fields(dataclass):
    return [f for f in dataclasses.fields(dataclass) if f.metadata]


def _method_fields():
    """Flag name -> method that has it -> field."""
    found = {}
    for method in methods.NAMES:
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


def _of_methods(owned):
    """Says which methods have a flag, and where their defaults differ."""
    usual = owned[_shown(owned)].default
    names = [
        name
        if field.default == usual
        else f"{name}: {spell(field.default) or 'none'}"
        for name, field in owned.items()
    ]
    return f"[{', '.join(names)}] "
