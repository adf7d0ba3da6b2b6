"""Depth-scaled residuals: what Noci et al. (2022) claim at initialisation, every kind of model, and
the engines.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.collapse.model import GPT, GPTConfig
from tests.processes import run_ranks
from tests.transformer.residual_worker import CONFIG, OPTIMIZER, STEPS, scaled_model, tokens
from tests.transformer.test_blocks import CASES
from weyl_megatron import AdamW2
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.transformer.reparam import sigma_reparam
from weyl_megatron.transformer.residual import scale_residuals
from weyl_megatron.watch.watch import Watch

LAYERS = 48
MODES = ("forward", "init", "learned")
WORKER = Path(__file__).parent / "residual_worker.py"


def gpt(norm: str = "pre") -> GPT:
    torch.manual_seed(3)
    return GPT(GPTConfig(norm=norm, vocabulary=50, context=16, layers=3, heads=2, width=24))


def at_initialisation(norm: str, mode: str | None) -> tuple[list[float], list[float]]:
    """Token similarity at, and ‖(∂W_q, ∂W_k)‖ / ‖∂W_v‖ of, every block of a deep model on random
    tokens.
    """
    torch.manual_seed(0)
    model = GPT(GPTConfig(norm=norm, layers=LAYERS, width=64, heads=4, context=32))
    for table in (model.wte, model.wpe):
        nn.init.normal_(table.weight, std=math.sqrt(0.5))  # tokens of order 1, as the paper's are
    if mode is not None:
        scale_residuals(model, mode=mode)
    optimizer = AdamW2(model.named_parameters(), lr=1e-6, tau=math.inf)
    watch = Watch(model, optimizer, every=1)
    x = torch.randint(256, (8, 33))
    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    optimizer.step()
    values = watch.step(loss)
    watch.close()
    tags = [f"block/{number}" for number in range(LAYERS)]
    ratios = [
        math.hypot(values[f"{tag}/grad_q"], values[f"{tag}/grad_k"]) / values[f"{tag}/grad_v"]
        for tag in tags
    ]
    return [values[f"{tag}/similarity"] for tag in tags], ratios


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_scaled_tokens_stay_apart_and_queries_and_keys_get_gradients(norm: str, mode: str) -> None:
    similarity, ratios = at_initialisation(norm, mode)
    assert max(similarity) < 0.2 and min(ratios) > 0.5  # measured: up to 0.14, from 0.6 on


def test_unscaled_post_norm_tokens_become_one_and_gradients_vanish() -> None:
    similarity, ratios = at_initialisation("post", None)
    assert similarity[0] < 0.05 and similarity[LAYERS // 4] > 0.9 and similarity[-1] > 0.9999
    assert (
        ratios[LAYERS // 2] < 1e-4 and ratios[-1] < 1e-5 and ratios[-1] < ratios[LAYERS // 2] / 10
    )


def test_unscaled_pre_norm_tokens_become_alike_more_slowly() -> None:
    similarity, ratios = at_initialisation("pre", None)
    assert similarity[0] < 0.05 and similarity[LAYERS // 4] > 0.5 and similarity[-1] > 0.8
    assert ratios[-1] < 0.2


def by_hand(model: GPT, x: Tensor, factor: float) -> Tensor:
    """examples/collapse's GPT with its branches multiplied; x are tokens (batch, tokens)."""
    h = model.wte(x) + model.wpe.weight[: x.shape[1]]
    for block in model.blocks:
        if block.is_pre:
            h = h + factor * block.attn(block.norm1(h))
            h = h + factor * block.mlp(block.norm2(h))
        else:
            h = block.norm1(h + factor * block.attn(h))
            h = block.norm2(h + factor * block.mlp(h))
    out: Tensor = model.head(model.norm(h))
    return out


