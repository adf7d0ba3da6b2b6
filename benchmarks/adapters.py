"""What bounds a matrix that is 0 at the start.

LoRA's B is one, and the output projections of a model that starts as identity are.

    python -m benchmarks.adapters [regression text zeros methods] [--seeds 0 1 2]

It takes about 20 minutes on one core.

Rule 1 takes τ σ₁(W) for the bound, which is 0 for W = 0. A row is what stands for σ₁(W), measured
exactly; a column a rate, the mean final loss over the seeds under it. ``regression``: a frozen net
of two layers, LoRA r = 8, fitted to itself plus a low-rank difference. ``text``: a GPT trained on
the standard library's sources, LoRA on Python's English language reference. ``zeros``: that GPT
from its start, o and proj zero, on the sources. ``methods``: a GPT-2 of that size, trained and
adapted on the same texts by PEFT's methods, as AdamW2 is.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import cos, inf, pi, sqrt
from statistics import mean
from typing import Any, NamedTuple
from unittest.mock import patch

import peft
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from weyl_megatron import AdamW2
from weyl_megatron.demo.data import load_corpus, sequences
from weyl_megatron.demo.model import GPT, GPTConfig
from weyl_megatron.layouts.buffers import Parameter
from weyl_megatron.rule import random_sigma, xavier_std
from weyl_megatron.thresholds import Thresholds

RANK, ALPHA, TAU, CONTEXT = 8, 16, 0.01, 64
FACTORS = {"regression": ["up", "down"], "text": ["q", "k", "v", "o", "fc", "proj"]}

#: The low-rank difference that the regression has to find: its size, and its rank.
SHIFT, SHIFT_RANK = 2.1, 1

#: What is 0 at the start of a GPT each of whose blocks is the identity then.
ZEROS = ("o.weight", "proj.weight")

#: The rates of the steps that a model is trained by before it is adapted.
PRETRAINING = [3e-3 * min(1, step / 100) * (1 - step / 400) for step in range(400)]

#: Makes a step at this rate.
Step = Callable[[float], None]


class Matrix(NamedTuple):
    """A factor, the other one, and σ₁ of the frozen weight that their product changes."""

    weight: Tensor
    partner: Tensor
    base: float


def sigma(matrix: Tensor) -> float:
    """Return σ₁ of a matrix, from the smaller of its two Gram matrices."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return sqrt(max(float(torch.linalg.eigvalsh(wide @ wide.T)[-1]), 0.0))


def floored(share: float) -> Callable[[Matrix], float]:
    """Return the rule whose floor is this share of a Xavier matrix's σ₁."""

    def rule(matrix: Matrix) -> float:
        rows, cols = matrix.weight.shape
        return max(sigma(matrix.weight), share * random_sigma(rows, cols, xavier_std(rows, cols)))

    return rule


def of_partner(matrix: Matrix) -> float:
    """Return σ₁ of the larger of the two factors."""
    return max(sigma(matrix.weight), sigma(matrix.partner))


def of_product(matrix: Matrix) -> float:
    """Return the σ₁ of which a share τ changes the product by τ of the frozen weight's σ₁."""
    other = ALPHA / RANK * sigma(matrix.partner)
    return matrix.base / other if other > 0 else inf


#: What stands for σ₁(W), by name; None: nothing, which is AdamW.
RULES: dict[str, Callable[[Matrix], float] | None] = {
    "AdamW": None,
    "AdamW, 10 % warmup": None,
    "σ₁(W), floor_std 0.001": lambda m: max(sigma(m.weight), random_sigma(*m.weight.shape, 1e-3)),
    "floor 0.1 Xavier": floored(0.1),
    "floor 0.3 Xavier": floored(0.3),
    "floor Xavier": floored(1),
    "partner's σ₁": of_partner,
    "W₀'s σ₁ over the partner's": of_product,
}

#: The floor of o and proj; all others keep that of floor_std = 0.001.
OF_ZEROS = "floor Xavier of what is 0 at the start"

#: Floors of all matrices, as shares of Xavier's; None: that of floor_std = 0.001.
SHARES = {
    "σ₁(W), floor_std 0.001": None,
    "floor 0.1 Xavier": 0.1,
    "floor 0.3 Xavier": 0.3,
    "floor Xavier": 1.0,
    OF_ZEROS: 1.0,
}


