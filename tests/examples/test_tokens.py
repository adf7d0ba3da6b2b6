from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from examples.data.order import Order
from examples.data.tokens import Tokens


def write_folder(folder: Path, shards: list[int], dtype: str = "uint16") -> Path:
    """A folder as prepare_text leaves it, whose training tokens count from 0 through all shards."""
    (folder / "shards").mkdir(parents=True)
    listed, first = [], 0
    for number, count in enumerate(shards):
        numpy.arange(first, first + count, dtype=dtype).tofile(
            folder / f"shards/{number}.train.bin"
        )
        listed.append([f"shards/{number}.train.bin", count])
        first += count
    splits = {
        "train": {"documents": 1, "tokens": first, "shards": listed},
        "valid": {"documents": 0, "tokens": 0, "shards": []},
    }
    index = {
        "version": 1,
        "vocab_size": 70000,
        "eod": 2,
        "dtype": dtype,
        "tokenizer": "x",
        "splits": splits,
    }
    (folder / "tokens.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_every_window_comes_once_an_epoch_across_shards(tmp_path: Path, dtype: str) -> None:
    tokens = Tokens(write_folder(tmp_path / "x", [1, 10, 3, 88], dtype), context=7, seed=3)
    assert len(tokens) == (102 - 1) // 7 and (tokens.vocab_size, tokens.eod) == (70000, 2)
    for epoch in range(3):
        windows = [tokens[epoch * len(tokens) + i] for i in range(len(tokens))]
        for inputs, targets in windows:
            assert inputs.dtype == targets.dtype == torch.long and torch.equal(targets, inputs + 1)
            assert torch.equal(inputs, inputs[0] + torch.arange(7))
        assert sorted(int(inputs[0]) for inputs, _ in windows) == list(range(0, 98, 7))


def test_a_sample_depends_on_its_number_and_the_seed_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", [500])
    tokens, again, other = (Tokens(folder, context=4, seed=seed) for seed in (0, 0, 1))
    order = [int(tokens[i][0][0]) for i in range(300)]
    assert [int(pickle.loads(pickle.dumps(again))[i][0][0]) for i in reversed(range(300))] == order[
        ::-1
    ]
    assert order[:124] != order[124:248] and [int(other[i][0][0]) for i in range(300)] != order
    assert order[:4] == [168, 220, 124, 312], "runs that were begun before would not resume"


def test_workers_read_the_same_samples_and_a_run_resumes(tmp_path: Path) -> None:
    tokens = Tokens(write_folder(tmp_path / "x", [300, 300]), context=8, seed=1)
    loader = DataLoader(tokens, batch_size=4, sampler=range(40, 120), num_workers=2)
    batches = [inputs for inputs, _ in loader]
    assert torch.equal(torch.cat(batches), torch.stack([tokens[i][0] for i in range(40, 120)]))
    resumed = DataLoader(tokens, batch_size=4, sampler=range(80, 120))
    assert torch.equal(torch.cat([inputs for inputs, _ in resumed]), torch.cat(batches[10:]))


@settings(deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), start=st.integers(0, 1000))
def test_an_order_is_a_permutation_of_every_epoch(count: int, seed: int, start: int) -> None:
    order, first = Order(count, seed), start * count
    assert sorted(order(i) for i in range(first, first + count)) == list(range(count))
    assert order(first) == Order(count, seed)(first)


def test_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    def fails(
        sentence: str, folder: Path, split: str = "train", context: int = 4, seed: int = 0
    ) -> None:
        with pytest.raises(ValueError) as error:
            Tokens(folder, split, context=context, seed=seed)
        assert str(error.value).startswith(sentence) and "\n" not in str(error.value)

    folder = write_folder(tmp_path / "x", [20, 20])
    fails("folder takes one that prepare_text wrote, got ", tmp_path / "missing")
    fails("folder takes one that prepare_text finished, got ", tmp_path)
    fails("split takes one of train, valid, got test", folder, split="test")
    fails("context takes 1 or more tokens, got 0", folder, context=0)
    fails("seed takes 0 to 2³² - 1, got -1", folder, seed=-1)
    fails("context takes fewer tokens than train has, got 40 of 40 in ", folder, context=40)
    fails("context takes fewer tokens than valid has, got 4 of 0 in ", folder, split="valid")
    with pytest.raises(IndexError, match="got -1"):
        Tokens(folder, context=4)[-1]

    shard = folder / "shards/1.train.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    fails(f"{shard} takes the 40 bytes that tokens.json counts, got 39", folder)
    shard.unlink()
    fails(f"{shard} takes the 40 bytes that tokens.json counts, got 0", folder)
    (folder / "tokens.json").write_text('{"version": 2}')
    fails("folder takes tokens.json of version 1, got 2 in ", folder)
    for text in ("{", "[]", "{}"):
        (folder / "tokens.json").write_text(text)
        fails("folder takes one that prepare_text wrote, got ", folder)
