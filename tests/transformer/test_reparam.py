from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples.collapse.model import GPT, GPTConfig
from tests.processes import run_ranks
from weyl_megatron.transformer.reparam import drop_norms, fold, sigma_reparam, sigmas
from weyl_megatron.watch import Watch

HERE = Path(__file__).parent
CONFIG = GPTConfig(norm="pre", vocabulary=50, context=16, layers=2, heads=2, width=24)


def gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(CONFIG)


def sigma(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.detach().flatten(1).double(), 2))


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_sigma_and_the_weight_are_those_of_svd(rows: int, cols: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(cols, rows)
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    assert sigma_reparam(model) == ["0"]
    for _ in range(100):  # one power step each
        normalized = layer.weight
    (found,) = sigmas(model).values()
    exact = sigma(weight)
    # 150 steps on two close singular values; below is the harmless side of a percent.
    assert exact * 0.99 <= found <= exact * (1 + 1e-5)
    assert torch.allclose(normalized, weight / found, rtol=1e-5)
    assert torch.equal(original(layer), weight)


def test_a_pass_makes_one_power_step_in_training_and_none_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(20, 30))
    model = nn.Sequential(layer)
    sigma_reparam(model)
    parametrization = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    with torch.no_grad():
        original(layer).copy_(torch.randn(20, 30))
    matrix, v = original(layer).detach(), parametrization.v.clone()
    model(torch.randn(4, 30))
    u = matrix @ v / (matrix @ v).norm()
    assert torch.allclose(parametrization.u, u, atol=1e-6)
    assert torch.allclose(parametrization.v, matrix.T @ u / (matrix.T @ u).norm(), atol=1e-6)
    model.eval()
    before = parametrization.u.clone(), parametrization.v.clone()
    model(torch.randn(4, 30))
    assert torch.equal(parametrization.u, before[0]) and torch.equal(parametrization.v, before[1])


def test_the_gradient_is_that_of_the_formula() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(7, 5, bias=False).double()
    model = nn.Sequential(layer)
    sigma_reparam(model, gamma="sigma")
    x = torch.randn(3, 7, dtype=torch.float64)
    model.eval()
    model(x).square().sum().backward()
    p = layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    u, v = p.u.double(), p.v.double()
    weight = original(layer).detach().clone().requires_grad_()
    gamma = p.gamma.detach().clone().requires_grad_()
    (x @ (gamma / (u @ weight @ v) * weight).T).square().sum().backward()
    assert weight.grad is not None and gamma.grad is not None
    # The parametrization computes in float32.
    assert torch.allclose(original(layer).grad, weight.grad, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(p.gamma.grad, gamma.grad, rtol=1e-4)


def test_gamma_at_sigma_keeps_the_function() -> None:
    model, tokens = gpt(), torch.randint(50, (2, 16))
    before = model(tokens).detach()
    sigma_reparam(model, gamma="sigma")
    assert torch.allclose(model.eval()(tokens), before, atol=1e-5)


def test_gamma_at_one_makes_every_layer_s_norm_one() -> None:
    model = gpt()
    names = sigma_reparam(model, exclude=("head",))
    assert len(names) == 12 and "head" not in names
    model.eval()
    for name in names:
        assert sigma(model.get_submodule(name).weight) == pytest.approx(1, rel=0.01)  # type: ignore[arg-type]


def test_folding_changes_no_output_and_gives_the_plain_state() -> None:
    model, tokens = gpt(), torch.randint(50, (2, 16))
    plain = set(model.state_dict())
    sigma_reparam(model)
    other = gpt(1)
    sigma_reparam(other)
    other.load_state_dict(model.state_dict())
    expected = model.eval()(tokens)
    assert torch.equal(other.eval()(tokens), expected)
    steps = copy.deepcopy(model)
    fold(steps)
    assert torch.equal(steps(tokens), expected) and set(steps.state_dict()) == plain
    last = gpt(2)
    last.load_state_dict(steps.state_dict())
    assert torch.equal(last(tokens), expected)
    with pytest.raises(ValueError, match="no layer that sigma_reparam converted"):
        fold(steps)


def test_statistics_alone_change_nothing() -> None:
    model, tokens = gpt(), torch.randint(50, (2, 16))
    expected = model(tokens)
    names = sigma_reparam(model, statistics_only=True)
    assert torch.equal(model(tokens), expected) and not any(
        "gamma" in name for name, _ in model.named_parameters()
    )
    for name in names:
        assert sigmas(model)[name] == pytest.approx(
            sigma(original(model.get_submodule(name))), rel=0.01
        )


def test_convolutions_and_hugging_face_s_layers_are_matrices() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 8, 4, bias=False))
    assert sigma_reparam(conv) == ["0"]
    for _ in range(100):
        weight = conv[0].weight
    assert sigma(weight) == pytest.approx(1, rel=1e-3)
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    )
    names = sigma_reparam(model, exclude=("lm_head",))
    assert {name.rpartition(".")[2] for name in names} == {"c_attn", "c_proj", "c_fc"}
    model(torch.randint(50, (1, 8)), labels=torch.randint(50, (1, 8))).loss.backward()


