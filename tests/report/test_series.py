"""Numbers of a run that is too long to keep: bounded, and no extreme is lost."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import pytest

from tests.report.logs import attention_map, start, step, write_log
from weyl_megatron.report.groups import Group
from weyl_megatron.report.runs import read_run
from weyl_megatron.report.series import BUCKETS, Builder, Table

Logged = list[tuple[int, dict[str, float | None]]]


def logged(count: int, seed: int = 0) -> Logged:
    """Measurements of two heads: one with gaps, the other's series begins late and is rare."""
    rng = random.Random(seed)
    log: Logged = []
    for at in range(1, count + 1):
        values: dict[str, float | None] = {"a": rng.gauss(0, 1), "m/mode": float(rng.randrange(2))}
        if at % 97 == 0:
            values["a"] = None
        if at > count // 3 and at % 5 == 0:
            values["b"] = rng.gauss(3, 1)
        log.append((10 * at, values))
    return log


def table(log: Logged) -> Table:
    builder = Builder(lambda place: log[place][1])
    for place, (at, values) in enumerate(log):
        builder.add(at, values, place)
    return builder.table()


def series(log: Logged, tag: str) -> list[tuple[int, float | None]]:
    return [(at, values[tag]) for at, values in log if tag in values]


@pytest.mark.parametrize("count", [1, 2, BUCKETS])
def test_what_fits_is_kept_as_it_is(count: int) -> None:
    log = logged(count)
    kept = table(log)
    assert kept.length == 1 and kept.middles == [at for at, _ in log]
    for tag in kept.rows:
        assert kept.points(tag) == series(log, tag), tag


