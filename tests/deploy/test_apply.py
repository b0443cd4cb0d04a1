"""Deploying: what is wrong is said in one sentence before anything is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kubectl import DEPLOY, needs_kubectl, rendered

FAKE = """#!{python}
import json, os, subprocess, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "kustomize":
    print(open(os.environ["RENDERED"]).read())
elif "get" in sys.argv:
    secrets = json.loads(os.environ["SECRETS"])
    name = sys.argv[sys.argv.index("secret") + 1]
    if name in secrets:
        print(json.dumps({{"data": {{key: "eA==" for key in secrets[name]}}}}))
else:
    sys.stdin.read()
"""


def apply(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEPLOY / "kuberay" / "apply.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **(environment or {})}
    )


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """A kubectl that answers as a cluster would, and writes down what it is asked."""
    script = tmp_path / "kubectl"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o755)
    (tmp_path / "rendered.yaml").write_text(rendered("multi-node-rdma"))
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "RENDERED": str(tmp_path / "rendered.yaml"),
        "SECRETS": json.dumps(
            {"vlcache-api-keys": ["keys"], "vlcache-redis": ["password"], "vlcache-hub-token": ["token"]}
        ),
    }


def calls(cluster: dict[str, str]) -> list[list[str]]:
    return [json.loads(line) for line in Path(cluster["CALLS"]).read_text().splitlines()]


def test_an_unknown_overlay() -> None:
    done = apply("on-the-moon", "--dry-run")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == (
        "error: unknown overlay 'on-the-moon'; there are kind-cpu, multi-node-rdma, single-node-multi-gpu\n"
    )


def test_a_dry_run_prints_the_objects() -> None:
    needs_kubectl()
    done = apply("kind-cpu", "--dry-run")
    assert done.returncode == 0 and done.stdout == rendered("kind-cpu")


@pytest.mark.parametrize(
    ("secrets", "named"),
    [
        ({"vlcache-redis": ["password"], "vlcache-hub-token": ["token"]}, "vlcache-api-keys has no keys"),
        ({"vlcache-api-keys": ["keys"], "vlcache-redis": ["password"]}, "vlcache-hub-token has no token"),
        (
            {"vlcache-api-keys": ["keys"], "vlcache-redis": [], "vlcache-hub-token": ["token"]},
            "vlcache-redis has no password",
        ),
    ],
)
def test_a_missing_secret_is_named_and_nothing_is_applied(
    cluster: dict[str, str], secrets: dict[str, list[str]], named: str
) -> None:
    done = apply("multi-node-rdma", environment={**cluster, "SECRETS": json.dumps(secrets)})
    assert done.returncode == 1
    assert f"error: Secret {named}: make it with `kubectl -n vlcache create secret generic" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any("--server-side" in call for call in calls(cluster))


def test_everything_is_applied_once_the_secrets_are_there(cluster: dict[str, str]) -> None:
    done = apply("multi-node-rdma", environment=cluster)
    assert done.returncode == 0, done.stderr
    assert calls(cluster)[-1] == ["apply", "--server-side", "-f", "-"]


def test_without_kubectl(tmp_path: Path) -> None:
    done = apply("kind-cpu", environment={"PATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr == "error: kubectl is not installed\n"
