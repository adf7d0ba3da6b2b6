"""A small GPT of megatron-core, cut as a case says, with weights and data that are the same however
it is cut.
"""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor, nn

HIDDEN, HEADS, WIDTH, GROUPS, FFN, VOCAB, LENGTH = 36, 12, 5, 6, 48, 96, 12
EXPERTS = 4
#: Of multi-latent attention: the ranks of q and of k and v, and a head's rows of k that are not
#: rotated, of what is rotated, and of v.
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 14, 10, 6, 4, 5
STEPS, MICROS, MICRO = 10, 4, 1
has_meshes = False  # whether any model was Megatron-FSDP's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# It asks whether a layer is of Transformer Engine, whose classes are None where there is none.
multi_latent_attention.HAVE_TE = False

gc.freeze()  # what was imported stays: collections between cases need not look at it


class GatheredAttention(nn.Module):
    """Causal attention under context parallelism, and of heads whose v has another width, on the
    CPU, where megatron-core has Transformer Engine's alone.
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        group, rank = (
            parallel_state.get_context_parallel_group(),
            parallel_state.get_context_parallel_rank(),
        )
        length, batch, heads, _ = query.shape
        keys, values = (
            gather_from_sequence_parallel_region(t.contiguous(), group=group) for t in (key, value)
        )
        q, k, v = (
            t.permute(1, 2, 0, 3) for t in (query, keys, values)
        )  # (batch, heads, length, width)
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        rows = torch.arange(length) + rank * length
        seen = torch.arange(k.shape[2]) <= rows[:, None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.permute(2, 0, 1, 3).reshape(length, batch, -1)


def start(case: dict[str, Any]) -> None:
    """Make Megatron's process groups for a case, in place of those of the case before."""
    stop()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.get("tp", 1),
        pipeline_model_parallel_size=case.get("pp", 1),
        virtual_pipeline_model_parallel_size=case.get("vpp"),
        context_parallel_size=case.get("cp", 1),
        expert_model_parallel_size=case.get("ep", 1),
        expert_tensor_parallel_size=case.get("etp"),
        num_distributed_optimizer_instances=case.get("instances", 1),
    )
    model_parallel_cuda_manual_seed(1)


def stop() -> None:
    """End Megatron's process groups: it only forgets them, and every one of gloo's has threads that
    are never idle.
    """
    parallel_state.destroy_model_parallel()
    gc.collect()  # models and optimizers are cycles that hold them
    dist.barrier()
    if has_meshes:
        return  # torch keeps the meshes of DTensors, and finds them again for equal ones
    for group in list(dist.distributed_c10d._world.pg_map):
        if group != dist.group.WORLD:
            dist.destroy_process_group(group)


def config_of(case: dict[str, Any]) -> TransformerConfig:
    dtype = DTYPES[case.get("dtype", "fp32")]
    moe: dict[str, Any] = {}
    if case.get("moe"):
        moe = {
            "num_moe_experts": EXPERTS,
            "moe_router_topk": 2,
            "moe_token_dispatcher_type": case.get("dispatcher", "alltoall"),
            "moe_router_load_balancing_type": "none",
            "expert_model_parallel_size": case.get("ep", 1),
            "expert_tensor_parallel_size": case.get("etp", case.get("tp", 1)),
        }
    kind = TransformerConfig
    if case.get("mla"):
        kind = MLATransformerConfig
        moe |= {
            "multi_latent_attention": True,
            "q_lora_rank": Q_RANK,
            "kv_lora_rank": KV_RANK,
            "qk_head_dim": NOPE,
            "qk_pos_emb_head_dim": ROPE,
            "v_head_dim": VALUE,
            "rope_type": "rope",
            "apply_rope_fusion": False,
        }
    return kind(
        num_layers=case.get("layers", 4),
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=WIDTH,
        num_query_groups=HEADS if case.get("mla") else case.get("query_groups", GROUPS),
        ffn_hidden_size=FFN,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.get("tp", 1),
        pipeline_model_parallel_size=case.get("pp", 1),
        virtual_pipeline_model_parallel_size=case.get("vpp"),
        context_parallel_size=case.get("cp", 1),
        sequence_parallel=case.get("sp", False),
        pipeline_dtype=dtype,
        batch_p2p_comm=not case.get(
            "vpp"
        ),  # gloo pairs batched messages to one peer by order alone: two directions mix
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        **moe,
    )


