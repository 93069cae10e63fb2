"""Proof by the dialled side that it holds the key which the member list names.

TLS shows the dialler a certificate of the right site, but gRPC does not expose its key.  So the answer that opens a
session carries a signature by that key over a nonce of the dialler, both names, and the dialler's key as the channel
showed it: it is invalid on any other connection.  It also holds the expiry of the certificate that TLS has accepted,
since a connection may outlive it.
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from peerlora.errors import IdentityError
from peerlora.network.base import Refused
from peerlora.network.identity.identity import Identity, p256

NONCE = TOKEN = 32  # bytes
_END = 8  # bytes of the certificate's expiry
_DOMAIN = b"peerlora session 2\n"
_LATEST = int(datetime(9999, 1, 1, tzinfo=UTC).timestamp())


def new_nonce() -> bytes:
    """Draw a random nonce."""
    return os.urandom(NONCE)


def prove(me: Identity, nonce: bytes, token: bytes, dialler: str, dialler_key: str) -> bytes:
    """Sign the answer to a dialler.

    It holds ``token`` (of the session), the certificate's expiry (seconds since 1970), the public key's length and
    DER, and the signature.
    """
    key = serialization.load_pem_private_key(me.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    claims = token + int(me.expires.timestamp()).to_bytes(_END, "big")
    signature = key.sign(_signed(nonce, claims, me.site, dialler, dialler_key), ec.ECDSA(hashes.SHA256()))
    return claims + len(der).to_bytes(2, "big") + der + signature


def check_proof(
    answer: bytes, nonce: bytes, dialled: str, listed: str, dialler: str, dialler_key: str
) -> tuple[bytes, datetime]:
    """Verify the answer: the session's token, and the expiry of the certificate of ``dialled``.

    Raises Refused unless ``answer`` is by the key whose fingerprint is ``listed``.
    """
    claims, rest = answer[: TOKEN + _END], answer[TOKEN + _END :]
    size = int.from_bytes(rest[:2], "big")
    der, signature = rest[2 : 2 + size], rest[2 + size :]
    if hashlib.sha256(der).hexdigest() != listed:
        raise Refused("wrong-proof", f"{dialled} answered with another key than the list's")
    try:
        key = serialization.load_der_public_key(der)
        signed = _signed(nonce, claims, dialled, dialler, dialler_key)
        p256(key, dialled).verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature, IdentityError):
        raise Refused("wrong-proof", f"{dialled}'s signature does not hold") from None
    end = min(int.from_bytes(claims[TOKEN:], "big"), _LATEST)
    return claims[:TOKEN], datetime.fromtimestamp(end, UTC)


def _signed(nonce: bytes, claims: bytes, dialled: str, dialler: str, dialler_key: str) -> bytes:
    names = f"{dialled}\n{dialler}\n{dialler_key}\n".encode()
    return _DOMAIN + names + nonce + claims
