"""Turns text into a folder of token shards, on several processes.

    python -m examples.data.prepare_text FILE_OR_DIRECTORY... --out DIR
        [--tokenizer PATH | --vocab-size N]
    python -m examples.data.prepare_text --stdlib --out DIR

A run that was stopped goes on where it was.
OUT/tokens.json is written last: `examples.data.tokens.Tokens` reads what it lists. The shards are
the same whatever --workers is. After a file has changed, the same command does that file's parts
anew; with other settings or another tokenizer than the folder was begun with, it refuses to.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from examples.data.documents import (
    PART_BYTES,
    File,
    Part,
    find_files,
    find_stdlib,
    make_parts,
    order_by_place,
    sample,
)
from examples.data.shards import SPLITS, Job, part_key, read_record, tokenise, write_whole
from examples.data.tokenizer import load_tokenizer, train_sentencepiece

VERSION = 1  # of OUT/tokens.json


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares what the command line names; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if bool(args.files) == args.stdlib:
            raise ValueError("FILE takes text files or directories, or --stdlib in their place")
        files = find_stdlib() if args.stdlib else order_by_place(find_files(args.files))
        index = prepare(
            files,
            args.out,
            tokenizer=args.tokenizer,
            vocab_size=args.vocab_size,
            workers=args.workers,
            valid=args.valid,
            separator=args.separator,
            part_bytes=int(args.part_mb * 2**20),
        )
    except KeyboardInterrupt:
        return _fail(f"stopped: {_kept(args.out)}", status=130)
    except BrokenProcessPool:
        killed = "--workers takes processes that live, got one that was killed"
        return _fail(f"{killed}: {_kept(args.out)}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"--out takes a disk with room, got {args.out} on a full one"
            return _fail(f"{full}: {_kept(args.out)}")
        return _fail(str(error))
    except ValueError as error:
        return _fail(str(error))
    size, eod = index["vocab_size"], index["eod"]
    print(f"{args.out / index['tokenizer']}: {size:,} tokens, end of document {eod}")
    for split, part in index["splits"].items():
        counts = f"{part['documents']:,} documents, {part['tokens']:,} tokens"
        print(f"{split}: {counts}, {len(part['shards'])} shards")
    return 0


def _fail(sentence: str, status: int = 2) -> int:
    print(f"prepare_text: error: {sentence}", file=sys.stderr)
    return status


def _kept(out: Path) -> str:
    done = len(list((out / "shards").glob("*.json")))
    return f"{done} parts are done and kept, the same command goes on from there"


def prepare(
    files: Sequence[File],
    out: Path,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = 32000,
    workers: int = 1,
    valid: float = 0.01,
    separator: str | None = None,
    part_bytes: int = PART_BYTES,
) -> dict[str, Any]:
    """Tokenises `files` into `out` and returns OUT/tokens.json.

    ValueError: input that cannot be read, or other settings than those with which `out` was begun.
    """
    if not 0 <= valid < 1:
        raise ValueError(f"--valid takes a share from 0 to below 1, got {valid}")
    if workers < 1:
        raise ValueError(f"--workers takes 1 or more, got {workers}")
    if part_bytes < 1:
        raise ValueError(f"--part-mb takes a size above 0, got {part_bytes / 2**20}")
    given = load_tokenizer(tokenizer).file.read_bytes() if tokenizer else None
    settings = {
        "tokenizer": hashlib.sha256(given).hexdigest() if given else None,
        "vocab-size": None if given else vocab_size,
        "valid": valid,
        "separator": separator,
        "part-mb": part_bytes / 2**20,
    }
    (out / "shards").mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists():
        _check_settings(out / "settings.json", settings)

    parts = make_parts(files, part_bytes)
    trained = None
    if tokenizer is None:
        tokenizer = out / "tokenizer.model"
        if not tokenizer.exists():
            trained = train_sentencepiece(sample(parts, separator), vocab_size)
    _begin(out / "settings.json", settings)
    if trained:
        write_whole(tokenizer, trained)
    loaded = load_tokenizer(tokenizer)
    copy = out / ("tokenizer.json" if loaded.file.suffix == ".json" else "tokenizer.model")
    if not copy.exists():
        write_whole(copy, loaded.file.read_bytes())
    settled = json.dumps([settings, loaded.eod]).encode()
    digest = hashlib.sha256(copy.read_bytes() + settled).hexdigest()
    dtype = "uint16" if loaded.vocab_size <= 2**16 else "uint32"
    job = Job(out / "shards", tokenizer, digest, dtype, valid, separator)
    keyed = [(part_key(part, job), part) for part in parts]
    _tokenise_missing(keyed, job, workers)

    records = {key: read_record(key, job) or {} for key, _ in keyed}
    index: dict[str, Any] = {
        "version": VERSION,
        "vocab_size": loaded.vocab_size,
        "eod": loaded.eod,
        "dtype": dtype,
        "tokenizer": copy.name,
        "splits": {split: _split(split, records) for split in SPLITS},
    }
    if not index["splits"]["train"]["tokens"]:
        if held := index["splits"]["valid"]["documents"]:
            takes = "--valid takes a share that leaves documents to train on"
            raise ValueError(f"{takes}, got {valid}, which holds out all {held:,}")
        raise ValueError(f"FILE takes text to train on, got {len(files)} files with none")
    write_whole(out / "tokens.json", json.dumps(index, indent=1).encode())
    # Of inputs that have changed since, and of runs that were killed.
    for path in job.folder.iterdir():
        if path.name.partition(".")[0] not in records or path.suffix == ".tmp":
            path.unlink(missing_ok=True)
    return index


def _begin(path: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings, once a tokenizer has been made with them; another run may have begun."""
    if not path.exists():
        write_whole(path, json.dumps(settings).encode())
    _check_settings(path, settings)


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    try:
        begun = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        takes = "--out takes a folder that prepare_text began"
        raise ValueError(f"{takes}, got {path} with something else") from None
    for name, value in settings.items():
        if begun.get(name) != value:
            was, got = (
                f"sha256 {setting[:12]}" if setting and name == "tokenizer" else setting
                for setting in (begun.get(name), value)
            )
            takes = f"--{name} takes {was}, with which {path.parent} was begun"
            raise ValueError(f"{takes}, got {got}: take another --out")


