"""Steps a drawn case on ranks, which are threads (see threads.py), and in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.faults.cases import Case, Drawn
from tests.faults.threads import Group, on_ranks, summing_groups
from weyl_megatron import AdamW2, MatrixStats
from weyl_megatron.engines.given import GivenLayout
from weyl_megatron.layouts.buffers import Buffer, Layout, Shard


class Rank:
    """What one rank steps: tensors, and which elements of which whole parameter lie where in
    them.
    """

    def __init__(
        self,
        case: Case,
        drawn: Drawn,
        rank: int,
        tensor_group: Group | None,
        data_group: Group | None,
    ) -> None:
        self.tp, self.dp = rank % case.tp, rank // case.tp
        self.case, self.dtype = case, drawn.start[0].dtype
        groups = () if data_group is None else (data_group,)
        self.buffers: list[Buffer] = []
        self.held: list[
            list[tuple[int, int, int, int]]
        ] = []  # per buffer: weight, start, stop, offset
        self.of_group: list[list[Tensor]] = [[], []]
        self.bands = [
            weight.band(start, self.tp).reshape(-1)
            for weight, start in zip(case.weights, drawn.start, strict=True)
        ]
        parameters = [weight.parameter(tensor_group, self.tp) for weight in case.weights]
        for group in range(2):
            mine = [n for n, weight in enumerate(case.weights) if weight.group == group]
            for held in self._layout(mine):
                length = max((offset + stop - start for _, start, stop, offset in held), default=0)
                tensor = nn.Parameter(torch.zeros(length, dtype=self.dtype))
                if case.layout == "plain":
                    tensor = nn.Parameter(
                        torch.zeros(parameters[held[0][0]].shape, dtype=self.dtype)
                    )
                shards = tuple(
                    Shard(parameters[n], start, stop, offset) for n, start, stop, offset in held
                )
                is_listed = case.layout != "tensors" or length > 0
                self.buffers.append(Buffer(tensor, shards, groups, None if is_listed else group))
                self.held.append(held)
                if is_listed:
                    self.of_group[group].append(tensor)
                self._fill(tensor, held, self.bands)

    def _layout(self, mine: Sequence[int]) -> list[list[tuple[int, int, int, int]]]:
        """Return, per tensor of a parameter group, what lies in it."""
        case, dp = self.case, self.dp
        sizes = {n: self.bands[n].numel() for n in mine}
        if case.layout == "plain":
            return [[(n, 0, sizes[n], 0)] for n in mine]
        if case.layout == "flat":
            total = sum(sizes.values())
            edges = [0, *(int(cut * total) for cut in case.cuts), total]
            begin, end, at, held = edges[dp], edges[dp + 1], 0, []
            for n in mine:
                start = min(max(begin - at, 0), sizes[n])
                stop = max(start, min(end - at, sizes[n]))
                held.append((n, start, stop, at + start - begin if start < stop else 0))
                at += sizes[n]
            return [held] if mine else []
        spans = {}
        for n in mine:
            edges = [0, *(int(cut * sizes[n]) for cut in case.weights[n].pieces), sizes[n]]
            spans[n] = edges[dp], edges[dp + 1]
        if case.layout == "tensors":
            return [[(n, *spans[n], 0)] for n in mine]
        held, at = [], 0
        for n in mine:
            at += case.gap
            held.append((n, *spans[n], at))
            at += spans[n][1] - spans[n][0]
        return [held] if mine else []

    def _fill(
        self, tensor: Tensor, held: Sequence[tuple[int, int, int, int]], bands: Sequence[Tensor]
    ) -> None:
        with torch.no_grad():
            for n, start, stop, offset in held:
                tensor.view(-1)[offset : offset + stop - start] = bands[n][start:stop]

    def optimizer(self) -> AdamW2:
        groups = [
            {"params": params, **options}
            for params, options in zip(self.of_group, self.case.groups, strict=True)
        ]
        optimizer = AdamW2(groups, **self.case.options)
        optimizer.engine = GivenLayout(lambda: Layout(self.buffers))
        return optimizer

    def give(self, grads: Sequence[Tensor | None]) -> None:
        bands = [
            torch.zeros(0) if grad is None else weight.band(grad, self.tp).reshape(-1)
            for weight, grad in zip(self.case.weights, grads, strict=True)
        ]
        for buffer, held in zip(self.buffers, self.held, strict=True):
            if any(grads[n] is None for n, *_ in held):
                buffer.tensor.grad = None
            else:
                buffer.tensor.grad = torch.zeros_like(buffer.tensor)
                self._fill(buffer.tensor.grad, held, bands)

    def pieces(self) -> list[tuple[int, int, Tensor]]:
        """Return copies of what it holds: the weight's number, where it starts in this rank's band,
        the elements.
        """
        return [
            (n, start, buffer.tensor.detach().view(-1)[offset : offset + stop - start].clone())
            for buffer, held in zip(self.buffers, self.held, strict=True)
            for n, start, stop, offset in held
        ]


Found = tuple[list[list[tuple[int, int, Tensor]]], list[dict[str, MatrixStats]]]


def run_on_ranks(case: Case, drawn: Drawn) -> list[Found]:
    """Return what every rank held, and told, after every step."""
    world = case.tp * case.dp
    tensor_groups = [Group(range(d * case.tp, (d + 1) * case.tp)) for d in range(case.dp)]
    data_groups = [Group(range(t, world, case.tp)) for t in range(case.tp)]

    def run(rank: int) -> Found:
        tensor_group = tensor_groups[rank // case.tp] if case.tp > 1 else None
        data_group = data_groups[rank % case.tp] if case.dp > 1 else None
        mine = Rank(case, drawn, rank, tensor_group, data_group)
        optimizer = mine.optimizer()
        held, told = [], []
        for grads in drawn.grads:
            mine.give(grads)
            optimizer.step()
            held.append(mine.pieces())
            told.append(optimizer.stats())
        return held, told

    with summing_groups():
        return on_ranks(world, [*tensor_groups, *data_groups], run)


def run_whole(case: Case, drawn: Drawn) -> tuple[list[list[Tensor]], list[dict[str, MatrixStats]]]:
    """Return the weights and stats of one process after every step."""
    params = [nn.Parameter(start.clone()) for start in drawn.start]
    groups = [
        {
            "params": [p for p, w in zip(params, case.weights, strict=True) if w.group == group],
            **options,
        }
        for group, options in enumerate(case.groups)
    ]
    kept_whole = [
        {"match": w.name, "fused": 1}
        for w in case.weights
        if w.axis is not None and w.axis == w.dim and not w.pattern
    ]
    options = {**case.options, "overrides": [*case.options["overrides"], *kept_whole]}
    optimizer = AdamW2(groups, **options)
    buffers = [
        Buffer(p, (Shard(weight.parameter(None, 0), 0, p.numel(), 0),))
        for group in range(2)
        for p, weight in zip(params, case.weights, strict=True)
        if weight.group == group
    ]
    optimizer.engine = GivenLayout(lambda: Layout(buffers))
    weights, told = [], []
    for grads in drawn.grads:
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.step()
        weights.append([p.detach().clone() for p in params])
        told.append(optimizer.stats())
    return weights, told


def gathered(case: Case, drawn: Drawn, found: Sequence[Found], step: int) -> list[Tensor]:
    """Return the whole weights after a step; copies of an element have to be the same bits."""
    whole = [torch.full_like(start, torch.nan) for start in drawn.start]
    for rank, (held, _) in enumerate(found):
        for n, start, elements in held[step]:
            weight = case.weights[n]
            index = torch.arange(whole[n].numel()).view(weight.shape)
            where = weight.band(index, rank % case.tp).reshape(-1)[start : start + elements.numel()]
            flat = whole[n].view(-1)
            before = flat[where]
            assert bool(((before == elements) | before.isnan()).all()), (
                f"{weight.name}: copies differ"
            )
            flat[where] = elements
    return whole
