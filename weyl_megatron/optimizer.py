"""AdamW², Algorithm 1 of Qi et al., "Taming Transformer Without Using Learning Rate Warmup", on
spread matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .engines import unstepped
from .engines.deepspeed import adapter as deepspeed
from .engines.deepspeed import construction as deepspeed_construction
from .kernels import Stepped
from .kernels.stepped import Form, check_memory, extent_of, form_of, has_form
from .layouts.buffers import Buffer, Layout
from .layouts.modules import SeenModel
from .layouts.plain import dense, is_frozen, plain_buffer, why_foreign
from .layouts.tensor_parallel import shardings_of
from .matrices import MatrixGroup, MatrixStats
from .names import ParameterNames, take_names
from .nonfinite import Guard
from .saved import KEY, SavedVectors
from .settings import BALANCED, check_adamw, check_group, check_harmless, check_settings, read_tau
from .state import check_loaded, counted, gather, new_state
from .thresholds import Thresholds

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AdamW2", "MatrixStats"]

_log = logging.getLogger("weyl_megatron")


class AdamW2(torch.optim.AdamW):
    r"""AdamW whose rate is bounded, per matrix, so that no step changes a matrix's spectral norm by
    more than τ.

    .. math::
       \begin{aligned}
            &\textbf{for}\ t = 1, 2, \ldots\ \textbf{do}, \textbf{for each matrix } W                              \\
            &\quad G_t = \nabla_W f_t(W_{t-1})                                                                    \\
            &\quad M_t = \beta_1 M_{t-1} + (1 - \beta_1) G_t, \quad V_t = \beta_2 V_{t-1} + (1 -
            \beta_2) G_t^2  \\ &\quad U_t = \hat M_t / (\sqrt{\hat V_t} + \epsilon)                                                  \\
            &\quad \alpha_W = \min(\alpha_t,\ \tau\, \sigma_1(W_{t-1}) / \sigma_1(U_t)) \qquad \text{(Rule 1)}    \\
            &\quad W_t = W_{t-1} - \alpha_W U_t - \alpha_W \lambda W_{t-1}
       \end{aligned}

    By Weyl's inequality then σ₁(W_t) ≤ (1 + τ) σ₁(W_{t-1}). With ``tau=float("inf")`` this is
    ``torch.optim.AdamW``, bit for bit. Matrices are 2-D parameters, convolutions as (out,
    in·kernel), each expert of a 3-D stack, and each part of a fused weight; all other parameters
    take the scheduled rate. Under DeepSpeed (ZeRO 0–3, AutoTP, an mpu) σ₁ is that of the whole
    matrix, measured on the slices that the ranks hold.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or parameter groups; a group may have its
            own ``"tau"``.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.AdamW``, defaults and
            tensors included. No warmup is needed.
        tau: τ > 0; the paper uses 0.01 (GPT) and 0.004 (ViT, Swin). Or ``"balanced"`` (``"auto"``,
            too, where Hugging Face does not read it): hidden matrices share one budget, τ = 0.144 /
            (number of hidden matrices), embeddings, positions and head get 0.1, and σ₁(W) is taken
            for at least that of a Xavier matrix. A small τ acts like a warmup: of about ln(α σ₁(U)
            / (τ σ₁(W))) / τ steps for a head, of ``weyl-megatron plan``'s forecast for hidden
            matrices.
        power_iters: block power iterations per step at most; half of them where more would add
            nothing (the first step makes more).
        floor_std: σ₁(W) is taken for at least that of a random matrix of this standard deviation,
            so that zero-initialised matrices move; 0 is the paper's rule, under which they stay
            zero for ever. Unless it is 0, an adapter's factors (LoRA's A and B) are taken for at
            least a Xavier matrix.
        clip_vectors: bound 1-D parameters, too.
        io: patterns (``fnmatch``) of the names of embeddings, positions and head, for
            ``tau="balanced"``; None: find out.
        overrides: ``{"match": pattern, "tau": 0.1}``, ``{"match": pattern, "exempt": True}``
            (scheduled rate), ``{"match": pattern, "fused": 3}`` (three stacked matrices, 1: keep
            whole), ``{"match": pattern, "kind": "convolution"}`` or ``"experts"`` (what a weight of
            three dimensions is). The last match counts.
        nonfinite: what becomes of a step with a gradient that is NaN or infinite: "skip" (on all
            ranks alike, logged with the parameter's name and counted in ``skipped_steps``),
            "raise", or "off", as torch.optim.AdamW. None: "skip" where an engine has the norm of
            all gradients, so that it costs nothing, else "off".
        nonfinite_limit: RuntimeError after so many skipped steps in a row; None: never.
        tp_group: the process group of tensor-parallel parameters where no engine tells it.
        model: the module that the parameters belong to, where no engine shows it: it tells
            convolutions, experts and embeddings, and gives names to parameters that have none. It
            is looked at now, and not kept.
        others: keys of AdamW configurations that change nothing (``torch_adam``, ``adam_w_mode``,
            …).

    Raises:
        ValueError: an unknown key or an impossible value, at construction; at the first step a
            parameter that the engine holds in a way that is not understood.
        FloatingPointError: in a step with a gradient that is not finite, where ``nonfinite`` is
            "raise".
        RuntimeError: after ``nonfinite_limit`` skipped steps in a row.

    Example::

        optimizer = AdamW2(model.named_parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1,
        model=model)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | tuple[Tensor, Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        tau: float | str = 0.01,
        power_iters: int = 2,
        floor_std: float = 1e-3,
        clip_vectors: bool = False,
        io: Sequence[str] | None = None,
        overrides: Sequence[Mapping[str, Any]] = (),
        nonfinite: str | None = None,
        nonfinite_limit: int | None = None,
        tp_group: ProcessGroup | None = None,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        check_adamw(lr, betas, eps, weight_decay, amsgrad, maximize, others)
        self._settings = check_settings(
            tau=tau,
            power_iters=power_iters,
            floor_std=floor_std,
            clip_vectors=clip_vectors,
            io=io,
            overrides=overrides,
            nonfinite=nonfinite,
            nonfinite_limit=nonfinite_limit,
            others=others,
        )
        self._guard = Guard(nonfinite, nonfinite_limit)
        self._tp_group = tp_group
        tau = self._settings.tau
        self._auto = BALANCED in [
            tau,
            *(override.get("tau") for override in self._settings.overrides),
        ]
        self._engine_layout: Callable[[], Layout] | None = None  # set by an engine's door
        # set by an engine's door: the count is in param_groups, where FusedAdam has it
        self._step_in_group = False
        self._measures_gradients, self._gradient_norms = False, dict[str, float]()
        self._names, self._model = ParameterNames(), SeenModel(model)
        self._has_noticed = False  # said what was guessed of the parameters
        # the layout, by id of the tensor that is stepped; None: unread
        self._buffers: dict[int, Buffer] | None = None
        self._forms: dict[int, Form] = {}  # of these tensors when the layout was read
        self._extents: dict[int, int] = {}  # in memory, of these forms
        self._is_plain = True  # no engine told the layout
        self._matrix_groups: dict[
            tuple[int, ...], MatrixGroup
        ] = {}  # by the ids of the tensors that are stepped together
        self._saved = SavedVectors()  # of a loaded state dict, until their matrix_group is there
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self._model.check_knows(name for group in self._names.listed() for name in group)
        self.defaults["tau"] = tau
        deepspeed_construction.prepare(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; ``"params"`` may be ``(name, parameter)`` pairs, and ``"tau"`` may
        be given.
        """
        group = dict(param_group)
        group.setdefault("tau", self._settings.tau)
        group["tau"] = read_tau("a parameter group's tau", group["tau"])
        check_harmless(group)
        self._auto = self._auto or group["tau"] == BALANCED
        names = take_names(group)
        super().add_param_group(group)
        params = self.param_groups[-1]["params"]
        self._names.add(params, names or self._model.names(params))
        self._model.rename(params, self._names.listed()[-1])
        self._buffers, self._matrix_groups = None, {}

    def __getstate__(self) -> dict[str, Any]:
        saved = self._saved.with_matrix_groups(self._matrix_groups_and_steps())
        own = (
            self._settings,
            self._auto,
            self._tp_group,
            self._names.listed(),
            saved,
            self._model.kinds,
        )
        return {**super().__getstate__(), "adamw2": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        own = state.pop(
            "adamw2", None
        )  # of a copied or unpickled optimizer; load_state_dict comes here without
        if own is None:
            self._check_loaded(state)
        if self.__dict__.get("_step_in_group"):
            torch.optim.Optimizer.__setstate__(
                self, state
            )  # torch's AdamW looks for the step in the state
        else:
            super().__setstate__(state)
        if own is not None:
            self._settings, self._auto, self._tp_group, names, self._saved, kinds = own
            self._model, self._has_noticed = SeenModel(kinds=kinds), False
            self._engine_layout, self._step_in_group = None, False
            self._guard = Guard(self._settings.nonfinite, self._settings.nonfinite_limit)
            self._measures_gradients, self._gradient_norms = False, {}
            self._names = ParameterNames()
            self._names.restore(self.param_groups, names)
            self._buffers, self._forms, self._extents, self._is_plain, self._matrix_groups = (
                None,
                {},
                {},
                True,
                {},
            )
        else:
            self.forget()
        for group in self.param_groups:
            group.setdefault("tau", self._settings.tau)

    def _check_loaded(self, loaded: dict[str, Any]) -> None:
        """Raise ValueError where a state that is being loaded cannot be that of the parameters."""
        names = self._names.known()
        for number, group in enumerate(loaded["param_groups"]):
            for position, param in enumerate(group["params"]):
                name = names.get(id(param), f"group{number}.param{position}")
                has_step = not self.__dict__.get("_step_in_group")
                check_loaded(param, loaded["state"].get(param, {}), name, has_step=has_step)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's, whose first parameter group also carries the power vectors: a run resumes
        exactly.
        """
        state = super().state_dict()
        if vectors := self._saved.records(self._matrix_groups_and_steps()):
            for group, written in zip(self.param_groups, state["param_groups"], strict=True):
                if (
                    group is self.param_groups[0]
                ):  # which may be there twice, and is written alike then
                    written[KEY] = vectors
        return state

    def _matrix_groups_and_steps(self) -> Iterator[tuple[MatrixGroup, float]]:
        return (
            (matrix_group, self._steps_done(matrix_group))
            for matrix_group in self._matrix_groups.values()
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of an AdamW² or an AdamW; without vectors in it, the next step
        measures afresh.
        """
        ours, saved_groups = self.param_groups, state_dict["param_groups"]
        sizes = [[len(group["params"]) for group in groups] for groups in (saved_groups, ours)]
        if (
            sizes[0] != sizes[1] and not self._optimizer_load_state_dict_pre_hooks
        ):  # which may mend that
            raise ValueError(
                f"AdamW2: load_state_dict got parameter groups of {sizes[0]} parameters, it takes "
                f"{sizes[1]}, as many as the optimizer has."
            )
        for saved in saved_groups:
            moot = "capturable", "decoupled_weight_decay"  # torch's AdamW passes over them, too
            check_harmless({key: value for key, value in saved.items() if key not in moot})
        taus = [group["tau"] for group in self.param_groups]
        were_named = ["param_names" in group for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, saved, tau in zip(
            self.param_groups, state_dict["param_groups"], taus, strict=True
        ):
            # The checkpoint of an AdamW has none.
            group["tau"] = read_tau("a parameter group's tau", saved.get("tau", tau))
            group |= {"foreach": None, "fused": None, "capturable": False}
        for state in (
            self.state.values()
        ):  # of a fused AdamW the count is on the device, and reading it would wait
            if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].cpu()
        self._match_names(were_named, state_dict["param_groups"])
        self._take_saved()

    def _match_names(
        self, were_named: list[bool], saved_groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Match the parameters by their places, where either we or a loaded state dict have no
        names for them.
        """
        if were_named == ["param_names" in saved for saved in saved_groups]:
            self._saved.match([], [])
            return
        names = ParameterNames()
        names.restore(self.param_groups, [saved.get("param_names", ()) for saved in saved_groups])
        self._saved.match(self._names.listed(), names.listed())

    def forget(self) -> None:
        """Have the next step measure afresh, with the iterations of a first step; call it on every
        rank, or on none.
        """
        self._saved.clear()
        self._forget_matrix_groups()

    def _forget_matrix_groups(self) -> None:
        for matrix_group in self._matrix_groups.values():
            matrix_group.forget()

    def _take_saved(self) -> None:
        """Take out of the parameter groups what a state dict left there for the matrix_groups to come.

        DeepSpeed's universal checkpoint puts it there with no call of :meth:`load_state_dict`, at
        ZeRO-3 in all groups.
        """
        if self._saved.take(self.param_groups):
            self._forget_matrix_groups()

    @torch._disable_dynamo  # type: ignore[attr-defined]  # traced it would take minutes to compile
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step (Algorithm 1); return what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_construction_call():
            return loss
        _refuse_capture(self)
        if self._buffers is None or self._is_laid_out_anew():
            self._read_layout()
        self._take_saved()
        if not self._guard.admits(self._stepped_buffers()):
            return loss
        for turn in self._turns():  # whose tensors are all checked before the first of them moves
            matrix_group = turn.matrix_group
            with _on_device(turn.weights[0].device):
                if self._measures_gradients:
                    self._gradient_norms |= matrix_group.gradient_norms(turn.stepped)
                matrix_group.begin(turn.weights, turn.stepped, turn.groups)
                self._count(matrix_group.tensors)
                settled = (
                    matrix_group.move_early()
                )  # lines 3 to 14 in one pass, where α is proved to be within Rule 1
                for batch in matrix_group.waiting(settled):
                    sigma_weight, sigma_update = matrix_group.sigmas(batch)  # lines 3 to 6
                    rates = matrix_group.rates(sigma_weight, sigma_update)  # lines 7 to 9
                    matrix_group.move(batch, rates)  # lines 10 to 14
                matrix_group.end(settled)
                for tensor, weight in zip(matrix_group.tensors, turn.weights, strict=True):
                    if (
                        weight is not tensor and tensor.grad is not None
                    ):  # it was stepped as a dense copy
                        tensor.copy_(weight)
        if self._step_in_group:
            for group in self.param_groups:
                group["step"] += 1
        return loss

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last step did to every matrix, by name; the same on every rank that holds
        a piece of it.
        """
        return {
            name: entry
            for matrix_group in self._matrix_groups.values()
            for name, entry in matrix_group.stats().items()
        }

    @property
    def skipped_steps(self) -> int:
        """How many steps were not made because a gradient was not finite (``nonfinite``); the same
        on every rank.
        """
        return self._guard.skipped

    def measure_gradients(self) -> None:
        """Have the next step note the norm of every matrix's gradient, which an engine frees; call
        it on every rank.
        """
        self._measures_gradients, self._gradient_norms = True, {}

    def gradient_norms(self) -> dict[str, float]:
        """Return ‖G‖_F of every matrix, by name, in the steps since :meth:`measure_gradients`; no
        longer measure it.
        """
        self._measures_gradients = False
        return self._gradient_norms

    def _weight(self, buffer: Buffer) -> Tensor:
        """Return what a buffer holds, checked, as a dense tensor."""
        tensor, number = buffer.tensor, id(buffer.tensor)
        check_memory(
            tensor, self._extents[number], "the weight", buffer.name
        )  # its form was read in this step
        return dense(tensor) if self._is_plain else tensor

    def _stepped(self, buffer: Buffer, weight: Tensor, group: dict[str, Any]) -> Stepped | None:
        """Return G, M and V of one buffer (lines 1 and 2), checked; None where it has no
        gradient.
        """
        tensor = buffer.tensor
        if tensor.grad is None:
            return None
        if not self.state[tensor]:
            self.state[tensor] |= new_state(tensor, group, has_step=not self._step_in_group)
        form = self._forms[id(tensor)] if weight is tensor else form_of(weight)
        return gather(weight, form, tensor.grad, self.state[tensor], group, buffer.name)

    def _count(self, tensors: Iterable[Tensor]) -> None:
        """Count the step of every tensor that has a gradient, once nothing can refuse it."""
        if not self._step_in_group:
            for tensor in tensors:
                if tensor.grad is not None:
                    # Not in place: DeepSpeed's universal checkpoint hands one count to several of
                    # ZeRO-3's sub-groups.
                    self.state[tensor]["step"] = counted(self.state[tensor]["step"])

    def _allocate_all(self) -> None:
        """Make the state of every tensor that has none yet, as it is before the first step."""
        for group in self.param_groups:
            for tensor in group["params"]:
                if not self.state[tensor]:
                    self.state[tensor] |= new_state(tensor, group, has_step=not self._step_in_group)

    def _is_construction_call(self) -> bool:
        """True where an engine calls ``step`` with zero gradients while it is built; only the state
        is made then.
        """
        if self._buffers is not None:
            return False
        engine = deepspeed.engine_on_stack(self)
        if engine is None or not deepspeed.is_under_construction(engine):
            return False
        self._allocate_all()
        return True

    def _turns(self) -> list[_Turn]:
        """Return, per device, what this step is made of, every tensor of it checked."""
        group_of = {
            id(tensor): group
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.requires_grad or tensor.grad is not None
        }
        known = self._buffers or {}
        if not self._is_plain and not group_of.keys() <= known.keys():
            first = next((buffer.shards[0].parameter.name for buffer in known.values()), "")
            raise ValueError(
                "AdamW2: the engine steps a tensor that its layout does not have, beside "
                f"parameter '{first}'."
            )
        for group in self.param_groups:
            check_group(group)
        # In the layout's order, which ranks share that hold, and list, different pieces.
        by_device: dict[torch.device, tuple[list[Buffer], list[dict[str, Any]]]] = {}
        for number, buffer in known.items():
            of_buffer = group_of.get(number)
            if of_buffer is None and buffer.param_group is not None:
                of_buffer = self.param_groups[buffer.param_group]
            if of_buffer is not None:
                buffers, groups = by_device.setdefault(buffer.tensor.device, ([], []))
                buffers.append(buffer)
                groups.append(of_buffer)
        turns = []
        for device, (buffers, groups) in by_device.items():
            with _on_device(device):
                matrix_group = self._matrix_group(buffers, groups)
                weights = [self._weight(buffer) for buffer in buffers]
                stepped = [
                    self._stepped(buffer, weight, group)
                    for buffer, weight, group in zip(buffers, weights, groups, strict=True)
                ]
            turns.append(_Turn(matrix_group, weights, stepped, groups))
        return turns

    def _stepped_buffers(self) -> list[Buffer]:
        known = self._buffers or {}
        tensors = (tensor for group in self.param_groups for tensor in group["params"])
        return [known[id(tensor)] for tensor in tensors if id(tensor) in known]

    def _matrix_group(self, buffers: list[Buffer], groups: list[dict[str, Any]]) -> MatrixGroup:
        key = tuple(id(buffer.tensor) for buffer in buffers)
        is_amsgrad = any(group["amsgrad"] for group in groups)
        is_adamw = self._is_adamw(groups)
        matrix_group = self._matrix_groups.get(key)
        if matrix_group is None or (matrix_group.is_adamw, matrix_group.is_amsgrad) != (
            is_adamw,
            is_amsgrad,
        ):
            # It takes the place of older matrix_groups over some of these tensors, from before others were
            # frozen or unfrozen.
            self._matrix_groups = {
                other: matrix_group
                for other, matrix_group in self._matrix_groups.items()
                if not set(other) & set(key)
            }
            iters = self._settings.power_iters
            matrix_group = MatrixGroup(
                buffers, self._thresholds, iters, is_adamw=is_adamw, is_amsgrad=is_amsgrad
            )
            self._matrix_groups[key] = matrix_group
        if self._saved.is_pending:
            self._saved.give(matrix_group, self._steps_done(matrix_group))
        return matrix_group

    def _is_adamw(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether every τ is infinite."""
        return not self._settings.overrides and all(
            group["tau"] == float("inf") for group in groups
        )

    def _steps_done(self, matrix_group: MatrixGroup) -> float:
        if self._step_in_group:
            return float(self.param_groups[0]["step"])
        steps = (
            self.state[tensor].get("step")
            for tensor in matrix_group.tensors
            if self.state.get(tensor)
        )
        first = next(steps, 0.0)
        is_number = isinstance(first, float | int) or (
            isinstance(first, Tensor) and first.numel() == 1
        )
        return float(first) if is_number else float("nan")  # which no checkpoint's is

    def _read_layout(self) -> None:
        """Find out what lies where in the tensors that are stepped, at the first step, when engines
        are done with them.

        Under ZeRO-1 and 2 ``param_groups`` holds one group at a time, but the layout read is that
        of all groups.
        """
        unstepped.note_stepped(self)
        engine = deepspeed.engine_on_stack(self)
        if self._engine_layout is not None:
            layout = self._engine_layout()
        elif engine is not None:
            layout = deepspeed.read_layout(engine)
            deepspeed.tell_norm(engine, self._guard)
        else:
            layout = Layout(self._plain_buffers(), self._model.kinds)
        self._is_plain = self._engine_layout is None and engine is None
        self._thresholds = Thresholds(self._settings, layout, self._auto)
        self._notice()
        self._buffers = {id(buffer.tensor): buffer for buffer in layout.buffers}
        self._forms = {number: form_of(buffer.tensor) for number, buffer in self._buffers.items()}
        # Of an engine's tensors kernels take all elements in a row; of others a copy is made where
        # they do not lie so.
        self._extents = {
            number: extent_of(form) if self._is_plain else prod(form.shape)
            for number, form in self._forms.items()
        }
        self._matrix_groups = {}

    def _notice(self) -> None:
        """Log, once, what was guessed of the parameters, where a τ hangs on it."""
        if not (self._has_noticed or self._is_adamw(self.param_groups)):
            for sentence in self._thresholds.notices():
                self._has_noticed = True
                _log.warning(sentence)

    def _is_laid_out_anew(self) -> bool:
        """Whether a tensor came, or has another shape, dtype, device or memory order than when the
        layout was read.
        """
        known = self._buffers or {}
        if not all(
            has_form(buffer.tensor, self._forms[number]) for number, buffer in known.items()
        ):
            return True
        if not self._is_plain:
            return False
        if self._auto and any(
            is_frozen(b.tensor) != b.shards[0].parameter.is_frozen for b in known.values()
        ):
            return True  # others share the budget
        tensors = (tensor for group in self.param_groups for tensor in group["params"])
        return any(id(tensor) not in known and tensor.grad is not None for tensor in tensors)

    def _plain_buffers(self) -> list[Buffer]:
        names = self._names.resolve(self.param_groups)
        # What torch cannot step either may be in the groups as long as it has no gradient.
        tensors = [
            tensor
            for group in self.param_groups
            for tensor in group["params"]
            if tensor.grad is not None or why_foreign(tensor) is None
        ]
        shardings = shardings_of(
            [(names[id(tensor)], tensor) for tensor in tensors], self._tp_group
        )
        kinds = self._model.kinds
        return [plain_buffer(t, names[id(t)], shardings, kinds.get(names[id(t)])) for t in tensors]


class _Turn(NamedTuple):
    """What is stepped together on one device: a weight that is not dense as a dense copy, G, M and
    V, the groups.
    """

    matrix_group: MatrixGroup
    weights: list[Tensor]
    stepped: list[Stepped | None]
    groups: list[dict[str, Any]]


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _refuse_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError, as torch's optimizers do, where a CUDA graph is captured: counts would
    freeze.
    """
    for name in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",
    ):  # the old name warns
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return
