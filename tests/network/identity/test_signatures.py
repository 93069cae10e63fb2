"""Signatures by identity keys: over this very statement, by the key that the current list names, else refused."""

from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from peerlora.network.base import Refused
from peerlora.network.identity.authority import enrol, sign_request, throwaway
from peerlora.network.identity.identity import load_identity, private_pem, request
from peerlora.network.identity.key_files import write_over
from peerlora.network.identity.members import add_member, remove_member
from peerlora.network.identity.roster import Roster
from peerlora.network.identity.signatures import SiteSignatures

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    """Three sites, and their folder."""
    folder = tmp_path_factory.mktemp("consortium")
    return folder, throwaway(folder, {"a": "127.0.0.1:1", "b": None, "c": None})


def signatures(consortium, site):
    folder, members = consortium
    identity = load_identity(folder / site)
    return SiteSignatures(lambda: identity, Roster(site, identity.fingerprint, members))


def reason(check, *arguments):
    with pytest.raises(Refused) as refused:
        check.verify(*arguments)
    return refused.value.reason


def test_what_a_site_signed_every_other_site_verifies(consortium):
    for signer in "abc":
        signed = signatures(consortium, signer).sign(b"statement")
        assert len(signed) == SiteSignatures.size == 97
        for reader in "abc":
            check = signatures(consortium, reader)
            check.verify(signer, b"statement", signed)
            assert check.current(signer, signed)


def test_another_statement_signer_or_signature_is_refused(consortium):
    a, b = (signatures(consortium, site) for site in "ab")
    signed = a.sign(b"statement")
    assert reason(b, "a", b"statemenu", signed) == "bad-signature"
    assert reason(b, "b", b"statement", signed) == "bad-signature"
    assert reason(b, "d", b"statement", signed) == "unknown-origin"
    assert not b.current("b", signed) and not b.current("d", signed)
    for place in range(97):
        flipped = bytearray(signed)
        flipped[place] ^= 1
        assert reason(b, "a", b"statement", bytes(flipped)) == "bad-signature"


@pytest.mark.parametrize(
    "signed", [b"", bytes(97), bytes(96), b"\x02" + bytes(96), b"\x02" + b"\xff" * 96, bytes(9999)]
)
def test_what_is_no_signature_is_refused(consortium, signed):
    b = signatures(consortium, "b")
    assert reason(b, "a", b"statement", signed) == "bad-signature" and not b.current("a", signed)


@pytest.mark.parametrize(("r", "s"), [(0, 0), (1, 0), (0, 1), (ORDER, ORDER), (ORDER - 1, ORDER - 1), (2**256 - 1, 1)])
def test_impossible_numbers_are_no_signature(consortium, r, s):
    b = signatures(consortium, "b")
    point = signatures(consortium, "a").sign(b"statement")[:33]
    assert reason(b, "a", b"statement", point + r.to_bytes(32, "big") + s.to_bytes(32, "big")) == "bad-signature"


def test_a_session_proof_is_no_statement(consortium):
    """The key signs with a prefix of its own: the bare bytes under the same key do not verify."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    folder, _ = consortium
    key = serialization.load_pem_private_key(load_identity(folder / "a").key, None)
    r, s = decode_dss_signature(key.sign(b"statement", ec.ECDSA(hashes.SHA256())))
    point = signatures(consortium, "a").sign(b"statement")[:33]
    bare = point + r.to_bytes(32, "big") + s.to_bytes(32, "big")
    assert reason(signatures(consortium, "b"), "a", b"statement", bare) == "bad-signature"


def test_a_renewed_certificate_of_the_same_key_still_verifies(tmp_path):
    made = tmp_path, throwaway(tmp_path, {"a": "127.0.0.1:1", "b": None})
    signed, b = signatures(made, "a").sign(b"statement"), signatures(made, "b")
    _, _, renewed = sign_request(tmp_path / "authority", request(tmp_path / "a"), 30)
    write_over(tmp_path / "a/certificate.pem", renewed)
    b.verify("a", b"statement", signed)
    b.verify("a", b"statement", signatures(made, "a").sign(b"statement"))


def test_an_old_key_does_not_verify_under_a_list_that_names_a_new_one(tmp_path):
    made = tmp_path, throwaway(tmp_path, {"a": "127.0.0.1:1", "b": None})
    a, b = signatures(made, "a"), signatures(made, "b")
    signed = a.sign(b"statement")
    new = private_pem(ec.generate_private_key(ec.SECP256R1()))
    fresh = SiteSignatures(lambda: replace(a.identity(), key=new), a.roster)
    point = fresh.sign(b"statement")
    assert reason(b, "a", b"statement", point) == "bad-signature"

    members = b.roster.members
    other = tmp_path / "other"
    from peerlora.network.identity.identity import new_identity

    fingerprint = new_identity(other, "a")
    enrol(tmp_path / "authority", other, 30)
    changed = add_member(remove_member(members, "a"), "a", fingerprint, "127.0.0.1:1")
    b.roster.replace(msgspec.structs.replace(changed, version=2, expires=members.expires + timedelta(days=1)))
    assert reason(b, "a", b"statement", signed) == "bad-signature" and not b.current("a", signed)
    again = load_identity(other)
    b.verify("a", b"statement", SiteSignatures(lambda: again, a.roster).sign(b"statement"))
    b.roster.replace(msgspec.structs.replace(remove_member(b.roster.members, "a"), version=3))
    assert reason(b, "a", b"statement", signed) == "unknown-origin"
