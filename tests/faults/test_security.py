"""What is given to be read is read, never run: checkpoints, recipes, configs; and nothing is
fetched by an import.
"""

from __future__ import annotations

import ast
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import HANGS, ROOT
from weyl_megatron.cli import main

Record = Callable[[str, object], None]
Weyl = Callable[..., str]

FOLDERS = ("weyl_megatron", "examples", "launch", "benchmarks")

#: Modules of which every function that reads runs what it reads, or that fetch.
READERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "cPickle"}
FETCHERS = {"urllib", "requests", "httpx", "aiohttp", "ftplib", "http", "huggingface_hub"}

#: What runs or fetches something all the same, by file and call, and why.
EXCEPTIONS = {
    (
        "benchmarks/cost_model/code.py",
        "eval",
    ): "a `for` of the package's own kernels, which says how often a loop runs",
    (
        "examples/megatron/checkpoint.py",
        "dist_checkpointing.load",
    ): "Megatron's own format, whose index is read before",
    (
        "examples/megatron/checkpoint.py",
        "import pickle",
    ): "an unpickler that finds torch's own records only",
    (
        "examples/deepspeed/loop.py",
        "engine.load_checkpoint",
    ): "every file was read with weights_only=True before",
    ("examples/deepspeed/loop.py", "import pickle"): "the class of an error",
    (
        "weyl_megatron/plan/models.py",
        "transformers.AutoConfig.from_pretrained",
    ): "a config that a user names",
    ("weyl_megatron/plan/models.py", "import pickle"): "the class of an error",
}


def called(node: ast.expr) -> str:
    """Return the dotted name of what is called."""
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def keyword(call: ast.Call, name: str) -> Any:
    """Return the constant that a call gives for a keyword; None where it gives none, or no
    constant.
    """
    found = next((each.value for each in call.keywords if each.arg == name), None)
    return found.value if isinstance(found, ast.Constant) else None


def offences(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every call and import that may run, or fetch, what it is
    given.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for name in names:
                if name.split(".")[0] in READERS | FETCHERS:
                    yield node.lineno, f"import {name}"
        if isinstance(node, ast.Call) and may_run(node):
            yield node.lineno, called(node.func) or "a call"


def may_run(call: ast.Call) -> bool:
    name = called(call.func)
    first, last = name.split(".")[0], name.split(".")[-1]
    return (
        name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen")
        or (name == "torch.load" and keyword(call, "weights_only") is not True)
        or (
            first == "yaml" and last.endswith(("load", "load_all")) and not last.startswith("safe_")
        )
        or (first in READERS and last in ("load", "loads", "Unpickler", "open"))
        or name in ("dist_checkpointing.load", "torch.hub.load")
        or last in ("load_checkpoint", "from_pretrained")
        or any(keyword(call, each) for each in ("shell", "trust_remote_code", "allow_pickle"))
    )


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "yaml.full_load_all(text)",
        "pickle.loads(data)",
        "from pickle import loads",
        "import urllib.request",
        "eval(text)",
        "exec(text)",
        "os.system(line)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name)",
        "f(trust_remote_code=True)",
        "numpy.load(path, allow_pickle=True)",
        "torch.hub.load(repo, name)",
    ],
)
def test_the_search_finds_what_would_run(line: str) -> None:
    assert list(offences(line))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "json.load(file)",
        "numpy.load(path)",
        "model.eval()",
    ],
)
def test_the_search_passes_what_only_reads(line: str) -> None:
    assert not list(offences(line))


def test_no_source_runs_what_it_reads(record_property: Record) -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        (str(path.relative_to(ROOT)), name): line
        for path in files
        for line, name in offences(path.read_text(encoding="utf-8"))
    }
    unexplained = {place: line for place, line in found.items() if place not in EXCEPTIONS}
    assert not unexplained
    assert not EXCEPTIONS.keys() - found.keys(), "explained, but not there"
    record_property(
        "tried", f"a search of {len(files)} files for what runs or fetches what it reads"
    )
    record_property("survived", f"nothing but {len(EXCEPTIONS)} calls with a reason each")


