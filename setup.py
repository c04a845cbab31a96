"""Packaging: version ranges here, the exact tested set in constraints.txt."""

import re

import setuptools

with open("clsa_tf/__init__.py", encoding="utf-8") as file:
    VERSION = re.search(r'__version__ = "(.+)"', file.read()).group(1)

with open("README.md", encoding="utf-8") as file:
    README = file.read()

# The version of Python chooses TensorFlow; see clsa_tf/stack.py.
TF215 = 'python_version < "3.12"'
TF221 = 'python_version >= "3.12"'

ONNX = [
    "tf2onnx>=1.17,<1.18",
    # onnx 1.19 needs a newer ml-dtypes than TensorFlow 2.15 allows.
    f"onnx>=1.18,<1.19; {TF215}",
    f"onnx>=1.19; {TF221}",
    "onnxruntime>=1.20",
]
# Reads HEIC files of own folders.
HEIF = ["pillow-heif>=0.18"]
# The embedded server; an encoder can be exported without it.
SERVE = [
    "grpcio-health-checking>=1.56",
    "httptools>=0.6.3",
    "prometheus-client>=0.16",
    "starlette>=0.40",
    "uvicorn>=0.30",
]
COMMANDS = (
    "train",
    "gallery",
    "report",
    "data_service",
    "export",
    "formats",
    "embed",
    "serve",
    "client",
    "deploy",
)

setuptools.setup(
    name="clsa_tf",
    version=VERSION,
    description="Pretraining of image encoders without labels, in TensorFlow",
    long_description=README,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *setuptools.find_packages(include=["clsa_tf*", "export*"]),
        "clsa_tf.configs",
    ],
    # Recipes lie at the top, where people look for them.
    package_dir={"clsa_tf.configs": "configs"},
    package_data={
        "clsa_tf.configs": ["*.flags", "cifar10/*.flags"],
        "export": ["templates/*"],
    },
    entry_points={
        "console_scripts": [
            f"clsa-{name.replace('_', '-')} = clsa_tf.cli.scripts:{name}"
            for name in COMMANDS
        ]
    },
    python_requires=">=3.9,<3.14",
    # Why each is there, and why in that range: BUILD.md, "Dependencies".
    install_requires=[
        f"tensorflow>=2.15,<2.16; {TF215}",
        f"keras>=2.15,<2.16; {TF215}",
        f"tensorflow-addons>=0.23,<0.24; {TF215}",
        f"tensorflow-metadata<1.16; {TF215}",
        f"protobuf>=4.25,<5; {TF215}",
        f"tensorflow-serving-api>=2.15,<2.16; {TF215}",
        f"pyarrow>=12,<26; {TF215}",
        f"numpy>=1.23,<2; {TF215}",
        f"tensorflow>=2.21,<2.22; {TF221}",
        f"tf-keras>=2.21,<2.22; {TF221}",
        f"tensorboard>=2.21,<2.22; {TF221}",
        f"protobuf>=6.31,<8; {TF221}",
        f"tensorflow-serving-api>=2.21,<2.22; {TF221}",
        f"pyarrow>=18; {TF221}",
        f"numpy>=1.26; {TF221}",
        "keras-cv>=0.9,<0.10",
        "tensorflow-datasets>=4.9.3,<4.10",
        "importlib-resources>=5",
        "absl-py>=1.4",
        "grpcio>=1.56",
        "requests>=2.28",
        "tenacity>=8",
        "Pillow>=10",
        "PyYAML>=6",
        "matplotlib>=3.7",
        "tqdm>=4.60",
    ],
    extras_require={
        "gpu": [
            f"tensorflow[and-cuda]>=2.15,<2.16; {TF215}",
            f"tensorflow[and-cuda]>=2.21,<2.22; {TF221}",
        ],
        "serve": SERVE,
        "onnx": ONNX,
        "heif": HEIF,
        "dev": [
            *HEIF,
            *SERVE,
            *ONNX,
            "hypothesis>=6.100",
            "psutil>=5.9",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            f"setuptools>=70.1,<81; {TF215}",
            f"setuptools>=70.1; {TF221}",
            "wheel>=0.43",
        ],
    },
)
