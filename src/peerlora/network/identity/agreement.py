"""Key agreement between the sites of a member list, for secrets of two sites that no third one can compute.

Every site has a long-term X25519 key, which follows from its identity key and whose public part stands on the member
list; and another one for as long as its process lives, whose public part travels through other sites.  A pair's key
comes from both agreements: the first makes it secret from a third site that passes on false session keys, the second
makes it differ from process to process, and secret even where long-term keys become known later.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from peerlora.network.base import PeerId, Refused

SIZE = 32
"""Bytes of a public key, and of a pair's key."""
_LONG_TERM, _PAIR = b"peerlora agreement key 1", b"peerlora pair key 1"
_MOST = 20_000  # agreements that are remembered: each takes 50 microseconds to compute again


def agreement_key(pem: bytes) -> X25519PrivateKey:
    """Derive a site's long-term key for key agreement from its identity key (PEM)."""
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    scalar = key.private_numbers().private_value.to_bytes(32, "big")
    return X25519PrivateKey.from_private_bytes(derived(scalar, _LONG_TERM))


def agreement_public(pem: bytes) -> str:
    """Public part of ``agreement_key``, hexadecimal, as the member list holds it."""
    return agreement_key(pem).public_key().public_bytes_raw().hex()


def derived(secret: bytes, context: bytes) -> bytes:
    """Derive a key from a secret for one purpose (HKDF with SHA-256)."""
    return HKDF(hashes.SHA256(), SIZE, salt=None, info=context).derive(secret)


class SiteAgreement:
    """Computes pair keys as one site; see ``KeyAgreement``.

    ``long_term``: its own key.  ``listed``: from a site to its public one on the current member list, hexadecimal.
    """

    def __init__(self, long_term: X25519PrivateKey, listed: Callable[[PeerId], str | None]):
        self.listed, self._long_term = listed, long_term
        self._session = X25519PrivateKey.generate()
        self.session_key = self._session.public_key().public_bytes_raw()
        """Public part of this process's key."""
        self._agreed: dict[tuple[str, bytes], bytes] = {}

    def pair_key(self, site: PeerId, session_key: bytes, context: bytes) -> bytes:
        """See KeyAgreement."""
        listed = self.listed(site)
        if listed is None:
            raise Refused("not-a-member", f"the member list names no key for secure sums of {site}")
        agreed = self._agreed.get((listed, session_key))
        if agreed is None:
            if len(self._agreed) >= _MOST:
                self._agreed.clear()
            agreed = self._agreed[listed, session_key] = self._agree(site, bytes.fromhex(listed), session_key)
        return derived(agreed, _PAIR + context)

    def _agree(self, site: PeerId, long_term: bytes, session_key: bytes) -> bytes:
        try:
            first = self._long_term.exchange(X25519PublicKey.from_public_bytes(long_term))
            return first + self._session.exchange(X25519PublicKey.from_public_bytes(session_key))
        except ValueError:  # another length, or a point of small order
            raise Refused("bad-body", f"no usable key for secure sums of {site}") from None
