"""Which parameters are embeddings, positions or the head ("io"), for tau="balanced"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

#: Path components that name an embedding, a table of positions, a patch embedding or an output head.
_IO_NAME = re.compile(
    r"(^|\.)(w[tp]e|tok_emb|pos_emb|embed_(tokens|positions|in|out)|(word_|token_|pos(ition)?_|patch_)?"
    r"embed(ding)?s?|(word|token|position|patch)_embeddings|cls_token|lm_head|heads?|classifier|output_layer|"
    r"unembed(ding)?)(\.|$)"
)


def io_parameters(names: Iterable[str], module: nn.Module | None, patterns: Sequence[str] | None) -> set[str]:
    """Return the names of the parameters that are embeddings, positions or head.

    Told by ``patterns`` where given (an empty list: there are none). Otherwise embeddings are the ``nn.Embedding``
    modules of ``module`` and what is tied to them, the head is what a Hugging Face model calls its output embeddings,
    and both are what well-known names say.

    Raises:
        ValueError: nothing tells; or a pattern matches no name.
    """
    names = list(names)
    if patterns is not None:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"AdamW2: io got the pattern {pattern!r}, which matches no parameter's name.")
        return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    found = {name for name in names if _IO_NAME.search(name)}
    if module is not None:
        found |= _io_of_module(module) & set(names)
    if not found:
        raise ValueError(
            f"AdamW2: tau got 'balanced', but nothing tells which of the {len(names)} parameters are embeddings or "
            f"head; it takes model.named_parameters() in place of model.parameters(), or io=[patterns of their names] "
            f"([] where there are none)."
        )
    return found


def _io_of_module(module: nn.Module) -> set[str]:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    head = getattr(module, "get_output_embeddings", lambda: None)()
    tables |= {id(head.weight)} if head is not None else set()
    return {name for name, param in module.named_parameters(remove_duplicate=False) if id(param) in tables}
