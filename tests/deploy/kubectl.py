"""Rendered overlays, and the strict form of the KubeRay CRDs' schemas."""

from __future__ import annotations

import copy
import functools
import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("kind-cpu", "single-node-multi-gpu", "multi-node-rdma")
DATA = Path(__file__).with_name("data")


def needs_kubectl() -> None:
    """Skips where there is no kubectl, but not in CI: there the manifests must be looked at."""
    if shutil.which("kubectl") is None:
        message = "kubectl is not installed"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


@functools.cache
def rendered(overlay: str) -> str:
    needs_kubectl()
    path = str(DEPLOY / "kuberay" / "overlays" / overlay)
    done = subprocess.run(["kubectl", "kustomize", path], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(rendered(overlay)))


def of_kind(overlay: str, kind: str) -> list[dict[str, Any]]:
    return [each for each in objects(overlay) if each["kind"] == kind]


def ray_service(overlay: str) -> dict[str, Any]:
    (service,) = of_kind(overlay, "RayService")
    return service


def serve_config(overlay: str) -> dict[str, Any]:
    return yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"])


def groups(overlay: str) -> dict[str, dict[str, Any]]:
    """Pod templates' owners by pool: ``head``, ``encoder``, ``prefill``, ``decode``."""
    config = ray_service(overlay)["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group for group in config["workerGroupSpecs"]}
    return {"head": config["headGroupSpec"], **workers}


def strict_schema(name: str) -> dict[str, Any]:
    """A CRD's schema in which unknown fields are errors: the API server would drop them without a word."""
    with gzip.open(DATA / f"{name}.json.gz") as file:
        schema = json.load(file)
    return _strict(copy.deepcopy(schema))


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _strict(value) for key, value in schema.items()}
    if "properties" in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
        known = out["properties"]
        if isinstance(known, dict) and all(isinstance(value, dict) for value in known.values()):
            out.setdefault("additionalProperties", False)
    return out
