"""What a parameter is to the module that owns it: which matrices it holds, and for what."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from .adapters import (
    adapter_partner,
    is_adapter_name,
    is_no_matrix,
    low_rank_pairs,
    peft_parameters,
)
from .buffers import model_names
from .fused import plain_name
from .kinds import Kind
from .local import is_on_mesh
from .projections import split_rows

_VECTOR, _MATRIX, _STACK = Kind("vector"), Kind("matrix"), Kind("experts")

#: The gates that a recurrent weight stacks, by the module's mode. Each has its own nonlinearity.
_GATES = {"LSTM": ("i", "f", "g", "o"), "GRU": ("r", "z", "n")}

#: Convolutions and norms that are no subclasses of torch's.
_CONVOLUTION = re.compile(r"[Cc]onv(?![a-z])|[Cc]onvolution")
_NORM = re.compile(r"Norm(\dd)?$")

#: The lengths of weight_norm, (out, 1): torch's parametrization and the older function.
_LENGTH = re.compile(r"(^|\.)(parametrizations\.\w+\.original0|weight\w*_g)$")

#: A weight of a parametrized module: the list that holds it is no owner.
_PARAMETRIZED = re.compile(r"^(?P<path>(?:.*\.)?)parametrizations\.(?P<leaf>\w+)\.original[01]?$")


def kinds_of(model: nn.Module, names: Mapping[int, str] | None = None) -> dict[str, Kind]:
    """Return what every parameter of ``model``, frozen ones too, is to its owner, by name.

    =======================================  ======================================================
    owner                                    matrices of its weight
    =======================================  ======================================================
    ``nn.Conv1d``, ``2d``, ``3d``            (out/groups, in/groups·kernel), one per group
    ``nn.ConvTranspose1d``, ``2d``, ``3d``   (in/groups, out/groups·kernel), one per group
    depthwise: a group of one channel        one, of the first dimension by all others
    ``nn.MultiheadAttention``                q, k and v of in_proj_weight
    ``nn.LSTM``, ``nn.GRU``, their cells     one per gate
    linear layers of MLA, Mamba, DeltaNet    one per part: :func:`.projections.split_rows`
    ``nn.Bilinear``                          (out, in1·in2), linear in the outer product; for one
                                             output (in1, in2)
    norms, weight_norm's lengths,            none, whatever their shape: scheduled rate
    experts' biases
    any other, of (experts, m, n)            (m, n), one per expert; gate and up apart where the
                                             module says that it stacks them (Hugging Face)
    any other, of four dimensions or more    one, of the first dimension by all others
    =======================================  ======================================================

    A group of one channel, in or out, is a row of taps: hundreds of rows would be measured one by
    one, and each take a share of "balanced"'s budget. σ₁ of all rows together is at least that of
    the longest, which is the layer's.

    Parametrizations, weight_norm and pruning leave the owner what it is. ``model`` is not kept.

    Args:
        model: any module; under ZeRO-3 its parameters may be away.
        names: what parameters go by, by ``id``; None: their names in ``model``, without what
            wrappers add.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    shorter = model_names(named)
    owners = dict(model.named_modules(remove_duplicate=False))
    head = _head_parameters(model)
    initialized = {
        name: param
        for name, param in named.items()
        if not isinstance(param, UninitializedParameter)
    }
    adapters = _adapters(model, initialized)
    kinds: dict[int, Kind] = {}
    for name, param in initialized.items():
        kind = _kind(name, param, owners)
        if name in adapters:
            whole = adapters[name] or ""
            if whole not in named:
                partner = None
            else:
                partner = shorter[whole] if names is None else names.get(id(named[whole]))
            is_scale = partner is None and len(_shape(param)) == 2 and 1 in _shape(param)
            form = "vector" if is_scale else kind.form
            kind = kind._replace(form=form, role="adapter", partner=partner)
        elif id(param) in head and kind.role is None:
            kind = kind._replace(role="head")
        known = kinds.get(id(param))
        # Tied weights have several owners: the first that gives them a role counts.
        if known is None or (known.role is None and kind.role is not None):
            kinds[id(param)] = kind
    if names is None:
        return {shorter[name]: kinds[id(param)] for name, param in initialized.items()}
    return {names[number]: kind for number, kind in kinds.items() if number in names}


