import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from peerlora.errors import IdentityError
from peerlora.network.base import Refused
from peerlora.network.identity.members import (
    SignedList,
    add_member,
    canonical,
    check_address,
    link_members,
    load_members,
    new_list,
    read_list,
    remove_member,
    set_agreement,
    sign_list,
    unlink_members,
    verify_list,
    write_list,
)
from peerlora.network.identity.roster import Roster

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
KEY = Ed25519PrivateKey.generate()
SIGNER = (KEY.public_key().public_bytes_raw(),)
MONTH = timedelta(days=30)


def key(letter):
    return format(ord(letter), "x") * 32


def members(*sites, **settings):
    made = new_list("test")
    for site in sites:
        made = add_member(made, site, key(site), f"{site}.example:7443", **settings)
    return made


def test_a_signed_list_comes_back_as_it_was(tmp_path):
    signed = sign_list(members("a", "b"), KEY, MONTH, NOW)
    write_list(tmp_path / "m.json", signed)
    assert load_members(tmp_path / "m.json", SIGNER, NOW) == signed.list
    assert (signed.list.version, signed.list.expires) == (1, NOW + MONTH)
    laid_out = json.dumps(json.loads((tmp_path / "m.json").read_text()), sort_keys=True)  # the layout is not signed
    (tmp_path / "m.json").write_text(laid_out)
    assert load_members(tmp_path / "m.json", SIGNER, NOW) == signed.list


def changes():
    """Every way to change one value of a signed list."""
    tree = msgspec.to_builtins(sign_list(members("a", "b"), KEY, MONTH, NOW))
    listed = tree["list"]
    yield "name", tree | {"list": listed | {"name": "other"}}
    yield "version", tree | {"list": listed | {"version": 2}}
    yield "expires", tree | {"list": listed | {"expires": "2027-05-31T12:00:00Z"}}
    yield "former", tree | {"list": listed | {"former": {"c": 2}}}
    yield "edges", tree | {"list": listed | {"edges": [["a", "b"]]}}
    for name, value in (("site", "c"), ("client", 5), ("fingerprint", key("c")), ("address", None)):
        first = listed["members"][0] | {name: value}
        yield f"member's {name}", tree | {"list": listed | {"members": [first, listed["members"][1]]}}
    yield "a member less", tree | {"list": listed | {"members": listed["members"][:1]}}
    yield "signature", tree | {"signature": tree["signature"][:-6] + "AAAA=="}
    yield "no base64", tree | {"signature": "?"}


