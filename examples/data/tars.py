"""WebDataset tars, read by number.

They hold key.jpg (or .jpeg, .png, .webp) beside key.cls, or beside key.json with "label".
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy

IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
VERSION = 1
BLOCK = tarfile.BLOCKSIZE


class Tars:
    """The images of all tars, in the order of their members.

    An index is kept beside each tar, as NAME.tar.index.npy, or in memory alone where that folder
    cannot be written. It holds numbers only, so that forked workers share it and spawned ones
    receive it quickly.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        tables = [_index(path) for path in paths]
        self._table = numpy.concatenate(tables)  # (images, 3): offset, size, label
        self._ends = numpy.cumsum([len(table) for table in tables])
        if not len(self._table):
            raise ValueError(f"tars take images, got none in {paths[0].parent}")
        self.num_classes = int(self._table[:, 2].max()) + 1

    def __len__(self) -> int:
        return len(self._table)

    def label(self, item: int) -> int:
        return int(self._table[item, 2])

    def read(self, item: int) -> bytes:
        path, offset, size = self._place(item)
        # Opened anew: a file's position is shared by forked workers.
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise ValueError(
                f"a tar takes all of its members, got {path}, which was cut after it was indexed"
            )
        return data

    def name(self, item: int) -> str:
        path, offset, _ = self._place(item)
        with tarfile.open(path, "r:") as tar:
            names = (member.name for member in tar if member.offset_data == offset)
            return f"{path}:{next(names, '?')} (image {item})"

    def _place(self, item: int) -> tuple[Path, int, int]:
        offset, size, _ = map(int, self._table[item])
        return self.paths[int(numpy.searchsorted(self._ends, item, side="right"))], offset, size


def _index(path: Path) -> numpy.ndarray:
    """Offset, size and label of every image, from the index beside the tar if it is of this tar."""
    stat = path.stat()
    head = numpy.array([[VERSION, stat.st_size, stat.st_mtime_ns]], dtype=numpy.int64)
    cache = path.with_name(f"{path.name}.index.npy")
    try:
        kept: numpy.ndarray = numpy.load(cache)
        if kept.shape[1:] == (3,) and numpy.array_equal(kept[:1], head):
            return kept[1:]
    except (OSError, ValueError, EOFError):
        pass
    table = _scan(path)
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")  # every rank may be writing it
    try:
        with temporary.open("wb") as file:
            numpy.save(file, numpy.concatenate([head, table]))
        temporary.replace(cache)
    except OSError:  # read-only data, or a full disk: the next start indexes again
        temporary.unlink(missing_ok=True)
    return table


def _scan(path: Path) -> numpy.ndarray:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    end, last = 0, "its beginning"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end, last = member.offset_data + -(-member.size // BLOCK) * BLOCK, member.name
                folder, _, name = member.name.rpartition("/")
                base, _, extension = name.partition(".")  # WebDataset's rule: at the first dot
                key, extension = f"{folder}/{base}", extension.lower()
                if not member.isfile() or extension not in IMAGES | {"cls", "json"}:
                    continue
                if extension in IMAGES:
                    if key in images:
                        second = f"{path}:{member.name}"
                        raise ValueError(f"a sample takes one image, got a second in {second}")
                    images[key] = (member.offset_data, member.size)
                elif extension == "cls" or key not in labels:
                    data = tar.extractfile(member)
                    label = _label(data.read() if data else b"", extension)
                    if label is None and extension == "json":
                        continue  # captions and the like; a .cls may follow
                    if label is None:
                        takes = "a .cls takes a class' number from 0 on"
                        raise ValueError(f"{takes}, got another in {path}:{member.name}")
                    labels[key] = label
    except tarfile.TarError as error:
        raise _cut_short(path, last, str(error)) from None
    # tarfile takes a missing or broken header after the first for the end.
    with path.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise _cut_short(path, last, "no end mark")
    for key in images:
        if key not in labels:
            takes = 'a sample takes a .cls, or a .json with "label"'
            raise ValueError(f"{takes}, got {path}:{key.lstrip('/')} without")
    rows = [(*place, labels[key]) for key, place in images.items()]
    return numpy.array(rows, dtype=numpy.int64).reshape(-1, 3)


def _cut_short(path: Path, member: str, why: str) -> ValueError:
    got = f"{path}, which is cut short at {member}: {why}"
    return ValueError(f"a tar takes all of its members, got {got}")


def _label(data: bytes, extension: str) -> int | None:
    try:
        label = json.loads(data)["label"] if extension == "json" else int(data)
    except (ValueError, KeyError, TypeError):
        return None
    return label if isinstance(label, int) and 0 <= label < 2**31 else None
