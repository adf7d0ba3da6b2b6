"""σReparam and scaled residuals under FSDP2 and HSDP train as one process does, or say why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.collapse.model import GPT
from tests.processes import run_ranks
from tests.transformer.mesh_worker import CONFIG, PREPARED
from weyl_megatron.transformer.reparam import fold, sigma_reparam

WORKER = Path(__file__).parent / "mesh_worker.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mesh")
    for ranks in (1, 2, 4):
        run_ranks("torch", WORKER, ranks, str(folder))
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in (1, 2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", [*PREPARED, "late"])
def test_it_trains_as_one_process_does(
    case: str, ranks: int, trained: dict[int, dict[str, Any]]
) -> None:
    expected, state = trained[1][case], trained[ranks][case]
    assert state.keys() == expected.keys()
    assert ("sigmas" in state) == (case in ("reparam", "statistics"))
    for name, value in expected.items():
        # Sums in another order, in float32: 1e-6 at most.
        distance = float((state[name] - value).norm() / value.norm())
        assert distance < 1e-5, (name, distance)


def test_what_was_trained_in_pieces_folds_as_a_whole_model(
    trained: dict[int, dict[str, Any]],
) -> None:
    state = dict(trained[2]["reparam"])
    model = GPT(CONFIG)
    sigma_reparam(model, exclude=("head",))
    del state["losses"], state["sigmas"]
    model.load_state_dict(state)
    model.eval()
    tokens = torch.arange(8).unsqueeze(0)
    expected = model(tokens)
    assert len(fold(model)) == 12
    torch.testing.assert_close(model(tokens), expected)


def test_what_is_spread_already_is_refused_in_a_sentence(
    trained: dict[int, dict[str, Any]],
) -> None:
    refused = trained[2]["refused"]
    assert refused["fold"].startswith("fold: 'blocks.0.attn.q' is spread over ranks, it takes a")
    for case in ("reparam", "reparam between"):
        assert refused[case] == (
            "sigma_reparam: 'blocks.0.attn.q' is spread over ranks already, it takes a whole "
            "layer, or one that tensor parallelism cut along one dimension: convert after "
            "parallelize_module and before fully_shard."
        )
    for case in ("init", "learned"):
        assert refused[case].startswith(f"residual: mode got '{case}', but blocks.0's attention's")
        assert refused[case].endswith("it takes 'forward' then, or a scaling before.")
