"""Megatron-core: ``enable()`` once, then ``OptimizerConfig(optimizer="adamw2", …)`` as usual.

Megatron builds its Adam for us, with everything that it wraps around one, and gets AdamW2 in Adam's
place. What its wrapper did to the parameters is read at the first step. ``optimizer="adam"`` takes
Megatron's own code, untouched.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...layouts.buffers import model_name
from ...optimizer import AdamW2
from ...settings import check_settings
from ...stats import MatrixStats
from . import precision
from .fsdp import has_dtensors
from .layout import groups_of
from .offload import CpuOffload, offload
from .warmup import look_at_schedules
from .wrapper import Megatron

__all__ = ["adamw2", "attach", "enable", "stats"]

NAME = "adamw2"

#: Options of AdamW2 and of :func:`enable`, as they were given last.
_options: dict[str, Any] = {}

#: The configuration for which Megatron is building an Adam that is to be AdamW2.
_building: list[Any] = []


def enable(
    *,
    tau: float | str = 0.01,
    power_iters: int = 2,
    floor_std: float = 1e-3,
    clip_vectors: bool = False,
    io: Sequence[str] | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    nonfinite: str | None = None,
    nonfinite_limit: int | None = None,
    spike: str | None = None,
    clip: str = "scale",
    vectors: int | None = None,
    split_fused: bool = True,
) -> None:
    """Make ``OptimizerConfig(optimizer="adamw2")`` build AdamW² in this process, from now on.

    Rate, betas, eps and weight decay are Megatron's: ``lr``, ``adam_beta1``, ``adam_beta2``,
    ``adam_eps``, ``weight_decay``. May be called before or after ``get_megatron_optimizer`` is
    imported, and again for other options.

    Args:
        tau, power_iters, floor_std, clip_vectors, io, overrides, nonfinite, nonfinite_limit: as in
            :class:`weyl_megatron.AdamW2`. Patterns match the names that parameters have in the
            whole model, such as ``decoder.layers.7.mlp.linear_fc2.weight``.
        spike, clip, vectors: likewise.
        split_fused: treat q, k and v of linear_qkv, k and v of linear_kv, gate and up of a gated
            linear_fc1, and the parts of MLA's, Mamba's and Gated DeltaNet's projections as matrices
            of their own; False: as one.

    Raises:
        ImportError: megatron-core is not installed.
        ValueError: an option is impossible; or this megatron-core builds its optimizers in another
            way.
    """
    options = {
        "tau": tau,
        "power_iters": power_iters,
        "floor_std": floor_std,
        "clip_vectors": clip_vectors,
        "io": io,
        "overrides": overrides,
        "nonfinite": nonfinite,
        "nonfinite_limit": nonfinite_limit,
        "spike": spike,
        "clip": clip,
        "vectors": vectors,
        "split_fused": split_fused,
    }
    check_options(options)
    _install()
    _options.clear()
    _options.update(options)


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError, one sentence, where one of the options of :func:`enable`, all of which are
    given, is impossible.
    """
    given = dict(options)
    split_fused = given.pop("split_fused")
    check_settings(**given, others={})
    if not isinstance(split_fused, bool):
        raise ValueError(f"AdamW2: split_fused got {split_fused!r}, it takes True or False.")


def stats(optimizer: Any) -> dict[str, MatrixStats]:
    """Return what the last step did to every matrix that this rank holds a piece of, by its name in
    the whole model.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned.
    """
    entries: dict[str, MatrixStats] = {}
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(wrapper.optimizer, AdamW2 | CpuOffload):
            entries |= wrapper.optimizer.stats()
    return entries


def adamw2(config: Any, **kwargs: Any) -> AdamW2:
    """Return the optimizer for the keywords with which Megatron builds FusedAdam; for patched trees
    (``patches/``).

    Args:
        config: Megatron's ``OptimizerConfig``; fields ``adamw2_tau`` and so on go before what
            :func:`enable` was given.
        kwargs: ``params``, ``lr``, ``betas``, ``eps``, ``weight_decay``.
    """
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not any(config is other for other in _building):
        precision.refuse_patched(config)
    _refuse(config, [])
    options = {key: value for key, value in _options_of(config).items() if key != "split_fused"}
    optimizer = AdamW2(**kwargs, **options)
    # Then Megatron's checkpoints look for the count where FusedAdam keeps it.
    optimizer.engine = Megatron(counts_in_groups=distributed.HAVE_APEX_OR_TE)
    if distributed.HAVE_APEX_OR_TE:
        for group in optimizer.param_groups:
            group["step"] = 0
    return optimizer


