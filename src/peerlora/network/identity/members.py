"""Signed list of a consortium's members, with key and address.

One JSON file: ``{"list": {...}, "signature": "..."}``.  The signature (Ed25519) covers the list's values in one
canonical form, so the file may be formatted for reading.  An edited list has no signature until it is signed again, as
the next version.  A site keeps its client number for ever: in all versions, and when it returns.

Format 2 names the members' keys for key agreement, of some or of all; a list without any is of format 1, as it was
before these were known.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import UNSET, Meta, UnsetType

from peerlora.display import utc_now
from peerlora.errors import IdentityError, nearest
from peerlora.network.identity.identity import SITE, check_site
from peerlora.network.identity.key_files import read_public, write_over

_DOMAIN = b"peerlora member list 1\n"  # prefix of the signed bytes: a signature over anything else does not fit a list
MOST = 10_000
"""Members, at most, of a list."""
Site = Annotated[str, Meta(pattern=rf"^{SITE.pattern}\Z")]  # \Z: a $ lets a newline at the end through
Moment = Annotated[datetime, Meta(tz=True)]
Number = Annotated[int, Meta(ge=0, lt=MOST)]


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Member of a list: one site."""

    site: Site
    client: Number
    """Client number in the run, from 0; never given to another site."""
    fingerprint: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """SHA-256 of its public key."""
    address: Annotated[str, Meta(max_length=300)] | None = None
    """host:port that others dial; None for a site that only dials."""
    agreement: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | UnsetType = UNSET
    """Public key for key agreement (X25519), which secure sums need; unset: none."""


class MemberList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One version of a member list."""

    name: Annotated[str, Meta(min_length=1, max_length=100)]
    version: Annotated[int, Meta(ge=0, le=2**53)] = 0
    """Version of the last signature; 0 for none."""
    issued: Moment | None = None
    expires: Moment | None = None
    members: Annotated[list[Member], Meta(max_length=MOST)] = []
    former: dict[Site, Number] = {}
    """Client numbers of removed sites."""
    edges: list[tuple[Site, Site]] | None = None
    """Pairs of sites that may talk; None: all pairs."""
    format: Literal[1, 2] = 1
    """2 where a member has a key for key agreement."""

    def member(self, site: str) -> Member:
        """Member of this name; raises IdentityError that names the nearest."""
        for member in self.members:
            if member.site == site:
                return member
        raise IdentityError(
            f"{site!r} is not on the member list {self.name!r} (version {self.version})"
            f"{nearest(site, [member.site for member in self.members])}; expected one of its {len(self.members)} sites"
        )

    def linked(self, one: str, other: str) -> bool:
        """Whether two members may talk."""
        return one != other and (self.edges is None or (one, other) in self.edges or (other, one) in self.edges)

    def expired(self, now: datetime) -> bool:
        """Whether this list admits nobody any more."""
        return self.expires is None or now >= self.expires


class SignedList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a list file."""

    list: MemberList
    signature: Annotated[str, Meta(max_length=200)] | None = None
    """Base64; None for a draft."""


def new_list(name: str) -> MemberList:
    """Create an empty draft."""
    return _checked(MemberList(name))


def add_member(
    members: MemberList,
    site: str,
    fingerprint: str,
    address: str | None = None,
    neighbours: tuple[str, ...] = (),
    agreement: str | None = None,
) -> MemberList:
    """Add a site; with ``neighbours``, edges to them, and from then on only named edges exist.

    ``agreement``: its public key for key agreement, hexadecimal.

    A site that returns gets its old client number.  Raises IdentityError.
    """
    check_site(site)
    if any(member.site == site for member in members.members):
        raise IdentityError(f"{site} is on the list already; for a new key or address remove it first, then add it")
    if address is not None:
        check_address(address)
    taken = [member.client for member in members.members] + list(members.former.values())
    client = members.former.get(site, max(taken, default=-1) + 1)
    edges = members.edges
    if neighbours:
        edges = [*(edges or []), *((members.member(other).site, site) for other in neighbours)]
    former = {name: number for name, number in members.former.items() if name != site}
    member = Member(site, client, fingerprint, address, agreement or UNSET)
    grown = sorted([*members.members, member], key=lambda member: member.client)
    return _checked(_in_format(msgspec.structs.replace(members, members=grown, former=former, edges=edges)))


