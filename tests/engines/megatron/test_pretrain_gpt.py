"""The adapter of Megatron-LM's own training scripts: ``python -m weyl_megatron.engines.megatron
pretrain_gpt.py …``.

Megatron-LM is on no registry: MEGATRON_LM names a checkout. Its training package, without the
scripts, is also in the wheels of megatron-core from 0.18 on.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.processes import HANGS, ROOT, run_ranks
from weyl_megatron.engines.megatron import arguments, enable

HERE = Path(__file__).parent
CHECKOUT = os.environ.get("MEGATRON_LM", "")

needs_checkout = pytest.mark.skipif(
    not Path(CHECKOUT, "pretrain_gpt.py").is_file(),
    reason="MEGATRON_LM names no checkout of Megatron-LM",
)


def has_training() -> bool:
    try:
        return (
            Path(CHECKOUT, "megatron/training").is_dir()
            or find_spec("megatron.training") is not None
        )
    except ModuleNotFoundError:
        return False


needs_training = pytest.mark.skipif(
    not has_training(),
    reason="megatron.training is in no wheel before 0.18, and MEGATRON_LM names no checkout",
)


# The flags, on a parser of our own.


def megatron_like(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--optimizer", default="adam", choices=["adam", "sgd"])
    parser.add_argument("--yaml-cfg", default=None)
    return parser


def parse(*flags: str) -> argparse.Namespace:
    return arguments.extend(megatron_like(argparse.ArgumentParser("pretrain_gpt.py"))).parse_args(
        flags
    )


def test_defaults_are_those_of_enable() -> None:
    of_enable = {
        key: parameter.default for key, parameter in inspect.signature(enable).parameters.items()
    }
    assert arguments.options_of(parse("--optimizer", "adamw2")) == of_enable


def test_every_flag_arrives() -> None:
    flags = (
        "--adamw2-tau 0.1 --adamw2-power-iters 3 --adamw2-floor-std 0 "
        "--adamw2-clip-vectors --adamw2-no-split-fused"
    )
    flags += " --adamw2-nonfinite raise --adamw2-nonfinite-limit 3"
    flags += " --adamw2-spike log --adamw2-clip project --adamw2-vectors 12"
    more = ["--adamw2-io", "*.wte", "*.head", "--adamw2-overrides", '[{"match": "*", "tau": 0.2}]']
    assert arguments.options_of(parse("--optimizer", "adamw2", *flags.split(), *more)) == {
        "tau": 0.1,
        "power_iters": 3,
        "floor_std": 0,
        "clip_vectors": True,
        "io": ["*.wte", "*.head"],
        "overrides": [{"match": "*", "tau": 0.2}],
        "nonfinite": "raise",
        "nonfinite_limit": 3,
        "spike": "log",
        "clip": "project",
        "vectors": 12,
        "split_fused": False,
    }
    for word in ("balanced", "auto"):
        assert parse("--optimizer", "adamw2", "--adamw2-tau", word).adamw2_tau == word


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    printed = capsys.readouterr().out
    assert "--optimizer {adam,sgd,adamw2}" in printed and "\nadamw2:\n" in printed
    assert all(
        f"--adamw2-{flag}" in printed
        for flag in ("tau", "io PATTERN", "overrides JSON", "no-split-fused")
    )


def test_other_optimizers_get_nothing_of_ours() -> None:
    assert vars(parse()) == {"optimizer": "adam", "yaml_cfg": None}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--adamw2-tau -1",
            "--adamw2-tau got -1, it takes a number above 0 (infinity is AdamW) or 'balanced'.",
        ),
        (
            "--adamw2-tau nan",
            "--adamw2-tau got nan, it takes a number above 0 (infinity is AdamW) or 'balanced'.",
        ),
        (
            "--adamw2-tau small",
            "--adamw2-tau got 'small', it takes a number above 0 (infinity is AdamW) or "
            "'balanced'.",
        ),
        (
            "--adamw2-power-iters 1.5",
            "--adamw2-power-iters got 1.5, it takes a whole number from 1 on.",
        ),
        (
            "--adamw2-floor-std -0.1",
            "--adamw2-floor-std got -0.1, it takes a number from 0 (no floor) on.",
        ),
        (
            "--adamw2-nonfinite wait",
            "--adamw2-nonfinite got 'wait', it takes 'skip', 'raise', 'off' or None.",
        ),
        ("--adamw2-spike wait", "--adamw2-spike got 'wait', it takes 'log', 'skip' or None."),
        ("--adamw2-clip svd", "--adamw2-clip got 'svd', it takes 'scale' or 'project'."),
        *(
            (
                f"--adamw2-clip project --adamw2-vectors {word}",
                f"--adamw2-vectors got {read}, it takes a whole number from 1 to 64.",
            )
            for word, read in {"0": "0", "65": "65", "2.5": "2.5", "True": "'True'"}.items()
        ),
        (
            "--adamw2-vectors 8",
            "--adamw2-vectors got 8 beside clip 'scale', it takes clip 'project'.",
        ),
        (
            '--adamw2-overrides [{"match":"*","clip":"project","vectors":"8"}]',
            "--adamw2-overrides' vectors got '8', it takes a whole number from 1 to 64.",
        ),
        ("--adamw2-overrides [{", "--adamw2-overrides got '[{', it takes a JSON list like [{"),
        (
            "--adamw2-overrides [1]",
            "--adamw2-overrides got 1, it takes {'match': pattern, 'tau': 0.1} and the like.",
        ),
        (
            "--yaml-cfg a.yaml",
            "--yaml-cfg got 'a.yaml', which replaces all flags, but --optimizer adamw2 is one.",
        ),
    ],
)
def test_bad_values_stop_with_one_sentence(
    flags: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--optimizer", "adamw2", *flags.split())
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith(f"pretrain_gpt.py: error: {sentence}")


def test_a_patched_tree_is_told_to_do_without_the_door() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["adam", "adamw2"])
    with pytest.raises(SystemExit, match="this Megatron-LM has its patch: run the script itself"):
        arguments.extend(parser)


def test_flags_of_adamw2_need_adamw2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--optimizer", "sgd", "--adamw2-clip-vectors")
    sentence = "--adamw2-clip-vectors takes --optimizer adamw2, but --optimizer got 'sgd'."
    assert capsys.readouterr().err == f"pretrain_gpt.py: error: {sentence}\n"


# What is put around Megatron's functions, on stand-ins for them.


class StandIn:
    """The modules of a megatron.training, one of which has imported a function of another by
    name.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.enabled: list[dict[str, Any]] = []
        self.arguments = ModuleType("megatron.training.arguments")
        self.training = ModuleType("megatron.training.training")
        self.initialize = ModuleType("megatron.training.initialize")
        self.arguments.add_megatron_arguments = megatron_like
        self.arguments.validate_args = self.initialize.validate_args = self.validate
        self.training.get_megatron_optimizer_config = self.configure
        for module in (self.arguments, self.training, self.initialize):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(arguments, "enable", lambda **options: self.enabled.append(options))

    def validate(self, args: argparse.Namespace, defaults: dict[str, Any]) -> argparse.Namespace:
        self.seen.append(args.optimizer)
        return args

    def configure(self, args: argparse.Namespace) -> tuple[argparse.Namespace, None]:
        self.seen.append(args.optimizer)
        return argparse.Namespace(optimizer=args.optimizer), None

    def run(self, *flags: str) -> str:
        arguments.install()
        args = self.arguments.add_megatron_arguments(argparse.ArgumentParser()).parse_args(flags)
        args = self.initialize.validate_args(args, {})
        config, _ = self.training.get_megatron_optimizer_config(args)
        assert args.optimizer == config.optimizer
        return config.optimizer


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