def attach(
    wrapper: Any,
    config: Any,
    model: Sequence[nn.Module],
    stepped: Sequence[Sequence[Tensor]],
    collection: Any = None,
) -> None:
    """Tell the AdamW2 in Megatron's optimizer ``wrapper`` what it steps; for patched trees
    (``patches/``).

    Args:
        wrapper: what Megatron put around the optimizer that :func:`adamw2` returned.
        config: Megatron's ``OptimizerConfig``.
        model: the model's chunks on this rank.
        stepped: the model's parameters per parameter group, as they were before ``wrapper`` put its
            own there.
        collection: Megatron's ``ProcessGroupCollection``; None: the groups of ``parallel_state``.
    """
    if not isinstance(wrapper.optimizer, AdamW2):  # None where this rank trains nothing
        return
    _refuse(config, model)
    engine = wrapper.optimizer.engine
    assert isinstance(engine, Megatron)
    engine.moment_dtypes = precision.moment_dtypes(config)
    if getattr(config, "optimizer_cpu_offload", False):
        offload(wrapper, config)
    engine.attach(
        wrapper,
        model,
        stepped,
        groups_of(collection),
        split_fused=_options_of(config).get("split_fused", True),
        # Megatron then gives the first chunk of the model an optimizer of its own, which sees no
        # other chunk.
        is_part=bool(config.overlap_param_gather_with_optimizer_step),
    )


def _options_of(config: Any) -> dict[str, Any]:
    names = [
        name for name in inspect.signature(enable).parameters if hasattr(config, f"adamw2_{name}")
    ]
    return {**_options, **{name: getattr(config, f"adamw2_{name}") for name in names}}


