"""Turns text into what Megatron reads: PREFIX_text_document.bin and .idx.

And PREFIX.model, a SentencePiece model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)

from data import Tokenizer

# Where `examples` is, wherever this is started.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.data.documents import documents as read
from examples.data.documents import find_files, make_parts, sample
from examples.data.tokenizer import train_sentencepiece

# What Megatron-LM's own tool adds to a prefix: the JSON key and the level.
SUFFIX = "_text_document"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares the files of the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        texts = sample(make_parts(find_files(args.files)), args.separator)
        first = next(texts)  # which says so where there is none, before anything is written
        args.prefix.parent.mkdir(parents=True, exist_ok=True)
        model = args.tokenizer
        if model is None:
            trained = train_sentencepiece(chain([first], texts), args.vocab_size, args.model_type)
            model = args.prefix.with_name(args.prefix.name + ".model")
            model.write_bytes(trained)
        tokenizer = Tokenizer(model)
        prefix = str(args.prefix) + SUFFIX
        texts = documents(args.files, args.separator)
        count, tokens, dtype = write_tokens(texts, tokenizer, prefix)
    except (ValueError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{model}: {tokenizer.vocab_size:,} pieces")
    print(f"{prefix}: {count:,} documents, {tokens:,} tokens, {dtype}")
    return 0


def documents(files: Sequence[Path], separator: str | None) -> Iterator[str]:
    """Every document of the files and directories, as `examples.data.documents` reads them."""
    for part in make_parts(find_files(files)):
        yield from (text for _, text in read(part, separator))


def write_tokens(texts: Iterator[str], tokenizer: Tokenizer, prefix: str) -> tuple[int, int, str]:
    """Writes every document and an end-of-document token.

    Returns how many documents and tokens, and the tokens' type.
    """
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    Path(get_idx_path(prefix)).unlink(missing_ok=True)  # an older index must not outlive its data
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=dtype)
    for text in texts:
        ids = [*tokenizer.pieces.encode(text), tokenizer.eod]
        builder.add_document(ids, [len(ids)])
    builder.finalize(get_idx_path(prefix))
    return len(builder.sequence_lengths), sum(builder.sequence_lengths), numpy.dtype(dtype).name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Turns text into Megatron's indexed tokens."
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help='UTF-8 text, or .jsonl with {"text": "..."}',
    )
    parser.add_argument(
        "--prefix", type=Path, required=True, help="path of the output without its suffixes"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="use this SentencePiece model instead of training one"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="pieces of the new tokenizer (%(default)s)"
    )
    parser.add_argument(
        "--model-type", choices=("bpe", "unigram"), default="bpe", help="its kind (%(default)s)"
    )
    parser.add_argument(
        "--separator", help="text between the documents of a file; without it each file is one"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