def test_norms_are_dropped() -> None:
    model = gpt()
    assert drop_norms(model) == 4
    assert isinstance(model.blocks[1].norm2, nn.Identity) and isinstance(model.norm, nn.LayerNorm)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False
    )
    with pytest.raises(
        ValueError, match=re.escape("drop_norms: layers.0 (TransformerEncoderLayer) has its norms")
    ):
        drop_norms(encoder)


def test_a_layer_by_itself_is_converted() -> None:
    layer = nn.Linear(5, 4)
    assert sigma_reparam(layer) == [""] and fold(layer) == [""]


def test_vectors_stay_in_float32() -> None:
    model = gpt()
    sigma_reparam(model)
    before = model.blocks[0].attn.q.parametrizations.weight[0].v.clone()
    model.bfloat16()
    p = model.blocks[0].attn.q.parametrizations.weight[0]
    assert p.v.dtype == torch.float32 and torch.equal(p.v, before)
    assert p.gamma.dtype == torch.bfloat16 and model.blocks[0].attn.q.weight.dtype == torch.bfloat16
    model(torch.randint(50, (2, 16))).float().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = gpt()
        sigma_reparam(model)
        tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
        for block in model.blocks if checkpointed else ():
            forward: Callable[[Tensor], Tensor] = block.forward
            block.forward = lambda x, forward=forward: torch.utils.checkpoint.checkpoint(
                forward, x, use_reentrant=reentrant
            )
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys()
    assert all(torch.allclose(plain[name], saved[name], rtol=1e-4, atol=1e-7) for name in plain)


def test_it_trains_and_keeps_the_spectra_where_gamma_says() -> None:
    model = gpt()
    sigma_reparam(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    layer = model.eval().blocks[0].attn.q
    gamma = float(layer.parametrizations.weight[0].gamma)
    assert sigma(layer.weight) == pytest.approx(abs(gamma), rel=0.02) and gamma != 1


def test_watching_sees_the_weight_that_is_used_and_changes_nothing() -> None:
    def losses(watched: bool) -> tuple[list[float], dict[str, float]]:
        model = gpt()
        sigma_reparam(model, exclude=("head",))
        watch = Watch(model, every=1) if watched else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found, values = [], {}
        for step in range(3):
            tokens = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(step))
            loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            values = dict(watch.step(loss)) if watch else values
        return found, values

    plain, (seen, values) = losses(False)[0], losses(True)
    assert seen == plain
    assert values["block/1/sigma_q"] == pytest.approx(1, abs=0.1)


def tied() -> nn.Module:
    model = gpt()
    model.head.weight = model.wte.weight
    return model


def zero() -> nn.Module:
    model = gpt()
    nn.init.zeros_(model.blocks[1].attn.o.weight)
    return model


def converted() -> nn.Module:
    model = gpt()
    sigma_reparam(model, match=("blocks.0.attn.q",))
    return model


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (converted, {}, "'blocks.0.attn.q' has a parametrized weight already"),
        (tied, {}, "'head.weight' is tied to 'wte.weight'; leave it out with exclude=('head',)"),
        (zero, {}, "'blocks.1.attn.o' has σ₁ = 0.0"),
        (gpt, {"gamma": "two"}, "gamma got 'two', it takes 'one' or 'sigma'"),
        (gpt, {"match": ("layers.*",)}, "match got ('layers.*',)"),
        (lambda: nn.ModuleList([nn.Linear(3, 4), TELinear()]), {}, "'1' is Transformer Engine's"),
        (
            lambda: nn.ModuleList([nn.MultiheadAttention(8, 2)]),
            {},
            "'0' is torch's MultiheadAttention",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4, device="meta")), {}, "'0' is on the meta device"),
    ],
)
def test_what_cannot_be_converted_is_said_and_left_alone(
    make: Callable[[], nn.Module], options: dict[str, object], sentence: str
) -> None:
    model = make()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sigma_reparam(model, **options)  # type: ignore[arg-type]
    assert set(model.state_dict()) == before


