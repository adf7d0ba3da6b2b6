"""Documents: which text files there are, and the text of each document in them.

One process takes a part of the files at a time.
"""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import os
import stat
import sysconfig
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

TEXT = (".txt", ".md", ".py")
PACKED: dict[str, Callable[..., object]] = {".gz": gzip.open, ".xz": lzma.open}
END = 2**63 - 1  # of a file whose unpacked size is not known
PART_BYTES = 8 * 2**20  # of input that is read, done or lost at once
SAMPLE_BYTES = 64 * 2**20  # of text that a new tokenizer is trained on, taken evenly from all parts

# A cut or damaged archive, in the words of whatever unpacks it.
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, tarfile.TarError)

WIDE = ", as in UTF-16 or UTF-32"
# UTF-32-LE's begins with the first of these.
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


class File(NamedTuple):
    """An input file."""

    path: Path
    place: str  # its name from its argument on, which does not depend on where the data lies
    size: int
    mtime_ns: int


class Span(NamedTuple):
    """The lines of `file` that begin in these bytes; END for files that are read whole."""

    file: File
    begin: int
    end: int


Part = tuple[Span, ...]


def find_files(arguments: Sequence[Path]) -> list[File]:
    """The files of the arguments and, in directories, those of a known suffix by name.

    ValueError: no file at all, one that is found twice, or what is no file, such as a pipe, which
    cannot be read twice.
    """
    files: dict[Path, File] = {}
    for argument in arguments:
        for path in sorted(_walk(argument), key=str) if argument.is_dir() else [argument]:
            inside = path.relative_to(argument) if path != argument else Path()
            place = (PurePosixPath(argument.resolve().name) / inside.as_posix()).as_posix()
            file = _file(path, place)
            known = files.setdefault(path.resolve(), file)
            if known is not file:
                both = f"{known.path} and {file.path}"
                raise ValueError(f"FILE takes each file once, got {both}, which are one")
    if not files:
        raise ValueError(f"FILE takes text, got none in {', '.join(map(str, arguments))}")
    return list(files.values())


def order_by_place(files: Sequence[File]) -> list[File]:
    """The files in one order, whatever that of the arguments was; ValueError: one place for two."""
    ordered = sorted(files, key=lambda file: file.place)
    for first, second in pairwise(ordered):
        if first.place == second.place:
            both = f"{first.path} and {second.path}: give the folder above both"
            raise ValueError(f"FILE takes names that differ, got {both}")
    return ordered


def find_stdlib() -> list[File]:
    """The sources of the running Python's standard library that every distribution ships."""
    from weyl_megatron.demo.data import source_files

    root = Path(sysconfig.get_paths()["stdlib"])
    return [_file(path, path.relative_to(root).as_posix()) for path in source_files(root)]


def _file(path: Path, place: str) -> File:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"FILE takes files and directories, got {path}, which is neither")
    return File(path.absolute(), place, status.st_size, status.st_mtime_ns)


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        yield from (Path(folder, name) for name in shown if _is_known(name))


def _refuse(error: OSError) -> None:
    """os.walk leaves out the folders that it cannot read."""
    raise error


def _is_known(name: str) -> bool:
    inner, packed = _unpacked(name)
    suffixes = (*TEXT, ".jsonl")
    return _suffix(inner) in ((*suffixes, "", ".tar") if packed else suffixes)


def _unpacked(name: str) -> tuple[str, bool]:
    """The name without .gz or .xz, and whether it had one."""
    return (Path(name).stem, True) if _suffix(name) in PACKED else (name, False)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def make_parts(files: Sequence[File], part_bytes: int = PART_BYTES) -> list[Part]:
    """Neighbouring files up to `part_bytes` together.

    A longer .jsonl that is not packed is cut into byte ranges.
    """
    parts: list[Part] = []
    open_part: list[Span] = []
    filled = 0
    for file in files:
        packed = _unpacked(file.path.name)[1]
        if open_part and filled + file.size > part_bytes:
            parts.append(tuple(open_part))
            open_part, filled = [], 0
        if _suffix(file.path.name) == ".jsonl" and file.size > part_bytes:
            for start in range(0, file.size, part_bytes):
                parts.append((Span(file, start, min(start + part_bytes, file.size)),))
        else:
            open_part.append(Span(file, 0, END if packed else file.size))
            filled += file.size
    return [*parts, tuple(open_part)] if open_part else parts


