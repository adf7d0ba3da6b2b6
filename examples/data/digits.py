"""Writes scikit-learn's handwritten digits as images, for a machine without data.

    python -m examples.data.digits --out DIR [--format folder|tar] [--size 32]

1,797 images of ten classes, split as in examples/compare/vit.py: DIR/train has 1,348, DIR/valid
449. --format folder is an ImageFolder, tar is WebDataset's.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

TAR_IMAGES = 500


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes what the command line names; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="digits", description="Writes scikit-learn's digits as images."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train and valid")
    parser.add_argument(
        "--format", choices=("folder", "tar"), default="folder", help="(%(default)s)"
    )
    parser.add_argument(
        "--size", type=int, default=32, help="pixels of a side; the digits have 8 (%(default)s)"
    )
    args = parser.parse_args(arguments)
    try:
        write_digits(args.out, args.format, args.size)
    except (ValueError, OSError) as error:
        print(f"digits: error: {error}", file=sys.stderr)
        return 2
    for split in ("train", "valid"):
        count, size = len(held(split)), f"{args.size} × {args.size}"
        print(f"{args.out / split}: {count:,} images of {size}, {args.format}")
    return 0


def write_digits(out: Path, kind: str, size: int) -> None:
    """Writes both splits under `out`.

    ValueError: other images are there already, which would mix with these.
    """
    if size < 8:
        raise ValueError(f"--size takes 8 or more, got {size}")
    for split in ("train", "valid"):
        if (out / split).exists() and any((out / split).iterdir()):
            raise ValueError(f"--out takes a folder without {split}, got {out}")
        (out / split).mkdir(parents=True, exist_ok=True)
        samples = list(digits(split, size))
        if kind == "tar":
            for number, first in enumerate(range(0, len(samples), TAR_IMAGES)):
                path = out / split / f"digits-{number:03}.tar"
                _write_tar(path, samples[first : first + TAR_IMAGES])
        else:
            for name, png, label in samples:
                (out / split / str(label)).mkdir(exist_ok=True)
                (out / split / str(label) / f"{name}.png").write_bytes(png)


def held(split: str) -> list[int]:
    """The digits' numbers in a split, as examples/compare/vit.py splits them."""
    count = len(_loaded().target)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    valid, train = order.tensor_split([count // 4])
    return [int(number) for number in (train if split == "train" else valid)]


def digits(split: str, size: int) -> Iterator[tuple[str, bytes, int]]:
    """Name, PNG and class of every digit of a split."""
    loaded = _loaded()
    for number in held(split):
        grey = (loaded.images[number] * (255 / 16)).round().astype("uint8")
        png = io.BytesIO()
        Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR).save(png, "PNG")
        yield f"{number:05}", png.getvalue(), int(loaded.target[number])


def _write_tar(path: Path, samples: Sequence[tuple[str, bytes, int]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, png, label in samples:
            for suffix, data in (("png", png), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@cache
def _loaded() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError("the digits take `pip install scikit-learn`, got none") from None
    return load_digits()


if __name__ == "__main__":
    sys.exit(main())
