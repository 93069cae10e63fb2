"""Identity of a site: its key, its certificate, and the roots that it trusts.

key.pem            P-256, readable by its owner alone; it never leaves the site
site.json          the site's name
certificate.pem    the leaf that a consortium's CA made of the request, with intermediates after it, if any
trust.pem          the root certificates and the public key of the member list's signer, one file from the consortium
lists.json         the newest version seen of every member list, so that an older one is not accepted again
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from peerlora.display import utc_now
from peerlora.errors import IdentityError, first_line
from peerlora.network.identity.key_files import PRIVATE, read_private, read_public, write_new

SITE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
COMMON_NAME_LENGTH = 64
Signed = x509.Certificate | x509.CertificateSigningRequest
"""What holds a key and the names of a site; both are parsed when they are asked for."""


@dataclass(frozen=True)
class Identity:
    """A site's key and certificate, checked against each other and against the roots."""

    site: str
    key: bytes = field(repr=False)
    """PEM."""
    certificate: bytes = field(repr=False)
    """PEM, with intermediates."""
    roots: bytes = field(repr=False)
    """PEM of all trusted root certificates."""
    signers: tuple[bytes, ...] = field(repr=False)
    """Ed25519 public keys (32 bytes each) that may sign a member list."""
    fingerprint: str
    """SHA-256 of the public key, hexadecimal; the member list holds it."""
    expires: datetime


def check_site(name: str) -> str:
    """Return the name if a certificate can carry it; raises IdentityError."""
    if not SITE.fullmatch(name):
        raise IdentityError(f"site {name!r} given; expected 1 to 63 of a-z, 0-9 and inner hyphens, such as hospital-a")
    return name


def host_name(site: str) -> str:
    """Host name by which TLS checks the certificate of the dialled site; not in any DNS."""
    return f"{site}.peerlora.internal"


def site_uri(site: str) -> str:
    """URI of a site, for a certificate's subject alternative names."""
    return f"spiffe://peerlora.internal/site/{site}"


def fingerprint_of(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key's DER form, hexadecimal; the same for every certificate of this key."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def certificate_fingerprint(pem: bytes) -> str:
    """Fingerprint of the key in the first certificate of ``pem``; raises IdentityError."""
    return fingerprint_of(key_of(read_certificates(pem, "a certificate")[0], "the certificate"))


def certificate_site(pem: bytes) -> str:
    """Site named by the first certificate of ``pem``; raises IdentityError."""
    return site_of(read_certificates(pem, "a certificate")[0], "the certificate")


def p256(key: object, what: str) -> ec.EllipticCurvePublicKey:
    """Return the key if it is a public P-256 key; raises IdentityError."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"{what} holds another kind of key; expected P-256 (prime256v1)")
    return key


def key_of(signed: Signed, what: str) -> ec.EllipticCurvePublicKey:
    """Read the public P-256 key of a certificate or a request; raises IdentityError."""
    try:
        return p256(signed.public_key(), what)
    except (ValueError, UnsupportedAlgorithm) as error:  # only now is it parsed
        raise IdentityError(f"{what} holds a key that is not readable ({first_line(error)})") from None


def new_key() -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """Generate a P-256 key; also returns it as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key, private_pem(key)


def private_pem(key: PrivateKeyTypes) -> bytes:
    """Encode a private key as unencrypted PKCS#8 PEM; the mode of its file protects it."""
    pkcs8 = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption())


def new_identity(folder: Path, site: str) -> str:
    """Create a site's key and name in ``folder``; the key's fingerprint.  Raises IdentityError where there is one."""
    check_site(site)
    key, pem = new_key()
    write_new(folder / "key.pem", pem, PRIVATE)
    write_new(folder / "site.json", json.dumps({"site": site}).encode() + b"\n")
    return fingerprint_of(key.public_key())


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the P-256 key in a private file; raises IdentityError."""
    try:
        key = serialization.load_pem_private_key(read_private(path), None)
    except (ValueError, TypeError):
        raise IdentityError(f"{path} holds no unencrypted private key in PEM; expected one by `identity new`") from None
    p256(key.public_key(), str(path))
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def read_site(folder: Path) -> str:
    """Read the site's name; raises IdentityError."""
    text = read_public(folder / "site.json", "a folder made by `peerlora identity new`")
    try:
        return check_site(json.loads(text)["site"])
    except (ValueError, KeyError, TypeError):
        raise IdentityError(f'{folder / "site.json"} is damaged; expected {{"site": "NAME"}}') from None


