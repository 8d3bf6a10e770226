"""Dockerfile.cuda and compose.yaml: linted, held against real schemas, and agreeing with each other and the code."""

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_files import DEPLOY, DOCKERFILE, ROOT, arguments, compose, exec_form, installed, one, pod_of_runtime, stages

from gpuops_serving import gates
from gpuops_serving.command import CONTAINER_IMAGE, CONTAINER_PORTS, container_command


def test_hadolint_finds_nothing_in_the_dockerfile_and_finds_what_is_wrong() -> None:
    lint = installed("hadolint")
    done = subprocess.run([lint, ROOT / "Dockerfile.cuda"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    done = subprocess.run([lint, "-"], input="FROM python\nRUN pip install x\n", capture_output=True, text=True)
    assert done.returncode != 0
    assert {"DL3006", "DL3013"} <= set(re.findall(r"DL\d+", done.stdout))


def test_compose_fits_the_schema_of_the_compose_specification(tmp_path: Path) -> None:
    check = [installed("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("read_only: true", "readonly: true"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode == 1


def test_the_table_of_images_agrees_with_what_servers_can_do() -> None:
    table = arguments()
    (container,) = re.findall(r"^nvcr\.io/nvidia/tritonserver:(\d\d\.\d\d)-py3$", table["TRITON_IMAGE"])
    version = table["TRITON_VERSION"]
    known = {gate.container: gate.since for gate in [*gates.GATES.values(), gates.SHARED_MEMORY_OFF, gates.FIXED]}
    assert known[container] == gates.parse_version(version)
    assert all(gates.supports(feature, version) for feature in gates.GATES)
    assert gates.security_warnings(version) == []
    # torch_aoti packages made in one run with the libtorch of the other.
    assert table["PYTORCH_IMAGE"] == f"nvcr.io/nvidia/pytorch:{container}-py3"
    assert '"$(cat /opt/tritonserver/TRITON_VERSION)" = "${TRITON_VERSION}"' in stages()["serving"]


def test_no_version_of_an_image_is_written_anywhere_else() -> None:
    table = arguments()
    used = re.findall(r"^FROM \$\{(\w+)\}", DOCKERFILE, re.MULTILINE)
    assert sorted(used) == sorted(name for name in table if name.endswith("_IMAGE"))
    own = {"gpuops-serving", "gpuops-prometheus", "gpuops-grafana", "registry.example.com/gpuops-serving:1"}
    assert {service["image"] for service in compose()["services"].values()} <= own
    assert {doc["image"] for doc in pod_of_runtime()["spec"]["containers"]} <= own
    tags = {image.rpartition(":")[2] for name, image in table.items() if name.endswith("_IMAGE")}
    assert "latest" not in tags
    for file in DEPLOY.rglob("*"):
        if file.suffix in (".yaml", ".yml", ".md"):
            assert not [tag for tag in tags if tag in file.read_text()], file


def allowed() -> list[str]:
    """What .dockerignore lets into the build: it refuses all, then names what may come."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert all(line.startswith(("!", "**/")) for line in lines[1:])
    return [line[1:] for line in lines if line.startswith("!")]


def test_all_that_is_copied_is_there_and_not_ignored() -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert len(copied) >= 4
    for source in copied:
        assert (ROOT / source).exists(), source
        top = Path(source).parts[0] if Path(source).parts else ""
        assert source == "." or any(fnmatch.fnmatch(top, entry) for entry in allowed()), source


def test_the_wheel_of_the_images_can_be_built_from_what_is_not_ignored(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for entry in allowed():
        source = ROOT / entry
        if source.is_dir():
            shutil.copytree(source, context / entry, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, context / entry)
    wheel = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, context]
    done = subprocess.run([sys.executable, *wheel], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("gpuops-*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", file], capture_output=True, text=True, check=True
    ).stdout
    for needed in ("gpuops/cli", "gpuops_kernels/", "gpuops_serving/health.py", "gpuops_serving/shim/model.py"):
        assert needed in names


@pytest.mark.parametrize("stage", ["training", "serving"])
def test_images_do_not_run_as_root(stage: str) -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", stages()[stage], re.MULTILINE)
    assert all(int(number) >= 1000 for number in user)


def test_compose_runs_the_container_as_the_printed_command_does(tmp_path: Path) -> None:
    words = shlex.split(container_command(tmp_path, CONTAINER_PORTS))
    server = compose()["services"]["server"]
    options = iter(words[2:-1])
    found: dict[str, list[str]] = {}
    for word in options:
        name, has_value, value = word.partition("=")
        flag = name in ("--rm", "--read-only")
        found.setdefault(name, []).append(value if has_value else "" if flag else next(options))
    assert words[:2] == ["docker", "run"]
    assert words[-1] == server["image"] == CONTAINER_IMAGE
    (devices,) = server["deploy"]["resources"]["reservations"]["devices"]
    (volume,) = server["volumes"]
    assert volume["read_only"] is True
    assert found == {
        "--rm": [""],
        "--gpus": [devices["count"]],
        "--shm-size": [server["shm_size"]],
        "--read-only": [""] if server["read_only"] else [],
        "--tmpfs": server["tmpfs"],
        "--cap-drop": server["cap_drop"],
        "--security-opt": server["security_opt"],
        "--user": [server["user"]],
        "--stop-timeout": [server["stop_grace_period"].removesuffix("s")],
        "-v": [f"{tmp_path}:{volume['target']}:ro"],
        "-p": server["ports"],
    }
    assert re.findall(r"^USER (\S+)$", stages()["serving"], re.MULTILINE) == [server["user"]]


def test_packages_of_aotinductor_can_be_loaded_as_code_from_tmp() -> None:
    # Docker mounts a tmpfs noexec unless it is told otherwise; an emptyDir of Kubernetes is not.
    (mount,) = compose()["services"]["server"]["tmpfs"]
    assert "exec" in mount.split(":")[1].split(",")


def test_the_image_starts_the_command_that_proves_the_repository() -> None:
    assert exec_form("CMD", stages()["serving"].partition("HEALTHCHECK")[2].partition("CMD")[2].partition("\n")[2]) == [
        *("python3", "-m", "gpuops_serving.command", "/models")
    ]
    assert "command" not in compose()["services"]["server"]
    server, _ = one("Deployment")["spec"]["template"]["spec"]["containers"]
    assert not {"command", "args"} & server.keys()
    (container,) = one("ServingRuntime")["spec"]["containers"]
    assert container["args"] == ["python3", "-m", "gpuops_serving.command", "/mnt/models"]
    assert "command" not in container


def test_compose_and_image_check_health_alike() -> None:
    found = compose()["services"]["server"]["healthcheck"]
    (options, words) = re.findall(r"^HEALTHCHECK (.*) \\\n    CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[0]
    assert found["test"] == ["CMD", *json.loads(words)]
    assert dict(re.findall(r"--(\S+)=(\S+)", options)) == {
        key.replace("_", "-"): str(value) for key, value in found.items() if key != "test"
    }
    # The exporter is the same image in another container, where that check finds no server.
    assert compose()["services"]["exporter"]["healthcheck"] == {"disable": True}


def test_everything_in_compose_is_unprivileged_and_published_to_loopback_only() -> None:
    services = compose()["services"]
    assert set(services) == {"server", "exporter", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].split(":")[0] != "0", name
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "userns_mode"} & service.keys(), name
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), name
        for volume in service.get("volumes", []):
            assert isinstance(volume, str) or volume["read_only"], name
    devices = services["exporter"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"]
    assert devices == ["gpu", "utility"]  # counters, no computing
