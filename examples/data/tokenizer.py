"""Tokenizers: an existing SentencePiece or Hugging Face one, or a SentencePiece BPE that is trained on a sample."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# What tokenizer.json's without a tokenizer_config.json call the end of a text.
HF_EODS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(NamedTuple):
    """`encode` gives a text's ids without any end of document; `file` is all that it takes to decode them."""

    encode: Callable[[str], list[int]]
    vocab_size: int
    eod: int
    file: Path


@cache
def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model, a tokenizer.json or a folder with one; ValueError for anything else."""
    if path.is_dir() or path.suffix == ".json":
        return _hugging_face(path / "tokenizer.json" if path.is_dir() else path)
    return _sentencepiece(path)


def _sentencepiece(path: Path) -> Tokenizer:
    sentencepiece = _import_sentencepiece()
    if not path.is_file():
        raise ValueError(
            f"--tokenizer takes a SentencePiece model or a tokenizer.json, got {path}, which is not a file"
        )
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise ValueError(f"--tokenizer takes a SentencePiece model, got {path}, which is not one") from None
    if pieces.eos_id() < 0:
        raise ValueError(f"--tokenizer takes a model with an end-of-sentence piece, got {path}, which has none")
    return Tokenizer(pieces.encode, pieces.get_piece_size(), pieces.eos_id(), path)


def _import_sentencepiece() -> Any:
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise ValueError("prepare_text takes `pip install sentencepiece`, got none") from None
    return sentencepiece


def _hugging_face(path: Path) -> Tokenizer:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise ValueError(f"--tokenizer takes `pip install tokenizers` for a tokenizer.json, got {path}") from None
    if not path.is_file():
        raise ValueError(
            f"--tokenizer takes a folder with a tokenizer.json, got {path.parent} without: "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes it"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # of tokenizers, which has one bare Exception for everything
        raise ValueError(f"--tokenizer takes a Hugging Face tokenizer.json, got {path}, which is not one") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = [name for name in (_named_eod(path.with_name("tokenizer_config.json")), *HF_EODS) if name]
    eod = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if eod is None:
        raise ValueError(
            f"--tokenizer takes a tokenizer_config.json with eos_token, got {path}, which has no known end"
        )
    return Tokenizer(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,  # ids can have gaps
        eod=eod,
        file=path,
    )


def _named_eod(config: Path) -> str | None:
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError):
        raise ValueError(f"--tokenizer takes a JSON object as tokenizer_config.json, got {config}") from None
    name = eos.get("content") if isinstance(eos, dict) else eos
    return name if isinstance(name, str) else None


def train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE that gives texts back unchanged: nothing is normalised, unknown characters are bytes.

    The same texts give the same model: the trainer's own sampling, which draws a new seed each time, stays off.
    """
    sentencepiece = _import_sentencepiece()
    # Read before the trainer runs, which would turn the sentence about a bad file into one of its own.
    lines = [line for text in texts for line in text.splitlines() if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            shuffle_input_sentence=False,
            max_sentence_length=2**16,  # bytes; longer lines are left out, and the default leaves out long paragraphs
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
