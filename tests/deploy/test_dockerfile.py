"""The Dockerfile, as far as it can be judged without building it."""

from __future__ import annotations

import re

import pytest
from kubectl import DEPLOY, ROOT

TEXT = (DEPLOY / "Dockerfile").read_text()


def stages() -> dict[str, str]:
    parts = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]
    found = {}
    for part in parts:
        header = re.match(r"(\S+) AS (\S+)", part)
        assert header, "every stage has a name"
        found[header[2]] = part
    return found


def test_both_targets_run_unprivileged_with_a_health_check() -> None:
    found = stages()
    assert {"cpu", "cuda"} <= set(found)
    for target in ("cpu", "cuda"):
        assert found[target].startswith("runtime AS")
        assert re.findall(r"^USER (\S+)$", found[target], re.MULTILINE)[-1] == "1000:1000"
        assert f"--from=build-{target}" in found[target]
    assert "HEALTHCHECK" in found["runtime"] and "/healthz" in found["runtime"]
    assert "useradd --uid 1000" in found["runtime"]


def test_versions_are_pinned() -> None:
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", TEXT, re.MULTILINE)
    assert base and re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", base[1])
    installs = re.findall(r"^RUN pip install (.*)$", TEXT, re.MULTILINE)
    assert installs and all("constraints.txt" in line for line in installs)
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_what_is_copied_exists_and_is_not_ignored(target: str) -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    for stage in ("build", f"build-{target}"):
        for line in re.findall(r"^COPY (?!--from)(.*)$", stages()[stage], re.MULTILINE):
            for source in line.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source.removeprefix('./')}" in ignore
