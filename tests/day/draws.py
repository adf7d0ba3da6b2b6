"""Draws days: a few pieces of a model, and mostly steps, with what people do between them."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.day import actions, model_actions
from tests.day.actions import Action
from tests.day.forms import DATA, DTYPES, GRADS, STATE
from tests.day.play import Day
from tests.day.state_dicts import EDITS
from tests.day.worlds import PIECES

numbers = st.integers(0, 5)
seeds = st.integers(0, 99)
flags = st.booleans()


def _one_of(names: dict[str, object]) -> st.SearchStrategy[str]:
    return st.sampled_from(list(names))


#: Edits of a state dict under which AdamW goes on, and so do days.
_FITTING = (
    *("as it is", "float64", "bfloat16", "nothing", "a parameter without state"),
    *("steps as int", "steps as float", "steps as tensors of one", "steps as int64", "without tau"),
)
_SAME_SHAPE = ("other memory", "transposed in memory", "a piece", "strided")
_OPTIONS = (
    *(("lr", 0.02, False), ("lr", 0.02, True), ("lr", 0.0, False), ("lr", 1, False)),
    *(("betas", (0.8, 0.99), False), ("betas", (0.0, 0.0), False), ("betas", (0.8, 0.99), True)),
    *(
        ("weight_decay", 0.0, False),
        ("weight_decay", 0.3, False),
        ("eps", 1e-3, False),
        ("eps", 1, False),
    ),
    *(
        ("maximize", True, False),
        ("maximize", False, False),
        ("amsgrad", False, False),
        ("foreach", False, False),
    ),
)
_OTHER_OPTIONS = (
    *(
        ("amsgrad", True, False),
        ("decoupled_weight_decay", False, False),
        ("capturable", True, False),
    ),
    *(("differentiable", True, False), ("lr", -0.01, False), ("lr", "0.1", False)),
)
_SHAPES = ((3,), (6, 4), (), (0, 3), (2, 3, 4), (4, 2, 3, 3))


def _set(options: tuple[tuple[str, object, bool], ...]) -> st.SearchStrategy[Action]:
    return st.sampled_from(
        [actions.SetOption(*option, group) for option in options for group in range(3)]
    )


steps = st.one_of(
    st.builds(actions.Step, seeds),
    st.builds(actions.Step, seeds, flags, st.sampled_from([True, False, None]), flags),
    st.builds(
        actions.StepByHand,
        seeds,
        st.sampled_from([form for form in GRADS if form != "sparse"]),
        st.integers(1, 2),
    ),
)

#: After these AdamW goes on.
gentle = st.one_of(
    st.builds(actions.ZeroGrad, flags),
    st.builds(actions.Save, st.sampled_from(["as it is", "copy", "file"])),
    st.builds(
        actions.Load,
        st.sampled_from(["own", "saved", "AdamW's", "AdamW2's"]),
        st.sampled_from(_FITTING),
        numbers,
    ),
    st.builds(model_actions.LoadModel, flags),
    st.builds(model_actions.SetData, numbers, st.sampled_from(_SAME_SHAPE), flags),
    st.builds(model_actions.Replace, numbers, flags, st.sampled_from(_SAME_SHAPE)),
    st.builds(actions.AddGroup, st.sampled_from(_SHAPES), st.sampled_from([None, 0.1])),
    st.builds(
        actions.AddFrozen,
        st.sampled_from(["uint8", "int64", "bool", "complex64", "float32", "float16"]),
    ),
    st.builds(model_actions.Freeze, numbers, flags, flags),
    st.builds(model_actions.To, st.sampled_from(["float32", "float64", "bfloat16"])),
    st.builds(model_actions.ChannelsLast, flags),
    st.builds(actions.Copy, st.sampled_from(["deepcopy", "pickle", "file"])),
    st.builds(actions.NewOptimizer),
    _set(_OPTIONS),
    st.builds(model_actions.Swap, flags),
    st.builds(model_actions.Prune, numbers, flags),
    st.builds(model_actions.WeightNorm, numbers, st.sampled_from(["old", "new", "removed"]), flags),
    st.builds(
        actions.EditState,
        numbers,
        st.sampled_from(["exp_avg", "exp_avg_sq", ""]),
        st.sampled_from(["other memory", "strided", "transposed in memory"]),
    ),
    st.builds(actions.EditStep, numbers, st.sampled_from(["one", "int64", "float64", "zero"])),
    st.builds(actions.ClearState, st.none() | numbers),
    st.builds(actions.DefaultDtype, st.sampled_from(["float32", "float64", "bfloat16"])),
    st.builds(actions.MoveState),
)

#: After many of these it raises, at once or in the next step.
rough = st.one_of(
    st.builds(
        actions.Load, st.sampled_from(["own", "AdamW's", "AdamW2's"]), _one_of(EDITS), numbers
    ),
    st.builds(model_actions.SetData, numbers, _one_of(DATA), flags),
    st.builds(model_actions.Replace, numbers, flags, _one_of(DATA)),
    st.builds(actions.AddGroup, st.just((3,)), st.none(), st.none() | numbers, flags),
    _set(_OTHER_OPTIONS),
    st.builds(model_actions.To, st.sampled_from(list(DTYPES)), flags),
    st.builds(
        actions.EditState, numbers, st.sampled_from(["exp_avg", "exp_avg_sq", ""]), _one_of(STATE)
    ),
    st.builds(actions.EditStep, numbers, st.sampled_from(["int", "float", "vector"])),
    st.builds(actions.ClearState, numbers, st.sampled_from(["exp_avg", "exp_avg_sq", "step"])),
    st.builds(actions.GradOfDtype, numbers, st.sampled_from(list(DTYPES))),
    st.builds(actions.StepByHand, seeds, st.just("sparse")),
)

#: After these weights, gradients and moments are not of one size, and a step that does not look
#: reads foreign memory.
_ROWS = ("more rows", "many more rows", "fewer rows")
misfits = st.one_of(
    st.builds(actions.Load, st.sampled_from(["own", "AdamW's"]), st.sampled_from(_ROWS), numbers),
    st.builds(model_actions.SetData, numbers, st.sampled_from(_ROWS), flags),
    st.builds(
        actions.EditState,
        numbers,
        st.sampled_from(["exp_avg", "exp_avg_sq", ""]),
        st.sampled_from(_ROWS),
    ),
    st.builds(model_actions.Replace, numbers, st.just(True), st.sampled_from(_ROWS)),
)

_pieces = st.lists(_one_of(PIECES), min_size=1, max_size=4).map(tuple)


def days() -> st.SearchStrategy[Day]:
    """Draw days; where one fails, what it did not need of eight actions becomes a rest."""
    # Not one_of, which takes each of the steps and of the others for as likely.
    kinds = {
        ".": st.just(actions.Rest()),
        "step": steps,
        "gentle": gentle,
        "rough": rough,
        "misfit": misfits,
    }
    names = [".", *["step"] * 9, *["gentle"] * 8, "rough", "misfit"]
    each = st.sampled_from(names).flatmap(lambda name: kinds[name])
    some = st.lists(each, min_size=8, max_size=24).map(tuple)
    return st.builds(Day, _pieces, some, flags, flags, st.sampled_from(["", "", "", "torch"]))
