"""The pages name files that exist, their links lead somewhere, and what the code cites of them is there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastloss
import fastloss.parallel
from fastloss import nn

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/integrations/*.md"),
        *ROOT.glob("tests/peers/golden/*.md"),
    ]
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
TOP = ("fastloss", "csrc", "kernels", "tests", "docs", "tools", "benchmarks")
# The package's own folders are also named without "fastloss/".
INSIDE = ("losses", "engine", "reference", "integrations", "harness", "bench", "plan", "cli", "conformance")
PATH = re.compile(rf"(?<![\w/.\-])(?:{'|'.join((*TOP, *INSIDE))})/[\w./*\-]*")
FILE = re.compile(r"`(\w+\.(?:py|h|cpp|cu))`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CITED = re.compile(r"docs/\w+\.md(?:\)?,? \(?\"([^\"]+)\")?")
# A path on a line of its own, and the block below it: lines of that file.
QUOTED = re.compile(r"^`([\w./]+)`\n\n```\w*\n(.*?)^```", re.M | re.S)
# Made by the build.
MADE = {"fastloss/_build_info.py"}


def _exists(path: str) -> bool:
    path = path.rstrip(".")
    if path in MADE:
        return True
    places = [path] if path.split("/")[0] in TOP else [f"fastloss/{path}"]
    return any(any(ROOT.glob(place.rstrip("/"))) for place in places)


def _anchors(page: Path) -> set[str]:
    """The ids that a forge gives the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def _sources() -> Iterator[Path]:
    for folder in ("fastloss", "kernels", "csrc", "tests", "tools"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".sh") and path.is_file():
                yield path


@pytest.mark.parametrize("name", NAMES)
def test_every_path_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = sorted({match.group() for match in PATH.finditer(re.sub(r"https?://\S+", "", text))})
    assert [path for path in named if not _exists(path)] == []


def test_every_file_exists() -> None:
    there = {path.name for path in _sources()} | {path.name for path in ROOT.iterdir()} | {"plots.py"}
    for page in PAGES:
        named = set(FILE.findall(page.read_text(encoding="utf-8")))
        assert sorted(named - there) == [], page.name


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in _anchors(target), f"{name}: {link}"


def test_every_page_is_linked() -> None:
    linked: set[Path] = set()
    for page in PAGES:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            linked.add((page.parent / link.partition("#")[0]).resolve())
    assert [p.name for p in PAGES if p.parent == ROOT / "docs" and p.resolve() not in linked] == []


def _reference() -> list[str]:
    """The names that the site's reference shows, without "fastloss."."""
    text = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "api").glob("*.rst")))
    return re.findall(r"^\.\. auto(?:function|class):: fastloss\.([\w.]+)$", text, re.M)


def test_the_reference_has_every_public_name() -> None:
    modules = [
        f"nn.{name}"
        for name, value in vars(nn).items()
        if getattr(value, "__module__", "") == nn.__name__ and name[0] != "_"
    ]
    modules += [f"parallel.{name}" for name in fastloss.parallel.__all__]
    public = [name for name in fastloss.__all__ if name not in ("__version__", "nn")] + modules
    assert sorted(_reference()) == sorted(public)


def test_the_site_leads_to_every_page() -> None:
    index = (ROOT / "docs" / "index.rst").read_text(encoding="utf-8")
    entries = re.findall(r"^   (?:[^:\n]+<(.+)>|([\w/*]+))$", index, re.M)
    reached: set[Path] = set()
    for entry in (a or b for a, b in entries):
        base = ROOT / entry.lstrip("/") if entry.startswith("/") else ROOT / "docs" / entry
        for suffix in (".md", ".rst"):
            reached |= set(base.parent.glob(base.name + suffix))
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/integrations/*.md"), *ROOT.glob("docs/api/*.rst")]
    assert [page.name for page in pages if page not in reached] == []


def test_the_gpu_page_has_the_tables_that_its_tool_prints() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu" / "floors.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    without_measured = re.sub(r"[^|\n]*\|$", "|", page, flags=re.M)
    tables = done.stdout.strip().split("\n\n")
    assert len(tables) == 4
    for table in tables:
        if "| measured |" in table:
            assert re.sub(r"[^|\n]*\|$", "|", table, flags=re.M) in without_measured
        else:
            assert f"\n{table}\n" in page


def test_what_the_code_cites_is_there() -> None:
    cited = 0
    for source in _sources():
        for match in CITED.finditer(source.read_text(encoding="utf-8")):
            page = ROOT / match.group().partition(".md")[0]
            page = page.with_suffix(".md")
            assert page.exists(), f"{source.name}: {match.group()}"
            if heading := match.group(1):
                assert f"\n## {heading}\n" in page.read_text(encoding="utf-8"), (
                    f"{source.name}: {match.group()}"
                )
            cited += 1
    assert cited > 20


def test_quoted_lines_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "adding_a_loss.md").read_text(encoding="utf-8")
    quoted = QUOTED.findall(page)
    assert len(quoted) > 10
    for path, block in quoted:
        lines = set((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert [line for line in block.splitlines() if line not in lines] == [], path
