"""What `examples.data.prepare_text` and `examples/megatron/prepare.py` make of people's files."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy
import pytest

sentencepiece = pytest.importorskip("sentencepiece")

from examples.data import prepare_text  # noqa: E402
from examples.data.documents import find_files  # noqa: E402
from examples.data.tokenizer import train_sentencepiece  # noqa: E402
from examples.data.tokens import Tokens  # noqa: E402

TEXT = "def f(x):\r\n    return  x\n\n\ttab σ₁ 🙂 \x00\n" * 20
GOOD = [json.dumps({"text": f"{index} {TEXT}"}).encode() for index in range(200)]

Run = Callable[..., tuple[int, list[str]]]


def run_prepare_text(out: Path, *arguments: object) -> tuple[int, list[str]]:
    command = [*map(str, arguments), "--out", str(out), "--valid", "0", "--workers", "1"]
    status = prepare_text.main(command)
    if status:
        return status, []
    tokens, eod = [], Tokens(out, context=1).eod
    for name, _ in json.loads((out / "tokens.json").read_text())["splits"]["train"]["shards"]:
        tokens += numpy.fromfile(out / name, dtype="uint16").tolist()
    ends = [-1, *(i for i, token in enumerate(tokens) if token == eod)]
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    return 0, [pieces.decode(tokens[a + 1 : b]) for a, b in pairwise(ends)]


def run_prepare(out: Path, *arguments: object) -> tuple[int, list[str]]:
    from tests.examples import example  # noqa: F401 - finds the example's files

    import prepare  # isort: skip
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    status = prepare.main([*map(str, arguments), "--prefix", str(out)])
    if status:
        return status, []
    given = [Path(str(b)) for a, b in pairwise(arguments) if a == "--tokenizer"]
    model = given[0] if given else out.with_name(out.name + ".model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    indexed = IndexedDataset(f"{out}_text_document")
    return 0, [pieces.decode(document[:-1].tolist()) for document in indexed]


@pytest.fixture(params=[run_prepare_text, run_prepare], ids=["prepare_text", "prepare.py"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "x.model"
    path.write_bytes(train_sentencepiece([TEXT], 290))
    return path


def sentence(capfd: pytest.CaptureFixture[str]) -> str:
    """The one sentence that was printed, to both what Python and C++ call standard error."""
    error = capfd.readouterr().err
    assert error.endswith("\n") and len(error.splitlines()) == 1, error
    tool, _, said = error.rstrip("\n").partition(": error: ")
    assert tool in ("prepare_text", "prepare.py") and said
    return said


JSON_LINES = {
    "blank lines": b'\n{"text": "one"}\n\n \t\r\n{"text": "two"}\n\n',
    "lines of other blanks": '{"text": "one"}\n\xa0\u3000\n\x1c\n{"text": "two"}\n'.encode(),
    "a BOM": codecs.BOM_UTF8 + b'{"text": "one"}\n{"text": "two"}\n',
    "a BOM alone on its line": codecs.BOM_UTF8 + b'\n{"text": "one"}\n{"text": "two"}\n',
    "files with BOMs joined": b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n',
    "CRLF": b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n',
    "no end of the last line": b'{"text": "one"}\n{"text": "two"}',
    "blank texts": b'{"text": "one"}\n{"text": ""}\n{"text": " \\n"}\n{"text": "two"}\n',
    "other keys": b'{"id": 1, "text": "one", "meta": [{}]}\n{"text": "two", "next": null}\n',
    "a long line": b'{"x": "' + b"x" * 189_000 + b'", "text": "one"}\n{"text": "two"}',
}


@pytest.mark.parametrize("kind", JSON_LINES)
def test_json_lines_as_people_have_them(kind: str, run: Run, tmp_path: Path, model: Path) -> None:
    """Megatron-LM #62."""
    content = JSON_LINES[kind]
    for file in ("a.jsonl", "B.JSONL", "c.jsonl.gz"):
        path = tmp_path / file
        path.write_bytes(gzip.compress(content) if file.endswith("gz") else content)
        assert run(tmp_path / f"out {file}", path, "--tokenizer", model) == (0, ["one", "two"])


