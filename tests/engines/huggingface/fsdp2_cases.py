"""What Accelerate and the Trainer train under FSDP2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"

PROJECT = {"clip": "project"}


@dataclass(frozen=True)
class Case:
    """How a model is spread, trained and saved."""

    by: str  # "accelerate" or "trainer"
    model: str  # see tiny.make
    saved: str = SHARDED
    options: dict[str, Any] = field(default_factory=dict)  # of AdamW2
    plugin: dict[str, Any] = field(default_factory=dict)  # of FullyShardedDataParallelPlugin
    named: bool = True  # else model= gives the names
    optim: str | None = None  # the Trainer's name of it
    layers: str | None = None  # the classes of the layers, where the model's own do not do
    mesh: dict[str, int] | None = None  # of ParallelismConfig

    @property
    def name(self) -> str:
        words = [self.by, self.model, self.saved.split("_")[0].lower()]
        words += [str(value) for value in (*self.options.values(), *self.plugin)]
        words += [] if self.optim is None else [self.optim]
        return "-".join([*words, *([] if self.named else ["unnamed"]), *(self.mesh or ())])


#: The ranks of a launch, and the cases that they run one after the other.
LAUNCHES: dict[str, tuple[int, Sequence[Case]]] = {
    "quick": (
        2,
        (
            Case("accelerate", "gpt2"),
            Case("accelerate", "gpt2", FULL, {"tau": "balanced", **PROJECT}, named=False),
            Case("trainer", "gpt2", FULL),
            Case("trainer", "lora", SHARDED, {"tau": "balanced"}),
        ),
    ),
    "rest": (
        2,
        (
            Case("accelerate", "gpt2", FULL, {"tau": "balanced"}),
            Case("accelerate", "gpt2", options=PROJECT, named=False),
            # Accelerate would cut ViT's patch embedding twice: within ViTEmbeddings, and by itself.
            Case("accelerate", "vit", FULL, PROJECT, layers="ViTLayer"),
            Case("accelerate", "gpt2", plugin={"cpu_ram_efficient_loading": True}),
            Case("accelerate", "gpt2", plugin={"activation_checkpointing": True}, named=False),
            Case("accelerate", "mla", named=False),
            Case("accelerate", "mamba", named=False),
            Case("accelerate", "lora"),
            Case("trainer", "gpt2", SHARDED, {"tau": "balanced", **PROJECT}, named=False),
            Case("trainer", "lora", FULL, named=False),
            Case("trainer", "gpt2", SHARDED, {"tau": "balanced"}, optim="adamw2"),
        ),
    ),
    "hsdp": (4, (Case("accelerate", "gpt2", mesh={"dp_replicate_size": 2, "dp_shard_size": 2}),)),
}
