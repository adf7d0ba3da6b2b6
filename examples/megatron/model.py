"""The model: Megatron's GPT of a recipe, the shard of it that this rank holds, and its loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from data import Batch
from recipe import Recipe

try:
    import apex  # noqa: F401

    HAVE_APEX = True
except ImportError:
    HAVE_APEX = False


def check_layers(recipe: Recipe) -> None:
    """Refuses what the installed layers cannot do."""
    if recipe.sequence_parallel and not (HAVE_TE or HAVE_APEX):
        raise ValueError("sequence_parallel takes Transformer Engine or Apex, got neither")


def padded_vocab_size(vocab_size: int, recipe: Recipe) -> int:
    """The rows of the embedding: Megatron-LM's rounding, every rank's share a multiple of 128."""
    multiple = 128 * recipe.tensor_parallel
    return math.ceil(vocab_size / multiple) * multiple


def parameter_count(recipe: Recipe, vocab_size: int) -> int:
    """Parameters of the whole model."""
    h = recipe.hidden_size
    embeddings = (padded_vocab_size(vocab_size, recipe) + recipe.seq_length) * h  # tied; positions
    layer = 12 * h * h + 13 * h  # matrices, biases and norms
    return embeddings + recipe.num_layers * layer + 2 * h  # and the last norm


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """The recipe in Megatron's words."""
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    return TransformerConfig(
        num_layers=recipe.num_layers,
        hidden_size=recipe.hidden_size,
        num_attention_heads=recipe.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=recipe.tensor_parallel,
        pipeline_model_parallel_size=recipe.pipeline_parallel,
        sequence_parallel=recipe.sequence_parallel,
        bf16=recipe.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        masked_softmax_fusion=False,  # the local layers' kernel is Apex's
        use_cpu_initialization=not torch.cuda.is_available(),
        finalize_model_grads_func=finalize_model_grads,
    )


def build_model(recipe: Recipe, vocab_size: int) -> tuple[GPTModel, DistributedDataParallel]:
    """This rank's shard of the model, bare and within Megatron's data parallelism.

    Checkpoints take the bare one.
    """
    config = transformer_config(recipe)
    gpt = GPTModel(
        config,
        get_gpt_layer_with_transformer_engine_spec() if HAVE_TE else get_gpt_layer_local_spec(),
        vocab_size=padded_vocab_size(vocab_size, recipe),
        max_sequence_length=recipe.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
    ).cuda()
    replicated = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=True,
        use_distributed_optimizer=recipe.distributed_optimizer,
    )
    inner = Float16Module(config, gpt) if recipe.bf16 else gpt
    return gpt, DistributedDataParallel(config, replicated, inner)


def forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel
) -> tuple[Tensor, partial]:
    """One micro batch through this stage, and the loss of what the last stage returns."""
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(batches).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (losses.float() * mask).sum() / mask.sum().clamp(min=1)
    return loss, {"loss": loss.detach().clone()}  # Megatron divides the first in place
