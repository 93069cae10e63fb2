"""``peer`` and ``doctor`` with real identities, alone and against each other."""

import asyncio
import json
import re
import socket
from datetime import timedelta
from importlib.util import find_spec

import pytest

from peerlora.config.loading import load_config
from peerlora.errors import ConfigError
from peerlora.network.identity import expiry
from peerlora.network.identity.authority import list_signer, throwaway
from peerlora.network.identity.members import (
    add_member,
    read_list,
    remove_member,
    sign_list,
    unlink_members,
    write_list,
)
from peerlora.runs.events import RoundDone
from peerlora.runtime.launch.processes import free_ports
from waiting import until

WORDS = ["train.dtype=fp32", "clients=2", "topology=path", "train.rounds=2", "peer.join=0.5", "eval.rows=4"]
WORDS += ["peer.quorum=0"]  # most of these peers are alone


@pytest.fixture
def sites(tmp_path):
    """Folder with the identities a and b, and their list."""
    addresses = {site: f"127.0.0.1:{port}" for site, port in zip("ab", free_ports(2), strict=True)}
    throwaway(tmp_path / "sites", addresses, "clinics")
    return tmp_path / "sites"


def options(sites, site):
    return ["--identity", sites / site, "--members", sites / "members.json"]


def test_a_peer_without_neighbours_trains_alone_resumes_and_says_so(cli, yaml_file, sites, tmp_path):
    path, out = yaml_file(*WORDS), tmp_path / "run"
    answer = cli("peer", path, *options(sites, "b"), "--out", out, "--json", "--resume")
    assert answer.code == 0, answer.err
    assert "not there after 0.5 s: a" in answer.err
    assert "warning: no round of 2 had any contact: the model is this site's alone" in answer.err
    assert re.search(r"- │ +- │ +0.0 MB", answer.out), answer.out  # the consensus: nobody was there to agree with
    assert json.loads(answer.out.strip().splitlines()[-1])["rounds"] == 2
    assert (out / "adapters" / "client-01").is_dir() and (sites / "b" / "audit.jsonl").is_file()
    again = cli("peer", path, *options(sites, "b"), "--out", out, "--json", "--resume")
    assert again.code == 0 and json.loads(again.out.strip().splitlines()[-1])["rounds"] == 2
    other = cli("peer", path, *options(sites, "b"), "--out", out, "--resume", "train.lr=0.5")
    assert other.code == 2 and "train.lr" in other.err


def test_secure_sums_need_the_keys_of_all_sites_before_anything_is_written(cli, yaml_file, sites, tmp_path):
    words = [*WORDS, "clients=3", "topology=ring", "exchange.secure=true"]
    listed = read_list(sites / "members.json").list
    listed = add_member(listed, "c", "c" * 64)
    write_list(sites / "members.json", sign_list(listed, list_signer(sites / "authority"), timedelta(days=30)))
    for command in (
        ["peer", yaml_file(*words), "--out", tmp_path / "run"],
        ["doctor", yaml_file(*words), "--wait", "0"],
    ):
        answer = cli(*command, *options(sites, "a"))
        assert answer.code in (1, 2) and not (tmp_path / "run").exists()
        assert "has none of c; have them added: peerlora members agree" in answer.err + answer.out


def test_a_run_without_contact_is_no_success(cli, yaml_file, sites, tmp_path):
    """It ended with exit code 0 and a consensus distance of 0, as if all had agreed."""
    path, out = yaml_file(*WORDS[:-1]), tmp_path / "run"
    answer = cli("peer", path, *options(sites, "b"), "--out", out, "--json", "--resume")
    assert answer.code == 1 and "contact in 0% of the rounds, peer.quorum=0.8 asks for 80%" in answer.err
    summary = json.loads(answer.out.strip().splitlines()[-1])
    assert summary["contact"] == {"share": 0.0, "alone": 2} and set(summary["consensus"].values()) == {None}
    assert (out / "adapters" / "client-01").is_dir()
    again = cli("peer", path, *options(sites, "b"), "--out", out, "--resume")
    assert again.code == 0  # else a supervisor would start it for ever


def test_a_certificate_and_a_list_near_their_end_are_told_in_the_run(cli, yaml_file, sites, tmp_path, monkeypatch):
    monkeypatch.setattr(expiry, "SOON", 40)
    answer = cli("peer", yaml_file(*WORDS), *options(sites, "b"), "--out", tmp_path / "run")
    for what in ("the certificate", "the member list"):
        assert answer.err.count(f"warning: {what} ends in 29 days") == 1, answer.err


