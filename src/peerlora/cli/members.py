"""``peerlora members``: the signed list of participants."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peerlora.cli.options import AsJson, print_json
from peerlora.environment import need_extra

if TYPE_CHECKING:
    from collections.abc import Callable

    from peerlora.network.identity.members import MemberList

app = typer.Typer(help="The signed list of who takes part.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="the member list")]
Site = Annotated[str, typer.Option("--site", help="the site's name")]
One = Annotated[str, typer.Argument(metavar="SITE", help="a site on the list")]
Agreement = typer.Option("--agreement", help="the site's key for secure sums (exchange.secure)")
Other = Annotated[str, typer.Argument(metavar="SITE", help="another one")]


@app.callback()
def _needs() -> None:
    need_extra("peer")


@app.command()
def new(
    file: File,
    name: Annotated[str, typer.Option("--name", help="the consortium's name")],
    json: AsJson = False,
) -> None:
    """Start an empty list."""
    from peerlora.errors import IdentityError
    from peerlora.network.identity.members import SignedList, new_list, write_list

    if file.exists():
        raise IdentityError(f"{file} exists already; change it with `members add` and `members remove`")
    write_list(file, SignedList(new_list(name)))
    _print(new_list(name), file, json)


@app.command()
def add(
    file: File,
    site: Site,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="the site's certificate")] = None,
    fingerprint: Annotated[str | None, typer.Option("--fingerprint", help="or its key's fingerprint")] = None,
    address: Annotated[str | None, typer.Option("--address", help="host:port; none for a site that only dials")] = None,
    neighbour: Annotated[
        list[str] | None, typer.Option("--neighbour", help="allow this edge, and others no more")
    ] = None,
    agreement: Annotated[str | None, Agreement] = None,
    json: AsJson = False,
) -> None:
    """Add a site; the list must be signed again afterwards."""
    from peerlora.errors import ConfigError, IdentityError
    from peerlora.network.identity.identity import certificate_fingerprint, certificate_site
    from peerlora.network.identity.key_files import read_public
    from peerlora.network.identity.members import add_member

    if (certificate is None) == (fingerprint is None):
        raise ConfigError("members add needs exactly one of --certificate FILE and --fingerprint HEX")
    if certificate is not None:
        pem = read_public(certificate, "a certificate", most=100_000)
        if (named := certificate_site(pem)) != site:
            raise IdentityError(f"{certificate} is for site {named}, --site {site} given; use the right certificate")
        fingerprint = certificate_fingerprint(pem)
    key = fingerprint or ""
    _edit(file, lambda members: add_member(members, site, key, address, tuple(neighbour or ()), agreement), json)


@app.command()
def agree(
    file: File,
    site: Site,
    agreement: Annotated[str, Agreement],
    json: AsJson = False,
) -> None:
    """Name the agreement key of a site on the list; the list must be signed again afterwards."""
    from peerlora.network.identity.members import set_agreement

    _edit(file, lambda members: set_agreement(members, site, agreement), json)


@app.command()
def remove(file: File, site: Site, json: AsJson = False) -> None:
    """Remove a site; the list must be signed again and handed out afterwards."""
    from peerlora.network.identity.members import remove_member

    _edit(file, lambda members: remove_member(members, site), json)


@app.command()
def link(file: File, one: One, other: Other, json: AsJson = False) -> None:
    """Let two sites of a list with named edges talk; the list must be signed again afterwards."""
    from peerlora.network.identity.members import link_members

    _edit(file, lambda members: link_members(members, one, other), json)


@app.command()
def unlink(file: File, one: One, other: Other, json: AsJson = False) -> None:
    """Take the edge between two sites off the list; the list must be signed again afterwards."""
    from peerlora.network.identity.members import unlink_members

    _edit(file, lambda members: unlink_members(members, one, other), json)


def _edit(file: Path, change: "Callable[[MemberList], MemberList]", json: bool) -> None:
    """Write the changed list as a draft."""
    from peerlora.network.identity.members import SignedList, read_list, write_list

    changed = change(read_list(file).list)
    write_list(file, SignedList(changed))
    _print(changed, file, json)


@app.command()
def sign(
    file: File,
    authority: Annotated[Path, typer.Option("--authority", help="the authority's folder")],
    days: Annotated[int, typer.Option("--days", min=1, max=366, help="how long the list is valid")] = 90,
    json: AsJson = False,
) -> None:
    """Sign the list as its next version."""
    from peerlora.network.identity.authority import list_signer
    from peerlora.network.identity.members import read_list, sign_list, write_list

    signed = sign_list(read_list(file).list, list_signer(authority), timedelta(days=days))
    write_list(file, signed)
    _print(signed.list, file, json)


@app.command()
def verify(
    file: File,
    trust: Annotated[Path, typer.Option("--trust", help="the consortium's trust.pem")],
    json: AsJson = False,
) -> None:
    """Check signature and validity; exit code 2 where they don't hold."""
    from peerlora.network.identity.identity import read_trust
    from peerlora.network.identity.key_files import read_public
    from peerlora.network.identity.members import load_members

    _, signers = read_trust(read_public(trust, "the consortium's trust.pem"), str(trust))
    members = load_members(file, signers)
    if not json:
        print(f"{file} is signed and in force")
    _print(members, file, json)


@app.command()
def show(file: File, json: AsJson = False) -> None:
    """Print the list, without checking its signature."""
    from peerlora.network.identity.members import read_list

    signed = read_list(file)
    if not json:
        print("signed; not checked here" if signed.signature else "a draft: not signed")
        for member in signed.list.members:
            print(f"{member.client:4}  {member.site:24} {member.address or 'dials only':32} {member.fingerprint}")
            if member.agreement:
                print(f"{'':30} {'agreement key':32} {member.agreement}")
        if signed.list.edges is not None:
            print("edges: " + (", ".join(f"{one}-{other}" for one, other in signed.list.edges) or "none"))
    _print(signed.list, file, json)


def _print(members: "MemberList", file: Path, json: bool) -> None:
    """Say which list this is."""
    if json:
        import msgspec

        print_json({"file": str(file)} | msgspec.to_builtins(members))
        return
    until = f"valid until {members.expires:%Y-%m-%d %H:%M} UTC" if members.expires else "never signed"
    print(f"{members.name}: version {members.version}, {len(members.members)} sites, {until}")
