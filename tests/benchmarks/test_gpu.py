"""The acceptance run: that it survives its parts, and what can be tried of them on a CPU."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correct, part, run
from benchmarks.gpu.correct import _CASES, _pieces
from benchmarks.gpu.plot import Curve, draw
from benchmarks.gpu.text import read_text
from benchmarks.gpu.timing import beside, counts, gpu_of
from benchmarks.gpu.train import _steps, schedule
from benchmarks.step_time import PROJECTED
from tests.processes import ROOT


def task(folder: Path, **changed: Any) -> part.Task:
    given = {"device": "cpu", "tiny": True, "until": time.time() + 60, "train_seconds": 1.0}
    return part.Task(**{**given, "out": folder, **changed})


def ran(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    seconds: float = 60.0,
    least: float = 2.0,
    **scripts: str,
) -> tuple[int, dict[str, Any]]:
    """Run parts that are these scripts; return the status and what was saved."""
    parts = [run.Part(name, "", 4.0 if name == "late" else 60.0) for name in scripts]
    monkeypatch.setattr(run, "PARTS", parts)
    monkeypatch.setattr(run, "_CPU", 1.0)
    monkeypatch.setattr(run, "_LEAST", least)
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)  # pytest's own stays

    def script(each: run.Part, _: part.Task) -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(scripts[each.name])]

    monkeypatch.setattr(run, "_command", script)
    options = argparse.Namespace(
        device="cpu", tiny=True, seconds=seconds, train_seconds=1.0, only=[], skip=[]
    )
    status = run.run(options, folder)
    return status, json.loads((folder / "results.json").read_text())["parts"]


GOOD = """print('RESULT {"name": "it", "value": 1}')"""


def test_a_part_that_fails_or_hangs_does_not_stop_the_others_and_nothing_of_it_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, parts = ran(
        monkeypatch,
        tmp_path,
        bad="""
            print('RESULT {"name": "it", "value": 7}')
            raise ValueError("no such thing")
        """,
        late=f"""
            import subprocess, sys, time
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            open(r"{tmp_path / "child"}", "w").write(str(child.pid))
            print('RESULT {{"name": "begun"}}', flush=True)
            time.sleep(60)
        """,
        good=GOOD,
    )
    assert status == 1
    assert [parts[name]["passed"] for name in ("bad", "late", "good")] == [False, False, True]
    assert parts["bad"]["status"] == "failed (1)"
    assert parts["bad"]["results"] == [{"name": "it", "value": 7}]
    assert parts["bad"]["tail"][-1] == "ValueError: no such thing"
    assert parts["late"]["status"] == "timed out after 4 s"
    assert parts["late"]["results"] == [{"name": "begun"}]
    assert parts["good"]["status"] == "passed"
    assert "no such thing" in (tmp_path / "log.txt").read_text()
    assert not is_running(int((tmp_path / "child").read_text()))


def is_running(process: int) -> bool:
    """Whether a process runs; a zombie, which waits for its parent, does not."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_result_is_saved_before_its_part_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = f"""
        import json, pathlib, time
        print('RESULT {{"name": "first"}}', flush=True)
        for _ in range(100):
            saved = json.loads(pathlib.Path(r"{tmp_path / "results.json"}").read_text())
            if saved["parts"]["slow"]["results"]:
                break
            time.sleep(0.1)
        print("RESULT " + json.dumps({{"name": "read", "saved": saved["parts"]["slow"]}}))
    """
    _, parts = ran(monkeypatch, tmp_path, slow=script)
    saved = parts["slow"]["results"][1]["saved"]
    assert saved["status"] == "running" and saved["results"] == [{"name": "first"}]


def test_kernels_that_do_not_compile_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop = f"raise SystemExit({part.STOP})"
    status, parts = ran(monkeypatch, tmp_path, warm=stop, good=GOOD)
    assert status == 1
    assert parts["good"] == {"status": "not run: warm failed", "results": [], "passed": False}


def test_what_cannot_run_here_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, parts = ran(monkeypatch, tmp_path, zero="print('NOT RUN no deepspeed')", good=GOOD)
    assert status == 0
    assert parts["zero"]["status"] == "not run: no deepspeed"


def test_a_part_for_which_no_time_is_left_is_not_begun_and_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow, seconds = "import time; time.sleep(0.5)", run._RESERVE + 10.3
    status, parts = ran(monkeypatch, tmp_path, seconds, least=10.0, slow=slow, good=GOOD)
    assert status == 1
    assert parts["slow"]["passed"]
    assert parts["good"]["status"] == "not run: out of time"


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (part.NotRun("no GPU"), 0, "NOT RUN no GPU"),
        (part.Failed("it is wrong"), 1, "big: it is wrong"),
        (part.Stop("nothing compiles"), part.STOP, "big: nothing compiles"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_part_ends_with_what_it_found(
    raised: Exception,
    status: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def function(given: part.Task) -> NoReturn:
        assert given.device == "cpu" and given.left > 60
        raise raised

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(command, "function_of", lambda name: function)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--part", "big"])
    assert command.main() == status
    assert capsys.readouterr().out.splitlines() == [printed]


def test_a_part_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--skip", "step1"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--skip got 'step1', it takes env, warm" in capsys.readouterr().err


def test_every_part_is_a_function_and_is_named_in_the_help() -> None:
    for each in run.PARTS:
        assert callable(run.function_of(each.name))
        assert each.name in (command.__doc__ or "")


def test_a_result_is_json_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    part.result("loss", value=math.nan, shapes=((1, 2),), dtype=torch.bfloat16, bound=-math.inf)
    line = capsys.readouterr().out.removeprefix(part.RESULT)

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse) == {
        "name": "loss",
        "value": "nan",
        "shapes": [[1, 2]],
        "dtype": "torch.bfloat16",
        "bound": "-inf",
    }


def test_a_difference_from_nan_is_no_small_one() -> None:
    numbers = torch.tensor([1.0, 2.0])
    assert part.difference(numbers, numbers * 1.5) == pytest.approx(1 / 3)
    assert part.difference(torch.tensor([math.nan, 2.0]), numbers) == math.inf


def test_the_cost_model_s_error_is_how_far_beyond_its_bounds_a_time_is() -> None:
    bounds = {"inactive": (1.0, 2.0), "clipped": (1.0, 2.0), "undecided": (1.0, 2.0)}
    rows = beside(bounds, {"inactive": 1.5, "clipped": 3.0, "undecided": 0.5})
    assert [rows[state]["error"] for state in bounds] == [0.0, 0.5, -0.5]
    assert beside(bounds, {"inactive": 1.0}).keys() == {"inactive"}


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA L4", None)],
)
def test_gpus_have_the_cost_model_s_names(device: str, name: str | None) -> None:
    assert gpu_of(device) == name


def test_launches_are_told_by_their_names() -> None:
    launches = {
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": 3,
        "Memcpy DtoH (Device -> Pinned)": 2,
        "Memset (Device)": 1,
        "products": 5,
    }
    assert counts(launches) == {"copies": 3, "torch_launches": 3, "other_launches": 5}


def test_triton_that_is_refused_in_float32_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    passed, said = correct._compare(task(tmp_path), correct._TINY)
    assert not passed and "WEYL_MEGATRON_KERNEL got 'triton'" in said["refused"]


@pytest.mark.parametrize(("planted", "passes"), [(1e-6, False), (1e-8, True)])
def test_a_kernel_that_moves_one_weight_a_little_further_does_not_pass(
    planted: float, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest weight is about 0.05."""
    trained = correct._trained

    def moved(
        case: correct.Case, device: str, kernel: str, rates: Sequence[float]
    ) -> list[torch.Tensor]:
        pieces = trained(case, device, "torch", rates)
        if kernel == "triton":
            pieces[0][3] += planted
        return pieces

    monkeypatch.setattr(correct, "_trained", moved)
    assert correct._compare(task(tmp_path), correct._TINY)[0] == passes


