from __future__ import annotations

import pytest

from tests.report.logs import Page, html_of, parsed, records, write_log


@pytest.fixture(scope="package")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two runs, with everything that a page can have."""
    out = tmp_path_factory.mktemp("runs")
    write_log(out / "a", records("AdamW, no warmup", True))
    write_log(out / "b", records("AdamW²", False))
    return html_of(out / "a", out / "b")


@pytest.fixture(scope="package")
def page(html: str) -> Page:
    return parsed(html)