def stepped(optimizer: torch.optim.Optimizer) -> Step:
    """Return an optimizer's step."""

    def step(rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model: nn.Module) -> Step:
    """Return AdamW's step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return stepped(torch.optim.AdamW(trained, weight_decay=0.0))


def bounded(model: nn.Module, rule: Callable[[Matrix], float]) -> Step:
    """Return AdamW's step on LoRA's factors, each at most at τ of what the rule says over σ₁(U)."""
    matrices = list(factors(model))
    optimizer = torch.optim.AdamW([matrix.weight for matrix in matrices], lr=1.0, weight_decay=0.0)

    @torch.no_grad()
    def step(rate: float) -> None:
        bounds = [TAU * rule(matrix) for matrix in matrices]
        before = [matrix.weight.clone() for matrix in matrices]
        optimizer.step()  # at a rate of 1 and without decay the weights move by U
        optimizer.zero_grad()
        for matrix, old, bound in zip(matrices, before, bounds, strict=True):
            update = old - matrix.weight
            size = sigma(update)
            allowed = min(rate, bound / size) if size > 0 else rate
            matrix.weight.copy_(old - allowed * update)

    return step


def factors(model: nn.Module) -> Iterator[Matrix]:
    """Yield LoRA's factors."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = sigma(module.base_layer.weight.detach())
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield Matrix(a, b, base)
            yield Matrix(b, a, base)


def step_of(rule: str, model: nn.Module) -> Step:
    """Return the step of a rule on a model with LoRA."""
    what = RULES[rule]
    return adamw(model) if what is None else bounded(model, what)


def train(step: Step, rule: str, loss: Callable[[], Tensor], rates: list[float]) -> list[float]:
    """Train; return the losses before every step."""
    warmup = len(rates) // 10 if "warmup" in rule else 0
    losses = []
    for number, rate in enumerate(rates):
        value = loss()
        value.backward()
        step(rate * min(1.0, (number + 1) / (warmup + 1)))
        losses.append(value.item())
    return losses


def two_layers() -> nn.Sequential:
    """Return two layers without bias."""
    up, down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
    return nn.Sequential(OrderedDict(up=up, gelu=nn.GELU(), down=down))


def with_lora(model: nn.Module, task: str) -> nn.Module:
    """Return the model with PEFT's LoRA."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=FACTORS[task])
    return get_peft_model(model, config)  # type: ignore[arg-type]


def regression(rule: str, rate: float, seed: int) -> float:
    """Return the mean loss of the last 10 of 300 steps at a constant rate."""
    torch.manual_seed(seed)
    model = two_layers()
    wanted = copy.deepcopy(model)
    for linear in (wanted.up, wanted.down):
        rows, cols = linear.weight.shape
        left, right = torch.randn(rows, SHIFT_RANK), torch.randn(SHIFT_RANK, cols)
        linear.weight.data += SHIFT / sqrt(SHIFT_RANK * cols) * left @ right
    adapted = with_lora(model, "regression")

    def loss() -> Tensor:
        x = torch.randn(64, 64)
        with torch.no_grad():
            target = wanted(x)
        return F.mse_loss(adapted(x), target)

    return mean(train(step_of(rule, adapted), rule, loss, [rate] * 300)[-10:])


@cache
def english() -> Tensor:
    """Python's language reference, as `help()` shows it, in bytes."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return torch.frombuffer(bytearray("\n".join(topics.values()).encode()), dtype=torch.uint8)


@cache
def pretrained(layers: int = 2) -> GPT:
    """A GPT after 400 steps of AdamW, 100 of them warmup, on the standard library's sources."""
    torch.manual_seed(0)
    model, text = GPT(GPTConfig(layers=layers)), load_corpus().train
    train(adamw(model), "", lambda: model(*batch(text)), PRETRAINING)
    return model


def cosine(rate: float, steps: int) -> list[float]:
    """Return a cosine from ``rate`` to a tenth of it."""
    return [rate * (0.55 + 0.45 * cos(pi * step / steps)) for step in range(steps)]


