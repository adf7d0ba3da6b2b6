"""A user's day, drawn: what people do to a model and its optimizer between steps, beside torch's
own AdamW.

    make day    twenty thousand days, where make test draws 200 and make test-all 1000

A day (play.py) is a model and a list of actions (actions.py). AdamW, AdamW2 at τ = ∞ and AdamW2 at
the paper's τ live through it, in a process of its own (server.py), and are judged after every
action (judge.py):

* where AdamW works AdamW2 works: at τ = ∞ with its weights and state bit for bit, else with its
  moments and a move that Algorithm 1 allows;
* where it raises AdamW2 raises one sentence, there or when a state is loaded that the next step
  would refuse;
* nothing ends in a signal, and nothing outside of weights and state is read or written (fences.py).

What differs on purpose is in ``judge.DIFFERENCES``.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import Phase, given, settings

from tests.day.actions import (
    Action,
    ClearState,
    EditState,
    GradOfDtype,
    Load,
    Save,
    SetOption,
    Step,
    StepByHand,
)
from tests.day.draws import days
from tests.day.faults import FAULTS
from tests.day.model_actions import Replace, SetData, Swap
from tests.day.play import Day
from tests.day.server import Server

#: CI draws the same ones every time, more are new ones every time.
EXAMPLES = int(os.environ.get("WEYL_MEGATRON_EXAMPLES", "1000"))

#: Days that once went wrong, or that people reported of other optimizers.
KNOWN = {
    "a state of more rows": Day(("norm",), (Step(0), Load("own", "more rows"), Step(1))),
    "a state of many more rows": Day(("tall",), (Step(0), Load("own", "many more rows"), Step(1))),
    "a state of fewer rows": Day(("linear",), (Step(0), Load("own", "fewer rows"), Step(1))),
    "a state of as many numbers": Day(("linear",), (Step(0), Load("AdamW's", "flat"), Step(1))),
    "a state of fewer parameters": Day(
        ("linear",), (Step(0), Load("own", "fewer parameters"), Step(1))
    ),
    "a state of another dtype": Day(
        ("linear",), (Step(0), Load("own", "float64"), Step(1), Step(2))
    ),
    "weights of many more rows": Day(("tall",), (Step(0), SetData(0, "many more rows"), Step(1))),
    "weights of fewer rows": Day(("norm",), (Step(0), SetData(0, "fewer rows"), Step(1))),
    "weights and their old gradient": Day(
        ("norm",), (Step(0), SetData(0, "more rows", False), StepByHand(1))
    ),
    "a parameter in another's place": Day(
        ("linear",), (Step(0), Replace(0, True), Step(1), Replace(1, False), Step(2))
    ),
    "no gradient in the step before": Day(("tall",), (Step(0, backward=False), Step(1), Step(2))),
    "an average of the weights": Day(
        ("tall",), (Step(0), Swap(False), Step(1), Swap(False), Step(2), Swap(True), Step(3))
    ),
    "a moment that is a number": Day(
        ("linear",), (Step(0), EditState(0, "exp_avg", "a number"), Step(1))
    ),
    "a gradient of one number": Day(
        ("linear",), (StepByHand(0, "expanded"), StepByHand(1, "expanded"))
    ),
    "a state without its count": Day(
        ("linear",), (Step(0), ClearState(0, "step"), Load("own"), Step(1))
    ),
    "a β of 1": Day(("linear",), (Step(0), SetOption("betas", (1.0, 0.9)), Step(1))),
    "a rate in words": Day(("linear",), (Step(0), SetOption("lr", "0.1"), Step(1))),
    "a state that moved on": Day(
        ("linear",), (Step(0), Save("as it is"), Step(1), Load("saved"), Step(2))
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.mark.parametrize("day", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("kernel", ["", "torch"], ids=["compiled", "in plain torch"])
def test_a_day_that_once_went_wrong(server: Server, day: Day, kernel: str) -> None:
    verdict = server.play(Day(day.pieces, day.actions, named=True, kernel=kernel))
    assert verdict.failure is None


def test_where_adamw_works_adamw2_works_and_where_it_raises_it_raises_one_sentence(
    server: Server, record_property: Callable[[str, object], None]
) -> None:
    played: Counter[str] = Counter()
    counts: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES <= 1000,
        deadline=None,
        database=None,
        print_blob=True,
    )
    @given(days())
    def each(day: Day) -> None:
        verdict = server.play(day)
        assert verdict.failure is None, f"{verdict.failure}\n{day}"
        played.update(verdict.played)
        counts.update(days=1, steps=verdict.steps, refused=verdict.refused, early=verdict.early)

    each()
    print(f"{dict(counts)}, {dict(played)}")
    for kind in Action.__subclasses__():
        assert played[kind.__name__] > EXAMPLES / 200 or kind is GradOfDtype, f"{kind}: {played}"
    assert (
        counts["steps"] > 2 * EXAMPLES and counts["refused"] > EXAMPLES / 20 and counts["early"]
    ), counts
    record_property(
        "tried",
        f"{EXAMPLES} drawn days of {sum(played.values()) / EXAMPLES:.0f} actions and "
        f"{counts['steps'] / EXAMPLES:.0f} steps, each in a process of its own, beside "
        "torch.optim.AdamW",
    )
    record_property(
        "survived",
        "no signal, no foreign memory, AdamW's bits at τ = ∞; of "
        f"{counts['refused'] + counts['early']} actions that AdamW refuses, {counts['early']} are "
        "refused when a state is loaded instead of in the step after it",
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_search_finds_a_planted_fault(fault: str) -> None:
    with Server(fault) as faulty:

        @settings(
            max_examples=200,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            report_multiple_bugs=False,
        )
        @given(days())
        def each(day: Day) -> None:
            failure = faulty.play(day).failure or ""
            assert re.search(FAULTS[fault].seen, failure) is None, failure

        with pytest.raises(AssertionError, match=FAULTS[fault].seen):
            each()
