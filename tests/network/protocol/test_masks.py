"""Masks: they cancel over a whole sender set, hide everything short of it, and no two sums have the same ones."""

import itertools
from functools import partial

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from peerlora.network.base import Refused
from peerlora.network.identity.agreement import SiteAgreement
from peerlora.network.protocol.link_history import ExchangeStep
from peerlora.network.protocol.masks import keystream, masked, sum_of
from peerlora.network.protocol.sender_sets import SenderSet

SITES = ("a", "b", "c", "d")
STEP = ExchangeStep(3, 1)
NUMBERS = st.integers(-(2**63), 2**63 - 1)


def agreements(sites=SITES, known=None):
    keys = {site: X25519PrivateKey.generate() for site in sites}
    listed = {site: key.public_key().public_bytes_raw().hex() for site, key in keys.items()}
    return {site: SiteAgreement(key, (known or listed).get) for site, key in keys.items()}


def sender_set(agreed, senders, step=STEP, receiver="r"):
    return SenderSet(receiver, step, {site: agreed[site].session_key for site in senders})


def message(agreed, site, chosen, values, run="run"):
    """What a sender sends for a set."""
    keys = {
        other: agreed[site].pair_key(other, key, chosen.context(run))
        for other, key in chosen.keys.items()
        if other != site
    }
    return masked(values, site, keys)


AGREED = agreements()


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=4, max_size=4), st.integers(2, 4))
def test_masks_cancel_in_the_sum_over_a_set(values, senders):
    chosen = sender_set(AGREED, SITES[:senders])
    own = {site: torch.tensor(row) for site, row in zip(SITES, values, strict=True)}
    sent = [message(AGREED, site, chosen, own[site]) for site in chosen.keys]
    assert torch.equal(sum_of(sent, 3), sum_of([own[site] for site in chosen.keys], 3))


@settings(max_examples=30)
@given(st.data())
def test_only_sums_over_sets_that_all_of_their_senders_answered_come_out(data):
    """Whatever sets a receiver gives to whom: of all sums and differences of the messages, these alone have no mask."""
    asked = {}
    for site in SITES:
        others = data.draw(st.sets(st.sampled_from([s for s in SITES if s != site]), min_size=1))
        asked[site] = sender_set(AGREED, sorted({site, *others}))
    own = {site: torch.full((2,), 10**number) for number, site in enumerate(SITES, 1)}
    sent = {site: message(AGREED, site, chosen, own[site]) for site, chosen in asked.items()}
    whole = {frozenset(chosen.keys) for chosen in asked.values() if all(asked[each] == chosen for each in chosen.keys)}
    for signs in itertools.product((-1, 0, 1), repeat=4):
        picked = {site: sign for site, sign in zip(SITES, signs, strict=True) if sign}
        found = sum_of([sign * sent[site] for site, sign in picked.items()], 2)
        plain = sum_of([sign * own[site] for site, sign in picked.items()], 2)
        of_whole_sets = all(
            any(site in group and {picked.get(each) for each in group} == {sign} for group in whole)
            for site, sign in picked.items()
        )
        assert torch.equal(found, plain) == of_whole_sets, (picked, whole)


def test_a_masked_message_looks_the_same_whatever_it_holds():
    """Every bit of a mask is drawn: over many words each is set about as often as not."""
    words = 1 << 14
    chosen = sender_set(AGREED, ("a", "b"))
    sent = message(AGREED, "a", chosen, torch.zeros(words, dtype=torch.int64))
    for bit in range(64):
        share = float(((sent >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 6 * 0.5 / words**0.5, bit


@pytest.mark.parametrize(
    "other",
    [
        partial(sender_set, senders=("a", "b"), step=ExchangeStep(3, 2)),
        partial(sender_set, senders=("a", "b"), step=ExchangeStep(4, 1)),
        partial(sender_set, senders=("a", "b"), receiver="s"),
        partial(sender_set, senders=("a", "b", "c")),
    ],
)
def test_no_two_sums_have_the_same_masks(other):
    pair = partial(AGREED["a"].pair_key, "b", AGREED["b"].session_key)
    one = sender_set(AGREED, ("a", "b"))
    assert pair(one.context("run")) == AGREED["b"].pair_key("a", AGREED["a"].session_key, one.context("run"))
    assert len({pair(one.context("run")), pair(one.context("again")), pair(other(AGREED).context("run"))}) == 3


def test_another_process_of_a_site_has_other_masks():
    """Else a round that is repeated after a crash would tell the difference of what was sent."""
    keys = {site: X25519PrivateKey.generate() for site in SITES}
    listed = {site: key.public_key().public_bytes_raw().hex() for site, key in keys.items()}
    b = SiteAgreement(keys["b"], listed.get)
    found = {SiteAgreement(keys["a"], listed.get).pair_key("b", b.session_key, b"sum") for _ in range(2)}
    assert len(found) == 2


def test_a_receiver_that_gives_its_own_session_keys_for_others_knows_no_pair_key():
    """The long-term keys of the list are part of every pair's key."""
    lying = X25519PrivateKey.generate()
    listed = {}
    keys = {site: X25519PrivateKey.generate() for site in ("a", "b", "r")}
    listed |= {site: key.public_key().public_bytes_raw().hex() for site, key in keys.items()}
    a = SiteAgreement(keys["a"], listed.get)
    r = SiteAgreement(keys["r"], listed.get)
    r._session = lying
    found = a.pair_key("b", lying.public_key().public_bytes_raw(), b"sum")
    assert found not in {r.pair_key(site, a.session_key, b"sum") for site in ("a", "b", "r")}


@pytest.mark.parametrize("key", [bytes(32), b"", bytes(31), bytes([1]) + bytes(31)])
def test_keys_that_would_make_the_secret_known_are_refused(key):
    with pytest.raises(Refused, match="bad-body"):
        AGREED["a"].pair_key("b", key, b"sum")


def test_a_site_without_a_listed_key_is_refused():
    agreed = agreements(known={"a": "00"})
    with pytest.raises(Refused, match="no key for secure sums of b"):
        agreed["a"].pair_key("b", agreed["b"].session_key, b"sum")


def test_a_keystream_is_that_of_chacha20():
    """RFC 8439, A.1, test vector 1: key, counter and nonce are zero."""
    assert keystream(bytes(32), 2).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"