def _install() -> None:
    """Wrap the two functions of megatron-core between a configuration and its optimizer, once."""
    import megatron.core
    import megatron.core.optimizer as factory

    if hasattr(factory.OptimizerConfig, "adamw2_tau"):
        raise ValueError(
            "AdamW2: this Megatron has the patch of weyl_megatron, which takes "
            "OptimizerConfig(adamw2_tau=…) and the --adamw2- flags of its own scripts, not "
            "enable()."
        )
    build = getattr(factory, "_get_megatron_optimizer_based_on_param_groups", None)
    if build is None or not hasattr(factory, "Adam"):
        raise ValueError(
            f"AdamW2: megatron-core {megatron.core.__version__} builds its optimizers in a way "
            f"that AdamW2 does not know, it takes 0.14 to 0.19."
        )
    if hasattr(build, "adamw2"):
        return
    _check_configurations(factory.OptimizerConfig)
    look_at_schedules()
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_adamw2(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        config, model = given["config"], list(given["model_chunks"])
        if config.optimizer != NAME and not any(config is other for other in _building):
            return build(*args, **kwargs)
        _refuse(config, model)
        stepped = [list(group["params"]) for group in given["param_groups"]]
        with (
            _named_adam(config),
            _adamw2_in_place_of_adam(factory, config),
            precision.building(config),
        ):
            wrapper = build(*args, **kwargs)
        attach(wrapper, config, model, stepped, given.get("pg_collection"))
        return wrapper

    build_adamw2.adamw2 = True  # type: ignore[attr-defined]
    factory._get_megatron_optimizer_based_on_param_groups = build_adamw2

    # From 0.17 on Megatron sends every name but adam and sgd to a factory of its own, which shards
    # no optimizer state.
    emerging = getattr(factory, "_get_megatron_emerging_optimizer", None)
    if emerging is None:
        return

    @functools.wraps(emerging)
    def emerging_or_adamw2(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(emerging).bind(*args, **kwargs).arguments
        if given["config"].optimizer != NAME:
            return emerging(*args, **kwargs)
        # The caller is get_megatron_optimizer, which keeps these to itself: the releases from 0.17
        # to 0.19 neither pass them on nor store them, and users may have imported the function
        # before it could be wrapped.
        caller = sys._getframe(1).f_locals
        kept = {
            key: caller[key]
            for key in ("use_gloo_process_groups", "dump_param_to_param_group_map")
            if key in caller
        }
        with _named_adam(given["config"]):
            return factory.get_megatron_optimizer(**given, **kept)

    factory._get_megatron_emerging_optimizer = emerging_or_adamw2


def _check_configurations(kind: type) -> None:
    """Have a configuration that asks for AdamW2 refused in our words, before Megatron says that it
    takes adam alone.
    """
    complete = kind.__post_init__  # type: ignore[attr-defined]

    @functools.wraps(complete)
    def check_and_complete(config: Any) -> None:
        if config.optimizer != NAME:
            complete(config)
            return
        _refuse(config, [])
        with _named_adam(config):
            precision.complete(config, complete)

    kind.__post_init__ = check_and_complete  # type: ignore[attr-defined]


@contextmanager
def _named_adam(config: Any) -> Iterator[None]:
    """Let Megatron take its way of building Adam for ``config``."""
    name, config.optimizer = config.optimizer, "adam"
    _building.append(config)
    try:
        yield
    finally:
        _building.pop()
        config.optimizer = name


@contextmanager
def _adamw2_in_place_of_adam(factory: Any, config: Any) -> Iterator[None]:
    """Let Megatron's factory find AdamW2 where it looks for Transformer Engine's or apex's
    FusedAdam.
    """
    import megatron.core.optimizer.distrib_optimizer as distributed

    ours = [
        (factory, "Adam", functools.partial(adamw2, config)),
        (
            distributed,
            "Adam",
            torch.optim.AdamW,
        ),  # 0.14 shards this class alone, which there may be FusedAdam
    ]
    if hasattr(factory, "USING_PYTORCH_OPTIMIZER"):  # 0.14 has no such flag and always takes Adam
        ours.append((factory, "USING_PYTORCH_OPTIMIZER", False))
    kept = [(module, name, getattr(module, name)) for module, name, _ in ours]
    try:
        for module, name, value in ours:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _refuse(config: Any, model: Sequence[Any]) -> None:
    """Raise one sentence for what Megatron would do to the optimizer that AdamW2 cannot do, or
    cannot see.
    """
    ddp = getattr(model[0], "ddp_config", None) if model else None
    has_fsdp = getattr(ddp, "use_megatron_fsdp", False)
    takes = (
        (config, "decoupled_weight_decay", True),
        (config, "use_layer_wise_distributed_optimizer", False),
        (config, "optimizer_cuda_graph", False),
        # It is Megatron-FSDP's name of before, and from 0.16 on set beside the new one.
        (None if has_fsdp else ddp, "use_custom_fsdp", False),
    )
    for holder, key, taken in takes:
        got = getattr(holder, key, taken)
        if bool(got) is not taken:
            raise ValueError(f"AdamW2: {key} got {got!r}, it takes {taken!r}.")
    precision.refuse(config)
    if has_fsdp:
        precision.refuse_beside_fsdp(config)
        if not all(map(has_dtensors, model)):
            raise ValueError(
                "AdamW2: use_megatron_fsdp got True, it takes the Megatron-FSDP of megatron-core "
                "0.16 or newer, whose parameters are DTensors."
            )
    for chunk in model:
        if "FullySharded" in type(chunk).__name__ and not has_fsdp:
            raise ValueError(
                f"AdamW2: the model is wrapped in {type(chunk).__name__}, whose layout AdamW2 does "
                "not understand; it takes Megatron's DistributedDataParallel or Megatron-FSDP."
            )
        _refuse_weight_shards(chunk)


def _refuse_weight_shards(chunk: nn.Module) -> None:
    """Raise one sentence where weights are sharded beyond tensor parallelism, as from 0.19 on
    (GTP).
    """
    for key in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size"):
        size = getattr(getattr(chunk, "config", None), key, None)
        if size not in (None, 1):
            raise ValueError(
                f"AdamW2: {key} got {size!r}, it takes 1: as many weight shards as tensor-parallel "
                "ranks."
            )
    for name, param in chunk.named_parameters():
        if getattr(param, "is_gtp_weight_remat", False):
            raise ValueError(
                f"AdamW2: parameter '{model_name(name)}' is cut into weight shards (GTP), whose "
                "layout AdamW2 does not understand; it takes as many weight shards as "
                "tensor-parallel ranks."
            )
