"""The shapes of the models that the benchmarks step: names, sizes, and a slice of blocks where a
machine is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Named = tuple[str, tuple[int, ...]]


class Shape(NamedTuple):
    """A Transformer as its parameters: GPT-2's (nanoGPT), or a timm ViT's."""

    kind: str
    blocks: int
    width: int
    hidden: int
    vocabulary: int = 50257
    context: int = 1024

    def parameters(self, blocks: int | None = None) -> list[Named]:
        """Return (name, shape) of all parameters; with ``blocks``, of so many blocks and nothing
        around them.
        """
        inner = [
            named
            for number in range(self.blocks if blocks is None else blocks)
            for named in self._block(number)
        ]
        if blocks is not None:
            return inner
        around = self._gpt() if self.kind == "gpt" else self._vit()
        return [*around, *inner]

    def count(self, blocks: int | None = None) -> int:
        """Return the number of parameters."""
        total = 0
        for _, shape in self.parameters(blocks):
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total

    def _block(self, number: int) -> Iterator[Named]:
        width, hidden = self.width, self.hidden
        prefix, qkv, out, up, down = f"blocks.{number}", "qkv", "proj", "fc1", "fc2"
        if self.kind == "gpt":
            prefix, qkv, out, up, down = f"h.{number}", "c_attn", "c_proj", "c_fc", "c_proj"
        yield f"{prefix}.attn.{qkv}.weight", (3 * width, width)
        yield f"{prefix}.attn.{out}.weight", (width, width)
        yield f"{prefix}.mlp.{up}.weight", (hidden, width)
        yield f"{prefix}.mlp.{down}.weight", (width, hidden)
        yield f"{prefix}.norm1.weight", (width,)
        yield f"{prefix}.norm2.weight", (width,)
        sizes = {"norm1": width, "norm2": width, f"attn.{qkv}": 3 * width, f"attn.{out}": width}
        for name, size in sizes.items():
            yield f"{prefix}.{name}.bias", (size,)
        yield f"{prefix}.mlp.{up}.bias", (hidden,)
        yield f"{prefix}.mlp.{down}.bias", (width,)

    def _gpt(self) -> Iterator[Named]:
        yield "wte.weight", (self.vocabulary, self.width)  # the head is tied to it
        yield "wpe.weight", (self.context, self.width)
        yield "ln_f.weight", (self.width,)
        yield "ln_f.bias", (self.width,)

    def _vit(self) -> Iterator[Named]:
        yield "pos_embed", (1, self.context, self.width)
        yield "patch_embed.proj.weight", (self.width, 3, 14, 14)
        yield "patch_embed.proj.bias", (self.width,)
        yield "norm.weight", (self.width,)
        yield "norm.bias", (self.width,)
        yield "head.weight", (self.vocabulary, self.width)
        yield "head.bias", (self.vocabulary,)


#: The paper's models (Table 2), by the names that the benchmarks take.
MODELS = {
    "gpt2-124m": Shape("gpt", 12, 768, 3072),
    "gpt-774m": Shape("gpt", 36, 1280, 5120),
    "vit-g-1011m": Shape("vit", 40, 1408, 6144, vocabulary=1000, context=257),
}


def is_of_a_block(name: str) -> bool:
    """Whether a parameter of these models is of a block, its matrices hidden ones."""
    return name[:2] in ("h.", "bl")
