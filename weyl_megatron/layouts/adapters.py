"""Which parameters are a low-rank adapter's.

They are small, trained beside frozen weights, and in part 0 at the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]

#: The two factors of an adapter's product, as parts of their names: PEFT's methods, loralib,
#: torchtune, diffusers, kohya and LyCORIS, NeMo.
_FACTORS = (
    ("lora_A", "lora_B"),
    ("lora_a", "lora_b"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
    ("adapter.linear_in", "adapter.linear_out"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("hira_A", "hira_B"),
    ("delora_A", "delora_B"),
    ("gralora_A", "gralora_B"),
    ("adamss_A", "adamss_B"),
    ("poly_lora_A", "poly_lora_B"),
)
_PARTNERS = {**dict(_FACTORS), **{second: first for first, second in _FACTORS}}
_FACTOR = re.compile(rf"(?<![^._])({'|'.join(map(re.escape, _PARTNERS))})(?=\.|$)")

#: Matrices of adapters that are no factor of two.
_ALONE = re.compile(r"(^|\.)(lokr_w[12]|hra_u|miss_block|bone_block|vblora_vector_bank)(\.|$)")

#: What adapters scale and rotate by, whatever its shape, none of it a linear map: DoRA's lengths,
#: VeRA's and IA³'s scales, AdaLoRA's singular values, the generators of OFT's and BOFT's rotations,
#: kernels, logits and routers.
_NO_MATRIX = re.compile(
    r"(^|\.)(lora_magnitude_vector|vera_lambda_[bd]|ia3_l|lora_E|boft_[Rs]|oft_(embedding_)?R"
    r"|psoft_R|c3a_kernel|randlora_(lambda|gamma)|vblora_logits_[AB]|\w+_router)(\.|$)"
)

#: What PEFT lists beside adapters: copies of modules, and rows of an embedding.
_NO_ADAPTERS = ("modules_to_save", "trainable_tokens_delta", "token_adapter.trainable_tokens_delta")

#: How many times thinner than both outer sides a factor is, at least, where shapes alone decide:
#: A (r, in) before B (out, r).
_THIN = 4

#: The same of B before A. An MLP lists its own two in that order, up to 8 times thinner.
_THIN_TURNED = 9


def adapter_partner(name: str) -> str | None:
    """Return the name of the other factor of an adapter's product; None where there is none."""
    factor = _FACTOR.search(name)
    if factor is None:
        return None
    return name[: factor.start()] + _PARTNERS[factor[1]] + name[factor.end() :]


def is_adapter_name(name: str) -> bool:
    """Whether a library's name says that a parameter is an adapter's."""
    return any(pattern.search(name) for pattern in (_FACTOR, _ALONE, _NO_MATRIX))


def is_no_matrix(name: str) -> bool:
    """Whether a library's name says that an adapter scales or rotates by a parameter.

    Its shape says nothing then.
    """
    return _NO_MATRIX.search(name) is not None


def peft_parameters(model: nn.Module) -> set[str]:
    """Return the names of what PEFT's layers list as their own, of any of its methods."""
    names: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        listed = getattr(module, "adapter_layer_names", ())
        for attribute in listed if isinstance(listed, (tuple, list)) else ():
            held = None if attribute in _NO_ADAPTERS else getattr(module, attribute, None)
            prefix = f"{path}.{attribute}" if path else attribute
            if isinstance(held, nn.Parameter):
                names.add(prefix)
            elif isinstance(held, nn.Module):
                names |= {f"{prefix}.{name}" for name, _ in held.named_parameters()}
    return names


def low_rank_pairs(
    trained: Shapes, known: Iterable[str] = (), *, is_partly_frozen: bool = False
) -> dict[str, str]:
    """Return factors that no name gives away, each with its partner, by shape: a home-made LoRA.

    A pair are two matrices that one owner lists one after the other, A (r, in) and B (out, r), with
    an r that is small beside both other sides. In a model that trains other matrices, too, and
    keeps none frozen, that is a bottleneck.

    Args:
        trained: the shapes of what is trained, by name, in order.
        known: names of what is an adapter, an embedding or a head anyway.
        is_partly_frozen: whether the model keeps matrices that are not trained.
    """
    known = set(known)
    matrices = [(n, s) for n, s in trained.items() if len(s) == 2 and min(s) > 0 and n not in known]
    partners: dict[str, str] = {}
    for (first, a), (second, b) in pairwise(matrices):
        if first not in partners and _owner(first) == _owner(second) and _is_low_rank(a, b):
            partners |= {first: second, second: first}
    if is_partly_frozen or len(partners) == len(matrices):
        return partners
    return {}


def _owner(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def _is_low_rank(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    if a[0] == b[1] and _THIN * a[0] <= min(a[1], b[0]):
        return True
    return a[1] == b[0] and _THIN_TURNED * a[1] <= min(a[0], b[1])
