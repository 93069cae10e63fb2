"""Metrics of a real peer: what events count, what is served, and that dashboard and alerts use what there is."""

import json
import math
import re
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from peerlora.errors import ConfigError, ExtraMissing
from peerlora.network.identity.authority import throwaway
from peerlora.runs.events import (
    CaughtUp,
    Evaluated,
    Joined,
    NeighbourChanged,
    RoundDone,
    RunFinished,
    RunStarted,
    Warned,
)
from peerlora.runtime.launch.processes import free_ports
from peerlora.runtime.peer.metrics_server import MetricsServer
from peerlora.runtime.peer.open_metrics import PeerMetrics
from peerlora.runtime.peer.run import run_peer

pytestmark = pytest.mark.skipif(
    find_spec("prometheus_client") is None, reason="prometheus_client is not installed (pip install '.[metrics]')"
)
NOW = datetime(2026, 1, 10, tzinfo=UTC)
DOCS = Path(__file__).parents[2] / "docs" / "monitoring"


def start():
    names = {"0": "hospital-a", "1": "hospital-b"}
    return RunStarted("", "adf-lora", 2, 9, "accuracy", True, 0, 1, {}, {}, {}, 5, [], held=[1], names=names)


def done(t, **changes):
    facts = {"contacts": 1, "bytes_per_edge": 10, "bytes_sent": 1000, "seconds_train": 2.0, "seconds_mix": 0.2}
    return RoundDone(t, [0.5], *[0.0] * 6, None, seconds_diagnostics=0.0, **{**facts, **changes})


@pytest.fixture
def metrics(tmp_path):
    ends = {"the certificate": NOW + timedelta(days=3), "the member list": None}
    return PeerMetrics(tmp_path / "not-yet", lambda: ends, lambda: NOW)


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"peerlora_{name}", labels)


def test_events_are_counted(metrics):
    for event in (
        start(),
        Joined("", 0, [0]),
        done(0, behind=2),
        done(1, contacts=0, missed={"0": "late: by far"}, behind=0),
        Evaluated(2, 20, [0.75], math.nan, [0.5], math.nan, 0.1, False),
        NeighbourChanged("", 2, 0, "refused", "wrong-run: words of the other side, here"),
        NeighbourChanged("", 2, 0, "refused", "<script>"),
        NeighbourChanged("", 2, 0, "down", ""),
        CaughtUp("", 2, 7, 0, False),
    ):
        metrics(event)
    assert value(metrics, "round") == 2 and value(metrics, "rounds_planned") == 9 and value(metrics, "lag_rounds") == 0
    assert value(metrics, "sent_bytes_total") == 2000 and value(metrics, "exchange_seconds_sum") == pytest.approx(0.4)
    assert value(metrics, "missed_links_total", neighbour="hospital-a", reason="late") == 1
    assert value(metrics, "refusals_total", neighbour="hospital-a", reason="wrong-run") == 1
    assert value(metrics, "refusals_total", neighbour="hospital-a", reason="unknown-reason") == 1
    assert value(metrics, "neighbour_up", neighbour="hospital-a") == 0
    assert value(metrics, "score", metric="accuracy") == 0.75 and value(metrics, "skipped_rounds_total") == 5
    assert value(metrics, "last_round_timestamp_seconds") == NOW.timestamp()
    assert value(metrics, "validity_left_seconds", of="certificate") == 3 * 86400
    assert math.isnan(value(metrics, "validity_left_seconds", of="member-list"))
    assert value(metrics, "disk_free_bytes") > 0


def get(port, path, accept="*/*", host="127.0.0.1"):
    request = urllib.request.Request(f"http://{host}:{port}{path}", headers={"Accept": accept})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def test_what_is_served_can_be_parsed_and_says_whether_the_peer_is_ready(metrics):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    with MetricsServer("127.0.0.1:0", metrics) as server:
        assert get(server.port, "/healthz")[0] == 200
        assert get(server.port, "/readyz")[::2] == (503, "starting\n")
        for event in (start(), Joined("", 0, [0]), done(0)):
            metrics(event)
        assert get(server.port, "/readyz")[0] == 200
        status, kind, text = get(server.port, "/metrics", "application/openmetrics-text; version=1.0.0")
        assert status == 200 and kind.startswith("application/openmetrics-text")
        assert {"peerlora_round", "peerlora_exchange_seconds"} <= {
            family.name for family in text_string_to_metric_families(text)
        }
        assert get(server.port, "/metrics")[1].startswith("text/plain")
        assert get(server.port, "/etc/passwd")[0] == 404
        metrics(RunFinished("", {}))
        assert get(server.port, "/readyz")[::2] == (503, "finished\n")
        with pytest.raises(ConfigError, match="cannot be opened.*another port"):
            MetricsServer(f"127.0.0.1:{server.port}", metrics)


