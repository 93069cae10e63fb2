"""Relayed adapters that no honest peer sends: each is refused by name, costs itself alone, and is never deployed."""

import json
import struct
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from in_memory import exchanges, names, sites_signatures, together

from cases import others_slow
from peerlora.config.exchange import RelayConfig
from peerlora.config.sections import PathGraph
from peerlora.exchange.entry_pool import Entry
from peerlora.exchange.relay import RelayCaches
from peerlora.exchange.schema import encoded_bytes
from peerlora.lora.adapters import Adapters, AdapterSpec, LayerSpec
from peerlora.network.base import Refused
from peerlora.network.identity.authority import sign_request
from peerlora.network.identity.identity import request
from peerlora.network.identity.key_files import write_over
from peerlora.network.identity.members import add_member, remove_member
from peerlora.network.protocol.peer_relay import PeerRelay
from peerlora.network.protocol.relay_messages import ReceivedEntries, RelayFormat, SignedEntry, entry_vectors
from peerlora.network.protocol.wire import Expected, Header, encode_body, message_facts, with_checksum
from peerlora.network.transport.audit_log import AuditLog
from peerlora.topology.schedule import build_topology

SPEC = AdapterSpec((LayerSpec("q", 5, 6), LayerSpec("v", 4, 3)), rank=2, alpha=4.0, head=(("out.weight", (3, 2)),))
CLIENTS, ROUND, SITES = 5, 6, names(5)
EXPECTED = Expected("run", "ba5e", "5bec")
SENDER, ORIGIN, OTHER, ME = 1, 0, 3, 2
HELD = np.array([3, 7, 7, 2, 0])
"""What ME said that it holds in round 6; it has met SENDER."""


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    return sites_signatures(tmp_path_factory.mktemp("relay"), list(SITES.values()))


def entry(origin, version, rank=2, rows=10):
    values = torch.randn(SPEC.parameters, generator=torch.Generator().manual_seed(max(0, 100 * origin + version)))
    return Entry(origin, version, rank, rows, values)


def form(signed, client, expected=EXPECTED, sites=SITES, most=CLIENTS):
    return RelayFormat(expected, CLIENTS, most, sites, signed and signed[SITES[client]])


class Forger:
    """What a malicious SENDER can do: it holds its own key, and every entry that honest sites signed."""

    def __init__(self, signed):
        self.signed = signed

    def of(self, origin, version, expected=EXPECTED, **changes):
        """An entry as its origin signed it."""
        made = replace(entry(origin, version), **changes)
        return SignedEntry(made, form(self.signed, origin, expected).sign(made, SPEC))


def flipped(values):
    other = values.clone()
    other.view(torch.int32)[17] ^= 1
    return other


def relabelled(signed, **changes):
    """An entry with its old signature."""
    return SignedEntry(replace(signed.entry, **changes), signed.signature)


def filled(value):
    values = entry(ORIGIN, 5).values.clone()
    values[3] = value
    return values


