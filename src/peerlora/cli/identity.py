"""``peerlora identity``: a site's key and certificate; a consortium's authority."""

from pathlib import Path
from typing import Annotated

import typer

from peerlora.cli.options import AsJson, print_json
from peerlora.display import utc_now
from peerlora.environment import need_extra

app = typer.Typer(help="Keys and certificates of a site, and a small authority that signs them.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="the identity's folder")]
Authority = Annotated[Path, typer.Option("--authority", help="the authority's folder")]


@app.callback()
def _needs() -> None:
    need_extra("peer")


@app.command()
def new(
    folder: Folder,
    site: Annotated[str | None, typer.Option("--site", help="the site's name: a-z, 0-9 and hyphens")] = None,
    authority: Annotated[
        str | None, typer.Option("--as-authority", help="make a consortium's authority of this name instead")
    ] = None,
    json: AsJson = False,
) -> None:
    """Make a site's key, which never leaves FOLDER; or the keys of a consortium's authority."""
    from peerlora.errors import ConfigError
    from peerlora.network.identity.authority import new_authority
    from peerlora.network.identity.identity import new_identity

    if site is not None and authority is None:
        fingerprint = new_identity(folder, site)
        if json:
            print_json({"site": site, "fingerprint": fingerprint, "folder": str(folder)})
        else:
            print(f"made {folder}/key.pem for {site}; fingerprint {fingerprint}")
            print(f"next: peerlora identity request {folder} --to {site}.csr")
    elif authority is not None and site is None:
        new_authority(folder, authority)
        if json:
            print_json({"authority": authority, "folder": str(folder)})
        else:
            print(f"made the authority {authority!r} in {folder}: keep this folder offline")
            print(f"every site gets {folder}/trust.pem")
    else:
        raise ConfigError("identity new needs exactly one of --site NAME and --as-authority NAME")


@app.command()
def request(
    folder: Folder,
    to: Annotated[Path, typer.Option("--to", help="the request file to write; must be new")],
    json: AsJson = False,
) -> None:
    """Write a certificate request for the authority."""
    from peerlora.network.identity.agreement import agreement_public
    from peerlora.network.identity.identity import fingerprint_of, private_pem, read_key, read_site
    from peerlora.network.identity.identity import request as make
    from peerlora.network.identity.key_files import write_new

    site, key = read_site(folder), read_key(folder / "key.pem")
    fingerprint, agreement = fingerprint_of(key.public_key()), agreement_public(private_pem(key))
    write_new(to, make(folder))
    if json:
        print_json({"site": site, "fingerprint": fingerprint, "agreement": agreement, "to": str(to)})
        return
    print(f"wrote {to} for {site}; send it to the authority, and tell them by another way, such as a call:")
    print(f"fingerprint {fingerprint}")
    print(f"agreement   {agreement}  (for runs with exchange.secure)")


@app.command()
def sign(
    request: Annotated[Path, typer.Argument(help="a site's certificate request")],
    authority: Authority,
    to: Annotated[Path, typer.Option("--to", help="the certificate file to write; must be new")],
    days: Annotated[int, typer.Option("--days", help="how long it is valid: 30 to 90")] = 60,
    json: AsJson = False,
) -> None:
    """Sign a site's request, as the authority, after asking the site for its fingerprint."""
    from peerlora.network.identity.authority import sign_request
    from peerlora.network.identity.key_files import read_public, write_new

    pem = read_public(request, "a certificate request", most=100_000)
    site, fingerprint, certificate = sign_request(authority, pem, days)
    write_new(to, certificate)
    if json:
        print_json({"site": site, "fingerprint": fingerprint, "days": days, "to": str(to)})
        return
    print(f"wrote {to}: {site} for {days} days; fingerprint {fingerprint}")
    print("hand it out only if the site names the same fingerprint; it goes to certificate.pem in the site's folder")


@app.command()
def show(folder: Folder, json: AsJson = False) -> None:
    """Check an identity and say whose it is and how long it is valid."""
    from peerlora.network.identity.agreement import agreement_public
    from peerlora.network.identity.identity import load_identity

    identity = load_identity(folder)
    agreement = agreement_public(identity.key)
    left = (identity.expires - utc_now()).days
    if json:
        facts = {"site": identity.site, "fingerprint": identity.fingerprint, "agreement": agreement, "days_left": left}
        print_json(facts | {"expires": identity.expires.isoformat()})
        return
    print(f"{identity.site}: fingerprint {identity.fingerprint}")
    print(f"agreement {agreement} (for runs with exchange.secure)")
    print(f"certificate valid until {identity.expires:%Y-%m-%d %H:%M} UTC, {left} days from now")