@pytest.mark.parametrize(("what", "tree"), list(changes()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_change_of_a_signed_list_is_found(tmp_path, what, tree):
    (tmp_path / "m.json").write_text(json.dumps(tree))
    with pytest.raises(IdentityError, match="not signed by the consortium"):
        load_members(tmp_path / "m.json", SIGNER, NOW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"list": {"name": "x", "extra": 1}, "signature": null}',
        '{"list": {"name": "x", "version": -1}, "signature": null}',
        '{"list": {"name": "x", "format": 2}, "signature": null}',
        "[" * 100_000,
        '{"list": {"name": "x", "members": [{"site": "A", "client": 0, "fingerprint": "' + key("a") + '"}]}}',
        '{"list": {"name": "x", "edges": [["a", "b"]]}}',
    ],
)
def test_files_that_are_no_list_are_refused(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(IdentityError, match="member list"):
        read_list(tmp_path / "m.json")


def test_a_list_by_somebody_else_or_by_nobody_is_refused():
    signed = sign_list(members("a"), KEY, MONTH, NOW)
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    with pytest.raises(IdentityError, match="not signed by the consortium"):
        verify_list(signed, (other,), NOW)
    assert verify_list(signed, (other, *SIGNER), NOW) == signed.list
    with pytest.raises(IdentityError, match="draft"):
        verify_list(SignedList(signed.list), SIGNER, NOW)


def test_a_list_expires_to_the_second():
    signed = sign_list(members("a"), KEY, MONTH, NOW)
    verify_list(signed, SIGNER, NOW + MONTH - timedelta(seconds=1))
    with pytest.raises(IdentityError, match="expired on 2026-05-31 12:00"):
        verify_list(signed, SIGNER, NOW + MONTH)
    with pytest.raises(IdentityError, match="clock"):
        verify_list(signed, SIGNER, NOW - timedelta(days=2))


@given(st.lists(st.tuples(st.sampled_from("abcdefg"), st.booleans()), max_size=40))
def test_a_client_number_is_never_given_to_another_site(steps):
    made, numbers = new_list("test"), {}
    for site, enters in steps:
        present = {member.site for member in made.members}
        if enters and site not in present:
            made = add_member(made, site, key(site))
        elif not enters and site in present:
            made = remove_member(made, site)
        for member in made.members:
            assert numbers.setdefault(member.site, member.client) == member.client
    assert len(set(numbers.values())) == len(numbers)
    assert sorted(numbers.values()) == list(range(len(numbers)))


def test_neighbours_make_edges_and_a_removed_site_takes_its_own_along():
    made = members("a", "b", "c")
    assert made.linked("a", "c") and not made.linked("a", "a")
    made = add_member(made, "d", key("d"), neighbours=("a", "b"))
    assert made.edges == [("a", "d"), ("b", "d")]
    assert made.linked("d", "a") and made.linked("a", "d") and not made.linked("a", "b")
    assert remove_member(made, "a").edges == [("b", "d")]


def test_edges_are_added_and_taken_off():
    made = unlink_members(members("a", "b", "c"), "c", "a")
    assert made.edges == [("a", "b"), ("b", "c")] and not made.linked("a", "c") and made.linked("b", "a")
    again = link_members(made, "c", "a")
    assert again.linked("a", "c") and again.edges == [("a", "b"), ("b", "c"), ("c", "a")]
    assert not unlink_members(again, "a", "b").linked("b", "a")
    for change, told in [
        (lambda: link_members(members("a", "b"), "a", "b"), "everybody may"),
        (lambda: link_members(again, "a", "c"), "has the edge a-c already"),
        (lambda: unlink_members(made, "a", "c"), "has no edge a-c"),
        (lambda: link_members(made, "a", "a"), "two sites"),
        (lambda: unlink_members(made, "a", "bb"), "did you mean"),
    ]:
        with pytest.raises(IdentityError, match=told):
            change()


def test_impossible_lists_are_refused():
    with pytest.raises(IdentityError, match="fingerprint .* occurs 2 times"):
        add_member(members("a"), "b", key("a"))
    with pytest.raises(IdentityError, match="empty"):
        sign_list(new_list("x"), KEY, MONTH, NOW)
    with pytest.raises(IdentityError, match="did you mean"):
        add_member(members("a"), "b", key("b"), neighbours=("aa",))


@pytest.mark.parametrize(
    "address",
    [
        "h:0",
        "h:65536",
        "h",
        ":1",
        "h h:1",
        "a:1:2",
        "[::1]",
        "h:1\n",
        "http://h:1",
        "peer..b.example:7443",
        ".h:1",
        f"{64 * 'a'}.b:1",
        f"{'ab.' * 90}c:1",
    ],
)
def test_addresses_that_nobody_can_dial_are_refused(address):
    with pytest.raises(IdentityError, match="host:port"):
        check_address(address)


def test_addresses():
    assert check_address("peer.example:7443") == ("peer.example", 7443)
    assert check_address("peer_1.example.:1") == ("peer_1.example.", 1) and check_address(f"{63 * 'a'}.b:1")[1] == 1
    assert check_address("[::1]:1") == ("::1", 1) and check_address("10.0.0.1:65535") == ("10.0.0.1", 65535)


class Clock:
    now = NOW

    def __call__(self):
        return self.now


def test_the_roster_admits_whoever_is_on_the_list_now():
    clock = Clock()
    signed = sign_list(members("a", "b", "c"), KEY, MONTH, NOW)
    roster = Roster("a", key("a"), signed.list, clock=clock)
    assert roster.admit(key("b")) == "b" and roster.others() == ["b", "c"]
    with pytest.raises(Refused, match="not-a-member"):
        roster.admit(key("z"))
    with pytest.raises(Refused, match="not-a-neighbour"):
        roster.admit(key("a"))
    roster.replace(sign_list(remove_member(signed.list, "b"), KEY, MONTH, NOW).list)
    with pytest.raises(Refused, match="not-a-member"):
        roster.admit(key("b"))
    clock.now = NOW + MONTH
    with pytest.raises(Refused, match="list-expired"):
        roster.admit(key("c"))


def test_a_roster_keeps_to_the_neighbours_of_a_run():
    signed = sign_list(members("a", "b", "c"), KEY, MONTH, NOW)
    roster = Roster("a", key("a"), signed.list, clock=lambda: NOW)
    roster.keep_to(["b", "d"])  # d is not on the list yet
    assert roster.others() == ["b"] and roster.admit(key("b")) == "b"
    with pytest.raises(Refused, match="not-a-neighbour"):
        roster.admit(key("c"))
    roster.replace(sign_list(add_member(signed.list, "d", key("d")), KEY, MONTH, NOW).list)
    assert roster.others() == ["b", "d"]
    removed = add_member(remove_member(roster.members, "b"), "e", key("e"))
    roster.replace(sign_list(removed, KEY, MONTH, NOW).list)
    assert roster.others() == ["d"]


def test_one_end_of_an_edge_dials():
    made = add_member(members("a", "b"), "z", key("z"))
    views = {site: Roster(site, key(site), made) for site in "abz"}
    for one, other, dials in (("a", "b", True), ("b", "a", False), ("z", "a", True), ("a", "z", False)):
        assert views[one].dials(other) is dials


def test_an_older_list_or_a_second_of_the_same_version_is_refused(tmp_path):
    first = sign_list(members("a", "b"), KEY, MONTH, NOW).list
    second = sign_list(first, KEY, MONTH, NOW).list
    twin = sign_list(remove_member(first, "b"), KEY, MONTH, NOW).list
    roster = Roster("a", key("a"), second, tmp_path)
    with pytest.raises(IdentityError, match="version 1 given, version 2 was seen"):
        roster.replace(first)
    with pytest.raises(IdentityError, match="two different versions 2"):
        roster.replace(twin)
    assert roster.members == second
    for again in (first, twin):
        with pytest.raises(IdentityError):
            Roster("a", key("a"), again, tmp_path)  # after a restart
    Roster("a", key("a"), second, tmp_path)
    with pytest.raises(IdentityError, match="'other' given while 'test'"):
        roster.replace(msgspec.structs.replace(second, name="other", version=3))
    (tmp_path / "lists.json").write_text("{")
    with pytest.raises(IdentityError, match="damaged"):
        Roster("a", key("a"), second, tmp_path)


def test_a_site_must_be_on_the_list_under_its_key():
    with pytest.raises(IdentityError, match="not on the member list"):
        Roster("z", key("z"), members("a"))
    with pytest.raises(IdentityError, match="names key"):
        Roster("a", key("z"), members("a"))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("members", 0, "site"), "a\n"),
        (("members", 0, "fingerprint"), "a" * 64 + "\n"),
        (("expires",), "2026-06-01T00:00:00"),
        (("issued",), "2026-05-01T00:00:00"),
    ],
)
def test_a_newline_at_the_end_and_a_date_without_zone_are_refused(tmp_path, where, value):
    tree = msgspec.to_builtins(sign_list(members("a", "b"), KEY, MONTH, NOW))
    part = tree["list"]
    for step in where[:-1]:
        part = part[step]
    part[where[-1]] = value
    (tmp_path / "m.json").write_text(json.dumps(tree))
    with pytest.raises(IdentityError, match="is not a member list"):
        read_list(tmp_path / "m.json")