def documents(part: Part, separator: str | None) -> Iterator[tuple[str, str]]:
    """The place and the text of every document that is not blank.

    A line's "text" of a .jsonl, a text file in a tar, any other file or what `separator` cuts it
    into. ValueError of one sentence: a file that is not what its name says, or that has changed
    since the parts were made.
    """
    for span in part:
        file = span.file
        try:
            texts: Iterator[tuple[int | str, str]]
            if _suffix(_unpacked(file.path.name)[0]) == ".jsonl":
                texts = _json_lines(span)
            elif _is_tar(file.path):
                texts = _tar_members(file)
            else:
                texts = _whole(file, separator)
            yield from ((f"{file.place}:{at}", text) for at, text in texts if text.strip())
        except DAMAGED as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise ValueError(f"FILE takes whole archives, got {file.path}: {reason}") from None
        status = file.path.stat()
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            changed = f"{file.path}, which changed meanwhile: run this again"
            raise ValueError(f"FILE takes files at rest, got {changed}")


def sample(parts: Sequence[Part], separator: str | None, size: int = SAMPLE_BYTES) -> Iterator[str]:
    """The first documents of every part, so that a large corpus' tokenizer has seen all its kinds.

    At most `size` bytes: what is longer than a part's share of them is cut. ValueError: the parts
    have no text.
    """
    blank = True
    for part in parts:
        left = size // len(parts)
        for _, text in documents(part, separator):
            data = text.encode()
            yield text if len(data) <= left else data[:left].decode(errors="ignore")
            blank = False
            left -= len(data)
            if left <= 0:
                break
    if blank:
        files = {span.file for part in parts for span in part}
        first = min(files)
        many = f"{len(files)} files, such as " if len(files) > 1 else ""
        which = f"{many}{first.path}, which is {'blank' if first.size else 'empty'}"
        raise ValueError(f"FILE takes text, got none in {which}")


def _json_lines(span: Span) -> Iterator[tuple[int | str, str]]:
    path = span.file.path
    with _open(path) as stream:
        offset = span.begin
        if offset:  # a line that begins before the span belongs to the one before
            stream.seek(offset - 1)
            offset += len(stream.readline()) - 1
        while offset < span.end and (line := stream.readline()):
            yield offset, _text(line, path, offset)
            offset += len(line)


def _text(line: bytes, path: Path, offset: int) -> str:
    """The "text" of a line; that of a blank one is blank."""
    try:
        record = line.decode("utf-8-sig")
        if not record.strip():
            return ""
        text = json.loads(record)["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode()  # JSON can hold halves of surrogate pairs, which no tokenizer takes
    except UnicodeError as error:
        raise _not_utf8(error, f"{path}:{_line(path, offset)}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        where = f"{path}:{_line(path, offset)}"
        if _is_wide(line):
            raise ValueError(f"FILE takes UTF-8, got {bytes(1)!r} in {where}{WIDE}") from None
        takes = 'FILE takes {"text": "..."} on each line of a .jsonl'
        raise ValueError(f"{takes}, got {_shown(line)} in {where}") from None
    return text


def _shown(line: bytes) -> str:
    """The beginning of a line as what one line of a terminal can show."""
    begin = line[:160].decode("utf-8-sig", errors="replace").strip()[:40]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in begin)


def _line(path: Path, offset: int) -> int:
    """The number of the line that begins at `offset`.

    Spans do not know how many lines were before them.
    """
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
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, f"{name}:{error.object[: error.start].count(10) + 1}") from None
    if len(data) % 2 == 0 and _is_wide(data):  # which can be UTF-8 by its bytes, half of them NUL
        raise ValueError(f"FILE takes UTF-8, got {bytes(1)!r} in {name}:1{WIDE}")
    return text


def _not_utf8(error: UnicodeError, where: str) -> ValueError:
    data = error.object  # type: ignore[attr-defined]
    got = data[error.start : error.end]  # type: ignore[attr-defined]
    wide = WIDE if isinstance(data, bytes) and _is_wide(data) else ""
    return ValueError(f"FILE takes UTF-8, got {got!r} in {where}{wide}")


def _is_wide(data: bytes) -> bool:
    """Whether this is UTF-16 or UTF-32: by its mark, or as Latin text is half NUL in it."""
    begin = data[:4096]
    halves = (begin[::2], begin[1::2])
    return begin.startswith(WIDE_MARKS) or any(2 * half.count(0) > len(half) for half in halves)


def _open(path: Path) -> IO[bytes]:
    packed = PACKED.get(_suffix(path.name))
    return cast(IO[bytes], packed(path, "rb") if packed else path.open("rb"))
