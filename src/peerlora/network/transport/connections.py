"""Connections to a listening port: how many handshakes failed, and limits on those that no member has made a call over.

gRPC tells of a connection only that it began, so the sockets are found among the process's own file descriptors.
"""

from __future__ import annotations

import os
import resource
import socket
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from ipaddress import IPv6Address, ip_address, ip_network
from time import monotonic
from urllib.parse import unquote

Remote = tuple[str, int]
"""Host and port at the other end."""
PER_MEMBER = 4
"""Connections of one member that count as its own: one for its session, some that are about to end."""
PER_ADDRESS = 64
"""Connections of one address over which no member has made a call."""
IN_ALL = 1024
"""Connections to the port, where the limit of file descriptors allows it."""
_DESCRIPTORS = "/dev/fd"
_MOST_DESCRIPTORS = 65_536


class Handshakes:
    """Counts connections that started and never made a call, because their TLS handshake failed.

    gRPC reports neither their certificates nor what was wrong with them.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self._began: deque[float] = deque(maxlen=10_000)
        self._known: OrderedDict[str, None] = OrderedDict()

    def began(self) -> None:
        """Note that a connection started; called from gRPC's own threads."""
        self._began.append(monotonic())

    def passed(self, address: str) -> None:
        """Note a call over the connection from ``address``."""
        if address in self._known:
            return
        self._known[address] = None
        if len(self._known) > 10_000:
            self._known.popitem(last=False)
        if self._began:
            self._began.popleft()

    def failed(self) -> int:
        """How many have failed since the last call."""
        count = 0
        while self._began and monotonic() - self._began[0] > self.limit:
            self._began.popleft()
            count += 1
        return count


class Connections:
    """Connections to a port that nobody on the member list has made a call over: closed where they are too many or old.

    ``age``: seconds that one may take to its first call.  ``most``: of one address (of IPv6: of one /64).
    """

    def __init__(self, age: float, most: int):
        self.age, self.most = age, most
        self._seen: dict[Remote, float] = {}
        self._members: dict[str, deque[Remote]] = {}

    def prove(self, key: str, caller: str) -> None:
        """Note that the member with this key made a call over the connection that gRPC names ``caller``."""
        own, remote = self._members.setdefault(key, deque(maxlen=PER_MEMBER)), read_remote(caller)
        if not own or own[-1] != remote:
            with suppress(ValueError):
                own.remove(remote)
            own.append(remote)

    def trim(self, port: int) -> int:
        """Close those beyond the limits, the newest first; how many."""
        now, accepted = monotonic(), _accepted(port)
        self._seen = {remote: self._seen.get(remote, now) for remote in accepted}
        proved = {remote for own in self._members.values() for remote in own}
        taken: Counter[str] = Counter()
        closed = 0
        for remote, since in sorted(self._seen.items(), key=lambda item: item[1]):
            if remote in proved:
                continue
            taken[_place(remote[0])] += 1
            if now - since > self.age or taken[_place(remote[0])] > self.most:
                closed += _shut(accepted[remote], remote, port)
        return closed


def read_remote(caller: str) -> Remote:
    """Read gRPC's name of a connection, such as ``ipv4:10.0.0.7:41234``; the name itself and 0 where it is another."""
    host, _, port = unquote(caller).partition(":")[2].rpartition(":")
    try:
        return _plain(host.strip("[]")), int(port)
    except ValueError:
        return caller, 0


def most_connections(members: int) -> int:
    """Connections to the port at once, at most half of the process's file descriptors: a run must open files, too."""
    return min(max(IN_ALL, 4 * members), resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def raise_descriptor_limit() -> None:
    """Use as many file descriptors as the system allows this process without asking."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _accepted(port: int) -> dict[Remote, int]:
    """The file descriptor of every connection that was accepted at ``port``, one looked at after the other."""
    found: dict[Remote, int] = {}
    for name in os.listdir(_DESCRIPTORS):
        with suppress(OSError), _duplicate(int(name)) as each:
            if (remote := _remote_at(each, port)) is not None:
                found.setdefault(remote, int(name))
    return found


def _shut(number: int, remote: Remote, port: int) -> bool:
    """Close a connection, if the file descriptor still is that one's; whether it was.

    Of a duplicate the other end stays the same, whatever gRPC does meanwhile with the number it was made of.
    """
    with suppress(OSError), _duplicate(number) as each:
        if _remote_at(each, port) == remote:
            each.shutdown(socket.SHUT_RDWR)
            return True
    return False


def _duplicate(number: int) -> socket.socket:
    """A duplicate of a file descriptor; raises OSError where it is no socket."""
    copy = os.dup(number)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def _remote_at(each: socket.socket, port: int) -> Remote | None:
    """The other end of a connection to this port; None for any other socket."""
    try:
        if each.family not in (socket.AF_INET, socket.AF_INET6) or each.getsockname()[1] != port:
            return None
        host, there = each.getpeername()[:2]
    except OSError:  # a listening one
        return None
    return _plain(host), there


def _plain(host: str) -> str:
    """An address in one form: IPv4 that came over an IPv6 socket as IPv4."""
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def _place(host: str) -> str:
    """What one owner of an address can choose freely is one place."""
    return str(ip_network(f"{host}/64", strict=False)) if ":" in host else host
