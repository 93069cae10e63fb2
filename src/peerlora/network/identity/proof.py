"""How the side that was dialled proves that it holds the key which the member list names.

TLS shows the dialler a certificate of the right site, but gRPC does not show it the key.  So the answer that opens a
session carries a signature by that key over a fresh number of the dialler, both names, and the dialler's key as the
channel showed it: it is worth nothing on any other connection.  It says, too, when the certificate ends that TLS has
accepted, since a connection may outlive it.
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
_END = 8
_DOMAIN = b"peerlora session 2\n"
_LATEST = int(datetime(9999, 1, 1, tzinfo=UTC).timestamp())


def new_nonce() -> bytes:
    """A number that nobody can guess, used once."""
    return os.urandom(NONCE)


def prove(me: Identity, nonce: bytes, token: bytes, dialler: str, dialler_key: str) -> bytes:
    """The answer to a dialler.

    ``token`` (names the session), the certificate's end (seconds since 1970), the public key's length and DER, the
    signature.
    """
    key = serialization.load_pem_private_key(me.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    said = token + int(me.expires.timestamp()).to_bytes(_END, "big")
    signature = key.sign(_signed(nonce, said, me.site, dialler, dialler_key), ec.ECDSA(hashes.SHA256()))
    return said + len(der).to_bytes(2, "big") + der + signature


def check_proof(
    answer: bytes, nonce: bytes, dialled: str, listed: str, dialler: str, dialler_key: str
) -> tuple[bytes, datetime]:
    """The session's token, and the end of the certificate of ``dialled``.

    Raises Refused unless ``answer`` is by the key whose fingerprint is ``listed``.
    """
    said, rest = answer[: TOKEN + _END], answer[TOKEN + _END :]
    size = int.from_bytes(rest[:2], "big")
    der, signature = rest[2 : 2 + size], rest[2 + size :]
    if hashlib.sha256(der).hexdigest() != listed:
        raise Refused("wrong-proof", f"{dialled} answered with another key than the list's")
    try:
        key = serialization.load_der_public_key(der)
        signed = _signed(nonce, said, dialled, dialler, dialler_key)
        p256(key, dialled).verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature, IdentityError):
        raise Refused("wrong-proof", f"{dialled}'s signature does not hold") from None
    end = min(int.from_bytes(said[TOKEN:], "big"), _LATEST)
    return said[:TOKEN], datetime.fromtimestamp(end, UTC)


def _signed(nonce: bytes, said: bytes, dialled: str, dialler: str, dialler_key: str) -> bytes:
    names = f"{dialled}\n{dialler}\n{dialler_key}\n".encode()
    return _DOMAIN + names + nonce + said
