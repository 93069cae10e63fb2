import hashlib
import json
import stat
from typing import Any

import pytest
from rigs import GrpcRig

from peerlora.network.protocol.wire import Header, message_facts, pack
from peerlora.network.transport.audit_log import AuditLog
from peerlora.network.transport.heartbeat import Timing
from peerlora.network.transport.links import LinkTable


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_message_is_in_the_logs_of_both_sides(federation, tmp_path):
    body = b"x" * 3_000_000

    async def scenario(rig):
        make = rig.make
        rig.make = lambda site: make(site, audit=AuditLog(tmp_path / site, message_facts))
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
    audit = AuditLog(path, most=2000, keep=3)
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
        audit = AuditLog(path)
        audit.message("sent", peer, b"header", 5)
        audit.close()
    assert [line["peer"] for line in lines(path)] == ["a", 'b\n{"event": "sent"}']


def full(file, room) -> Any:
    """``file``, after whose ``room`` bytes the disk is full."""
    return Full(file, room)


class Full:
    """A file of a disk that becomes full in the middle of a line, or at once."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        return self.file.write(data[: self.room])


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk_costs_lines_and_nothing_else(tmp_path, caplog, room):
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path)
    audit.event("up", "a", "")
    for _ in range(3):
        audit._file = full(audit._file or open(path, "ab", buffering=0), room)
        audit.message("sent", "a", b"header", 5)
    assert caplog.text.count("audit log") == 1 and caplog.text.count("WARNING") == 1
    audit.event("down", "a", "")
    audit.close()
    audit.event("up", "late", "")
    assert [line["event"] for line in lines(path)] == ["up", "down"]


def test_a_log_that_cannot_be_rotated_or_opened_is_told_and_no_more(tmp_path, caplog, monkeypatch):
    audit = AuditLog(tmp_path / "audit.jsonl", most=200)
    with monkeypatch.context() as patch:
        patch.setattr("peerlora.network.transport.audit_log.os.replace", lambda *paths: Full(None, 0).write(paths))
        for number in range(10):
            audit.event("up", f"peer-{number}", "")
    assert caplog.text.count("WARNING") == 1
    audit.event("up", "after", "")
    assert lines(tmp_path / "audit.jsonl")[-1]["peer"] == "after"
    audit.close()
    (tmp_path / "file").touch()
    AuditLog(tmp_path / "file" / "audit.jsonl").event("up", "a", "")  # its folder cannot be made
    assert caplog.text.count("WARNING") == 2


def test_messages_and_sessions_do_not_need_the_log(federation, tmp_path, caplog):
    async def scenario(rig):
        make = rig.make
        rig.make = lambda site: make(site, audit=AuditLog(tmp_path / site, message_facts))
        for site in "ab":
            (tmp_path / site).mkdir()  # nothing can be written where a folder is
        await rig.all_up("a", "b")
        await rig.transports["a"].send("b", b"h", b"x", deadline=5)
        assert len(rig.boxes["b"].got) == 1

    GrpcRig(federation).run(scenario)
    assert caplog.text.count("audit log") == 2


def test_a_dialler_survives_whatever_fails_in_a_session(federation, monkeypatch, caplog):
    async def scenario(rig):
        opened, failures = LinkTable.opened, iter([True, False, False, False])

        def open_later(ends, peer, link, anew=False):
            if ends.me == "a" and next(failures):
                raise ZeroDivisionError("a mistake of ours")
            opened(ends, peer, link, anew)

        monkeypatch.setattr(LinkTable, "opened", open_later)
        rig.timing = Timing(beat=0.1, backoff=(0.05, 0.2), refused=0.2, handshake=1.0)
        await rig.all_up("a", "b")
        assert "dialling b failed here" in caplog.text and "a mistake of ours" in caplog.text

    GrpcRig(federation).run(scenario)


def test_without_a_file_nothing_is_written(tmp_path):
    audit = AuditLog(None)
    audit.message("sent", "a", b"h", 1)
    audit.refused("a", "late", "", "here")
    audit.event("up", "a", "")
    audit.close()
    assert not list(tmp_path.iterdir())
