"""Monitoring: what is scraped exists, and what is drawn is what a run tells."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import yaml

from manifests import CLUSTER, document, nested
from rayft.launch.gauges import METRICS

BOARD = json.loads((CLUSTER / "monitoring" / "grafana-rayft.json").read_text())
EXPORTED = {f"ray_{name}" for name in METRICS}  # as Ray's agents name them


def queries() -> list[str]:
    drawn = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return drawn + [one["query"]["query"] for one in BOARD["templating"]["list"] if isinstance(one["query"], dict)]


def test_the_dashboard_asks_for_what_runs_tell_and_for_all_of_it() -> None:
    asked = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert asked == EXPORTED


EXPORT = """
import sys
from prometheus_client import REGISTRY, generate_latest
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
recorder = OpenTelemetryMetricRecorder()
for name in sys.argv[1:]:
    recorder.register_gauge_metric(name, "")
    recorder.set_metric_value(name, {"run": "sweep/trials/00003"}, 0.5)
print(generate_latest(REGISTRY).decode())
"""


def test_rays_agent_exports_the_names_and_the_tag_that_the_dashboard_asks_for() -> None:
    command = [sys.executable, "-c", EXPORT, *METRICS]  # a process of its own: exporters are for a whole process
    page = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line for line in page.splitlines() if line.startswith("ray_rayft_")]
    assert {line.partition("{")[0] for line in lines} == EXPORTED
    assert all('run="sweep/trials/00003"' in line and line.endswith(" 0.5") for line in lines)


def test_every_panel_keeps_runs_apart() -> None:
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            assert re.fullmatch(r'max by \(run\) \(ray_\w+\{run=~"\$run"\}\)', target["expr"])
            assert target["legendFormat"] == "{{run}}"


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_names_no_prometheus_of_ours() -> None:
    sources = [one["datasource"] for one in nested(BOARD) if isinstance(one.get("datasource"), dict)]
    assert {tuple(sorted(one.items())) for one in sources} == {(("type", "prometheus"), ("uid", "${datasource}"))}
    assert {one["name"] for one in BOARD["templating"]["list"]} == {"datasource", "run"}


def test_a_plain_cluster_is_found_by_rays_own_file() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = yaml.safe_load((CLUSTER / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]


def head_ports() -> dict[str, Any]:
    spec = document("kuberay/raycluster.yaml", "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    return {port["name"]: port for port in spec["containers"][0]["ports"]}


def test_pods_are_scraped_where_they_export_and_where_the_network_lets_in() -> None:
    monitor = document("monitoring/podmonitor.yaml", "PodMonitor")
    scraped = {one["port"] for one in monitor["spec"]["podMetricsEndpoints"]}
    assert scraped == {name for name in head_ports() if name.endswith("metrics")}
    nodes = document("kuberay/network.yaml", "NetworkPolicy", "rayft-nodes")["spec"]
    (rule,) = [rule for rule in nodes["ingress"] if "ports" in rule]
    assert {port["port"] for port in rule["ports"]} == scraped
    assert monitor["metadata"]["namespace"] in monitor["spec"]["namespaceSelector"]["matchNames"]


def test_the_readme_explains_every_metric() -> None:
    told = set(re.findall(r"`(ray_rayft_\w+)`", (CLUSTER / "README.md").read_text()))
    assert told == EXPORTED