POISON = {
    "a bit of a tensor flipped": (lambda f: relabelled(f.of(ORIGIN, 5), values=flipped(f.of(ORIGIN, 5).entry.values)),
                                  "bad-signature"),
    "a signature of another run": (lambda f: f.of(ORIGIN, 5, expected=replace(EXPECTED, run="other")), "bad-signature"),
    "of another base model": (lambda f: f.of(ORIGIN, 5, expected=replace(EXPECTED, base="0bad")), "bad-signature"),
    "of another layout": (lambda f: f.of(ORIGIN, 5, expected=replace(EXPECTED, spec="0bad")), "bad-signature"),
    "of another round": (lambda f: relabelled(f.of(ORIGIN, 4), version=5), "bad-signature"),
    "an old version as a new one": (lambda f: relabelled(f.of(ORIGIN, 2), version=6), "bad-signature"),
    "another origin": (lambda f: relabelled(f.of(OTHER, 5), origin=ORIGIN), "bad-signature"),
    "the sender's own adapter as another's": (lambda f: relabelled(f.of(SENDER, 5), origin=ORIGIN), "bad-signature"),
    "more rows than its origin has": (lambda f: relabelled(f.of(ORIGIN, 5), rows=1000), "bad-signature"),
    "no rows": (lambda f: f.of(ORIGIN, 5, rows=0), "bad-header"),
    "rows beyond all bounds": (lambda f: f.of(ORIGIN, 5, rows=2**40), "bad-header"),
    "no signature": (lambda f: SignedEntry(entry(ORIGIN, 5), bytes(97)), "bad-signature"),
    "a signature of no site": (lambda f: SignedEntry(entry(ORIGIN, 5), b"\x02" + b"\xff" * 96), "bad-signature"),
    "a replay of the version that is held": (lambda f: f.of(ORIGIN, 3), "stale-version"),
    "a replay of an old version": (lambda f: f.of(ORIGIN, 1), "stale-version"),
    "version 0": (lambda f: f.of(ORIGIN, 0), "stale-version"),
    "a version below 0": (lambda f: f.of(ORIGIN, -5), "stale-version"),
    "a version of this round": (lambda f: f.of(ORIGIN, ROUND + 1), "from-the-future"),
    "a version of the future": (lambda f: f.of(ORIGIN, 2**60), "from-the-future"),
    "an adapter of the receiver": (lambda f: f.of(ME, 6), "stale-version"),
    "an adapter of the sender": (lambda f: f.of(SENDER, 6), "stale-version"),
    "not a number, signed by its origin": (lambda f: f.of(ORIGIN, 5, values=filled(float("nan"))), "not-finite"),
    "infinite, signed by its origin": (lambda f: f.of(ORIGIN, 5, values=filled(-float("inf"))), "not-finite"),
    "huge, signed by its origin": (lambda f: f.of(ORIGIN, 5, values=filled(1e19)), "out-of-range"),
    "not a number, and not signed": (lambda f: relabelled(f.of(ORIGIN, 5), values=filled(float("nan"))),
                                     "bad-signature"),
    "a client that the run has not": (lambda f: relabelled(f.of(ORIGIN, 5), origin=CLIENTS), "unknown-origin"),
    "a client number below 0": (lambda f: relabelled(f.of(ORIGIN, 5), origin=-1), "unknown-origin"),
    "the largest client number": (lambda f: relabelled(f.of(ORIGIN, 5), origin=2**62), "unknown-origin"),
}  # fmt: skip


def decoded(receiver, body, kind="relay"):
    header = with_checksum(Header(run="run", kind=kind, sender=SITES[SENDER]), body)
    return receiver.decode_entries(ROUND, HELD, entry(ME, ROUND + 1), SPEC, header, bytearray(body))


@pytest.mark.parametrize("what", POISON)
def test_a_poisoned_entry_is_refused_by_name_and_the_others_of_its_message_are_used(signed, what):
    poison, reason = POISON[what]
    forger, sender = Forger(signed), form(signed, SENDER)
    good = [forger.of(OTHER, 5), forger.of(4, 6)]
    found = decoded(form(signed, ME), sender.encode_entries([good[0], poison(forger), good[1]], SPEC).body)
    assert [refusal.reason for refusal in found.refused] == [reason]
    assert [each.signature for each in found.good] == [each.signature for each in good]
    for got, sent in zip(found.good, good, strict=True):
        assert torch.equal(got.entry.values, sent.entry.values)
        assert (got.entry.origin, got.entry.version, got.entry.rank, got.entry.rows) == (
            sent.entry.origin, sent.entry.version, sent.entry.rank, sent.entry.rows)  # fmt: skip
    told = found.refused[0].detail
    assert f"client {poison(forger).entry.origin} " in told and f"version {poison(forger).entry.version}" in told