def test_megatron_sees_adam_where_it_decides_by_the_name(megatron: StandIn) -> None:
    assert megatron.run("--optimizer", "adamw2", "--adamw2-tau", "0.1") == "adamw2"
    assert megatron.seen == ["adam", "adam"]
    assert [options["tau"] for options in megatron.enabled] == [0.1]


def test_adam_stays_adam(megatron: StandIn) -> None:
    assert megatron.run() == "adam"
    assert megatron.seen == ["adam", "adam"] and megatron.enabled == []


@pytest.mark.parametrize("name", ["add_megatron_arguments", "validate_args"])
def test_another_megatron_is_refused(megatron: StandIn, name: str) -> None:
    delattr(megatron.arguments, name)
    with pytest.raises(SystemExit, match=rf"megatron\.training\.arguments has no {name}\(\)"):
        arguments.install()


def test_another_optimizer_flag_is_refused() -> None:
    with pytest.raises(SystemExit, match="--optimizer has no choices"):
        arguments.extend(argparse.ArgumentParser())


@pytest.mark.parametrize("flag", ["use_torch_fsdp2", "optimizer_cuda_graph"])
def test_what_no_adamw2_can_do_is_refused(megatron: StandIn, flag: str) -> None:
    arguments.install()
    args = parse("--optimizer", "adamw2")
    setattr(args, flag, True)
    with pytest.raises(
        SystemExit, match=f"--{flag.replace('_', '-')} cannot be used with --optimizer adamw2"
    ):
        megatron.initialize.validate_args(args, {})
    assert megatron.enabled == [] and megatron.seen == []  # Megatron itself has not said a word