def request(folder: Path) -> bytes:
    """Create a certificate request (PEM) for the site of ``folder``, signed by its key."""
    key, site = read_key(folder / "key.pem"), read_site(folder)
    names = x509.SubjectAlternativeName([x509.DNSName(host_name(site)), x509.UniformResourceIdentifier(site_uri(site))])
    csr = x509.CertificateSigningRequestBuilder().subject_name(common_name(site)).add_extension(names, critical=False)
    return csr.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def common_name(name: str) -> x509.Name:
    """Subject with a common name only; raises IdentityError for a name that no certificate can have."""
    try:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    except ValueError:
        raise IdentityError(
            f"name of {len(name)} letters given; a certificate holds 1 to {COMMON_NAME_LENGTH} (in UTF-8, bytes): "
            "give a shorter one"
        ) from None


def site_of(signed: Signed, what: str) -> str:
    """Site that the subject alternative names of a certificate or a request give.

    Raises IdentityError unless it is exactly one.
    """
    try:
        found = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise IdentityError(f"{what} names no site; expected a request by `peerlora identity request`") from None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:  # only now are they parsed
        raise IdentityError(f"{what} holds names that are not readable ({first_line(error)})") from None
    uris, hosts = (
        found.get_values_for_type(x509.UniformResourceIdentifier),
        found.get_values_for_type(x509.DNSName),
    )
    site = check_site(uris[0].rsplit("/", 1)[-1]) if uris else ""
    if uris != [site_uri(site)] or hosts != [host_name(site)] or len(list(found)) != 2:
        raise IdentityError(f"{what} names {uris + hosts}; expected exactly the URI and host name of one site")
    return site


def read_certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    """Parse all certificates in ``pem``; raises IdentityError where there is none."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise IdentityError(f"{what} holds no readable certificate; expected PEM") from None


def read_trust(pem: bytes, what: str) -> tuple[list[x509.Certificate], tuple[bytes, ...]]:
    """Parse a trust file: root certificates and the signers' Ed25519 keys; raises IdentityError."""
    roots = read_certificates(pem, what)
    blocks = re.findall(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----\n?", pem, re.DOTALL)
    try:
        keys = [serialization.load_pem_public_key(block) for block in blocks]
    except ValueError:
        raise IdentityError(f"{what} holds a damaged public key; ask the consortium for it again") from None
    if not keys or not all(isinstance(key, Ed25519PublicKey) for key in keys):
        raise IdentityError(f"{what} holds no Ed25519 public key of the member list's signer; ask the consortium")
    return roots, tuple(key.public_bytes_raw() for key in keys if isinstance(key, Ed25519PublicKey))


def load_identity(folder: Path, now: datetime | None = None) -> Identity:
    """Load a site's identity, with every check that needs no other site.

    Raises IdentityError: a file is missing, the key is open to others, the certificate is of another key, site or CA,
    or not valid at ``now``.
    """
    now = now or utc_now()
    key, site = read_key(folder / "key.pem"), read_site(folder)
    where = folder / "certificate.pem"
    pem = read_public(where, "the certificate that the consortium made of your request")
    trust = read_public(folder / "trust.pem", "the consortium's trust.pem")
    roots, signers = read_trust(trust, str(folder / "trust.pem"))
    chain = read_certificates(pem, str(where))
    leaf = chain[0]
    if fingerprint_of(key_of(leaf, str(where))) != fingerprint_of(key.public_key()):
        raise IdentityError(f"{where} is of another key than {folder / 'key.pem'}; have this key's request signed")
    if (named := site_of(leaf, str(where))) != site:
        raise IdentityError(f"{where} is for site {named}, this folder is {site}'s; use the right certificate")
    check_dates(leaf, str(where), now)
    if not _leads_to_root(chain, roots):
        raise IdentityError(
            f"{where} is not signed by a root in {folder / 'trust.pem'}; both must be of one consortium"
        )
    public = serialization.Encoding.PEM
    return Identity(
        site=site,
        key=private_pem(key),
        certificate=b"".join(each.public_bytes(public) for each in chain),
        roots=b"".join(each.public_bytes(public) for each in roots),
        signers=signers,
        fingerprint=fingerprint_of(key.public_key()),
        expires=leaf.not_valid_after_utc,
    )


def check_dates(certificate: x509.Certificate, what: str, now: datetime) -> None:
    """Raise IdentityError unless ``now`` lies within the certificate's validity."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise IdentityError(f"{what} expired on {end:%Y-%m-%d %H:%M} UTC; have a new request signed")
    if now < start:
        raise IdentityError(f"{what} is valid from {start:%Y-%m-%d %H:%M} UTC only; check this machine's clock")


def _leads_to_root(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> bool:
    """Whether each certificate is issued by the next one, and the last by a root."""
    for certificate, issuer in zip(chain, chain[1:], strict=False):
        if not _issued(certificate, issuer):
            return False
    return any(_issued(chain[-1], root) for root in roots)


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True
