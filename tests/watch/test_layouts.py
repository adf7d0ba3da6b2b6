"""Gradients that any optimizer steps, and the largest logits, in every layout.

Against whole tensors of one process, and against what AdamW² sums by its own tiles.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import fsdp2
from tests.processes import run_ranks
from tests.watch.plain_adamw import exact_logits, separate
from weyl_megatron import AdamW2
from weyl_megatron.watch.watch import Watch

HERE = Path(__file__).parent
Run = dict[str, Any]

#: Float32 sums in another order, one step of Adam apart: 7e-7 at most under DeepSpeed and FSDP2,
#: 4e-6 under Megatron, whose tensor parallelism also sums activations in another order.
CLOSE = 2e-5

#: Squares of the same float32 gradients, added up by rows in float64 and by tiles in float32:
#: 8e-7 at most.
SAME = 4e-6

MESH = [
    f"{case}-{which}"
    for case in ("ddp", "fsdp", "columns", "hsdp")
    for which in ("separate", "stacked")
]
ZERO = [f"{stage}-{which}" for stage in (1, 2, 3) for which in ("separate", "stacked")]
ZERO_STACKED = ["0-bf16-stacked", "2-bf16-stacked", "1-bf16-fp32-stacked", "3-offload-stacked"]
MEGATRON = ["tp2", "tp2-sp", "tp2-unsplit", "pp2", "dp2", "dp2-distopt", "vpp2-distopt"]
MEGATRON_BF16 = ["tp2-bf16", "dp2-distopt-bf16"]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mesh")
    for ranks in (1, 2, 4):
        run_ranks("torch", HERE / "mesh_gradients_worker.py", ranks, str(folder))
    return folder


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    worker = HERE / "zero_gradients_worker.py"
    run_ranks("deepspeed", worker, 1, str(folder), "0", "0-bf16")
    cases = ("1", "2", "3", "2-bf16", "1-bf16-fp32", "3-offload")
    run_ranks("deepspeed", worker, 2, str(folder), *cases)
    return folder


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("megatron")
    worker = HERE / "megatron_gradients_worker.py"
    run_ranks("megatron", worker, 1, str(folder), "one", "one-bf16")
    run_ranks("megatron", worker, 2, str(folder), *MEGATRON, *MEGATRON_BF16)
    return folder


def read(folder: Path, case: str) -> Run:
    if case.startswith("columns") and (sentence := fsdp2.lacking("shard_placement_fn")):
        pytest.skip(f"torch: {sentence}")
    run: Run = json.loads((folder / f"{case}.json").read_text())
    return run


def gradients(values: dict[str, float]) -> dict[str, float]:
    return {tag: x for tag, x in values.items() if "/grad_" in tag and not tag.endswith("_x")}


def logits(values: dict[str, float]) -> dict[str, float]:
    return {tag: x for tag, x in values.items() if "/max_logit" in tag}


def check_gradients(run: Run, expected: list[dict[str, float]], tolerance: float) -> None:
    for values, wanted in zip(run["steps"], expected, strict=True):
        assert len(wanted) >= 6 and min(wanted.values()) > 0
        assert gradients(values) == pytest.approx(wanted, rel=tolerance)


def check_against_adamw2(run: Run, adamw2: Run) -> None:
    values, expected = run["steps"][0], adamw2["steps"][0]
    assert gradients(values) == pytest.approx(gradients(expected), rel=SAME)
    assert values["lr"] == expected["lr"] == 0.01
    assert not any(tag.startswith("clip") for tag in values)


@pytest.mark.parametrize("which", ["separate", "stacked"])
def test_norms_are_those_of_whole_gradients(which: str, mesh: Path) -> None:
    for kind in ("adamw", "adamw2"):
        run = read(mesh, f"whole-{which}-{kind}")
        check_gradients(run, run["exact"], SAME)


@pytest.mark.parametrize("case", MESH)
def test_adamw_under_torch_s_wrappers_tells_the_norms_of_one_process(case: str, mesh: Path) -> None:
    which = case.split("-")[1]
    run = read(mesh, f"{case}-adamw")
    check_gradients(run, read(mesh, f"whole-{which}-adamw")["exact"], CLOSE)
    check_against_adamw2(run, read(mesh, f"{case}-adamw2"))


@pytest.mark.parametrize("which", ["separate", "stacked"])
def test_under_deepspeed_norms_are_those_of_clipped_gradients(which: str, zero: Path) -> None:
    run = read(zero, f"0-{which}-adamw")
    check_gradients(run, run["exact"], SAME)


@pytest.mark.parametrize("case", ZERO)
def test_adamw_under_zero_tells_the_norms_of_one_process(case: str, zero: Path) -> None:
    which = case.split("-")[1]
    run = read(zero, f"{case}-adamw")
    check_gradients(run, read(zero, f"0-{which}-adamw")["exact"], CLOSE)
    check_against_adamw2(run, read(zero, f"{case}-adamw2"))


@pytest.mark.parametrize("case", ZERO_STACKED)
def test_adamw_in_half_precision_or_offloaded_tells_what_adamw2_does(case: str, zero: Path) -> None:
    run = read(zero, f"{case}-adamw")
    check_against_adamw2(run, read(zero, f"{case}-adamw2"))
    # bf16 has 8 digits of two: 0.2 %. The first step alone: FP16_UnfusedOptimizer makes one of zero
    # gradients as it is built, which torch's AdamW counts.
    exact = read(zero, "0-stacked-adamw")["exact"][0]
    assert gradients(run["steps"][0]) == pytest.approx(exact, rel=0.01)


def test_a_layout_that_one_rank_does_not_understand_is_said_and_nothing_hangs(zero: Path) -> None:
    changed = read(zero, "changed")
    (sentence,) = changed["said"]
    assert sentence.startswith("watch: block/0/grad_q and 8 more are not measured: AdamW2: ")
    assert "parameter 'blocks.2.attn.q.weight'" in sentence  # which rank 1 said, and rank 0 logs
    assert changed["tags"] == [f"block/{number}/grad_x" for number in (2, 1, 0)]


@pytest.mark.parametrize("case", ["one", "one-bf16"])
def test_megatron_s_adam_tells_the_norms_of_its_main_gradients(case: str, megatron: Path) -> None:
    run = read(megatron, f"{case}-adam")
    check_gradients(run, run["exact"], SAME)


@pytest.mark.parametrize("case", MEGATRON)
def test_megatron_s_adam_tells_the_norms_of_one_process(case: str, megatron: Path) -> None:
    run = read(megatron, f"{case}-adam")
    check_gradients(run, read(megatron, "one-adam")["exact"], CLOSE)
    check_against_adamw2(run, read(megatron, f"{case}-adamw2"))


@pytest.mark.parametrize("case", MEGATRON_BF16)
def test_megatron_s_adam_in_bf16_tells_what_adamw2_does(case: str, megatron: Path) -> None:
    run = read(megatron, f"{case}-adam")
    check_against_adamw2(run, read(megatron, f"{case}-adamw2"))
    # bf16 has 8 digits of two, and each of the rank's first layers sums in another order: 1.7 %.
    check_gradients(run, read(megatron, "one-bf16-adam")["exact"], 0.05)


@pytest.fixture(scope="module")
def exact() -> dict[str, float]:
    """The logits of the global batch, one process, no Watch."""
    model = separate()
    pairs: dict[int, dict[str, Tensor]] = {}
    for number, block in enumerate(model.blocks):
        for role in "qk":

            def keep(_: nn.Module, __: Any, y: Tensor, number: int = number, r: str = role) -> None:
                heads = y.detach().unflatten(-1, (2, -1)).transpose(1, 2)
                pairs.setdefault(number, {})[r] = heads

            getattr(block.attn, role).register_forward_hook(keep)
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1])
    return {
        tag: value
        for number, pair in pairs.items()
        for tag, value in exact_logits(number, pair["q"], pair["k"])
    }


def check_logits(values: dict[str, float], expected: dict[str, float]) -> None:
    assert len(expected) >= 18
    # Dot products of 12 and 5 float32 numbers of size 1; means may be near 0.
    assert logits(values) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for tag, value in expected.items():
        if tag.endswith("/max_logit"):
            assert value <= expected[f"{tag}_bound"]


@pytest.mark.parametrize("case", ["whole", "ddp", "fsdp", "columns", "hsdp"])
def test_logits_under_torch_s_wrappers_are_exact(
    case: str, mesh: Path, exact: dict[str, float]
) -> None:
    check_logits(read(mesh, f"{case}-separate-adamw")["steps"][0], exact)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_logits_under_zero_are_exact(stage: int, zero: Path, exact: dict[str, float]) -> None:
    check_logits(read(zero, f"{stage}-separate-adamw")["steps"][0], exact)


@pytest.mark.parametrize("case", ["one", "tp2", "tp2-sp", "pp2", "vpp2-distopt"])
def test_logits_under_megatron_are_exact(case: str, megatron: Path) -> None:
    expected = read(megatron, "one-adam")["logits"]
    check_logits(read(megatron, f"{case}-adam")["steps"][0], expected)


def stepped(optimizer: Any, model: nn.Module, step: Any) -> dict[str, float]:
    watch = Watch(model, optimizer)
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    step(loss)
    values = dict(watch.step(loss))
    watch.close()
    return values


def whole_step(optimizer: Any) -> Any:
    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()

    return step


def test_a_scaled_loss_leaves_the_norms() -> None:
    """A fused optimizer gets gradients that GradScaler has not divided."""
    plain = separate()
    optimizer = torch.optim.AdamW(plain.parameters())
    expected = stepped(optimizer, plain, whole_step(optimizer))
    for is_fused in (False, True):
        model = separate()
        optimizer = torch.optim.AdamW(model.parameters(), fused=is_fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def step(loss: Tensor, optimizer: Any = optimizer, scaler: Any = scaler) -> None:
            scaler.scale(loss).backward()
            scaler.step(optimizer)

        values = stepped(optimizer, model, step)
        assert len(gradients(expected)) == 9
        # 1024 is a power of two.
        assert gradients(values) == pytest.approx(gradients(expected), rel=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW2])
def test_accelerate_s_wrapper_is_looked_into(kind: Any) -> None:
    model, wrapped = separate(), separate()
    optimizer = kind(model.named_parameters(), lr=0.01)
    expected = stepped(optimizer, model, whole_step(optimizer))
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    prepared, wrapper = accelerator.prepare(wrapped, kind(wrapped.named_parameters(), lr=0.01))
    values = stepped(wrapper, prepared, whole_step(wrapper))
    assert values == expected and len(gradients(values)) == 9


class Mixed(nn.Module):
    """Attention whose stack of q, k and v has a name that says nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(24, 72, bias=False), nn.Linear(24, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW2])
