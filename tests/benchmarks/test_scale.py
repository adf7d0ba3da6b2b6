from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import cut_rows, fake_rank, main, pieces_of, rows_of
from benchmarks.scale_count import CLIPS, STATES
from benchmarks.scale_models import MODELS, Model, Spread, Weight
from tests.benchmarks.scale_worker import MODEL, SPREADS
from tests.processes import torchrun
from weyl_megatron.settings import PROJECT, SCALE


def counts(model: Model, spread: Spread, clip: str = SCALE) -> dict[str, dict[str, Any]]:
    rows = rows_of("model", model, spread)
    return {row["state"]: row[PROJECT] if clip == PROJECT else row for row in rows}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank of every spread counted on real processes."""
    folder = tmp_path_factory.mktemp("scale")
    torchrun(Path(__file__).parent / "scale_worker.py", 4, str(folder))
    return [json.loads(path.read_text()) for path in folder.iterdir()]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("number", range(len(SPREADS)), ids=map(str, SPREADS))
def test_stand_ins_count_what_real_processes_count(
    real: list[dict[str, Any]], number: int, clip: str
) -> None:
    ranks = [rank for rank in real if rank["spread"] == number]
    assert len(ranks) == SPREADS[number].tp * SPREADS[number].pp * SPREADS[number].dp
    planned = counts(MODEL, SPREADS[number], clip)
    for state in ("certified", "measured"):
        counted = (rank[f"{clip} {state}"] for rank in ranks)
        most = [max(column) for column in zip(*counted, strict=True)]
        assert [planned[state][key] for key in ("collectives", "bytes", "vectors")] == most


@pytest.mark.parametrize("number", range(len(SPREADS)), ids=map(str, SPREADS))
def test_the_union_of_all_ranks_is_what_ranks_tell_each_other(
    real: list[dict[str, Any]], number: int
) -> None:
    spread = SPREADS[number]
    first = MODEL.stage(0, spread.pp)
    with fake_rank(spread, 0) as groups:
        cut = cut_rows(first, spread, pieces_of(first, spread), groups)
    planned = [rows.tolist() for weight in first for rows in cut[weight.name]]
    of_ranks = [rank["cut"] for rank in real if rank["spread"] == number and rank["stage"] == 0]
    assert all(rows == planned for rows in of_ranks)
    assert any(planned) or spread == Spread(dp=2, zero="3")  # which happens to cut between rows


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(
    "spread", [Spread(dp=8), Spread(tp=2, dp=4, zero="3"), Spread(tp=2, zero="ddp")]
)
def test_collectives_do_not_depend_on_the_number_of_layers(spread: Spread, clip: str) -> None:
    few, many = (counts(MODEL._replace(layers=layers), spread, clip) for layers in (2, 10))
    for state in STATES:
        assert few[state]["collectives"] == many[state]["collectives"] > 0
        assert 3 < many[state]["bytes"] / few[state]["bytes"] < 5  # but for embeddings


def test_a_certified_step_is_one_collective_of_a_few_bytes_per_group() -> None:
    matrices = 2 + 2 * 6  # two embeddings; q, k, v, proj, fc1 and fc2
    spreads = [
        Spread(),
        Spread(dp=1000),
        Spread(tp=2, zero="ddp"),
        Spread(tp=2, dp=500),
        Spread(tp=2, pp=2, dp=250),
    ]
    for spread, groups in zip(spreads, (0, 1, 1, 2, 3), strict=True):
        certified = counts(MODEL, spread)["certified"]
        assert certified["collectives"] == groups
        if spread.pp == 1:
            assert certified["bytes"] == groups * matrices * 16


def test_bytes_by_hand() -> None:
    """A (4, 5) and B (5, 8) on two ranks of 30 elements: B is cut at its 10th, in row 1.

    Blocks are 4 wide.
    """
    matrices = Weight("a", (4, 5), is_hidden=True), Weight("b", (5, 8), is_hidden=True)
    found = counts(Model(matrices, (), 0, ()), Spread(dp=2))
    piggybacks, left = 2 * 4, 4 * 4  # a number per matrix; the cut row's
    z = 4 * (4 * 5 + 16 + 4 * 8 + 16)
    once, twice = piggybacks + 2 * left + 2 * z, left + z  # of W and U, then of U alone
    assert (found["certified"]["collectives"], found["certified"]["bytes"]) == (1, 2 * 16)
    assert (found["measured"]["collectives"], found["measured"]["bytes"]) == (4, once + twice)
    kept = x = 2 * 4 * (4 * 5 + 4 * 8)  # so few are kept in float32
    assert found["measured"]["vectors"] == kept + x + 2 * z + 2 * left + piggybacks
    assert {(row["muon_holders"], row["muon_owners"]) for row in found.values()} == {
        (4 * 5 * 8, 4 * 5 * 8)
    }


@pytest.mark.parametrize("spread", SPREADS, ids=map(str, SPREADS))
def test_projection_sends_as_many_collectives_of_wider_blocks(spread: Spread) -> None:
    scaled, projected = (counts(MODEL, spread, clip) for clip in CLIPS)
    for state in STATES:
        assert projected[state]["collectives"] == scaled[state]["collectives"]
        assert projected[state]["vectors"] > scaled[state]["vectors"]
        if state == "certified":
            assert projected[state]["bytes"] == scaled[state]["bytes"]
        else:  # of W four vectors, of U eight in place of four
            assert 1 < projected[state]["bytes"] / scaled[state]["bytes"] < 2


def test_what_projection_sends_and_keeps_by_hand() -> None:
    """As above, with 8 vectors of U: A (4, 5) has 4 at most, and B (5, 8) has 5."""
    matrices = Weight("a", (4, 5), is_hidden=True), Weight("b", (5, 8), is_hidden=True)
    projected = counts(Model(matrices, (), 0, ()), Spread(dp=2), PROJECT)["measured"]
    piggybacks, left = 2 * 4, (4 * 4, 4 * 5)
    z = 4 * (4 * 5 + 16 + 4 * 8 + 16), 4 * (4 * 5 + 16 + 5 * 8 + 25)
    twice = left[1] + z[1]  # of U alone
    assert projected["collectives"] == 4
    assert projected["bytes"] == piggybacks + sum(left) + sum(z) + twice
    kept = x = 4 * (4 * 5 + 4 * 8) + 4 * (4 * 5 + 5 * 8)
    seen = 4 * (4 * 5 + 5 * 8) + z[1] + left[1]
    assert projected["vectors"] == kept + x + sum(z) + sum(left) + piggybacks + seen
    assert projected["share"] == projected["vectors"] / (4 * (4 * 5 + 5 * 8))


def test_the_vectors_of_a_process_alone_are_less_than_a_percent_of_the_parameters() -> None:
    rows = {row["state"]: row for row in rows_of("gpt2-124m", MODELS["gpt2-124m"], Spread())}
    assert 0 < rows["measured"]["share"] < rows["measured"][PROJECT]["share"] < 0.01
    assert rows["measured"][PROJECT]["collectives"] == 0


def test_more_ranks_cut_more_rows_and_change_nothing_else() -> None:
    sent = [
        counts(MODEL, Spread(dp=dp, zero="3"))["measured"]["bytes"] for dp in (2, 16, 128, 1024)
    ]
    assert sent == sorted(sent) and sent[0] < sent[-1] < 3 * sent[0]
    every_row_is_cut = counts(MODEL, Spread(dp=4096, zero="3"))["measured"]["bytes"]
    assert sent[-1] == every_row_is_cut


def test_the_command_prints_a_table_and_writes_the_same_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    command = ["scale.py", "--model", "gpt2-124m", "--dp", "2048", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    heading, rule, *lines = capsys.readouterr().out.splitlines()[-5:]
    assert heading.split()[0] == "model" and set(rule) == {"─"}
    rows = json.loads(path.read_text())
    assert len(lines) == len(rows) == len(STATES)
    assert len({len(line) for line in (heading, rule, *lines)}) == 1
    for line, row in zip(lines, rows, strict=True):
        assert row["state"] in line and f" {row['ranks']} " in line and row["ranks"] == 2048


@pytest.mark.parametrize(
    "asked",
    [["--model", "gpt2-124m", "--tp", "5"], ["--model", "gpt2-124m", "--pp", "5"], ["--dp", "2"]],
)
def test_what_cannot_be_spread_is_said(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["scale.py", *asked])
    with pytest.raises(SystemExit):
        main()
    assert "take" in capsys.readouterr().err.splitlines()[-1]
