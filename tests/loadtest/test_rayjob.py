"""The RayJob manifest: as the cluster would take it, in step with the deployment and with the command that it runs."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command

from vlcache_dist.cli import app

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "loadtest" / "rayjob.yaml"
OBJECTS = {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}
JOB = OBJECTS["RayJob"]
SERVICE, POLICY = (ROOT / "deploy" / "kuberay" / "base" / name for name in ("rayservice.yaml", "networkpolicies.yaml"))


def schema() -> dict[str, Any]:
    with gzip.open(ROOT / "tests" / "deploy" / "data" / "rayjobs.json.gz") as file:
        return _closed(json.load(file))


def _closed(value: Any) -> Any:
    """Unknown fields are errors: the API server would drop them without a word."""
    if isinstance(value, list):
        return [_closed(each) for each in value]
    if not isinstance(value, dict):
        return value
    out = {key: _closed(each) for key, each in value.items()}
    if isinstance(value.get("properties"), dict) and value.get("type") == "object":
        out.setdefault("additionalProperties", False)
    return out


def pods() -> list[dict[str, Any]]:
    cluster = JOB["spec"]["rayClusterSpec"]
    return [each["template"] for each in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def option(name: str) -> list[str]:
    words = shlex.split(JOB["spec"]["entrypoint"])
    return [value for word, value in itertools.pairwise(words) if word == name]


def test_it_follows_the_crd_to_the_last_field() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(JOB)
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        validator.validate({**JOB, "spec": {**JOB["spec"], "backOffLimit": 1}})


def test_its_command_is_one_that_the_program_takes() -> None:
    program, command, *arguments = shlex.split(JOB["spec"]["entrypoint"])
    assert (program, command) == ("vlcache-dist", "loadtest")
    loadtest = get_command(app).commands["loadtest"]  # type: ignore[attr-defined]
    context = loadtest.make_context("loadtest", arguments)
    assert context.params["share"] == [0, 25, 50, 75, 95] and context.params["address"] == "auto"
    assert context.params["time_limit"] < JOB["spec"]["activeDeadlineSeconds"]


def test_versions_are_the_deployments() -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert pinned and JOB["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]
    for pod in pods():
        assert pod["spec"]["containers"][0]["image"] == f"vlcache-dist:{project}-ray{pinned[1]}-cpu"


def test_it_reaches_the_deployment() -> None:
    service = yaml.safe_load(SERVICE.read_text())
    found = re.fullmatch(r"http://(\S+)-serve-svc\.(\S+):(\d+)", option("--url")[0])
    assert found and found[1] == service["metadata"]["name"]
    namespace = yaml.safe_load((SERVICE.parent / "namespace.yaml").read_text())
    assert found[2] == namespace["metadata"]["name"]
    container = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert int(found[3]) in [port["containerPort"] for port in container["ports"] if port["name"] == "serve"]
    label = re.search(r"kubectl label namespace \S+ (\S+)=(\S+)", MANIFEST.read_text())
    assert label and f'{label[1]}: "{label[2]}"' in POLICY.read_text(), "the NetworkPolicy lets these clients in"


def test_volumes_keys_and_labels_agree() -> None:
    head, clients = pods()
    volumes = {volume["name"]: volume for volume in head["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in head["spec"]["containers"][0]["volumeMounts"]}
    assert set(mounts) == set(volumes)
    assert (
        volumes["results"]["persistentVolumeClaim"]["claimName"]
        == (OBJECTS["PersistentVolumeClaim"]["metadata"]["name"])
    )
    assert option("--out") == [mounts["results"]] and option("--api-keys") == [f"{mounts['keys']}/keys"]
    (spread,) = clients["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= clients["metadata"]["labels"].items()
    for pod in pods():
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert "vlcache" not in {pod["metadata"]["labels"]["app.kubernetes.io/name"] for pod in pods()}, (
        "clients are not pods of the deployment: its budgets and policies must not select them"
    )
