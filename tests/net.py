"""The small network that engines train in the tests, its data, and the same training in one
process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests import tolerances
from weyl_megatron import AdamW2
from weyl_megatron.reference import AdamW2Reference, BlockPower

VOCAB, WIDTH, HIDDEN, LENGTH = 37, 22, 35, 6
STEPS, ACCUMULATION, MICRO = 10, 4, 2
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "tau": 0.01,
}
AUTO = {"tau": "auto", "lr": 0.3}  # a rate at which its larger thresholds clip
NO_DECAY = ("bias", "norm.weight", "embed.weight")


class Net(nn.Module):
    """Odd-shaped matrices, gains and biases: no slice of equal size falls on row boundaries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        return nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten()
        )


class MixedNet(nn.Module):
    """Beside those, GPT-2's fused QKV in Hugging Face's orientation, a convolution and stacked
    experts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.patch = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.c_attn = nn.Linear(
            3 * WIDTH, WIDTH
        )  # its weight is (in, out) of Conv1D: used transposed
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH - 4) * 0.2)
        self.back = nn.Linear(WIDTH - 4, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.patch(x.unsqueeze(1)).mean(-1).transpose(1, 2)
        q, k, v = (x @ self.c_attn.weight).chunk(3, -1)
        x = x + torch.tanh(q * k) * v + self.c_attn.bias
        x = x + self.back(torch.einsum("btw,ewo->bto", x, self.experts).tanh())
        return nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten()
        )


class ModulesNet(nn.Module):
    """Weights that their modules alone tell: experts of a convolution's shape, convolutions,
    attention, gates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.conv = nn.Conv1d(WIDTH, 17, 3, padding=1)
        self.grouped = nn.Conv1d(17, 17 * 2, 5, padding=2, groups=17)
        self.spread = nn.ConvTranspose1d(17 * 2, WIDTH, 3, padding=1, groups=2)
        self.experts = nn.Parameter(torch.randn(WIDTH, 5, 3) * 0.2)
        self.attention = nn.MultiheadAttention(
            WIDTH, 2, bias=False, batch_first=True
        )  # k's bias has no gradient
        self.gru = nn.GRU(WIDTH, 7, batch_first=True)
        self.head = nn.Linear(7, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.spread(self.grouped(torch.tanh(self.conv(x.transpose(1, 2))))).transpose(1, 2)
        x = x + torch.einsum("btw,wio->btw", x, self.experts).tanh()
        x = self.gru(x + self.attention(x, x, x, need_weights=False)[0])[0]
        return nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten()
        )


def make_net(mixed: bool | str = False) -> Net | MixedNet | ModulesNet:
    """Return the network; ``mixed`` is True for the one of several kinds, "modules" for the one of
    most.
    """
    torch.manual_seed(0)
    return ModulesNet() if mixed == "modules" else MixedNet() if mixed else Net()


def parameter_groups(net: nn.Module) -> list[dict[str, object]]:
    """Two groups, as most recipes have: with weight decay and without."""
    named = list(net.named_parameters())
    return [
        {"params": [p for n, p in named if not n.endswith(NO_DECAY)]},
        {"params": [p for n, p in named if n.endswith(NO_DECAY)], "weight_decay": 0.0},
    ]


def batches(data_parallel: int) -> Tensor:
    """All tokens of a run, ``(STEPS, ACCUMULATION, data_parallel, MICRO, LENGTH)``."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        VOCAB, (STEPS, ACCUMULATION, data_parallel, MICRO, LENGTH), generator=generator
    )


@tolerances.every_iteration()
def one_process(
    data_parallel: int,
    dtype: torch.dtype = torch.float32,
    skip: Callable[[int], bool] = lambda step: False,
    mixed: bool | str = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train with the reference on the same global batches; return the fp32 weights and the last
    step's rates.

    In a lower ``dtype`` the network computes in it and the reference steps fp32 masters, as mixed
    precision does. What the reference does not know (the ``mixed`` network, other ``options``) is
    trained with AdamW2 on whole parameters.
    """
    net = make_net(mixed).to(dtype)
    masters = {
        name: p.detach().float().clone().requires_grad_() for name, p in net.named_parameters()
    }
    decay = {name: 0.0 if name.endswith(NO_DECAY) else OPTIONS["weight_decay"] for name in masters}
    groups = [
        (d, [(n, p) for n, p in masters.items() if decay[n] == d])
        for d in dict.fromkeys(decay.values())
    ]
    reference, whole = [], None
    if mixed or options:
        given = {**OPTIONS, **(options or {}), "model": net if mixed == "modules" else None}
        whole = AdamW2([{"params": named, "weight_decay": d} for d, named in groups], **given)
    else:
        reference = [
            AdamW2Reference(named, **{**OPTIONS, "weight_decay": d}, sigma=BlockPower)
            for d, named in groups
        ]
    rates: dict[str, float] = {}
    scale = 2.0**16 if dtype == torch.float16 else 1.0  # where DeepSpeed starts, too
    for step, global_batch in enumerate(batches(data_parallel)):
        if skip(step):
            continue
        for p in masters.values():
            p.grad = torch.zeros_like(p)
        micros = global_batch.flatten(0, 1)
        for micro in micros:
            net.zero_grad()
            (net(micro) * scale).backward()
            for name, p in net.named_parameters():
                masters[name].grad += p.grad.float() / (len(micros) * scale)
        if whole is not None:
            whole.step()
            rates = {name: entry.lr for name, entry in whole.stats().items()}
        else:
            for optimizer in reference:
                rates |= optimizer.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(masters[name])
    return {name: p.detach() for name, p in masters.items()}, rates
