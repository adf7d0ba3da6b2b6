"""Packaging. Every dependency has the oldest release that `make test-matrix` runs, and its
reason.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "weyl_megatron/__init__.py").read_text(), re.M
)
assert VERSION is not None

setup(
    name="weyl-megatron",
    version=VERSION[1],
    description=(
        "AdamW²: train Transformers without learning-rate warmup, under DeepSpeed, "
        "Megatron and PyTorch"
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["weyl_megatron", "weyl_megatron.*"]),
    package_data={
        "weyl_megatron": [
            "py.typed",
            "kernels/*.cpp",
            "kernels/*/*.h",
            "report/*.css",
            "report/*.js",
        ]
    },
    install_requires=[
        # 2.5 is the first that loads plugins at import, which is how DeepSpeed finds the name
        # AdamW2
        "torch>=2.5",
    ],
    extras_require={
        # an engine; not required, so that Megatron's users need not install it
        "deepspeed": ["deepspeed>=0.16.9"],
        # the other engine, imported by weyl_megatron.engines.megatron.enable()
        "megatron": ["megatron-core>=0.14"],
        "examples": [
            "megatron-core>=0.14",  # the models and datasets of examples/megatron
            "deepspeed>=0.16.9",  # the engine of examples/deepspeed
            "sentencepiece>=0.2.3",  # the tokenizer of both
            "pyyaml>=6.0.3",  # their recipes
            "psutil>=7",  # megatron-core's checkpoint writers hang without it
            # the image models and augmentations of examples/deepspeed; brings torchvision and
            # pillow
            "timm>=1.0.31",
            "scikit-learn>=1.7",  # the digits, for a machine without images
        ],
        "plan": [
            "transformers>=5.23",  # `weyl-megatron plan` builds a model by its Hugging Face name,
            "timm>=1.0.31",  # by timm's,
            "pyyaml>=6.0.3",  # from a recipe,
            "safetensors>=0.8",  # or reads a checkpoint
        ],
        "docs": [
            "mkdocs>=1.6,<2",  # builds docs/; 1.6 checks anchors, and the theme is for 1
            "mkdocs-material>=9.7",  # the theme
            "mkdocstrings[python]>=1.0.8",  # the API page, from the docstrings
            "ruff>=0.17.6",  # breaks the lines of that page's signatures
        ],
        "demo": ["deepspeed>=0.16.9"],  # `weyl-megatron demo` trains under ZeRO-2
        "dev": [
            "pytest>=9",  # runs the tests
            "pytest-xdist>=3.8",  # several files of them at a time
            "hypothesis>=6.150",  # property tests of tiles and layouts
            "mypy>=2.4",  # strict types of the package
            "ruff>=0.17.6",  # lint and format
            "pre-commit>=4.7",  # both before a commit
            "numpy>=2.2",  # torch warns on every import without it
            # torch's test modules, which hold its optimizer suite's inputs, import it
            "expecttest>=0.3",
            "transformers>=5.23",  # models that `Watch` and `weyl-megatron plan` have to recognise
            "timm>=1.0.31",  # likewise
            "peft>=0.21",  # adapters that have to learn; a test trains them under DeepSpeed
            "accelerate>=1.15",  # Hugging Face's Trainer takes it; a test trains through both
            "safetensors>=0.8",  # a checkpoint that `plan` reads
            "tensorboard>=2.21",  # a sink of `Watch`
            "wandb>=0.31",  # likewise; offline
            "trackio>=0.43",  # likewise; in a folder
            "comet_ml>=3.58",  # likewise; offline
            "mlflow-skinny>=3.17",  # likewise; MLflow without its server, in a folder
            "markdown-it-py>=4.3",  # reads what `weyl-megatron report --markdown` writes
            # megatron-core asks for it where several distributed optimizers share the replicas
            "einops>=0.8",
        ],
    },
    entry_points={
        "console_scripts": ["weyl-megatron = weyl_megatron.cli:main"],
        "torch.backends": ["weyl_megatron = weyl_megatron.engines.torch.plugin:register"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
