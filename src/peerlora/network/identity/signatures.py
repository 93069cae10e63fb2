"""Digital signatures by sites' identity keys, over statements that reach their reader through third sites.

A signature is 97 bytes: the signer's public key as a compressed point, and r and s of ECDSA over P-256 with SHA-256.
The key goes along since the member list holds its fingerprint only.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from peerlora.errors import IdentityError
from peerlora.network.base import PeerId, Refused
from peerlora.network.identity.identity import Identity, fingerprint_of
from peerlora.network.identity.roster import Roster

_DOMAIN = b"peerlora statement 1\n"  # prefix of what is signed: no proof of a session, no certificate begins like this
_POINT, _SCALAR = 33, 32  # bytes of a compressed point of P-256, and of a number below its order


class SiteSignatures:
    """Signs as one site, and verifies others by the keys of the current member list; see ``Signatures``.

    ``identity`` returns the identity that is in use: a certificate may be renewed while a run goes on.
    """

    size = _POINT + 2 * _SCALAR

    def __init__(self, identity: Callable[[], Identity], roster: Roster):
        self.identity, self.roster = identity, roster

    def sign(self, statement: bytes) -> bytes:
        """See Signatures."""
        key = serialization.load_pem_private_key(self.identity().key, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        form = serialization.PublicFormat.CompressedPoint
        point = key.public_key().public_bytes(serialization.Encoding.X962, form)
        r, s = decode_dss_signature(key.sign(_DOMAIN + statement, ec.ECDSA(hashes.SHA256())))
        return point + r.to_bytes(_SCALAR, "big") + s.to_bytes(_SCALAR, "big")

    def verify(self, site: PeerId, statement: bytes, signature: bytes) -> None:
        """See Signatures."""
        listed = self._listed(site)
        if listed is None:
            raise Refused("unknown-origin", f"{site} is not on the member list")
        key = _key(signature)
        if key is None or fingerprint_of(key) != listed:
            raise Refused("bad-signature", f"not by the key that the member list names for {site}")
        r, s = (int.from_bytes(part, "big") for part in (signature[_POINT:-_SCALAR], signature[-_SCALAR:]))
        try:
            key.verify(encode_dss_signature(r, s), _DOMAIN + statement, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise Refused("bad-signature", f"{site} did not sign this") from None

    def current(self, site: PeerId, signature: bytes) -> bool:
        """See Signatures."""
        key, listed = _key(signature), self._listed(site)
        return key is not None and fingerprint_of(key) == listed

    def _listed(self, site: PeerId) -> str | None:
        """Fingerprint of a site's key; None for one that is not on the list any more."""
        try:
            return self.roster.members.member(site).fingerprint
        except IdentityError:
            return None


def _key(signature: bytes) -> ec.EllipticCurvePublicKey | None:
    """The public key that a signature brings along; None where it is none of these signatures."""
    if len(signature) != SiteSignatures.size:
        return None
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), signature[:_POINT])
    except ValueError:
        return None
