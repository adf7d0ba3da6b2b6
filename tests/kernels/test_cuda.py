"""On a GPU: Triton's kernels compiled, against plain torch, and a step that never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests import net as nets
from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.kernels.choice import VARIABLE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def trained(
    kernel: str, monkeypatch: pytest.MonkeyPatch, *, watched: bool = False
) -> list[torch.Tensor]:
    monkeypatch.setenv(VARIABLE, kernel)
    net = nets.make_net(mixed=True).cuda()
    optimizer = AdamW2(net.named_parameters(), **nets.OPTIONS)
    for number, batch in enumerate(nets.batches(1).flatten(0, 2)[:12].cuda()):
        optimizer.zero_grad()
        net(batch).backward()
        torch.cuda.set_sync_debug_mode("error" if watched and number > 2 else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    return [p.detach() for p in net.parameters()]


def test_a_training_run_is_that_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with tolerances.every_iteration():  # so that no rounding decides on one
        weights, expected = trained("triton", monkeypatch), trained("torch", monkeypatch)
    for weight, twin in zip(weights, expected, strict=True):
        # Roundings, which twelve steps go on with.
        assert torch.allclose(weight, twin, rtol=0, atol=1e-5 * float(twin.abs().max()))


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, no_waiting: None) -> None:
    trained("triton", monkeypatch, watched=True)