@pytest.mark.parametrize("count", [BUCKETS + 1, 1000, 4567])
def test_ends_extremes_gaps_and_means_are_those_of_all_numbers(count: int) -> None:
    log = logged(count)
    log[count // 2][1]["a"], log[count // 2 + 1][1]["a"] = 50.0, -50.0
    kept = table(log)
    assert BUCKETS / 2 <= len(kept.middles) <= BUCKETS
    assert kept.length * len(kept.middles) < count + kept.length
    for tag in kept.rows:
        every, points = series(log, tag), kept.points(tag)
        # Of each bucket the lowest, the highest and a gap, and of the whole the first and the last.
        assert set(points) <= set(every) and len(points) <= 3 * BUCKETS + 2
        assert points == sorted(points, key=lambda point: point[0])
        assert (points[0], points[-1], kept.last(tag)) == (every[0], every[-1], every[-1])
        numbers = {value: at for at, value in every if value is not None}
        group = Group(kept, {tag: tag})
        for peak, value in ((group.least(), min(numbers)), (group.largest(), max(numbers))):
            assert peak is not None and peak.value == value
            assert (peak.step, value) in points or tag == "m/mode"  # modes are often the same
        finite = [value for _, value in every if value is not None]
        assert group.mean() == pytest.approx(sum(finite) / len(finite), rel=1e-12)
        # A bucket is some measurements that follow each other.
        bands, at = group.bands(), 0
        for number in range(0, count, kept.length):
            inside = [value[tag] for _, value in log[number : number + kept.length] if tag in value]
            if inside:
                known = [value for value in inside if value is not None]
                steps = {at for at, _ in log[number : number + kept.length]}
                gaps = [point for point in points if point[1] is None and point[0] in steps]
                assert bool(gaps) == (None in inside)
                middle, band = bands[at]
                at += 1
                assert log[number][0] <= middle <= log[min(number + kept.length, count) - 1][0]
                assert (band is None) == (not known)
                if band is not None:
                    assert (band.low, band.high) == (min(known), max(known))
                    assert band.mean == pytest.approx(sum(known) / len(known), rel=1e-9, abs=1e-12)
        assert at == len(bands)


def test_a_bucket_is_of_its_worst_mode() -> None:
    """Malignant collapse (2) is worse than uniform attention (3), that than the others."""
    count = 4 * BUCKETS
    log: Logged = [(at, {"m/mode": 0.0}) for at in range(1, count + 1)]
    for number, modes in enumerate(([0, 3, 2, 1], [1, 3, 0, 0], [0, 1, 0, 0])):
        for at, mode in enumerate(modes):
            log[4 * number + at][1]["m/mode"] = float(mode)
    kept = table(log)
    assert kept.length == 4
    modes = Group(kept, {0: "m/mode"})
    assert modes.highest(BUCKETS)[1][0][:4] == [2, 3, 1, 0]
    assert modes.highest(BUCKETS // 2)[1][0][:2] == [2, 1]
    assert (3, 2.0) in kept.points("m/mode") and kept.points("m/mode")[0] == (1, 0.0)


@pytest.mark.parametrize("again", [1, 2, 300, 301, 750, 999, 1000])
def test_a_run_that_goes_on_from_within_a_bucket_is_as_if_it_had_not_stopped(again: int) -> None:
    log = logged(1000)
    spoilt: Logged = [(at, {"a": 1e9, "old": 1.0}) for at, _ in log[again - 1 :]]
    lines = log[: again - 1] + spoilt + log[again - 1 :]
    builder = Builder(lambda place: lines[place][1])
    for place, (at, values) in enumerate(lines):
        if place == again - 1 + len(spoilt):
            builder.drop(at)
        builder.add(at, values, place)
    kept, straight = builder.table(), table(log)
    assert kept.steps == straight.steps and kept.rows.keys() == straight.rows.keys()
    for tag in kept.rows:
        assert set(kept.points(tag)) <= set(series(log, tag))
        resumed, whole = (Group(each, {tag: tag}) for each in (kept, straight))
        assert (resumed.least(), resumed.largest()) == (whole.least(), whole.largest())
        assert resumed.mean() == pytest.approx(whole.mean(), rel=1e-12)


def test_a_log_that_was_started_again_is_read_once_more_where_it_must_be(tmp_path: Any) -> None:
    log = [start("a"), *(step(at, loss=float(at)) for at in range(1, 1001))]
    log += [start("a"), *(step(at, loss=-float(at)) for at in range(502, 1003))]
    read = read_run(write_log(tmp_path / "a", log))
    assert read.table.length == 4 and read.table.steps == list(range(1, 1003))
    points = dict(read.series["loss"])
    assert points[1] == 1.0 and points[501] == 501.0 and points[1002] == -1002.0
    assert [at for at, value in points.items() if value == at] == [at for at in points if at <= 501]
    assert read.numbers_at(502) == {"loss": -502.0} and read.numbers_at(501) == {"loss": 501.0}


def test_a_log_that_was_written_anew_meanwhile_is_refused(tmp_path: Any) -> None:
    log = [start("a"), step(1, loss=1.0), attention_map(1, 0, 0)]
    read = read_run(write_log(tmp_path / "a", log))
    write_log(tmp_path / "a", ["?" * 3000])
    for reading in (lambda: read.numbers_at(1), lambda: read.map_at(read.maps[0])):
        with pytest.raises(ValueError, match="got other lines while it was read") as error:
            reading()
        assert str(error.value).endswith("it takes a log that only grows.")


def test_what_two_lines_say_of_a_step_is_one_measurement(tmp_path: Any) -> None:
    log = [start("a"), step(1, loss=1.0), step(1, lr=0.5), step(2, loss=3.0)]
    read = read_run(write_log(tmp_path / "a", log))
    assert read.table.steps == [1, 2] and read.series["lr"] == [(1, 0.5)]
    assert read.numbers_at(1) == {"loss": 1.0, "lr": 0.5}


def test_a_group_is_what_a_dictionary_of_its_points_is() -> None:
    log = logged(5)
    group: Group[str] = Group(table(log), {"x": "a"})
    assert isinstance(group, Mapping) and group == {"x": series(log, "a")} and len(group) == 1
    assert Group(table(log), {}).largest() is None and Group(table(log), {}).mean() is None
    nothing: Logged = [(1, {"a": None}), (2, {"a": math.inf})]
    gaps: Group[int] = Group(table(nothing), {0: "a"})
    assert gaps[0] == [(1, None), (2, None)] and gaps.largest() is None
    assert gaps.bands() == [(1, None), (2, None)]


@pytest.mark.parametrize("most", [1, 7, 100, BUCKETS])
def test_what_a_heat_map_shows_has_every_extreme(most: int) -> None:
    log = logged(450)
    group = Group(table(log), {0: "a", 1: "b"})
    for (steps, rows), extreme in ((group.lowest(most), min), (group.highest(most), max)):
        assert len(steps) <= most and steps == sorted(set(steps)) and len(rows) == 2
        for row, tag in zip(rows, "ab", strict=True):
            assert len(row) == len(steps)
            shown = [value for value in row if value is not None]
            assert extreme(shown) == extreme(
                value for _, value in series(log, tag) if value is not None
            )
