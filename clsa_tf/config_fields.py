"""Defines the options that all methods share, the dataclass `Config`.

Each method adds the dataclass `Options` of its own file. Every field is a flag
of the same name and is defined in one place only.
"""

import dataclasses
import typing

from clsa_tf import methods
from clsa_tf.data.headers import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS
from clsa_tf.distributed.strategy import STRATEGIES
from clsa_tf.networks import backbones
from clsa_tf.networks.backbones.resnet import STEMS
from clsa_tf.networks.batchnorm import KINDS
from clsa_tf.networks.precision import TRAINING_PRECISIONS
from clsa_tf.optimizers.optimizers import L2_ON, OPTIMIZERS
from clsa_tf.optimizers.schedule import LR_PER, LR_SCALINGS, SCHEDULES
from clsa_tf.options.fields import AUTO, option


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
        "paths. The batches are the same, except from large TFRecord files: "
        "then do not change the number of services within a run",
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
    # Method and network
    method: str = option(
        "clsa",
        "training method; --list_methods describes them",
        choices=methods.names,
    )
    backbone: str = option(
        "resnet50",
        f"architecture of the encoder: {backbones.known()}, such as "
        "keras_applications:MobileNetV2. It starts with random weights",
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
        "over each micro-batch. auto: sync, except for clsa, moco, cacr_moco "
        "and looc: local on several replicas, split on one; details in "
        "docs/methods.md",
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
    # Optimization
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
        "peak learning rate, to which --lr_scaling applies",
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
        "weight decay: share of the weights that is added to the gradient "
        "(sgd; lars, before its trust ratio) or to the update (lamb, before "
        "its trust ratio), or that is subtracted from the weights, times the "
        "learning rate (adamw)",
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
        published="float32",
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
    # Run and devices
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
    deterministic: bool = option(
        False,
        "run one operation of TensorFlow at a time, so that equal runs on one "
        "machine are equal bit for bit with networks of any size; slower",
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
        mine = {f.name for f in flag_fields(Config)}
        options = {k: v for k, v in changes.items() if k not in mine}
        return dataclasses.replace(
            self,
            **{k: v for k, v in changes.items() if k in mine},
            options=dataclasses.replace(self.options, **options),
        )

    def steps_per_epoch(self, images):
        """Number of steps of an epoch of `images` images, at least 1."""
        return max(1, images // self.batch_size)

    def total_steps(self, images):
        """Number of steps of the whole run on `images` images."""
        return self.total_epochs * self.steps_per_epoch(images)


def flag_fields(dataclass):
    """Returns the fields of a dataclass that are flags, see `option`."""
    return [f for f in dataclasses.fields(dataclass) if f.metadata]
