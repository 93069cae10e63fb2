import hashlib
import json
import os
import stat
import time
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
        told = [(line["peer"], line["reason"], line["side"]) for line in refusals]
        # A first call may come before the other side has the session; it is made again.
        assert [each for each in told if each[1] != "no-session"] == [(peer, "wrong-run", side)]
        assert {"up", "down"} <= {line["event"] for line in log} | {"down"}
        assert stat.S_IMODE((tmp_path / site).stat().st_mode) == 0o600


def test_the_log_is_bounded_and_no_line_is_torn(tmp_path):
    path = tmp_path / "audit.jsonl"
    for number in range(20):  # processes, each with a budget of its own
        audit = AuditLog(path, peers=["a"], file_bytes=2000, total_bytes=8000)
        for each in range(25):
            audit.message("sent", "a", b"header", 1000 * number + each + 1)
        audit.close()
    files = [path, *(tmp_path / f"audit.jsonl.{n}" for n in (1, 2, 3))]
    assert sorted(tmp_path.iterdir()) == files and all(file.stat().st_size <= 2000 for file in files)
    kept = [line["bytes"] for file in reversed(files) for line in lines(file) if line["event"] == "sent"]
    assert kept == sorted(kept) and kept[-1] > 19_000 and kept[0] > 10_000


class Clock:
    """Seconds that a test lets pass."""

    now = 0.0

    def __call__(self):
        return self.now


DAY = 86_400


def test_an_absent_neighbour_costs_little_and_every_try_is_counted(tmp_path):
    """Each probe had a line of its own: two a second, 57 MB a day."""
    clock, path = Clock(), tmp_path / "audit.jsonl"
    header, _ = pack(Header(run="r", kind="hello", sender="a"), {})
    audit = AuditLog(path, message_facts, peers=["b"], clock=clock)
    for second in range(DAY // 60):
        clock.now = 60.0 * second
        for _ in range(12):
            audit.message("unanswered", "b", header, 0)
        audit.message("unanswered", "b", b"vectors", 8_000_000, moved=False)
        audit.refused("b", "tls-failed", "expired", "there")
    audit.close()
    found = lines(path)
    counts = {"unanswered": 0, "refused": 0}
    for line in found:
        counts[line.get("of", line["event"])] += line.get("count", 1)
    assert counts == {"unanswered": 13 * DAY // 60, "refused": DAY // 60}
    assert path.stat().st_size < 150_000


def test_lines_about_others_outlive_a_flood_by_one(tmp_path):
    clock, path = Clock(), tmp_path / "audit.jsonl"
    audit = AuditLog(path, peers=["a", "b"], file_bytes=5000, total_bytes=60_000, days=10, clock=clock)
    audit.message("received", "a", b"header", 1)
    for number in range(3000):
        clock.now += 1.0
        audit.message("received", "b", b"header", number + 1)
        audit.refused(f"unknown {number}", "not-a-member", "", "here")
    audit.message("received", "a", b"header", 2)
    audit.close()
    found = [line for file in tmp_path.iterdir() for line in lines(file)]
    assert sorted(line["bytes"] for line in found if line["peer"] == "a") == [1, 2]
    left_out = sum(line["count"] for line in found if line["event"] == "left-out" and line["peer"] == "b")
    assert left_out + sum(line["peer"] == "b" and line["event"] == "received" for line in found) == 3000
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 60_000


def test_a_share_fills_again_within_the_days_that_lines_are_kept(tmp_path):
    clock, path = Clock(), tmp_path / "audit.jsonl"
    audit = AuditLog(path, peers=["a"], total_bytes=8000, days=10, clock=clock)
    for _ in range(100):
        audit.message("sent", "a", b"header", 1)
    first = sum(line["event"] == "sent" for line in lines(path))
    assert 0 < first < 100
    clock.now += 5 * DAY
    for _ in range(100):
        audit.message("sent", "a", b"header", 2)
    assert first * 0.3 < sum(line.get("bytes") == 2 for line in lines(path)) < first * 0.7
    audit.close()


def test_lines_stay_for_so_many_days(tmp_path):
    path = tmp_path / "audit.jsonl"

    def written(number):
        audit = AuditLog(path, days=3, peers=["a"], file_bytes=300)
        audit.message("sent", "a", b"header", number)
        audit.close()

    for number in range(1, 6):
        written(number)
    days = {1: 1, 2: 2.5, 3: 4, 4: 5}
    for file, age in days.items():
        old = time.time() - age * DAY
        os.utime(tmp_path / f"audit.jsonl.{file}", (old, old))
    written(6)
    kept = {line["bytes"] for file in tmp_path.iterdir() for line in lines(file)}
    assert kept == {6, 5, 4, 3}


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
    audit = AuditLog(tmp_path / "audit.jsonl", file_bytes=200)
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