def build(case: dict[str, Any]) -> list[nn.Module]:
    """Return this rank's chunks of the model in Megatron's wrappers, with the weights of
    :func:`weight`.
    """
    config, chunks = config_of(case), case.get("vpp") or 1
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=case.get("config", {}).get("main_grads_dtype", "fp32") == "fp32",
        # Megatron-FSDP has it always.
        overlap_grad_reduce=case.get("overlap", False) or "fsdp" in case,
        overlap_param_gather=case.get("overlap", False) or "fsdp" in case,
        use_distributed_optimizer=case.get("dist_opt", False),
        num_distributed_optimizer_instances=case.get("instances", 1),
        bucket_size=4000 if case.get("overlap") else None,  # a few layers' worth: several buckets
        **fully_sharded(case),
    )
    model: list[nn.Module] = []
    for chunk in range(chunks):
        layer = get_gpt_layer_local_spec(
            num_experts=EXPERTS if case.get("moe") else None,
            multi_latent_attention=case.get("mla", False),
        )
        if case.get("cp", 1) > 1 or case.get("mla"):
            layer.submodules.self_attention.submodules.core_attention = GatheredAttention
        norm = (
            layer.submodules.pre_mlp_layernorm
            if case.get("moe")
            else layer.submodules.input_layernorm
        )
        stage = {} if chunks == 1 else {"ignore_virtual": False, "vp_stage": chunk}
        gpt: nn.Module = GPTModel(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                [layer] * layers_per_chunk(case), norm
            ),
            vocab_size=VOCAB,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(**stage),
            post_process=parallel_state.is_pipeline_last_stage(**stage),
            share_embeddings_and_output_weights=not case.get("untied", False),
            position_embedding_type="rope" if case.get("mla") else "learned_absolute",
            **({} if chunks == 1 else {"vp_stage": chunk}),
        )
        if config.bf16 or config.fp16:
            gpt = Float16Module(config, gpt)
        if "fsdp" in case:  # it takes the weights out of the model
            with torch.no_grad():
                draw(case, [gpt])
            model.append(wrapped(config, ddp, gpt))
        else:
            model.append(DistributedDataParallel(config, ddp, gpt, disable_bucketing=False))
    if case.get("overlap") or "fsdp" in case:
        config.no_sync_func = [chunk.no_sync for chunk in model] if chunks > 1 else model[0].no_sync
    config.finalize_model_grads_func = finalize_model_grads
    if "fsdp" not in case:
        with torch.no_grad():
            draw(case, model)
    return model


def fully_sharded(case: dict[str, Any]) -> dict[str, Any]:
    """Return Megatron-FSDP's part of the configuration; "fsdp" of a case is what it shards."""
    if "fsdp" not in case:
        return {}
    return {
        "use_megatron_fsdp": True,
        "data_parallel_sharding_strategy": case["fsdp"],
        "gradient_reduce_div_fusion": False,  # which is NCCL's alone
    }


def wrapped(config: TransformerConfig, ddp: Any, gpt: nn.Module) -> nn.Module:
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.transformer.transformer_layer import TransformerLayer

    global has_meshes
    has_meshes = True
    units = (
        [TransformerLayer] if ddp.data_parallel_sharding_strategy == "optim_grads_params" else []
    )
    device = torch.device("cpu")
    return FullyShardedDataParallel(config, ddp, gpt, fsdp_unit_modules=units, device=device)


def draw(case: dict[str, Any], model: list[nn.Module]) -> None:
    for name, param in named(case, model):
        full = weight(name, full_shape(param, name, case))
        param.copy_(cut(name, full, *split_of(param, name, case)))


def layers_per_chunk(case: dict[str, Any]) -> int:
    return int(case.get("layers", 4)) // (case.get("pp", 1) * (case.get("vpp") or 1))


