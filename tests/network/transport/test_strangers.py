"""Whoever must not take part, over real TLS: refused before the receiver is asked anything, and both sides see it."""

import asyncio
import json
import socket
import ssl
import struct
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import msgspec
import pytest
from grpc import aio
from rigs import Box, GrpcRig, free_port

from peerlora.network.base import PeerDown, Refused
from peerlora.network.identity.authority import enrol, issue, new_authority
from peerlora.network.identity.identity import host_name, load_identity, new_identity, read_key
from peerlora.network.identity.key_files import write_over
from peerlora.network.identity.members import add_member, remove_member
from peerlora.network.identity.proof import TOKEN
from peerlora.network.identity.roster import Roster
from peerlora.network.protocol.wire import Expected, Header, message_facts, pack, read_header
from peerlora.network.transport.audit_log import AuditLog
from peerlora.network.transport.dialler import failure
from peerlora.network.transport.frames import ACCEPTED, BEAT, NONCE_KEY, SERVICE, TOKEN_KEY, read_refusal
from peerlora.network.transport.grpc import GrpcTransport
from peerlora.network.transport.heartbeat import Timing
from peerlora.network.transport.listener import CALLS


class Untouched(Box):
    """A receiver that must not be asked."""

    asked = 0

    def admit(self, peer, header):
        self.asked += 1
        return super().admit(peer, header)


class Door(GrpcRig):
    """Site a with its audit log, open to strangers."""

    timing = Timing(beat=0.1, backoff=(0.05, 0.2), refused=0.3, handshake=0.4)

    async def open(self, folder):
        self.log = folder / "audit.jsonl"
        self.log.unlink(missing_ok=True)
        transport = self.make("a", audit=AuditLog(self.log, message_facts))
        self.boxes["a"], self.told["a"], self.transports["a"] = Untouched(), [], transport
        await transport.start(self.boxes["a"])
        self._listening.append(asyncio.ensure_future(self._listen(transport, self.told["a"])))
        return transport

    def reasons(self):
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [(line["peer"].split()[0], line["reason"], line["side"]) for line in lines if line["event"] == "refused"]


@pytest.fixture
def door(federation):
    return Door(federation)


CUT_OFF = "cut off"  # in the middle of writing: whether the reason still arrives is left to chance


async def knock(door, key=None, certificate=None, roots=None, session=True):
    """What a's port says to a gRPC client with these credentials that opens a session (or sends 100 MB without one)."""
    roots = roots or door.identity("a").roots
    credentials = grpc.ssl_channel_credentials(roots, key, certificate)
    named = [("grpc.ssl_target_name_override", host_name("a")), ("grpc.use_local_subchannel_pool", 1)]
    async with aio.secure_channel(f"127.0.0.1:{door.transports['a'].port}", credentials, options=named) as channel:
        metadata = ((NONCE_KEY, bytes(32)),)
        call = channel.stream_stream(f"/{SERVICE}/{'Session' if session else 'Send'}")(metadata=metadata, timeout=3)
        answering = asyncio.ensure_future(call.read())
        try:
            for piece in [] if session else [struct.pack(">Q", 1 << 30) + b"header"] + [bytes(1 << 20)] * 100:
                await call.write(piece)
        except (aio.AioRpcError, asyncio.InvalidStateError):
            pass
        try:
            answer = await answering
        except aio.AioRpcError as error:
            return error.code().name if session else getattr(failure(error), "reason", CUT_OFF)
        if session:
            return "answered"
        return read_refusal(answer).reason if isinstance(answer, bytes) else (await call.code()).name


def test_whoever_cannot_pass_tls_never_gets_to_a_call(door, federation, tmp_path):
    new_authority(tmp_path / "other", "other")
    new_identity(tmp_path / "b", "b")
    enrol(tmp_path / "other", tmp_path / "b")
    foreign = load_identity(tmp_path / "b")
    own = door.identity("b")
    public = read_key(federation / "b/key.pem").public_key()
    past = datetime.now(UTC) - timedelta(days=40)
    expired = issue(federation / "authority", public, "b", timedelta(days=30), past)

    async def scenario(rig):
        await rig.open(tmp_path)
        knocks = [knock(rig), knock(rig, foreign.key, foreign.certificate), knock(rig, own.key, expired)]
        assert await asyncio.gather(*knocks) == ["UNAVAILABLE"] * 3
        with socket.create_connection(("127.0.0.1", rig.transports["a"].port)) as plain:
            plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            await rig.until(lambda: len(rig.reasons()) >= 4)
        await asyncio.sleep(0.3)
        assert rig.reasons() == [("unknown", "tls-failed", "here")] * len(rig.reasons())
        assert all(
            kind == "refused" and "tls-failed, here" in text for kind, _, text in rig.told["a"] if kind != "down"
        )
        assert rig.boxes["a"].asked == 0
        assert await knock(rig, own.key, own.certificate) == "answered"

    door.run(scenario)