def test_a_list_without_agreement_keys_is_signed_as_it_always_was():
    """Its bytes are those of versions that know of no such keys, which therefore read it."""
    listed = sign_list(members("a"), KEY, MONTH, NOW).list
    assert canonical(listed) == (
        b'peerlora member list 1\n{"edges":null,"expires":"2026-05-31T12:00:00Z","format":1,"former":{},'
        b'"issued":"2026-05-01T12:00:00Z","members":[{"address":"a.example:7443","client":0,"fingerprint":"'
        + key("a").encode()
        + b'","site":"a"}],"name":"test","version":1}'
    )


def test_agreement_keys_are_signed_and_make_the_list_format_2(tmp_path):
    listed = set_agreement(members("a", "b"), "b", key("x"))
    assert (listed.format, [member.agreement or None for member in listed.members]) == (2, [None, key("x")])
    signed = sign_list(listed, KEY, MONTH, NOW)
    write_list(tmp_path / "m.json", signed)
    assert load_members(tmp_path / "m.json", SIGNER, NOW) == signed.list
    tree = json.loads((tmp_path / "m.json").read_text())
    tree["list"]["members"][1]["agreement"] = key("y")
    (tmp_path / "m.json").write_text(json.dumps(tree))
    with pytest.raises(IdentityError, match="was changed since"):
        load_members(tmp_path / "m.json", SIGNER, NOW)
    roster = Roster("a", key("a"), signed.list, clock=lambda: NOW)
    assert (roster.agreement("a"), roster.agreement("b"), roster.agreement("c")) == (None, key("x"), None)


def test_a_list_is_of_the_format_that_its_keys_ask_for():
    with_keys = add_member(members("a"), "b", key("b"), agreement=key("x"))
    assert with_keys.format == 2 and remove_member(with_keys, "b").format == 1
    for wrong in (msgspec.structs.replace(with_keys, format=1), msgspec.structs.replace(members("a"), format=2)):
        with pytest.raises(IdentityError, match="format . given"):
            sign_list(wrong, KEY, MONTH, NOW)


@pytest.mark.parametrize("bad", ["", "xyz", "a" * 63, "A" * 64])
def test_agreement_keys_that_are_none_are_refused(bad):
    with pytest.raises(IdentityError, match="member list"):
        set_agreement(members("a"), "a", bad)


def test_two_sites_cannot_have_one_agreement_key():
    with pytest.raises(IdentityError, match="agreement key .* occurs 2 times"):
        set_agreement(set_agreement(members("a", "b"), "a", key("x")), "b", key("x"))
