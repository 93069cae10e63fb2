import asyncio
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from rigs import SITES, GrpcRig, free_port

from peerlora.errors import IdentityError
from peerlora.network.identity.authority import issue, list_signer, throwaway
from peerlora.network.identity.identity import read_key
from peerlora.network.identity.members import SignedList, remove_member, sign_list, write_list
from peerlora.network.transport.reload import reload_on_change
from peerlora.network.transport.server import TlsServer


@pytest.fixture
def rig(tmp_path):
    throwaway(tmp_path, {site: None if site == "c" else f"127.0.0.1:{free_port()}" for site in SITES}, "test")
    return GrpcRig(tmp_path)


def test_a_new_list_and_a_renewed_certificate_are_taken_up_while_the_peer_runs(rig, caplog):
    folder = rig.folder

    async def scenario(rig):
        await rig.all_up()
        a = rig.transports["a"]
        following = asyncio.ensure_future(reload_on_change(a, folder / "a", folder / "members.json", every=0.05))
        await asyncio.sleep(0.1)
        public = read_key(folder / "a/key.pem").public_key()
        (folder / "a/certificate.pem").write_bytes(issue(folder / "authority", public, "a", timedelta(days=80)))
        await rig.until(lambda: a.identity.certificate == (folder / "a/certificate.pem").read_bytes())
        await rig.until(lambda: rig.edge("a", "b") and rig.edge("b", "a") and rig.edge("a", "c"))

        shorter = remove_member(rig.members, "c")
        write_list(folder / "members.json", SignedList(shorter))  # a draft is not taken up
        await rig.until(lambda: "draft without signature" in caplog.text)
        assert rig.edge("a", "c") and not following.done()
        write_list(folder / "members.json", sign_list(shorter, list_signer(folder / "authority"), timedelta(days=30)))
        await rig.until(lambda: a.roster.members.version == 2 and not rig.edge("a", "c"))
        await rig.until(lambda: any("not-a-member" in text for _, _, text in rig.told["c"]))
        await rig.transports["a"].send("b", b"h", b"x", deadline=5)
        (folder / "a/certificate.pem").unlink()
        await rig.until(lambda: "certificate.pem cannot be read" in caplog.text)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    rig.run(scenario)


def following(rig, site, every=0.05):
    return asyncio.ensure_future(
        reload_on_change(rig.transports[site], rig.folder / site, rig.folder / "members.json", every)
    )


def sign_without(rig, site):
    shorter = remove_member(rig.members, site)
    signed = sign_list(shorter, list_signer(rig.folder / "authority"), timedelta(days=30))
    write_list(rig.folder / "members.json", signed)


@pytest.mark.parametrize("broken", ["expired", "half"])
def test_a_removal_is_taken_up_whatever_is_wrong_with_the_own_certificate(rig, caplog, broken):
    async def scenario(rig):
        await rig.all_up()
        where = rig.folder / "a/certificate.pem"
        public, past = read_key(rig.folder / "a/key.pem").public_key(), datetime.now(UTC) - timedelta(days=40)
        expired = issue(rig.folder / "authority", public, "a", timedelta(days=30), past)
        where.write_bytes(expired if broken == "expired" else where.read_bytes()[:100])
        sign_without(rig, "c")
        task = following(rig, "a")
        await rig.until(lambda: rig.transports["a"].roster.members.version == 2 and not rig.edge("a", "c"))
        assert "certificate.pem" in caplog.text
        task.cancel()

    rig.run(scenario)


def test_a_removal_is_taken_up_while_a_renewed_certificate_waits_for_the_port(rig, monkeypatch):
    """Another program has the port until the removal has been taken up."""
    opened, tries, taken = TlsServer._opened, [], True

    def try_to_open(server, *words):
        tries.append(not taken and opened(server, *words))
        return tries[-1]

    monkeypatch.setattr(TlsServer, "_opened", try_to_open)

    async def scenario(rig):
        nonlocal taken
        await rig.all_up()
        public = read_key(rig.folder / "a/key.pem").public_key()
        renewed = issue(rig.folder / "authority", public, "a", timedelta(days=80))
        (rig.folder / "a/certificate.pem").write_bytes(renewed)
        task = following(rig, "a")
        await rig.until(lambda: tries)
        sign_without(rig, "b")
        await rig.until(lambda: rig.transports["a"].roster.members.version == 2 and not rig.edge("a", "b"))
        assert not any(tries)
        taken = False
        await rig.until(lambda: tries[-1])
        assert rig.transports["a"].identity.certificate == renewed and not task.done()
        task.cancel()

    rig.run(scenario)


def test_what_failed_is_tried_again_and_told_once(rig, caplog, monkeypatch):
    """The version that was seen cannot be written at first, as on a full disk."""

    async def scenario(rig):
        await rig.all_up()
        times = []

        def full(*words):
            times.append(words)
            raise IdentityError("lists.json cannot be written: No space left on device")  # as write_over says

        monkeypatch.setattr("peerlora.network.identity.roster.write_over", full)
        rig.rosters["a"].folder = rig.folder / "a"
        sign_without(rig, "c")
        task = following(rig, "a")
        await rig.until(lambda: len(times) > 2)
        assert caplog.text.count("No space left on device") == 1 and rig.edge("a", "c")
        monkeypatch.undo()
        await rig.until(lambda: rig.transports["a"].roster.members.version == 2 and not rig.edge("a", "c"))
        assert not task.done()
        task.cancel()

    rig.run(scenario)


def test_a_site_that_gets_an_address_stops_dialling_those_that_dial_it_from_then_on(rig):
    """c listens before the list says where."""
    make, address = rig.make, f"127.0.0.1:{free_port()}"
    rig.make = lambda site: make(site, listen=address) if site == "c" else make(site)

    async def scenario(rig):
        await rig.all_up("a", "c")
        a, c = rig.transports["a"], rig.transports["c"]
        assert "a" in c._dialling
        members = [
            msgspec.structs.replace(each, address=address) if each.site == "c" else each for each in rig.members.members
        ]
        newer = msgspec.structs.replace(rig.members, version=rig.members.version + 1, members=members)
        before = rig.edge("a", "c")
        await c.update(newer)
        assert not c._dialling
        await a.update(newer)
        await rig.until(lambda: rig.edge("a", "c") not in (None, before) and rig.edge("c", "a"))
        await a.send("c", b"h", b"x", deadline=60)
        await c.send("a", b"h", b"x", deadline=60)
        await rig.until(lambda: "up" in rig.kinds("a", "c")[1:] and "up" in rig.kinds("c", "a")[1:])
        assert rig.kinds("a", "c").count("up") == rig.kinds("c", "a").count("up") == 2

    rig.run(scenario)
