"""Manifests that a user fills with names: checked with Ray's own validator, and against what KubeRay's CRDs know."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
MANIFESTS = ROOT / "manifests"
# Every field of ours below `spec`, with its type in the CRD, noted when both manifests passed the whole schema of
# ray-operator/config/crd/bases of ray-project/kuberay at feeaf72facab (v1.7.0), unknown fields refused.
KNOWN = json.loads((Path(__file__).parent / "golden" / "kuberay_fields.json").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "int-or-string": (int, str)}


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found
    return found.group(1)


def fields(value: Any, known: dict[str, str], at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            path = f"{at}.{name}" if f"{at}.{name}" in known else f"{at}.*"
            yield path if path in known else f"{at}.{name}", inner
            yield from fields(inner, known, path)
    elif isinstance(value, list):
        for inner in value:
            yield f"{at}[]", inner
            yield from fields(inner, known, f"{at}[]")


@pytest.mark.parametrize(("name", "kind"), [("kuberay-cluster", "RayCluster"), ("kuberay-job", "RayJob")])
def test_a_kuberay_manifest_has_only_fields_that_the_crd_knows_and_of_its_types(name, kind):
    manifest = yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    seen = list(fields(manifest["spec"], KNOWN[kind]))
    assert len(seen) > 40
    for path, value in seen:
        assert path in KNOWN[kind], f"{path}: check the manifest against the CRD again, and note its fields"
        assert isinstance(value, TYPES[KNOWN[kind][path]]), path
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_ray_up_manifest_passes_ray_s_own_validator(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text()))
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command == "ray stop" or "RAY_AUTH_MODE=token ray start" in command
    with pytest.raises(Exception, match="headnode"):
        validate_config(config | {"headnode": {}})


def test_the_slurm_script_is_bash_and_stops_at_its_first_error():
    script = MANIFESTS / "slurm.sbatch"
    subprocess.run(("bash", "-n", str(script)), check=True)
    assert "set -euo pipefail" in script.read_text()


def test_the_image_copies_what_there_is_and_has_the_pinned_ray():
    text = re.sub(r"\\\n", " ", (MANIFESTS / "Dockerfile").read_text())
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    assert {line[0] for line in lines} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV"}
    (image,) = (line[1] for line in lines if line[0] == "FROM")
    assert image.startswith(f"rayproject/ray:{pinned('ray')}-py311")
    copied = {name for line in lines if line[0] == "COPY" for name in line[2:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert {"search", "evaluation", "trainer", "cluster", "pyproject.toml", "constraints.txt"} <= copied


def test_the_grafana_dashboard_asks_for_metrics_that_there_are():
    source = (ROOT / "search" / "gauges.py").read_text()
    ours = set(re.findall(r'Gauge\("(\w+)"', source))
    dashboard = json.loads((MANIFESTS / "grafana.json").read_text())
    asked = set(re.findall(r"ray_(ddpm_search_\w+)", json.dumps(dashboard["panels"])))
    assert asked == ours
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
