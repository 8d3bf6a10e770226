"""serving/deploy/kubernetes and kserve: held against real schemas, the restricted profile, the code and each other.

ServiceMonitor, ServingRuntime and InferenceService are custom resources whose schemas no package here ships: of those,
what is plain Kubernetes is held against its schema, the rest is tested by structure only.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from deploy_files import KUBERNETES, ROOT, compose, documents, one, pod_of_runtime

from gpuops.cli.arguments import parser
from gpuops_serving.command import CONTAINER_IMAGE, CONTAINER_PORTS, EXIT_TIMEOUT_S, STOP_TIMEOUT_S
from gpuops_serving.server import TritonServer

CUSTOM = ("ServiceMonitor", "ServingRuntime", "InferenceService", "Kustomization")


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_manifests_fit_the_schemas_of_kubernetes(version: str) -> None:
    checked = [doc for doc in documents(KUBERNETES) if doc["kind"] not in CUSTOM]
    assert {doc["kind"] for doc in checked} == {
        "Namespace",
        "Deployment",
        "Service",
        "NetworkPolicy",
        "PodDisruptionBudget",
    }
    for document in [*checked, pod_of_runtime()]:
        kubernetes_validate.validate(document, version, strict=True)
    deployment = one("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, version, strict=True)


def test_kustomization_names_every_manifest_and_the_image() -> None:
    (found,) = (doc for doc in documents(KUBERNETES) if doc["kind"] == "Kustomization")
    assert sorted(found["resources"]) == sorted(
        file.name for file in KUBERNETES.glob("*.yaml") if file.name != "kustomization.yaml"
    )
    (image,) = found["images"]
    pods = one("Deployment")["spec"]["template"]["spec"]["containers"]
    assert {container["image"] for container in pods} == {image["name"]} == {CONTAINER_IMAGE}
    assert found["namespace"] == one("Namespace")["metadata"]["name"]


def probes() -> Iterator[tuple[str, dict[str, Any]]]:
    for container in (
        one("Deployment")["spec"]["template"]["spec"]["containers"][0],
        one("ServingRuntime")["spec"]["containers"][0],
    ):
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            yield kind, container[kind]


def test_probes_wait_longer_than_the_health_check_does_and_only_liveness_restarts() -> None:
    for kind, probe in probes():
        words = probe["exec"]["command"]
        assert words[words.index("--probe") + 1] == ("liveness" if kind == "livenessProbe" else "readiness")
        # One answer that does not come, and one look at what the server did meanwhile.
        assert probe["timeoutSeconds"] >= 2 * float(words[words.index("--timeout") + 1])
        assert probe["failureThreshold"] * probe["periodSeconds"] >= {"startupProbe": 600}.get(kind, 30)


def test_probes_of_the_manifests_run_against_a_real_server(server: TritonServer) -> None:
    commands = {tuple(probe["exec"]["command"]) for _, probe in probes()}
    commands.add(tuple(compose()["services"]["server"]["healthcheck"]["test"][1:]))
    places = {"/models": str(server._repository), "/mnt/models": str(server._repository), "python3": sys.executable}
    asked = {tuple(places.get(word, word) for word in words) for words in commands}
    assert len(asked) == 3
    for words in sorted(asked):
        command = [word for word in words if not word.startswith("http://")]
        command += [server.http_url] if command[-1] == "--server" else ["--server", server.http_url]
        environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'serving'}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("healthy: ")


def test_whoever_stops_a_server_waits_until_its_requests_are_answered() -> None:
    assert STOP_TIMEOUT_S > EXIT_TIMEOUT_S
    pod = one("Deployment")["spec"]["template"]["spec"]
    pause_s = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause_s + EXIT_TIMEOUT_S


@pytest.mark.parametrize("where", ["Deployment", "ServingRuntime"])
def test_pods_keep_to_the_restricted_profile_and_write_nowhere_that_lasts(where: str) -> None:
    pod = one("Deployment")["spec"]["template"]["spec"] if where == "Deployment" else one("ServingRuntime")["spec"]
    shared = pod.get("securityContext", {})
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    for container in pod["containers"]:
        own = {**shared, **container["securityContext"]}
        assert own["runAsNonRoot"] is True
        assert own["runAsUser"] == 1000
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is True
        assert container["resources"]["limits"]["memory"]
        assert all(mount["name"] in ("tmp", "shm") or mount["readOnly"] for mount in container["volumeMounts"])
        assert all("hostPort" not in port for port in container["ports"])
    kinds = {kind for volume in pod["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "persistentVolumeClaim"}
    assert {v["name"]: v["emptyDir"].get("medium") for v in pod["volumes"] if "emptyDir" in v} == {
        "tmp": None,
        "shm": "Memory",
    }
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_namespace_refuses_pods_that_ask_for_more() -> None:
    assert one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_who_may_reach_which_port_is_said_by_name() -> None:
    pod = one("Deployment")["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for c in pod["spec"]["containers"] for port in c["ports"]}
    assert tuple(ports[name] for name in ("http", "grpc", "metrics")) == CONTAINER_PORTS
    policy = one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    opened = [{port["port"] for port in rule["ports"]} for rule in policy["ingress"]]
    assert opened == [{"http", "grpc"}, {"metrics", "meter"}]
    assert all(rule["from"] for rule in policy["ingress"])
    labels = pod["metadata"]["labels"]
    for selector in (
        policy["podSelector"]["matchLabels"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("Deployment")["spec"]["selector"]["matchLabels"],
        one("Service")["spec"]["selector"],
        one("Service", "gpuops-serving-metrics")["spec"]["selector"],
    ):
        assert selector.items() <= labels.items()
        assert selector
    for service, names in (("gpuops-serving", {"http", "grpc"}), ("gpuops-serving-metrics", {"metrics", "meter"})):
        found = one("Service", service)["spec"]["ports"]
        assert {port["targetPort"] for port in found} == names
        assert all(port["port"] == ports[port["targetPort"]] for port in found)
    assert one("PodDisruptionBudget")["spec"]["minAvailable"] < one("Deployment")["spec"]["replicas"]


def test_prometheus_finds_both_metrics_ports_also_of_pods_that_are_drained() -> None:
    monitor = one("ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    services = [doc for doc in documents(KUBERNETES) if doc["kind"] == "Service"]
    (service,) = (doc for doc in services if wanted <= doc["metadata"]["labels"].items())
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert {e["port"] for e in monitor["spec"]["endpoints"]} == {port["name"] for port in service["spec"]["ports"]}
    assert {e["port"]: e.get("honorLabels", False) for e in monitor["spec"]["endpoints"]}["meter"] is True


def test_a_rollout_reads_one_folder_that_is_not_written_again() -> None:
    server, exporter = one("Deployment")["spec"]["template"]["spec"]["containers"]
    mounts = [m for c in (server, exporter) for m in c["volumeMounts"] if m["name"] == "repository"]
    assert len(mounts) == 2
    assert mounts[0] == mounts[1]
    assert mounts[0]["mountPath"] == "/models"
    claim = one("Deployment")["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]
    assert claim["readOnly"] is True
    model = one("InferenceService")["spec"]["predictor"]["model"]
    assert model["storageUri"] == f"pvc://{claim['claimName']}/{mounts[0]['subPath']}"


def test_the_inference_service_asks_for_our_runtime_by_protocol_v2() -> None:
    runtime, service = one("ServingRuntime"), one("InferenceService")
    assert (runtime["apiVersion"], service["apiVersion"]) == ("serving.kserve.io/v1alpha1", "serving.kserve.io/v1beta1")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {entry["name"] for entry in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    assert container["ports"][0]["containerPort"] == CONTAINER_PORTS[0]


def test_the_exporter_is_told_the_same_everywhere_and_understands_it() -> None:
    exporter = compose()["services"]["exporter"]
    sidecar = one("Deployment")["spec"]["template"]["spec"]["containers"][1]
    assert [*sidecar["command"]] == exporter["entrypoint"] == ["/opt/gpuops/bin/gpuops", "meter"]
    told = [vars(parser().parse_args(["meter", *words])["meter"]) for words in (exporter["command"], sidecar["args"])]
    assert [found.pop("server") for found in told] == ["grpc://server:8001", "grpc://127.0.0.1:8001"]
    assert all(found.pop("namespace") for found in told)
    assert told[0] == told[1]
    assert told[0].items() >= {"address": "0.0.0.0", "port": 9464, "repository": "/models"}.items()
    assert sidecar["ports"][0]["containerPort"] == told[1]["port"]