def set_agreement(members: MemberList, site: str, agreement: str) -> MemberList:
    """Name a member's public key for key agreement, hexadecimal; raises IdentityError."""
    changed = msgspec.structs.replace(members.member(site), agreement=agreement)
    others = [member for member in members.members if member.site != site]
    grown = sorted([*others, changed], key=lambda member: member.client)
    return _checked(_in_format(msgspec.structs.replace(members, members=grown)))


def _in_format(members: MemberList) -> MemberList:
    """The list in the format that its members' keys ask for."""
    return msgspec.structs.replace(members, format=_format_of(members))


def _format_of(members: MemberList) -> Literal[1, 2]:
    return 2 if any(member.agreement is not UNSET for member in members.members) else 1


def remove_member(members: MemberList, site: str) -> MemberList:
    """Remove a site and its edges; its client number stays reserved.  Raises IdentityError."""
    gone = members.member(site)
    edges = None if members.edges is None else [edge for edge in members.edges if site not in edge]
    kept = [member for member in members.members if member.site != site]
    former = members.former | {site: gone.client}
    return _in_format(msgspec.structs.replace(members, members=kept, former=former, edges=edges))


def link_members(members: MemberList, one: str, other: str) -> MemberList:
    """Add an edge; raises IdentityError where the two may talk already."""
    _known(members, one, other)
    if members.edges is None:
        raise IdentityError(
            f"{one} and {other} may talk already: member list {members.name!r} names no edges, so everybody may; "
            "take edges off with `members unlink`"
        )
    if members.linked(one, other):
        raise IdentityError(f"member list {members.name!r} has the edge {one}-{other} already")
    return _checked(msgspec.structs.replace(members, edges=[*members.edges, (one, other)]))


def unlink_members(members: MemberList, one: str, other: str) -> MemberList:
    """Remove an edge; where the list named none, all edges but this one remain.  Raises IdentityError."""
    _known(members, one, other)
    sites = [member.site for member in members.members]
    edges = list(itertools.combinations(sites, 2)) if members.edges is None else members.edges
    kept = [edge for edge in edges if set(edge) != {one, other}]
    if len(kept) == len(edges):
        raise IdentityError(f"member list {members.name!r} has no edge {one}-{other}")
    return _checked(msgspec.structs.replace(members, edges=kept))


def _known(members: MemberList, one: str, other: str) -> None:
    if members.member(one) == members.member(other):
        raise IdentityError(f"{one} given twice; an edge joins two sites")


_LABEL = "[A-Za-z0-9_-]{1,63}"  # between two dots of a host name; resolvers refuse others


def check_address(address: str) -> tuple[str, int]:
    """Parse ``host:port`` or ``[v6]:port``; raises IdentityError."""
    found = re.fullmatch(rf"(\[[0-9a-fA-F:.]+\]|(?=.{{1,254}}:)(?:{_LABEL}\.)*{_LABEL}\.?):(\d{{1,5}})", address)
    if not found or not 0 < int(found[2]) < 65536:
        raise IdentityError(f"address {address!r} given; expected host:port, such as peer.hospital-a.example:7443")
    return found[1].strip("[]"), int(found[2])


