import os
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from peerlora.errors import IdentityError
from peerlora.network.identity.authority import enrol, issue, new_authority, sign_request
from peerlora.network.identity.identity import (
    certificate_fingerprint,
    check_site,
    common_name,
    fingerprint_of,
    load_identity,
    new_identity,
    read_key,
    request,
)
from peerlora.network.identity.key_files import read_private, write_new, write_over

NOW = datetime(2026, 5, 1, tzinfo=UTC)


@pytest.fixture
def site(tmp_path):
    """An authority and the site a, enrolled at NOW for 60 days."""
    new_authority(tmp_path / "authority", "test", NOW)
    new_identity(tmp_path / "a", "a")
    enrol(tmp_path / "authority", tmp_path / "a", 60, NOW)
    return tmp_path


def test_an_identity_is_what_was_made(site):
    identity = load_identity(site / "a", NOW)
    assert identity.site == "a" and identity.expires == NOW + timedelta(days=60)
    assert identity.fingerprint == certificate_fingerprint(identity.certificate)
    leaf = x509.load_pem_x509_certificate(identity.certificate)
    uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {use.dotted_string for use in uses} == {"1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://peerlora.internal/site/a"]
    assert isinstance(leaf.public_key().curve, ec.SECP256R1)
    assert b"PRIVATE" not in repr(identity).encode()


def test_a_renewed_certificate_keeps_the_fingerprint(site):
    before = load_identity(site / "a", NOW).fingerprint
    _, fingerprint, renewed = sign_request(site / "authority", request(site / "a"), 30, NOW + timedelta(days=50))
    write_over(site / "a/certificate.pem", renewed)
    assert load_identity(site / "a", NOW + timedelta(days=70)).fingerprint == before == fingerprint


def test_an_expired_or_future_certificate_is_refused(site):
    load_identity(site / "a", NOW + timedelta(days=59))
    with pytest.raises(IdentityError, match="expired on 2026-06-30"):
        load_identity(site / "a", NOW + timedelta(days=61))
    with pytest.raises(IdentityError, match="clock"):
        load_identity(site / "a", NOW - timedelta(days=1))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660])
def test_a_key_that_others_can_open_is_refused(site, mode):
    os.chmod(site / "a/key.pem", mode)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_identity(site / "a", NOW)