class Bomb:
    """Pickled, it is a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def went_off(tmp_path: Path) -> Path:
    return tmp_path / "it went off"


@pytest.fixture
def weyl(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to end with one sentence, and returns that."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert len(printed) == 1 and printed[0].startswith("weyl-megatron: error: "), printed
        return printed[0].removeprefix("weyl-megatron: error: ")

    return run


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_plan_refuses_a_checkpoint_that_would_run_code(
    form: str, suffix: str, tmp_path: Path, went_off: Path, weyl: Weyl, record_property: Record
) -> None:
    path = tmp_path / f"model{suffix}"
    state = {"w": torch.ones(3, 3), "bomb": Bomb(went_off)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(state["bomb"]))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    sentence = weyl("plan", str(path))
    assert sentence.startswith(f"plan: {path} is no ") and not went_off.exists()
    record_property(
        "tried", f"weyl-megatron plan of a {suffix} file that is a {form} with a call in it"
    )
    record_property("survived", "refused in one sentence, nothing ran")
    with path.open("rb") as file:  # it is a bomb
        (torch.load(file, weights_only=False) if form != "pickle" else pickle.load(file))
    assert went_off.exists()


YAML_BOMBS = {
    "apply": "!!python/object/apply:os.mkdir ['{path}']",
    "new": "!!python/object/new:os.mkdir ['{path}']",
    "value": "lr: !!python/object/apply:os.mkdir ['{path}']",
}


@pytest.mark.parametrize("bomb", YAML_BOMBS)
def test_plan_refuses_a_recipe_that_would_run_code(
    bomb: str, tmp_path: Path, went_off: Path, weyl: Weyl, record_property: Record
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML_BOMBS[bomb].format(path=went_off))
    sentence = weyl("plan", str(path))
    assert "is no YAML" in sentence and not went_off.exists()
    record_property(
        "tried",
        f"weyl-megatron plan of a YAML recipe with {YAML_BOMBS[bomb].split('[')[0].strip()}",
    )
    record_property("survived", "refused in one sentence, nothing ran")


def test_the_yaml_bombs_go_off_where_they_are_let(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    for number, text in enumerate(YAML_BOMBS.values()):
        path = tmp_path / str(number)
        yaml.unsafe_load(text.format(path=path))
        assert path.exists()


@pytest.mark.parametrize("where", ["file", "--set"])
@pytest.mark.parametrize("example", ["megatron", "deepspeed"])
def test_examples_refuse_a_recipe_that_would_run_code(
    example: str, where: str, tmp_path: Path, went_off: Path, record_property: Record
) -> None:
    pytest.importorskip("yaml")
    pytest.importorskip("megatron.core" if example == "megatron" else "deepspeed")
    pytest.importorskip("sentencepiece")
    recipes = ROOT / "examples" / example / "recipes"
    path = next(iter(sorted(recipes.glob("gpt*.yaml"))))
    text = YAML_BOMBS["value"].format(path=went_off)
    override: list[str] = []
    if where == "file":
        (tmp_path / "recipe.yaml").write_text(path.read_text() + "\n" + text + "\n")
        path = tmp_path / "recipe.yaml"
    else:
        override = ["--set", text.replace("lr: ", "lr=")]
    script = ROOT / "examples" / example / "pretrain_gpt.py"
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    environment |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    data = ["--data", str(tmp_path)]
    command = [sys.executable, str(script), str(path), *data, *override]
    command += (
        ["--out", str(tmp_path / "out")]
        if example == "deepspeed"
        else ["--tokenizer", str(tmp_path)]
    )
    run = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
        cwd=tmp_path,
    )
    assert run.returncode != 0 and "Traceback" not in run.stderr, run.stderr[-3000:]
    assert "take YAML, got could not determine a constructor for the tag" in run.stderr, run.stderr[
        -3000:
    ]
    assert not went_off.exists()
    record_property("tried", f"examples/{example} with a call in the recipe's {where}")
    record_property("survived", "refused in one sentence, nothing ran")


@pytest.mark.parametrize("log", ["stability.jsonl", "log.jsonl"])
def test_the_report_runs_nothing_that_it_reads(
    log: str,
    tmp_path: Path,
    went_off: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Record,
) -> None:
    folder, page = tmp_path / "run", tmp_path / "report.html"
    folder.mkdir()
    (folder / log).write_bytes(pickle.dumps(Bomb(went_off)))
    torch.save({"bomb": Bomb(went_off)}, folder / "checkpoint.pt")
    status = main(["report", str(folder), "--out", str(page)])
    printed = "".join(capsys.readouterr()) + (page.read_text() if page.exists() else "")
    assert f"{folder / log}: line 1 is cut off" in printed and status != 0 and not went_off.exists()
    record_property("tried", f"weyl-megatron report of a {log} that is a pickle with a call in it")
    record_property("survived", "named as no JSON, nothing ran")


def test_plan_runs_no_code_that_a_config_brings_along(
    tmp_path: Path, went_off: Path, record_property: Record
) -> None:
    """Hugging Face's configs may name Python files beside them, which transformers runs where it is
    told to.
    """
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(
        '{"model_type": "of its own", "auto_map": {"AutoConfig": "configuration_bomb.Config"}}'
    )
    (tmp_path / "configuration_bomb.py").write_text(f"import os\nos.mkdir({str(went_off)!r})\n")
    code = "import sys; from weyl_megatron.cli import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run(  # with nobody to answer whether it may
        [sys.executable, "-c", code, "plan", str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    sentence = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2 and sentence.startswith("weyl-megatron: error: plan: "), run.stderr
    assert "Traceback" not in run.stderr and not went_off.exists()
    record_property("tried", "weyl-megatron plan of a config that brings code along")
    record_property("survived", "refused in one sentence, nothing ran")


RESUME = """
import sys
from pathlib import Path
import torch.distributed as dist
from examples.deepspeed.loop import check
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
check(Path(sys.argv[1]), 0)
"""


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_the_deepspeed_example_refuses_a_checkpoint_that_would_run_code(
    form: str, tmp_path: Path, went_off: Path, record_property: Record
) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "step_1").mkdir()
    (tmp_path / "latest").write_text("step_1")
    path = tmp_path / "step_1" / "mp_rank_00_model_states.pt"
    torch.save({"module": Bomb(went_off)}, path, _use_new_zipfile_serialization=form == "zip")
    run = subprocess.run(
        [sys.executable, "-c", RESUME, str(tmp_path)],
        env={
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert run.returncode != 0 and str(path) in run.stderr, run.stderr[-3000:]
    assert "Traceback" not in run.stderr and not went_off.exists()
    record_property("tried", f"examples/deepspeed on a checkpoint, {form}, with a call in it")
    record_property("survived", "refused in one sentence, nothing ran")


INDEX = """
import sys
from pathlib import Path
from tests import megatron_cpu
megatron_cpu.install()
sys.path.insert(0, "examples/megatron")
import checkpoint
try:
    checkpoint.check(Path(sys.argv[1]))