def batch(text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of 8 sequences."""
    return sequences(text, torch.randint(text.numel() - CONTEXT, (8,)), CONTEXT)


def on_text(model: nn.Module, step: Step, rule: str, rates: list[float], text: Tensor) -> float:
    """Train on the first nine tenths of ``text``, return the loss on the rest."""
    cut = text.numel() * 9 // 10
    train(step, rule, lambda: model(*batch(text[:cut])), rates)
    offsets = torch.linspace(cut, text.numel() - CONTEXT - 1, 256, dtype=torch.float64).long()
    with torch.no_grad():
        return float(model(*sequences(text, offsets, CONTEXT)))


def finetuning(rule: str, rate: float, seed: int) -> float:
    """Return the validation loss after 200 steps of LoRA."""
    base = copy.deepcopy(pretrained())
    torch.manual_seed(seed)
    adapted = with_lora(base, "text")
    return on_text(adapted, step_of(rule, adapted), rule, cosine(rate, 200), english())


def zeros(rule: str, rate: float, seed: int) -> float:
    """Return the validation loss after 300 steps from blocks that are the identity."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(layers=2))
    for name, p in model.named_parameters():
        if name.endswith(ZEROS):
            nn.init.zeros_(p)
    text, rates = load_corpus().train, cosine(rate, 300)
    if rule not in SHARES:
        return on_text(model, adamw(model), rule, rates, text)
    optimizer = AdamW2(model.named_parameters(), weight_decay=0.0, tau=TAU)
    share = SHARES[rule]

    def floor_and_tau(
        _: Thresholds, what: Parameter, rows: int, cols: int, tau: float
    ) -> tuple[float, float]:
        is_low = share is None or (rule == OF_ZEROS and not what.name.endswith(ZEROS))
        std = 1e-3 if is_low else share * xavier_std(rows, cols)
        return random_sigma(rows, cols, std), tau

    with patch.object(Thresholds, "floor_and_tau", floor_and_tau):
        return on_text(model, stepped(optimizer), rule, rates, text)


#: What adapts GPT-2's layers, whose weights are (in, out).
GPT2_LAYERS: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}


def lora(**options: Any) -> peft.PeftConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, **GPT2_LAYERS, **options)


def prompt_tuning() -> peft.PeftConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)


#: PEFT's methods, with a rate at which AdamW does well here.
METHODS: dict[str, tuple[Callable[[], peft.PeftConfig], float]] = {
    "LoRA": (lora, 1e-2),
    "DoRA": (lambda: lora(use_dora=True), 1e-2),
    "VeRA": (lambda: peft.VeraConfig(r=64, **GPT2_LAYERS), 3e-2),
    "IA³": (lambda: peft.IA3Config(feedforward_modules=["c_fc"], **GPT2_LAYERS), 3e-2),
    "prompt tuning": (prompt_tuning, 1e-1),
}

#: How adapters are stepped: AdamW, or AdamW2 with these options.
WAYS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    "τ = 0.01": {"tau": 0.01},
    "balanced": {"tau": "balanced"},
    "exempt": {"overrides": [{"match": "*", "exempt": True}]},
}


class Logits(nn.Module):
    """Hugging Face's GPT-2 as a function of inputs and targets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=inputs).logits
        logits = logits[:, -inputs.shape[1] :]  # without a prompt's
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@cache
def pretrained_gpt2() -> GPT2LMHeadModel:
    """GPT-2's architecture at the size of :func:`pretrained`, trained likewise."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT + 8,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, text = GPT2LMHeadModel(config), load_corpus().train
    net = Logits(model)
    train(adamw(net), "", lambda: net(*batch(text)), PRETRAINING)
    return model


def method(name: str, way: str, seed: int) -> float:
    """Return the validation loss after 200 steps of a method."""
    make, rate = METHODS[name]
    base = copy.deepcopy(pretrained_gpt2())
    torch.manual_seed(seed)
    net, options = Logits(get_peft_model(base, make())), WAYS[way]
    if options is None:
        return on_text(net, adamw(net), "", cosine(rate, 200), english())
    optimizer = AdamW2(net.named_parameters(), weight_decay=0.0, model=net, **options)
    return on_text(net, stepped(optimizer), "", cosine(rate, 200), english())


#: What is run, with its columns: rates, or ways.
TASKS: dict[str, tuple[Callable[[str, Any, int], float], Sequence[Any]]] = {
    "regression": (regression, (1e-3, 1e-2, 1e-1)),
    "text": (finetuning, (1e-3, 1e-2, 1e-1)),
    "zeros": (zeros, (1e-3, 1e-2)),
    "methods": (method, list(WAYS)),
}


def rules_of(task: str) -> list[str]:
    """Return the rows of a task: methods, rules, or of what has no partner, floors."""
    if task == "methods":
        return list(METHODS)
    if task != "zeros":
        return list(RULES)
    return [rule for rule in RULES if RULES[rule] is None or rule in SHARES] + [OF_ZEROS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.tasks:
        run, columns = TASKS[task]
        names = [f"lr {name:g}" if isinstance(name, float) else name for name in columns]
        print(f"\n| {task} | {' | '.join(names)} |\n| --- |" + " ---: |" * len(names))
        for rule in rules_of(task):
            means = [mean(run(rule, column, s) for s in options.seeds) for column in columns]
            name = f"{rule}, lr {METHODS[rule][1]:g}" if task == "methods" else rule
            print(f"| {name} | " + " | ".join(f"{loss:.3f}" for loss in means) + " |", flush=True)


if __name__ == "__main__":
    main()
