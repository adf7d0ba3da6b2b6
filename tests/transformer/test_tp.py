"""σReparam under torch's tensor parallelism trains as one process does, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from tests.transformer.tp_worker import CASES
from tests.watch.tp_models import MODELS
from weyl_megatron.transformer.reparam import fold, sigma_reparam

WORKER = Path(__file__).parent / "tp_worker.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tp")
    for ranks in (1, 2, 4):
        run_ranks("torch", WORKER, ranks, str(folder))
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_one_process_does(
    case: str, ranks: int, trained: dict[int, dict[str, Any]]
) -> None:
    expected, state = trained[1][case], dict(trained[ranks][case])
    assert bool(state.pop("goes on"))  # from a checkpoint, bit for bit
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        # Sums in another order, in float32: 1e-6 at most.
        distance = float((state[name] - value).norm() / value.norm())
        assert distance < 1e-5, (name, distance)


def test_what_was_trained_in_bands_folds_as_a_whole_model(
    trained: dict[int, dict[str, Any]],
) -> None:
    state = dict(trained[2]["usual"])
    model = MODELS["plain"]()
    sigma_reparam(model, exclude=("head",))
    for name in ("losses", "sigmas", "goes on"):
        del state[name]
    model.load_state_dict(state)
    model.eval()
    tokens = torch.arange(8).unsqueeze(0)
    expected = model(tokens)
    assert len(fold(model)) == 12
    torch.testing.assert_close(model(tokens), expected)


def test_the_wrong_order_is_refused_in_a_sentence(trained: dict[int, dict[str, Any]]) -> None:
    refused = trained[2]["refused"]
    assert refused["before"] == (
        "sigma_reparam: parallelize_module got a ParametrizedLinear that is converted already, it "
        "takes plain layers: convert after parallelize_module and before fully_shard."
    )
    assert refused["fold"].startswith("fold: 'blocks.0.attn.q' is spread over ranks, it takes a")