@pytest.mark.parametrize(("max_age", "taken"), [(None, [1, 4]), (2, [4]), (1, [])])
def test_an_entry_beyond_the_largest_age_is_refused(signed, max_age, taken):
    """In round 5 an entry of version 4 has age 2: beyond what an honest neighbour keeps, where max_age is less."""
    relay = PeerRelay(RelayCaches(RelayConfig(max_age=max_age), SPEC, {ME: 10}, CLIENTS), form(signed, ME), print)
    x = Adapters(SPEC, torch.randn(1, SPEC.parameters), torch.tensor([2]))
    relay.sign(5, x)
    relay.begin(5, x, x, {})
    sent = [Forger(signed).of(ORIGIN, 1), Forger(signed).of(OTHER, 4)]
    body = form(signed, SENDER).encode_entries(sent, SPEC).body
    header = with_checksum(Header(run="run", kind="relay", sender=SITES[SENDER]), body)
    _, found = relay.decode_entries()(header, bytearray(body))
    assert [each.entry.version for each in found.good] == taken
    assert [each.reason for each in found.refused] == ["stale-version"] * (2 - len(taken))


def test_a_second_entry_of_an_origin_is_refused(signed):
    forger = Forger(signed)
    body = form(signed, SENDER).encode_entries([forger.of(ORIGIN, 5), forger.of(ORIGIN, 6)], SPEC).body
    found = decoded(form(signed, ME), body)
    assert [each.entry.version for each in found.good] == [5]
    assert [each.reason for each in found.refused] == ["stale-version"]


def test_a_site_that_left_the_list_is_no_origin(signed):
    body = form(signed, SENDER).encode_entries([Forger(signed).of(ORIGIN, 5)], SPEC).body
    remaining = {client: site for client, site in SITES.items() if client != ORIGIN}
    found = decoded(form(signed, ME, sites=remaining), body)
    assert not found.good and [each.reason for each in found.refused] == ["unknown-origin"]


def test_a_smaller_rank_is_an_origins_own_affair(signed):
    x = entry(ORIGIN, 5)
    small = entry_vectors(replace(x, rank=1), SPEC)
    padded = torch.zeros(1, SPEC.parameters)
    for slot in SPEC.slots:
        part = small[f"{slot.block}:{slot.name}"]
        SPEC.view(slot, padded)[0][tuple(slice(size) for size in part.shape)] = part
    sent = Forger(signed).of(ORIGIN, 5, rank=1, values=padded[0])
    (got,) = decoded(form(signed, ME), form(signed, SENDER).encode_entries([sent], SPEC).body).good
    assert got.entry.rank == 1 and torch.equal(got.entry.values, padded[0])
    wrong = relabelled(sent, rank=2)  # the same numbers, but more of them on the wire
    (refused,) = decoded(form(signed, ME), form(signed, SENDER).encode_entries([wrong], SPEC).body).refused
    assert refused.reason == "bad-signature"


def vectors_of(**changes):
    return {**entry_vectors(entry(ORIGIN, 5), SPEC), **changes}


