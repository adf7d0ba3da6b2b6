from __future__ import annotations

import re
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")

from examples.data.documents import find_files, make_parts, sample  # noqa: E402
from examples.data.tokenizer import train_sentencepiece  # noqa: E402


def pieces(model: bytes) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


def words(count: int) -> list[str]:
    """Words of four letters that Zipf would draw, each with the blank before it."""
    random = Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["".join(random.choices(letters, k=4)) for _ in range(300)]
    weights = [1 / rank for rank in range(1, 301)]
    return [f" {word}" for word in random.choices(known, weights, k=count)]


@pytest.mark.parametrize("characters", [4_200, 70_000, 189_000])
def test_a_long_line_gets_the_pieces_of_its_words_in_short_lines(characters: int) -> None:
    """sentencepiece #463, #517: lines above max_sentence_length, 4192 bytes, are left out."""
    spoken = words(characters // 5)
    short = ["".join(spoken[first : first + 10]) for first in range(0, len(spoken), 10)]
    expected = pieces(train_sentencepiece(["\n".join(short)], 700))
    assert pieces(train_sentencepiece(["".join(spoken)], 700)) == expected
    assert sum(len(piece) == 5 for piece in expected) > 50, "whole words"


@pytest.mark.parametrize(("model_type", "vocab_size"), [("bpe", 700), ("unigram", 550)])
def test_most_text_in_long_lines_gets_most_pieces(model_type: str, vocab_size: int) -> None:
    """Open-Llama #11: 94 % of a corpus in long lines, of which the tokenizer had no piece."""
    short = ["0123456789 987654321 13579 24680"] * 400
    long = ["".join(words(40_000))]
    learned = pieces(train_sentencepiece([*short, *long], vocab_size, model_type))[259:]
    assert sum(piece.strip("▁").isalpha() for piece in learned) > len(learned) / 2


def test_a_long_line_without_blanks_is_trained_on() -> None:
    random = Random(0)
    text = "".join(
        random.choices(["東京都", "大阪府", "北海道", "沖縄県"], k=21_000)
    )  # 189 kB in UTF-8
    learned = pieces(train_sentencepiece([text], 290))
    assert {"東京都", "大阪府", "北海道", "沖縄県"} < set(learned)


def test_a_line_with_a_block_of_five_eighths_is_trained_on() -> None:
    """SentencePiece keeps U+2585, which sparklines have, for itself and leaves out its lines."""
    expected = pieces(train_sentencepiece(["loss \n falls\n"] * 50, 269))
    assert pieces(train_sentencepiece(["loss ▅▅ falls\n"] * 50, 269)) == expected


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from("ab \n\t\0▅σ🙂\ufeff\u2028\r東"), max_size=60), st.integers(1, 90))
def test_any_text_trains_or_is_one_sentence_and_comes_back(text: str, times: int) -> None:
    for vocab_size in (262, 270):
        model, said = b"", ""
        try:
            model = train_sentencepiece([text * times], vocab_size)
        except ValueError as error:
            said = str(error)
        if model:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            assert processor.get_piece_size() == vocab_size
            assert processor.decode(processor.encode(text)) == text
        else:
            assert re.fullmatch(r"(FILE|--vocab-size) takes .+, got .+", said)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_texts_give_the_same_model(model_type: str) -> None:
    text = "".join(words(5000))
    assert train_sentencepiece([text], 400, model_type) == train_sentencepiece(
        [text], 400, model_type
    )


NONE = "SentencePiece makes no pieces"


@pytest.mark.parametrize(
    ("text", "vocab_size", "model_type", "sentence"),
    [
        ("hello world", 9999, "bpe", "its 11 characters fill 285 pieces at most"),
        ("hello world", 9999, "unigram", "its 11 characters fill 267 pieces at most"),
        ("word " * 37_800, 400, "bpe", "its 189,000 characters fill 272 pieces at most"),
        ("x" * 189_000, 400, "bpe", "its 189,000 characters fill 267 pieces at most"),
        ("a\n" * 1000, 10**12, "bpe", "its 1,000 characters fill 260 pieces at most"),
        ("hello world", 2**31 - 1, "bpe", "its 11 characters fill 285 pieces at most"),
        ("hello world", 260, "bpe", "its characters and all bytes take 267 pieces alone"),
        ("hello world", 10, "bpe", "bytes, <unk>, <s> and </s> take 259 pieces alone"),
        ("hello world", 0, "unigram", "bytes, <unk>, <s> and </s> take 259 pieces alone"),
        ("a" * 20, 300, "unigram", f"{NONE} of its 20 characters, no pieces are loaded"),
    ],
)
def test_what_a_text_cannot_fill_is_said_of_the_text(
    text: str, vocab_size: int, model_type: str, sentence: str
) -> None:
    """sentencepiece #340: the reason was blank."""
    begun = time.process_time()
    with pytest.raises(ValueError) as error:
        train_sentencepiece([text], vocab_size, model_type)
    takes = "--vocab-size takes a size that this text can fill"
    assert str(error.value) == f"{takes}, got {vocab_size}: {sentence}"
    assert time.process_time() - begun < 5, "SentencePiece took 15 s for 2³¹ - 1"


@pytest.mark.parametrize("text", ["", "\n\r\n", "\0\0", "▅▅\n▅"])
def test_nothing_to_train_on_is_said_of_the_text(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^FILE takes text to train a tokenizer on, got nothing but "
    ):
        train_sentencepiece([text], 400)


def test_a_sample_has_as_much_of_every_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 5000)
    (tmp_path / "b.jsonl").write_text('{"text": "bbbb"}\n' * 1000)
    (tmp_path / "c.txt").write_text("σ" * 500)
    parts = make_parts(find_files([tmp_path]), 1000)
    assert len(parts) == 19, "17 of them are ranges of the .jsonl"
    texts = list(sample(parts, None, 19 * 105))
    assert texts[0] == "a" * 105 and texts[-1] == "σ" * 52, "and no half of the 53rd"
    assert texts[1:-1] == [*["bbbb"] * 26, "b"] * 17