def test_pieces_end_within_rows_and_begin_with_them() -> None:
    """A row whose beginning nobody holds would be measured wrongly."""
    ends_within = 0
    for case in _CASES:
        starts, widths = [], []
        at = 0
        for shape in case.shapes:
            starts.append(at)
            widths.append(math.prod(shape[1:]))
            at += math.prod(shape)
        pieces = _pieces(case)
        assert pieces[0][0] == 0 and pieces[-1][1] == at and len(pieces) == 1 + len(case.cuts)
        for first, last in pieces:
            assert first < last
            number = max(n for n, start in enumerate(starts) if start <= first)
            assert (first - starts[number]) % widths[number] == 0
            number = max(n for n, start in enumerate(starts) if start <= last)
            ends_within += last < at and (last - starts[number]) % widths[number] != 0
    assert ends_within >= 5


def test_the_rate_rises_over_the_warmup_and_falls_to_a_tenth() -> None:
    assert schedule(0.0, 0.0) == 1.0
    assert schedule(1.0, 0.0) == pytest.approx(0.1)
    assert schedule(0.0, 0.1) == 0.0
    assert schedule(0.05, 0.1) == pytest.approx(0.5 * schedule(0.05, 0.0))
    assert schedule(0.3, 0.1) == schedule(0.3, 0.0)


