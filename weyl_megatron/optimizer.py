"""AdamW², Algorithm 1 of Qi et al., "Taming Transformer Without Using Learning Rate Warmup"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import moments, packed
from .engines import engine as engines
from .group_options import check_group, options_of, read_group, restore_options
from .layouts.modules import SeenModel
from .matrix_groups import MatrixGroups, Turn, is_adamw
from .names import ParameterNames, take_names
from .nonfinite import Guard
from .saved import write
from .settings import BALANCED, check_adamw, check_settings, project_any
from .spikes import Spike, Spikes
from .state import check_loaded, check_saved_groups, counts_on_host, new_state, steps_done
from .stats import MatrixStats
from .tensors import SteppedTensors, on_device, refuse_capture
from .thresholds import Thresholds

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AdamW2", "MatrixStats"]


class AdamW2(torch.optim.AdamW):
    r"""AdamW whose rate is bounded, per matrix, so that no step changes a matrix's spectral norm by
    more than τ.

    .. math::
       \begin{aligned}
            &\textbf{for}\ t = 1, 2, \ldots\ \textbf{do}, \textbf{for each matrix } W      \\
            &\quad G_t = \nabla_W f_t(W_{t-1})                                             \\
            &\quad M_t = \beta_1 M_{t-1} + (1 - \beta_1) G_t                               \\
            &\quad V_t = \beta_2 V_{t-1} + (1 - \beta_2) G_t^2                             \\
            &\quad U_t = \hat M_t / (\sqrt{\hat V_t} + \epsilon)                           \\
            &\quad \alpha_W = \min(\alpha_t,\ \tau\, \sigma_1(W_{t-1}) / \sigma_1(U_t))
                \qquad \text{(Rule 1)}                                                     \\
            &\quad W_t = W_{t-1} - \alpha_W U_t - \alpha_W \lambda W_{t-1}
       \end{aligned}

    By Weyl's inequality then σ₁(W_t) ≤ (1 + τ) σ₁(W_{t-1}). With ``tau=float("inf")`` this is
    ``torch.optim.AdamW``, bit for bit. Matrices are 2-D parameters, convolutions as (out,
    in·kernel), each expert of a 3-D stack, and each part of a fused weight; all other parameters
    take the scheduled rate. Under an engine σ₁ is that of the whole matrix, measured on the slices
    that the ranks hold.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or parameter groups of either; a group may
            have its own ``"tau"``, ``"clip"`` and ``"vectors"``.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.AdamW``, defaults and
            tensors included. No warmup is needed.
        tau: τ > 0; the paper uses 0.01 (GPT) and 0.004 (ViT, Swin). Or ``"balanced"`` (``"auto"``,
            too, where Hugging Face does not read it): hidden matrices share one budget, τ = 0.144 /
            (number of hidden matrices), embeddings, positions and head get 0.1, and σ₁(W) has a
            higher floor (docs/tau.md). A small τ acts like a warmup, which the command ``plan``
            forecasts.
        power_iters: block power iterations per step, half where more add nothing; at first, more.
        floor_std: σ₁(W) is taken for at least that of a random matrix of this standard deviation,
            so that zero-initialised matrices move; 0 is the paper's rule, under which they never
            do. Unless it is 0, LoRA's A and B are taken for at least a Xavier matrix.
        clip_vectors: bound 1-D parameters, too.
        io: patterns (``fnmatch``) of the names of embeddings, positions and head; None: find out.
        overrides: ``{"match": pattern, "tau": 0.1}``, ``{"match": pattern, "exempt": True}``
            (scheduled rate), ``{"match": pattern, "fused": 3}`` (three stacked matrices, 1: keep
            whole), ``{"match": pattern, "kind": "convolution"}`` or ``"experts"`` (what a weight of
            three dimensions is). The last match counts.
        nonfinite: what becomes of a step with a gradient that is NaN or infinite: "skip" (on all
            ranks alike, logged and counted in ``skipped_steps``), "raise", or "off", as in AdamW.
            None: "skip" where an engine has the norm of all gradients anyway, else "off".
        nonfinite_limit: RuntimeError after so many skipped steps in a row; None: never.
        spike: "log" tells of updates and gradients that jump out of what is usual; "skip" does
            not make a step whose gradients do (docs/spikes.md).
        clip: what Rule 1 does to an update that is too large: "scale" (the paper), or "project",
            which clips the singular values of hidden matrices' updates, as far as ``vectors``
            (1 to 64, by default 8) see them (docs/projection.md).
        state_dtype: what M and V are kept in, "float32", "bfloat16", or a pair of these; None: as
            their weights. V stays in float32 where bfloat16 would freeze it (docs/memory.md).
        tp_group: the process group of tensor-parallel parameters where no engine tells it.
        budget_group: likewise, of ranks with other parameters, as stages (docs/pipelining.md).
        model: the module of the parameters, where no engine shows it: it tells convolutions,
            experts, embeddings, and names that parameters lack. It is looked at, and not kept.
        others: keys of AdamW configurations that change nothing (``adam_w_mode``, …).

    Raises:
        ValueError: an unknown key or an impossible value, at construction; at the first step a
            parameter that the engine holds in a way that is not understood.
        FloatingPointError: a gradient is not finite, where ``nonfinite`` is "raise".
        RuntimeError: after ``nonfinite_limit`` skipped steps in a row.

    Example::

        optimizer = AdamW2(
            model.named_parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, model=model
        )
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
        spike: str | None = None,
        clip: str = "scale",
        vectors: int | None = None,
        state_dtype: Any = None,
        tp_group: ProcessGroup | None = None,
        budget_group: ProcessGroup | None = None,
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
            spike=spike,
            clip=clip,
            vectors=vectors,
            state_dtype=state_dtype,
            others=others,
        )
        self._shares_budget = self._settings.shares_budget()
        self._groups, self._model = engines.user_groups(tp_group, budget_group), SeenModel(model)
        self._start(MatrixGroups())
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self._model.check_knows(name for group in self._names.listed() for name in group)
        self.defaults["tau"] = self._settings.tau
        engines.note_made(self)

    def _start(self, groups: MatrixGroups) -> None:
        """Know nothing of the parameters so far, as a new optimizer and as a copy of one."""
        self._engine: engines.Engine | None = None
        settings = self._settings
        self._guard = Guard(settings.nonfinite, settings.nonfinite_limit, self._groups[1])
        self._spikes = Spikes(settings.spike)
        self._names = ParameterNames()
        self._tensors: SteppedTensors | None = None  # None: their layout was not read yet
        self._matrix_groups = groups
        self._has_noticed = False  # logged what was guessed of the parameters, that a τ hangs on
        self._measures_gradients, self._gradient_norms = False, dict[str, float]()

    @property
    def engine(self) -> engines.Engine | None:
        """What holds the parameters, where it set itself here; else it is looked for in a step."""
        return self._engine

    @engine.setter
    def engine(self, engine: engines.Engine) -> None:
        self._engine, self._tensors = engine, None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in the constructor's ``params``."""
        group = read_group(param_group, self._settings)
        self._shares_budget = self._shares_budget or group["tau"] == BALANCED
        names = take_names(group)
        super().add_param_group(group)
        params = self.param_groups[-1]["params"]
        self._names.add(params, names or self._model.names(params))
        self._model.rename(params, self._names.listed()[-1])
        self._tensors = None
        self._matrix_groups.clear()

    def __getstate__(self) -> dict[str, Any]:
        saved = self._matrix_groups.copied(self._steps_done)
        names = self._names.listed()
        own = self._settings, self._shares_budget, self._groups, names, saved, self._model.kinds
        return {**super().__getstate__(), "adamw2": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        own = state.pop("adamw2", None)  # of a copied or unpickled optimizer
        if own is None:  # of load_state_dict
            has_step = not self._counts_in_groups()
            check_loaded(state["param_groups"], state["state"], self._names.known(), has_step)
        if self._counts_in_groups():
            torch.optim.Optimizer.__setstate__(self, state)  # AdamW looks for the step in the state
        else:
            super().__setstate__(state)
        if own is None:
            self.forget()
        else:
            self._settings, self._shares_budget, self._groups, names, saved, kinds = own
            self._model = SeenModel(kinds=kinds)
            self._start(MatrixGroups(saved))
            self._names.restore(self.param_groups, names)
        for group in self.param_groups:
            group.setdefault("tau", self._settings.tau)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's with the power vectors, so that a run resumes exactly: in the first
        parameter group, or for ``torch.distributed.checkpoint`` in the states (docs/fsdp2.md).
        """
        state = super().state_dict()
        packed.take_out(state["state"])
        if packed.is_asking():
            of_tensors = self._matrix_groups.packed(self._steps_done, self._names.known())
            packed.write(state, self.param_groups, self.state, of_tensors)
        elif vectors := self._matrix_groups.records(self._steps_done):
            write(vectors, self.param_groups, state["param_groups"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of an AdamW², or of an AdamW; then the next step measures afresh."""
        saved_groups = state_dict["param_groups"]
        is_final = not self._optimizer_load_state_dict_pre_hooks  # they may mend the sizes
        check_saved_groups(self.param_groups, saved_groups, are_sizes_known=is_final)
        options = options_of(self.param_groups)
        were_named = ["param_names" in group for group in self.param_groups]
        states = dict(state_dict["state"])
        vectors = packed.by_name(packed.take_out(states), saved_groups, self._names.listed())
        super().load_state_dict({**state_dict, "state": states})
        restore_options(self.param_groups, options, saved_groups)
        moments.keep(self.state, self.param_groups, states, saved_groups, self._dtypes())
        counts_on_host(self.state)
        self._matrix_groups.match(self._names, were_named, self.param_groups, saved_groups)
        self._matrix_groups.take(self.param_groups)
        self._matrix_groups.take_packed(vectors)

    def forget(self) -> None:
        """Have the next step measure afresh, as a first one does; call it on all ranks or none."""
        self._matrix_groups.forget()

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
        refuse_capture(self)
        tensors = self._laid_out()
        # Some engines put them there with no call of load_state_dict, and in all groups.
        self._matrix_groups.take(self.param_groups)
        if not self._guard.admits(tensors.in_groups(self.param_groups)):
            return loss
        turns = self._turns(tensors)  # all are checked before the first of them moves
        if not self._spikes.admits(self._guard, turns):
            return loss
        for turn in turns:
            group = turn.group
            stepped = turn.gathered.stepped
            with on_device(turn.weights[0].device):
                if self._measures_gradients:
                    self._gradient_norms |= group.gradient_norms(stepped)
                group.begin(turn.weights, stepped, turn.members.param_groups)
                if not self._counts_in_groups():
                    turn.members.count(turn.gathered)
                # Lines 3 to 14 in one pass, where α is proved to be within Rule 1.
                settled = group.move_early()
                for batch in group.waiting(settled):
                    sigma_weight, sigma_update = group.sigmas(batch)  # lines 3 to 6
                    rates = group.rates(sigma_weight, sigma_update)  # lines 7 to 9
                    group.move(batch, rates)  # lines 10 to 14
                group.end(settled)
                turn.members.write_back(turn.weights, stepped)
        self._spikes.observe(turns)
        if self._counts_in_groups():
            for param_group in self.param_groups:
                param_group["step"] += 1
        return loss

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last step did to every matrix, by name, alike on ranks that share it."""
        return self._matrix_groups.stats()

    def tell_norm(self, norm: float | Tensor) -> None:
        """Tell the next step the norm of all gradients, from before you clipped them."""
        self._guard.tell(norm)

    @property
    def skipped_steps(self) -> int:
        """How many steps ``nonfinite`` and ``spike`` prevented, on all ranks."""
        return self._guard.skipped

    @property
    def spikes(self) -> list[Spike]:
        """What jumped in the last hundred steps in which anything did, where ``spike`` is set."""
        return list(self._spikes.spikes)

    def measure_gradients(self) -> None:
        """Have the next step note ‖G‖_F of every matrix, before it is freed; call on every rank."""
        self._measures_gradients, self._gradient_norms = True, {}

    def gradient_norms(self) -> dict[str, float]:
        """Return ‖G‖_F of every matrix since :meth:`measure_gradients`; it is no longer noted."""
        self._measures_gradients = False
        return self._gradient_norms

    def allocate_state(self) -> None:
        """Make the state of every tensor that has none yet, as it is before the first step."""
        for group in self.param_groups:
            for tensor in group["params"]:
                self._allocate(tensor, group)

    def _allocate(self, tensor: Tensor, group: dict[str, Any]) -> None:
        if not self.state[tensor]:
            has_step = not self._counts_in_groups()
            self.state[tensor] |= new_state(tensor, group, has_step=has_step, dtypes=self._dtypes())

    def _dtypes(self) -> moments.Dtypes | None:
        engine = self._engine
        return self._settings.state_dtype or (engine.moment_dtypes if engine else None)

    def _counts_in_groups(self) -> bool:
        """Whether the count of steps is in ``param_groups``, not in the state."""
        engine = self.__dict__.get("_engine")  # torch asks before a copy has any
        return engine is not None and engine.counts_in_groups

    def _steps_done(self, tensors: Iterable[Tensor]) -> float:
        if self._counts_in_groups():
            return float(self.param_groups[0]["step"])
        return steps_done(self.state, tensors)

    def _is_construction_call(self) -> bool:
        """Whether an engine that is built, or a checkpoint, only wants the state to be made."""
        if packed.is_initializing():
            for turn in self._turns(self._laid_out()):
                packed.reserve(self.state[tensor] for tensor in turn.group.matrix_tensors())
            return True
        if self._tensors is not None or self._engine is None or not self._engine.is_constructing():
            return False
        self.allocate_state()
        return True

    def _laid_out(self) -> SteppedTensors:
        """Return what lies where in the tensors of all parameter groups, read when engines are done
        with them, at the first step, and anew where it has changed.
        """
        tensors, budget = self._tensors, self._shares_budget
        if tensors and not tensors.have_changed(self.param_groups, share_a_budget=budget):
            return tensors
        engines.note_stepped(self)
        known = engines.Known(
            self.param_groups,
            lambda: self._names.resolve(self.param_groups),
            self._model.kinds,
            *self._groups,
        )
        engine = engines.find(known) if self._engine is None else self._engine
        layout = engine.read_layout(known)
        engine.give_norm(self._guard)
        projects = project_any(self._settings, self.param_groups)
        self._thresholds = Thresholds(self._settings, layout, budget, projects)
        if not (self._has_noticed or is_adamw(self._settings, self.param_groups)):
            self._has_noticed = self._thresholds.notice()
        self._tensors = SteppedTensors(layout.buffers, are_parameters=engine.steps_parameters)
        self._matrix_groups.clear()
        return self._tensors

    def _turns(self, tensors: SteppedTensors) -> list[Turn]:
        """Return, per device, what this step is made of, every tensor of it checked."""
        for param_group in self.param_groups:
            check_group(param_group)
        turns = []
        for device, members in tensors.by_device(self.param_groups).items():
            with on_device(device):
                group = self._matrix_groups.group(
                    members, self._thresholds, self._settings, self._steps_done
                )
                weights = tensors.weights(members)
                # Lines 1 and 2.
                gathered = members.gather(weights, self.state, self._allocate, self._dtypes())
            turns.append(Turn(group, members, weights, gathered))
        return turns