SHAPES = {
    "a larger rank": (vectors_of(**{"A:q": torch.zeros(3, 5)}), "bad-body"),
    "rank 0": (vectors_of(**{"A:q": torch.zeros(0, 5)}), "bad-body"),
    "another shape": (vectors_of(**{"B:v": torch.zeros(2, 2)}), "bad-body"),
    "another dtype": (vectors_of(**{"B:v": torch.zeros(3, 2, dtype=torch.float64)}), "bad-body"),
    "a vector less": ({"A:q": torch.zeros(2, 5)}, "bad-body"),
    "a vector more": (vectors_of(x=torch.zeros(1)), "unknown-vector"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_an_entry_of_another_shape_costs_itself(signed, what):
    vectors, reason = SHAPES[what]
    forger = Forger(signed)
    sent = [forger.of(ORIGIN, 5), forger.of(OTHER, 5)]
    parts = parts_of(signed, sent)
    parts[1] = encode_body(vectors)
    found = decoded(form(signed, ME), b"".join(parts))
    assert [each.reason for each in found.refused] == [reason] and [each.entry.origin for each in found.good] == [OTHER]


def parts_of(signed, sent):
    """The files of a message: the table, then each entry."""
    entries = [encode_body(entry_vectors(each.entry, SPEC)) for each in sent]
    whole = form(signed, SENDER).encode_entries(sent, SPEC).body
    return [whole[: len(whole) - sum(map(len, entries))], *entries]


def claiming(size, end):
    """A safetensors file that says it holds one vector of this size."""
    head = b'{"A:q":{"dtype":"F32","shape":[%d,5],"data_offsets":[0,%d]}}' % (size, end)
    return struct.pack("<Q", len(head) + -len(head) % 8) + head + b" " * (-len(head) % 8)


WHOLE = {
    "nothing": (lambda p: b"", "bad-body"),
    "no table": (lambda p: b"".join(p[1:]), "unknown-vector"),
    "the table alone": (lambda p: p[0], "bad-body"),
    "an entry less": (lambda p: p[0] + p[1], "bad-body"),
    "an entry more": (lambda p: b"".join(p) + p[1], "bad-body"),
    "more entries than there are clients": (lambda p: b"".join(p) + p[1] * CLIENTS, "oversize"),
    "half an entry": (lambda p: b"".join(p)[:-40], "bad-body"),
    "bytes after the last": (lambda p: b"".join(p) + b"junk", "bad-body"),
    "no safetensors": (lambda p: p[0] + b"\xff" * len(p[1]) + p[2], "bad-body"),
    "a vector that claims a petabyte": (lambda p: p[0] + claiming(2**47, 2**50) + p[2], "bad-body"),
    "a header that claims a petabyte": (lambda p: p[0] + struct.pack("<Q", 2**50) + p[1][8:] + p[2], "bad-body"),
    "offsets before the start": (lambda p: p[0] + claiming(1, -1) + p[2], "bad-body"),
    "a table without rows": (
        lambda p: encode_body({"entries": torch.tensor(1), "signatures": torch.zeros(2, 97, dtype=torch.uint8)}) + p[1],
        "bad-body",
    ),
    "a table of a billion rows": (lambda p: p[0].replace(b'"shape":[2,3]', b'"shape":[9,3]') + p[1] + p[2], "bad-body"),
}


@pytest.mark.parametrize("what", WHOLE)
def test_a_message_that_cannot_be_taken_apart_is_refused_whole(signed, what):
    build, reason = WHOLE[what]
    forger = Forger(signed)
    body = build(parts_of(signed, [forger.of(ORIGIN, 5), forger.of(OTHER, 5)]))
    with pytest.raises(Refused) as refused:
        decoded(form(signed, ME), body)
    assert refused.value.reason == reason


def test_every_flipped_bit_of_a_message_costs_its_entry_or_the_message(signed):
    """The checksum of a header is the sender's own, so it can be right over anything."""
    sent = [Forger(signed).of(ORIGIN, 5)]
    body = form(signed, SENDER).encode_entries(sent, SPEC).body
    receiver, generator = form(signed, ME), np.random.default_rng(0)
    taken = 0
    for place in generator.choice(8 * len(body), 300, replace=False).tolist():
        other = bytearray(body)
        other[place // 8] ^= 1 << place % 8
        try:
            taken += len(decoded(receiver, bytes(other)).good)
        except Refused:
            continue
    assert taken == 0


VERSIONS = {
    "a version of the future": (torch.tensor([0, 0, 0, 0, ROUND + 2]), "from-the-future"),
    "the largest number": (torch.tensor([0, 0, 0, 0, 2**63 - 1]), "from-the-future"),
    "a version below 0": (torch.tensor([0, -1, 0, 0, 0]), "bad-body"),
    "of fewer clients": (torch.tensor([0, 0]), "bad-body"),
    "of more clients": (torch.zeros(6, dtype=torch.int64), "oversize"),
    "fractions": (torch.zeros(5, dtype=torch.float64), "bad-body"),
}


@pytest.mark.parametrize("what", VERSIONS)
def test_impossible_versions_are_refused(signed, what):
    versions, reason = VERSIONS[what]
    body = encode_body({"versions": versions})
    body = body + bytes(1 << 10) if reason == "oversize" else body
    header = with_checksum(Header(run="run", kind="relay", sender=SITES[SENDER]), body)
    with pytest.raises(Refused) as refused:
        form(signed, ME).decode_versions(ROUND, header, bytearray(body))
    assert refused.value.reason == reason


def test_the_bound_holds_the_largest_message_and_little_more(signed):
    start = Adapters(SPEC, torch.zeros(1, SPEC.parameters), torch.tensor([2]))
    for each in (signed, None):
        receiver = form(each, ME)
        sent = [SignedEntry(entry(origin, 5), bytes(97 if each else 0)) for origin in range(CLIENTS)]
        body = receiver.encode_entries(sent, SPEC).body
        assert len(body) <= receiver.largest(start) <= 1.5 * len(body) + 4096
        assert encoded_bytes({"versions": ((CLIENTS,), torch.int64)}) <= receiver.largest(start)


def test_no_message_has_more_entries_than_a_client_keeps(signed):
    start = Adapters(SPEC, torch.zeros(1, SPEC.parameters), torch.tensor([2]))
    sent = [Forger(signed).of(origin, 6) for origin in (ORIGIN, OTHER)]
    receiver, body = form(signed, ME, most=1), form(signed, SENDER).encode_entries(sent, SPEC).body
    assert receiver.largest(start) < len(body) + 512 < form(signed, ME, most=3).largest(start)
    with pytest.raises(Refused) as refused:
        decoded(receiver, body)
    assert refused.value.reason in ("oversize", "bad-body")
    assert len(decoded(receiver, form(signed, SENDER).encode_entries(sent[:1], SPEC).body).good) == 1


MIXED = {
    "no signature": ({"rows": 10}, "bad-signature"),
    "not hexadecimal": ({"rows": 10, "signed": "x" * 194}, "bad-signature"),
    "a number": ({"rows": 10, "signed": 7}, "bad-signature"),
    "another's": ({"rows": 10, "signed": "02" * 97}, "bad-signature"),
    "no rows": ({}, "bad-header"),
    "rows in words": ({"rows": "many"}, "bad-header"),
}


@pytest.mark.parametrize("what", MIXED)
def test_a_mixed_message_without_a_good_signature_is_mixed_and_no_entry(signed, what):
    """The mixing has its own check of who sent what; only the entry is refused, which could not be passed on."""
    facts, reason = MIXED[what]
    refused = []
    relay = PeerRelay(
        RelayCaches(RelayConfig(), SPEC, {ME: 10}, CLIENTS),
        form(signed, ME),
        lambda header, refusal: refused.append((header.sender, refusal.reason)),
    )
    x = Adapters(SPEC, torch.randn(2, SPEC.parameters), torch.tensor([2, 2]))
    relay.sign(ROUND, x.rows([1]))
    relay.noting(lambda header, body: None)(Header(run="run", kind="mix", sender=SITES[SENDER], facts=facts), b"")
    relay.begin(ROUND, x.rows([1]), x, {SENDER: SITES[SENDER]})
    assert refused == [(SITES[SENDER], reason)]
    assert relay.cache.versions.tolist() == [0, 0, ROUND + 1, 0, 0]


def test_what_others_could_not_verify_any_more_is_kept_and_not_passed_on(tmp_path):
    """The list names another key for ORIGIN now, and later not even the site; a renewed certificate changes nothing."""
    signed = sites_signatures(tmp_path, list(SITES.values()))
    relay = PeerRelay(RelayCaches(RelayConfig(), SPEC, {SENDER: 10}, CLIENTS), form(signed, SENDER), print)
    forger, x = Forger(signed), Adapters(SPEC, torch.randn(1, SPEC.parameters), torch.tensor([2]))
    relay.sign(4, x)
    relay.begin(4, x, x, {})
    received = [forger.of(ORIGIN, 4), forger.of(OTHER, 4)]
    relay.end({ORIGIN: (Header(run="run", kind="relay", sender=SITES[ORIGIN]), ReceivedEntries(received, []))})

    def passed_on():
        relay.sign(5, x)
        relay.begin(5, x, x, {})
        message, count = relay.entries_for(np.zeros(CLIENTS, dtype=np.int64))
        relay.end({})
        header = with_checksum(Header(run="run", kind="relay", sender=SITES[SENDER]), message.body)
        reader = replace(form(signed, ME), sites=SITES)
        found = reader.decode_entries(5, np.zeros(CLIENTS), entry(ME, 6), SPEC, header, bytearray(message.body))
        assert not found.refused and count == len(found.good)
        return [each.entry.origin for each in found.good]

    assert passed_on() == [ORIGIN, OTHER]
    _, _, renewed = sign_request(tmp_path / "authority", request(tmp_path / SITES[ORIGIN]), 30)
    write_over(tmp_path / SITES[ORIGIN] / "certificate.pem", renewed)
    assert passed_on() == [ORIGIN, OTHER]
    rosters = [signed[SITES[client]].roster for client in (SENDER, ME)]
    for version, changed in enumerate(
        [lambda listed: add_member(remove_member(listed, SITES[ORIGIN]), SITES[ORIGIN], "ab" * 32),
         lambda listed: remove_member(listed, SITES[ORIGIN])], start=2
    ):  # fmt: skip
        for roster in rosters:
            roster.replace(msgspec.structs.replace(changed(roster.members), version=version))
        assert passed_on() == [OTHER]
    assert relay.cache.versions.tolist() == [4, 6, 0, 4, 0]


# --- whole rounds with a malicious peer in the middle


def give_up_soon(peer, step):
    """Wait a second in this exchange, in which something is lost; in the others a busy machine must lose nothing."""
    protocol, exchange = peer.protocol, peer.protocol.exchange

    def shorter(receivers, message, decode, deadline, *more, **options):
        return exchange(receivers, message, decode, 1.0 if protocol.endpoint.at == step else deadline, *more, **options)

    protocol.exchange = shorter


def rounds_with(signed, tamper, count=4, deadline=20.0, given_up=None, half_used=False, audits=None):
    """Client 1 of the path 0 - 1 - 2 replaces what it passes on; what every client then holds, and was told."""
    topology = build_topology(PathGraph(kind="path"), 3, seed=0)
    xs = [Adapters(SPEC, torch.randn(3, SPEC.parameters, generator=torch.Generator().manual_seed(t)),
                   torch.tensor([2, 2, 2])) for t in range(count)]  # fmt: skip
    with exchanges(topology, deadline, signatures=signed, audits=audits) as peers:
        for i, peer in enumerate(peers):
            peer.relayed = RelayCaches(RelayConfig(), SPEC, {i: 10}, 3)
            if given_up:
                give_up_soon(peer, given_up)
        tamper(peers[1]._relay)

        def one(i):
            told = []
            for t, x in enumerate(xs):
                stats = peers[i].begin(t)
                mixed = peers[i].mix(x.rows([i]))
                peers[i].relay()
                assert not stats.missing
                told.append((peers[i].relayed.versions[0].tolist(), stats.measures.get("relayed_refused"), mixed))
            return told

        found = together([lambda i=i: one(i) for i in range(3)])
        notices = [(each.kind, each.peer, each.detail) for each in peers[2].protocol.endpoint.events.waiting]
        neighbours = [peer.protocol.endpoint.peers for peer in peers]
        assert not any(each.absent or each.mismatched or each.isolated for each in neighbours)
        assert half_used or not any(peer.protocol.endpoint.history.one_sided for peer in peers)
    return found, notices


@pytest.fixture(scope="module")
def honest(signed):
    return rounds_with(signed, lambda relay: None)[0]


def test_honest_peers_know_each_other(honest):
    assert honest[2][-1][0] == [3, 4, 4] and honest[0][-1][0] == [4, 4, 3]


def flip_what_it_passes_on(relay):
    pass_on = relay.cache.entries
    relay.cache.entries = lambda origins: [replace(each, values=flipped(each.values)) for each in pass_on(origins)]


def test_the_audit_log_has_every_refused_entry_under_the_neighbour_that_sent_it(signed, tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, message_facts, peers=list(SITES.values()))
    rounds_with(signed, flip_what_it_passes_on, audits={SITES[2]: audit})
    audit.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    refused = [line for line in lines if line["event"] == "refused"]
    assert [(line["peer"], line["reason"], line["side"]) for line in refused] == [
        (SITES[1], "bad-signature", "here")
    ] * 3
    for t, line in enumerate(refused, start=1):
        assert line["detail"].startswith(f"adapter of client 0 (site-0), version {t}: ")
        assert (line["kind"], line["round"]) == ("relay", t)
    (first, *_) = [line for line in lines if line["event"] == "received" and line.get("kind") == "relay"]
    assert first["peer"] == SITES[1], "the message itself was taken"


def test_a_relay_that_changes_what_it_passes_on_is_named_and_mixed_with_all_the_same(signed, honest):
    found, notices = rounds_with(signed, flip_what_it_passes_on)
    assert found[2][-1][0] == [0, 4, 4] and found[0][-1][0] == [4, 4, 0]
    assert [refused and float(refused) for _, refused, _ in found[2]] == [None, 1.0, 1.0, 1.0]
    assert found[1][-1][0] == [4, 4, 4]
    for client in range(3):
        assert all(torch.equal(x[2].flat, y[2].flat) for x, y in zip(found[client], honest[client], strict=True))
    told = [detail for kind, peer, detail in notices if kind == "refused" and peer == SITES[1]]
    assert told and told[0].startswith("bad-signature, here: adapter of client 0 (site-0), version 1")


def test_a_relay_that_withholds_costs_entries_and_nothing_else(signed, honest):
    def tamper(relay):
        relay.cache.lacking = lambda versions: np.zeros(0, dtype=np.int64)

    found, notices = rounds_with(signed, tamper)
    assert found[2][-1][0] == [0, 4, 4] and all(kind == "up" for kind, *_ in notices)
    assert all(torch.equal(x[2].flat, y[2].flat) for x, y in zip(found[2], honest[2], strict=True))


def test_a_relay_that_replays_an_old_version_takes_nobody_back(signed):
    old = {}

    def tamper(relay):
        pass_on = relay.cache.entries

        def entries(origins):
            now = pass_on(origins)
            for each in now:
                old.setdefault(each.origin, replace(each, values=each.values.clone()))
                relay._signatures[each.origin, 1] = signatures.setdefault(
                    each.origin, relay._signatures[each.origin, each.version]
                )
            return [old[each.origin] for each in now]

        signatures = {}
        relay.cache.entries = entries

    found, notices = rounds_with(signed, tamper)
    assert [versions for versions, _, _ in found[2]] == [[0, 1, 1], [1, 2, 2], [1, 3, 3], [1, 4, 4]]
    told = [detail for kind, _, detail in notices if kind == "refused"]
    assert told and all(detail.startswith("stale-version, here") for detail in told)


LOST = [("message", 1), ("message", 2), ("ack", 1), ("ack", 2)]


@pytest.mark.parametrize(("what", "step"), others_slow(LOST, [1, 2]))
def test_what_is_lost_in_a_swap_comes_later_and_the_mixing_stays(signed, honest, what, step):
    """In round 1 what client 1 sends to client 2 in one of the two exchanges after the mixing is lost."""
    begun = []

    def tamper(relay):
        protocol = relay.on_refusal.__self__.protocol
        exchange = protocol.exchange

        async def losing(*arguments, **options):
            at = protocol.endpoint.at
            begun.append(at)
            if at == (1, step):
                protocol.endpoint.transport.network.lose(SITES[1], SITES[2], what=what)
            return await exchange(*arguments, **options)

        protocol.exchange = losing

    found, _ = rounds_with(signed, tamper, given_up=(1, step), half_used=what == "ack")
    assert begun == [(t, number) for t in range(4) for number in range(3)]
    assert all(torch.equal(x[2].flat, y[2].flat) for x, y in zip(found[2], honest[2], strict=True))
    assert found[2][-1][0] == honest[2][-1][0]
    if what == "message":
        assert found[2][1][0] == [0, 2, 2] and found[2][2][0] == [2, 3, 3]
