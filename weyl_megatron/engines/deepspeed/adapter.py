"""DeepSpeed: where AdamW2 reads what its engine did to the parameters.

DeepSpeed resolves ``"type": "AdamW2"`` by ``getattr(torch.optim, "AdamW2")`` (the plugin in
``engines/torch``) and gives the optimizer no reference to the engine. :mod:`.construction` sets it
as the engine checks the optimizer, before it builds anything around it.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...layouts.buffers import Buffer, Layout, Parameter, model_name, model_names
from ...layouts.fused import Fused, known_fused, stacked, stacked_in_bands
from ...layouts.modules import kinds_of
from ...layouts.plain import plain_buffer
from ...layouts.tensor_parallel import Sharding, band_of, marked_dim, shardings_of
from ...moments import Dtypes
from ...nonfinite import Guard, is_finite
from ..engine import Known
from . import swapping
from .budget import gather_of
from .layout import Masters, flat_partition_buffers, master_copy_buffers, zero3_buffers

#: Which dimension of the weight AutoTP's layers split, in releases whose parameters do not say it.
_AUTOTP_DIM = {"LinearLayer": 0, "LinearAllreduce": 1}

#: What each engine's fp32 partitions held when it was built.
_masters: weakref.WeakKeyDictionary[Any, Masters] = weakref.WeakKeyDictionary()


def allow_under_zero(optimizer: type) -> None:
    """Add the class to the optimizers that DeepSpeed takes under ZeRO, where DeepSpeed is
    imported.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.utils")
    supported = getattr(zero, "ZERO_SUPPORTED_OPTIMIZERS", None)
    if supported is not None and optimizer not in supported:
        supported.append(optimizer)


class DeepSpeed:
    """See :class:`weyl_megatron.engines.engine.Engine`; does not keep the DeepSpeedEngine alive."""

    steps_parameters = False
    counts_in_groups = False

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)

    @property
    def moment_dtypes(self) -> Dtypes | None:
        """Those of bf16_optimizer_states, whose weights are in bfloat16, too."""
        engine = self._engine()
        config = getattr(getattr(engine, "_config", None), "bfloat16_config", None)
        is_narrow = getattr(config, "bf16_optimizer_states", False)
        return (torch.bfloat16, torch.bfloat16) if is_narrow else None

    def is_constructing(self) -> bool:
        """FP16_UnfusedOptimizer calls ``step()`` with zero gradients as it is built, to allocate
        the state.
        """
        engine = self._engine()
        return engine is not None and getattr(engine, "optimizer", None) is None

    def read_layout(self, _: Known) -> Layout:
        return read_layout(self._alive())

    def give_norm(self, guard: Guard) -> None:
        _give_norm(self._alive(), guard)

    def _alive(self) -> Any:
        engine = self._engine()
        if engine is None:
            raise ValueError(
                "AdamW2: the optimizer got a step after its DeepSpeedEngine was deleted, it takes "
                "steps by the engine."
            )
        return engine


def read_layout(engine: Any) -> Layout:
    """Return the layout of everything that the engine's optimizer wrapper gives to the optimizer.

    Collective over the tensor-parallel group. Called first when the engine has just been built,
    while its masters hold the weights of the model: a layout that is not understood is found then.

    Raises:
        ValueError: the wrapper, or an option of it, is one whose layout is not understood.
    """
    wrapper = engine.optimizer
    given = dict(engine.module.named_parameters(remove_duplicate=True))
    named = [(name, given[whole]) for whole, name in model_names(given).items()]
    names = {id(param): name for name, param in named}
    for param, whole in engine.param_names.items():
        names.setdefault(id(param), model_name(whole))
    owners = {
        id(param): type(m).__name__
        for m in engine.module.modules()
        for param in m.parameters(recurse=False)
    }

    def split_dim(param: Tensor) -> int | None:
        return _split_dim(param, owners.get(id(param), ""))

    shardings = shardings_of(named, _tensor_parallel_group(engine), split_dim, _shape)
    kinds = kinds_of(engine.module, names)

    def describe(param: Tensor) -> Parameter:
        name = names.get(id(param), "<a parameter that the engine's model does not have>")
        sharding = shardings.get(id(param))
        fused = _sub_parameters(name, param, sharding)
        return band_of(name, _shape(param), sharding, kind=kinds.get(name), fused=fused)

    masters = _masters.setdefault(engine, Masters())
    buffers = list(_buffers(engine, wrapper, describe, names, shardings, masters))
    return Layout(buffers, kinds, gather=gather_of(engine, names))


