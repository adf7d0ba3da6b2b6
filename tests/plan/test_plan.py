from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.processes import ROOT, run_ranks
from weyl_megatron import AdamW2
from weyl_megatron.demo.data import load_corpus, sequences, training_offsets
from weyl_megatron.demo.model import GPT, GPTConfig
from weyl_megatron.plan.forecast import kind_of
from weyl_megatron.plan.models import load
from weyl_megatron.plan.plan import Row, plan, run, suggest
from weyl_megatron.rule import balanced_floor

MESH_WORKER = Path(__file__).parent / "mesh_worker.py"

STEPS, LR = 120, 2e-3


#: How far the typical step may be from the measured one, beside 2 steps: 2.1 was the most when this
#: was written.
FACTOR = 2.5

Runs = dict[str, list[list[tuple[bool, float]]]]


def rate(step: int) -> float:
    return LR * (0.1 + 0.9 * (1 + math.cos(math.pi * step / STEPS)) / 2)


@pytest.fixture(scope="module", params=[0.01, 0.03])
def training(request: pytest.FixtureRequest) -> tuple[list[Row], Runs]:
    """A plan, and of the same run every matrix of each kind: whether it was clipped, and α_W / α_t,
    at every step.
    """
    torch.manual_seed(7)
    model = GPT(GPTConfig(layers=4))
    rows = plan(model.named_parameters(), LR, taus=[request.param], steps=STEPS)
    optimizer = AdamW2(
        model.named_parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, tau=request.param
    )
    corpus = load_corpus()
    offsets = training_offsets(corpus, STEPS, 8, 64, seed=7)
    by_name: dict[str, list[tuple[bool, float]]] = {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        model.zero_grad()
        model(*sequences(corpus.train, offsets[step], 64)).backward()
        optimizer.step()
        for name, entry in optimizer.stats().items():
            by_name.setdefault(name, []).append((entry.clipped, entry.lr / rate(step)))
    runs: Runs = {}
    for name, steps in by_name.items():
        runs.setdefault(kind_of(name), []).append(steps)
    return rows, runs


def first_free(steps: list[tuple[bool, float]]) -> int:
    return next((number for number, (clipped, _) in enumerate(steps) if not clipped), STEPS)


def test_a_real_run_s_clip_ends_within_the_planned_range(training: tuple[list[Row], Runs]) -> None:
    """The run differs from those that the forecast is made of in seed, depth, rate and, once, τ."""
    rows, runs = training
    assert {row.kind for row in rows} == set(runs)
    for row in rows:
        assert len(runs[row.kind]) == row.count
        first = median(map(first_free, runs[row.kind]))
        earliest, typical, latest = (
            STEPS if s is None else s for s in (row.earliest, row.typical, row.latest)
        )
        assert earliest <= first <= latest, row
        assert typical / FACTOR - 2 <= first <= FACTOR * typical + 2, row


def test_a_real_run_s_rates_are_as_planned(training: tuple[list[Row], Runs]) -> None:
    rows, runs = training
    for row in rows:
        start, later = (median(steps[number][1] for steps in runs[row.kind]) for number in (0, 100))
        assert row.rate_first == pytest.approx(start, rel=0.3), (
            row
        )  # measured: 27 % off at the most
        assert row.rate_settled == pytest.approx(later, rel=0.3), row  # 7 %


def named(**matrices: Tensor) -> list[tuple[str, Tensor]]:
    return [(f"{name}.weight", matrix) for name, matrix in matrices.items()]


def test_sigma_is_the_optimizer_s_measure_of_each_part_of_a_fused_weight() -> None:
    torch.manual_seed(0)
    fused, bias = torch.randn(24, 72), torch.ones(72)
    rows = plan(
        [("h.0.attn.c_attn.weight", fused), ("h.0.attn.c_attn.bias", bias)], 1e-3, taus=[0.01]
    )
    assert [row.kind for row in rows] == ["q", "k", "v"]
    for row, part in zip(rows, fused.chunk(3, 1), strict=True):
        assert row.sigma_weight == pytest.approx(float(torch.linalg.matrix_norm(part, 2)), rel=0.02)
        assert (row.rows, row.cols, row.count) == (24, 24, 1)
        assert row.sigma_update[0] <= row.sigma_update[1] <= row.sigma_update[2] == 24
        excess = 1e-3 * row.sigma_update[1] / (0.01 * row.sigma_weight)
        assert row.formula == max(0, math.ceil(math.log(excess) / 0.01))


def test_a_head_s_clip_ends_as_the_docstring_says() -> None:
    """With σ₁(U) = .65 √(mn) all the time it is (1 + ln x) / τ; the settled .35 is reached at step
    300.
    """
    head = torch.eye(64, 256) * 2
    matrices = named(wte=torch.randn(256, 64), lm_head=head)
    row = next(row for row in plan(matrices, 1e-3, taus=[0.002]) if row.kind == "head")
    excess = 1e-3 * 0.35 * 128 / (0.002 * 2)
    assert row.typical == pytest.approx((1 + math.log(excess)) / 0.002, rel=0.02)


def test_a_small_rate_is_never_clipped_and_a_warmup_takes_the_clip_s_place() -> None:
    matrices = named(wte=torch.randn(50, 8), q=torch.randn(8, 8))
    assert {(row.latest, row.rate_first) for row in plan(matrices, 1e-6, taus=[0.01])} == {(0, 1.0)}
    alone, warmed = (
        plan(named(fc=torch.eye(32)), 1.5e-3, taus=[0.01], steps=400, warmup=w)[0] for w in (0, 200)
    )
    assert alone.typical is not None and alone.typical > 0 and alone.rate_first < 0.4
    assert (warmed.typical, warmed.rate_first) == (0, 1.0)


def test_balanced_thresholds_are_the_optimizer_s() -> None:
    matrices = [
        (name, torch.randn(8, 8))
        for name in ("wte.weight", "h.0.q.weight", "h.0.k.weight", "lm_head.weight")
    ]
    rows = plan(matrices, 1e-3, taus=["auto"])
    assert [(row.kind, row.tau, row.is_hidden) for row in rows] == [
        ("embedding", 0.1, False),
        ("q", 0.072, True),
        ("k", 0.072, True),
        ("head", 0.1, False),
    ]
    assert all(row.floor == pytest.approx(balanced_floor(8, 8)) for row in rows)


def test_suggestions_follow_from_the_numbers() -> None:
    torch.manual_seed(0)
    gpt = list(GPT(GPTConfig()).named_parameters())

    def suggested(
        matrices: list[Any], steps: int | None, lr: float = 5e-3
    ) -> tuple[float | str, str]:
        return suggest(plan(matrices, lr, steps=steps), steps)

    assert suggested(gpt, None)[0] == 0.01
    tau, reason = suggested(gpt, 300)
    assert tau == "balanced" and "the head would be clipped for about" in reason
    assert suggested(gpt, 100_000)[0] == 0.01
    zeros = [(name, torch.zeros_like(p) if "proj" in name else p) for name, p in gpt]
    assert suggested(zeros, None) == (
        "balanced",
        "5 hidden matrices start at or near zero, and balanced has a higher floor under σ₁(W) "
        "there",
    )
    deep = [*gpt, *((f"h.{n}.attn.q.weight", torch.eye(64)) for n in range(5, 300))]
    assert suggested(deep, None, 1e-4)[1].startswith("325 hidden matrices are more than the 240")
    tau, reason = suggested(deep, None)
    assert (
        tau == 0.01
        and "which is more than it was tried with, and balanced would leave hidden matrices"
        in reason
    )
    image = [
        ("patch_embed.proj.weight", torch.randn(8, 3, 2, 2)),
        ("blocks.0.attn.qkv.weight", torch.randn(24, 8)),
    ]
    assert suggested(image, None)[0] == 0.004
    assert (
        suggested([("a.weight", torch.randn(4, 4)), ("head.weight", torch.randn(4, 4))], None)[0]
        == "balanced"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "q"),
        ("model.layers.3.self_attn.o_proj.weight", "o"),
        ("model.layers.3.mlp.gate_proj.weight", "gate"),
        ("bert.encoder.layer.0.attention.self.query.weight", "q"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "o"),
        ("bert.encoder.layer.0.output.dense.weight", "w2"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "w1"),
        ("transformer.h.0.mlp.c_proj.weight", "w2"),
        ("transformer.h.0.attn.c_proj.weight", "o"),
        ("layers.0.self_attn.in_proj_weight[v]", "v"),
        ("gpt_neox.layers.0.attention.query_key_value.weight", "qkv"),
        ("decoder.layers.0.self_attention.linear_proj.weight", "o"),
        ("blocks.0.mlp.fc2.weight", "w2"),
        ("layers.1.blocks.0.attn.relative_position_bias_table", "position bias"),
        ("embedding.position_embeddings.weight", "positions"),
        ("embedding.word_embeddings.weight", "embedding"),
        ("patch_embed.proj.weight", "patch embedding"),
        ("layers.1.downsample.reduction.weight", "other"),
    ],
)
def test_kinds_are_told_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def arguments(model: Path | str, **others: Any) -> argparse.Namespace:
    keys = ("run", "lr", "steps", "warmup", "tau", "json")
    return argparse.Namespace(model=str(model), **{**dict.fromkeys(keys), **others})


