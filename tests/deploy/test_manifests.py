"""The manifests as the cluster would take them, and whether everything that must agree does."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from kubectl import DEPLOY, OVERLAYS, ROOT, groups, objects, of_kind, ray_service, serve_config, strict_schema
from ray.serve.schema import ServeDeploySchema

from vlcache_dist.config import Settings
from vlcache_dist.serve.auth import ENVIRONMENT
from vlcache_dist.serve.readiness import pools

CORE = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1", "rbac.authorization.k8s.io/v1"}
KUBERNETES = "1.34"
SERVE_FILES = sorted((DEPLOY / "serve").glob("*p*.yaml"))
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def containers(overlay: str) -> list[tuple[str, dict[str, Any]]]:
    return [(pool, group["template"]["spec"]["containers"][0]) for pool, group in groups(overlay).items()]


def settings_of(overlay: str) -> Settings:
    (application,) = serve_config(overlay)["applications"]
    return Settings.of(**application["args"])


def test_the_overlays_that_exist_are_the_overlays_that_are_tested() -> None:
    assert {path.name for path in (DEPLOY / "kuberay" / "overlays").iterdir()} == set(OVERLAYS)


@every_overlay
def test_ray_objects_follow_the_crd_to_the_last_field(overlay: str) -> None:
    jsonschema.Draft202012Validator(strict_schema("rayservices")).validate(ray_service(overlay))


def test_a_misspelt_field_would_be_found() -> None:
    service = ray_service("kind-cpu")
    service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.Draft202012Validator(strict_schema("rayservices")).validate(service)


@every_overlay
def test_core_objects_follow_kubernetes_schemas(overlay: str) -> None:
    core = [each for each in objects(overlay) if each["apiVersion"] in CORE]
    assert len(core) > 10
    for each in core:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


@every_overlay
def test_pod_templates_follow_kubernetes_schemas(overlay: str) -> None:
    for group in groups(overlay).values():
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@every_overlay
def test_the_embedded_serve_config_is_a_file_that_starts_our_application(overlay: str) -> None:
    text = ray_service(overlay)["spec"]["serveConfigV2"]
    assert text in [path.read_text() for path in SERVE_FILES]
    ServeDeploySchema.model_validate(yaml.safe_load(text))


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.stem)
def test_serve_config_files(path: Any) -> None:
    config = yaml.safe_load(path.read_text())
    deployed = ServeDeploySchema.model_validate(config)
    (application,) = deployed.applications
    settings = Settings.of(**config["applications"][0]["args"])
    assert application.import_path == "vlcache_dist.serve.app:build"
    assert application.name == settings.serve.app_name
    described = re.search(r"(\d)e-(\d)p(?:-(\d)d)?", path.stem)
    if described:
        own = settings.serve
        assert [own.encoders, own.prefills, own.decodes] == [int(found) for found in described.groups()]
        ranks = re.search(r"-tp(\d)-", path.stem)
        assert settings.engine.tensor_parallel == (int(ranks[1]) if ranks else 1)
    else:
        assert path.stem == "1gpu-colocated" and settings.serve.decodes == 0
        assert settings.serve.gpus_per_worker * 2 == 1


@every_overlay
def test_every_pool_has_its_worker_group_with_room_for_its_workers(overlay: str) -> None:
    settings = settings_of(overlay)
    assert settings.serve.pool_resources
    found = groups(overlay)
    wanted = {str(pool.resource): pool for pool in pools(settings.serve)}
    assert set(found) - {"head"} == {resource.removesuffix("_pool") for resource in wanted}
    for resource, pool in wanted.items():
        group = found[resource.removesuffix("_pool")]
        offered = yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"]))
        assert set(offered) == {resource}, "a group's pods are for its own pool alone"
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["replicas"] * offered[resource] == pool.workers
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits.get("nvidia.com/gpu", 0)) == pool.gpus * offered[resource]


@every_overlay
def test_ray_version_image_tag_and_pins_are_one(overlay: str) -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pinned and pinned[1] == ray.__version__ == ray_service(overlay)["spec"]["rayClusterConfig"]["rayVersion"]
    minor = ".".join(pinned[1].split(".")[:2])
    assert any(each.startswith(f"ray[serve]>={minor},") for each in project["dependencies"])
    kind = "cpu" if overlay == "kind-cpu" else "cuda"
    for _, container in containers(overlay):
        assert container["image"] == f"vlcache-dist:{project['version']}-ray{pinned[1]}-{kind}"
    assert f"vlcache-dist:{project['version']}-ray{pinned[1]}-{kind}" in (DEPLOY / "Dockerfile").read_text()


@every_overlay
def test_ports_agree(overlay: str) -> None:
    http = serve_config(overlay)["http_options"]
    for pool, container in containers(overlay):
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == http["port"]
        params = groups(overlay)[pool]["rayStartParams"]
        assert str(ports["metrics"]) == params["metrics-export-port"]
    assert http["host"] == "0.0.0.0", "the Service must reach it; without keys the application answers nobody else"
    known = {port["name"] for _, container in containers(overlay) for port in container["ports"]} | {"redis"}
    named = {
        port["port"]
        for policy in of_kind(overlay, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for port in rule.get("ports", [])
    }
    assert named <= known
    (monitor,) = of_kind(overlay, "PodMonitor")
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


@every_overlay
def test_selectors_find_pods(overlay: str) -> None:
    labels = [group["template"]["metadata"]["labels"] for group in groups(overlay).values()]
    (redis,) = of_kind(overlay, "StatefulSet")
    labels.append(redis["spec"]["template"]["metadata"]["labels"])

    def finds(selector: dict[str, str]) -> bool:
        return any(selector.items() <= each.items() for each in labels)

    selectors = [each["spec"]["selector"]["matchLabels"] for each in of_kind(overlay, "PodDisruptionBudget")]
    selectors += [each["spec"]["podSelector"]["matchLabels"] for each in of_kind(overlay, "NetworkPolicy")]
    selectors += [each["spec"]["selector"] for each in of_kind(overlay, "Service")]
    selectors += [each["spec"]["selector"]["matchLabels"] for each in of_kind(overlay, "PodMonitor")]
    assert len(selectors) == 3 + 3 + 1 + 1
    assert all(map(finds, selectors))
    budgets = {
        each["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        for each in of_kind(overlay, "PodDisruptionBudget")
    }
    assert budgets == set(groups(overlay)) - {"head"}


@every_overlay
def test_secrets_and_accounts_agree(overlay: str) -> None:
    service = ray_service(overlay)["spec"]["rayClusterConfig"]
    (redis,) = of_kind(overlay, "StatefulSet")
    password = service["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    (env,) = redis["spec"]["template"]["spec"]["containers"][0]["env"]
    assert env["valueFrom"]["secretKeyRef"] == password
    host, port = service["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    (redis_service,) = of_kind(overlay, "Service")
    assert (redis_service["metadata"]["name"], str(redis_service["spec"]["ports"][0]["port"])) == (host, port)
    assert service["authOptions"] == {"mode": "token"}
    for _, container in containers(overlay):
        references = {
            variable["name"]: variable["valueFrom"]["secretKeyRef"]
            for variable in container["env"]
            if "valueFrom" in variable
        }
        assert references[ENVIRONMENT] == {"name": "vlcache-api-keys", "key": "keys"}
        assert ("HF_TOKEN" in references) == (overlay != "kind-cpu")
    account = service["headGroupSpec"]["template"]["spec"]["serviceAccountName"]
    assert account in {each["metadata"]["name"] for each in of_kind(overlay, "ServiceAccount")}
    (binding,) = of_kind(overlay, "RoleBinding")
    assert [(each["name"], each["namespace"]) for each in binding["subjects"]] == [(account, "vlcache")]
    assert not of_kind(overlay, "Secret"), "secrets are made in the cluster, not kept in the repository"


@every_overlay
def test_pods_are_spread_unprivileged_and_have_shared_memory(overlay: str) -> None:
    for pool, group in groups(overlay).items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        shm = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["medium"] == "Memory" and {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        if overlay == "single-node-multi-gpu" and pool != "head":
            assert "podAffinity" in pod["affinity"]
        else:
            (spread,) = pod["topologySpreadConstraints"]
            assert spread["labelSelector"]["matchLabels"].items() <= group["template"]["metadata"]["labels"].items()
        rdma = overlay == "multi-node-rdma" and pool != "head"
        assert any(name.startswith("rdma/") for name in container["resources"]["limits"]) == rdma
        assert ("IPC_LOCK" in container["securityContext"]["capabilities"].get("add", [])) == rdma


def test_autoscaling_and_fault_tolerance_are_on() -> None:
    config = ray_service("multi-node-rdma")["spec"]["rayClusterConfig"]
    assert config["enableInTreeAutoscaling"] and config["autoscalerOptions"]["version"] == "v2"
    assert all(group["template"]["spec"]["restartPolicy"] == "Never" for group in config["workerGroupSpecs"])