def test_keys_are_private_from_the_start_and_never_overwritten(site):
    assert stat.S_IMODE((site / "a/key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((site / "a").stat().st_mode) == 0o700
    before = (site / "a/key.pem").read_bytes()
    with pytest.raises(IdentityError, match="never overwritten"):
        new_identity(site / "a", "a")
    with pytest.raises(IdentityError, match="never overwritten"):
        new_authority(site / "authority", "again", NOW)
    assert (site / "a/key.pem").read_bytes() == before
    assert sorted(path.name for path in (site / "a").iterdir()) == [
        "certificate.pem",
        "key.pem",
        "site.json",
        "trust.pem",
    ]


def test_a_certificate_of_another_key_site_or_authority_is_refused(site):
    new_authority(site / "other", "other", NOW)
    new_identity(site / "b", "b")
    _, _, of_b = sign_request(site / "authority", request(site / "b"), 60, NOW)
    write_over(site / "a/certificate.pem", of_b)
    with pytest.raises(IdentityError, match="another key"):
        load_identity(site / "a", NOW)
    key = read_key(site / "a/key.pem").public_key()
    write_over(site / "a/certificate.pem", issue(site / "authority", key, "b", timedelta(days=60), NOW))
    with pytest.raises(IdentityError, match="is for site b"):
        load_identity(site / "a", NOW)
    write_over(site / "a/certificate.pem", issue(site / "other", key, "a", timedelta(days=60), NOW))
    with pytest.raises(IdentityError, match="not signed by a root"):
        load_identity(site / "a", NOW)
    both = (site / "authority/trust.pem").read_bytes() + (site / "other/trust.pem").read_bytes()
    write_over(site / "a/trust.pem", both)
    assert len(load_identity(site / "a", NOW).signers) == 2


def asked(key, *names):
    builder = x509.CertificateSigningRequestBuilder().subject_name(common_name("a"))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


GOOD = [x509.DNSName("a.peerlora.internal"), x509.UniformResourceIdentifier("spiffe://peerlora.internal/site/a")]


def test_requests_with_anything_unexpected_are_not_signed(site):
    key = ec.generate_private_key(ec.SECP256R1())
    assert sign_request(site / "authority", asked(key, *GOOD), 30, NOW)[0] == "a"
    for names in (
        [],
        GOOD[:1],
        GOOD[1:],
        [*GOOD, x509.DNSName("b.peerlora.internal")],
        [x509.DNSName("b.peerlora.internal"), GOOD[1]],
        [GOOD[0], x509.UniformResourceIdentifier("spiffe://elsewhere/site/a")],
        [*GOOD, x509.RFC822Name("a@example.org")],
    ):
        with pytest.raises(IdentityError):
            sign_request(site / "authority", asked(key, *names), 30, NOW)
    for other in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        with pytest.raises(IdentityError, match="P-256"):
            sign_request(site / "authority", asked(other, *GOOD), 30, NOW)
    with pytest.raises(IdentityError, match="91 days given"):
        sign_request(site / "authority", asked(key, *GOOD), 91, NOW)


def test_a_request_whose_names_cannot_be_read_is_not_signed(site):
    key = ec.generate_private_key(ec.SECP256R1())
    broken = x509.UnrecognizedExtension(x509.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\x30\x04\x82\x02\xe4a")
    builder = x509.CertificateSigningRequestBuilder().subject_name(common_name("a"))
    csr = builder.add_extension(broken, critical=False).sign(key, hashes.SHA256())
    with pytest.raises(IdentityError, match="the request holds names that are not readable"):
        sign_request(site / "authority", csr.public_bytes(serialization.Encoding.PEM), 30, NOW)


@pytest.mark.parametrize("name", ["", 65 * "a", 100 * "b"])
def test_a_name_that_no_certificate_can_have_is_refused(tmp_path, name):
    with pytest.raises(IdentityError, match=rf"name of {len(name)} letters given; a certificate holds 1 to 64"):
        new_authority(tmp_path / "new", name)
    assert not (tmp_path / "new").exists()
    new_authority(tmp_path / "new", 64 * "a")


def test_a_request_that_was_changed_is_not_signed(site):
    der = x509.load_pem_x509_csr(request(site / "a")).public_bytes(serialization.Encoding.DER)
    changed = der.replace(b"a.peerlora.internal", b"b.peerlora.internal").replace(b"site/a", b"site/b")
    pem = x509.load_der_x509_csr(changed).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(IdentityError, match="not signed by its own key"):
        sign_request(site / "authority", pem, 60, NOW)


def test_a_key_of_another_kind_is_refused(site):
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_over(site / "a/key.pem", pem, 0o600)
    with pytest.raises(IdentityError, match="P-256"):
        load_identity(site / "a", NOW)
    write_over(site / "a/key.pem", b"nothing", 0o600)
    with pytest.raises(IdentityError, match="no unencrypted private key"):
        load_identity(site / "a", NOW)


@pytest.mark.parametrize("name", ["", "A", "a b", "-a", "a-", "a.b", "a/b", "a\n", "ä", "a" * 64])
def test_names_that_no_certificate_carries_are_refused(name):
    with pytest.raises(IdentityError, match="expected 1 to 63"):
        check_site(name)


def test_files_are_whole_or_not_there(tmp_path):
    write_new(tmp_path / "x", b"1")
    write_over(tmp_path / "x", b"2", 0o600)
    assert (tmp_path / "x").read_bytes() == read_private(tmp_path / "x") == b"2"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(IdentityError, match="cannot be read"):
        read_private(tmp_path / "y")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_no_temporary_files(tmp_path, monkeypatch, failing):
    """A peer tries to take a new list up every ten seconds; each try left a file."""
    write_over(tmp_path / "x", b"1")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"peerlora.network.identity.key_files.os.{failing}", full)
    for _ in range(3):
        with pytest.raises(IdentityError, match="x cannot be written: No space left on device; make room"):
            write_over(tmp_path / "x", b"2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"1")]


def test_the_fingerprint_is_of_the_public_key_alone(site):
    import hashlib

    key = read_key(site / "a/key.pem").public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert fingerprint_of(key) == hashlib.sha256(der).hexdigest()