def sign_list(members: MemberList, key: Ed25519PrivateKey, valid: timedelta, now: datetime | None = None) -> SignedList:
    """Sign the next version of the list, valid for ``valid`` from ``now``."""
    now = (now or utc_now()).replace(microsecond=0)
    if not members.members:
        raise IdentityError("the member list is empty; add its sites first: peerlora members add")
    if valid <= timedelta(0):
        raise IdentityError(f"validity of {valid} given; expected a time to come")
    ready = msgspec.structs.replace(members, version=members.version + 1, issued=now, expires=now + valid)
    return SignedList(_checked(ready), base64.b64encode(key.sign(canonical(ready))).decode())


def verify_list(
    signed: SignedList, signers: tuple[bytes, ...], now: datetime | None = None, what: str = ""
) -> MemberList:
    """Return the list if one of ``signers`` (Ed25519 public keys) signed it and it is valid at ``now``.

    Raises IdentityError.
    """
    what = what or f"member list {signed.list.name!r}"
    if signed.signature is None:
        raise IdentityError(f"{what} is a draft without signature; have it signed: peerlora members sign")
    if not any(_signed_by(signer, signed) for signer in signers):
        raise IdentityError(f"{what} is not signed by the consortium of trust.pem, or was changed since")
    now = now or utc_now()
    if signed.list.expired(now):
        raise IdentityError(f"{what} expired on {signed.list.expires:%Y-%m-%d %H:%M} UTC; ask for the next version")
    if signed.list.issued is not None and now < signed.list.issued - timedelta(days=1):
        raise IdentityError(f"{what} is from the future ({signed.list.issued}); check this machine's clock")
    return signed.list


def _signed_by(signer: bytes, signed: SignedList) -> bool:
    try:
        signature = base64.b64decode(signed.signature or "", validate=True)
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, canonical(signed.list))
    except (ValueError, InvalidSignature):
        return False
    return True


def canonical(members: MemberList) -> bytes:
    """Encode the bytes to sign: the same for every layout of the file."""
    tree = msgspec.to_builtins(members)
    return _DOMAIN + json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _checked(members: MemberList) -> MemberList:
    """Return the list if its parts are consistent; raises IdentityError."""
    try:
        members = msgspec.convert(msgspec.to_builtins(members), MemberList)
    except msgspec.ValidationError as error:
        raise IdentityError(f"member list: {error}") from None
    sites = [member.site for member in members.members] + list(members.former)
    numbers = [member.client for member in members.members] + list(members.former.values())
    keys = [member.fingerprint for member in members.members]
    agreements = [member.agreement for member in members.members if member.agreement is not UNSET]
    unique = (("site", sites), ("client number", numbers), ("fingerprint", keys), ("agreement key", agreements))
    if members.format != _format_of(members):
        raise IdentityError(
            f"member list: format {members.format} given; one with agreement keys is of format 2, one without of 1"
        )
    for what, values in unique:
        value, times = Counter(values).most_common(1)[0] if values else ("", 0)
        if times > 1:
            raise IdentityError(f"member list: {what} {value} occurs {times} times; each belongs to one site")
    known = {member.site for member in members.members}
    for edge in members.edges or ():
        if edge[0] == edge[1] or not known.issuperset(edge):
            raise IdentityError(f"member list: edge {edge[0]}-{edge[1]} does not join two members")
    for member in members.members:
        if member.address is not None:
            check_address(member.address)
    return members


def read_list(path: Path) -> SignedList:
    """Read a list file, signed or not; raises IdentityError where it is no member list."""
    try:
        signed = msgspec.json.decode(read_public(path, "a member list"), type=SignedList)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise IdentityError(f"{path} is not a member list: {error}") from None
    return SignedList(_checked(signed.list), signed.signature)


def write_list(path: Path, signed: SignedList) -> None:
    """Write a list file atomically."""
    write_over(path, msgspec.json.format(msgspec.json.encode(signed), indent=2) + b"\n")


def load_members(path: Path, signers: tuple[bytes, ...], now: datetime | None = None) -> MemberList:
    """Read and verify a list file; raises IdentityError."""
    return verify_list(read_list(path), signers, now, str(path))