def test_what_ends_lines_elsewhere_stays_in_its_record(
    run: Run, tmp_path: Path, model: Path
) -> None:
    texts = ["a\u2028b\x85c\x0bd", "a\rb\r\nc", "\0", "\ufeff"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), newline="\n")
    assert run(tmp_path / "out", tmp_path / "a.jsonl", "--tokenizer", model) == (0, texts)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_text_is_taken_with_its_line_ends_and_without_its_bom(
    line_end: str, run: Run, tmp_path: Path, model: Path
) -> None:
    text = line_end.join(["one", "", "two"])  # and no end of the last line
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    assert run(tmp_path / "out", tmp_path / "a.txt", "--tokenizer", model) == (0, [text])


RECORD = 'FILE takes {{"text": "..."}} on each line of a .jsonl, got {got} in {path}:201'


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b'{"content": "x"}', '{"content": "x"}'),
        (b'["text"]', '["text"]'),
        (b'"text"', '"text"'),
        (b"3", "3"),
        (b"null", "null"),
        (b'{"text": null}', '{"text": null}'),
        (b'{"text": ["x"]}', '{"text": ["x"]}'),
        (b'{"text": "x', '{"text": "x'),
        (b'{"text": "x"} {"text": "y"}', '{"text": "x"} {"text": "y"}'),
        (b'{"text": "x"}\r{"text": "y"}', '{"text": "x"}\\r{"text": "y"}'),
        (b'{"text": "a\tb"}', '{"text": "a\\tb"}'),
        (b'{"text": "a\0b"}', '{"text": "a\\x00b"}'),
        ('{"σ\u2028σ": "x"}'.encode(), '{"σ\\u2028σ": "x"}'),
        (b"[" * 200_000, "[" * 40),
        (b'{"text": 1' + b"0" * 5000 + b"}", '{"text": 1' + "0" * 30),
    ],
)
def test_a_bad_record_is_one_sentence_with_file_and_line(
    line: bytes, got: str, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """tiktoken #82: among good lines, while a tokenizer is trained."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*GOOD, line, *GOOD]))
    assert run(tmp_path / "out", path, "--vocab-size", 290) == (2, [])
    assert sentence(capfd) == RECORD.format(got=got, path=path)


MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("word", ["hello", "σ"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf_16_and_32_are_named(
    name: str,
    word: str,
    marked: bool,
    encoding: str,
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    lines = f'{{"text": "hello"}}\n{{"text": "{word}"}}\n'
    path.write_bytes((MARKS[encoding] if marked else b"") + lines.encode(encoding))
    assert run(tmp_path / "out", path, "--vocab-size", 290) == (2, [])
    expected = rf"FILE takes UTF-8, got b'\\x\w\w' in {path}:[12], as in UTF-16 or UTF-32"
    assert re.fullmatch(expected, sentence(capfd))


@pytest.mark.parametrize(
    "content", [b"one\ntwo \xff", b"one\n\xc3", "one\nσ".encode("iso8859-7"), b"one\n\xed\xa0\x80"]
)
def test_other_bytes_are_named_with_their_line(
    content: bytes, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert run(tmp_path / "out", tmp_path / "a.txt", "--vocab-size", 290) == (2, [])
    said = sentence(capfd)
    assert re.fullmatch(rf"FILE takes UTF-8, got b'\\x\w\w' in {tmp_path}/a.txt:2", said)


@pytest.mark.parametrize(
    ("name", "content", "which"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", codecs.BOM_UTF8, "blank"),
        ("a.txt", " \r\n\t\xa0\u3000\n".encode(), "blank"),
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b'\n{"text": " "}\n', "blank"),
        ("a.txt.gz", b"", "empty"),
        ("a.txt.gz", gzip.compress(b""), "blank"),
    ],
)
def test_without_text_it_says_so(
    name: str,
    content: bytes,
    which: str,
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert run(tmp_path / "out", path, "--vocab-size", 400) == (2, [])
    assert sentence(capfd) == f"FILE takes text, got none in {path}, which is {which}"
    other, full = tmp_path / "b.txt", tmp_path / "c.txt"
    other.write_bytes(b"")
    assert run(tmp_path / "out", path, other, "--vocab-size", 400) == (2, [])
    which = f"2 files, such as {path}, which is {which}"
    assert sentence(capfd) == f"FILE takes text, got none in {which}"
    full.write_text(TEXT)
    assert run(tmp_path / "out", path, other, full, "--vocab-size", 290) == (0, [TEXT])


def test_a_vocabulary_that_the_text_does_not_fill_says_what_it_fills_and_then_works(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = "word " * 37_800
    (tmp_path / "a.txt").write_text(line)
    assert run(tmp_path / "out", tmp_path / "a.txt", "--vocab-size", 400) == (2, [])
    takes = "--vocab-size takes a size that this text can fill, got 400"
    assert sentence(capfd) == f"{takes}: its 189,000 characters fill 272 pieces at most"
    assert run(tmp_path / "out", tmp_path / "a.txt", "--vocab-size", 272) == (0, [line])


def test_very_many_short_documents(run: Run, tmp_path: Path) -> None:
    texts = [f"{number:x}" for number in range(30_000)]
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    assert run(tmp_path / "out", tmp_path / "a.jsonl", "--vocab-size", 300) == (0, texts)


def test_a_directory_is_its_text_files_in_upper_case_too(
    run: Run, tmp_path: Path, model: Path
) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    for name, content in (
        ("a.TXT", b"one"),
        ("b.JSONL", b'{"text": "two"}'),
        ("deep/c.Txt.GZ", gzip.compress(b"three")),
    ):
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in/d.bin").write_bytes(b"\xff")
    texts = ["one", "two", "three"]
    assert run(tmp_path / "out", tmp_path / "in", "--tokenizer", model) == (0, texts)


def test_a_file_counts_once(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twice, it would be trained on and held out."""
    (tmp_path / "in").mkdir()
    path, link = tmp_path / "in/a.txt", tmp_path / "b.txt"
    path.write_text(TEXT)
    link.symlink_to(path)
    for arguments in ([path, path], [path.parent, path], [path, link]):
        assert run(tmp_path / "out", *arguments, "--vocab-size", 290) == (2, [])
        both = f"{path} and {arguments[1]}"
        assert sentence(capfd) == f"FILE takes each file once, got {both}, which are one"


def test_other_than_files_are_refused(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A pipe gives its text once, and it is read more than once."""
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", tmp_path):
        assert run(tmp_path / "out", path, "--vocab-size", 290) == (2, [])
        which = f"{tmp_path}/a.txt, which is neither"
        assert sentence(capfd) == f"FILE takes files and directories, got {which}"
    assert run(tmp_path / "out", tmp_path / "none.txt", "--vocab-size", 290) == (2, [])
    assert sentence(capfd).endswith(f"No such file or directory: '{tmp_path}/none.txt'")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "out", tmp_path / "empty", "--vocab-size", 290) == (2, [])
    assert sentence(capfd) == f"FILE takes text, got none in {tmp_path}/empty"


@pytest.fixture
def locked() -> Iterator[Path]:
    """A directory with one in it that cannot be read, not even by root, who is nobody meanwhile."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "a.txt").write_text("one")
        (folder / "locked").mkdir(mode=0o000)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        (folder / "locked").chmod(0o755)


def test_a_folder_that_cannot_be_read_is_not_left_out(locked: Path) -> None:
    with pytest.raises(PermissionError, match="locked"):
        find_files([locked])


def test_a_name_that_is_not_utf_8(run: Run, tmp_path: Path, model: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"a\xff.txt")
    with open(path, "wb") as file:
        file.write(b"one")
    assert run(tmp_path / "out", os.fsdecode(path), "--tokenizer", model) == (0, ["one"])


def test_megatrons_documents_are_in_the_order_of_the_arguments(tmp_path: Path, model: Path) -> None:
    """Megatron splits by a document's number; names may be alike, as no split depends on them."""
    for folder in ("b", "a"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    arguments = [tmp_path / "b/x.txt", tmp_path / "a/x.txt", "--tokenizer", model]
    assert run_prepare(tmp_path / "out", *arguments) == (0, ["b", "a"])


def test_a_share_that_holds_everything_out_is_said_of_the_share(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one")
    arguments = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--tokenizer", str(model)]
    assert prepare_text.main([*arguments, "--valid", "0.9999", "--workers", "1"]) == 2
    takes = "--valid takes a share that leaves documents to train on"
    assert capfd.readouterr().err.endswith(f"{takes}, got 0.9999, which holds out all 1\n")