def test_a_peer_that_waits_for_its_neighbours_hears_that_it_shall_stop(config, sites, tmp_path):
    from peerlora.errors import Stopped
    from peerlora.runtime.peer.run import run_peer

    made, out = config("bert", *WORDS, "peer.join=3600"), tmp_path / "run"
    with pytest.raises(Stopped, match="waiting for the neighbours, before round 1; go on with: .* --resume"):
        run_peer(made, sites / "b", sites / "members.json", out, stop=lambda: True)
    again = made.model_copy(update={"peer": made.peer.model_copy(update={"join": 0.1})})
    assert run_peer(again, sites / "b", sites / "members.json", out, resume=True).summary["rounds"] == 2


def test_what_a_peer_refuses(cli, yaml_file, sites, tmp_path):
    path = yaml_file(*WORDS)
    for words, told in [
        ((["--resume"]), "--resume given without --out"),
        ((["--resume", "--watch"]), "--resume given without --out"),
        ((["topology.weights=pairwise"]), "pairwise"),
        ((["clients=1", "topology=complete"]), "from the next run on, with clients=2 at all sites"),
    ]:
        answer = cli("peer", path, *words, *options(sites, "b"))
        assert answer.code == 2 and told in answer.err, answer.err
    answer = cli("peer", path, "--identity", tmp_path, "--members", sites / "members.json")
    assert answer.code == 2


@pytest.mark.slow
@pytest.mark.skipif(find_spec("uvicorn") is None, reason="uvicorn is not installed (pip install '.[watch]')")
def test_all_that_a_peer_writes_to_stderr_is_json_its_page_and_its_error_too(process, yaml_file, sites, tmp_path):
    path = yaml_file(*WORDS[:-1])  # with a quorum, which one alone does not reach
    words = ["--out", tmp_path / "run", "--log", "json", "--watch"]
    alone = process("peer", path, *options(sites, "b"), *words)
    _, told = alone.communicate()
    assert alone.returncode == 1
    found = [json.loads(line) for line in told.splitlines()]
    assert [line["event"] for line in found].count("QuorumMissed") == 1 and found[-1]["event"] == "QuorumMissed"
    assert [line["message"][:13] for line in found if line["event"] == "stderr"] == ["watch: http:/"]
    mistaken = process("peer", path, "train.lr=x", *options(sites, "b"), "--log", "json")
    (line,) = mistaken.communicate()[1].splitlines()
    assert json.loads(line)["event"] == "ConfigError" and mistaken.returncode == 2


def test_doctor_says_who_gets_to_see_a_relayed_adapter(cli, yaml_file, sites):
    told = r"advice +exchange.relay: every site of the run gets this site's adapter, not its 1 neighbours alone: a\n"
    path = yaml_file(*WORDS, "exchange.relay={}")
    assert re.search(told, cli("doctor", path, *options(sites, "b"), "--wait", "0.1").out)
    assert "every site of the run" not in cli("doctor", yaml_file(*WORDS), *options(sites, "b"), "--wait", "0.1").out
    cached = cli("doctor", yaml_file(*WORDS, "algorithm.name=cached-dfl"), *options(sites, "b"), "--wait", "0.1").out
    assert re.search(told.replace("exchange.relay", "algorithm.name=cached-dfl"), cached)
    assert "or do without algorithm.name=cached-dfl at all of them" in cached


def changed(sites, change):
    """Replace the member list by the next version, signed."""
    listed = change(read_list(sites / "members.json").list)
    write_list(sites / "members.json", sign_list(listed, list_signer(sites / "authority"), timedelta(days=30)))


def test_a_finished_run_is_left_alone_and_ends_at_once(cli, yaml_file, sites, tmp_path, monkeypatch):
    path, out = yaml_file(*WORDS), tmp_path / "run"
    first = cli("peer", path, *options(sites, "b"), "--out", out, "--json", "--resume")
    assert first.code == 0, first.err
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    (sites / "b/certificate.pem").unlink()  # nothing is loaded, nobody is greeted, no port is opened
    again = cli("peer", path, *options(sites, "b"), "--out", out, "--json", "--resume")
    assert again.code == 0 and again.out == first.out, again.err
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before

    from peerlora.config.loading import load_config
    from peerlora.runtime.peer.run import run_peer

    result = run_peer(load_config(path), sites / "b", sites / "members.json", out, resume=True)
    assert result.adapters.clients == 1 and result.metrics.num_rows


def stopped_run(yaml_file, sites, out, *words):
    """b's run after one of its rounds; its config's file."""
    from peerlora.config.loading import load_config
    from peerlora.errors import Stopped
    from peerlora.runtime.peer.run import run_peer

    path, seen = yaml_file(*WORDS, *words), []
    with pytest.raises(Stopped):
        run_peer(
            load_config(path),
            sites / "b",
            sites / "members.json",
            out,
            sinks=[seen.append],
            stop=lambda: any(isinstance(event, RoundDone) for event in seen),
        )
    return path


