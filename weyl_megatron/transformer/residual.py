"""Depth-scaled residuals against rank collapse (Noci et al. 2022, arXiv 2206.03126).

A Transformer of L blocks adds 2L branches to its tokens. At initialisation attention is close to an
average, so every branch makes the tokens of a sequence more alike; where they are all alike, the
gradients of W_q and W_k vanish. With every branch multiplied by 1/√L, x + f(x)/√L, the sum of all
branches stays of the order of x at any depth.

Behind a norm x is of order 1, as a branch is. A pre-norm model's stream starts with its embeddings:
where they are small (N(0, 0.02) as in GPT-2), even scaled branches soon outweigh them, and the
tokens become alike all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layouts.local import is_fully_sharded, is_on_mesh
from .blocks import Block, find_blocks

#: The parameter (1,) that ``mode="learned"`` adds to the last layer of every branch.
SCALE = "residual_scale"

_MODES = ("forward", "init", "learned")
_MARK = "_is_residual_scaled"


def scale_residuals(
    model: nn.Module,
    *,
    mode: str = "forward",
    depth: int | None = None,
    names: Mapping[str, Any] | None = None,
) -> int:
    """Multiply the attention's and the MLP's branch of every block by 1/√L, in place.

    The factor acts on what the branch's last layer (W_o, W_2) returns, its bias included: whether
    the block has its norm before or behind the sum makes no difference, nor do dropout or
    LayerScale between the layer and the sum.

    Call it before the model's optimizer, ``deepspeed.initialize``, ``fully_shard`` or a DDP;
    ``mode="forward"`` can come later.

    Args:
        model: one whose blocks :func:`weyl_megatron.transformer.blocks.find_blocks` finds; of
            Megatron, a chunk.
        mode: ``"forward"``: a constant in the forward pass, the paper's. ``"init"``: the initial
            weights and biases of W_o and W_2 are multiplied, once, and nothing else is changed;
            Adam's steps do not shrink with the weights, so they undo it. ``"learned"``: a parameter
            ``residual_scale`` (1,) of each last layer, which starts at 1/√L and is in the state
            dict; keep it out of weight decay, which would close the branches.
        depth: L; None: the blocks of the model (under Megatron, of all pipeline stages). A model
            that uses the same block again and again needs a number.
        names: for a model that is not recognised, see ``find_blocks``; ``"o"`` and ``"2"`` are
            needed here.

    Returns:
        How many branches are scaled: two a block.

    Raises:
        ValueError: an argument is impossible, the model is scaled already, not recognised, or has a
            branch that cannot be scaled.
    """
    if mode not in _MODES:
        raise ValueError(f"residual: mode got {mode!r}, it takes 'forward', 'init' or 'learned'.")
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 1):
        raise ValueError(f"residual: depth got {depth!r}, it takes a whole number from 1 on.")
    blocks = find_blocks(model, names)
    last = {id(branch.layer): branch for block in blocks for branch in _branches(block)}
    for branch in last.values():
        _check(branch, mode, is_fully_sharded(model))
    factor = 1 / math.sqrt(depth or _depth(blocks))
    if mode == "init":
        # A tied weight is multiplied once.
        tensors = {id(tensor): tensor for branch in last.values() for tensor in branch.tensors()}
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.mul_(factor)
    for branch in last.values():
        setattr(branch.layer, _MARK, True)
        if mode == "learned":
            _add_parameter(branch, factor)
        if mode != "init":
            branch.layer.register_forward_hook(
                _Scaling(None if mode == "learned" else factor, branch.returns)
            )
    return len(last)


class _Branch(NamedTuple):
    """The end of a residual branch."""

    name: str
    layer: nn.Module  # whose output is the branch's
    weights: nn.Module  # the layer that has the weight and the bias
    returns: int  # how many tensors of a tuple it returns are the branch's, to be added up
    # Whether ranks have different tokens of the output (Megatron's sequence parallelism).
    is_shared_out: bool

    def tensors(self) -> Iterator[Tensor]:
        weights: Any = self.weights  # torch does not type what a parametrized module has
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(weights, name):
                yield weights.parametrizations[name].original
            elif isinstance(value := getattr(weights, name, None), Tensor):
                yield value


def _branches(block: Block) -> Iterator[_Branch]:
    """Yield the attention's and the MLP's branch of a block."""
    # Behind a norm of its own a branch has that norm's scale, whatever its last layer is multiplied
    # by.
    kind = type(block.module).__name__.lower()
    is_normed = kind.startswith("respost") or (kind.startswith("swin") and "v2" in kind)
    if is_normed or hasattr(block.module, "post_feedforward_layernorm"):
        raise ValueError(
            f"residual: {block.name} ({type(block.module).__name__}) norms its branches before "
            "they are added, which undoes a factor; it takes blocks x + f(norm(x)) and norm(x + "
            "f(x))."
        )
    for role, what in (("o", "attention's output"), ("2", "MLP's second")):
        if role not in block.weights:
            raise ValueError(
                f"residual: the {what} layer of {block.name} ({type(block.module).__name__}) was "
                f"not recognised; name the layers with names={{'block': …, 'o': …, '2': …}}."
            )
        layer = owner = block.weights[role].owner
        is_megatron = hasattr(block.attention, "linear_qkv")
        if role == "o" and isinstance(getattr(block.attention, "in_proj_weight", None), Tensor):
            # torch's MultiheadAttention computes with the weight and never calls its layer.
            layer = block.attention
        config = getattr(block.attention, "config", None)
        is_shared_out = is_megatron and bool(getattr(config, "sequence_parallel", False))
        # Megatron's layers return (output, bias), whose sum is a fused kernel's; torch's return
        # (output, attention).
        returns = 2 if is_megatron else 1
        yield _Branch(f"{block.name}'s {what} layer", layer, owner, returns, is_shared_out)


def _check(branch: _Branch, mode: str, is_sharded: bool) -> None:
    if getattr(branch.layer, _MARK, False):
        raise ValueError(f"residual: {branch.name} got a second scaling, it takes one.")
    if mode == "init" and parametrize.is_parametrized(branch.weights, "weight"):
        raise ValueError(
            f"residual: mode got 'init', but {branch.name} computes its weight (σReparam); it "
            "takes 'forward' or 'learned' then, or a scaling before the conversion."
        )
    weight = next(branch.tensors())
    if mode != "forward" and (is_sharded or is_on_mesh(weight)):
        raise ValueError(
            f"residual: mode got {mode!r}, but {branch.name} is spread over ranks already "
            "(fully_shard, parallelize_module); it takes 'forward' then, or a scaling before."
        )
    if mode != "forward" and (hasattr(weight, "ds_id") or weight.is_meta):
        where = "on the meta device" if weight.is_meta else "partitioned by ZeRO-3 already"
        raise ValueError(
            f"residual: mode got {mode!r}, but {branch.name} is {where}; it takes 'forward' then."
        )


def _depth(blocks: list[Block]) -> int:
    """Return how many blocks the whole model has.

    Those of a decoder beside an encoder have two attentions each.
    """
    layers = getattr(getattr(blocks[0].attention, "config", None), "num_layers", None)
    if hasattr(blocks[0].attention, "linear_qkv") and isinstance(layers, int):
        return layers
    return len({id(block.module) for block in blocks})


def _add_parameter(branch: _Branch, factor: float) -> None:
    weight = next(branch.tensors())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # FSDP takes no 0-d parameter.
    scale = nn.Parameter(torch.full((1,), factor, dtype=dtype, device=weight.device))
    if branch.is_shared_out:
        # Megatron sums its gradient over the ranks then.
        scale.sequence_parallel = True  # type: ignore[attr-defined]
    branch.layer.register_parameter(SCALE, scale)


class _Scaling:
    """A forward hook that multiplies.

    It holds no module, so that a copy of the model scales with its own parameter.
    """

    def __init__(self, factor: float | None, returns: int) -> None:
        self._factor, self._returns = factor, returns

    def __call__(self, layer: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            branch, rest = output[: self._returns], output[self._returns :]
            scaled = (None if value is None else self._scaled(layer, value) for value in branch)
            return (*scaled, *rest)
        return self._scaled(layer, output)

    def _scaled(self, layer: nn.Module, output: Tensor) -> Tensor:
        if self._factor is not None:
            return output * self._factor
        scale: Tensor = getattr(layer, SCALE)
        # Nested tensors, torch's fast path, take no dimension.
        return output * scale.to(output.dtype).view(())
