from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from tests.examples.example import sources

import data  # isort: skip
import prepare  # isort: skip
from megatron.core.datasets.indexed_dataset import IndexedDataset  # isort: skip

TEXT = "def f(x):\r\n    return  x\n\n\ttab σ₁ 🙂 \x00\n" * 50


def prepared(tmp_path: Path, vocab_size: int, *files: str) -> tuple[IndexedDataset, data.Tokenizer]:
    assert (
        prepare.main(
            [*files, "--prefix", str(tmp_path / "out" / "x"), "--vocab-size", str(vocab_size)]
        )
        == 0
    )
    model = tmp_path / "out" / "x.model"
    return IndexedDataset(str(tmp_path / "out" / "x_text_document")), data.Tokenizer(model)


def test_the_tokens_give_back_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [TEXT, *(path.read_bytes().decode() for path in sources(3))]
    files = [tmp_path / f"{index}.txt" for index in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    indexed, tokenizer = prepared(tmp_path, 400, *map(str, files))
    assert indexed.index.dtype == numpy.uint16 and tokenizer.vocab_size == 400
    assert [document[-1] for document in indexed] == [tokenizer.eod] * len(texts)
    assert [tokenizer.pieces.decode(document[:-1].tolist()) for document in indexed] == texts
    first, second = capsys.readouterr().out.splitlines()
    assert (
        "x.model: 400 pieces" in first
        and f"4 documents, {sum(indexed.sequence_lengths):,} tokens, uint16" in second
    )


def test_documents_of_json_lines_and_of_a_separator(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("one\ntwo", "  ", "three"))
    )
    (tmp_path / "b.txt").write_text("four<|end|>\n<|end|>five")
    files = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    assert list(prepare.documents(files, "<|end|>")) == ["one\ntwo", "three", "four", "five"]
    assert list(prepare.documents(files[1:], None)) == ["four<|end|>\n<|end|>five"]


def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    first, _ = prepared(tmp_path, 290, str(text))
    model = tmp_path / "out" / "x.model"
    assert (
        prepare.main([str(text), "--prefix", str(tmp_path / "y"), "--tokenizer", str(model)]) == 0
    )
    assert not (tmp_path / "y.model").exists()
    second = IndexedDataset(str(tmp_path / "y_text_document"))
    assert (second[0] == first[0]).all()


@pytest.mark.parametrize(
    ("name", "content", "arguments", "sentence"),
    [
        ("a.txt", b"", [], "FILE takes text, got none in "),
        ("a.txt", b" \n\t\n", [], "FILE takes text, got none in "),
        ("a.txt", b"abc \xff", [], "FILE takes UTF-8, got "),
        (
            "a.jsonl",
            b'{"texts": "x"}\n',
            [],
            'FILE takes {"text": "..."} on each line of a .jsonl, got {"texts"',
        ),
        (
            "a.txt",
            b"hello world",
            ["--vocab-size", "9999"],
            "takes a size that this text can fill, got 9999: ",
        ),
        (
            "a.txt",
            b"hello world",
            ["--vocab-size", "10"],
            "takes a size that this text can fill, got 10: ",
        ),
        (
            "a.txt",
            b"hello",
            ["--tokenizer", "missing.model"],
            "--tokenizer takes a SentencePiece model, got missing",
        ),
        ("a.txt", b"hello", ["--tokenizer", __file__], "which is not one"),
    ],
)
def test_bad_input_is_one_sentence(
    name: str,
    content: bytes,
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    assert prepare.main([str(tmp_path / name), "--prefix", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "x_text_document.idx").exists()
