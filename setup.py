"""Packaging: version ranges here, the exact tested set in constraints.txt."""

import re

import setuptools

with open("clsa_tf/__init__.py", encoding="utf-8") as file:
    VERSION = re.search(r'__version__ = "(.+)"', file.read()).group(1)

with open("README.md", encoding="utf-8") as file:
    README = file.read()

# onnx 1.19 needs a newer ml-dtypes than TensorFlow 2.15 allows.
ONNX = [
    "tf2onnx>=1.17,<1.18",
    "onnx>=1.18,<1.19",
    "onnxruntime>=1.20",
]
# The embedded server; an encoder can be exported without it.
SERVE = [
    "grpcio-health-checking>=1.56",
    "h11>=0.14",
    "prometheus-client>=0.16",
    "starlette>=0.40",
    "uvicorn>=0.30",
]

setuptools.setup(
    name="clsa_tf",
    version=VERSION,
    description="Pretraining of image encoders without labels, in TensorFlow",
    long_description=README,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["clsa_tf*", "export*"]),
    package_data={"export": ["templates/*"]},
    python_requires=">=3.9,<3.12",
    # Why each is there, and why in that range: BUILD.md, "Dependencies".
    install_requires=[
        "tensorflow>=2.15,<2.16",
        "keras>=2.15,<2.16",
        "tensorflow-addons>=0.23,<0.24",
        "keras-cv>=0.9,<0.10",
        "tensorflow-datasets>=4.9.3,<4.10",
        "tensorflow-metadata<1.16",
        "importlib-resources>=5",
        "protobuf>=4.25,<5",
        "absl-py>=1.4",
        "grpcio>=1.56",
        "tensorflow-serving-api>=2.15,<2.16",
        "requests>=2.28",
        "tenacity>=8",
        "pyarrow>=12,<26",
        "numpy>=1.23,<2",
        "Pillow>=10",
        "PyYAML>=6",
        "matplotlib>=3.7",
        "tqdm>=4.60",
    ],
    extras_require={
        "gpu": ["tensorflow[and-cuda]>=2.15,<2.16"],
        "serve": SERVE,
        "onnx": ONNX,
        "dev": [
            *SERVE,
            *ONNX,
            "hypothesis>=6.100",
            "psutil>=5.9",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
        ],
    },
)
