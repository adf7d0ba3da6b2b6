"""Documents: which text files there are, the parts that one process takes at a time, and the text of each document."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

TEXT = (".txt", ".md", ".py")
PACKED: dict[str, Callable[..., object]] = {".gz": gzip.open, ".xz": lzma.open}
END = 2**63 - 1  # of a file whose unpacked size is not known

# A cut or damaged archive, in the words of whatever unpacks it.
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, tarfile.TarError)


class File(NamedTuple):
    """An input file; `place` is its name from its argument on, so that it does not depend on where the data lies."""

    path: Path
    place: str
    size: int
    mtime_ns: int


class Span(NamedTuple):
    """The lines of `file` that begin in these bytes; END for files that are read whole."""

    file: File
    begin: int
    end: int


Part = tuple[Span, ...]


def find_files(arguments: Sequence[Path]) -> list[File]:
    """The files of the arguments and, in directories, those of a known suffix, ordered by place."""
    found: dict[str, File] = {}
    for argument in arguments:
        for path in _walk(argument) if argument.is_dir() else [argument]:
            inside = path.relative_to(argument) if path != argument else Path()
            place = (PurePosixPath(argument.resolve().name) / inside.as_posix()).as_posix()
            if place in found:
                raise ValueError(
                    f"FILE takes names that differ, got {found[place].path} and {path}: give the folder above both"
                )
            found[place] = _file(path, place)
    if not found:
        raise ValueError(f"FILE takes text, got none in {', '.join(map(str, arguments))}")
    return [found[place] for place in sorted(found)]


def find_stdlib() -> list[File]:
    """The sources of the running Python's standard library that every distribution ships."""
    from weyl_megatron.demo.data import source_files

    root = Path(sysconfig.get_paths()["stdlib"])
    return [_file(path, path.relative_to(root).as_posix()) for path in source_files(root)]


def _file(path: Path, place: str) -> File:
    stat = path.stat()
    return File(path.absolute(), place, stat.st_size, stat.st_mtime_ns)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith(".") and _is_known(name))


def _is_known(name: str) -> bool:
    inner, packed = _unpacked(name)
    suffixes = (*TEXT, ".jsonl")
    return Path(inner).suffix in ((*suffixes, "", ".tar") if packed else suffixes)


def _unpacked(name: str) -> tuple[str, bool]:
    """The name without .gz or .xz, and whether it had one."""
    path = Path(name)
    return (path.stem, True) if path.suffix in PACKED else (name, False)


def make_parts(files: Sequence[File], part_bytes: int) -> list[Part]:
    """Neighbouring files up to `part_bytes` together; a longer .jsonl that is not packed is cut into byte ranges."""
    parts: list[Part] = []
    open_part: list[Span] = []
    filled = 0
    for file in files:
        packed = _unpacked(file.path.name)[1]
        if open_part and filled + file.size > part_bytes:
            parts.append(tuple(open_part))
            open_part, filled = [], 0
        if file.path.suffix == ".jsonl" and file.size > part_bytes:
            starts = range(0, file.size, part_bytes)
            parts.extend((Span(file, start, min(start + part_bytes, file.size)),) for start in starts)
        else:
            open_part.append(Span(file, 0, END if packed else file.size))
            filled += file.size
    return [*parts, tuple(open_part)] if open_part else parts


def documents(part: Part, separator: str | None) -> Iterator[tuple[str, str]]:
    """The place and the text of every document that is not blank.

    A line's "text" of a .jsonl, a text file in a tar, any other file or what `separator` cuts it into. ValueError of
    one sentence: a file that is not what its name says, or that has changed since the parts were made.
    """
    for span in part:
        file = span.file
        try:
            texts: Iterator[tuple[int | str, str]]
            if _unpacked(file.path.name)[0].endswith(".jsonl"):
                texts = _json_lines(span)
            elif _is_tar(file.path):
                texts = _tar_members(file)
            else:
                texts = _whole(file, separator)
            yield from ((f"{file.place}:{at}", text) for at, text in texts if text.strip())
        except DAMAGED as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise ValueError(f"FILE takes whole archives, got {file.path}: {reason}") from None
        stat = file.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
            raise ValueError(f"FILE takes files at rest, got {file.path}, which changed meanwhile: run this again")


def _json_lines(span: Span) -> Iterator[tuple[int | str, str]]:
    path = span.file.path
    with _open(path) as stream:
        offset = span.begin
        if offset:  # a line that begins before the span belongs to the one before
            stream.seek(offset - 1)
            offset += len(stream.readline()) - 1
        while offset < span.end and (line := stream.readline()):
            if line.strip():
                yield offset, _text(line, path, offset)
            offset += len(line)


def _text(line: bytes, path: Path, offset: int) -> str:
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # JSON can hold halves of surrogate pairs, which no tokenizer takes
    except UnicodeError as error:
        got = error.object[error.start : error.end]  # type: ignore[attr-defined]
        raise ValueError(f"FILE takes UTF-8, got {got!r} in {path}:{_line(path, offset)}") from None
    except (ValueError, KeyError, TypeError):
        got = f"{line[:40].decode(errors='replace').strip()} in {path}:{_line(path, offset)}"
        raise ValueError(f'FILE takes {{"text": "..."}} on each line of a .jsonl, got {got}') from None
    return text


def _line(path: Path, offset: int) -> int:
    """The number of the line that begins at `offset`; spans do not know how many lines were before them."""
    number = 1
    with _open(path) as stream:
        while offset > 0 and (block := stream.read(min(offset, 2**20))):
            number += block.count(b"\n")
            offset -= len(block)
    return number


def _tar_members(file: File) -> Iterator[tuple[int | str, str]]:
    """OpenWebText's urlsf_subset*_data.xz are tars of .txt files, each a document."""
    with _open(file.path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if member.isfile() and PurePosixPath(member.name).suffix in (*TEXT, ""):
                data = cast(IO[bytes], tar.extractfile(member)).read()
                yield member.name, _decode(data, f"{file.path}:{member.name}")


def _is_tar(path: Path) -> bool:
    with _open(path) as stream:
        return stream.read(262)[257:] == b"ustar"


def _whole(file: File, separator: str | None) -> Iterator[tuple[int | str, str]]:
    with _open(file.path) as stream:
        text = _decode(stream.read(), str(file.path))
    yield from enumerate(text.split(separator) if separator else [text])


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{error.object[error.start : error.end]!r} in {name}:{error.object[: error.start].count(10) + 1}"
        raise ValueError(f"FILE takes UTF-8, got {got}") from None


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], PACKED[path.suffix](path, "rb") if path.suffix in PACKED else path.open("rb"))
