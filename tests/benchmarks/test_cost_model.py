"""The cost model: its arithmetic on launches and GPUs that are made up here, its check, and that
the page shows its table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import sass
from benchmarks.cost_model import __main__ as command
from benchmarks.cost_model import adamw, estimate, muon, table
from benchmarks.cost_model.bounds import Launch, Work, makespan, time_of
from benchmarks.cost_model.code import Kernel, Usage, constant, executed, waits_for_loads
from benchmarks.cost_model.gpus import GPUS, LOWER, UPPER, Gpu
from weyl_megatron.kernels.triton_step import orthonormalize

ROOT = Path(__file__).parents[2]

#: A clock of 1 GHz and round numbers.
GPU = Gpu(
    "made up",
    90,
    sms=10,
    boost=1e9,
    sustained=1e9,
    dram=1e12,
    l2_per_clock=4000,
    l1=1 << 10,
    fma=4,
    alu=2,
    mufu=0.5,
    fp64=2,
    tensor=1e14,
)


def launch(work: Work, count: int = 40) -> Launch:
    return Launch("made up", 2, 4, [(count, work)], False)


def test_twice_the_bytes_take_twice_the_time_of_dram() -> None:
    times = [time_of(launch(Work(Usage(), stream=each)), GPU, LOWER) for each in (1e6, 2e6)]
    assert [time.binds for time in times] == ["dram", "dram"]
    # 40 programs, 1 TB/s
    assert [time.seconds for time in times] == pytest.approx([40e-6, 80e-6])


def test_the_slowest_pipe_binds_what_moves_nothing() -> None:
    # 10 SMs, of 4, 4 and 0.5 instructions a clock; two warps a program.
    even = Usage(issue=3000, fma=1000, mufu=100)
    time = time_of(launch(Work(even)), GPU, LOWER)
    assert (time.binds, time.seconds) == ("issue", pytest.approx(40 * 2 * 3000 / 40e9))
    time = time_of(launch(Work(even._replace(mufu=1000))), GPU, LOWER)
    assert (time.binds, time.seconds) == ("mufu", pytest.approx(40 * 2 * 1000 / 5e9))


def test_a_program_that_is_alone_takes_a_clock_for_each_of_its_instructions() -> None:
    time = time_of(launch(Work(Usage(issue=1e4)), count=1), GPU, LOWER)
    assert (time.binds, time.seconds) == ("waits", pytest.approx(1e-5))


def test_vectors_cross_l2_as_far_as_l1_does_not_hold_them() -> None:
    for held, share in ((GPU.l1 // 2, 0.0), (2 * GPU.l1, 0.5), (8 * GPU.l1, 7 / 8)):
        work = Work(Usage(), x=1e6, x_held=held)
        taken = time_of(launch(work), GPU, LOWER).seconds
        assert taken == pytest.approx(40 * 1e6 * share / (GPU.l2_per_clock * GPU.boost))


def test_the_upper_bound_waits_for_loads_and_is_never_below_the_lower() -> None:
    warp = Usage(issue=1e3, apart=2e3, dependent=5e3, l2_waits=2, dram_waits=3)
    time = time_of(launch(Work(warp), count=41), GPU, UPPER)
    # One more program than run at once: two in turn, of 2000 + 2 · 400 + 3 · 800 clocks.
    assert time.binds == "waits" and time.seconds >= 2 * 5200e-9
    works = [
        Work(warp),
        Work(warp, stream=1e6),
        Work(warp, stream=1e3, x=1e6, x_held=100),
        Work(warp, stream=1e3, x=1e6, x_held=1e6),
        Work(warp, handed=1e6),
    ]
    for work in works:
        for count in (1, 40, 1000):
            each = launch(work, count)
            assert time_of(each, GPU, LOWER).seconds <= time_of(each, GPU, UPPER).seconds


def test_programs_begin_where_others_have_ended() -> None:
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([1, 1, 1, 3], 2) == 4
    assert makespan([], 2) == 0


def body(*instructions: str, places: tuple[tuple[str, int], ...] = ()) -> Any:
    split = (each.split(None, 1) for each in instructions)
    return tuple(sass.Instruction(opcode, operands, places) for opcode, operands in split)


def test_loads_that_are_on_their_way_together_are_waited_for_once() -> None:
    loads = "LDG.E.128 R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]"
    assert waits_for_loads(body(*loads, "FADD R0, R1, R12", "FADD R0, R7, R0")) == 1
    assert waits_for_loads(body(loads[0], "FADD R0, R4, R0", loads[1], "FADD R0, R11, R0")) == 2
    # An address that was loaded.
    assert waits_for_loads(body("LDG.E.64 R4, [R2.64]", "LDG.E R6, [R4.64]", "EXIT R6")) == 2
    assert waits_for_loads(body("FADD R0, R1, R2")) == 0


def made(head: str) -> Kernel:
    """A kernel of a loop of three instructions, and in it one of two, that has this head."""
    outer = sass.Loop(1, 6, body("FADD R0, R0, R0") * 3, None, (_at("for row in range(0, 4):"),))
    inner = sass.Loop(2, 4, body("MUFU.RCP R0, R0", "LDG.E R1, [R2]"), 0, (_at(head),))
    return Kernel("made", {"COLS": 256}, sass.Code(body("EXIT R0"), (outer, inner)), 2, 4)


def _at(text: str) -> sass.Statement:
    return sass.Statement("f", text)


def test_a_loop_s_instructions_count_as_often_as_its_statement_says() -> None:
    kernel = made("for start in range(0, cols, COLS):")
    usage = executed(kernel, {"cols": 600}, without="(?!)", from_dram="start in")
    assert (usage.issue, usage.fma, usage.mufu) == (1 + 4 * 3 + 4 * 3 * 2, 12, 12)
    assert (usage.dram_waits, usage.l2_waits) == (12, 0)
    left_out = executed(kernel, {"cols": 600}, without="start in")
    assert left_out.issue == 1 + 4 * 3
    of_row = made("for start in range(0, tl.load(unit + 1)):")
    assert executed(of_row, {"row": (7, 2)}, without="(?!)").mufu == 8


def test_what_is_not_executed_and_is_nowhere_is_said() -> None:
    with pytest.raises(ValueError, match="made got 'stop in' for what is not executed"):
        executed(made("for start in range(0, cols, COLS):"), {"cols": 600}, without="stop in")


def test_a_loop_that_the_model_does_not_know_is_said() -> None:
    with pytest.raises(ValueError, match=r"made got a loop .for start in range.* no trips"):
        executed(made("for start in range(0, rest):"), {}, without="(?!)")


@pytest.mark.parametrize("block", [4, 8, 16])
def test_a_constant_is_read_where_the_kernel_has_it(block: int) -> None:
    at_once = constant(orthonormalize._gram_of_rows, "AT_ONCE", BLOCK=block)
    # As many products at once as a program has registers for.
    assert block * block * at_once in (1024, 4096)
    with pytest.raises(ValueError, match="_gram_of_rows got 'TWICE' for a constant"):
        constant(orthonormalize._gram_of_rows, "TWICE", BLOCK=block)


KEPT: dict[str, Any] = {
    "triton": "3.8.0",
    "bounds": {"h200 gpt2-124m 4": {"inactive": [1.0, 2.0], "clipped": [2.0, 3.0]}},
}


def grown(key: str, at: int, factor: float) -> dict[str, Any]:
    now = json.loads(json.dumps(KEPT))
    now["bounds"]["h200 gpt2-124m 4"][key][at] *= factor
    return now


def test_a_bound_that_grows_by_more_than_5_percent_fails_and_any_other_passes() -> None:
    assert table.check(KEPT, KEPT) == []
    assert table.check(KEPT, grown("clipped", 1, 1.049)) == []
    assert table.check(KEPT, grown("clipped", 0, 0.5)) == []
    (fault,) = table.check(KEPT, grown("clipped", 1, 1.06))
    assert fault == "h200 gpt2-124m 4: clipped: the upper bound grew from 3.000 to 3.180 ms"
    (fault,) = table.check(KEPT, grown("inactive", 0, 2.0))
    assert "inactive: the lower bound grew" in fault


def test_what_nothing_is_kept_of_fails_and_another_triton_s_bounds_are_not_compared() -> None:
    now = grown("inactive", 0, 1.0)
    now["bounds"]["a100 gpt2-124m 4"] = {"inactive": [1.0, 2.0]}
    assert table.check(KEPT, now) == ["a100 gpt2-124m 4: inactive: nothing is kept of it"]
    now = {**grown("inactive", 0, 9.0), "triton": "3.9.0"}
    (said,) = table.check(KEPT, now)
    assert said.startswith("skipped: the bounds were kept with Triton 3.8.0, this is 3.9.0")


def test_fused_adamw_takes_its_bytes_at_a_copy_s_rate_and_its_gaps() -> None:
    # 124.4 M parameters, 28 bytes each, 4.3 TB/s; 148 tensors in launches of 36, two that count,
    # and more launches where chunks, of 65536 elements, are more than 320 in each.
    milliseconds = adamw("gpt2-124m", "h200")
    assert milliseconds == pytest.approx(124.44e6 * 28 / 4.3e9, rel=0.03)
    assert adamw("gpt2-124m", "h200", UPPER) > milliseconds


def test_muon_s_newton_schulz_is_counted_on_hidden_matrices_alone() -> None:
    lower, upper = muon("gpt2-124m", "a100")
    # 12 blocks of c_attn, proj, fc1 and fc2 at width 768: 4 m² n + 2 m³, five times.
    m = 768
    operations = 12 * 5 * (4 * m * m * (3 + 1 + 4 + 4) * m + 4 * 2 * m**3)
    assert lower > operations / (0.8 * GPUS["a100"].tensor) * 1e3
    assert lower < upper < 4 * lower


def test_an_unknown_model_or_gpu_is_named_with_what_is_taken() -> None:
    with pytest.raises(ValueError, match="model got 'bert', it takes gpt2-124m"):
        estimate("bert", "h200")
    with pytest.raises(ValueError, match="gpu got 'v100', it takes a100"):
        estimate("gpt2-124m", "v100")


def test_the_page_s_table_is_made_of_the_bounds_that_are_kept() -> None:
    kept = json.loads((ROOT / "benchmarks" / "cost_model.json").read_text())["bounds"]
    page = (ROOT / "docs" / "cost.md").read_text()
    shown = page.split(table.BEGIN)[1].split(table.END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in shown.splitlines()
        if line.startswith("| ") and " to " in line
    ]
    compared: set[tuple[str, ...]] = set()
    for gpu, model, width, state, milliseconds, *_ in rows:
        bounds = kept.get(f"{gpu.lower()} {model} {width}", {}).get(state)
        if bounds is not None:
            # Both are rounded, one of them to hundredths.
            shown_bounds = list(map(float, milliseconds.split(" to ")))
            assert shown_bounds == pytest.approx(bounds, abs=0.006)
            compared.add((gpu, width))
    assert compared == {(gpu, width) for gpu in ("H200", "A100") for width in ("4", "8", "16")}
    assert "not measured" in page.split(table.BEGIN)[0].split("## ")[-1]


@pytest.mark.slow
def test_a_step_s_bounds_are_in_order_and_grow_with_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiles the kernels, or finds them in Triton's cache."""
    of_model = estimate("gpt2-124m", "h200")
    assert all(0 < lower <= upper for lower, upper in of_model.values())
    # One step's bytes at least: 28 a parameter.
    assert of_model["inactive"][0] > 124e6 * 28 / 4.3e9
    for less, more in (
        ("inactive", "inactive, the host is not sure"),
        ("inactive, the host is not sure", "clipped"),
        ("clipped", "clipped, all iterated twice"),
    ):
        assert of_model[less][0] < of_model[more][0] and of_model[less][1] < of_model[more][1]
    kept = tmp_path / "kept.json"
    options = ["cost_model", "--models", "gpt2-124m"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*options, "--json", str(kept), "--markdown", "page.md"])
    command.main()
    assert "| H200 | gpt2-124m | 4 | clipped |" in Path("page.md").read_text()
    monkeypatch.setattr(sys, "argv", [*options, "--check", str(kept)])
    with pytest.raises(SystemExit) as status:
        command.main()
    assert status.value.code == 0
    before = json.loads(kept.read_text())
    before["bounds"]["h200 gpt2-124m 4"]["clipped"][1] /= 1.1
    kept.write_text(json.dumps(before))
    with pytest.raises(SystemExit) as status:
        command.main()
    assert status.value.code == 1
    assert "clipped: the upper bound grew" in capsys.readouterr().out
