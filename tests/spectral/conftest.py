"""What the tests of iterations share."""

from __future__ import annotations

import pytest

from weyl_megatron.spectral import power, ritz


@pytest.fixture(params=["host", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a device no value is looked at."""
    if request.param == "device":
        monkeypatch.setattr(ritz, "is_seen", lambda tensor: False)
        monkeypatch.setattr(power, "is_seen", lambda tensor: False)
    return str(request.param)