@pytest.mark.parametrize("session", [True, False])
def test_a_valid_certificate_that_is_not_on_the_list_is_refused_by_name(door, federation, tmp_path, session):
    new_identity(tmp_path / "d", "d")
    enrol(federation / "authority", tmp_path / "d")
    stranger = load_identity(tmp_path / "d")

    async def scenario(rig):
        await rig.open(tmp_path)
        answer = await knock(rig, stranger.key, stranger.certificate, session=session)
        assert answer in (["PERMISSION_DENIED"] if session else ["not-a-member", CUT_OFF])
        assert rig.reasons() == [("unknown", "not-a-member", "here")] and rig.boxes["a"].asked == 0
        await rig.until(
            lambda: ("refused", f"unknown {stranger.fingerprint[:16]}") in [told[:2] for told in rig.told["a"]]
        )

    door.run(scenario)


@asynccontextmanager
async def channel_to_a(door, who):
    """A connection of its own to a's port, by ``who``."""
    credentials = grpc.ssl_channel_credentials(who.roots, who.key, who.certificate)
    named = [("grpc.ssl_target_name_override", host_name("a")), ("grpc.use_local_subchannel_pool", 1)]
    async with aio.secure_channel(f"127.0.0.1:{door.transports['a'].port}", credentials, options=named) as channel:
        yield lambda name, *metadata: channel.stream_stream(f"/{SERVICE}/{name}")(metadata=metadata, timeout=20)


async def ended(call):
    """Why a call ended to which nothing was written."""
    try:
        answer = await call.read()
    except aio.AioRpcError as error:
        return getattr(failure(error), "reason", str(error))
    return read_refusal(answer).reason


async def proved(session):
    """The token of a session that opens."""
    answer = await session.read()
    assert isinstance(answer, bytes)
    return answer[:TOKEN]


def test_refused_strangers_hold_no_room(federation, tmp_path):
    """Whoever is not on the list and neither writes on nor hangs up is cut off at once, not after the handshake."""
    new_identity(tmp_path / "d", "d")
    enrol(federation / "authority", tmp_path / "d")
    stranger = load_identity(tmp_path / "d")
    patient = Door(federation)
    patient.timing = Timing(beat=0.1, handshake=1000)

    async def scenario(rig):
        await rig.open(tmp_path)
        async with channel_to_a(rig, stranger) as call:
            async with asyncio.timeout(600):
                calls = [call(name) for name in ("Send", "Take", "Session")]
                assert [await ended(each) for each in calls] == ["not-a-member"] * 3
                assert [await each.code() for each in calls] == [grpc.StatusCode.PERMISSION_DENIED] * 3

    patient.run(scenario)


