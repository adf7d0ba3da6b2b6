"""AdamW² on the CPU under Megatron's distributed optimizer: ``optimizer_cpu_offload``.

The device keeps the weights and Megatron's buffers of gradients, and nothing else; float32 masters,
M and V are in the host's memory, where AdamW2 steps what this rank has of every matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...optimizer import AdamW2

_MASTER = "master_param"


class CpuOffload:
    """What Megatron's DistributedOptimizer takes for its optimizer: in its parameter groups are
    pieces of the model's weights, whose gradients are their ``decoupled_grad``.

    Anything else that is asked of it is asked of the AdamW2.

    Args:
        optimizer: the AdamW2; its parameter groups, of pieces of weights, become this one's, and it
            gets masters of them.
        pin_params, pin_grads: whether masters and gradients are in pinned memory, where the pieces
            are on a GPU.
    """

    def __init__(
        self, optimizer: AdamW2, *, pin_params: bool = True, pin_grads: bool = True
    ) -> None:
        self.optimizer = optimizer
        self.param_groups: list[dict[str, Any]] = optimizer.param_groups
        self._pins_grads = pin_grads
        self._masters: dict[Tensor, Tensor] = {}
        groups = []
        for group in self.param_groups:
            for piece in group["params"]:
                master = piece.detach().to("cpu", torch.float32, copy=True)
                self._masters[piece] = (
                    master.pin_memory() if piece.is_cuda and pin_params else master
                )
            groups.append({**group, "params": [self._masters[p] for p in group["params"]]})
        optimizer.param_groups = groups
        self._grads: dict[Tensor, Tensor] = {}  # in the host's memory, kept

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # as it is copied, before it has one
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def master(self, piece: Tensor) -> Tensor:
        """Return the master, on the CPU, of a piece of a weight."""
        return self._masters[piece]

    @torch.no_grad()
    def step(self) -> None:
        """Make one step of the masters, and copy them to the weights."""
        self._give_options(self.param_groups, self.optimizer.param_groups)
        devices = set()
        for piece, master in self._masters.items():
            grad = getattr(piece, "decoupled_grad", None)
            master.grad = None if grad is None else self._on_host(piece, master, grad)
            devices.add(piece.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self.optimizer.step()
        for piece, master in self._masters.items():
            if master.grad is not None:
                piece.data.copy_(master, non_blocking=True)
        self._give_options(self.optimizer.param_groups, self.param_groups)  # the count of steps

    def _on_host(self, piece: Tensor, master: Tensor, grad: Tensor) -> Tensor:
        if piece not in self._grads:
            pins = piece.is_cuda and self._pins_grads
            self._grads[piece] = torch.empty_like(master, pin_memory=pins)
        return self._grads[piece].copy_(grad, non_blocking=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or make them zero."""
        for piece, master in self._masters.items():
            master.grad = None
            grad = getattr(piece, "decoupled_grad", None)
            if grad is not None and set_to_none:
                piece.decoupled_grad = None  # type: ignore[attr-defined]
            elif grad is not None:
                grad.zero_()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights, which something else has written, to the masters."""
        for piece, master in self._masters.items():
            master.copy_(piece)

    @property
    def state(self) -> Mapping[Tensor, Mapping[str, Tensor]]:
        """The state of every piece, with its master; empty before it is allocated."""
        return _States(self._masters, self.optimizer.state)

    def initialize_state(self, _: Tensor) -> None:
        """Allocate, as FusedAdam does for one piece, here for all."""
        self.optimizer.allocate_state()

    def get_unscaled_state(self, piece: Tensor, name: str) -> Tensor:
        """Return M, V or the master of a piece, as FusedAdam does."""
        return self.state[piece][name]

    @torch.no_grad()
    def set_scaled_state(self, piece: Tensor, name: str, value: Tensor) -> None:
        """Set M, V or the master of a piece, as FusedAdam does."""
        self.optimizer.allocate_state()
        held = self.state[piece].get(name)
        if held is not None:  # Megatron hands over what it notes of a bucket, too
            held.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the AdamW2's, and the masters in its states."""
        saved = self.optimizer.state_dict()
        masters = {number: master for number, _, master in self._numbered(saved)}
        states = {
            number: {**state, _MASTER: masters[number]} for number, state in saved["state"].items()
        }
        return {**saved, "state": states}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        for number, _, master in self._numbered(state_dict):
            value = state_dict["state"].get(number, {}).get(_MASTER)
            if value is not None and value is not master:
                master.copy_(value)
        states = {
            number: {key: value for key, value in state.items() if key != _MASTER}
            for number, state in state_dict["state"].items()
        }
        self.optimizer.load_state_dict({**state_dict, "state": states})
        self._give_options(self.optimizer.param_groups, self.param_groups)

    def _numbered(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the state dict's number, the piece and the master of all."""
        pairs = zip(state_dict["param_groups"], self.param_groups, strict=True)
        for saved, group in pairs:
            for number, piece in zip(saved["params"], group["params"], strict=True):
                yield number, piece, self._masters[piece]

    @staticmethod
    def _give_options(groups: list[dict[str, Any]], to: list[dict[str, Any]]) -> None:
        for group, other in zip(groups, to, strict=True):
            other.update({key: value for key, value in group.items() if key != "params"})


class _States(Mapping[Tensor, Mapping[str, Tensor]]):
    """What is kept of the pieces that have a state."""

    def __init__(self, masters: Mapping[Tensor, Tensor], states: Mapping[Tensor, Any]) -> None:
        self._masters, self._states = masters, states

    def __getitem__(self, piece: Tensor) -> Mapping[str, Tensor]:
        master = self._masters[piece]
        return {**self._states[master], _MASTER: master}

    def __iter__(self) -> Iterator[Tensor]:
        return (piece for piece, master in self._masters.items() if self._states.get(master))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def offload(wrapper: Any, config: Any) -> None:
    """Put the AdamW2 of Megatron's DistributedOptimizer on the CPU.

    Args:
        wrapper: Megatron's optimizer, as it was built with an AdamW2.
        config: its configuration.

    Raises:
        ValueError: a weight is of a dtype that has no pieces.
    """
    for group in wrapper.optimizer.param_groups:
        if any(piece is None for piece in group["params"]):
            raise ValueError(
                "AdamW2: optimizer_cpu_offload got True beside weights in fp8, it takes weights in "
                "bf16, fp16 or fp32."
            )
    wrapper.optimizer = CpuOffload(
        wrapper.optimizer,
        pin_params=getattr(config, "pin_cpu_params", True),
        pin_grads=getattr(config, "pin_cpu_grads", True),
    )
    reload_model_params = wrapper.reload_model_params

    @functools.wraps(reload_model_params)
    def and_refresh(*args: Any, **kwargs: Any) -> Any:
        wrapper.optimizer.refresh()
        return reload_model_params(*args, **kwargs)

    wrapper.reload_model_params = and_refresh
