"""Roster of a running site: the newest member list that it has seen, checked at every message."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from peerlora.display import utc_now
from peerlora.errors import IdentityError
from peerlora.network.base import PeerId, Refused
from peerlora.network.identity.key_files import write_over
from peerlora.network.identity.members import MemberList, canonical


class Roster:
    """The current list, for the site ``me``, whose key has ``fingerprint``.

    ``folder``: the identity's folder, which stores the newest version across restarts.  Raises IdentityError when
    the site is not on the list under its key, or the list is older than one seen before.
    """

    def __init__(
        self,
        me: str,
        fingerprint: str,
        members: MemberList,
        folder: Path | None = None,
        clock: Callable[[], datetime] = utc_now,
    ):
        self.me, self.fingerprint, self.folder, self.clock = me, fingerprint, folder, clock
        self._only: frozenset[PeerId] | None = None
        self.members = self._accept(members, None)

    def keep_to(self, sites: Iterable[PeerId]) -> None:
        """Of all members that may talk to this site, dial and admit only these: its neighbours in a run."""
        self._only = frozenset(sites)

    def replace(self, members: MemberList) -> None:
        """Replace the list by a newer one; raises IdentityError for an older one, or for one of another consortium."""
        self.members = self._accept(members, self.members)

    def knows(self, fingerprint: str) -> bool:
        """Whether this is a member's key."""
        return fingerprint in self._sites

    def admit(self, fingerprint: str) -> PeerId:
        """Find the site with this key; raises Refused unless it may talk to this one now."""
        found = self._sites.get(fingerprint)
        if found is None:
            raise Refused("not-a-member", f"key {fingerprint[:16]}")
        self.check(found)
        return found

    def check(self, site: PeerId) -> None:
        """Raise Refused unless ``site`` may talk to this one now."""
        if self.members.expired(self.clock()):
            raise Refused("list-expired", f"version {self.members.version}")
        if site not in self._names:
            raise Refused("not-a-member", site)
        if not self._linked(site):
            raise Refused("not-a-neighbour", site)

    def agreement(self, site: PeerId) -> str | None:
        """Public key of a member for key agreement, hexadecimal; None where the current list names none."""
        return next((each.agreement or None for each in self.members.members if each.site == site), None)

    def others(self) -> list[PeerId]:
        """All members that may talk to this one, of those given to ``keep_to``."""
        return [member.site for member in self.members.members if self._linked(member.site)]

    def _linked(self, site: PeerId) -> bool:
        return self.members.linked(self.me, site) and (self._only is None or site in self._only)

    def dials(self, site: PeerId) -> bool:
        """Whether this end of an edge dials: where both can be dialled, the one first in the alphabet does."""
        mine, theirs = self.members.member(self.me).address, self.members.member(site).address
        return theirs is not None and (mine is None or self.me < site)

    def _accept(self, members: MemberList, before: MemberList | None) -> MemberList:
        own = members.member(self.me)
        if own.fingerprint != self.fingerprint:
            raise IdentityError(
                f"the member list names key {own.fingerprint[:16]} for {self.me}, its folder holds "
                f"{self.fingerprint[:16]}; have the list changed, or use the right folder"
            )
        digest = hashlib.sha256(canonical(members)).hexdigest()
        seen = self._read_seen()
        if before is not None:
            seen |= {before.name: {"version": before.version, "sha256": hashlib.sha256(canonical(before)).hexdigest()}}
            if before.name != members.name:
                raise IdentityError(f"member list {members.name!r} given while {before.name!r} is in force")
        newest = seen.get(members.name, {"version": -1, "sha256": ""})
        if members.version < newest["version"]:
            raise IdentityError(
                f"member list {members.name!r} version {members.version} given, version {newest['version']} was seen "
                "before; use the newest"
            )
        if members.version == newest["version"] and digest != newest["sha256"]:
            raise IdentityError(
                f"there are two different versions {members.version} of member list {members.name!r}; "
                "ask the consortium which one holds"
            )
        if self.folder is not None and members.version > newest["version"]:
            text = json.dumps(seen | {members.name: {"version": members.version, "sha256": digest}})
            path = self.folder / "lists.json"
            write_over(path, text.encode() + b"\n")
        self._names = {member.site for member in members.members}
        self._sites = {member.fingerprint: member.site for member in members.members}
        return members

    def _read_seen(self) -> dict:
        """Newest version seen of every list, by its name."""
        if self.folder is None or not (self.folder / "lists.json").is_file():
            return {}
        try:
            return {
                str(name): {"version": int(entry["version"]), "sha256": str(entry["sha256"])}
                for name, entry in json.loads((self.folder / "lists.json").read_text()).items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            raise IdentityError(f"{self.folder / 'lists.json'} is damaged; restore it from a backup") from None
