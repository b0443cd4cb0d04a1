"""Deploys an overlay: ``python deploy/kuberay/apply.py OVERLAY [--dry-run]``.

Renders it with ``kubectl kustomize``, makes sure that the Secrets that it names are in the cluster, and only then
applies it: a pod that waits for a Secret that nobody made says nothing to whoever deployed it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

OVERLAYS = Path(__file__).parent / "overlays"
NAMESPACE = "vlcache"


class CannotDeploy(Exception):
    """Says why, in one sentence."""


def overlays() -> list[str]:
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def render(overlay: str) -> str:
    """An overlay's objects as YAML."""
    if overlay not in overlays():
        raise CannotDeploy(f"unknown overlay {overlay!r}; there are {', '.join(overlays())}")
    return _kubectl("kustomize", str(OVERLAYS / overlay))


def secrets(manifests: str) -> dict[str, set[str]]:
    """Keys that the objects want, by Secret."""
    found: dict[str, set[str]] = {}
    for document in yaml.safe_load_all(manifests):
        for reference in _references(document):
            found.setdefault(reference["name"], set()).add(reference["key"])
    return found


def require_secrets(wanted: dict[str, set[str]]) -> None:
    """Raises CannotDeploy, which shows how to make what is missing."""
    for name, keys in sorted(wanted.items()):
        make = f"kubectl -n {NAMESPACE} create secret generic {name} " + " ".join(
            f"--from-literal={key}=..." for key in sorted(keys)
        )
        found = _kubectl("-n", NAMESPACE, "get", "secret", name, "-o", "json", "--ignore-not-found")
        there = json.loads(found).get("data") or {} if found.strip() else {}
        if missing := sorted(keys - {key for key, value in there.items() if value}):
            raise CannotDeploy(f"Secret {name} has no {' and no '.join(missing)}: make it with `{make}`")


def _references(value: Any) -> Iterator[dict[str, str]]:
    if isinstance(value, dict):
        if isinstance(reference := value.get("secretKeyRef"), dict):
            yield reference
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def _kubectl(*arguments: str, given: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CannotDeploy("kubectl is not installed") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise CannotDeploy(f"kubectl {arguments[0]} failed: {said[-1]}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Deploy an overlay with KubeRay.")
    parser.add_argument("overlay", help=", ".join(overlays()))
    parser.add_argument("--dry-run", action="store_true", help="print the objects and stop; needs no cluster")
    arguments = parser.parse_args(argv)
    try:
        manifests = render(arguments.overlay)
        if arguments.dry_run:
            print(manifests, end="")
            return 0
        _kubectl("apply", "-f", "-", given=json.dumps(_namespace(manifests)))
        require_secrets(secrets(manifests))
        print(_kubectl("apply", "--server-side", "-f", "-", given=manifests), end="")
    except CannotDeploy as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _namespace(manifests: str) -> Any:
    return next(each for each in yaml.safe_load_all(manifests) if each["kind"] == "Namespace")


if __name__ == "__main__":
    sys.exit(main())