def test_a_recipe_brings_its_schedule_and_json_has_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    recipe = ROOT / "examples" / "megatron" / "recipes" / "tiny.yaml"
    assert run(arguments(recipe, tau=["0.01", "auto"], json=tmp_path / "plan.json")) == 0
    printed = capsys.readouterr().out
    assert (
        "rate 0.005, cosine to 0.0005 in 100 steps" in printed
        and "Suggested: τ = balanced, because" in printed
    )
    content = json.loads((tmp_path / "plan.json").read_text())
    assert {row["kind"] for row in content["rows"]} == {
        "tied head",
        "positions",
        "q",
        "k",
        "v",
        "o",
        "w1",
        "w2",
    }
    assert {row["asked"] for row in content["rows"]} == {0.01, "balanced"}


def test_a_checkpoint_s_tied_weights_count_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = torch.randn(20, 8)
    state = {
        "module.wte.weight": table,
        "module.h.0.q.weight": torch.eye(8),
        "module.lm_head.weight": table,
    }
    torch.save({"model": {**state, "step": torch.tensor(3)}, "epoch": 1}, tmp_path / "a.pt")
    run(arguments(tmp_path / "a.pt", tau=["0.01"]))
    assert "tied head  1      20×8" in capsys.readouterr().out
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(
        {"wte.weight": table, "h.0.q.weight": torch.eye(8)}, tmp_path / "a.safetensors"
    )
    run(arguments(tmp_path / "a.safetensors", tau=["0.01"]))
    assert "q          1      8×8    1 " in capsys.readouterr().out


