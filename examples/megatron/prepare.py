"""Turns text into what Megatron reads: PREFIX_text_document.bin and .idx, and PREFIX.model, a SentencePiece model."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import sentencepiece
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from data import Tokenizer

# What Megatron-LM's own tool adds to a prefix: the JSON key and the level.
SUFFIX = "_text_document"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares the files of the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        if next(documents(args.files, args.separator), None) is None:
            raise ValueError(f"FILE takes text, got none in {', '.join(map(str, args.files))}")
        args.prefix.parent.mkdir(parents=True, exist_ok=True)
        model = args.tokenizer
        if model is None:
            model = args.prefix.with_name(args.prefix.name + ".model")
            model.write_bytes(train_tokenizer(documents(args.files, args.separator), args.vocab_size, args.model_type))
        tokenizer = Tokenizer(model)
        prefix = str(args.prefix) + SUFFIX
        count, tokens, dtype = write_tokens(documents(args.files, args.separator), tokenizer, prefix)
    except (ValueError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{model}: {tokenizer.vocab_size:,} pieces")
    print(f"{prefix}: {count:,} documents, {tokens:,} tokens, {dtype}")
    return 0


def documents(files: Sequence[Path], separator: str | None) -> Iterator[str]:
    """Every document that is not blank: a line's "text" of a .jsonl, else a file or what `separator` cuts it into."""
    for path in files:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix == ".jsonl":
                    texts: Iterator[str] = (_text(line, path, number) for number, line in enumerate(file, 1))
                else:
                    texts = iter(file.read().split(separator) if separator else [file.read()])
                yield from (text for text in texts if text.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"FILE takes UTF-8, got {path} with {error.object[error.start : error.end]!r}") from None


def _text(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        got = f"{line.strip()[:40]} in {path}:{number}"
        raise ValueError(f'FILE takes {{"text": "..."}} on each line of a .jsonl, got {got}') from None
    return text


def train_tokenizer(texts: Iterator[str], vocab_size: int, model_type: str) -> bytes:
    """A SentencePiece model that gives texts back unchanged: nothing is normalized, unknown characters are bytes."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            input_sentence_size=2_000_000,  # of a larger corpus, a sample; the trainer holds all of it in memory
            shuffle_input_sentence=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"--vocab-size takes a size that this text can fill, got {vocab_size}: {reason}") from None
    return model.getvalue()


def write_tokens(texts: Iterator[str], tokenizer: Tokenizer, prefix: str) -> tuple[int, int, str]:
    """Writes every document and an end-of-document token; returns documents, tokens and the tokens' type."""
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    Path(get_idx_path(prefix)).unlink(missing_ok=True)  # an older index must not outlive its data
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=dtype)
    for text in texts:
        ids = [*tokenizer.pieces.encode(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(get_idx_path(prefix))
    return len(builder.sequence_lengths), sum(builder.sequence_lengths), numpy.dtype(dtype).name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare.py", description="Turns text into Megatron's indexed tokens.")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help='UTF-8 text, or .jsonl with {"text": "..."}'
    )
    parser.add_argument("--prefix", type=Path, required=True, help="path of the output without its suffixes")
    parser.add_argument("--tokenizer", type=Path, help="use this SentencePiece model instead of training one")
    parser.add_argument("--vocab-size", type=int, default=32000, help="pieces of the new tokenizer (%(default)s)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="its kind (%(default)s)")
    parser.add_argument("--separator", help="text between the documents of a file; without it each file is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
