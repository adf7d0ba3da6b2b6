"""Tokens: the SentencePiece tokenizer, prepared data, and Megatron's GPT dataset in batches."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import (
    _INDEX_HEADER,
    IndexedDataset,
    get_bin_path,
    get_idx_path,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from recipe import Recipe

# Where `examples` is, wherever this is started.
sys.path.append(str(Path(__file__).resolve().parents[2]))
from examples.data.tokenizer import load_sentencepiece

Batch = dict[str, Tensor]


class Tokenizer:
    """A SentencePiece model with the names that Megatron's datasets ask a tokenizer for."""

    def __init__(self, path: Path) -> None:
        self.pieces = load_sentencepiece(path)
        self.vocab_size: int = self.pieces.get_piece_size()
        self.eod: int = self.pieces.eos_id()  # as Megatron-LM's GPTSentencePieceTokenizer
        self.pad: int = self.pieces.pad_id()
        self.unique_identifiers: OrderedDict[str, object] = OrderedDict({"tokenizer": str(path)})


def read_blend(arguments: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """The prefixes and weights of `PREFIX...` or `WEIGHT PREFIX WEIGHT PREFIX...`.

    They are as in Megatron-LM's --data-path.
    """
    numbers = [_number(argument) for argument in arguments]
    if all(number is None for number in numbers):
        return list(arguments), None
    weights, prefixes = numbers[::2], list(arguments[1::2])
    if len(weights) != len(prefixes) or any(number is not None for number in numbers[1::2]):
        raise ValueError(
            f"--data takes PREFIX... or WEIGHT PREFIX WEIGHT PREFIX..., got {' '.join(arguments)}"
        )
    positive = [weight for weight in weights if weight is not None and 0 < weight < float("inf")]
    if len(positive) != len(weights):
        raise ValueError(f"--data takes weights above 0, got {' '.join(arguments[::2])}")
    return prefixes, positive


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def check_data(
    arguments: Sequence[str], tokenizer: Tokenizer, recipe: Recipe, cache: Path | None
) -> GPTDatasetConfig:
    """The configuration of Megatron's dataset.

    ValueError: a prefix does not hold what the recipe needs.
    """
    prefixes, weights = read_blend(arguments)
    config = GPTDatasetConfig(
        random_seed=recipe.seed,
        sequence_length=recipe.seq_length,
        blend=(prefixes, weights),
        split=f"{recipe.split[0]},{recipe.split[1]},0",
        path_to_cache=str(cache) if cache else None,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # attention is causal in the model, whatever the mask
    )
    for prefix in prefixes:
        _check_prefix(prefix, config)
        # Megatron keeps its shuffles under a hash of these: data that was prepared anew gets new
        # ones.
        stat = Path(get_idx_path(prefix)).stat()
        tokenizer.unique_identifiers[prefix] = [stat.st_size, stat.st_mtime_ns]
    return config


def _check_prefix(prefix: str, config: GPTDatasetConfig) -> None:
    for path in map(Path, (get_idx_path(prefix), get_bin_path(prefix))):
        if not path.is_file():
            raise ValueError(
                f"--data takes prefixes of a .bin and an .idx file, got {prefix}, which lacks "
                f"{path}"
            )
    try:
        with open(get_idx_path(prefix), "rb") as file:
            if file.read(len(_INDEX_HEADER)) != _INDEX_HEADER:
                raise ValueError
        data = IndexedDataset(prefix, mmap=False)
    # A broken index fails in struct, numpy or an assertion, wherever the reader happens to be.
    except Exception:
        raise ValueError(
            f"--data takes Megatron's index files, got {get_idx_path(prefix)}, which is not one"
        ) from None
    lengths = data.sequence_lengths
    expected = int(lengths.sum(dtype=numpy.int64)) * data.index.dtype_size
    size = Path(get_bin_path(prefix)).stat().st_size
    if size != expected:
        raise ValueError(
            f"{get_bin_path(prefix)} takes the {expected} bytes that its .idx counts, got {size}"
        )
    if len(lengths) and (largest := int(data[0].max(initial=0))) >= config.tokenizer.vocab_size:
        raise ValueError(
            f"--tokenizer takes the model that {prefix} was prepared with, "
            f"got one of {config.tokenizer.vocab_size} pieces for token {largest}"
        )
    for name, part in zip(("training", "validation"), config.split_matrix, strict=False):
        begin, end = (round(edge * float(len(lengths))) for edge in part)  # Megatron's rounding
        tokens = int(lengths[begin:end].sum(dtype=numpy.int64))
        if tokens <= config.sequence_length:
            raise ValueError(
                f"{prefix} takes more than seq_length {config.sequence_length} tokens for {name}, "
                f"got {tokens} in {end - begin} of {len(lengths)} documents: prepare more, or set "
                "split"
            )


def build_datasets(config: GPTDatasetConfig, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """Training and validation samples.

    As many as the whole run takes, and those that every evaluation takes.
    """
    steps = (recipe.train_steps, recipe.eval_batches, 0)
    sizes = [count * recipe.global_batch_size for count in steps]
    # Every rank reads its own samples: the ranks of one replica the same ones.
    datasets = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return datasets[0], datasets[1]


def batches(
    dataset: Dataset, recipe: Recipe, steps: range, replica: int, replicas: int
) -> Iterator[Batch]:
    """The micro batches of `steps` for one replica.

    A step's samples depend on its number alone, so runs resume.
    """
    share = recipe.global_batch_size // replicas

    def indices() -> Iterator[range]:
        for step in steps:
            start = step * recipe.global_batch_size + replica * share
            for first in range(start, start + share, recipe.micro_batch_size):
                yield range(first, first + recipe.micro_batch_size)

    loader = DataLoader(
        dataset,
        batch_sampler=indices(),
        num_workers=recipe.dataloader_workers,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
