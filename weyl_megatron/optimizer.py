"""AdamW² (Qi et al., "Taming Transformer Without Using Learning Rate Warmup", Algorithm 1), for whole and spread matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from weyl_megatron.integrations import deepspeed
from weyl_megatron.kernels import adamw_direction, adamw_moments, adamw_update
from weyl_megatron.layouts.buffers import Buffer, Parameter, Plan, plan_of
from weyl_megatron.layouts.grid import Grid, grid_of, known_fused, told_fused
from weyl_megatron.layouts.plain import plain_buffer, storage_order
from weyl_megatron.layouts.tensor_parallel import shardings_of
from weyl_megatron.roles import io_parameters
from weyl_megatron.rule import HIDDEN_BUDGET, IO_TAU, clipped_rates, random_sigma, xavier_std
from weyl_megatron.settings import check_adamw, check_settings, check_tau
from weyl_megatron.spectral import PowerIteration

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MatrixStats(NamedTuple):
    """What the last step did to one matrix; the same on every rank."""

    sigma_weight: float  #: σ₁(W) before the step
    sigma_update: float  #: σ₁(U) of the update U = M̂ / (√V̂ + ε)
    lr: float  #: the rate α_W that was used
    clipped: bool  #: whether α_W is below the scheduled rate
    tau: float  #: the threshold τ that held for this matrix


class AdamW2(torch.optim.AdamW):
    r"""AdamW whose rate is bounded, per matrix, so that no step changes a matrix's spectral norm by more than τ.

    .. math::
       \begin{aligned}
            &\textbf{for}\ t = 1, 2, \ldots\ \textbf{do}, \textbf{for each matrix } W                              \\
            &\quad G_t = \nabla_W f_t(W_{t-1})                                                                    \\
            &\quad M_t = \beta_1 M_{t-1} + (1 - \beta_1) G_t, \quad V_t = \beta_2 V_{t-1} + (1 - \beta_2) G_t^2  \\
            &\quad U_t = \hat M_t / (\sqrt{\hat V_t} + \epsilon)                                                  \\
            &\quad \alpha_W = \min(\alpha_t,\ \tau\, \sigma_1(W_{t-1}) / \sigma_1(U_t)) \qquad \text{(Rule 1)}    \\
            &\quad W_t = W_{t-1} - \alpha_W U_t - \alpha_W \lambda W_{t-1}
       \end{aligned}

    By Weyl's inequality then σ₁(W_t) ≤ (1 + τ) σ₁(W_{t-1}). With ``tau=float("inf")`` this is ``torch.optim.AdamW``,
    bit for bit. Matrices are 2-D parameters, convolutions as (out, in·kernel), each expert of a 3-D stack, and each
    part of a fused weight; all other parameters take the scheduled rate. Under DeepSpeed (ZeRO 0–3, AutoTP, an mpu) σ₁
    is that of the whole matrix, measured on the slices that the ranks hold.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or parameter groups; a group may have its own ``"tau"``.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``, defaults included. No warmup is needed.
        tau: τ > 0, or ``"auto"``: hidden matrices share one budget, τ = 0.144 / (number of hidden matrices), embeddings,
            positions and head get 0.1, and σ₁(W) is taken for at least that of a Xavier matrix. The paper uses 0.01 (GPT)
            and 0.004 (ViT, Swin). A small τ acts like a warmup of about ln(α σ₁(U) / (τ σ₁(W))) / τ steps.
        power_iters: block power iterations per step (the first step makes more).
        floor_std: σ₁(W) is taken for at least that of a random matrix of this standard deviation, so that
            zero-initialised matrices move; 0 is the paper's rule, under which they stay zero for ever.
        clip_vectors: bound 1-D parameters, too.
        io: patterns (``fnmatch``) of the names of embeddings, positions and head, for ``tau="auto"``; None: find out.
        overrides: ``{"match": pattern, "tau": 0.1}``, ``{"match": pattern, "exempt": True}`` (scheduled rate),
            ``{"match": pattern, "fused": 3}`` (three stacked matrices, 1: keep whole). The last match counts.
        tp_group: the process group of tensor-parallel parameters where no engine tells it.
        others: keys of AdamW configurations that change nothing (``torch_adam``, ``adam_w_mode``, …).

    Raises:
        ValueError: an unknown key or an impossible value, at construction; at the first step a parameter that the
            engine holds in a way that is not understood.

    Example::

        optimizer = AdamW2(model.named_parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, tau=0.01)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        tau: float | str = 0.01,
        power_iters: int = 2,
        floor_std: float = 1e-3,
        clip_vectors: bool = False,
        io: Sequence[str] | None = None,
        overrides: Sequence[Mapping[str, Any]] = (),
        tp_group: ProcessGroup | None = None,
        **others: Any,
    ) -> None:
        check_adamw(lr, betas, eps, weight_decay)
        self._settings = check_settings(
            tau=tau,
            power_iters=power_iters,
            floor_std=floor_std,
            clip_vectors=clip_vectors,
            io=io,
            overrides=overrides,
            others=others,
        )
        self._tp_group = tp_group
        self._names: dict[int, str] = {}  # of the parameters that were given, by id
        self._buffers: dict[int, Buffer] = {}  # the layout, by id of the tensor that is stepped
        self._walks: dict[tuple[int, ...], _Walk] = {}  # by the ids of the tensors that are stepped together
        self._io: set[str] | None = None  # names of embeddings, positions and head; found out where "auto" is used
        self._hidden = 0  # how many matrices are none of these
        self._auto = "auto" in [tau, *(override.get("tau") for override in self._settings.overrides)]
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.defaults["tau"] = tau
        deepspeed.allow_under_zero(type(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; ``"params"`` may be ``(name, parameter)`` pairs, and ``"tau"`` may be given."""
        group = dict(param_group)
        group.setdefault("tau", self._settings.tau)
        check_tau("a parameter group's tau", group["tau"])
        self._auto = self._auto or group["tau"] == "auto"
        if not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
            for number, item in enumerate(group["params"]):
                if isinstance(item, tuple):
                    name, group["params"][number] = item
                    self._names[id(group["params"][number])] = name.removeprefix("module.")
        super().add_param_group(group)
        for number, param in enumerate(self.param_groups[-1]["params"]):
            self._names.setdefault(id(param), f"group{len(self.param_groups) - 1}.param{number}")
        self._buffers, self._walks = {}, {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("tau", self._settings.tau)  # the checkpoint of an AdamW has none
        for walk in self._walks.values():
            walk.power.forget()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step (Algorithm 1); return what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_construction_call():
            return loss
        for walk in self._stepped_together():
            stepped = [self._moments(tensor, group) for tensor, group in walk.stepping()]
            weights = [flat(tensor) for tensor in walk.tensors]
            updates = [
                torch.zeros_like(w)
                if moments is None
                else adamw_direction(*moments.averages, step=moments.step, beta2=moments.beta2, eps=moments.eps)
                for w, moments in zip(weights, stepped, strict=True)
            ]
            sigmas = walk.power.sigmas([weights, updates]).double().cpu()
            rates = walk.rates(stepped, *sigmas)
            for number, moments in enumerate(stepped):
                if moments is not None:
                    self._apply(walk, number, weights[number], moments, rates)
        return loss

    def stats(self) -> dict[str, MatrixStats]:
        """Return what the last step did to every matrix, by name; the same on every rank that holds a piece of it."""
        return {name: entry for walk in self._walks.values() for name, entry in walk.stats().items()}

    def _moments(self, tensor: Tensor, group: dict[str, Any]) -> _Moments | None:
        """Update M and V of one tensor (lines 3 and 4); None where it has no gradient."""
        grad = tensor.grad
        if grad is None:
            return None
        if grad.is_sparse:
            raise ValueError("AdamW2: a parameter got a sparse gradient, it takes dense ones.")
        state = self.state[tensor]
        if not state:
            self._allocate(tensor)
        # Not in place: DeepSpeed's universal checkpoint hands one step tensor to several of ZeRO-3's sub-groups.
        state["step"] = state["step"] + 1
        beta1, beta2 = group["betas"]
        if grad.stride() != tensor.stride():
            grad = torch.empty_like(tensor).copy_(grad)
        averages = state["exp_avg"], state["exp_avg_sq"]
        adamw_moments(grad, *averages, beta1=beta1, beta2=beta2)
        return _Moments(
            (flat(averages[0]), flat(averages[1])),
            float(state["step"]),
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
        )

    def _allocate(self, tensor: Tensor) -> None:
        state = self.state[tensor]
        state["step"] = torch.tensor(0.0, dtype=torch.get_default_dtype())
        state["exp_avg"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(tensor, memory_format=torch.preserve_format)

    @staticmethod
    def _apply(walk: _Walk, number: int, weight: Tensor, moments: _Moments, rates: list[float]) -> None:
        """Move the weights of one buffer, every run of it at its rate (lines 10 to 14)."""
        runs = walk.plan.runs[number]
        of_run = [moments.lr if run.matrix is None else rates[run.matrix] for run in runs]
        settings = {
            "step": moments.step,
            "beta1": moments.beta1,
            "beta2": moments.beta2,
            "eps": moments.eps,
            "weight_decay": moments.weight_decay,
        }
        if len(set(of_run)) == 1:
            adamw_update(weight, *moments.averages, lr=of_run[0], **settings)
            return
        for run, rate in zip(runs, of_run, strict=True):
            size, stride = (run.rows, run.cols), (run.stride, 1)
            pieces = (
                buffer.as_strided(size, stride, buffer.storage_offset() + run.offset)
                for buffer in (weight, *moments.averages)
            )
            adamw_update(*pieces, lr=rate, **settings)

    def _is_construction_call(self) -> bool:
        """True where an engine calls ``step`` with zero gradients while it is built; only the state is made then."""
        if self._buffers:
            return False
        engine = deepspeed.engine_on_stack(self)
        if engine is None or not deepspeed.is_under_construction(engine):
            return False
        for group in self.param_groups:
            for param in group["params"]:
                self._allocate(param)
        return True

    def _stepped_together(self) -> Iterator[_Walk]:
        """Yield the walks of this step: the tensors in the parameter groups, per device."""
        by_device: dict[torch.device, list[tuple[Tensor, dict[str, Any]]]] = {}
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.requires_grad or tensor.grad is not None:
                    by_device.setdefault(tensor.device, []).append((tensor, group))
        for pairs in by_device.values():
            key = tuple(id(tensor) for tensor, _ in pairs)
            if key not in self._walks:
                self._plan_walk(key, pairs)
            self._walks[key].groups = [group for _, group in pairs]
            yield self._walks[key]

    def _plan_walk(self, key: tuple[int, ...], pairs: list[tuple[Tensor, dict[str, Any]]]) -> None:
        if any(number not in self._buffers for number in key):
            self._read_layout(pairs)
        buffers = [self._buffers[number] for number in key]
        plan = plan_of(buffers, self._grid)
        dtype = torch.float64 if all(b.tensor.dtype == torch.float64 for b in buffers) else torch.float32
        power = PowerIteration(
            plan.matrices,
            plan.tiles,
            operands=2,
            iters=self._settings.power_iters,
            device=buffers[0].tensor.device,
            dtype=dtype,
        )
        # A walk over some of the tensors of an older one takes its place: frozen parameters, unfrozen ones.
        self._walks = {old: walk for old, walk in self._walks.items() if not set(old) & set(key)}
        self._walks[key] = _Walk([b.tensor for b in buffers], plan, power, self._floor_and_tau)

    def _read_layout(self, pairs: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """Find out, at the first step, what lies where in the tensors that are stepped."""
        engine = deepspeed.engine_on_stack(self)
        module = None
        if engine is not None:
            layout = deepspeed.read_layout(engine)
            module, buffers = layout.module, layout.buffers
        else:
            tensors = [tensor for group in self.param_groups for tensor in group["params"]]
            foreign = next((number for number, t in enumerate(tensors) if id(t) not in self._names), None)
            if foreign is not None:
                first = next(iter(self._names.values()))
                raise ValueError(
                    f"AdamW2: an engine replaced parameter '{first}' or one beside it by a tensor of shape "
                    f"{tuple(tensors[foreign].shape)}, whose layout AdamW2 does not understand; it takes plain "
                    f"parameters, DDP, and DeepSpeed's engine."
                )
            shardings = shardings_of([(self._names[id(t)], t) for t in tensors], self._tp_group)
            buffers = [plain_buffer(tensor, self._names[id(tensor)], shardings) for tensor in tensors]
        self._buffers = {id(buffer.tensor): buffer for buffer in buffers}
        if any(id(tensor) not in self._buffers for tensor, _ in pairs):
            raise ValueError(
                f"AdamW2: the engine steps a tensor that its layout does not have, beside parameter "
                f"'{buffers[0].shards[0].parameter.name}'."
            )
        self._resolve(buffers, module)

    def _resolve(self, buffers: list[Buffer], module: torch.nn.Module | None) -> None:
        """Decide what depends on all parameters together: the shares of tau="auto"."""
        parameters = [shard.parameter for buffer in buffers for shard in buffer.shards]
        names = [parameter.name for parameter in parameters]
        self._settings.check_matches(names)
        if not self._auto:
            return
        self._io = io_parameters(names, module, self._settings.io)
        grids = [self._grid(parameter) for parameter in parameters if parameter.name not in self._io]
        self._hidden = sum(len(grid.matrices) for grid in grids if grid is not None)

    def _grid(self, parameter: Parameter) -> Grid | None:
        """Return which matrices a parameter holds, or None where it takes the scheduled rate."""
        if self._settings.override(parameter.name, "exempt", False):
            return None
        if parameter.is_vector and not (self._settings.clip_vectors and len(parameter.shape) == 1):
            return None
        told = self._settings.override(parameter.name, "fused")
        if told is None:
            fused = known_fused(parameter.name, parameter.shape)
        else:
            fused = None if told == 1 else told_fused(parameter.name, parameter.shape, told)
        try:
            return grid_of(parameter.shape, sharding=parameter.sharding, fused=fused)
        except ValueError as error:
            raise ValueError(f"AdamW2: parameter '{parameter.name}': {error}.") from None

    def _floor_and_tau(self, parameter: Parameter, rows: int, cols: int, tau: float | str) -> tuple[float, float]:
        """Return (floor under σ₁(W), τ) of one matrix, whose parameter group says ``tau``."""
        tau = self._settings.override(parameter.name, "tau", tau)
        if tau == "auto":
            if self._io is None:
                raise ValueError("AdamW2: a parameter group's tau became 'auto' after construction, it takes a number then.")
            share = IO_TAU if parameter.name in self._io else HIDDEN_BUDGET / self._hidden
            return random_sigma(rows, cols, xavier_std(rows, cols)), share
        return random_sigma(rows, cols, self._settings.floor_std), float(tau)


class _Moments(NamedTuple):
    """M and V of one tensor after lines 3 and 4, flat, with the hyperparameters of its group."""

    averages: tuple[Tensor, Tensor]
    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass
class _Walk:
    """Tensors that are stepped together; every rank of their groups walks the same matrices in the same order."""

    tensors: list[Tensor]
    plan: Plan
    power: PowerIteration
    floor_and_tau: Callable[[Parameter, int, int, float | str], tuple[float, float]]
    groups: list[dict[str, Any]] | None = None  # the parameter group of each tensor, as of this step
    measured: tuple[Tensor, ...] = ()

    def stepping(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return zip(self.tensors, self.groups or [], strict=True)

    def rates(self, stepped: Sequence[_Moments | None], sigma_weight: Tensor, sigma_direction: Tensor) -> list[float]:
        """Return α_W of every matrix (lines 6 to 9)."""
        of = [stepped[number] for number in self.plan.buffer_of]
        groups = [(self.groups or [])[number] for number in self.plan.buffer_of]
        limits = [
            self.floor_and_tau(parameter, matrix.rows, matrix.cols, group["tau"])
            for parameter, matrix, group in zip(self.plan.parameters, self.plan.matrices, groups, strict=True)
        ]
        lr = torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float64)
        tau = torch.tensor([tau for _, tau in limits], dtype=torch.float64)
        floor = torch.tensor([floor for floor, _ in limits], dtype=torch.float64)
        correction = torch.tensor([1.0 if m is None else 1 - m.beta1**m.step for m in of], dtype=torch.float64)
        sigma_update = sigma_direction / correction
        rates = clipped_rates(lr, tau, floor, sigma_weight, sigma_update)
        self.measured = sigma_weight, sigma_update, rates, rates < lr, tau
        return [float(rate) for rate in rates.tolist()]

    def stats(self) -> dict[str, MatrixStats]:
        columns = zip(*(column.tolist() for column in self.measured), strict=True)
        return {matrix.name: MatrixStats(*row) for matrix, row in zip(self.plan.matrices, columns, strict=False)}


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor as they lie in memory."""
    return tensor.detach().permute(storage_order(tensor)).view(-1)