@pytest.mark.parametrize(("kind", "ranks"), [("", 2), ("expert_", 1)])
def test_more_weight_shards_than_tensor_parallel_ranks_are_refused(
    megatron: StandIn, kind: str, ranks: int
) -> None:
    """Megatron-core 0.19 cuts weights further than tensor parallelism does, and each slice would be
    a matrix.
    """
    arguments.install()
    args = parse("--optimizer", "adamw2")
    args.tensor_model_parallel_size, args.expert_tensor_parallel_size = 2, 1
    setattr(args, f"{kind}tensor_parallel_num_weight_shards", 4)
    sentence = (
        "tensor-parallel-num-weight-shards got 4, but with --optimizer adamw2 it takes "
        f"{ranks}, the number"
    )
    with pytest.raises(SystemExit, match=sentence):
        megatron.initialize.validate_args(args, {})
    setattr(args, f"{kind}tensor_parallel_num_weight_shards", ranks)
    assert megatron.initialize.validate_args(args, {}) is args


# The command.


def adapter(*argv: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), path])),
        CUDA_VISIBLE_DEVICES="",
    )
    command = [sys.executable, "-m", "weyl_megatron.engines.megatron", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)


def test_importing_the_door_leaves_the_choice_of_a_megatron_open() -> None:
    code = (
        "import sys, weyl_megatron.engines.megatron.__main__; print({m.split('.')[0] for "
        "m in sys.modules})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=HANGS
    )
    assert "'weyl_megatron'" in run.stdout and "'megatron'" not in run.stdout


def test_usage() -> None:
    for argv in ([], ["--help"]):
        run = adapter(*argv)
        assert run.returncode == 0 and "--adamw2-no-split-fused" in run.stdout
        assert run.stdout.startswith("usage: python -m weyl_megatron.engines.megatron SCRIPT")


def test_a_missing_script_stops_with_one_sentence() -> None:
    run = adapter("no/pretrain_gpt.py", "--optimizer", "adamw2")
    assert run.returncode == 2
    sentence = (
        "got 'no/pretrain_gpt.py' for the script, which is no file; it takes "
        "Megatron-LM's pretrain_gpt.py or"
    )
    assert sentence in run.stderr and run.stderr.count("\n") == 1


