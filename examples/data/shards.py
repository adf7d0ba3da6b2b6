"""Shards: a part's tokens on disk, under a name that is a hash of all that they depend on.

A part is done when its record is there, which is written last, and every file gets its name only
when it is whole. So what is kept never depends on when a run ended, and a changed input file costs
its own part alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy

from examples.data.documents import Part, documents
from examples.data.tokenizer import load_tokenizer

SPLITS = ("train", "valid")
Counts = dict[str, dict[str, int]]  # of documents and tokens, by split


class Job(NamedTuple):
    """What every part is done with; `digest` is the hash of the settings and the tokenizer."""

    folder: Path
    tokenizer: Path
    digest: str
    dtype: str
    valid: float
    separator: str | None


def part_key(part: Part, job: Job) -> str:
    """The name of a part's shards."""
    spans = [(file.place, file.size, file.mtime_ns, begin, end) for file, begin, end in part]
    return hashlib.sha256(json.dumps([job.digest, spans]).encode()).hexdigest()[:20]


def tokenise(keyed: tuple[str, Part], job: Job) -> int:
    """Writes a part's shards, then its record; returns its tokens."""
    key, part = keyed
    tokenizer = load_tokenizer(job.tokenizer)
    counts: Counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    # Two runs at a time write the same bytes, each under a name of its own until they are whole.
    temporary = {split: job.folder / f"{key}.{split}.{os.getpid()}.tmp" for split in SPLITS}
    try:
        with temporary["train"].open("wb") as train, temporary["valid"].open("wb") as valid:
            for place, text in documents(part, job.separator):
                ids = numpy.array([*tokenizer.encode(text), tokenizer.eod], dtype=job.dtype)
                split = "valid" if _share(place) < job.valid else "train"
                (valid if split == "valid" else train).write(ids.tobytes())
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids)
            for file in (train, valid):
                file.flush()
                os.fsync(file.fileno())
        for split, path in temporary.items():
            if counts[split]["tokens"]:
                path.replace(job.folder / f"{key}.{split}.bin")
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    write_whole(job.folder / f"{key}.json", json.dumps(counts).encode())
    return sum(count["tokens"] for count in counts.values())


def read_record(key: str, job: Job) -> Counts | None:
    """What a part that is done holds.

    None where its record or one of its shards is missing or not whole.
    """
    try:
        counts: Counts = json.loads((job.folder / f"{key}.json").read_bytes())
        for split in SPLITS:
            size = counts[split]["tokens"] * numpy.dtype(job.dtype).itemsize
            if size and (job.folder / f"{key}.{split}.bin").stat().st_size != size:
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return counts


def write_whole(path: Path, data: bytes) -> None:
    """All of `data` under `path`, or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _share(place: str) -> float:
    """A number from 0 to 1 that is a document's own, whatever else is prepared, when and where."""
    name = place.encode(errors="surrogateescape")  # of a file, which need not be UTF-8
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2**64