def test_of_a_stack_that_the_optimizer_takes_for_one_matrix_the_parts_are_told(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layers = nn.Sequential(Mixed(), Mixed())
    optimizer = kind(model.named_parameters(), lr=0.01)
    names = {"block": "layers.*", "qkv": "mix", "o": "out", "heads": 2}
    watch = Watch(model, optimizer, names=names)
    model(torch.randn(2, 5, 24)).square().sum().backward()
    exact = {
        f"block/{number}/grad_{role}": float(gradient.norm())
        for number, block in enumerate(model.layers)
        for role, gradient in zip("qkv", block.mix.weight.grad.chunk(3), strict=True)
    }
    optimizer.step()
    assert gradients(dict(watch.step())) == pytest.approx(exact, rel=SAME)
    watch.close()


def test_frozen_weights_have_no_norm() -> None:
    model = separate()
    model.blocks[1].attn.k.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    tags = gradients(stepped(optimizer, model, whole_step(optimizer)))
    assert len(tags) == 8 and "block/1/grad_k" not in tags


def test_an_optimizer_that_makes_no_step_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = separate()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = Watch(model, optimizer, every=1)
    with caplog.at_level(logging.WARNING, "weyl_megatron"):
        for _ in range(2):
            model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
            values = watch.step()
    watch.close()
    assert not gradients(dict(values))
    (sentence,) = (record.getMessage() for record in caplog.records)
    assert "block/0/grad_q and 8 more are not measured: no step was made" in sentence
    assert not optimizer._optimizer_step_pre_hooks


def test_between_measurements_the_optimizer_has_no_hook(mesh: Path, zero: Path) -> None:
    model = separate()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = Watch(model, optimizer, every=5)
    hooks = []
    for _ in range(6):
        hooks.append(len(optimizer._optimizer_step_pre_hooks))
        model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        optimizer.step()
        watch.step()
    watch.close()
    assert hooks == [1, 0, 0, 0, 1, 0]
    for folder, case in ((mesh, "fsdp-stacked-adamw"), (zero, "3-stacked-adamw")):
        assert read(folder, case)["hooks"] == 0  # after close
