"""Prometheus' rules and Grafana's dashboard ask for what the real exporter and the real server have."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gpuops.energy.sensor import Found
from gpuops_serving.client import Client
from gpuops_serving.exporter import Exporter
from gpuops_serving.metrics import ServerMeter
from gpuops_serving.server import TritonServer

DEPLOY = Path(__file__).parents[2] / "serving" / "deploy"
PROMETHEUS, GRAFANA = DEPLOY / "prometheus", DEPLOY / "grafana"
DASHBOARD = json.loads((GRAFANA / "gpuops.json").read_text())
RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
EXPRESSIONS = [
    *(rule["expr"] for rule in RULES),
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
    *(query["query"]["query"] for query in DASHBOARD["templating"]["list"] if query["type"] == "query"),
]
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool (Prometheus) is not installed")


def names(expressions: list[str]) -> set[str]:
    """Metrics that are asked for, of ours and of Triton's; everything else must be PromQL's own or a label."""
    return {name for text in expressions for name in re.findall(r"\b(?:gpuops|nv)_[a-z0-9_]+|gpuops:[a-z0-9_:]+", text)}


def test_every_metric_that_is_asked_for_is_there(server: TritonServer) -> None:
    with urllib.request.urlopen(server.metrics_url) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    with Client(server.grpc_url) as client, ServerMeter(client, found=Found((), "no driver")) as meter:
        families += Exporter(meter).collect()
    there = {family.name + "_total" * (family.type == "counter") for family in families}
    # Triton's counters do not end in _total, and the parser takes that for granted.
    there |= {family.name for family in families if family.name.startswith("nv_")}
    there |= {rule["record"] for rule in RULES if "record" in rule}
    asked = names(EXPRESSIONS)
    assert asked - there == set()
    assert len(asked) > 20


def test_both_of_the_servers_ports_are_scraped_and_rules_are_loaded() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert all((PROMETHEUS / file).is_file() for file in config["rule_files"])
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {target.partition(":")[0] for (target,) in targets.values()} <= set(services)
    assert targets["gpuops"][0].partition(":")[2] in " ".join(services["exporter"]["command"])
    jobs = {job for rule in RULES for job in re.findall(r'job="(\w+)"', rule["expr"])}
    assert jobs <= set(targets)


def test_the_dashboard_is_whole() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, f"{panel['title']} lies on another"
        assert max(x for x, _ in own) < 24
        cells |= own
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval", "__range"}
    assert used == defined
    (stacked,) = [panel for panel in panels if panel["fieldConfig"]["defaults"].get("custom", {}).get("stacking")]
    owners = ("energy", "idle", "loading", "unattributed", "lost")
    assert names([target["expr"] for target in stacked["targets"]]) == {
        f"gpuops_{owner}_joules_total" for owner in owners
    }


def test_grafana_is_told_where_both_lie() -> None:
    source = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())["datasources"][0]
    provider = yaml.safe_load((GRAFANA / "dashboards" / "gpuops.yaml").read_text())["providers"][0]
    assert source["type"] == "prometheus"
    assert (
        f"COPY serving/deploy/grafana/ {provider['options']['path']}/"
        in (DEPLOY.parents[1] / "Dockerfile.cuda").read_text()
    )


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_configuration_and_every_expression(tmp_path: Path) -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    bare = [re.sub(r"\$__(rate_interval|range)", "5m", text) for text in EXPRESSIONS if "label_values" not in text]
    rules = [{"record": f"a:b:{place}", "expr": text} for place, text in enumerate(bare)]
    (tmp_path / "all.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "all.yml")


@needs_promtool
def test_rules_compute_and_alerts_fire_as_they_say(tmp_path: Path) -> None:
    shutil.copy(PROMETHEUS / "rules.yml", tmp_path)
    shutil.copy(Path(__file__).with_name("rules_test.yml"), tmp_path)
    promtool("test", "rules", tmp_path / "rules_test.yml")