def test_a_peer_that_goes_on_knows_the_names_of_sites_and_its_rounds(cli, yaml_file, sites, tmp_path):
    path = stopped_run(yaml_file, sites, tmp_path / "run")
    words = ["peer", path, *options(sites, "b"), "--out", tmp_path / "run", "--resume", "--log", "json"]
    answer = cli(*words)
    assert answer.code == 0, answer.err
    told = [json.loads(line) for line in answer.err.splitlines()]
    kinds = [line["event"] for line in told]
    (start,) = (line for line in told if line["event"] == "RunStarted")
    assert "2 clients, 2 rounds" in start["message"] and "this is b;" in start["message"]
    assert kinds.index("Resumed") < kinds.index("RunStarted") < kinds.index("RoundDone")
    kept = [json.loads(line)["type"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert kept.count("RunStarted") == 1 and kept[0] == "RunStarted"


def test_names_that_are_too_long_together_for_a_message_are_refused(tmp_path):
    from peerlora.network.identity.members import new_list
    from peerlora.runtime.peer.run import site_on

    listed = add_member(new_list(100 * "n"), "a", "a" * 64)
    assert site_on(load_config({"peer": {"run": 27 * "r"}}), listed, "a").run == f"{100 * 'n'}/{27 * 'r'}"
    with pytest.raises(ConfigError, match="28 letters, and the member list's name has 100; expected at most 127"):
        site_on(load_config({"peer": {"run": 28 * "r"}}), listed, "a")


def test_doctor_tells_of_an_address_that_no_resolver_takes(monkeypatch):
    """As lists may hold that were signed before such addresses were refused."""
    from types import SimpleNamespace

    from peerlora.runtime.peer import preflight

    member = SimpleNamespace(address="peer..b:7443")
    roster = SimpleNamespace(me="a", members=SimpleNamespace(member=lambda site: member), dials=lambda peer: True)
    monkeypatch.setattr(preflight, "check_address", lambda address: ("peer..b", 7443))
    found = asyncio.run(preflight._unreached(roster, "b"))
    assert found.level == "problem" and "b cannot be reached at peer..b:7443" in found.what


def test_a_site_talks_to_its_neighbours_in_the_graph_alone(config, tmp_path):
    from peerlora.runtime.peer.run import site_of

    throwaway(tmp_path / "sites", {site: "127.0.0.1:1" for site in "abc"}, "clinics")
    for kind, met in (("path", ["b"]), ("ring", ["b", "c"])):
        made = config("bert", "clients=3", f"topology={kind}")
        _, roster, _ = site_of(made, tmp_path / "sites" / "a", tmp_path / "sites" / "members.json")
        assert roster.others() == met


def test_a_run_goes_on_after_a_site_was_added(cli, yaml_file, sites, tmp_path):
    path = stopped_run(yaml_file, sites, tmp_path / "run")
    for told in (
        cli("show", tmp_path / "run").out,
        cli("export", tmp_path / "run", "--client", "1", "--to", tmp_path / "to").err,
    ):
        assert f"peerlora peer CONFIG.yaml --identity DIR --members FILE --out {tmp_path / 'run'} --resume" in told
    changed(sites, lambda listed: add_member(listed, "c", "ab" * 32))
    answer = cli("peer", path, *options(sites, "b"), "--out", tmp_path / "run", "--resume")
    assert answer.code == 0 and "warning: not in this run of clients=2: c (client 2)" in answer.err, answer.err
    examined = cli("doctor", path, *options(sites, "b"), "--wait", "0.1")
    assert re.search(r"advice +not in this run of clients=2: c", examined.out)


def test_a_pooled_run_goes_on_after_a_site_was_removed(cli, yaml_file, sites, tmp_path):
    out = tmp_path / "run"
    path = stopped_run(yaml_file, sites, out)
    for file in (path, out / "config.yaml"):  # as if it had been pooled from the start
        file.write_text(file.read_text().replace("label_prior: none", "label_prior: pooled"))
    changed(sites, lambda listed: remove_member(listed, "a"))
    refused = cli("peer", path, *options(sites, "b"), "--out", out, "--resume")
    assert refused.code == 2 and "label_prior=pooled" in refused.err
    (out / "label_counts.json").write_text('{"total": [20, 20, 20]}')
    answer = cli("peer", path, *options(sites, "b"), "--out", out, "--resume")
    assert answer.code == 0, answer.err


def test_a_port_that_is_taken_may_pass(cli, yaml_file, sites, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        listen = ["--listen", f"127.0.0.1:{port}"]
        answer = cli("peer", yaml_file(*WORDS), *options(sites, "a"), "--out", tmp_path / "run", *listen)
    assert answer.code == 1 and "cannot listen at" in answer.err


@pytest.mark.slow
@pytest.mark.alone
def test_neighbours_in_the_run_before_may_pass(cli, process, yaml_file, sites, tmp_path):
    path = yaml_file(*WORDS, "peer.run=old", "peer.join=60")
    started = process("peer", path, *options(sites, "a"), "--out", tmp_path / "old")
    until((tmp_path / "old" / "run.json").exists, lambda: started.poll() is None)
    answer = cli("peer", path, "peer.run=new", "peer.join=10", *options(sites, "b"), "--out", tmp_path / "new")
    assert answer.code == 1 and "in another run" in answer.err and "wrong-run" in answer.err, answer.err


def test_a_site_with_a_file_of_its_own(cli, yaml_file, sites, tmp_path, texts):
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps(row) for row in rows if row["label"] != "class1"))
    words = [*WORDS, "partition=own", f"data.train=jsonl:{own}", "task.labels=[class0, class1, class2]"]
    path = yaml_file(*words)
    answer = cli("peer", path, *options(sites, "a"), "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    started = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    ((zero, one, two),) = started["partition"]["counts"]
    assert one == 0 and zero + two == 40 - round(0.1 * 40)
    refused = cli("train", path, "--out", tmp_path / "simulated")
    assert refused.code == 2 and "partition.kind=column" in refused.err
    unnamed = cli("train", path, "task.labels=null")
    assert unnamed.code == 2 and "needs task.labels" in unnamed.err


def test_doctor_alone(cli, yaml_file, sites):
    answer = cli("doctor", yaml_file(*WORDS), *options(sites, "b"), "--wait", "0.5")
    assert answer.code == 1
    assert re.search(r"ok +b is client 1 of 2 on list 'clinics'", answer.out)
    assert re.search(r"ok +the certificate is good for \d+ days", answer.out)
    assert "TCP congestion control" in answer.out
    assert re.search(r"PROBLEM a did not come", answer.out) and "->" in answer.out


def test_doctor_says_when_there_are_no_common_rounds(cli, yaml_file, sites):
    answer = cli("doctor", yaml_file(*WORDS, "algorithm.name=aedfl"), *options(sites, "b"), "--wait", "0.1")
    assert re.search(r"ok +aedfl has no common rounds: every peer does 2 jobs at its own pace", answer.out)


def test_doctor_at_the_side_that_dials(cli, yaml_file, sites):
    answer = cli("doctor", yaml_file(*WORDS), *options(sites, "a"), "--wait", "0.5")
    assert answer.code == 1 and re.search(r"PROBLEM b cannot be reached at 127.0.0.1:\d+", answer.out)


def test_doctor_opens_another_port_behind_a_forwarding(cli, yaml_file, sites):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        answer = cli("doctor", yaml_file(*WORDS), *options(sites, "a"), "--wait", "0.1", "--listen", there)
    assert answer.code == 1 and f"cannot listen at {there}" in answer.out


def test_a_link_that_the_list_lacks_is_told_with_the_command_that_adds_it(cli, yaml_file, sites):
    changed(sites, lambda listed: unlink_members(listed, "a", "b"))
    answer = cli("peer", yaml_file(*WORDS), *options(sites, "a"))
    assert answer.code == 2 and "peerlora members link" in answer.err

    from peerlora.config.loading import load_config
    from peerlora.runtime.peer.run import site_of

    made = load_config(yaml_file(*WORDS))  # a run that has begun goes on without
    assert site_of(made, sites / "a", sites / "members.json", sites)[1].others() == []


def test_doctor_without_identity(cli, yaml_file, sites, tmp_path):
    answer = cli("doctor", yaml_file(*WORDS), "--identity", tmp_path, "--members", sites / "members.json")
    assert answer.code == 1 and "PROBLEM" in answer.out


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("extra", "code", "told"), [([], 0, "same config"), (["train.lr=0.5"], 1, "other train")])
def test_two_doctors_compare(cli, process, yaml_file, sites, extra, code, told):
    path = yaml_file(*WORDS)
    other = process("doctor", path, *options(sites, "a"), "--wait", "30")
    answer = cli("doctor", path, *options(sites, "b"), "--wait", "30", *extra)
    assert answer.code == code and told in answer.out, answer.out
    out, err = other.communicate(timeout=60)
    assert other.returncode == code and told in out, out + err