def test_hugging_face_and_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    config.save_pretrained(tmp_path)
    run(arguments(tmp_path, lr=1e-3, steps=50))
    printed = capsys.readouterr().out
    assert (
        "GPT2LMHeadModel" in printed
        and "tied head  1      50×32" in printed
        and "w2         2      128×32" in printed
    )
    pytest.importorskip("timm")
    run(arguments("vit_tiny_patch16_224", tau=["0.004"]))
    assert "patch embedding  1      192×768" in capsys.readouterr().out


def test_a_large_model_made_block_by_block_has_the_same_matrices() -> None:
    transformers = pytest.importorskip("transformers")
    from weyl_megatron.plan.models import _block_by_block

    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    torch.manual_seed(0)
    whole = plan(transformers.GPT2LMHeadModel(config).named_parameters(), 1e-3, taus=[0.01])
    with torch.device("meta"):
        empty = transformers.GPT2LMHeadModel(config)
    parts = plan(_block_by_block(empty), 1e-3, taus=[0.01])
    by_kind = {row.kind: row for row in parts}
    assert set(by_kind) == {row.kind for row in whole} and len(parts) == len(whole)
    for row in whole:  # another draw of the same distribution
        other = by_kind[row.kind]
        assert (other.count, other.rows, other.cols) == (row.count, row.rows, row.cols)
        assert other.sigma_weight == pytest.approx(row.sigma_weight, rel=0.15)
    assert all(p.device.type == "meta" for p in empty.parameters())


def test_bad_inputs_are_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = named(wte=torch.randn(50, 8))
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("lr got 0", matrices, {"lr": 0}),
        ("lr got nan", matrices, {"lr": float("nan")}),
        ("taus got none", matrices, {"taus": []}),
        ("tau got -1", matrices, {"taus": [-1]}),
        ("tau got inf", matrices, {"taus": [math.inf]}),
        ("steps got 0", matrices, {"steps": 0}),
        ("warmup got 5", matrices, {"steps": 5, "warmup": 5}),
        ("has no matrix", named(bias=torch.ones(3)), {}),
        ("σ₁ of 'wte.weight' is", named(wte=torch.full((3, 3), float("nan"))), {}),
        ("nothing tells which", named(a=torch.eye(3)), {"taus": ["auto"]}),
    ]
    for message, model, options in calls:
        with pytest.raises(ValueError, match=message):
            plan(model, **{"lr": 1e-3, **options})
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "bad.pt").write_bytes(b"no")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    (tmp_path / "bad.yaml").write_text("num_layers: 2")
    torch.save({"w": nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    torch.save([1], tmp_path / "list.pt")
    for message, model in [
        ("it takes .yaml, .pt", tmp_path / "a.txt"),
        ("no config.json", tmp_path),
        ("there is no file", tmp_path / "missing.pt"),
        ("no state dict that loads with weights_only", tmp_path / "bad.pt"),
        ("no state dict that loads with weights_only", tmp_path / "pickled.pt"),
        ("no tensors by name", tmp_path / "list.pt"),
        ("lacks hidden_size, lr, train_steps", tmp_path / "bad.yaml"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(arguments(model))
    with pytest.raises(ValueError, match="--tau got 'x'"):
        run(arguments("gpt2", tau=["x"]))
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        run(arguments(tmp_path / "bad.safetensors"))


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    transformers = pytest.importorskip("transformers")

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match="the Hugging Face hub cannot be reached; it takes a folder"
    ):
        run(arguments("someone/some-model"))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_plan_of_a_model_on_a_mesh_is_that_of_the_whole_model(ranks: int) -> None:
    assert "all agree" in run_ranks("torch", MESH_WORKER, ranks)


def test_a_file_with_pieces_of_ranks_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)])
        path = tmp_path / "piece.pt"
        torch.save({"layer.weight": weight}, path)
        with pytest.raises(ValueError, match=r"'layer.weight' of .* is spread over ranks .* takes"):
            load(str(path))
    finally:
        dist.destroy_process_group()
