"""What ``weyl-megatron plan`` takes as a model.

A Hugging Face config, a timm model, a recipe of examples/megatron, or a checkpoint.
"""

from __future__ import annotations

import importlib
import logging
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts.buffers import model_names
from ..layouts.local import is_on_mesh
from ..settings import read_tau

#: Above so many parameters a Hugging Face model is initialised a block at a time.
_LARGE = 1_000_000_000

#: GPT-2's tokens, rounded up as Megatron does; a recipe does not name its tokenizer.
_VOCABULARY = 50304

_RECIPE_KEYS = ("num_layers", "hidden_size", "lr", "train_steps")

#: Under what a checkpoint keeps the model's state.
_STATE_KEYS = ("model", "state_dict", "module", "model_state_dict")


@dataclass(frozen=True)
class Source:
    """A model's parameters, and what a recipe says of the schedule.

    They are as before training, or as a checkpoint has them.
    """

    label: str
    named: Iterable[tuple[str, Tensor]]  #: to be read once
    module: nn.Module | None = None
    lr: float = 6e-4
    min_lr: float | None = None
    steps: int | None = None
    warmup: int = 0
    tau: float | str | None = None


def load(model: str) -> Source:
    """Return what ``model`` names, the first of: an existing file or folder, a timm model, a
    Hugging Face config.

    Raises:
        ValueError: it names nothing, or what it names lacks what a plan needs.
    """
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        return _recipe(path)
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        return _checkpoint(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"plan: the folder {path} has no config.json, it takes a Hugging Face model's "
                "folder."
            )
        return _hugging_face(model)
    if path.is_file():
        raise ValueError(
            f"plan: {path} has the suffix '{path.suffix}', it takes .yaml, .pt, .pth, .bin, "
            ".safetensors."
        )
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError:
        timm = None
    if timm is not None and timm.is_model(model):
        torch.manual_seed(0)
        module = timm.create_model(model, pretrained=False)
        return Source(f"timm's {model}, {_millions(module)}", module.named_parameters(), module)
    hint = "" if timm is not None else " (timm is not installed: pip install timm)"
    return _hugging_face(model, hint)


def _millions(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M parameters"


def _hugging_face(model: str, hint: str = "") -> Source:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(
            f"plan: {model!r} is looked up as a Hugging Face config, for which it takes "
            f"transformers: pip install transformers{hint}."
        ) from None
    config = _config(transformers, model, hint)
    builder = transformers.AutoModel
    for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification"):
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            builder = getattr(transformers, name)
            break
    try:
        with torch.device("meta"):
            empty = builder.from_config(config)
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"plan: transformers cannot build {model!r}: {' '.join(str(error).split())[:200]}"
        ) from None
    label = f"{type(empty).__name__} of {model}, {_millions(empty)}"
    torch.manual_seed(0)
    if sum(parameter.numel() for parameter in empty.parameters()) > _LARGE:
        return Source(label, _block_by_block(empty), empty)
    module = builder.from_config(config, dtype=torch.float32)
    return Source(label, module.named_parameters(), module)


def _config(transformers: Any, model: str, hint: str) -> Any:
    """Return the config of a folder, of a model type ("gpt2"), of the cache, or of the hub."""
    try:
        if model in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
            return transformers.AutoConfig.for_model(model)
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries, a line each
        return transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if "connect" in str(error) or "offline" in str(error).lower():
            raise ValueError(
                f"plan: {model!r} is no file, no timm model and no model type of transformers, and "
                f"the Hugging Face hub cannot be reached; it takes a folder with config.json{hint}."
            ) from None
        raise ValueError(
            f"plan: {model!r} is no file, no timm model, and no config that transformers "
            f"finds{hint}: {' '.join(str(error).split())[:200]}"
        ) from None