def test_one_member_has_its_share_of_calls_and_no_more(federation, tmp_path):
    patient = Door(federation)
    patient.timing = Timing(beat=0.1, handshake=1000)

    async def scenario(rig):
        await rig.open(tmp_path)
        listener = rig.transports["a"]._listener
        async with channel_to_a(rig, rig.identity("b")) as one, channel_to_a(rig, rig.identity("b")) as other:
            held = [call("Send") for call in (one, other) for _ in range(CALLS // 2)]
            await rig.until(lambda: sum(listener._calls.values()) == CALLS)
            assert await ended(one("Session", (NONCE_KEY, bytes(32)))) == "too-many"
            assert ("unknown", "too-many", "here") in rig.reasons()
            async with channel_to_a(rig, rig.identity("c")) as another:  # takes nothing of its share
                assert await proved(another("Session", (NONCE_KEY, bytes(32))))
            for call in held:
                call.cancel()
            await rig.until(lambda: not listener._calls)
            assert await proved(one("Session", (NONCE_KEY, bytes(32))))

    patient.run(scenario)


def test_a_session_belongs_to_one_connection(federation, tmp_path):
    patient = Door(federation)
    patient.timing = Timing(beat=10)

    async def scenario(rig):
        await rig.open(tmp_path)
        own = rig.identity("b")
        async with channel_to_a(rig, own) as call, channel_to_a(rig, own) as elsewhere:
            session = call("Session", (NONCE_KEY, bytes(32)))
            token = await proved(session)
            await session.write(BEAT)
            await rig.until(lambda: rig.edge("a", "b"))
            assert await ended(elsewhere("Send", (TOKEN_KEY, token))) == "no-session"
            sending = call("Send", (TOKEN_KEY, token))
            await sending.write(bytes(8) + b"header")
            assert await sending.read() == ACCEPTED

    patient.run(scenario)


def test_a_stranger_with_a_list_of_its_own_learns_that_it_is_refused(door, federation, tmp_path):
    new_identity(tmp_path / "d", "d")
    enrol(federation / "authority", tmp_path / "d")
    stranger = load_identity(tmp_path / "d")
    forged = add_member(door.members, "d", stranger.fingerprint)

    async def scenario(rig):
        await rig.open(tmp_path)
        rig.transports["d"] = GrpcTransport(stranger, Roster("d", stranger.fingerprint, forged), timing=rig.timing)
        rig.told["d"] = []
        await rig.transports["d"].start(Box())
        rig._listening.append(asyncio.ensure_future(rig._listen(rig.transports["d"], rig.told["d"])))
        await rig.until(lambda: any("not-a-member, there" in text for _, _, text in rig.told["d"]))
        with pytest.raises(PeerDown):
            await rig.transports["d"].send("a", b"h", b"x", deadline=1)
        assert ("unknown", "not-a-member", "here") in rig.reasons() and rig.boxes["a"].asked == 0

    door.run(scenario)


def test_a_member_that_was_removed_is_refused_on_its_next_call(door, tmp_path):
    async def scenario(rig):
        await rig.open(tmp_path)
        await rig.start("c")
        await rig.until(lambda: rig.edge("c", "a") and rig.edge("a", "c"))
        shorter = msgspec.structs.replace(remove_member(rig.members, "c"), version=2)
        rig.rosters["a"].replace(shorter)  # without closing its session: the next call must find out by itself
        with pytest.raises((Refused, PeerDown)):  # cut off at once, whether it is still writing or not
            await rig.transports["c"].send("a", b"h", b"x", deadline=2)
        assert rig.boxes["a"].asked == 0 and ("unknown", "not-a-member", "here") in rig.reasons()
        await rig.transports["a"].update(shorter)  # it dials again, and is told why not
        await rig.until(lambda: any("not-a-member, there" in text for _, _, text in rig.told["c"]))

    door.run(scenario)


def test_nobody_is_admitted_by_a_list_that_expired(door, tmp_path):
    async def scenario(rig):
        await rig.open(tmp_path)
        await rig.start("c")
        await rig.until(lambda: rig.edge("c", "a") and rig.edge("a", "c"))
        rig.rosters["a"].clock = lambda: datetime.now(UTC) + timedelta(days=31)
        rig.members_expired = rig.rosters["a"].members.expires
        with pytest.raises(Refused, match="certificate-expired|list-expired"):
            await rig.transports["c"].send("a", b"h", b"x", deadline=2)
        with pytest.raises(Refused, match="list-expired"):
            await rig.transports["a"].send("c", b"h", b"x", deadline=2)
        assert rig.boxes["a"].asked == 0 and rig.boxes["c"].got == []

    door.run(scenario)


@pytest.mark.slow
def test_the_session_with_a_dialled_site_ends_with_its_certificate(federation, tmp_path):
    for name in ("key.pem", "site.json", "trust.pem"):
        write_over(tmp_path / "b" / name, (federation / "b" / name).read_bytes(), 0o600)
    public, begun = read_key(tmp_path / "b/key.pem").public_key(), datetime.now(UTC) - timedelta(days=1)
    short = issue(federation / "authority", public, "b", timedelta(days=1, seconds=6), begun)
    write_over(tmp_path / "b/certificate.pem", short)

    async def scenario(rig):
        rig.folder = tmp_path
        await rig.start("b")
        rig.folder = federation
        await rig.start("a")
        await rig.until(lambda: rig.edge("a", "b"))
        await rig.transports["a"].send("b", b"h", b"x", deadline=2)
        await rig.until(lambda: not rig.edge("a", "b"))
        assert datetime.now(UTC) >= begun + timedelta(days=1, seconds=5)
        assert any("its certificate expired on" in text for _, _, text in rig.told["a"])
        await asyncio.sleep(0.5)
        assert not rig.edge("a", "b")  # TLS does not take it any more
        await rig.transports["b"].renew(rig.identity("b"))
        await rig.until(lambda: rig.edge("a", "b"))

    GrpcRig(federation).run(scenario)


def test_a_session_never_opens_with_a_certificate_that_expired(federation):
    async def scenario(rig):
        rig.prepare()
        await rig.start("b")
        make = rig.make

        def later(site):
            transport = make(site)
            rig.rosters[site].clock = lambda: datetime.now(UTC) + timedelta(days=31)
            rig.rosters[site].members = msgspec.structs.replace(rig.members, expires=datetime.max.replace(tzinfo=UTC))
            return transport

        rig.make = later
        await rig.start("a")
        await rig.until(lambda: any("its certificate expired on" in text for _, _, text in rig.told["a"]))
        assert not rig.edge("a", "b")

    GrpcRig(federation).run(scenario)


def test_only_the_list_expired(door, tmp_path):
    async def scenario(rig):
        await rig.open(tmp_path)
        own = rig.identity("b")
        rig.rosters["a"].members = msgspec.structs.replace(rig.members, expires=datetime.now(UTC))
        assert await knock(rig, own.key, own.certificate, session=False) == "list-expired"
        assert set(rig.reasons()) == {("unknown", "list-expired", "here"), ("b", "list-expired", "here")}
        assert rig.boxes["a"].asked == 0

    door.run(scenario)


def test_a_member_sends_nothing_outside_its_session(door, tmp_path):
    async def scenario(rig):
        await rig.open(tmp_path)
        own = rig.identity("b")
        assert await knock(rig, own.key, own.certificate, session=False) == "no-session"
        assert rig.reasons() == [("b", "no-session", "here")] and rig.boxes["a"].asked == 0

    door.run(scenario)


def test_a_member_that_claims_another_name_is_refused(door, tmp_path):
    expected = Expected("run", "", "")

    async def scenario(rig):
        await rig.open(tmp_path)
        await rig.start("c")
        await rig.until(lambda: rig.edge("c", "a"))

        def admit(peer, header):
            expected.check(read_header(header), peer)
            return 1 << 20

        rig.boxes["a"].admit = admit
        for name, reason in (("b", "wrong-sender"), ("c", None)):
            header, body = pack(Header(run="run", kind="hello", sender=name), {})
            if reason is None:
                await rig.transports["c"].send("a", header, body, deadline=2)
                continue
            with pytest.raises(Refused, match=reason):
                await rig.transports["c"].send("a", header, body, deadline=2)
        assert rig.reasons() == [("c", "wrong-sender", "here")]
        assert [peer for peer, _, _ in rig.boxes["a"].got] == ["c"]

    door.run(scenario)


def test_an_old_key_of_a_site_cannot_answer_for_it(federation, tmp_path):
    """b's former key with a certificate that is still valid, at b's address: the dialler asks for a proof."""
    new_identity(tmp_path / "b", "b")
    enrol(federation / "authority", tmp_path / "b")
    former = load_identity(tmp_path / "b")

    async def scenario(rig):
        listed = [
            msgspec.structs.replace(member, fingerprint=former.fingerprint) if member.site == "b" else member
            for member in rig.members.members
        ]
        believed = msgspec.structs.replace(rig.members, members=listed)
        rig.transports["b"] = GrpcTransport(former, Roster("b", former.fingerprint, believed), timing=rig.timing)
        rig.boxes["b"], rig.told["b"] = Untouched(), []
        await rig.transports["b"].start(rig.boxes["b"])
        rig._listening.append(asyncio.ensure_future(rig._listen(rig.transports["b"], rig.told["b"])))
        await rig.open(tmp_path)
        await rig.until(lambda: any("wrong-proof, here" in text for _, _, text in rig.told["a"]))
        await rig.until(lambda: any("wrong-proof, there" in text for _, _, text in rig.told["b"]))
        with pytest.raises(PeerDown):
            await rig.transports["a"].send("b", b"h", b"x", deadline=1)
        assert rig.boxes["b"].asked == 0 and ("b", "wrong-proof", "here") in rig.reasons()

    Door(federation).run(scenario)


def http2_call(path):
    """The bytes of an HTTP/2 client's first call, headers written out literally."""

    def frame(kind, flags, stream, payload):
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    fields = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", host_name("a"))]
    fields += [("te", "trailers"), ("content-type", "application/grpc")]
    packed = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields
    )
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, packed)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_before_1_3_is_refused(door, federation, tmp_path, version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(federation / "b/trust.pem")
    context.load_cert_chain(federation / "b/certificate.pem", federation / "b/key.pem")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version

    def call(port):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            with context.wrap_socket(raw, server_hostname=host_name("a")) as channel:
                channel.sendall(http2_call(f"/{SERVICE}/Send"))
                while channel.recv(4096):
                    if b"refusal-bin" in channel.recv(4096):
                        return

    async def scenario(rig):
        await rig.open(tmp_path)
        calling = asyncio.ensure_future(asyncio.to_thread(call, rig.transports["a"].port))
        await rig.until(lambda: rig.reasons())
        assert rig.reasons()[0][1] == ("old-tls" if version == ssl.TLSVersion.TLSv1_2 else "no-session")
        assert rig.boxes["a"].asked == 0
        await rig.transports["a"].close()
        await calling

    door.run(scenario)


def test_a_peer_dials_and_admits_its_neighbours_in_the_run_alone(federation):
    async def scenario(rig):
        make = rig.make

        def kept(site):
            transport = make(site)
            rig.rosters[site].keep_to({"a": ["b"], "b": ["a", "c"], "c": ["a", "b"]}[site])
            return transport

        rig.make = kept
        await rig.start("a", "b", "c")
        await rig.until(lambda: rig.edge("a", "b") and rig.edge("c", "b"))
        await rig.until(lambda: any("not-a-neighbour, there" in text for _, who, text in rig.told["c"] if who == "a"))
        assert not rig.edge("a", "c")
        with pytest.raises(Refused, match="not-a-neighbour"):
            await rig.transports["a"].send("c", b"h", b"x", deadline=2)
        rig.rosters["c"].keep_to(["b"])
        assert rig.rosters["c"].others() == ["b"]

    GrpcRig(federation).run(scenario)


def test_a_port_that_is_taken_is_one_clear_message(door, tmp_path):
    from peerlora.network.base import TransportError

    async def scenario(rig):
        await rig.open(tmp_path)
        second = rig.make("a")
        with pytest.raises(TransportError, match="cannot listen at .*port free"):
            await second.start(Box())
        await second.close()

    door.run(scenario)


def test_a_renewed_certificate_is_used_without_a_restart(federation, tmp_path):
    async def scenario(rig):
        await rig.all_up()
        for site in ("a", "b"):
            before = rig.identity(site)
            folder = tmp_path / site
            for name in ("key.pem", "site.json", "trust.pem"):
                write_over(folder / name, (federation / site / name).read_bytes(), 0o600)
            public = read_key(folder / "key.pem").public_key()
            write_over(folder / "certificate.pem", issue(federation / "authority", public, site, timedelta(days=80)))
            renewed = load_identity(folder)
            assert renewed.expires > before.expires
            told = len(rig.told["c"])
            await rig.transports[site].renew(renewed)
            assert rig.transports[site].identity is renewed and len(rig.told["c"]) >= told
        await rig.until(lambda: all(rig.edge(x, y) for x, y in (("a", "b"), ("b", "a"), ("c", "a"), ("c", "b"))))
        for source, target in (("a", "b"), ("b", "a"), ("c", "a"), ("c", "b")):
            await rig.transports[source].send(target, b"h", b"x", deadline=5)

    GrpcRig(federation).run(scenario)


def test_site_b_listens_elsewhere(federation):
    """``listen`` overrules the port of the own address, as behind a port that a firewall forwards."""
    port = free_port()

    async def scenario(rig):
        transport = rig.make("b", listen=f"127.0.0.1:{port}")
        await transport.start(Box())
        assert transport.port == port
        await transport.close()

    GrpcRig(federation).run(scenario)