class SeenModel:
    """What an optimizer keeps of the model it was shown: kinds and names, and not the model.

    Raises:
        ValueError: ``model`` is no module.
    """

    def __init__(
        self, model: nn.Module | None = None, kinds: Mapping[str, Kind] | None = None
    ) -> None:
        self._names: dict[int, str] = {}  # by id
        self._plain: dict[int, weakref.ReferenceType[Tensor]] = {}  # whose ids may be others' later
        self.kinds = dict(kinds or {})
        if model is None:
            return
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"AdamW2: model got a {type(model).__name__}, it takes a torch.nn.Module."
            )
        named = dict(model.named_parameters())
        names = {id(named[whole]): name for whole, name in model_names(named).items()}
        for param in named.values():
            self._names[id(param)] = names[id(param)]
            if not is_on_mesh(param):  # Module.to refuses DTensors that have a weak reference
                self._plain[id(param)] = weakref.ref(param)
        self.kinds |= kinds_of(model, names)

    def names(self, params: Sequence[Tensor]) -> list[str | None]:
        """Return the model's names of its parameters; None of others."""
        others = {number for number, reference in self._plain.items() if reference() is None}
        return [None if id(param) in others else self._names.get(id(param)) for param in params]

    def check_knows(self, names: Iterable[str]) -> None:
        """Raise ValueError where a model was shown that has none of the parameters."""
        if self._names and not any(name in self.kinds for name in names):
            raise ValueError(
                "AdamW2: model got a module that has none of the parameters, neither by identity "
                f"nor by name (its first is '{next(iter(self.kinds))}'), it takes the one that "
                "they are of."
            )

    def rename(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Know parameters by the names that an optimizer has for them, too."""
        for name, own in zip(names, self.names(params), strict=True):
            if own in self.kinds:
                self.kinds[name] = self.kinds[own]


def kind_by_name(name: str, shape: tuple[int, ...]) -> Kind | None:
    """Return what a well-known name says where no module is seen; else None.

    Such names have adapters, and what these and weight_norm scale by.
    """
    if is_no_matrix(name):
        return _VECTOR
    if _LENGTH.search(name) and sum(extent > 1 for extent in shape) < 2:
        return _VECTOR
    if not is_adapter_name(name):
        return None
    form = "matrix" if len(shape) < 3 else "convolution"
    return Kind(form, role="adapter", partner=adapter_partner(name))


def _adapters(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, str | None]:
    """Return the names of a model's adapters, each with its partner's name.

    They are what libraries call so or PEFT lists, and pairs of low rank beside what is frozen.
    """
    known = {name for name in named if is_adapter_name(name)}
    known |= peft_parameters(model) & named.keys()
    trained = {name: _shape(param) for name, param in named.items() if param.requires_grad}
    is_partly_frozen = any(len(_shape(p)) > 1 and not p.requires_grad for p in named.values())
    pairs = low_rank_pairs(trained, known, is_partly_frozen=is_partly_frozen)
    return {name: adapter_partner(name) for name in known} | pairs


def _shape(param: Tensor) -> tuple[int, ...]:
    # ZeRO-3's parameters are empty while they are away.
    return tuple(getattr(param, "ds_shape", param.shape))


def _kind(name: str, param: Tensor, owners: Mapping[str, nn.Module]) -> Kind:
    shape = _shape(param)
    if len(shape) < 2 or is_no_matrix(name):
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
        if _is_bias(leaf, shape, owner):
            return _VECTOR
        split = _split(name, shape, owners)
        if split:
            return Kind("matrix", parts=tuple(split), period=tuple(split.values()))
        return Kind("matrix", parts=_parts(leaf, shape, owner))
    if isinstance(owner, _ConvNd) or (_CONVOLUTION.search(kind) and leaf.startswith("weight")):
        return Kind("convolution", groups=_groups(shape, owner))
    if len(shape) > 3 or (isinstance(owner, nn.Bilinear) and shape[0] > 1):
        return _MATRIX
    return _experts(leaf, owner)


def _owner(name: str, owners: Mapping[str, nn.Module]) -> tuple[str, nn.Module]:
    """Return the module that uses a parameter, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    parametrized = _PARAMETRIZED.match(name)
    if parametrized is not None:
        path, leaf = parametrized["path"].rstrip("."), parametrized["leaf"]
    while path and isinstance(owners[path], (nn.ParameterDict, nn.ParameterList)):
        path, _, leaf = path.rpartition(".")
    return leaf, owners[path]


def _split(name: str, shape: tuple[int, ...], owners: Mapping[str, nn.Module]) -> Mapping[str, int]:
    """Return into which rows the module around a linear layer splits what that returns."""
    path, _, leaf = plain_name(name).rpartition(".")
    attribute = path.rpartition(".")[2]
    if leaf != "weight" or not attribute:
        return {}
    around = ("." + name).rpartition(f".{attribute}.")[0].lstrip(".")
    return split_rows(attribute, owners[around], shape[0]) if around in owners else {}


def _parts(leaf: str, shape: tuple[int, ...], owner: nn.Module) -> tuple[str, ...]:
    """Return the labels of equal matrices that a 2-D weight stacks along its rows."""
    if isinstance(owner, nn.MultiheadAttention) and leaf.startswith("in_proj_weight"):
        return ("q", "k", "v") if shape[0] % 3 == 0 else ()
    is_recurrent = isinstance(owner, (nn.RNNBase, nn.RNNCellBase))
    if is_recurrent and leaf.startswith(("weight_ih", "weight_hh")):
        mode = getattr(owner, "mode", type(owner).__name__)
        gates = next((gates for name, gates in _GATES.items() if mode.startswith(name)), ())
        return gates if gates and shape[0] % len(gates) == 0 else ()
    return ()


def _groups(shape: tuple[int, ...], owner: Any) -> int:
    """Return how many matrices a convolution's weight is, bands of its first dimension."""
    groups = getattr(owner, "groups", 1)
    if not isinstance(groups, int) or groups < 1 or shape[0] % groups:
        return 1
    return 1 if 1 in (shape[0] // groups, shape[1]) else groups


def _is_bias(leaf: str, shape: tuple[int, ...], owner: nn.Module) -> bool:
    """Whether a 2-D parameter is a bias.

    It is of one row or column, or has a row for each expert of a stack beside it.
    """
    if leaf == "bias" and 1 in shape:
        return True
    beside = (_shape(param) for param in owner.parameters(recurse=False))
    return "bias" in leaf and any(len(other) == 3 and other[0] == shape[0] for other in beside)


def _experts(leaf: str, owner: Any) -> Kind:
    """Return the kind of a stack, with its parts where Hugging Face's experts say how these lie.

    Of those that say nothing (Llama 4, LongCat) it is seen beside the projection back.
    """
    is_gated = leaf == "gate_up_proj" and getattr(owner, "has_gate", False)
    if is_gated and getattr(owner, "is_concatenated", False):
        axis = 1 if getattr(owner, "is_transposed", False) else 0
        return _STACK._replace(parts=("gate", "up"), axis=axis)
    says = hasattr(owner, "has_gate") or hasattr(owner, "gate_up_proj_bias")  # GPT-OSS: in turn
    down = getattr(owner, "down_proj", None)
    if leaf == "gate_up_proj" and not says and isinstance(down, Tensor) and len(_shape(down)) == 3:
        (rows, cols), (first, last) = _shape(owner.gate_up_proj)[1:], _shape(down)[1:]
        for axis, inner in enumerate([(2 * last, first), (last, 2 * first)]):
            if (rows, cols) == inner:
                return _STACK._replace(parts=("gate", "up"), axis=axis)
    return _STACK


def _head_parameters(model: nn.Module) -> set[int]:
    """Return the ``id`` of the matrices of what a Hugging Face model calls output embeddings."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(param) for param in _matrices(head)} if isinstance(head, nn.Module) else set()


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    for name, param in module.named_parameters():
        is_known = not is_adapter_name(name) and not isinstance(param, UninitializedParameter)
        if is_known and len(_shape(param)) > 1:
            yield param
