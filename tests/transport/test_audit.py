import hashlib
import json
import stat

from rigs import GrpcRig

from peerlora.exchange.wire import Header, message_facts, pack
from peerlora.transport.audit import Audit


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_message_is_in_the_logs_of_both_sides(federation, tmp_path):
    body = b"x" * 3_000_000

    async def scenario(rig):
        make = rig.make
        rig.make = lambda site: make(site, audit=Audit(tmp_path / site, message_facts))
        await rig.all_up("a", "b")
        header, _ = pack(Header(run="r", kind="mix", round=4, sender="a"), {})
        rig.boxes["b"].refuse_header[b"bad"] = "wrong-run"
        await rig.transports["a"].send("b", header, body, deadline=10)
        try:
            await rig.transports["a"].send("b", b"bad", body, deadline=10)
        except Exception as refused:
            assert "wrong-run" in str(refused)
        return hashlib.sha256(header).hexdigest()

    digest = GrpcRig(federation).run(scenario)
    said = {"bytes": len(body), "header_sha256": digest, "kind": "mix", "round": 4, "step": 0}
    for site, event, peer, side in (("a", "sent", "b", "there"), ("b", "received", "a", "here")):
        log = lines(tmp_path / site)
        assert any(said.items() <= line.items() and line["peer"] == peer for line in log if line["event"] == event)
        refusals = [line for line in log if line["event"] == "refused"]
        assert [(line["peer"], line["reason"], line["side"]) for line in refusals] == [(peer, "wrong-run", side)]
        assert {"up", "down"} <= {line["event"] for line in log} | {"down"}
        assert stat.S_IMODE((tmp_path / site).stat().st_mode) == 0o600


def test_the_log_is_bounded_and_no_line_is_torn(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, most=2000, keep=3)
    for number in range(500):
        audit.refused("stranger", "not-a-member", f"{number} " + "x" * 2000, "here")
    audit.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["audit.jsonl", *(f"audit.jsonl.{n}" for n in (1, 2, 3))]
    assert all(file.stat().st_size <= 2000 for file in files)
    numbers = [int(line["detail"].split()[0]) for file in reversed(files) for line in lines(file)]
    kept = [int(line["detail"].split()[0]) for n in (3, 2, 1) for line in lines(tmp_path / f"audit.jsonl.{n}")]
    kept += [int(line["detail"].split()[0]) for line in lines(path)]
    assert kept == list(range(500 - len(kept), 500)) and sorted(numbers) == kept


def test_a_log_goes_on_after_a_restart_and_names_cannot_forge_lines(tmp_path):
    path = tmp_path / "audit.jsonl"
    for peer in ("a", 'b\n{"event": "sent"}'):
        audit = Audit(path)
        audit.message("sent", peer, b"header", 5)
        audit.close()
    assert [line["peer"] for line in lines(path)] == ["a", 'b\n{"event": "sent"}']


def test_without_a_file_nothing_is_written(tmp_path):
    audit = Audit(None)
    audit.message("sent", "a", b"h", 1)
    audit.refused("a", "late", "", "here")
    audit.event("up", "a", "")
    audit.close()
    assert not list(tmp_path.iterdir())
