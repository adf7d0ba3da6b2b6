"""The text: the Python standard library's own sources, as bytes.

Nothing is downloaded, and every machine with the same Python reads the same bytes. A token is a
byte, so the vocabulary has 256 entries and there is no tokenizer.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256

# Distributions ship these apart from the interpreter, so they are not on every machine.
_SHIPPED_APART = "distutils ensurepip idlelib lib2to3 test tkinter turtle turtledemo venv"
# Tables that were generated rather than text that someone wrote.
_GENERATED = "encodings pydoc_data"

LEFT_OUT = frozenset(f"{_SHIPPED_APART} {_GENERATED}".split())

# One file in this many is held out for validation.
HELD_OUT = 10


@dataclass(frozen=True)
class Corpus:
    """The standard library in bytes, split by file into a training and a validation part."""

    train: Tensor
    validation: Tensor
    files: int
    digest: str


def source_files(root: Path) -> list[Path]:
    """The standard library's `.py` files under `root`, in the same order everywhere."""
    wanted = sys.stdlib_module_names - LEFT_OUT
    parts = {path: path.relative_to(root).parts for path in root.rglob("*.py")}
    files = [
        path
        for path, names in parts.items()
        if names[0].removesuffix(".py") in wanted and "test" not in names
    ]
    return sorted(files, key=lambda path: parts[path])


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads the sources under `root`, by default the running interpreter's standard library.

    Raises:
        ValueError: `root` has too few of them to hold any out.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in source_files(root)]
    if len(texts) < HELD_OUT:
        raise ValueError(
            f"the corpus takes {HELD_OUT} or more library sources, got {len(texts)} under {root}"
        )
    return Corpus(
        train=_tokens(text for index, text in enumerate(texts) if (index + 1) % HELD_OUT),
        validation=_tokens(texts[HELD_OUT - 1 :: HELD_OUT]),
        files=len(texts),
        digest=hashlib.sha256(b"".join(texts)).hexdigest()[:12],
    )


def training_offsets(corpus: Corpus, steps: int, batch: int, context: int, seed: int) -> Tensor:
    """Where each sequence of each step's global batch starts, (steps, batch), of all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(corpus.train.numel() - context, (steps, batch), generator=generator)


def validation_offsets(corpus: Corpus, windows: int, context: int) -> Tensor:
    """Where the fixed validation sequences start, spread evenly over the validation part."""
    last = corpus.validation.numel() - context - 1
    return torch.linspace(0, last, windows, dtype=torch.float64).long()


def sequences(tokens: Tensor, offsets: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The inputs that start at `offsets`, and the targets, which are the same a byte later.

    Both are (sequences, context).
    """
    index = offsets[:, None] + torch.arange(context + 1)
    window = tokens[index].long()
    return window[:, :-1], window[:, 1:]


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy of the bytes' own frequencies in nats.

    No model that ignores the context has a lower loss on `tokens`.
    """
    counts = torch.bincount(tokens.flatten().long(), minlength=VOCABULARY).double()
    entropy: Tensor = torch.special.entr(counts / counts.sum()).sum()
    return entropy.item()


def _tokens(texts: Iterable[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