def test_a_matrix_that_vanishes_in_training_gives_no_nan() -> None:
    layer = nn.Linear(4, 3, bias=False)
    model = nn.Sequential(layer)
    sigma_reparam(model)
    with torch.no_grad():
        original(layer).zero_()
    out = model(torch.randn(2, 4))
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 3))
    grad = original(layer).grad
    assert grad is not None and torch.equal(grad, torch.zeros(3, 4))
    assert parametrize.is_parametrized(layer)


def test_vectors_of_another_weight_do_not_blow_it_up() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    model = nn.Sequential(layer)
    sigma_reparam(model)
    model.eval()
    with torch.no_grad():
        original(layer).neg_()  # uᵀ W v is below zero
    assert torch.equal(layer.weight, torch.zeros(8, 8))


def test_autocast_leaves_it_in_float32() -> None:
    model, tokens = gpt(), torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
    sigma_reparam(model)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    twin(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, one), other in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    with torch.autocast("cpu", torch.bfloat16):
        assert sigmas(model) == sigmas(twin)
    fold(model)


def test_a_compiled_model_is_one_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))
    sigma_reparam(model)
    twin, x = copy.deepcopy(model), torch.randn(4, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(compiled(x), twin(x), rtol=1e-5, atol=1e-6)


def test_a_frozen_layer_stays_frozen() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    sigma_reparam(nn.Sequential(layer))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


class TELinear(nn.Module):
    """Transformer Engine's layers, which need a GPU to be installed, have this much in common."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reparam")
    run_ranks("deepspeed", HERE / "reparam_zero_worker.py", 1, str(folder), "0")
    run_ranks("deepspeed", HERE / "reparam_zero_worker.py", 2, str(folder), "1", "2", "3")
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_zero_it_trains_as_on_one_process_and_its_checkpoint_goes_on(
    spread: Path, stage: int
) -> None:
    one, two = (json.loads((spread / f"{name}.json").read_text()) for name in ("0", stage))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["sigmas"] == pytest.approx(one["sigmas"], rel=1e-5)
    assert two["resumed"] == two["losses"][-len(two["resumed"]) :]


def test_what_zero_3_has_partitioned_is_refused(spread: Path) -> None:
    folding, reading, converting = json.loads((spread / "3.json").read_text())["refusals"]
    assert "belongs to a ZeRO-3 engine, it takes a model without one" in folding
    assert "is partitioned by ZeRO-3, it takes deepspeed.zero.GatheredParameters" in reading
    assert "'0' is partitioned by ZeRO-3; convert before, without zero.Init" in converting


@pytest.mark.slow
def test_under_tensor_parallelism_it_is_one_process_s(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    paths = {ranks: str(tmp_path / f"checkpoint{ranks}") for ranks in (1, 2)}
    run_ranks(
        "megatron", HERE / "reparam_megatron_worker.py", 1, str(tmp_path / "1.json"), paths[1]
    )
    run_ranks(
        "megatron",
        HERE / "reparam_megatron_worker.py",
        2,
        str(tmp_path / "2.json"),
        paths[2],
        paths[1],
    )
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["sigmas"] == pytest.approx(one["sigmas"], rel=1e-5)
    for name, exact in one["exact"].items():
        # One step of one vector behind each of six updates of ±0.01: a matrix with close σ is 2 %
        # off.
        assert one["sigmas"][name] == pytest.approx(exact, rel=0.05)
    assert two["gammas"] == pytest.approx(one["gammas"], rel=1e-5)
    assert two["folded"] == pytest.approx(one["folded"], rel=1e-5)
    # Sharded checkpoints hold every rank's part, and load at another tensor parallelism.
    assert one["restored"] == {"checkpoint1": one["evaluated"]}
    assert two["restored"]["checkpoint2"] == two["evaluated"]
    assert two["restored"]["checkpoint1"] == pytest.approx(one["evaluated"], rel=1e-5)
    fused, tied_weight = one["refusals"]
    assert "'output_layer' got gradient_accumulation_fusion=True, it takes False" in fused
    assert "'output_layer' has no weight of its own" in tied_weight
