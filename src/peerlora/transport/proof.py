"""How the side that was dialled proves that it holds the key which the member list names.

TLS shows the dialler a certificate of the right site, but gRPC does not show it the key.  So the answer that opens a
session carries a signature by that key over a fresh number of the dialler, both names, and the dialler's key as the
channel showed it: it is worth nothing on any other connection.
"""

from __future__ import annotations

import hashlib
import os

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from peerlora.errors import IdentityError
from peerlora.transport.base import Refused
from peerlora.transport.identity import p256

NONCE = TOKEN = 32  # bytes
_DOMAIN = b"peerlora session 1\n"


def new_nonce() -> bytes:
    """A number that nobody can guess, used once."""
    return os.urandom(NONCE)


def prove(key_pem: bytes, nonce: bytes, token: bytes, dialled: str, dialler: str, dialler_key: str) -> bytes:
    """The answer to a dialler: ``token`` (names the session), the public key's length and DER, the signature."""
    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(_signed(nonce, token, dialled, dialler, dialler_key), ec.ECDSA(hashes.SHA256()))
    return token + len(der).to_bytes(2, "big") + der + signature


def check_proof(answer: bytes, nonce: bytes, dialled: str, listed: str, dialler: str, dialler_key: str) -> bytes:
    """The session's token, if ``answer`` is by the key whose fingerprint is ``listed``; raises Refused."""
    token, rest = answer[:TOKEN], answer[TOKEN:]
    size = int.from_bytes(rest[:2], "big")
    der, signature = rest[2 : 2 + size], rest[2 + size :]
    if hashlib.sha256(der).hexdigest() != listed:
        raise Refused("wrong-proof", f"{dialled} answered with another key than the list's")
    try:
        key = serialization.load_der_public_key(der)
        signed = _signed(nonce, token, dialled, dialler, dialler_key)
        p256(key, dialled).verify(signature, signed, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature, IdentityError):
        raise Refused("wrong-proof", f"{dialled}'s signature does not hold") from None
    return token


def _signed(nonce: bytes, token: bytes, dialled: str, dialler: str, dialler_key: str) -> bytes:
    names = f"{dialled}\n{dialler}\n{dialler_key}\n".encode()
    return _DOMAIN + names + nonce + token
