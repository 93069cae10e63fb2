"""Small certificate authority and list signer, for consortia that have none.  Keep its folder offline.

ca-key.pem     P-256: signs the sites' certificates          list-key.pem   Ed25519: signs the member list
trust.pem      for every site: the root certificate and the list signer's public key
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from peerlora.display import utc_now
from peerlora.errors import IdentityError
from peerlora.network.identity.agreement import agreement_public
from peerlora.network.identity.identity import (
    common_name,
    fingerprint_of,
    host_name,
    key_of,
    new_identity,
    new_key,
    p256,
    private_pem,
    read_certificates,
    read_key,
    request,
    site_of,
    site_uri,
)
from peerlora.network.identity.key_files import PRIVATE, read_private, read_public, write_new
from peerlora.network.identity.members import MemberList, add_member, new_list, sign_list, write_list

DAYS = (30, 90)
"""Days, shortest and longest, that a site's certificate may be valid."""
ROOT_DAYS = 5 * 365
"""Days that the root certificate is valid."""
_EARLY = timedelta(minutes=5)  # validity begins so long before now, since clocks of sites differ


def new_authority(folder: Path, name: str, now: datetime | None = None) -> None:
    """Create the keys and the root certificate of a consortium.

    Raises IdentityError where there are some, and for a name that no certificate can have.
    """
    now = now or utc_now()
    key, pem = new_key()
    signer = Ed25519PrivateKey.generate()
    root = (
        x509.CertificateBuilder(common_name(name), common_name(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + timedelta(days=ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signing=False), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    public = signer.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_new(folder / "ca-key.pem", pem, PRIVATE)
    write_new(folder / "list-key.pem", private_pem(signer), PRIVATE)
    write_new(folder / "trust.pem", root.public_bytes(serialization.Encoding.PEM) + public)


def _usage(signing: bool) -> x509.KeyUsage:
    """Key usage of a leaf (``signing`` messages) or of a root (signing certificates)."""
    others = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    return x509.KeyUsage(
        digital_signature=signing, key_cert_sign=not signing, crl_sign=not signing, decipher_only=False, **others
    )


def sign_request(authority: Path, pem: bytes, days: int = 60, now: datetime | None = None) -> tuple[str, str, bytes]:
    """Sign a request: the site, its key's fingerprint, and the leaf certificate (PEM).

    ``days``: how long it is valid, 30 to 90.  Only the site's name and key are taken from the request; verify with the
    site, over another channel than the request's, that they belong together.  Raises IdentityError.
    """
    if not DAYS[0] <= days <= DAYS[1]:
        raise IdentityError(
            f"{days} days given; expected {DAYS[0]} to {DAYS[1]}, renewals keep a lost key's harm short"
        )
    try:
        csr = x509.load_pem_x509_csr(pem)
    except ValueError:
        raise IdentityError("the request is not readable; expected PEM by `peerlora identity request`") from None
    if not csr.is_signature_valid:
        raise IdentityError("the request is not signed by its own key; it was changed on its way")
    key, site = key_of(csr, "the request"), site_of(csr, "the request")
    return site, fingerprint_of(key), issue(authority, key, site, timedelta(days=days), now)


def issue(authority: Path, key: object, site: str, valid: timedelta, now: datetime | None = None) -> bytes:
    """Issue a certificate (PEM) for a site's public key, valid from ``now``."""
    now = now or utc_now()
    root = read_certificates(read_public(authority / "trust.pem", "an authority's trust.pem"), "trust.pem")[0]
    signer, public = read_key(authority / "ca-key.pem"), p256(key, "the request")
    names = [x509.DNSName(host_name(site)), x509.UniformResourceIdentifier(site_uri(site))]
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    leaf = (
        x509.CertificateBuilder(root.subject, common_name(site), public, x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + valid)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signing=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return leaf.public_bytes(serialization.Encoding.PEM)


def list_signer(authority: Path) -> Ed25519PrivateKey:
    """Load the key that signs member lists; raises IdentityError."""
    path = authority / "list-key.pem"
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except (ValueError, TypeError):
        raise IdentityError(
            f"{path} holds no private key; expected a folder by `identity new --as-authority`"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise IdentityError(f"{path} holds another kind of key; expected Ed25519")
    return key


def throwaway(
    folder: Path,
    addresses: Mapping[str, str | None],
    name: str = "throwaway",
    days: int = 30,
    edges: Iterable[tuple[str, str]] | None = None,
) -> MemberList:
    """Create identities and a signed list for a federation on one machine, in ``folder``.

    ``folder/authority``, ``folder/SITE`` for every site (in the order of their client numbers) and
    ``folder/members.json``.  ``addresses``: site -> host:port, or None for one that only dials.  ``edges``: pairs of
    sites that may talk; None: all pairs.
    """
    authority, members = folder / "authority", new_list(name)
    new_authority(authority, name)
    for site, address in addresses.items():
        fingerprint = new_identity(folder / site, site)
        enrol(authority, folder / site, days)
        agreement = agreement_public(private_pem(read_key(folder / site / "key.pem")))
        members = add_member(members, site, fingerprint, address, agreement=agreement)
    if edges is not None:
        members = msgspec.structs.replace(members, edges=list(edges))
    signed = sign_list(members, list_signer(authority), timedelta(days=days))
    write_list(folder / "members.json", signed)
    return signed.list


def enrol(authority: Path, folder: Path, days: int = 60, now: datetime | None = None) -> None:
    """Put a certificate and the trust file into a site's folder, where site and authority are on one machine."""
    _, _, certificate = sign_request(authority, request(folder), days, now)
    write_new(folder / "certificate.pem", certificate)
    write_new(folder / "trust.pem", read_public(authority / "trust.pem", "an authority's trust.pem"))