def test_the_script_runs_as_python_runs_it(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    training = checkout / "megatron" / "training"
    training.mkdir(parents=True)
    (training / "__init__.py").touch()
    (training / "training.py").touch()
    (training / "arguments.py").write_text(
        "add_megatron_arguments = print\ndef validate_args(args): pass\n"
    )
    (checkout / "beside.py").touch()
    script = checkout / "pretrain.py"
    script.write_text(
        "import sys, beside, megatron.training as t\nprint(__name__, __file__, sys.argv, "
        "sys.path[0], t.__file__)\n"
    )
    link = tmp_path / "link.py"
    link.symlink_to(script)
    for path in (script, link):
        run = adapter(str(path), "--a", "1")
        assert run.stdout.split("\n")[0] == (
            f"__main__ {path} {[str(path), '--a', '1']} {checkout} {training / '__init__.py'}"
        ), run.stderr


# Megatron's own arguments.

SMALL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 5
    --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 0
    --weight-decay 0.1 --adam-beta2 0.95 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --transformer-impl local --no-masked-softmax-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --log-interval 1 --eval-iters 0 --eval-interval 100 --num-workers 0
    --distributed-backend gloo
"""


@needs_training
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--optimizer adam", "adam"),
        ("--optimizer adamw2 --adamw2-tau auto --use-distributed-optimizer", "adamw2"),
    ],
)
def test_megatron_parses_and_validates(flags: str, expected: str) -> None:
    script = HERE / "pretrain_script.py"
    run = adapter(str(script), *SMALL.split(), *flags.split(), path=CHECKOUT)
    assert run.returncode == 0, run.stderr[-3000:]
    sharded = "--use-distributed-optimizer" in flags
    assert f"found {expected} {sharded} {script} {HERE}\n" in run.stdout
    assert re.search(rf"^built {expected}( 0\.95 0\.1 {expected})?$", run.stdout, re.MULTILINE)
    assert re.search(rf"^  optimizer \.+ {expected}$", run.stdout, re.MULTILINE)
    assert ("adamw2_tau" in run.stdout) == (expected == "adamw2")


@needs_training
def test_megatron_shows_the_flags() -> None:
    # In its usage: the --help of 0.18 and 0.19 ends in a ValueError of argparse, with and without
    # the adapter.
    run = adapter(str(HERE / "pretrain_script.py"), "--optimizer", "none", path=CHECKOUT)
    assert run.returncode == 2
    assert (
        re.search(r"--optimizer \{adam,.*adamw2\}", run.stderr)
        and "[--adamw2-no-split-fused]" in run.stderr
    )


@needs_training
def test_megatron_stops_at_a_bad_flag() -> None:
    run = adapter(
        str(HERE / "pretrain_script.py"),
        *SMALL.split(),
        "--optimizer",
        "adamw2",
        "--adamw2-tau",
        "0",
        path=CHECKOUT,
    )
    assert run.returncode == 2
    sentence = (
        "error: --adamw2-tau got 0, it takes a number above 0 (infinity is AdamW) or 'balanced'."
    )
    assert run.stderr.rstrip().endswith(sentence)


@needs_training
@pytest.mark.parametrize("kind", ["", "expert-"])
def test_megatron_stops_at_weight_shards_beyond_tensor_parallelism(kind: str) -> None:
    flag = f"--{kind}tensor-parallel-num-weight-shards"
    script = str(HERE / "pretrain_script.py")
    run = adapter(script, *SMALL.split(), "--optimizer", "adamw2", flag, "2", path=CHECKOUT)
    if f"unrecognized arguments: {flag}" in run.stderr:
        pytest.skip("megatron.training before 0.19 has no weight shards")
    assert run.returncode != 0 and run.stderr.rstrip().splitlines()[-1] == (
        f"{flag} got 2, but with --optimizer adamw2 it takes 1, the number of tensor-parallel "
        "ranks."
    )


# Megatron-LM's pretrain_gpt.py.

Losses = list[tuple[str, ...]]


@pytest.fixture(scope="module")
def pretrain() -> Callable[[str, str], tuple[Losses, list[str]]]:
    def run(way: str, flags: str) -> tuple[Losses, list[str]]:
        """Return iteration, learning rate, loss and gradient norm as printed, and the classes that
        made the steps.
        """
        argv = [CHECKOUT, *SMALL.split(), "--tensor-model-parallel-size", "2", *flags.split()]
        printed = run_ranks("torch", HERE / "pretrain_worker.py", 2, way, *argv)
        number = r"([-+.\dE]+|nan|inf)"
        losses = (
            rf"iteration +(\d+)/.*learning rate: {number} .*lm loss: {number} .*"
            rf"grad norm: {number} "
        )
        return re.findall(losses, printed), re.findall(r"stepped (\w+)", printed)

    return run


@needs_checkout
def test_pretrain_gpt_trains(pretrain: Callable[[str, str], tuple[Losses, list[str]]]) -> None:
    adam, _ = pretrain("plain", "--optimizer adam")
    beside, classes = pretrain("adapter", "--optimizer adam")
    assert len(adam) == 5 and beside == adam and "AdamW2" not in classes

    adamw2, classes = pretrain("adapter", "--optimizer adamw2 --adamw2-tau 0.01")
    assert set(classes) == {"AdamW2"} and len(classes) == 10  # five steps on two ranks
    assert all(0 < float(loss) < 10 for _, _, loss, _ in adamw2)
    assert adamw2[0] == adam[0] and all(
        ours != theirs for ours, theirs in zip(adamw2[1:], adam[1:], strict=True)
    )

    sharded, classes = pretrain(
        "adapter",
        "--optimizer adamw2 --use-distributed-optimizer --overlap-grad-reduce "
        "--overlap-param-gather",
    )
    assert set(classes) == {"AdamW2"}
    for ours, theirs in zip(sharded, adamw2, strict=True):
        assert [float(number) for number in ours] == pytest.approx(
            [float(number) for number in theirs], rel=1e-3
        )


@needs_checkout
def test_megatron_fsdp_trains_and_resumes_as_the_distributed_optimizer_does(
    pretrain: Callable[[str, str], tuple[Losses, list[str]]], tmp_path: Path
) -> None:
    """Loss and norm to the last digit that is printed, from the start and from a checkpoint."""
    sharded = (
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
        "--no-gradient-reduce-div-fusion --ckpt-format fsdp_dtensor"
    )
    runs = []
    for name, flags in {"usual": "--ckpt-format torch_dist", "sharded": sharded}.items():
        folder = tmp_path / name
        flags += " --optimizer adamw2 --use-distributed-optimizer --tensor-model-parallel-size 1"
        first, classes = pretrain("adapter", f"{flags} --save {folder} --save-interval 3")
        assert set(classes) == {"AdamW2"} and len(first) == 5
        (folder / "latest_checkpointed_iteration.txt").write_text("3")
        resumed, _ = pretrain("adapter", f"{flags} --load {folder}")
        assert len(resumed) == 2
        runs.append((first, resumed))
    assert runs[0] == runs[1]


@needs_checkout
def test_the_script_itself_trains_under_the_variable_what_it_trains_through_the_module(
    pretrain: Callable[[str, str], tuple[Losses, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"adam": "", "adamw2": "--use-distributed-optimizer"}
    through = {
        name: pretrain(
            "adapter", f"--optimizer adamw2 --adamw2-tau 0.02 --adamw2-clip project {flags}"
        )
        for name, flags in ways.items()
    }
    monkeypatch.setenv("WEYL_MEGATRON", "tau=0.02,clip=project")
    for name, flags in ways.items():
        losses, classes = pretrain("plain", f"--optimizer {name} {flags}")
        assert len(losses) == 5 and losses == through[name][0]
        assert set(classes) == {"AdamW2"}


@needs_checkout
def test_pretrain_gpt_trains_on_what_the_example_prepared(tmp_path: Path) -> None:
    text = sorted(map(str, Path(os.__file__).parent.glob("*.py")))
    prepare = [
        sys.executable,
        str(ROOT / "examples/megatron/prepare.py"),
        *text,
        "--vocab-size",
        "512",
    ]
    subprocess.run([*prepare, "--prefix", str(tmp_path / "text")], check=True)
    flags = (
        f"--data-path {tmp_path}/text_text_document --split 90,10,0 --tokenizer-type "
        f"GPTSentencePieceTokenizer --tokenizer-model {tmp_path}/text.model "
        "--tensor-model-parallel-size 2 --use-distributed-optimizer --optimizer adamw2 "
        "--adamw2-tau auto"
    )
    small = SMALL.replace("--mock-data --tokenizer-type NullTokenizer", "").replace(
        "--vocab-size 127", ""
    )
    printed = run_ranks(
        "torch", HERE / "pretrain_worker.py", 4, "adapter", CHECKOUT, *small.split(), *flags.split()
    )
    losses = [float(loss) for loss in re.findall(r"lm loss: ([.\dE+-]+)", printed)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.1
    assert losses[0] == pytest.approx(math.log(512), rel=0.02), (
        "tokens are not those of the tokenizer"
    )
