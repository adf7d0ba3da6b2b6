"""What MkDocs calls while it builds the pages: docstrings are written for Sphinx's roles, too."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Return a page without ``:func:`` and its kin before code, and one colon before blocks."""
    html = re.sub(r":(?:attr|class|func|meth|mod):(?=<code>)", "", html)
    return html.replace("::</p>", ":</p>")