def alarms(metrics, now):
    """Names of the alerts about times that would fire; of their expressions, Python's meaning is Prometheus'."""
    rules = [rule for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    timed = {rule["alert"]: rule["expr"] for rule in rules if "time()" in rule["expr"]}
    found = {sample.name: sample.value for family in metrics.registry.collect() for sample in family.samples}
    return {name for name, expression in timed.items() if eval(expression, {"time": lambda: now, **found})}


def test_no_alert_about_a_round_fires_before_the_rounds_begin(metrics):
    later = NOW.timestamp() + 7200  # seconds
    assert alarms(metrics, later) == set()
    metrics(start())
    assert alarms(metrics, later) == set() and math.isnan(value(metrics, "last_round_timestamp_seconds"))
    metrics(Joined("", 0, [0]))
    assert alarms(metrics, NOW.timestamp() + 1800) == set()
    assert alarms(metrics, later) == {"PeerloraStuck", "PeerloraAlone"}
    metrics.clock = lambda: NOW + timedelta(seconds=7000)
    metrics(done(0, contacts=0))
    assert alarms(metrics, later) == {"PeerloraAlone"}
    metrics(done(1))
    assert alarms(metrics, later) == set()


def test_an_ipv6_address_can_be_opened_and_nobody_is_looked_up(metrics, monkeypatch):
    def look_up(*_):
        raise AssertionError("a name was looked up")

    for name in ("getfqdn", "gethostbyaddr", "getnameinfo"):
        monkeypatch.setattr(f"socket.{name}", look_up)
    with MetricsServer("127.0.0.1:0", metrics) as server:
        assert get(server.port, "/healthz")[0] == 200
    try:
        with MetricsServer("[::1]:0", metrics) as server:
            assert get(server.port, "/healthz", host="[::1]")[0] == 200
    except ConfigError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


@pytest.mark.parametrize(
    "address", ["9464", "127.0.0.1", "127.0.0.1:x", ":1", "127.0.0.1:99999", "::1:9464", "[::1]", "[::1]9464", "a/b:1"]
)
def test_an_address_that_is_none_is_refused(metrics, address):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        MetricsServer(address, metrics)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("peerlora.environment.find_spec", lambda name: None)
    with pytest.raises(ExtraMissing, match=r"\.\[metrics\]"):
        PeerMetrics(tmp_path)


@pytest.mark.slow
def test_a_private_run_warns_that_what_is_served_is_not_covered(config, tmp_path, no_reports):
    (served,) = free_ports(1)
    throwaway(tmp_path / "sites", {"a": "127.0.0.1:1", "b": "127.0.0.1:2"}, "clinics")
    words = ["train.dtype=fp32", "clients=2", "topology=path", "train.rounds=1", "peer.join=0.1", "eval.rows=4"]
    for privacy, expected in ((["privacy={noise: 1}"], 1), ([], 0)):
        seen = []
        run_peer(
            config("bert", *words, *privacy),
            tmp_path / "sites" / "b",
            tmp_path / "sites" / "members.json",
            tmp_path / f"run{expected}",
            listen=f"127.0.0.1:{free_ports(1)[0]}",
            metrics=f"127.0.0.1:{served}",
            sinks=[seen.append],
        )
        told = [event.message for event in seen if isinstance(event, Warned) and "not numbers" in event.message]
        assert len(told) == expected and all(f"go to whoever reads 127.0.0.1:{served}" in each for each in told)


def test_a_real_peer_serves_its_rounds(config, tmp_path, no_reports):
    listen, served = free_ports(2)
    throwaway(tmp_path / "sites", {"a": f"127.0.0.1:{listen}", "b": f"127.0.0.1:{listen}"}, "clinics")
    seen = []

    def scrape(event):
        if isinstance(event, RoundDone):
            seen.append(get(served, "/metrics")[2])

    words = ["train.dtype=fp32", "clients=2", "topology=path", "train.rounds=2", "peer.join=0.1", "eval.rows=4"]
    run_peer(
        config("bert", *words),
        tmp_path / "sites" / "b",
        tmp_path / "sites" / "members.json",
        tmp_path / "run",
        metrics=f"127.0.0.1:{served}",
        sinks=[scrape],
    )
    assert re.search(r"^peerlora_round 1.0$", seen[1], re.M)  # the sink before counts the second round after it
    assert re.search(r'^peerlora_missed_links_total\{neighbour="a",reason=".+"\} 1.0$', seen[1], re.M)
    assert re.search(r'^peerlora_validity_left_seconds\{of="certificate"\} [0-9.e+]+$', seen[1], re.M)
    with pytest.raises(urllib.error.URLError):
        get(served, "/metrics")


def test_dashboard_and_alerts_ask_for_metrics_that_there_are(metrics):
    metrics(start())
    there = {sample.name for family in metrics.registry.collect() for sample in family.samples}
    there |= {f"peerlora_{each}" for each in ("missed_links_total", "refusals_total", "neighbour_up", "score")}
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [
        rule["expr"]
        for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]
    named = {name for text in asked for name in re.findall(r"peerlora_\w+", text)}
    assert named and named <= there
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
