"""The Kubernetes manifests: sound, of one piece, and right about the server that they start."""

import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from oatlite_cli.main import app_for
from typer.main import get_command

import oatlite
from oatlite.oracles.server_settings import TOKEN

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "oatlite" / "oracles" / "deploy"


@pytest.fixture(scope="module")
def deployment():
    return yaml.safe_load((DEPLOY / "deployment.yaml").read_text())


@pytest.fixture(scope="module")
def service():
    return yaml.safe_load((DEPLOY / "service.yaml").read_text())


@pytest.fixture(scope="module")
def container(deployment):
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def test_kinds_and_versions(deployment, service):
    assert (deployment["apiVersion"], deployment["kind"]) == ("apps/v1", "Deployment")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")


@pytest.mark.parametrize("name", ["deployment", "service"])
def test_the_schema_of_kubernetes_takes_them(name):
    for version in ("1.27", "1.31", "1.34"):
        kubernetes_validate.validate(yaml.safe_load((DEPLOY / f"{name}.yaml").read_text()), version, strict=True)


def test_the_service_finds_the_pods_and_the_deployment_too(deployment, service):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["metadata"]["name"] == deployment["metadata"]["name"] == "oatlite-oracle"


def test_the_ports_agree(container, service):
    (port,) = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert container["livenessProbe"]["httpGet"]["port"] == port["name"]


def test_probes_ask_for_what_mosec_answers(container):
    from mosec.server import MOSEC_RESERVED_ENDPOINTS

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        request = container[probe]["httpGet"]
        assert request["path"] in MOSEC_RESERVED_ENDPOINTS and request["port"] == "http"


def test_the_arguments_are_the_commands(container):
    command = get_command(app_for(["serve-oracle"])).commands["serve-oracle"]
    arguments = command.make_context("serve-oracle", list(container["args"])).params
    assert arguments["host"] == "0.0.0.0", "a pod that listens to itself alone serves nobody"
    assert arguments["allow_anyone"] is False
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert arguments["devices"] == ",".join(str(number) for number in range(gpus))


def test_the_token_comes_from_a_secret(container):
    (token,) = [entry for entry in container["env"] if entry["name"] == TOKEN]
    assert set(token["valueFrom"]) == {"secretKeyRef"}
    assert "value" not in token


def test_the_container_has_no_privileges(deployment, container):
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    own = container["securityContext"]
    assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]} and not own.get("privileged", False)
    assert {"requests", "limits"} <= set(container["resources"])


def test_what_is_written_has_a_volume(deployment, container):
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    assert "/tmp" in mounts.values(), "Mosec's sockets"
    caches = [entry["value"] for entry in container["env"] if entry["name"] in ("HOME", "HF_HOME")]
    assert len(caches) == 2 and all(cache.startswith(mounts["cache"]) for cache in caches)


def test_the_image_is_what_the_dockerfile_makes(container):
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert container["image"] == f"oatlite-oracle:{oatlite.__version__}"
    assert f"-t {container['image']} " in dockerfile
    assert 'ENTRYPOINT ["oatlite", "serve-oracle"]' in dockerfile
    sources = [line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY")]
    assert all((ROOT / name).exists() for names in sources for name in names)


def test_they_are_installed_with_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = data["oatlite.oracles"]
    found = {path.name for pattern in patterns for path in (ROOT / "oatlite" / "oracles").glob(pattern)}
    assert found >= {"deployment.yaml", "service.yaml", "Dockerfile"}