def named(case: dict[str, Any], model: list[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the whole model, parameter), the tied head by the embedding's name."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    for number, chunk in enumerate(model):
        first_layer = (number * case.get("pp", 1) + stage) * layers_per_chunk(case)
        for local, param in chunk.named_parameters():
            parts = [part for part in local.split(".") if part != "module"]
            if "layers" in parts:
                at = parts.index("layers") + 1
                parts[at] = str(int(parts[at]) + first_layer)
            if "local_experts" in parts:
                at = parts.index("local_experts") + 1
                first = (
                    parallel_state.get_expert_model_parallel_rank() * EXPERTS // case.get("ep", 1)
                )
                parts[at] = str(int(parts[at]) + first)
            name = ".".join(parts)
            if name == "output_layer.weight" and not case.get("untied"):
                name = "embedding.word_embeddings.weight"
            yield name, param


def weight(name: str, shape: list[int]) -> Tensor:
    """Return a parameter of the whole model, drawn from its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.1 * noise if len(shape) == 1 else 0.15 * noise


def split_of(param: Tensor, name: str, case: dict[str, Any]) -> tuple[int | None, int, int]:
    """Return (dimension that tensor parallelism splits or None, ranks, rank)."""
    if not getattr(param, "tensor_model_parallel", False):
        return None, 1, 0
    if ".local_experts." in name:
        size, rank = (
            case.get("etp", case.get("tp", 1)),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    else:
        size, rank = case.get("tp", 1), parallel_state.get_tensor_model_parallel_rank()
    return param.partition_dim, size, rank  # type: ignore[attr-defined]


def full_shape(param: Tensor, name: str, case: dict[str, Any]) -> list[int]:
    dim, size, _ = split_of(param, name, case)
    return [extent * size if dim == axis else extent for axis, extent in enumerate(param.shape)]


def cut(name: str, full: Tensor, dim: int | None, size: int, rank: int) -> Tensor:
    """Return a rank's band of a whole weight; of a gated fc1, its bands of gate and of up."""
    if dim is None:
        return full
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim)[rank]


def join(name: str, bands: list[Tensor], dim: int | None) -> Tensor:
    """Undo :func:`cut`."""
    if dim is None:
        return bands[0]
    if "linear_fc1" in name:
        return torch.cat([band.chunk(2)[half] for half in range(2) for band in bands])
    return torch.cat(bands, dim)


