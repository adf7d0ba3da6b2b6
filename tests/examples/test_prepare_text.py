from __future__ import annotations

import gzip
import io
import json
import lzma
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sentencepiece = pytest.importorskip("sentencepiece")

from examples.data import documents, prepare_text  # noqa: E402
from examples.data.tokenizer import load_tokenizer, train_sentencepiece  # noqa: E402
from examples.data.tokens import Tokens  # noqa: E402
from tests.processes import HANGS, ROOT  # noqa: E402

TEXT = "def f(x):\r\n    return  x\n\n\ttab σ₁ 🙂 \x00\n" * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "x.model"
    path.write_bytes(train_sentencepiece(iter([TEXT]), 290))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 180 parts of 20 kB: text files, and one .jsonl of 2,000 lines that is cut into
    ranges.
    """
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        (folder / f"{index:02}.txt").write_bytes(f"{index} {TEXT}".encode() * 10)
    with (folder / "lines.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{index} {TEXT}"}) + "\n" for index in range(2000))
    return folder


def run(*arguments: object) -> int:
    return prepare_text.main([*map(str, arguments), "--workers", "1"])


def texts(out: Path, split: str) -> list[str]:
    """Every document of the split, decoded."""
    index = json.loads((out / "tokens.json").read_text())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / index["tokenizer"]))
    found = []
    for name, count in index["splits"][split]["shards"]:
        tokens = numpy.fromfile(out / name, dtype=index["dtype"])
        assert len(tokens) == count and tokens[-1] == index["eod"]
        ends = [-1, *numpy.flatnonzero(tokens == index["eod"])]
        found += [pieces.decode(tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]
    assert len(found) == index["splits"][split]["documents"]
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
    }


def tar(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_the_tokens_give_back_the_text_of_every_kind_of_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    lines = "".join(
        json.dumps({"text": text, "url": "x"}) + "\n" for text in ("one\ntwo", "  ", TEXT)
    ).encode()
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    (folder / "b.jsonl").write_bytes(lines)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "d.txt.xz").write_bytes(lzma.compress(b"xz"))
    members = {"0001-a.txt": b"first", "0002-b.txt": b"second", "0003.bin": b"\xff"}
    (folder / "deep" / "urlsf_subset00-1_data.xz").write_bytes(lzma.compress(tar(members)))
    (folder / "deep" / "e.md").write_text("# e")
    (folder / "deep" / "empty.py").write_text("\n")
    (folder / "deep" / "f.bin").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("hidden")
    assert run(folder, "--out", tmp_path / "out", "--vocab-size", 300, "--valid", 0) == 0
    assert texts(tmp_path / "out", "train") == [
        *(TEXT, "one\ntwo", TEXT, "one\ntwo", TEXT, "xz", "# e", "first", "second"),
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("tokenizer.model: 300 tokens, end of document 2")
    assert (
        out[1].startswith("train: 9 documents, ")
        and out[2] == "valid: 0 documents, 0 tokens, 0 shards"
    )


def test_a_given_file_is_text_whatever_its_suffix_and_can_hold_many_documents(
    tmp_path: Path, model: Path
) -> None:
    (tmp_path / "a.data").write_text("four<|end|>\n<|end|>five")
    arguments = [tmp_path / "a.data", "--out", tmp_path / "out", "--tokenizer", model, "--valid", 0]
    assert run(*arguments, "--separator", "<|end|>") == 0
    assert texts(tmp_path / "out", "train") == ["four", "five"]


@settings(max_examples=40, deadline=None)
@given(
    lines=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=1, max_size=12
    ),
    part_bytes=st.integers(1, 80),
)
def test_every_line_is_in_one_range(
    lines: list[str], part_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": f"{line}."}, ensure_ascii=False) for line in lines),
        newline="\n",
    )
    parts = documents.make_parts(documents.find_files([path]), part_bytes)
    assert len(parts) == -(-path.stat().st_size // part_bytes)
    found = [document for part in parts for document in documents.documents(part, None)]
    assert [text for _, text in found] == [f"{line}." for line in lines]
    whole = documents.make_parts(documents.find_files([path]), 10**6)
    assert found == list(documents.documents(whole[0], None)), (
        "the places, which decide the split, are the same"
    )


def test_workers_do_not_matter_and_the_split_is_a_share(corpus: Path, tmp_path: Path) -> None:
    arguments = [str(corpus), "--vocab-size", "300", "--valid", "0.2", "--part-mb", "0.02"]
    for name, workers in (("one", "1"), ("three", "3")):
        assert (
            prepare_text.main([*arguments, "--out", str(tmp_path / name), "--workers", workers])
            == 0
        )
    one = contents(tmp_path / "one")
    assert (
        one == contents(tmp_path / "three")
        and sum(name.endswith(".train.bin") for name in one) > 80
    )
    valid, train = texts(tmp_path / "one", "valid"), texts(tmp_path / "one", "train")
    assert len(valid) + len(train) == 2060 and 320 < len(valid) < 500
    assert sorted(valid) != valid[::-1] and not set(valid) & set(train)
    assert len(Tokens(tmp_path / "one", "valid", context=64)) > 100


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "examples.data.prepare_text", *arguments]
    # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
    )


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a run that nothing stops leaves."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(corpus, "--tokenizer", model, "--valid", 0.2, "--part-mb", 0.01, "--out", out) == 0
    return contents(out)


@pytest.mark.parametrize(
    ("workers", "stop"), [(1, signal.SIGKILL), (3, signal.SIGKILL), (2, signal.SIGINT)]
)
def test_a_run_that_was_stopped_goes_on(
    workers: int,
    stop: signal.Signals,
    undisturbed: dict[str, bytes],
    corpus: Path,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(corpus), "--tokenizer", str(model), "--valid", "0.2", "--part-mb", "0.01"]
    out, done = tmp_path / "out", 0
    for _ in range(2 if stop == signal.SIGKILL else 1):
        process = start([*arguments, "--out", str(out), "--workers", str(workers)])
        while len(records(out)) < done + 5:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.001)
        process.send_signal(stop)
        # The pipe ends when the workers have ended, too.
        error = process.communicate(timeout=HANGS)[1]
        assert process.returncode == (130 if stop == signal.SIGINT else -stop), error
        done = len(records(out))
        assert not (out / "tokens.json").exists() and "Traceback" not in error
        with pytest.raises(ValueError, match=r"folder takes one that prepare_text finished"):
            Tokens(out, context=8)
    kept = {path: path.stat().st_mtime_ns for path in records(out)}
    capfd.readouterr()
    assert prepare_text.main([*arguments, "--out", str(out), "--workers", str(workers)]) == 0
    assert f"done already: {done} of " in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, (
        "what was done is not done again"
    )
    assert contents(out) == undisturbed


def records(out: Path) -> list[Path]:
    return sorted((out / "shards").glob("*.json"))


def test_a_changed_file_costs_its_own_part(tmp_path: Path, model: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(name * 900)
    arguments = [folder, "--out", out, "--tokenizer", model, "--valid", 0, "--part-mb", 0.001]
    assert run(*arguments) == 0
    before = {path: path.stat().st_ino for path in records(out)}
    (folder / "b.txt").write_text("new" * 300)
    assert run(*arguments) == 0
    assert texts(out, "train") == ["a" * 900, "new" * 300, "c" * 900]
    after = {path: path.stat().st_ino for path in records(out)}
    assert len(before) == len(after) == 3 and len(before.items() & after.items()) == 2
    shard = next(iter((out / "shards").glob("*.bin")))
    shard.write_bytes(shard.read_bytes()[:-2])
    assert run(*arguments) == 0 and len(Tokens(out, context=4)) > 0
    assert len(list((out / "shards").iterdir())) == 6


def test_other_settings_are_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    arguments = [tmp_path / "a.txt", "--out", tmp_path / "out", "--valid", 0]
    assert run(*arguments, "--vocab-size", 290) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    for other, sentence in (
        (["--vocab-size", 300], "--vocab-size takes 290, with which "),
        (["--vocab-size", 290, "--valid", 0.5], "--valid takes 0.0, with which "),
        (["--tokenizer", model], "--tokenizer takes None, with which "),
    ):
        assert run(*arguments, *other) == 2
        assert sentence in capsys.readouterr().err and contents(tmp_path / "out") == before
    (tmp_path / "out" / "settings.json").write_text("[1]")
    assert (
        run(*arguments) == 2
        and "--out takes a folder that prepare_text began, got " in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "FILE takes text to train on, got 1 files with none"),
        ("a.txt", b"one\ntwo \xff", "FILE takes UTF-8, got b'\\xff' in {path}:2"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"text": "\xff"}\n',
            "FILE takes UTF-8, got b'\\xff' in {path}:3",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\\ud800"}\n',
            "FILE takes UTF-8, got '\\ud800' in {path}:2",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "cu',
            'each line of a .jsonl, got {{"text": "cu in {path}:2',
        ),
        (
            "a.jsonl",
            b'{"texts": "x"}\n',
            'FILE takes {{"text": "..."}} on each line of a .jsonl, got {{"texts"',
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}\n[1]\n", mtime=0),
            "on each line of a .jsonl, got {{}} in {path}:1",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9],
            "FILE takes whole archives, got {path}: ",
        ),
        ("a.txt.gz", b"plain", "FILE takes whole archives, got {path}: Not a gzipped file"),
        (
            "a.xz",
            lzma.compress(tar({"a.txt": Random(0).randbytes(18000)}))[:-99],
            "takes whole archives, got",
        ),
        (
            "a.xz",
            lzma.compress(tar({"a.txt": b"one\n\xff"})),
            "FILE takes UTF-8, got b'\\xff' in {path}:a.txt:2",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    name: str,
    content: bytes,
    sentence: str,
    tmp_path: Path,
    model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert run(path, "--out", tmp_path / "out", "--tokenizer", model) == 2
    error = capsys.readouterr().err
    assert sentence.format(path=path) in error and error.splitlines()[-1].startswith(
        "prepare_text: error: "
    )
    assert "Traceback" not in error and not (tmp_path / "out" / "tokens.json").exists()


def test_a_bad_file_is_named_while_a_tokenizer_is_trained_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_bytes(b"# \xb1")
    assert run(tmp_path / "a.py", "--out", tmp_path / "out") == 2
    sentence = f"prepare_text: error: FILE takes UTF-8, got b'\\xb1' in {tmp_path}/a.py:1\n"
    assert (
        capsys.readouterr().err == sentence and not (tmp_path / "out" / "tokenizer.model").exists()
    )


def test_a_bad_line_is_found_in_any_range_and_the_rest_is_kept(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": f"{index} {TEXT}"}) for index in range(60)]
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("\n".join([*lines[:40], "not JSON", *lines[40:]]))
    arguments = [
        str(path),
        "--out",
        str(out),
        "--tokenizer",
        str(model),
        "--part-mb",
        "0.004",
        "--valid",
        "0",
    ]
    assert prepare_text.main([*arguments, "--workers", "2"]) == 2
    error = capfd.readouterr().err
    assert f"got not JSON in {path}:41" in error and error.count("\n") == 1
    assert len(records(out)) > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "FILE takes text files or directories, or --stdlib in their place"),
        (["empty"], "FILE takes text, got none in empty"),
        (["missing.txt"], "No such file or directory: 'missing.txt'"),
        (["a.txt", "b/a.txt"], "FILE takes names that differ, got "),
        (["a.txt", "--valid", "1"], "--valid takes a share from 0 to below 1, got 1.0"),
        (["a.txt", "--part-mb", "0"], "--part-mb takes a size above 0, got 0"),
        (["a.txt", "--workers", "0"], "--workers takes 1 or more, got 0"),
        (["a.txt", "--vocab-size", "9999"], "takes a size that this text can fill, got 9999: "),
        (
            ["a.txt", "--tokenizer", "no.model"],
            "--tokenizer takes a SentencePiece model or a tokenizer.json, got no",
        ),
        (
            ["a.txt", "--tokenizer", "a.txt"],
            "--tokenizer takes a SentencePiece model, got a.txt, which is not one",
        ),
        (
            ["a.txt", "--tokenizer", "empty"],
            "--tokenizer takes a folder with a tokenizer.json, got empty without",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b", "empty"):
        (tmp_path / name).mkdir()
    for name in ("a.txt", "b/a.txt"):
        (tmp_path / name).write_text("hello world")
    assert prepare_text.main([*arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("named", ["tokenizer_config.json", "by its usual name", None])
def test_a_hugging_face_tokenizer(
    named: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    eod = {"tokenizer_config.json": "[END]", "by its usual name": "<|endoftext|>", None: "[OTHER]"}[
        named
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"one": 0, "two": 1, "[UNK]": 5}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([eod])
    tokenizer.enable_truncation(1)
    (tmp_path / "hf").mkdir()
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    if named == "tokenizer_config.json":
        (tmp_path / "hf" / named).write_text(json.dumps({"eos_token": {"content": eod}}))
    (tmp_path / "a.txt").write_text("two one three two")
    status = run(
        tmp_path / "a.txt", "--out", tmp_path / "out", "--tokenizer", tmp_path / "hf", "--valid", 0
    )
    if named is None:
        assert (
            status == 2
            and "--tokenizer takes a tokenizer_config.json with eos_token"
            in capsys.readouterr().err
        )
        return
    tokens = Tokens(tmp_path / "out", context=4)
    loaded = load_tokenizer(tmp_path / "hf")
    assert status == 0 and (tokens.vocab_size, tokens.eod) == (loaded.vocab_size, loaded.eod)
    inputs, targets = tokens[0]
    assert inputs.tolist() == [1, 0, 5, 1] and targets.tolist() == [0, 5, 1, tokens.eod]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        tmp_path / "hf" / "tokenizer.json"
    ).read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB, which only root can make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes Linux and root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_keeps_what_was_done(
    workers: str,
    small_disk: Path,
    corpus: Path,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(corpus), "--tokenizer", str(model), "--part-mb", "0.02", "--workers", workers]
    out = small_disk / "out"
    assert prepare_text.main([*arguments, "--out", str(out)]) == 2
    done, error = len(records(out)), capfd.readouterr().err
    assert (
        f"--out takes a disk with room, got {out} on a full one: {done} parts are done and kept"
        in error
    )
    assert error.count("\n") == 1 and done > 0 and not list(out.rglob("*.tmp"))
    assert not (out / "tokens.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert prepare_text.main([*arguments, "--out", str(out)]) == 0
    assert f"done already: {done} of " in capfd.readouterr().err
    assert run(*arguments[:-2], "--out", tmp_path / "roomy") == 0
    assert contents(out) == contents(tmp_path / "roomy")


def test_the_standard_library(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [file for file in documents.find_stdlib() if file.place < "b"]
    assert {"abc.py", "asyncio/tasks.py"} <= {file.place for file in files}
    index = prepare_text.prepare(files, tmp_path / "out", tokenizer=model, valid=0.1)
    counts = [index["splits"][split]["documents"] for split in ("train", "valid")]
    assert sum(counts) <= len(files) and min(counts) > 0
