"""Reads what prepare_text wrote: windows of tokens, in an order that depends on the seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.data.order import Order

VERSION = 1


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """The windows of `context` tokens of one split of a folder that prepare_text wrote.

    The split is "train" or "valid". ``tokens[i]`` is (inputs, targets), two LongTensors (context,);
    targets are the inputs one token later. `len()` windows are an epoch, and i goes on past it: the
    next epoch has an order of its own. Sample i depends on i and `seed` alone, so that a run that
    takes its samples by number resumes exactly, on any number of processes.

    ValueError: a folder that is missing, unfinished or of another version, a shard whose size is
    not that of its tokens, or a split of too few tokens. IndexError: i < 0.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", *, context: int, seed: int = 0
    ) -> None:
        self.folder = Path(folder)
        wrote = f"folder takes one that prepare_text wrote, got {self.folder}"
        if not self.folder.is_dir():
            raise ValueError(f"{wrote}, which is not a folder")
        try:
            index = json.loads((self.folder / "tokens.json").read_text(encoding="utf-8"))
            version = index["version"]
        except FileNotFoundError:
            raise ValueError(
                f"folder takes one that prepare_text finished, got {self.folder} without "
                "tokens.json: run it again"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{wrote} with another tokens.json") from None
        if version != VERSION:
            raise ValueError(
                f"folder takes tokens.json of version {VERSION}, got {version} in {self.folder}"
            )
        if split not in index["splits"]:
            raise ValueError(f"split takes one of {', '.join(index['splits'])}, got {split}")
        if context < 1:
            raise ValueError(f"context takes 1 or more tokens, got {context}")
        self.vocab_size: int = index["vocab_size"]
        self.eod: int = index["eod"]
        self.context = context
        self.dtype = numpy.dtype(index["dtype"])
        self.names: list[str] = [name for name, _ in index["splits"][split]["shards"]]
        counts = [count for _, count in index["splits"][split]["shards"]]
        for name, count in zip(self.names, counts, strict=True):
            path, expected = self.folder / name, count * self.dtype.itemsize
            got = path.stat().st_size if path.is_file() else 0
            if got != expected:
                raise ValueError(
                    f"{path} takes the {expected} bytes that tokens.json counts, got {got}: "
                    "prepare it again"
                )
        self.ends = numpy.cumsum(counts, dtype=numpy.int64)  # of each shard, in tokens of the split
        total = int(self.ends[-1]) if counts else 0
        if total <= context:
            raise ValueError(
                f"context takes fewer tokens than {split} has, got {context} of {total} in "
                f"{self.folder}"
            )
        self.order = Order((total - 1) // context, seed)

    def __len__(self) -> int:
        return self.order.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = self.order(i) * self.context
        window = torch.from_numpy(self._read(start, start + self.context + 1))
        return window[:-1], window[1:]

    def _read(self, start: int, stop: int) -> numpy.ndarray:
        pieces = []
        shard = int(numpy.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = min(stop, int(self.ends[shard]))
            offset = start - (int(self.ends[shard - 1]) if shard else 0)
            # Not a numpy.memmap: one that is kept holds a file descriptor, of which thousands of
            # shards would take too many, and one that is made for each window takes six times as
            # long as this.
            with open(self.folder / self.names[shard], "rb", buffering=0) as file:
                file.seek(offset * self.dtype.itemsize)
                data = file.read((end - start) * self.dtype.itemsize)
            pieces.append(numpy.frombuffer(data, self.dtype).astype(numpy.int64))
            start, shard = end, shard + 1
        return numpy.concatenate(pieces)
