"""What a parameter is to the module that owns it: which matrices a weight of any shape holds, and what they are for."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from weyl_megatron.layouts.buffers import model_names
from weyl_megatron.layouts.grid import Kind, guessed_form

_VECTOR, _MATRIX, _STACK = Kind("vector"), Kind("matrix"), Kind("experts")

#: Gates that a recurrent weight stacks, each with a nonlinearity of its own, by how often it has its module's hidden
#: size and what the class is called.
_GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}

#: Convolutions and norms that are no subclasses of torch's.
_CONVOLUTION = re.compile(r"[Cc]onv(?![a-z])|[Cc]onvolution")
_NORM = re.compile(r"Norm(\dd)?$")

#: The two factors of an adapter's product, as parts of their names: PEFT, loralib, torchtune, kohya and LyCORIS.
_FACTORS = (
    ("lora_A", "lora_B"),
    ("lora_a", "lora_b"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)
_PARTNERS = {**dict(_FACTORS), **{second: first for first, second in _FACTORS}}

#: What adapters scale by, whatever its shape: DoRA's lengths, VeRA's and IA³'s scales, AdaLoRA's singular values.
_SCALE = re.compile(r"(^|\.)(lora_magnitude_vector|vera_lambda_[bd]|ia3_l|lora_E)(\.|$)")

#: The lengths of weight_norm, (out, 1): torch's parametrization and the older function.
_LENGTH = re.compile(r"(^|\.)(parametrizations\.\w+\.original0|weight\w*_g)$")

#: A weight of a parametrized module: the list that holds it is no owner.
_PARAMETRIZED = re.compile(r"^(?P<path>(?:.*\.)?)parametrizations\.(?P<leaf>\w+)\.original[01]?$")


def kinds_of(model: nn.Module, names: Mapping[int, str] | None = None) -> dict[str, Kind]:
    """Return what every parameter of ``model``, frozen ones too, is to the module that owns it, by name.

    ==============================================  ===================================================================
    module                                          matrices of its weight
    ==============================================  ===================================================================
    ``nn.Conv1d``, ``2d``, ``3d``                   (out/groups, in/groups·kernel), one per group
    ``nn.ConvTranspose1d``, ``2d``, ``3d``          (in/groups, out/groups·kernel), one per group
    depthwise: a group has one channel in or out    one, of the first dimension by all others
    ``nn.MultiheadAttention``                       in_proj_weight: q, k, v
    ``nn.LSTM``, ``nn.GRU`` and their cells         one per gate
    ``nn.Bilinear``                                 (out, in1·in2), linear in the outer product; (in1, in2) for one out
    norms, weight_norm's lengths, biases of experts none: scheduled rate, whatever the shape
    (experts, m, n) in any other module             (m, n), one per expert; gate and up apart where the module says
                                                    that it stacks them (Hugging Face's experts)
    four dimensions or more in any other module     one, of the first dimension by all others
    ==============================================  ===================================================================

    A group of one channel is a row of taps. Hundreds of them would be measured one by one, and take a share of
    "auto"'s budget each; σ₁ of all rows together is at least that of the longest, which is the layer's.

    Parametrizations, weight_norm and pruning leave the owner what it is. ``model`` is not kept.

    Args:
        model: any module; under ZeRO-3 its parameters may be away.
        names: what parameters go by, by ``id``; None: their names in ``model``, without wrappers' parts.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    shorter = model_names(named)
    owners = dict(model.named_modules(remove_duplicate=False))
    head = _head_parameters(model)
    found: dict[int, Kind] = {}
    for name, param in named.items():
        if isinstance(param, UninitializedParameter):
            continue
        kind = _kind(name, param, owners)
        partner = adapter_partner(name)
        if partner is not None:
            other = named.get(partner)
            partner = None if other is None else shorter[partner] if names is None else names.get(id(other))
            kind = kind._replace(role="adapter", partner=partner)
        elif id(param) in head and kind.role is None:
            kind = kind._replace(role="head")
        known = found.get(id(param))
        if known is None or (known.role is None and kind.role is not None):  # tied weights have several owners
            found[id(param)] = kind
    if names is None:
        return {shorter[name]: found[id(param)] for name, param in named.items() if id(param) in found}
    return {names[number]: kind for number, kind in found.items() if number in names}


class SeenModel:
    """What an optimizer keeps of the model it was shown: kinds and names, and not the model.

    Raises:
        ValueError: ``model`` is no module.
    """

    def __init__(self, model: nn.Module | None = None, kinds: Mapping[str, Kind] | None = None) -> None:
        self._names: dict[int, tuple[weakref.ReferenceType[Tensor], str]] = {}  # by id
        self.kinds = dict(kinds or {})
        if model is None:
            return
        if not isinstance(model, nn.Module):
            raise ValueError(f"AdamW2: model got a {type(model).__name__}, it takes a torch.nn.Module.")
        named = dict(model.named_parameters())
        names = {id(named[whole]): name for whole, name in model_names(named).items()}
        self._names = {id(param): (weakref.ref(param), names[id(param)]) for param in named.values()}
        self.kinds |= kinds_of(model, names)

    def names(self, params: Sequence[Tensor]) -> list[str | None]:
        """Return the model's names of its parameters; None of others."""
        found = (self._names.get(id(param)) for param in params)
        return [known[1] if known and known[0]() is param else None for known, param in zip(found, params, strict=True)]

    def check_knows(self, names: Iterable[str]) -> None:
        """Raise ValueError where a model was shown that has none of the parameters."""
        if self._names and not any(name in self.kinds for name in names):
            raise ValueError(
                f"AdamW2: model got a module that has none of the parameters, neither by identity nor by name (its "
                f"first is '{next(iter(self.kinds))}'), it takes the one that they are of."
            )

    def rename(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Know parameters by the names that an optimizer has for them, too."""
        for name, own in zip(names, self.names(params), strict=True):
            if own in self.kinds:
                self.kinds[name] = self.kinds[own]


def kind_by_name(name: str, shape: tuple[int, ...]) -> Kind | None:
    """Return what a well-known name says where no module is seen: adapters, and what they and weight_norm scale by."""
    if _SCALE.search(name) or (_LENGTH.search(name) and sum(extent > 1 for extent in shape) < 2):
        return _VECTOR
    partner = adapter_partner(name)
    if partner is None:
        return None
    return Kind("matrix" if len(shape) < 3 else guessed_form(shape), role="adapter", partner=partner)


def adapter_partner(name: str) -> str | None:
    """Return the name that the other factor of an adapter's product has; None: ``name`` is of no factor."""
    parts = name.split(".")
    for number, part in enumerate(parts):
        if part in _PARTNERS:
            return ".".join([*parts[:number], _PARTNERS[part], *parts[number + 1 :]])
    return None


def _kind(name: str, param: Tensor, owners: Mapping[str, nn.Module]) -> Kind:
    shape = tuple(getattr(param, "ds_shape", param.shape))  # ZeRO-3's parameters are empty while they are away
    if len(shape) < 2 or _SCALE.search(name):
        return _VECTOR
    if _LENGTH.search(name) and sum(extent > 1 for extent in shape) < 2:
        return _VECTOR
    leaf, owner = _owner(name, owners)
    kind = type(owner).__name__
    if isinstance(owner, (nn.LayerNorm, _NormBase)) or _NORM.search(kind):
        return _VECTOR
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Kind("matrix", role="embedding")
    if len(shape) == 2:
        return _VECTOR if _is_bias(leaf, shape, owner) else Kind("matrix", parts=_parts(leaf, shape, owner))
    if isinstance(owner, _ConvNd) or (_CONVOLUTION.search(kind) and leaf.startswith("weight")):
        return Kind("convolution", groups=_groups(shape, owner))
    if len(shape) > 3 or (isinstance(owner, nn.Bilinear) and shape[0] > 1):
        return _MATRIX
    return _experts(leaf, owner)


def _owner(name: str, owners: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """Return the module that uses a parameter, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    found = _PARAMETRIZED.match(name)
    if found is not None:
        path, leaf = found["path"].rstrip("."), found["leaf"]
    while path and isinstance(owners[path], (nn.ParameterDict, nn.ParameterList)):
        path, _, leaf = path.rpartition(".")
    return leaf, owners[path]


def _parts(leaf: str, shape: tuple[int, ...], owner: nn.Module) -> tuple[str, ...]:
    """Return the labels of equal matrices that a 2-D weight stacks along its rows."""
    if isinstance(owner, nn.MultiheadAttention) and leaf.startswith("in_proj_weight"):
        return ("q", "k", "v") if shape[0] % 3 == 0 else ()
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) and leaf.startswith(("weight_ih", "weight_hh")):
        mode = getattr(owner, "mode", type(owner).__name__)
        gates = next((gates for name, gates in _GATES.items() if mode.startswith(name)), ())
        return gates if gates and shape[0] % len(gates) == 0 else ()
    return ()


def _groups(shape: tuple[int, ...], owner: Any) -> int:
    """Return how many matrices a convolution's weight is, bands of its first dimension."""
    groups = getattr(owner, "groups", 1)
    if not isinstance(groups, int) or groups < 1 or shape[0] % groups or 1 in (shape[0] // groups, shape[1]):
        return 1
    return groups


def _is_bias(leaf: str, shape: tuple[int, ...], owner: nn.Module) -> bool:
    """Whether a 2-D parameter is a bias, of one row or column or for each expert of a stack beside it."""
    if leaf == "bias" and 1 in shape:
        return True
    stacks = [tuple(getattr(param, "ds_shape", param.shape)) for param in owner.parameters(recurse=False)]
    return "bias" in leaf and any(len(stack) == 3 and stack[0] == shape[0] for stack in stacks)


def _experts(leaf: str, owner: Any) -> Kind:
    """Return the kind of a stack, with its parts where Hugging Face's experts say how these lie."""
    is_gated = leaf == "gate_up_proj" and getattr(owner, "has_gate", False)
    if is_gated and getattr(owner, "is_concatenated", False):
        return _STACK._replace(parts=("gate", "up"), axis=int(bool(getattr(owner, "is_transposed", False))))
    return _STACK


def _head_parameters(model: nn.Module) -> set[int]:
    """Return the ``id`` of the matrices below what a Hugging Face model calls its output embeddings."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(param) for param in _matrices(head)} if isinstance(head, nn.Module) else set()


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    for name, param in module.named_parameters():
        is_known = adapter_partner(name) is None and not isinstance(param, UninitializedParameter)
        if is_known and len(getattr(param, "ds_shape", param.shape)) > 1:
            yield param
