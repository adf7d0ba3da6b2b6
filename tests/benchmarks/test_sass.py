"""Loops of a GPU's code, and what of them does not pass: on code that is written here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

import weyl_megatron
from benchmarks import compile_kernels, sass

SOURCE = """\
def products(unit):
    _unit(unit, 0)

def _unit(unit, SOURCE):
    _bands(unit, True)
    _bands(unit, False)
    _gram(unit)

def _bands(unit, WIDE):
    for begin in range(0, count, ROWS):
        for start in range(0, cols, COLS):
            a = load(start)
        for back in range(0, cols, COLS):
            b = load(back)

def _gram(unit):
    for line in range(0, count):
        c = load(line)
"""

#: Lines of the source: of a loop's body, its call of _bands, its call of _unit.
FORTH, BACK, NARROW = (12, 5, 2), (14, 5, 2), (12, 6, 2)
BAND, GRAM = (10, 5, 2), (18, 7, 2)

Line = str | tuple[str, Sequence[int]]


def listing(folder: Path, lines: Sequence[Line]) -> str:
    """Return what nvdisasm prints of labels and of (instruction, lines of the source)."""
    path = folder / "source.py"
    path.write_text(SOURCE)
    text = [".text.products:"]
    for at, line in enumerate(lines):
        if isinstance(line, str):
            text.append(f"{line}:")
            continue
        instruction, places = line
        inner = [*places]
        while inner:
            place = f'\t//## File "{path}", line {inner.pop(0)}'
            text.append(place + (f' inlined at "{path}", line {inner[0]}' if inner else ""))
        text.append(f"        /*{16 * at:04x}*/                   {instruction} ;")
    return "\n".join(text)


def loop(label: str, places: Sequence[int], *opcodes: str) -> list[Line]:
    """Return a loop of instructions."""
    body: list[Line] = [(f"{opcode} R2, R4", places) for opcode in opcodes]
    return [label, *body, (f"@!P0 BRA `({label})", places)]


def nested(forth: Sequence[str], back: Sequence[str]) -> list[Line]:
    """Return the bands of a kernel, with these instructions in their two loops."""
    return [
        ("S2R R0, SR_TID.X", (2,)),
        ".L_x_0",
        ("IADD3 R2, R2, 0x1, RZ", BAND),
        *loop(".L_x_1", FORTH, *forth),
        ("SHFL.BFLY PT, R3, R3, 0x10, 0x1f", BAND),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", BAND),
        *loop(".L_x_2", BACK, *back),
        ("@P1 BRA `(.L_x_0)", BAND),
        *loop(".L_x_3", GRAM, "LDG.E", "LDS.64", "BAR.SYNC", "FFMA"),
        ("EXIT", (2,)),
        ".L_x_4",
        ("BRA `(.L_x_4)", ()),
    ]


MOVER = compile_kernels.Mover(
    columns=r"> _bands: for (start|back) in ",
    aligned=r"> _unit: _bands\([^>]*\bTrue\b[^>]*> _bands: for (start|back) in ",
    loops=2,
    elements=4,
)
WIDE = ["LDG.E.128", "LDG.E.128.CONSTANT", "FFMA", "FFMA"]


def test_loops_are_known_by_their_statements_and_the_calls_that_lead_there(
    tmp_path: Path,
) -> None:
    code = sass.parse(listing(tmp_path, nested(WIDE, [*WIDE, "STG.E.128"])))
    outer, forth, back, gram = code.loops  # what waits behind the end is none
    assert outer.parent is None and gram.parent is None
    assert (forth.parent, back.parent) == (0, 0)
    assert outer.source[-1] == ("_bands", "for begin in range(0, count, ROWS):")
    assert forth.source == (
        ("products", "_unit(unit, 0)"),
        ("_unit", "_bands(unit, True)"),
        ("_bands", "for start in range(0, cols, COLS):"),
    )
    assert back.source[-1].text == "for back in range(0, cols, COLS):"
    assert gram.source[-1] == ("_gram", "for line in range(0, count):")
    assert forth.counts() == {"LDG.128": 2, "FFMA": 2, "BRA": 1}
    # Of the bands themselves without what lies within.
    assert outer.counts() == {"IADD3": 1, "SHFL": 1, "BAR": 1, "BRA": 1}
    assert [each.kind for each in code.outside] == ["S2R", "EXIT", "BRA"]


def test_lines_are_read_where_the_package_is_imported_from(tmp_path: Path) -> None:
    """Triton's cache has the paths of the checkout that compiled first, which may have changed."""
    within = Path("weyl_megatron") / "kernels" / "triton_step" / "adamw.py"
    elsewhere = tmp_path / within
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text("def other():\n    pass\n" * 100)
    here = Path(weyl_megatron.__file__).parent.parent / within
    lines = here.read_text().splitlines()
    line = next(at for at, text in enumerate(lines, 1) if text.startswith("def direction("))
    assert sass.source_of(((str(elsewhere), line),))[0].function == "direction"


