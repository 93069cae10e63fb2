"""Keys for secure sums: they follow from the identity, and a run is refused without the right ones on the list."""

import pytest

from peerlora.config.loading import load_config
from peerlora.errors import IdentityError
from peerlora.network.identity.agreement import agreement_key, agreement_public
from peerlora.network.identity.authority import throwaway
from peerlora.network.identity.identity import load_identity
from peerlora.network.identity.members import add_member, new_list, remove_member, set_agreement
from peerlora.runtime.peer.secure import check_agreement_keys


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consortium")
    listed = throwaway(folder, dict.fromkeys("abc") | {"a": "127.0.0.1:1"})
    return {site: load_identity(folder / site) for site in "abc"}, listed


def config(**settings):
    return load_config({"clients": 3, "topology": "ring", "exchange": {"secure": True}} | settings)


def test_a_key_follows_from_the_identity_and_is_not_it(consortium):
    identities, listed = consortium
    public = {site: agreement_public(identity.key) for site, identity in identities.items()}
    assert len(set(public.values())) == 3
    assert agreement_key(identities["a"].key).public_key().public_bytes_raw().hex() == public["a"]
    assert {member.site: member.agreement for member in listed.members} == public and listed.format == 2
    assert identities["a"].fingerprint not in public.values()


def test_a_run_needs_the_keys_of_all_of_its_sites(consortium):
    identities, listed = consortium
    check_agreement_keys(config(), identities["a"], listed)
    gone = add_member(remove_member(listed, "c"), "c", identities["c"].fingerprint)
    with pytest.raises(IdentityError, match="has none of c; have them added: peerlora members agree"):
        check_agreement_keys(config(), identities["a"], gone)
    check_agreement_keys(config(clients=2, exchange={}), identities["a"], gone)
    old = new_list("old")
    with pytest.raises(IdentityError, match="has none of a"):
        check_agreement_keys(config(), identities["a"], add_member(old, "a", identities["a"].fingerprint))


def test_a_list_with_another_key_of_this_site_is_refused(consortium):
    """Else it would mask with keys that nobody shares, and spoil every sum."""
    identities, listed = consortium
    with pytest.raises(IdentityError, match="names agreement key 0000000000000000 for a, its identity key gives"):
        check_agreement_keys(config(), identities["a"], set_agreement(listed, "a", "0" * 64))
