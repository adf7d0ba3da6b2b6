"""Text to train on where there is no network: the Python sources that lie on the machine."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.part import Task

_BYTES, _TINY_BYTES = 80_000_000, 200_000
_PIECE = 20_000  # characters, which are shuffled
_VOCABULARY, _TINY_VOCABULARY = 32_768, 400

_AT_ONCE = 400  # pieces that are encoded side by side; of a token the library keeps a lot

#: Of the pieces so many teach the vocabulary: 8 MB, which takes seconds.
_TEACHERS, _TINY_TEACHERS = 400, 10


class Text(NamedTuple):
    """Tokens, int32, of which one in fifty is held out."""

    train: Tensor
    valid: Tensor
    vocabulary: int
    tokens: str  # what they are


def read_text(task: Task) -> Text:
    """Return the sources as tokens: of a byte-level BPE that is taught here, or bytes where the
    package `tokenizers` is missing.
    """
    text = _sources(_TINY_BYTES if task.tiny else _BYTES)
    pieces = [text[at : at + _PIECE] for at in range(0, len(text), _PIECE)]
    random.Random(0).shuffle(pieces)
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        line = torch.tensor(list("".join(pieces).encode()), dtype=torch.int32)
        vocabulary, tokens = 256, "bytes: the package tokenizers is missing"
    else:
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            pieces[: _TINY_TEACHERS if task.tiny else _TEACHERS],
            vocab_size=_TINY_VOCABULARY if task.tiny else _VOCABULARY,
            show_progress=False,
        )
        line = torch.cat(
            [
                torch.tensor(encoding.ids, dtype=torch.int32)
                for at in range(0, len(pieces), _AT_ONCE)
                for encoding in tokenizer.encode_batch(pieces[at : at + _AT_ONCE])
            ]
        )
        vocabulary, tokens = tokenizer.get_vocab_size(), "byte-level BPE"
    held_out = max(len(line) // 50, 3000)
    return Text(line[:-held_out], line[-held_out:], vocabulary, tokens)


def _sources(most: int) -> str:
    """Return the standard library and the installed packages, in an order that stays, up to so
    many bytes.
    """
    parts: list[bytes] = []
    size = 0
    for folder in ("stdlib", "purelib"):
        for path in sorted(Path(sysconfig.get_paths()[folder]).rglob("*.py")):
            # Neither empty nor a table that was generated; a link may lead nowhere.
            if path.is_file() and 200 < path.stat().st_size < 400_000:
                parts.append(path.read_bytes())
                size += len(parts[-1])
            if size > most:
                break
    return b"\n".join(parts).decode("utf-8", "replace")
