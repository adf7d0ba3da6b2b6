"""`weyl-megatron plan --run`: advice on real runs of the comparison's GPT, and what is no run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from examples.collapse.model import GPT, GPTConfig
from tests.processes import ROOT
from weyl_megatron import AdamW2
from weyl_megatron.cli import main
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.plan import advice as rules
from weyl_megatron.plan.advice import Advice, advise, look
from weyl_megatron.report.runs import read_run
from weyl_megatron.watch import Watch

STEPS = 50


class Setting(NamedTuple):
    norm: str
    lr: float
    tau: float | str | None  # None: torch.optim.AdamW


RUNS = {
    "alike": Setting("post", 1e-2, None),
    "grown": Setting("pre", 3e-2, None),
    "held": Setting("pre", 3e-3, 0.004),
    "slow": Setting("pre", 1e-3, "balanced"),
    "bound": Setting("pre", 3e-2, "balanced"),
}


def train(setting: Setting, folder: Path) -> None:
    """Train the GPT of six blocks, watched at steps 1, 25 and 50."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(norm=setting.norm))
    options: dict[str, Any] = {"lr": setting.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer: torch.optim.Optimizer
    if setting.tau is None:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        optimizer = AdamW2(model.named_parameters(), tau=setting.tau, **options)
    corpus = load_corpus()
    offsets = training_offsets(corpus, STEPS, 8, 64, seed=0)
    watch = Watch(model, optimizer, every=25, out=folder)
    for step in range(STEPS):
        loss = model(*sequences(corpus.train, offsets[step], 64))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        watch.step(loss)
    watch.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def advice(folder: Path) -> dict[str, Advice]:
    for name, setting in RUNS.items():
        train(setting, folder / name)
    return {name: advise(look(read_run(folder / name), folder / name)) for name in RUNS}


def test_what_fails_under_adamw_gets_balanced_at_its_rate(advice: dict[str, Advice]) -> None:
    alike, grown = advice["alike"], advice["grown"]
    assert (alike.tau, alike.lr) == ("balanced", 1e-2)
    assert "the tokens of a block are all alike (cosine 1.000)" in alike.tau_reason
    assert (grown.tau, grown.lr) == ("balanced", 3e-2)
    assert "σ₁ of the blocks' matrices grew" in grown.tau_reason
    assert grown.seen.warned and f"warned of {grown.seen.warned} heads" in grown.tau_reason


def test_a_number_that_holds_embeddings_and_head_gives_way_to_balanced(
    advice: dict[str, Advice],
) -> None:
    held = advice["held"]
    assert held.seen.hidden is not None and held.seen.io is not None
    assert (held.seen.hidden.count, held.seen.io.count) == (36, 3)
    assert held.seen.io.rate < 0.2 < held.seen.hidden.rate
    assert held.tau == "balanced"
    assert held.tau_reason.startswith("one τ = 0.004 for all leaves hidden matrices 0.")


def test_balanced_gets_a_larger_rate_while_hidden_matrices_have_it(
    advice: dict[str, Advice],
) -> None:
    slow, bound = advice["slow"], advice["bound"]
    assert slow.seen.hidden is not None and slow.seen.hidden.rate > 0.3
    assert slow.tau == "balanced" and slow.lr == pytest.approx(1e-2)
    assert bound.seen.hidden is not None and bound.seen.hidden.rate < 0.1
    assert (bound.tau, bound.lr) == ("balanced", 3e-2)


def test_what_balanced_would_leave_is_told_by_a_run_with_a_number(
    advice: dict[str, Advice],
) -> None:
    """τ = 0.004 is what balanced gives each of 36 hidden matrices; here no floor counts."""
    hidden = advice["held"].seen.hidden
    assert hidden is not None
    assert hidden.rate_at(0.004) == pytest.approx(hidden.rate, rel=1e-3)  # six digits a number
    assert hidden.rate_at(0.002) == pytest.approx(hidden.rate / 2, rel=0.15)  # some are free


def test_the_command_prints_numbers_and_reasons_and_writes_them(
    folder: Path, advice: dict[str, Advice], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = tmp_path / "advice.json"
    assert main(["plan", "--run", str(folder / "alike"), "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    assert "AdamW, rate 0.01 at step 50" in printed
    assert "Advice: τ = balanced, because the run fails: " in printed
    content = json.loads(written.read_text(encoding="utf-8"))
    assert (content["tau"], content["lr"]) == ("balanced", advice["alike"].lr)
    assert content["seen"]["taus"] == ["inf"]


def log(folder: Path, header: dict[str, Any], steps: dict[int, dict[str, float | None]]) -> Path:
    """Write a run's log by hand."""
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"event": "start", "version": 1, **header}]
    lines += [{"event": "step", "step": step, "values": values} for step, values in steps.items()]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "stability.jsonl").write_text(text, encoding="utf-8")
    return folder


def values(loss: float | None, lr: float = 1e-2, similarity: float = 0.5) -> dict[str, Any]:
    return {"loss": loss, "lr": lr, "block/0/similarity": similarity}


def clip(name: str, lr: float, clipped: float) -> dict[str, float | None]:
    numbers = {"lr": lr, "sigma_weight": 1.0, "sigma_update": 2.0, "clipped": clipped}
    return {f"clip/{name}/{key}": number for key, number in numbers.items()}


BALANCED = {"tau": ["balanced"]}


def test_what_fails_under_balanced_gets_a_third_of_its_rate(tmp_path: Path) -> None:
    for name, last in {
        "worse": values(6.0),
        "none": values(None),
        "alike": values(3.0, similarity=0.99),
    }.items():
        run = log(tmp_path / name, BALANCED, {1: values(5.0), 100: last})
        result = advise(look(read_run(run), run))
        assert result.tau == "balanced" and result.lr == pytest.approx(1e-2 / 3)
        assert result.lr_reason.startswith("the run fails under balanced: ")


def test_adamw_that_trains_gets_balanced_at_three_times_its_rate(tmp_path: Path) -> None:
    run = log(tmp_path / "a", {"tau": ["inf"]}, {1: values(5.0), 100: values(3.0)})
    result = advise(look(read_run(run), run))
    assert result.seen.is_adamw and result.seen.hidden is None
    assert result.tau == "balanced" and result.lr == pytest.approx(3e-2)


def test_a_number_that_clips_nothing_is_called_adamw(tmp_path: Path) -> None:
    """One hidden matrix: balanced gives it all of the budget, 0.144 · 1 / (0.01 · 2) and more."""
    free = clip("blocks.0.fc1.weight", 1e-2, 0.0)
    run = log(tmp_path / "a", {"tau": [100.0]}, {1: values(5.0), 100: values(3.0) | free})
    result = advise(look(read_run(run), run))
    assert result.tau_reason == "τ = 100.0 clips nothing at step 100, and is AdamW there"
    assert result.tau == "balanced" and result.lr == pytest.approx(1e-1)
    assert "would leave at least 1 of the rate to hidden matrices" in result.lr_reason


def test_of_a_settled_matrix_no_more_is_known_than_that_it_is_free(tmp_path: Path) -> None:
    """Its σ₁ in the log are bounds, of W here 0: τ = 0.1 would leave it all of the rate, 0.01 a
    tenth or more; at τ = ∞ nothing is known.
    """
    free = clip("blocks.0.fc1.weight", 1e-2, 0.0) | {"clip/blocks.0.fc1.weight/sigma_weight": 0.0}
    steps = {1: values(5.0), 100: values(3.0) | free}
    run = log(tmp_path / "a", {"tau": [0.1]}, steps)
    hidden = look(read_run(run), run).hidden
    assert hidden is not None
    assert hidden.rate_at(0.1) == pytest.approx(1.0) and hidden.rate_at(0.01) == pytest.approx(0.1)
    infinite = log(tmp_path / "inf", {"tau": ["inf"]}, steps)
    assert look(read_run(infinite), infinite).hidden is None


def test_the_measurement_about_step_100_counts(tmp_path: Path) -> None:
    steps = {step: values(5.0 - step / 100) for step in (1, 60, 90, 120, 300)}
    run = log(tmp_path / "many", BALANCED, steps)
    assert look(read_run(run), run).step == 90
    later = log(tmp_path / "later", BALANCED, {1: values(5.0), 150: values(4.0), 190: values(3.0)})
    assert look(read_run(later), later).step == 150


def test_of_a_long_run_only_its_beginning_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report keeps 300 measurements one by one, and of more only ranges."""
    begun = {step: values(5.0 - step / 100, lr=1e-2) for step in range(1, 200)}
    rest = {step: values(9.0, lr=1e-4) for step in range(200, 1500)}
    printed = []
    for steps in (begun, begun | rest):
        assert main(["plan", "--run", str(log(tmp_path / str(len(steps)), BALANCED, steps))]) == 0
        printed.append(capsys.readouterr().out.partition(": ")[2])
    assert printed[0] == printed[1] and "at step 100" in printed[0]


def test_a_warmup_and_more_matrices_than_were_tried_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {
        tag: value
        for block in range(73)
        for tag, value in clip(f"blocks.{block}.fc1.weight", 1e-3, 1.0).items()
    }
    run = log(tmp_path / "a", BALANCED, {1: values(5.0, lr=1e-3), 100: values(3.0) | many})
    assert main(["plan", "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "The run has a warmup, and the rules are of runs without one." in printed
    assert "It has 73 hidden matrices; the rules are of 72 at most." in printed


def test_a_log_that_does_not_say_enough_is_an_error_of_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {1: values(5.0), 100: values(3.0)}
    other_rate = good | {100: values(3.0) | clip("blocks.0.fc1.weight", 5e-3, 0.0)}
    projected = good | {100: values(3.0) | {"clip/blocks.0.fc1.weight/directions": 2.0}}
    bare: dict[int, dict[str, float | None]] = {1: {"lr": 1e-2}, 100: {"lr": 1e-2}}
    cases = {
        "it takes a Watch's folder": tmp_path / "missing",
        "does not name τ; it takes one that this release's Watch wrote": log(
            tmp_path / "old", {}, good
        ),
        "has groups with τ = 0.01 and inf; it takes one τ": log(
            tmp_path / "mixed", {"tau": [0.01, "inf"]}, good
        ),
        "the log's tau got -1": log(tmp_path / "odd", {"tau": [-1]}, good),
        'is of clip="project"': log(tmp_path / "projected", BALANCED, projected),
        "has no measurement at steps 50 to 200": log(
            tmp_path / "short", BALANCED, {1: values(5.0), 40: values(3.0)}
        ),
        "has neither losses nor blocks": log(tmp_path / "bare", BALANCED, bare),
        "has the rate 0.005 and the first group 0.01; it takes one rate": log(
            tmp_path / "rates", BALANCED, other_rate
        ),
    }
    for message, run in cases.items():
        assert main(["plan", "--run", str(run)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    run = log(tmp_path / "good", BALANCED, good)
    for arguments, message in {
        ("--lr", "0.1"): "--lr got 0.1 beside --run",
        ("gpt2",): "MODEL got gpt2 beside --run",
    }.items():
        assert main(["plan", "--run", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["plan"]) == 2
    assert "MODEL got nothing, it takes a model, or --run" in capsys.readouterr().err


def test_a_watch_names_the_taus_that_groups_ask_for(tmp_path: Path) -> None:
    model = GPT(GPTConfig(layers=1))
    weights, vectors = (
        [(name, param) for name, param in model.named_parameters() if (param.ndim > 1) == is_matrix]
        for is_matrix in (True, False)
    )
    optimizer = AdamW2(
        [{"params": weights, "tau": "auto"}, {"params": vectors, "tau": math.inf}], lr=1e-3
    )
    Watch(model, optimizer, out=tmp_path / "two").close()
    Watch(model, torch.optim.AdamW(model.parameters()), out=tmp_path / "adamw").close()
    for name, taus in {"two": ["balanced", "inf"], "adamw": ["inf"]}.items():
        first = (tmp_path / name / "stability.jsonl").read_text(encoding="utf-8").split("\n")[0]
        assert json.loads(first)["tau"] == taus


def test_the_page_has_the_numbers_of_the_rules() -> None:
    page = " ".join((ROOT / "docs" / "which_tau.md").read_text(encoding="utf-8").split())
    for text in (
        f'would have under `"balanced"`, {rules._FREE:g} of the rate or more | `"balanced"` | ten',
        f'| … {rules._HELD:g} to {rules._FREE:g} | `"balanced"` | three times |',
        f"a mean cosine above {rules._ALIKE:g},",
        f"grown {rules._GREW:g} times in the median",
        f"at that about step {rules._WANTED} ({rules._EARLIEST} to {rules._LATEST})",
    ):
        assert text in page, text
    assert (rules._FAR, rules._STEP) == (10.0, 3.0)
