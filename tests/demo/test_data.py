from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from weyl_megatron.demo import data


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return data.load_corpus()


def test_two_readings_are_the_same(corpus: data.Corpus) -> None:
    again = data.load_corpus()
    assert again.digest == corpus.digest and torch.equal(again.train, corpus.train)
    assert torch.equal(again.validation, corpus.validation)


def test_there_is_enough_text(corpus: data.Corpus) -> None:
    assert corpus.files > 100
    assert corpus.train.numel() > 1_000_000 and corpus.validation.numel() > 100_000


def test_only_the_library_that_every_machine_has(tmp_path: Path) -> None:
    wanted = ["abc.py", "json/__init__.py", "json/tool.py"]
    others = [
        "site-packages/abc.py",
        "test/test_abc.py",
        "unittest/test/x.py",
        "turtle.py",
        "sitecustomize.py",
        "abc.pyc",
    ]
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [path.relative_to(tmp_path).as_posix() for path in data.source_files(tmp_path)] == wanted


def test_a_folder_without_the_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes 10 or more library sources, got 0 under"):
        data.load_corpus(tmp_path)


def test_unigram_entropy_is_the_entropy_of_the_frequencies() -> None:
    text = b"abracadabra"
    frequencies = [count / len(text) for count in Counter(text).values()]
    expected = -sum(frequency * math.log(frequency) for frequency in frequencies)
    assert data.unigram_entropy(torch.tensor(list(text), dtype=torch.uint8)) == pytest.approx(
        expected, rel=1e-12
    )


def test_no_guess_that_ignores_the_context_beats_the_unigram_entropy(corpus: data.Corpus) -> None:
    targets = corpus.validation[:10_000].long()
    frequencies = torch.bincount(corpus.train.long(), minlength=data.VOCABULARY).double() + 1
    guess = (frequencies / frequencies.sum()).log()
    assert -guess[targets].mean().item() > data.unigram_entropy(targets)


def test_targets_are_the_inputs_one_byte_later(corpus: data.Corpus) -> None:
    inputs, targets = data.sequences(corpus.train, torch.tensor([0, 100]), 16)
    assert inputs.shape == targets.shape == (2, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs[1].tolist() == corpus.train[100:116].tolist()


def test_the_batches_depend_on_the_seed_alone(corpus: data.Corpus) -> None:
    first, again, other = (data.training_offsets(corpus, 5, 8, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_validation_windows_span_the_held_out_files(corpus: data.Corpus) -> None:
    offsets = data.validation_offsets(corpus, 7, 64)
    assert offsets[0] == 0 and offsets[-1] + 64 + 1 == corpus.validation.numel()