def test_as_many_steps_are_made_as_there_is_time_for(tmp_path: Path) -> None:
    """Of 115 seconds 15 are kept for the end, and a tenth of the rest."""
    given = task(tmp_path, until=time.time() + 115.5, train_seconds=1000.0)
    assert _steps(given, [0.1, 0.4]) == 180
    given = task(tmp_path, until=time.time() + 115.5, train_seconds=10.0)
    assert _steps(given, [0.1, 0.4]) == 20, "the slowest takes ten seconds for 25"


def test_a_run_that_diverged_is_drawn_with_the_others() -> None:
    good, bad = Curve("AdamW²", "#0f8a78"), Curve("AdamW", "#c8452d")
    for step in (10, 20, 30):
        good.add(step, 9.0 / step, step / 7, 0.5)
        bad.add(step, 2.0 if step < 20 else math.nan, step / 9, None)
    picture = ElementTree.fromstring(draw([good, bad]))
    names = [each.get("data-name") for each in picture.iter() if each.get("data-name")]
    assert names == ["AdamW²", "AdamW", "AdamW²", "AdamW", "AdamW²"]  # one of three clips
    text = ElementTree.tostring(picture, encoding="unicode")
    assert "nan" not in text and "training loss" in text


def test_text_is_what_lies_on_the_machine_and_the_same_again(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    text, again = read_text(task(tmp_path)), read_text(task(tmp_path))
    assert torch.equal(text.train, again.train) and torch.equal(text.valid, again.valid)
    assert len(text.train) > 20_000
    assert len(text.valid) == max((len(text.train) + len(text.valid)) // 50, 3000)
    assert 256 < text.vocabulary <= 400
    assert int(text.train.max()) < text.vocabulary


@pytest.mark.slow
def test_a_cpu_tries_all_that_it_can(tmp_path: Path) -> None:
    """step774 and stepg are step124 with other names, which take a minute on two cores."""
    arguments = ["--device", "cpu", "--tiny", "--skip", "step774", "stepg"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    report = json.loads((tmp_path / "results.json").read_text())
    parts = report["parts"]
    assert {name for name, each in parts.items() if each["status"] != "passed"} == {"cuda"}
    assert parts["cuda"]["status"] == "not run: no GPU"
    contenders = {each["contender"] for each in parts["profile"]["results"]}
    assert contenders == {"inactive", "undecided", "clipped", "torch.optim.AdamW(fused)"}
    (step,) = parts["step124"]["results"]
    assert set(step["ms"]) == {"inactive", "undecided", "clipped", "naive", *PROJECTED}
    trained = [each for each in parts["train"]["results"] if each.get("status") == "run"]
    ways = {"AdamW", "AdamW, warmup", "AdamW², scaled", "AdamW², projected"}
    assert ways <= {each["way"] for each in trained}
    assert len({each["steps"] for each in trained}) == 1
    for name in ("log.txt", "step_time.md", "train.jsonl", "train.svg"):
        assert (tmp_path / name).stat().st_size > 0
    files = [path.name for path in tmp_path.iterdir()]
    assert len(files) == 5, files
