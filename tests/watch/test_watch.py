"""Each quantity against exact linear algebra on a small model, and the same numbers however the
model is spread.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.collapse.model import GPT, GPTConfig
from tests.processes import run_ranks
from weyl_megatron import AdamW2
from weyl_megatron.watch.attention import map_rank
from weyl_megatron.watch.warning import Warnings
from weyl_megatron.watch.watch import Watch

HERE = Path(__file__).parent
CONFIG = GPTConfig(norm="pre", vocabulary=50, context=16, layers=3, heads=2, width=24)


def tokens() -> Tensor:
    return torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(5))


def measured(optimizer: str = "adamw2", **options: Any) -> tuple[GPT, dict[str, float], Watch]:
    """The measurement of a first step, and the model as it was before it."""
    torch.manual_seed(3)
    model = GPT(CONFIG)
    before = GPT(CONFIG)
    before.load_state_dict(model.state_dict())
    made: torch.optim.Optimizer
    if optimizer == "adamw2":
        made = AdamW2(model.named_parameters(), lr=0.05, weight_decay=0.0)
    else:
        made = torch.optim.AdamW(model.parameters(), lr=0.05)
    watch = Watch(model, made, **options)
    x = tokens()
    loss = model(x[:, :-1], x[:, 1:])
    loss.backward()
    made.step()
    values = dict(watch.step(loss))
    return before, values, watch


@pytest.fixture(scope="module")
def first() -> tuple[GPT, dict[str, float], Watch]:
    return measured(maps=[1])


def sigma(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


def test_the_paper_s_terms_are_exact(first: tuple[GPT, dict[str, float], Watch]) -> None:
    model, values, _ = first
    x = tokens()
    inputs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    hidden = model.wte(x[:, :-1]) + model.wpe.weight[:16]
    for block in model.blocks:
        hidden = block(hidden)
    logits = model.head(model.norm(hidden))
    loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, inputs)
    for number, block in enumerate(model.blocks):
        q, k, v, o = (getattr(block.attn, name).weight.detach() for name in "qkvo")
        up, down = block.mlp.fc1.weight.detach(), block.mlp.fc2.weight.detach()
        exact = {
            **{"sigma_q": sigma(q), "sigma_k": sigma(k), "sigma_v": sigma(v), "sigma_o": sigma(o)},
            **{"sigma_1": sigma(up), "sigma_2": sigma(down)},
            **{"sigma_qk": sigma(q.T @ k), "sigma_ov": sigma(o @ v), "sigma_21": sigma(down @ up)},
            **{
                "norm1_gain": block.norm1.weight.norm().item(),
                "norm2_gain": block.norm2.weight.norm().item(),
            },
            **{"x": inputs[number].norm().item(), "grad_x": gradients[number].norm().item()},
        }
        for name, value in exact.items():
            # Float32's rounding of a few hundred terms.
            assert values[f"block/{number}/{name}"] == pytest.approx(value, rel=2e-5), name
    assert values["loss"] == pytest.approx(loss.item(), rel=1e-6) and values["lr"] == 0.05


def test_heads_are_exact(first: tuple[GPT, dict[str, float], Watch]) -> None:
    model, values, _ = first
    hidden = model.wte(tokens()[:, :-1]) + model.wpe.weight[:16]
    for number, block in enumerate(model.blocks):
        x = block.norm1(hidden).detach()
        q, k = (
            getattr(block.attn, name)(x).unflatten(-1, (2, 12)).transpose(1, 2) for name in "qk"
        )
        future = torch.ones(16, 16, dtype=torch.bool).triu(1)
        logits = (q @ k.mT / 12**0.5).masked_fill(future, -math.inf).detach()
        attention = logits.softmax(-1)
        longest_q, longest_k = (x.detach().norm(dim=-1).amax(-1) for x in (q, k))  # (batch, heads)
        entropy = torch.special.entr(attention.double()).sum(-1).mean((0, 2))
        ranks = map_rank(attention).mean(0)
        for head in range(2):
            tag, rows = f"block/{number}/head/{head}", slice(12 * head, 12 * head + 12)
            product = block.attn.q.weight[rows].T @ block.attn.k.weight[rows]
            spectrum = torch.linalg.svdvals(product.detach().double())[:12]
            share = spectrum.square() / spectrum.square().sum()
            exact = {
                "sigma_qk": float(spectrum[0]),
                "sec": float(share[:4].sum()),
                "effective_rank": float(torch.special.entr(share).sum().exp()),
                "stable_rank": float(1 / share[0]),
                "entropy": float(entropy[head]),
                "map_rank": float(ranks[head]),
                "max_logit": float(logits[:, head].max()),
                "max_logit_mean": float(logits[:, head].amax(-1).mean()),
                "max_logit_bound": float((longest_q * longest_k)[:, head].max()) / 12**0.5,
            }
            for name, value in exact.items():
                assert values[f"{tag}/{name}"] == pytest.approx(value, rel=1e-5), name
            assert values[f"{tag}/entropy_bound"] <= values[f"{tag}/entropy"]
            assert values[f"{tag}/max_logit"] <= values[f"{tag}/max_logit_bound"]
        hidden = block(hidden)


def test_tokens_and_gradients_are_exact(first: tuple[GPT, dict[str, float], Watch]) -> None:
    model, values, _ = first
    x = tokens()
    model(x[:, :-1], x[:, 1:]).backward()
    hidden = model.wte(x[:, :-1]) + model.wpe.weight[:16]
    for number, block in enumerate(model.blocks):
        cosines = F.cosine_similarity(
            hidden.unsqueeze(1), hidden.unsqueeze(2), dim=-1
        )  # (batch, tokens, tokens)
        off = cosines.masked_select(~torch.eye(16, dtype=torch.bool)).mean()
        assert values[f"block/{number}/similarity"] == pytest.approx(float(off), rel=1e-4)
        for role in "qkv":
            gradient = getattr(block.attn, role).weight.grad
            assert gradient is not None
            assert values[f"block/{number}/grad_{role}"] == pytest.approx(
                float(gradient.norm()), rel=1e-5
            )
        hidden = block(hidden)


def test_what_the_clip_did_is_told(first: tuple[GPT, dict[str, float], Watch]) -> None:
    _, values, watch = first
    stats = watch._optimizer.stats()
    for name, entry in stats.items():
        assert (
            values[f"clip/{name}/lr"] == entry.lr
            and values[f"clip/{name}/clipped"] == entry.clipped
        )
    clipped = [entry.clipped for name, entry in stats.items() if name.endswith("attn.q.weight")]
    assert values["clip_share/attn.q"] == sum(clipped) / len(clipped)
    assert "clip_share_block/2" in values


def test_gradients_of_another_optimizer_are_told_too(
    first: tuple[GPT, dict[str, float], Watch],
) -> None:
    _, expected, _ = first
    _, values, watch = measured("adamw")
    for tag in ("block/0/grad_q", "block/2/grad_v", "block/1/sigma_qk"):
        assert values[tag] == pytest.approx(expected[tag], rel=1e-6)
    assert not any(tag.startswith("clip/") for tag in values)
    watch.close()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_between_measurements_nothing_is_hooked() -> None:
    torch.manual_seed(3)
    model = GPT(CONFIG)
    optimizer = AdamW2(model.named_parameters(), lr=0.01)
    watch = Watch(model, optimizer, every=5)
    found = []
    for step in range(1, 11):
        x = tokens()
        assert bool(hooks_of(model)) == (step in (1, 5, 10)), step
        model(x[:, :-1], x[:, 1:]).backward()
        assert hooks_of(model) == 0
        optimizer.step()
        found.append(bool(watch.step()))
    assert [step + 1 for step, value in enumerate(found) if value] == [1, 5, 10]
    watch.close()


def test_a_forward_pass_that_fails_leaves_no_hook() -> None:
    model = GPT(CONFIG)
    watch = Watch(model)
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 99))
    assert hooks_of(model) == 0 and not torch.overrides._get_current_function_mode_stack()
    watch.close()


def test_chosen_blocks_alone_are_measured() -> None:
    _, values, _ = measured(blocks=[1])
    assert {tag.split("/")[1] for tag in values if tag.startswith("block/")} == {"1"}


def test_attention_that_is_not_caught_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    watch = Watch(model, every=1)
    with caplog.at_level(logging.WARNING, "weyl_megatron"):
        for _ in range(2):
            model(torch.randn(2, 5, 16)).sum().backward()
            values = watch.step()
    watch.close()
    said = [record for record in caplog.records if "was not seen" in record.getMessage()]
    assert values["block/1/sigma_qk"] > 0 and not any("entropy" in tag for tag in values)
    assert len(said) == 2  # one for each block


def test_activation_checkpointing_changes_nothing(
    first: tuple[GPT, dict[str, float], Watch],
) -> None:
    _, expected, _ = first
    for reentrant in (False, True):
        torch.manual_seed(3)
        model = GPT(CONFIG)
        for block in model.blocks:
            forward = block.forward
            block.forward = lambda x, forward=forward, reentrant=reentrant: (
                torch.utils.checkpoint.checkpoint(  # type: ignore[method-assign]
                    forward, x, use_reentrant=reentrant
                )
            )
        watch = Watch(model)
        x = tokens()
        loss = model(x[:, :-1], x[:, 1:])
        loss.backward()
        values = watch.step(loss)
        watch.close()
        for tag, value in values.items():
            assert value == pytest.approx(expected[tag], rel=1e-5), (reentrant, tag)
        assert "block/2/grad_x" in values and "block/2/head/1/entropy" in values


def written(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        yield json.loads(line)


def test_a_run_that_goes_on_appends_to_its_lines(tmp_path: Path) -> None:
    measured(out=tmp_path)[2].close()
    with (tmp_path / "stability.jsonl").open("a") as file:
        file.write('{"event": "st')  # cut off
    measured(out=tmp_path)[2].close()
    lines = (tmp_path / "stability.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines if line != '{"event": "st'] == [
        "start",
        "step",
    ] * 2


def test_a_run_that_goes_on_counts_on(tmp_path: Path) -> None:
    _, _, watch = measured(out=tmp_path, steps_done=40, every=50)
    watch.close()
    (step,) = (
        record for record in written(tmp_path / "stability.jsonl") if record["event"] == "step"
    )
    assert step["step"] == 41  # the first of every part is measured


def test_a_warning_names_block_and_head_once() -> None:
    warnings = Warnings()
    tag = "block/3/head/1"
    assert not warnings.look({f"{tag}/entropy": 3.0, f"{tag}/sigma_qk": 1.0})
    assert not warnings.look({f"{tag}/entropy": 0.1, f"{tag}/sigma_qk": 3.9})
    assert not warnings.look({f"{tag}/entropy": 1.6, f"{tag}/sigma_qk": 50.0})
    ((block, head, text),) = warnings.look({f"{tag}/entropy": 0.1, f"{tag}/sigma_qk": 50.0})
    assert (block, head) == (3, 1) and "block 3, head 1" in text and "3 to 0.1 nats" in text
    assert not warnings.look({f"{tag}/entropy": 0.1, f"{tag}/sigma_qk": 60.0})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 0}, "every got 0"),
        ({"rows": 1.5}, "rows got 1.5"),
        ({"largest": True}, "largest got True"),
    ],
)
def test_an_impossible_setting_is_said(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Watch(GPT(CONFIG), **options)
    with pytest.raises(ValueError, match="model got int"):
        Watch(3)


MEGATRON = ["tp2", "tp2-sp", "pp2", "tp2-distopt", "dp2-distopt"]


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    run_ranks("deepspeed", HERE / "zero_worker.py", 1, str(folder), "0")
    run_ranks("deepspeed", HERE / "zero_worker.py", 2, str(folder), "1", "2", "3")
    return folder


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks("megatron", HERE / "megatron_worker.py", 1, str(folder), "one")
    run_ranks("megatron", HERE / "megatron_worker.py", 2, str(folder), *MEGATRON)
    return folder


def read(folder: Path, case: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / f"{case}.json").read_text())
    return found


@pytest.mark.parametrize("clip", ["", "project"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_under_zero_the_numbers_are_those_of_one_process(stage: int, clip: str, zero: Path) -> None:
    one, two = read(zero, f"0{clip}"), read(zero, f"{stage}{clip}")
    assert one.keys() == two.keys() and len(one) > 150
    steps = (zero / f"run{stage}{clip}" / "block_0_sigma_qk.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[1]) for line in steps][-1] == pytest.approx(
        two["block/0/sigma_qk"]
    )
    for tag, value in one.items():
        # Two steps of Adam on float32 sums in another order.
        assert two[tag] == pytest.approx(value, rel=1e-4, abs=1e-7), tag


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_under_zero_what_was_clipped_of_projected_matrices_is_told(stage: int, zero: Path) -> None:
    scaled, values = read(zero, str(stage)), read(zero, f"{stage}project")
    for key in ("directions", "share", "unseen"):
        told = {tag: value for tag, value in values.items() if tag.endswith(f"/{key}")}
        assert len(told) == 3 * 6  # the matrices of three blocks, and neither embeddings nor head
        assert all(tag.startswith("clip/blocks.") and tag not in scaled for tag in told)
        assert all(0 < value <= (4 if key == "directions" else 1) for value in told.values())


def test_micro_batches_are_no_steps(zero: Path) -> None:
    counts = json.loads((zero / "accumulated.json").read_text())
    assert counts[0] == counts[2] == 0 and counts[1] == counts[3] > 50


@pytest.mark.parametrize("case", MEGATRON)
def test_under_megatron_the_numbers_are_those_of_one_process(case: str, megatron: Path) -> None:
    one, two = read(megatron, "one"), read(megatron, case)
    if case.startswith("dp2"):  # a rank's first micro-batch is another one
        one = {
            tag: value
            for tag, value in one.items()
            if "sigma" in tag or "grad_q" in tag or "sec" in tag
        }
    if case == "tp2-sp":  # no rank has a whole sequence between blocks
        one = {
            tag: value
            for tag, value in one.items()
            if "similarity" not in tag and "entropy_bound" not in tag
        }
    assert one.keys() <= two.keys() and len(one) > 100
    for tag, value in one.items():
        assert two[tag] == pytest.approx(value, rel=1e-4, abs=1e-7), tag


def compiled_whole(model: GPT) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_in_place(model: GPT) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_by_block(model: GPT) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_by_block])
def test_of_a_compiled_model_everything_is_measured(compiled: Any) -> None:
    """Hooks that come after a graph was traced are not in it: the measured passes have to be traced
    anew.
    """

    def run(prepare: Any) -> dict[str, float]:
        torch.manual_seed(3)
        model = GPT(CONFIG)
        optimizer = AdamW2(model.named_parameters(), lr=0.05, weight_decay=0.0)
        prepared, x = prepare(model), tokens()
        watch, values = None, dict[str, float]()
        for step in range(5):
            if step == 2:
                watch = Watch(prepared, optimizer, every=2)
            optimizer.zero_grad()
            loss = prepared(x[:, :-1], x[:, 1:])
            loss.backward()
            optimizer.step()
            if watch is not None:
                values = dict(watch.step(loss)) or values
        return values

    expected = run(lambda model: model)
    found = run(compiled)
    assert found.keys() == expected.keys() and any(tag.endswith("/entropy") for tag in found)
    assert found == pytest.approx(
        expected, rel=1e-4, abs=1e-6
    )  # traced products are summed in another order