def _tokenise_missing(keyed: Sequence[tuple[str, Part]], job: Job, workers: int) -> None:
    missing = [(key, part) for key, part in keyed if read_record(key, job) is None]
    if len(missing) < len(keyed):
        print(f"done already: {len(keyed) - len(missing)} of {len(keyed)} parts", file=sys.stderr)
    began = shown = time.monotonic()
    tokens = 0
    for done, count in enumerate(_map(partial(tokenise, job=job), missing, workers), 1):
        tokens += count
        now = time.monotonic()
        if now - shown > 5 or done == len(missing):
            rate = tokens / (now - began)
            counts = f"{tokens:,} tokens, {rate:,.0f} a second"
            print(f"part {done} of {len(missing)}: {counts}", file=sys.stderr)
            shown = now


def _map(
    function: Callable[[tuple[str, Part]], int], keyed: Sequence[tuple[str, Part]], workers: int
) -> Iterator[int]:
    """`function` of every part, in order.

    After an error the parts that are under way are still finished.
    """
    if workers == 1 or len(keyed) < 2:
        yield from map(function, keyed)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(keyed)), spawn, initializer=_start_worker) as pool:
        # Ctrl-C is for the parent: the workers inherit what is blocked while they are started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        results = pool.map(function, keyed)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from results


def _start_worker() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for ever for its next part."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _split(split: str, records: dict[str, Any]) -> dict[str, Any]:
    counts = {key: record[split] for key, record in records.items()}
    tokens = {key: count["tokens"] for key, count in counts.items() if count["tokens"]}
    return {
        "documents": sum(count["documents"] for count in counts.values()),
        "tokens": sum(tokens.values()),
        "shards": [[f"shards/{key}.{split}.bin", count] for key, count in tokens.items()],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare_text", description="Turns text into a folder of token shards."
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help='text, .jsonl of {"text": "..."}, either with .gz or .xz, or directories of them',
    )
    parser.add_argument(
        "--stdlib",
        action="store_true",
        help="take the sources of Python's standard library instead",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to go on with")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="SentencePiece model, or Hugging Face tokenizer.json or folder",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32000,
        help="of a new tokenizer, without one (%(default)s)",
    )
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes (%(default)s)")
    parser.add_argument(
        "--valid", type=float, default=0.01, help="share of documents held out (%(default)s)"
    )
    parser.add_argument(
        "--separator", help="text between the documents of a text file; without it each is one"
    )
    parser.add_argument(
        "--part-mb",
        type=float,
        default=PART_BYTES // 2**20,
        help="input that is done or lost at once (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
