"""Pretrain a GPT-2 with the Trainer, on the sources of Python's standard library as bytes.

    torchrun --nproc-per-node 2 train_gpt2.py --deepspeed ../deepspeed/zero2.json

    python train_gpt2.py --optim adamw2 --optim_args tau=0.01

Any other TrainingArguments can be given, too. Nothing is downloaded, and nothing is imported to
train with AdamW2: DeepSpeed finds it by the name in its JSON file, the Trainer by that in --optim.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from weyl_megatron.engines.shutdown import shutdown


@dataclass
class ModelArguments:
    """The size of the model; it is trained from its initialisation."""

    layers: int = field(default=4)
    width: int = field(default=64)
    heads: int = field(default=4)
    context: int = field(default=64, metadata={"help": "bytes of a sequence"})


class Sequences(Dataset):
    """The text, cut into sequences of `length` bytes."""

    def __init__(self, text: bytes, length: int) -> None:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index].long()
        return {"input_ids": row, "labels": row}


def standard_library() -> bytes:
    """The modules at the top of the standard library, one after another."""
    return b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))


def main() -> None:
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    parser.set_defaults(
        output_dir="out/gpt2",
        max_steps=400,
        per_device_train_batch_size=16,
        logging_steps=40,
        learning_rate=3e-3,
        adam_beta2=0.95,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
    )
    # Accelerate would take all processes for one.
    parser.set_defaults(use_cpu=not torch.cuda.is_available())
    model_args, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=model_args.context,
        n_embd=model_args.width,
        n_layer=model_args.layers,
        n_head=model_args.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    text = standard_library()
    held_out = len(text) // 50
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=args,
        train_dataset=Sequences(text[:-held_out], model_args.context),
        eval_dataset=Sequences(text[-held_out:], model_args.context),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        is_engine = trainer.is_deepspeed_enabled
        optimizer = (
            trainer.model_wrapped.basic_optimizer if is_engine else trainer.optimizer.optimizer
        )
        stats = optimizer.stats()
        clipped = sum(entry.clipped for entry in stats.values())
        print(f"validation loss {loss:.4f}; {clipped} of {len(stats)} matrices clipped")
        name = "transformer.h.0.attn.c_attn.weight[q]"
        print(f"{name}: {stats[name]}")


if __name__ == "__main__":
    main()
    shutdown()
