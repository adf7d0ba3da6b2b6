"""README, docs/, AGENTS.md and their kin: what they show parses, what they name is there."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from weyl_megatron import __version__

ROOT = Path(__file__).parents[1]

#: Tables that tests and examples write; the repository's state of today is not what they speak of.
WRITTEN = {"docs/faults.md", "docs/compare.md", "CHANGELOG.md"}

PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(
        [
            *ROOT.glob("*.md"),
            *ROOT.glob("docs/*.md"),
            *ROOT.glob("examples/*/README.md"),
            *ROOT.glob("launch/README.md"),
            *ROOT.glob("patches/README.md"),
        ]
    )
]
OWN_PAGES = [page for page in PAGES if page not in WRITTEN]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def blocks_of(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def spans_of(page: str) -> list[str]:
    """Return what stands between backticks, in one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


def anchors_of(page: Path) -> Iterator[str]:
    """Yield the anchors of a page's headings, as GitHub and MkDocs make them."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"#+ (.*?)(?: \{ #(\S+) \})?", line):
            plain = re.sub(r"[^\w\s-]", "", heading[1].lower())
            yield heading[2] or re.sub(r"\s+", "-", plain.strip())


def test_the_readme_is_of_a_length_that_is_read() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", OWN_PAGES)
def test_what_is_shown_parses(page: str) -> None:
    for source in blocks_of(page, "python"):
        ast.parse(source)
    for source in blocks_of(page, "json"):
        json.loads(source)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in list(anchors_of(target)), link


@pytest.mark.parametrize("page", OWN_PAGES)
def test_the_repositorys_files_that_a_page_names_are_there(page: str) -> None:
    folders = "weyl_megatron|tests|docs|examples|benchmarks|launch|patches"
    named = {
        word.strip("(),;:.")
        for span in spans_of(page)
        for word in span.split()
        if re.match(rf"(?:{folders})/", word)
    }
    assert not [path for path in named if not (ROOT / path.partition("::")[0]).exists()]


@pytest.mark.parametrize("page", OWN_PAGES)
def test_the_modules_that_a_page_runs_are_there(page: str) -> None:
    """`python -m MODULE` of this repository is a file or a package with a ``__main__``."""
    for module in re.findall(r"python -m ([\w.]+)", text_of(page)):
        if module.split(".")[0] in {"weyl_megatron", "tests", "examples", "benchmarks"}:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize(
    "page", ["README.md", "AGENTS.md", "CONTRIBUTING.md", "docs/checkpoints.md"]
)
def test_make_has_the_targets_that_a_page_names(page: str) -> None:
    targets = set(re.findall(r"^([\w.$()/-]+):", text_of("Makefile"), re.MULTILINE))
    targets = {target.replace("$(VENV)", ".venv") for target in targets}
    source = text_of(page)
    named = set(re.findall(r"(?:`|^|=\S+ )make ([\w./-]+)", source, re.MULTILINE))
    assert named and not named - targets


def test_agents_names_files_that_are_there() -> None:
    """A path is the repository's or the package's; a bare name may be that of a file in a folder
    that the same row names.
    """
    for line in text_of("AGENTS.md").splitlines():
        spans = re.findall(r"`([\w./-]+(?:/|\.(?:py|md|cff|cpp|toml|yaml)))`", line)
        places = [ROOT, ROOT / "weyl_megatron"]
        for span in spans:
            there = [path for place in places if (path := place / span).exists()]
            assert there, span
            places += [path if path.is_dir() else path.parent for path in there]


def test_agents_says_where_a_change_goes() -> None:
    """In the table of changes, a name in backticks stands in one of the files of its row."""
    table = text_of("AGENTS.md").split("## Where to change what")[1].split("## Run")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 2
    for row in rows:
        spans = re.findall(r"`([^`]+)`", row)
        files = [
            path
            for span in spans
            for path in (ROOT / span, ROOT / "weyl_megatron" / span)
            if path.is_file()
        ]
        sources = "".join(path.read_text(encoding="utf-8") for path in files)
        names = [span for span in spans if re.fullmatch(r"[A-Z_a-z0-9]+", span)]
        assert not [name for name in names if name not in sources], row


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load(text_of("mkdocs.yml"))

    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            for value in entry.values():
                yield from pages(value)
        elif isinstance(entry, list):
            for value in entry:
                yield from pages(value)

    assert sorted(pages(config["nav"])) == sorted(path.name for path in ROOT.glob("docs/*.md"))
    assert config["theme"]["font"] is False


def test_the_api_page_names_what_can_be_imported() -> None:
    names = re.findall(r"^::: (\S+)", text_of("docs/api.md"), re.MULTILINE)
    assert {"weyl_megatron.AdamW2", "weyl_megatron.watch.Watch"} <= set(names)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        try:
            held = importlib.import_module(owner)
        except ModuleNotFoundError:  # a method
            module, _, kind = owner.rpartition(".")
            held = getattr(importlib.import_module(module), kind)
        assert hasattr(held, attribute), name


def test_the_site_can_be_built(tmp_path: Path) -> None:
    """Where the extra "docs" is installed, as `make docs` does it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert "AdamW2" in (tmp_path / "api.html").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version_and_of_the_readmes_paper() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    bibtex = " ".join(blocks_of("README.md", "bibtex")[0].split())
    assert f"{{{' and '.join(authors)}}}" in bibtex
    assert f"{{{paper['title']}}}" in bibtex
    assert f"{{{paper['year']}}}" in bibtex


def test_pre_commit_needs_nothing_but_a_package_index() -> None:
    """In a clone without .venv ruff comes from PyPI, pinned at what setup.py asks for; only mypy,
    which needs torch, is the environment's.
    """
    config = yaml.safe_load(text_of(".pre-commit-config.yaml"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    oldest = re.search(r'"ruff>=([\d.]+)"', text_of("setup.py"))
    assert oldest is not None
    for name in ("ruff-check", "ruff-format"):
        assert hooks[name]["language"] == "python"
        assert hooks[name]["additional_dependencies"] == [f"ruff=={oldest[1]}"]
    assert [name for name, hook in hooks.items() if hook["language"] == "system"] == ["mypy"]
    assert "[ ! -e .venv/bin/mypy ]" in hooks["mypy"]["entry"]


def test_code_names_pages_that_are_there() -> None:
    folders = ("weyl_megatron", "tests", "examples", "benchmarks", "launch")
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for page in re.findall(r"docs/\w+\.md", path.read_text(encoding="utf-8"))
    }
    assert named
    assert not [entry for entry in sorted(named) if not (ROOT / entry[1]).exists()]
