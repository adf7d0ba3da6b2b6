"""Which parameters are embeddings, positions or the head ("io"), for tau="balanced"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..layouts.adapters import is_adapter_name
from ..layouts.kinds import Kind
from ..layouts.modules import kinds_of

#: Path components that name an embedding, a table of positions, a patch embedding or an output
#: head.
_IO_NAME = re.compile(
    r"(^|\.)(w[tp]e|tok_emb|pos_emb|embed_(tokens|positions|in|out)"
    r"|(word_|token_|pos(ition)?_|patch_)?embed(ding)?s?|(word|token|position|patch)_embeddings"
    r"|cls_token|lm_head|heads?|classifier|output_layer|unembed(ding)?)(\.|$)"
)

#: What PEFT trains in full beside adapters: copies of modules, mostly heads, and rows of an
#: embedding.
_IN_FULL = re.compile(r"\.(modules_to_save|trainable_tokens_delta)\.")


def io_parameters(
    names: Iterable[str],
    model: nn.Module | Mapping[str, Kind] | None,
    patterns: Sequence[str] | None,
    option: str = "tau got 'balanced'",
    *,
    is_part: bool = False,
) -> set[str]:
    """Return the names of the parameters that are embeddings, positions or head.

    They are what ``patterns`` match where these are given (an empty list: there are none).
    Otherwise embeddings are the ``nn.Embedding`` modules of ``model`` and what is tied to them, the
    head is what a Hugging Face model calls its output embeddings, and both are what well-known
    names say.

    Args:
        names: of the parameters that are stepped.
        model: the model, or what :func:`kinds_of` says of all of its parameters; None: it is not
            seen.
        patterns: of names, ``fnmatch``.
        option: what wants to know, for the sentence.
        is_part: whether other ranks have other parameters, and perhaps all of those.

    Raises:
        ValueError: nothing tells; or a pattern matches no name. A model that keeps matrices frozen
            has embeddings and head among them, and where nothing but adapters is stepped, there are
            none.
    """
    names = list(names)
    if patterns is not None:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"AdamW2: io got the pattern {pattern!r}, which matches no parameter's name."
                )
        return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    kinds = kinds_of(model) if isinstance(model, nn.Module) else model or {}
    adapters = {name for name in {*names, *kinds} if _is_adapter(name, kinds.get(name))}
    io = {name for name in {*names, *kinds} - adapters if _is_io(name, kinds.get(name))}
    stepped = set(names)
    frozen = (kind for name, kind in kinds.items() if name not in stepped)
    is_partly_frozen = any(kind.form != "vector" for kind in frozen)
    are_adapters = (name in adapters or _is_vector(kinds.get(name)) for name in names)
    is_adapted = bool(names) and all(are_adapters)
    if not (io or is_partly_frozen or is_adapted or is_part):
        raise ValueError(
            f"AdamW2: {option}, but nothing tells which of the {len(names)} parameters "
            "are embeddings or head; it takes model.named_parameters() in place of "
            "model.parameters(), model=model, or io=[patterns of their names] ([] where there are "
            "none)."
        )
    return io & stepped


def is_io_name(name: str) -> bool:
    """Whether a well-known name says: an embedding, a table of positions or a head."""
    return _IO_NAME.search(name) is not None


def _is_io(name: str, kind: Kind | None) -> bool:
    """Whether its module, its name or PEFT, which trains it in full, says so of a parameter."""
    is_seen = kind is not None and kind.role in ("embedding", "head")
    return is_seen or is_io_name(name) or _IN_FULL.search(name) is not None


def _is_adapter(name: str, kind: Kind | None) -> bool:
    """Whether a parameter is part of an adapter.

    An adapter's matrices are hidden ones also where it changes the head.
    """
    return is_adapter_name(name) or (kind is not None and kind.role == "adapter")


def _is_vector(kind: Kind | None) -> bool:
    return kind is not None and kind.form == "vector"