def test_two_branches_back_to_one_place_are_one_loop(tmp_path: Path) -> None:
    lines: list[Line] = [
        ".L_x_0",
        ("LDG.E.64 R2, [R4]", FORTH),
        ("@P0 BRA `(.L_x_0)", FORTH),
        ("STG.E.U16 [R4], R2", FORTH),
        ("@P1 BRA `(.L_x_0)", FORTH),
        ("EXIT", (2,)),
    ]
    (only,) = sass.parse(listing(tmp_path, lines)).loops
    assert only.counts() == {"LDG.64": 1, "STG.16": 1, "BRA": 2}


def test_a_cubin_without_code_is_said() -> None:
    with pytest.raises(ValueError, match="got a cubin that it takes no instruction from"):
        sass.parse("no code")


def test_bands_may_exchange_and_the_small_loop_behind_them_too(tmp_path: Path) -> None:
    code = sass.parse(listing(tmp_path, nested(WIDE, [*WIDE, "STG.E.128"])))
    assert compile_kernels.loop_faults(MOVER, code, 32, 32) == []


@pytest.mark.parametrize(
    ("of_state", "of_grad", "forth", "fault"),
    [
        (32, 32, ["BAR.SYNC.DEFER_BLOCKING"], "BAR.SYNC.DEFER_BLOCKING in 'for start"),
        (32, 32, ["SHFL.BFLY"], "SHFL.BFLY in 'for start"),
        (32, 32, ["LDS.128"], "LDS.128 in 'for start"),
        (32, 32, ["LDG.E"], "LDG.E in 'for start"),
        (32, 32, ["STG.E.64"], "STG.E.64 in 'for start"),
        (32, 32, ["LDG.E.64"], "LDG.E.64 in 'for start"),
        # A third of the loads are gradients at most, which half as many bytes are.
        (32, 16, ["LDG.E.64"], None),
        (32, 16, ["LDG.E.64", "LDG.E.64"], "LDG.E.64 in 'for start"),
        (32, 16, ["LDG.E"], "LDG.E in 'for start"),
        (32, 16, ["STG.E.64"], "STG.E.64 in 'for start"),
        (16, 16, ["LDG.E.64", "STG.E.64"], None),
        (16, 16, ["LDG.E"], "LDG.E in 'for start"),
    ],
)
def test_a_loop_over_columns_that_exchanges_or_moves_few_bits_does_not_pass(
    of_state: int, of_grad: int, forth: list[str], fault: str | None, tmp_path: Path
) -> None:
    code = sass.parse(listing(tmp_path, nested([*WIDE, *forth], WIDE)))
    faults = compile_kernels.loop_faults(MOVER, code, of_state, of_grad)
    assert len(faults) == (fault is not None)
    assert fault is None or faults[0].startswith(fault)


def test_a_loop_over_columns_that_are_not_aligned_may_move_few_bits_and_not_exchange(
    tmp_path: Path,
) -> None:
    lines = nested(WIDE, WIDE)
    more = loop(".L_x_9", NARROW, "LDG.E", "FFMA")
    assert (
        compile_kernels.loop_faults(MOVER, sass.parse(listing(tmp_path, lines + more)), 32, 32)
        == []
    )
    more = loop(".L_x_9", NARROW, "LDG.E", "SHFL.IDX")
    code = sass.parse(listing(tmp_path, lines + more))
    assert compile_kernels.loop_faults(MOVER, code, 32, 32) == [
        "SHFL.IDX in 'for start in range(0, cols, COLS):'"
    ]


def test_what_is_in_a_cache_may_be_read_by_few_bits(tmp_path: Path) -> None:
    code = sass.parse(listing(tmp_path, nested([*WIDE, "LDG.E"], WIDE)))
    assert compile_kernels.loop_faults(MOVER, code, 32, 32) != []
    read = MOVER._replace(cached="> _bands: a = load")
    assert compile_kernels.loop_faults(read, code, 32, 32) == []


def test_a_kernel_whose_aligned_loops_are_gone_does_not_pass(tmp_path: Path) -> None:
    code = sass.parse(listing(tmp_path, loop(".L_x_0", NARROW, "LDG.E", "FFMA")))
    assert compile_kernels.loop_faults(MOVER, code, 32, 32) == [
        "0 loops over aligned columns, not 2"
    ]
