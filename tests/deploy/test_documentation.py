"""Every command that the documentation shows is run, by this file or a named test, or marked as needing a cluster."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.S)
COMMANDS = ("sh", "bash", "console", "shell", "python")


def blocks() -> list[tuple[str, str, str, str]]:
    """(page, mark, language, text) of every fenced block that can be run."""
    return [
        (page.name, found["mark"] or "", found["language"], found["text"])
        for page in sorted(DOCS.glob("*.md"))
        for found in BLOCK.finditer(page.read_text())
        if found["language"] in COMMANDS
    ]


def _name(block: tuple[str, str, str, str]) -> str:
    return f"{block[0]}: {block[3].splitlines()[0][:60]}"


def test_there_is_something_to_check() -> None:
    assert {page for page, *_ in blocks()} >= {"index.md", "load-testing.md", "deploying.md"}


@pytest.mark.parametrize("block", blocks(), ids=_name)
def test_commands_are_tested_or_marked(block: tuple[str, str, str, str], tmp_path: Path) -> None:
    page, mark, language, text = block
    if mark == "needs a cluster":
        for path in re.findall(r"(?:deploy|docs|benchmarks)/[\w./-]+", text):
            assert (ROOT / path).exists(), f"{page} names {path}, which does not exist"
    elif mark.startswith("tested by "):
        path, _, function = mark.removeprefix("tested by ").partition("::")
        source = (ROOT / path).read_text()
        names = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        assert not function or function in names, f"{path} has no {function}"
        for line in text.strip().splitlines():
            program, *arguments = line.split()
            assert Path(arguments[0]).name in source, f"{path} does not run {program} {arguments[0]}"
    else:
        assert mark == "run", f"{page}: {text!r} is neither run nor marked"
        _run(language, text, tmp_path)


def _run(language: str, text: str, folder: Path) -> None:
    if language == "python":
        commands = [[sys.executable, "-c", text]]
    else:
        commands = [["bash", "-euc", text]]
        shim = folder / "bin" / "vlcache-dist"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m vlcache_dist.cli "$@"\n')
        shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for command in commands:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


def test_pictures_and_links_exist() -> None:
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (DOCS / target).exists(), f"{page.name} links to {target}"


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "load-testing" / "index.html").read_text()
    assert "<h1" in page and not re.search(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)"', page)