@pytest.mark.parametrize("depth", [None, 7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_model_is_the_one_that_is_scaled_by_hand(norm: str, mode: str, depth: int | None) -> None:
    plain, scaled, x = gpt(norm), gpt(norm), tokens(0)[:, :-1]
    assert scale_residuals(scaled, mode=mode, depth=depth) == 6
    expected = by_hand(plain, x, 1 / math.sqrt(depth or 3))
    if mode == "init":  # the factor is rounded with the weights
        torch.testing.assert_close(scaled(x), expected, rtol=1e-5, atol=1e-5)
    elif mode == "learned":  # the factor is rounded to float32
        torch.testing.assert_close(scaled(x), expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(scaled(x), expected)


def inputs(name: str) -> Tensor:
    torch.manual_seed(1)
    if name in ("hf-vit", "timm"):
        return torch.randn(2, 3, 32, 32)
    return torch.randn(2, 5, 16) if name == "torch" else torch.randint(50, (2, 16))


def output(model: nn.Module, x: Tensor) -> Tensor:
    found: Any = model(x)
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model_is_scaled(name: str, mode: str) -> None:
    torch.manual_seed(0)
    make, matrices, *_ = CASES[name]
    plain = make().eval()
    with torch.no_grad():
        for bias in (param for path, param in plain.named_parameters() if path.endswith("bias")):
            bias.normal_(std=0.1)
    scaled, x = copy.deepcopy(plain), inputs(name)
    before = output(plain, x)
    assert scale_residuals(scaled, mode=mode) == 4
    assert torch.equal(output(plain, x), before)
    by_weight = {id(param): path for path, param in plain.named_parameters()}
    with torch.no_grad():
        for block in (module for module in plain.modules() if is_block(matrices, module)):
            for weight in (matrices(block)["o"], matrices(block)["2"]):
                weight.mul_(1 / math.sqrt(2))
                base = weight if weight._base is None else weight._base
                bias = dict(plain.named_parameters()).get(
                    by_weight[id(base)].replace("weight", "bias")
                )
                if bias is not None:
                    bias.mul_(1 / math.sqrt(2))
    for training in (
        True,
        False,
    ):  # torch's encoder has a fast path of its own where it does not train
        plain.train(training), scaled.train(training)
        for model in (plain, scaled):
            for module in model.modules():
                if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
                    module.eval()
        torch.manual_seed(0)
        expected = output(plain, x)
        torch.manual_seed(0)
        assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(output(scaled, x), expected, rtol=1e-4, atol=1e-5)


def is_block(matrices: Callable[[nn.Module], dict[str, Tensor]], module: nn.Module) -> bool:
    try:
        return bool(matrices(module))
    except AttributeError:
        return False


@pytest.mark.parametrize("mode", ["forward", "learned"])
def test_torch_s_fast_path_is_scaled_as_the_slow_one(mode: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    assert scale_residuals(model, mode=mode) == 4
    x, is_padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = model(x, src_key_padding_mask=is_padding)
    with torch.no_grad():  # torch then makes nested tensors of what is no padding
        found = model(x, src_key_padding_mask=is_padding)
    torch.testing.assert_close(found[~is_padding], expected[~is_padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["forward", "learned"])
def test_a_converted_model_is_scaled_without_a_power_step(mode: str) -> None:
    model = reparametrized()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale_residuals(model, mode=mode)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_init_leaves_the_model_s_modules_and_names_as_they_are() -> None:
    plain, scaled = gpt(), gpt()
    scale_residuals(scaled, mode="init")
    assert repr(plain) == repr(scaled) and plain.state_dict().keys() == scaled.state_dict().keys()
    assert not any(module._forward_hooks for module in scaled.modules())
    changed = {
        name
        for name, value in plain.state_dict().items()
        if not torch.equal(value, scaled.state_dict()[name])
    }
    assert changed == {
        f"blocks.{number}.{layer}.weight" for number in range(3) for layer in ("attn.o", "mlp.fc2")
    }


def test_a_learned_factor_is_in_the_state_dict_and_trains() -> None:
    model, x = gpt(), tokens(0)
    scale_residuals(model, mode="learned")
    scales = {
        name: param for name, param in model.named_parameters() if name.endswith("residual_scale")
    }
    assert len(scales) == 6 and "blocks.2.mlp.fc2.residual_scale" in scales
    assert all(torch.equal(scale, torch.tensor([1 / math.sqrt(3)])) for scale in scales.values())
    optimizer = AdamW2(model.named_parameters(), lr=0.01)
    model(x[:, :-1], x[:, 1:]).backward()
    optimizer.step()
    assert all(abs(scale.item() - 1 / math.sqrt(3)) > 0.005 for scale in scales.values())
    other = gpt()
    scale_residuals(other, mode="learned")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x[:, :-1]), model(x[:, :-1]))
    with pytest.raises(RuntimeError, match="residual_scale"):
        gpt().load_state_dict(model.state_dict())


def test_a_fixed_factor_leaves_the_state_dict_as_it_is() -> None:
    model, other = gpt(), gpt()
    scale_residuals(model)
    scale_residuals(other)
    other.load_state_dict(gpt().state_dict())
    assert model.state_dict().keys() == gpt().state_dict().keys()
    assert torch.equal(model(tokens(0)[:, :-1]), other(tokens(0)[:, :-1]))


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_is_scaled_by_itself(mode: str) -> None:
    model, x = gpt(), tokens(0)[:, :-1]
    scale_residuals(model, mode=mode)
    twin = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("residual_scale") or name == "head.weight":
                param.zero_()
    assert torch.equal(twin(x), expected) and not torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="second scaling"):
        scale_residuals(twin, mode=mode)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_changes_nothing(mode: str, reentrant: bool) -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model, x = gpt(), tokens(0)
        scale_residuals(model, mode=mode)
        for block in model.blocks if is_checkpointed else ():
            forward = block.forward
            block.forward = lambda x, forward=forward: torch.utils.checkpoint.checkpoint(  # type: ignore[method-assign]
                forward, x, use_reentrant=reentrant
            )
        model(x[:, :-1], x[:, 1:]).backward()
        gradients.append([param.grad for param in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert one is not None and two is not None and torch.equal(one, two)


def test_a_learned_factor_has_the_layer_s_dtype_and_keeps_the_output_s() -> None:
    model = gpt().bfloat16()
    scale_residuals(model, mode="learned")
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    mixed = gpt()
    scale_residuals(mixed, mode="learned")
    seen: list[torch.dtype] = []
    mixed.blocks[0].attn.o.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        mixed(tokens(0)[:, :-1])
    assert seen == [torch.bfloat16]


@pytest.mark.slow
def test_a_deep_post_norm_model_trains_where_it_did_not() -> None:
    """24 blocks, AdamW at 3e-3 without warmup: rank collapse stays at the bytes' unigram entropy,
    about 3.1 nats.

    Measured: 3.19 unscaled, 2.82 with the factor in the forward pass, 2.75 learned, 3.19 in the
        initial weights alone.
    """
    assert final_loss(None) > 3.05 and final_loss("init") > 3.05
    assert final_loss("forward") < 2.92
    assert final_loss("learned") < 2.92


def final_loss(mode: str | None, steps: int = 100) -> float:
    torch.manual_seed(0)
    model = GPT(GPTConfig(norm="post", layers=24, width=32, heads=2, context=32))
    if mode is not None:
        scale_residuals(model, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    corpus = load_corpus()
    losses = []
    for offsets in training_offsets(corpus, steps, 8, 32, 0):
        loss = model(*sequences(corpus.train, offsets, 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("residual")
    run_ranks("deepspeed", WORKER, 2, str(folder), "2", "3")
    return folder


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("mode", ["forward", "learned"])
def test_under_zero_on_two_processes_it_trains_as_plain_torch_on_one(
    mode: str, stage: int, zero: Path
) -> None:
    model = scaled_model(mode)
    optimizer = AdamW2(model.named_parameters(), **OPTIMIZER)
    losses = []
    for step in range(STEPS):
        loss = model(tokens(step)[:, :-1], tokens(step)[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = torch.load(zero / f"{mode}{stage}.pt")
    torch.testing.assert_close(found.pop("losses"), torch.stack(losses), rtol=1e-5, atol=1e-5)
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys() and len(found) == len(
        list(GPT(CONFIG).parameters())
    ) + 6 * (mode == "learned")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name].detach(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("megatron")
    worker = WORKER.with_name("residual_megatron_worker.py")
    run_ranks("megatron", worker, 1, str(folder), "plain", "forward", "init")
    run_ranks("megatron", worker, 2, str(folder), "tp2-sp", "pp2")
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("case", ["init", "tp2-sp", "pp2"])
def test_under_megatron_every_stage_and_rank_scales_alike(
    case: str, megatron: dict[str, dict[str, float]]
) -> None:
    one, other = megatron["forward"], megatron[case]
    assert other["branches"] == (4 if case == "pp2" else 8)
    for name in ("weight", "bias"):
        assert other[name] == pytest.approx(one[name], rel=1e-5)
        assert one[name] != pytest.approx(megatron["plain"][name], rel=1e-3)


class Sandwich(nn.Module):
    """A block that norms its branches before they are added, as Gemma 2 and OLMo 2 do."""

    def __init__(self) -> None:
        super().__init__()
        inner = GPT(CONFIG).blocks[0]
        self.attn, self.mlp = inner.attn, inner.mlp
        self.post_feedforward_layernorm = nn.LayerNorm(24)


def swin2() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2,),
        "num_heads": (2,),
    }
    made: nn.Module = timm.models.swin_transformer_v2.SwinTransformerV2(**sizes, num_classes=5)
    return made


def reparametrized() -> nn.Module:
    model = gpt()
    sigma_reparam(model)
    return model


class NoMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([GPT(CONFIG).blocks[0]])
        del self.blocks[0].mlp


def partitioned() -> nn.Module:
    model = gpt()
    model.blocks[0].attn.o.weight.ds_id = 1  # type: ignore[attr-defined]  # as ZeRO-3 marks what it keeps in parts
    return model


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (
            gpt,
            {"mode": "both"},
            "residual: mode got 'both', it takes 'forward', 'init' or 'learned'.",
        ),
        (gpt, {"depth": 0}, "residual: depth got 0, it takes a whole number from 1 on."),
        (gpt, {"depth": True}, "residual: depth got True, it takes a whole number from 1 on."),
        (lambda: nn.Linear(2, 2), {}, "no Transformer block was recognised in Linear"),
        (lambda: nn.ModuleList([Sandwich()]), {}, "norms its branches before they are added"),
        (swin2, {}, "(SwinTransformerV2Block) norms its branches before they are added"),
        (
            reparametrized,
            {"mode": "init"},
            "mode got 'init', but blocks.0's attention's output layer computes its",
        ),
        (
            NoMLP,
            {},
            "the MLP's second layer of blocks.0 (Block) was not recognised; name the layers with "
            "names=",
        ),
        (
            partitioned,
            {"mode": "init"},
            "blocks.0's attention's output layer is partitioned by ZeRO-3 already; it takes",
        ),
        (
            partitioned,
            {"mode": "learned"},
            "mode got 'learned', but blocks.0's attention's output layer is",
        ),
        (
            lambda: gpt().to("meta"),
            {"mode": "learned"},
            "on the meta device; it takes 'forward' then.",
        ),
    ],
)
def test_what_cannot_be_scaled_is_said(
    model: Callable[[], nn.Module], options: dict[str, Any], sentence: str
) -> None:
    made = model()
    with pytest.raises(ValueError) as error:
        scale_residuals(made, **options)
    assert sentence in str(error.value)
    assert not any(module._forward_hooks for module in made.modules())


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_model_is_scaled_once(first: str, second: str) -> None:
    model, x = gpt(), tokens(0)[:, :-1]
    scale_residuals(model, mode=first)
    before = model(x)
    with pytest.raises(
        ValueError, match="attention's output layer got a second scaling, it takes one"
    ):
        scale_residuals(model, mode=second)
    assert torch.equal(model(x), before)


def test_names_tell_where_the_branches_end() -> None:
    model = gpt()
    names = {
        "block": "blocks.*",
        "q": "attn.q",
        "k": "attn.k",
        "o": "attn.o",
        "2": "mlp.fc2",
        "heads": 2,
    }
    assert scale_residuals(model, names=names) == 6
    expected = by_hand(gpt(), tokens(0)[:, :-1], 1 / math.sqrt(3))
    assert torch.equal(model(tokens(0)[:, :-1]), expected)


def test_a_tied_weight_is_multiplied_once() -> None:
    model = gpt()
    for block in model.blocks:
        block.mlp.fc2.weight = model.blocks[0].mlp.fc2.weight
    before = model.blocks[0].mlp.fc2.weight.detach().clone()
    scale_residuals(model, mode="init")
    torch.testing.assert_close(model.blocks[2].mlp.fc2.weight.detach(), before / math.sqrt(3))
    assert (
        F.cosine_similarity(
            model.blocks[1].mlp.fc2.weight.detach().flatten(), before.flatten(), dim=0
        )
        > 0.9999
    )