def whole(case: dict[str, Any], model: list[nn.Module]) -> dict[str, Tensor]:
    """Return the whole model's parameters on every rank; all copies of a piece have to be equal,
    bit for bit.
    """
    for chunk in model:
        if "fsdp" in case:  # after a step the module has the weights that it computes with
            sharded: Any = chunk.module
            sharded._replace_param_with_distributed_if_needed()
    mine = [(n, held(p).detach().clone(), split_of(p, n, case)) for n, p in named(case, model)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    pieces: dict[str, dict[int, Tensor]] = {}
    dims: dict[str, int | None] = {}
    for theirs in everyone:
        for name, piece, (dim, _, rank) in theirs:
            assert torch.equal(pieces.setdefault(name, {}).setdefault(rank, piece), piece), (
                f"copies of {name} differ"
            )
            dims[name] = dim
    return {
        name: join(name, [held[rank] for rank in sorted(held)], dims[name])
        for name, held in pieces.items()
    }


def held(param: Any) -> Tensor:
    """Return what this tensor-parallel rank has of a parameter, which may be one of Megatron-FSDP's
    DTensors. Collective then.
    """
    if not hasattr(param, "to_local"):
        return param  # type: ignore[no-any-return]
    band, mesh = param.to_local(), param.device_mesh
    for mesh_dim, placement in enumerate(param.placements):
        if mesh.mesh_dim_names[mesh_dim] != "tp" and not placement.is_replicate():
            pieces: list[Any] = [None] * mesh.size(mesh_dim)
            dist.all_gather_object(pieces, band, group=mesh.get_group(mesh_dim))
            band = torch.cat(pieces)
    return band  # type: ignore[no-any-return]


def matrices(name: str, full: Tensor, case: dict[str, Any]) -> dict[str, Tensor]:
    """Return the matrices that a whole weight is, as plain indexing has them, by the names of their
    statistics.
    """
    if full.dim() < 2:
        return {}
    if "linear_qkv" in name:
        groups = case.get("query_groups", GROUPS)
        heads = HEADS // groups
        per_group = full.view(groups, heads + 2, WIDTH, HIDDEN)
        parts = {"q": per_group[:, :heads], "k": per_group[:, heads], "v": per_group[:, heads + 1]}
        return {f"{name}[{label}]": part.reshape(-1, HIDDEN) for label, part in parts.items()}
    if "linear_fc1" in name:
        gate, up = full.chunk(2)
        return {f"{name}[gate]": gate, f"{name}[up]": up}
    for ending, (heads, sizes) in LATENT.items():
        if f"{ending}." in name:
            split = full.view(heads, -1, full.shape[1]).split(list(sizes.values()), 1)
            return {
                f"{name}[{label}]": part.flatten(0, 1)
                for label, part in zip(sizes, split, strict=True)
            }
    return {name: full}


#: The projections of multi-latent attention: how often their parts repeat, and the rows of each.
LATENT: dict[str, tuple[int, dict[str, int]]] = {
    "linear_q_up_proj": (HEADS, {"nope": NOPE, "rope": ROPE}),
    "linear_kv_up_proj": (HEADS, {"k": NOPE, "v": VALUE}),
    "linear_kv_down_proj": (1, {"latent": KV_RANK, "rope": ROPE}),
}


def unite(name: str, parts: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """Undo :func:`matrices`."""
    if "linear_qkv" in name:
        groups = case.get("query_groups", GROUPS)
        per_group = [part.view(groups, -1, WIDTH, HIDDEN) for part in parts.values()]
        return torch.cat(per_group, 1).view(-1, HIDDEN)
    for ending, (heads, _) in LATENT.items():
        if f"{ending}." in name:
            per_head = [part.view(heads, -1, part.shape[1]) for part in parts.values()]
            return torch.cat(per_head, 1).flatten(0, 1)
    return torch.cat(list(parts.values()))


def batches(step: int, case: dict[str, Any]) -> Iterator[Tensor]:
    """Yield this data-parallel rank's micro-batches of a step, (MICRO, LENGTH + 1)."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(
        VOCAB, (case.get("micros", MICROS), MICRO, LENGTH + 1), generator=generator
    )
    replicas, replica = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    yield from tokens.view(replicas, -1, MICRO, LENGTH + 1)[replica]


def forward(data: Iterator[Tensor], model: nn.Module, *_: Any) -> tuple[Tensor, Any]:
    """Megatron's ``forward_step_func``."""
    tokens = next(data)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(LENGTH).expand_as(inputs)
    if (size := parallel_state.get_context_parallel_world_size()) > 1:
        rank = parallel_state.get_context_parallel_rank()
        inputs, labels, positions = (
            t.chunk(size, 1)[rank].contiguous() for t in (inputs, labels, positions)
        )
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    output = model(inputs, positions, mask, labels=labels)

    def loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = losses.float().mean()
        return mean / size, {
            "loss": mean.detach()
        }  # Megatron multiplies such a loss by the size of the cp group

    return output, loss


def backward(step: int, case: dict[str, Any], model: list[nn.Module]) -> list[dict[str, Tensor]]:
    """Leave the gradients of one step's global batch in Megatron's buffers; return the losses (last
    stage).
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    data: Any = [batches(step, case) for _ in model]
    schedule = partial(get_forward_backward_func(), forward_step_func=forward, forward_only=False)
    losses: list[dict[str, Tensor]] = schedule(
        data_iterator=data if len(model) > 1 else data[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=case.get("micros", MICROS)
        // parallel_state.get_data_parallel_world_size(),
        seq_length=LENGTH,
        micro_batch_size=MICRO,
    )
    return losses
