"""Tokenizers: an existing SentencePiece or Hugging Face one, or a new SentencePiece BPE.

The new one is trained on a sample.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# What tokenizer.json's without a tokenizer_config.json call the end of a text.
HF_EODS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

RESERVED = 256 + 3  # pieces that every new model has: the bytes, <unk>, <s> and </s>
LONGEST = 16  # characters of a piece

# Characters of a line that the trainer sees at once. A longer one is cut before a space, which
# takes no piece away, as none has a space behind another character; a longer word anywhere.
LINE = 1024
CUT = re.compile(rf"[^\u2585]{{1,{LINE}}}(?:$|(?=\u2585)|(?<! )(?= ))|[^\u2585]{{1,{LINE}}}")


class Tokenizer(NamedTuple):
    """A tokenizer and its file."""

    encode: Callable[[str], list[int]]  # a text to its ids, without any end of document
    vocab_size: int
    eod: int  # the id of an end of document
    file: Path  # all that it takes to decode ids


@cache
def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model, a tokenizer.json or a folder with one.

    ValueError: it is anything else.
    """
    if path.is_dir() or path.suffix == ".json":
        return _hugging_face(path / "tokenizer.json" if path.is_dir() else path)
    return _sentencepiece(path)


def _sentencepiece(path: Path) -> Tokenizer:
    if not path.is_file():
        takes = "--tokenizer takes a SentencePiece model or a tokenizer.json"
        raise ValueError(f"{takes}, got {path}, which is not a file")
    pieces = load_sentencepiece(path)
    return Tokenizer(pieces.encode, pieces.get_piece_size(), pieces.eos_id(), path)


def load_sentencepiece(path: Path) -> Any:
    """The SentencePieceProcessor of a model with an end of sentence.

    ValueError: it is anything else.
    """
    sentencepiece = _import_sentencepiece()
    takes = "--tokenizer takes a SentencePiece model"
    if not path.is_file():
        raise ValueError(f"{takes}, got {path}, which is not a file")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        raise ValueError(f"{takes}, got {path}, which is not one") from None
    if pieces.eos_id() < 0:
        raise ValueError(
            f"--tokenizer takes a model with an end-of-sentence piece, got {path}, which has none"
        )
    return pieces


def _import_sentencepiece() -> Any:
    try:
        import sentencepiece
    except ModuleNotFoundError:
        takes = "a SentencePiece tokenizer takes `pip install sentencepiece`"
        raise ValueError(f"{takes}, got none") from None
    return sentencepiece


def _hugging_face(path: Path) -> Tokenizer:
    try:
        import tokenizers
    except ModuleNotFoundError:
        takes = "--tokenizer takes `pip install tokenizers` for a tokenizer.json"
        raise ValueError(f"{takes}, got {path}") from None
    if not path.is_file():
        raise ValueError(
            f"--tokenizer takes a folder with a tokenizer.json, got {path.parent} without: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes it"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # of tokenizers, which has one bare Exception for everything
        takes = "--tokenizer takes a Hugging Face tokenizer.json"
        raise ValueError(f"{takes}, got {path}, which is not one") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = _named_eod(path.with_name("tokenizer_config.json"))
    names = [named, *HF_EODS] if named else HF_EODS
    eod = next((i for i in map(tokenizer.token_to_id, names) if i is not None), None)
    if eod is None:
        takes = "--tokenizer takes a tokenizer_config.json with eos_token"
        raise ValueError(f"{takes}, got {path}, which has no known end")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())  # ids can have gaps
    return Tokenizer(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        vocab_size=largest + 1,
        eod=eod,
        file=path,
    )


def _named_eod(config: Path) -> str | None:
    if not config.is_file():
        return None
    try:
        eos = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError):
        takes = "--tokenizer takes a JSON object as tokenizer_config.json"
        raise ValueError(f"{takes}, got {config}") from None
    name = eos.get("content") if isinstance(eos, dict) else eos
    return name if isinstance(name, str) else None


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: str = "bpe") -> bytes:
    """A SentencePiece model that gives texts back unchanged; `model_type` is "bpe" or "unigram".

    Nothing is normalised, unknown characters are bytes; U+2581 alone, which SentencePiece writes
    for a space, comes back as one. Every line takes part, however long. The same texts give the
    same model: the trainer's own sampling, which draws a new seed each time, stays off.
    ValueError of one sentence: nothing that could be a piece, or another number of pieces than
    `vocab_size`.
    """
    sentencepiece = _import_sentencepiece()
    # Read before the trainer runs, which would make a sentence of its own of one about a bad file.
    lines = [line for text in texts for whole in text.splitlines() for line in _trainable(whole)]
    characters = sum(len(line) - line.count("\0") for line in lines)  # the trainer passes over NUL
    if not characters:
        got = "nothing but NUL, U+2585 and ends of lines"
        raise ValueError(f"FILE takes text to train a tokenizer on, got {got}")
    takes = f"--vocab-size takes a size that this text can fill, got {vocab_size}"
    if vocab_size < RESERVED:
        raise ValueError(f"{takes}: bytes, <unk>, <s> and </s> take {RESERVED} pieces alone")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            # The trainer takes time by the size that it is asked for, also by one that no text of
            # so many characters fills: a piece is a string in it of at most LONGEST.
            vocab_size=min(vocab_size, RESERVED + LONGEST * characters + 1),
            model_type=model_type,
            shuffle_input_sentence=False,
            max_sentence_length=4 * LINE,  # bytes
            max_sentencepiece_length=LONGEST,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"{takes}: {_reason(str(error), characters)}") from None
    return model.getvalue()


def _trainable(line: str) -> Sequence[str]:
    """A line as the trainer takes it, which leaves out long ones and any with U+2585 in silence."""
    if len(line) > LINE or "\u2585" in line:
        return CUT.findall(line)
    return [line] if line else []


def _reason(message: str, characters: int) -> str:
    """What is wrong with the text, of a message that speaks of the trainer's code and flags."""
    if most := re.search(r"too high .* <= (\d+)", message):
        return f"its {characters:,} characters fill {most[1]} pieces at most"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"its characters and all bytes take {least[1]} pieces alone"
    words = " ".join(message.split()).removeprefix("INTERNAL: ").rstrip(". ")
    return f"SentencePiece makes no pieces of its {characters:,} characters, {words}"
