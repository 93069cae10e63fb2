"""What real peers check, agree on and summarise where exchange.relay is on."""

import json

import pytest

from cases import ROW_METHODS
from peerlora.algorithms import build_algorithm
from peerlora.algorithms.base import requirement
from peerlora.cli.launch import print_launch
from peerlora.config.loading import load_config
from peerlora.errors import CompositionError
from peerlora.runtime.launch.processes import LocalFederation
from peerlora.runtime.peer import config_digest
from peerlora.runtime.peer.checks import check_links
from peerlora.runtime.peer.config_digest import section_hashes
from peerlora.topology.schedule import build_topology


def hashes(*words):
    return section_hashes(_config(*words), ["a", "b"])


def _config(*words):
    return load_config({}, list(words))


def test_sites_must_agree_on_relaying():
    plain, relayed = hashes(), hashes("exchange.relay={}")
    assert [name for name in plain if plain[name] != relayed[name]] == ["exchange"]
    assert hashes("exchange.relay={}") == relayed
    for other in ("keep=2", "max_age=5", "weights=age", "average=factors", "deploy=own"):
        assert hashes("exchange.relay={}", f"exchange.relay.{other}")["exchange"] != relayed["exchange"]


def test_a_site_without_relaying_and_secure_sums_agrees_with_versions_that_do_not_know_them():
    exchange = _config().model_dump(mode="json")["exchange"]
    del exchange["relay"], exchange["secure"]
    before = config_digest._hash(json.dumps(exchange, sort_keys=True).encode())
    assert hashes()["exchange"] == before


def test_methods_that_can_be_relayed_exchange_over_links_that_go_both_ways():
    found = [name for name, kind in ROW_METHODS.items() if kind.traits.refusal("relay") is None]
    needs = [requirement(build_algorithm(name, {})) for name in found]
    assert len(found) > 10 and all(each.row_stochastic or each.symmetric for each in needs)


def test_links_that_go_one_way_carry_no_relayed_adapters():
    """Of a method from elsewhere that itself could use them; those of this package are refused by what they need."""
    config = _config("topology.kind=directed-ring", "clients=4", "algorithm.name=sgp")
    topology = build_topology(config.topology, 4, seed=0)
    check_links(config, build_algorithm("sgp", {}), topology)
    relayed = config.model_copy(update={"exchange": _config("exchange.relay={}").exchange})
    with pytest.raises(CompositionError, match="links that go both ways, and topology=directed-ring has others"):
        check_links(relayed, build_algorithm("sgp", {}), topology)


def finished(config, folder, *words):
    """A launched federation of two whose peers have written their summaries."""
    made = LocalFederation(config("bert", "clients=2", "topology=path", *words), folder, [])
    for peer, own in zip(made.peers, (0.5, 0.7), strict=True):
        scores = {"own_mean": own} | ({"relayed_mean": own + 0.1} if words else {})
        peer.folder.mkdir()
        (peer.folder / "summary.json").write_text(json.dumps({"accuracy": scores, "bytes_sent": 7}))
        peer.state = "finished"
    made.close()
    return made.summary()


def test_a_launched_federation_summarises_its_relayed_models(config, tmp_path, capsys):
    found = finished(config, tmp_path / "relayed", "exchange.relay={}")
    assert [peer["relayed"] for peer in found["peers"]] == [0.6, pytest.approx(0.8)]
    assert found["relayed_mean"] == pytest.approx(0.7) and found["relayed_min"] == 0.6 and found["own_mean"] == 0.6
    assert found["deployed"] == "relayed" and found["ok"]
    print_launch(found)
    told = capsys.readouterr().out
    assert "relayed models mean 0.700, min 0.600, max 0.800; deployed: the relayed ones" in told


def test_a_launched_federation_that_does_not_relay_says_nothing_of_it(config, tmp_path, capsys):
    found = finished(config, tmp_path / "plain")
    assert found["own_max"] == 0.7 and not any("relayed" in name or name == "deployed" for name in found)
    print_launch(found)
    assert "relayed" not in capsys.readouterr().out