except ValueError as error:
    sys.exit(str(error))
"""


def test_the_megatron_example_refuses_a_checkpoint_that_would_run_code(
    tmp_path: Path, went_off: Path, record_property: Record
) -> None:
    pytest.importorskip("megatron.core")
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps({"state_dict_metadata": Bomb(went_off)}))
    run = subprocess.run(
        [sys.executable, "-c", INDEX, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert run.returncode == 1 and run.stderr.strip().splitlines()[-1] == (
        f"--load takes torch's own records in {path}, got posix.mkdir, which could run code"
    )
    assert not went_off.exists()
    record_property("tried", "examples/megatron on a checkpoint with a call in its index")
    record_property("survived", "refused in one sentence, nothing ran")


NO_NETWORK = """
import importlib, pkgutil, socket, sys

def refuse(*arguments, **options):
    raise SystemExit(f"the network was used: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.create_connection = refuse
import torch, weyl_megatron
torch.optim.AdamW2, weyl_megatron.AdamW2
count = 0
for module in pkgutil.walk_packages(weyl_megatron.__path__, "weyl_megatron."):
    if module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
        count += 1
    except ImportError as error:
        print(module.name, error)
print(count, "modules")
"""


def test_no_import_uses_the_network(record_property: Record) -> None:
    run = subprocess.run(
        [sys.executable, "-c", NO_NETWORK], capture_output=True, text=True, timeout=HANGS, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout + run.stderr
    count = re.search(r"(\d+) modules", run.stdout)
    assert count is not None and int(count[1]) > 60, run.stdout
    record_property("tried", f"imports of all {count[1]} modules, sockets forbidden")
    record_property("survived", "no socket was connected, no name looked up")


def test_the_forbidden_network_is_noticed() -> None:
    code = NO_NETWORK.replace(
        "import torch, weyl_megatron\n", "socket.create_connection(('127.0.0.1', 1))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS
    )
    assert run.returncode != 0 and "the network was used" in run.stderr


def dependencies(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every requirement in setup.py."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in ("install_requires", "extras_require"):
            lists = [node.value] if isinstance(node.value, ast.List) else list(node.value.values)  # type: ignore[attr-defined]
            for each in lists:
                for item in each.elts:
                    yield item.lineno, item.value


def test_every_dependency_has_a_bound_and_says_what_it_is_for(record_property: Record) -> None:
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    lines, found = source.splitlines(), list(dependencies(source))
    assert len(found) > 20
    for number, requirement in found:
        bounded = r"[A-Za-z0-9_.-]+(\[\w+\])?>=\d[\d.]*(,<\d[\d.]*)?"
        assert re.fullmatch(bounded, requirement), f"{requirement} takes a lower bound"
        above = lines[number - 2].lstrip()
        beside = lines[number - 1] + (above if above.startswith("#") else "")
        assert re.search(r"#\s*\S.{4,}", beside), f"setup.py does not say what {requirement} is for"
    record_property("tried", f"{len(found)} dependencies in setup.py")
    record_property("survived", "each has a lower bound and says what it is for")