def check_swapped(engine: Any, *, is_new: bool) -> None:
    """Check what the engine keeps in files, where it does; before steps are made.

    Args:
        engine: which has its wrapper.
        is_new: whether it is just being built, and nothing is in flight.

    Raises:
        ValueError: see :func:`read_layout`.
    """
    if swapping.is_swapping(engine.optimizer):
        layout, masters = read_layout(engine), _masters[engine]
        swapping.check_swapped(engine.optimizer, layout, masters, reads_weights=is_new)


def _shape(param: Any) -> tuple[int, ...]:
    """Return a parameter's shape, which ZeRO-3 takes from it together with its elements."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _split_dim(param: Any, layer: str) -> int | None:
    """Return the dimension along which a parameter is split, which a user's own layers or AutoTP
    say; None: it is not known.

    Args:
        layer: the class of the module that has it.
    """
    dim = marked_dim(param)
    if dim is not None:
        return dim
    meta = getattr(param, "ds_autotp_universal_checkpoint_meta", None)
    if meta:
        return None if meta["partition_dim"] is None else int(meta["partition_dim"])
    return _AUTOTP_DIM.get(layer) if len(_shape(param)) > 1 else None


def _sub_parameters(name: str, param: Any, sharding: Sharding | None) -> Fused | None:
    """Return the parts of a weight that AutoTP was told of, each of which it cuts by itself."""
    meta = getattr(param, "ds_autotp_universal_checkpoint_meta", None) or {}
    sizes, shape = meta.get("sub_param_sizes"), list(_shape(param))
    if not sizes or len(shape) != 2 or sharding is None or sharding.dim is None:
        return None
    shape[sharding.dim] = sum(sharding.sizes)
    known = known_fused(name, shape)
    is_known = known is not None and (known.axis, known.sizes) == (sharding.dim, tuple(sizes))
    labels = known.labels if known and is_known else [str(part) for part in range(len(sizes))]
    return stacked_in_bands(stacked(sharding.dim, sizes, labels), sharding.sizes)


def _give_norm(engine: Any, guard: Guard) -> None:
    """Let ``guard`` read the norm of all gradients where the engine's wrapper has it before it
    steps.

    A norm that is not finite would also make the engine's clipping write NaN into every gradient,
    after which nobody could say whose it was. Where the wrapper itself skips such steps, the guard
    counts and names them. A configuration whose ``bf16.check_grad_overflow`` is false goes before
    the guard's default.
    """
    is_engine_s = not guard.is_explicit and _ignores_overflow(engine)
    wrapper, reference = engine.optimizer, weakref.ref(engine)

    def norm() -> float | None:
        alive = reference()
        total = None if alive is None else alive.optimizer._global_grad_norm
        return None if total is None else float(total)

    def number() -> int:
        alive = reference()
        return -1 if alive is None else int(alive.global_steps)

    guard.number = number
    # A stage of a pipeline, and a part of a step, knows nothing else of the others.
    guard.needs_norm = wrapper is not engine.basic_optimizer or hasattr(engine, "stage_id")
    if wrapper is engine.basic_optimizer:
        if guard.is_on and engine.mpu is None:
            _clip_what_is_finite(engine)
        return
    if not hasattr(wrapper, "_global_grad_norm"):
        return
    guard.norm = None if is_engine_s else norm
    if not type(wrapper).__name__.startswith("DeepSpeedZeroOptimizer"):
        return
    clip, update_scale = wrapper.unscale_and_clip_grads, wrapper._update_scale
    if hasattr(update_scale, "adamw2"):  # the layout was read anew
        return

    @functools.wraps(clip)
    def clip_by_a_number(grads: Any, total_norm: Any) -> Any:
        total = torch.as_tensor(total_norm)
        return clip(grads, total_norm if 0 <= float(total) < math.inf else torch.zeros_like(total))

    @functools.wraps(update_scale)
    def refuse_and_update(has_overflow: Any) -> Any:
        if has_overflow and wrapper.loss_scale == 1:  # else it is the search for a loss scale
            guard.refuse(_non_finite_names(engine, wrapper), number())
        return update_scale(has_overflow)

    refuse_and_update.adamw2 = True  # type: ignore[attr-defined]
    wrapper.unscale_and_clip_grads = clip if is_engine_s else clip_by_a_number
    wrapper._update_scale = refuse_and_update


def _ignores_overflow(engine: Any) -> bool:
    """Whether the configuration itself says that a step on gradients that are not finite is to be
    made.
    """
    bf16 = getattr(engine._config, "bfloat16_config", None)
    is_given = "check_grad_overflow" in getattr(bf16, "model_fields_set", ())
    return engine.bfloat16_enabled() and is_given and not bf16.check_grad_overflow  # type: ignore[union-attr]


def _clip_what_is_finite(engine: Any) -> None:
    clip = engine.clip_fp32_gradients
    if hasattr(clip, "adamw2"):
        return

    @functools.wraps(clip)
    def clip_if_finite() -> None:
        if is_finite(
            *(param.grad for param in engine.module.parameters() if param.grad is not None)
        ):
            clip()

    clip_if_finite.adamw2 = True  # type: ignore[attr-defined]
    engine.clip_fp32_gradients = clip_if_finite


def _non_finite_names(engine: Any, wrapper: Any) -> list[str]:
    """Return the parameters of whose reduced gradients this rank has pieces that are not finite."""
    given = dict(engine.module.named_parameters(remove_duplicate=True))
    names = {id(given[whole]): name for whole, name in model_names(given).items()}
    params = wrapper.fp16_groups if hasattr(wrapper, "fp16_groups") else wrapper.params_in_partition
    non_finite = [
        names.get(id(param), "a parameter of no name")
        for number, grads in getattr(wrapper, "averaged_gradients", {}).items()
        for param, grad in zip(params[number], grads or (), strict=False)  # padding comes last
        if grad is not None and not is_finite(grad)
    ]
    return list(dict.fromkeys(non_finite))


def _buffers(
    engine: Any,
    wrapper: Any,
    describe: Any,
    names: dict[int, str],
    shardings: dict[int, Sharding],
    masters: Masters,
) -> Iterator[Buffer]:
    kind = type(wrapper).__name__
    if wrapper is engine.basic_optimizer:
        for group in wrapper.param_groups:
            for param in group["params"]:
                described = describe(param)
                yield plain_buffer(
                    param, described.name, shardings, described.kind, described.fused
                )
    elif kind == "FP16_UnfusedOptimizer":
        yield from master_copy_buffers(wrapper.fp16_groups, wrapper.fp32_groups, describe, masters)
    elif kind == "BF16_Optimizer":
        yield from flat_partition_buffers(
            wrapper.bf16_groups,
            wrapper.fp32_groups_flat_partition,
            wrapper.real_dp_process_group,
            describe,
            masters,
        )
    elif kind == "DeepSpeedZeroOptimizer":
        yield from flat_partition_buffers(
            wrapper.bit16_groups,
            wrapper.single_partition_of_fp32_groups,
            wrapper.real_dp_process_group,
            describe,
            masters,
        )
    elif kind == "DeepSpeedZeroOptimizer_Stage3":
        yield from zero3_buffers(
            wrapper.fp16_groups,
            wrapper.fp32_partitioned_groups_flat,
            swapping.sizes_in_files(wrapper),
            describe,
            masters,
        )
    else:
        first = next(iter(names.values()), "")
        raise ValueError(
            f"AdamW2: DeepSpeed's {kind} gives out parameter '{first}' and the others in a layout "
            "that AdamW2 does not understand; it takes ZeRO 0, 1, 2 and 3, BF16_Optimizer and "
            "FP16_UnfusedOptimizer."
        )


def _tensor_parallel_group(engine: Any) -> Any | None:
    """Return the tensor-parallel group of the user's ``mpu``, of AutoTP or of the pipeline's grid,
    or None.
    """
    # The grid's "model parallel" group spans the stages, too; its tensor-parallel one is called
    # "slice".
    for method in (
        "get_slice_parallel_group",
        "get_tensor_model_parallel_group",
        "get_model_parallel_group",
    ):
        get = getattr(engine.mpu, method, None)
        if get is not None:
            return get()
    return None