def _block_by_block(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Initialise a meta model's parameters.

    Those of one element of a ModuleList are in memory at a time.
    """
    units = [(name, child) for name, child in module.named_modules() if _is_element(module, name)]
    inner = {id(sub) for _, unit in units for sub in unit.modules()}
    outer = [(name, sub) for name, sub in module.named_modules() if id(sub) not in inner]
    units += [(name, sub) for name, sub in outer if next(sub.parameters(False), None) is not None]
    seen: set[int] = set()
    for name, unit in units:
        whole = id(unit) in inner
        # Tied weights are one parameter in two modules: the first counts.
        own = [(key, p) for key, p in unit.named_parameters(recurse=whole) if id(p) not in seen]
        seen |= {id(p) for _, p in own}
        if not own:
            continue
        unit.to_empty(device="cpu", recurse=whole)
        # Children come before parents, as in transformers.
        for sub in reversed(list(unit.modules()) if whole else [unit]):
            module._init_weights(sub)
        keys = {key for key, _ in own}
        for key, parameter in unit.named_parameters(recurse=whole):
            if key in keys:
                yield f"{name}.{key}", parameter
        unit.to_empty(device="meta", recurse=whole)


def _is_element(module: nn.Module, name: str) -> bool:
    """Whether a module is an element of an outermost ModuleList."""
    parts = name.split(".")
    around = [module.get_submodule(".".join(parts[:count])) for count in range(len(parts))]
    lists = [count for count, outer in enumerate(around) if isinstance(outer, nn.ModuleList)]
    return bool(name) and lists == [len(parts) - 1]


def _recipe(path: Path) -> Source:
    """Return Megatron's GPT-2 as a recipe of examples/megatron has it.

    Tied, normal with std .02, less where residuals are written.
    """
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise ValueError(
            f"plan: {path} is a recipe, for which it takes PyYAML: pip install pyyaml."
        ) from None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"plan: {path} is no YAML: {' '.join(str(error).split())[:200]}") from None
    present = values if isinstance(values, dict) else {}
    missing = [key for key in _RECIPE_KEYS if key not in present]
    if missing:
        raise ValueError(
            f"plan: {path} lacks {', '.join(missing)}; it takes a recipe as in "
            "examples/megatron/recipes."
        )
    try:
        layers, width = int(values["num_layers"]), int(values["hidden_size"])
        context, steps = int(values.get("seq_length", 1024)), int(values["train_steps"])
        lr, min_lr = float(values["lr"]), float(values.get("min_lr", 0.0))
        warmup, tau = int(values.get("lr_warmup_steps", 0)), values.get("tau", 0.01)
        tau = read_tau("tau", tau) if isinstance(tau, str) and tau.isalpha() else float(tau)
    except (TypeError, ValueError) as error:
        raise ValueError(f"plan: {path} has a value that is no number: {error}.") from None
    if min(layers, width, context, steps) < 1:
        raise ValueError(f"plan: {path} got a size below 1, it takes sizes from 1 on.")
    label = f"{path.name}, {layers} layers of {width}, {_VOCABULARY} tokens"
    return Source(
        label,
        _megatron(layers, width, context),
        lr=lr,
        min_lr=min_lr,
        steps=steps,
        warmup=warmup,
        tau=tau,
    )


def _megatron(layers: int, width: int, context: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int, cols: int, std: float = 0.02) -> Tensor:
        return torch.randn(rows, cols, generator=generator) * std

    yield "embedding.word_embeddings.weight", normal(_VOCABULARY, width)
    yield "embedding.position_embeddings.weight", normal(context, width)
    residual = 0.02 / math.sqrt(2 * layers)
    for layer in range(layers):
        name = f"decoder.layers.{layer}"
        for part in "qkv":  # as AdamW² splits linear_qkv
            yield f"{name}.self_attention.linear_qkv.weight[{part}]", normal(width, width)
        yield f"{name}.self_attention.linear_proj.weight", normal(width, width, residual)
        yield f"{name}.mlp.linear_fc1.weight", normal(4 * width, width)
        yield f"{name}.mlp.linear_fc2.weight", normal(width, 4 * width, residual)


def _checkpoint(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"plan: there is no file {path}.")
    if path.suffix == ".safetensors":
        try:
            safetensors: Any = importlib.import_module("safetensors")
        except ImportError:
            raise ValueError(f"plan: {path} takes safetensors: pip install safetensors.") from None
        return Source(path.name, _safetensors(safetensors, path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise ValueError(
            f"plan: {path} is no state dict that loads with weights_only=True: {reason[:200]}"
        ) from None
    while isinstance(state, Mapping) and not _has_tensors(state):
        keys = (key for key in _STATE_KEYS if key in state)
        inside = state.get(next(keys, ""))
        if inside is None:
            break
        state = inside
    tensors = _once(state) if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"plan: {path} has no tensors by name, it takes a state dict.")
    for key, tensor in tensors.items():
        if is_on_mesh(tensor):
            raise ValueError(
                f"plan: '{key}' of {path} is spread over ranks (a DTensor), it takes whole "
                "tensors: save what get_model_state_dict with full_state_dict=True returns."
            )
    return Source(path.name, tensors.items())


def _has_tensors(state: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _once(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that lie in different memory: of tied weights the first."""
    places: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for key, name in model_names(tensors).items():
        tensor = tensors[key]
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else (name,)
        places.setdefault(place, (name, tensor))
    return dict(places.values())


def _safetensors(safetensors: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for given, name in model_names(file.keys()).items():
                yield name, file.get_tensor(given)
    except safetensors.SafetensorError as error:
        raise ValueError(f"plan: {path} is no safetensors file: {error}") from None
