"""The commands of docs/deploy.md, one after the other."""

import json
import shutil
import stat

import pytest

SITES = ("hospital-a", "hospital-b")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder of which every test gets a copy."""
    return tmp_path_factory.mktemp("consortium")


@pytest.fixture
def consortium(cli, original, tmp_path):
    """Two sites with identities and a signed list, made by commands only."""
    if not any(original.iterdir()):
        found_consortium(cli, original)
    return shutil.copytree(original, tmp_path, dirs_exist_ok=True)


def found_consortium(cli, tmp_path):
    office = tmp_path / "authority"
    assert cli("identity", "new", office, "--as-authority", "Five Hospitals").code == 0
    assert cli("members", "new", tmp_path / "members.json", "--name", "five-hospitals").code == 0
    for number, site in enumerate(SITES):
        folder, sent, signed = tmp_path / site, tmp_path / f"{site}.csr", tmp_path / f"{site}.pem"
        made = json.loads(cli("identity", "new", folder, "--site", site, "--json").out)
        asked = cli("identity", "request", folder, "--to", sent)
        assert made["fingerprint"] in asked.out
        answer = cli("identity", "sign", sent, "--authority", office, "--to", signed, "--days", 30)
        assert answer.code == 0 and made["fingerprint"] in answer.out and "30 days" in answer.out
        shutil.copy(signed, folder / "certificate.pem")
        shutil.copy(office / "trust.pem", folder / "trust.pem")
        address = ["--address", f"{site}.example:7443"] if number == 0 else []
        add = cli("members", "add", tmp_path / "members.json", "--site", site, "--certificate", signed, *address)
        assert add.code == 0, add.err
    assert cli("members", "sign", tmp_path / "members.json", "--authority", office).code == 0


def test_a_consortium_is_made_by_commands(consortium, cli):
    shown = json.loads(cli("identity", "show", consortium / "hospital-a", "--json").out)
    assert shown["site"] == "hospital-a" and 28 <= shown["days_left"] <= 30
    verified = cli("members", "verify", consortium / "members.json", "--trust", consortium / "hospital-a/trust.pem")
    assert verified.code == 0 and "version 1, 2 sites" in verified.out
    listed = cli("members", "show", consortium / "members.json").out
    assert "hospital-a.example:7443" in listed and "dials only" in listed and shown["fingerprint"] in listed
    for private in ("authority/ca-key.pem", "authority/list-key.pem", "hospital-a/key.pem"):
        assert stat.S_IMODE((consortium / private).stat().st_mode) == 0o600


def test_a_site_is_removed_and_comes_back_with_its_number(consortium, cli):
    file, trust = consortium / "members.json", consortium / "authority/trust.pem"
    assert cli("members", "remove", file, "--site", "hospital-a").code == 0
    draft = cli("members", "verify", file, "--trust", trust)
    assert draft.code == 2 and "draft without signature" in draft.err
    assert (
        json.loads(cli("members", "sign", file, "--authority", consortium / "authority", "--json").out)["version"] == 2
    )
    assert cli("members", "verify", file, "--trust", trust).code == 0
    key = "ab" * 32
    back = cli("members", "add", file, "--site", "hospital-a", "--fingerprint", key, "--json")
    numbers = {member["site"]: member["client"] for member in json.loads(back.out)["members"]}
    assert numbers == {"hospital-a": 0, "hospital-b": 1}


def test_edges_are_edited(consortium, cli):
    file = consortium / "members.json"
    cut = cli("members", "unlink", file, *SITES, "--json")
    assert json.loads(cut.out)["edges"] == []
    assert "edges: none" in cli("members", "show", file).out
    assert cli("members", "link", file, *SITES).code == 0
    shown = cli("members", "show", file).out
    assert "a draft" in shown and "edges: hospital-a-hospital-b" in shown
    assert cli("members", "sign", file, "--authority", consortium / "authority").code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["identity", "new", "x"], ["exactly one of --site", "--as-authority"]),
        (["identity", "new", "x", "--site", "Hospital A"], ["'Hospital A'", "hospital-a"]),
        (["identity", "new", "hospital-a", "--site", "hospital-a"], ["key.pem exists already", "never overwritten"]),
        (["identity", "request", "nowhere", "--to", "r.csr"], ["nowhere/site.json", "identity new"]),
        (["identity", "request", "hospital-a", "--to", "hospital-a.csr"], ["hospital-a.csr exists already"]),
        (
            ["identity", "sign", "members.json", "--authority", "authority", "--to", "c.pem"],
            ["request is not readable"],
        ),
        (
            ["identity", "sign", "hospital-a.csr", "--authority", "authority", "--to", "c.pem", "--days", "365"],
            ["365 days", "30 to 90"],
        ),
        (["identity", "show", "authority"], ["authority/key.pem cannot be read"]),
        (["members", "new", "members.json", "--name", "x"], ["members.json exists already"]),
        (["members", "show", "hospital-a.csr"], ["hospital-a.csr is not a member list"]),
        (["members", "add", "members.json", "--site", "x"], ["exactly one of --certificate"]),
        (
            ["members", "add", "members.json", "--site", "x", "--fingerprint", "12"],
            ["regex", "fingerprint"],
        ),
        (
            ["members", "add", "members.json", "--site", "hospital-a", "--fingerprint", "ab" * 32],
            ["on the list already", "remove it first"],
        ),
        (
            ["members", "add", "members.json", "--site", "x", "--fingerprint", "ab" * 32, "--address", "x"],
            ["address 'x'", "host:port"],
        ),
        (
            ["members", "add", "members.json", "--site", "hospital-c", "--certificate", "hospital-a.pem"],
            ["hospital-a.pem is for site hospital-a", "--site hospital-c"],
        ),
        (["members", "link", "members.json", "hospital-a", "hospital-b"], ["everybody may", "members unlink"]),
        (["members", "unlink", "members.json", "hospital-a", "hospital-c"], ["'hospital-c'", "did you mean"]),
        (["members", "remove", "members.json", "--site", "hospital-c"], ["'hospital-c'", "did you mean"]),
        (["members", "sign", "members.json", "--authority", "hospital-a"], ["list-key.pem cannot be read"]),
        (["members", "verify", "members.json", "--trust", "hospital-a.pem"], ["no Ed25519 public key"]),
    ],
)
def test_mistakes_get_one_message_and_change_nothing(consortium, cli, monkeypatch, words, told):
    monkeypatch.chdir(consortium)
    before = {path: path.read_bytes() for path in consortium.rglob("*") if path.is_file()}
    answer = cli(*words)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert all(text in answer.err for text in told), answer.err
    assert {path: path.read_bytes() for path in consortium.rglob("*") if path.is_file()} == before


def test_without_the_extra_one_message_says_how_to_get_it(cli, monkeypatch, tmp_path):
    from peerlora import environment as packages

    monkeypatch.setitem(packages.EXTRAS, "peer", ("grpc", "no_such_module"))
    for group in ("identity", "members"):
        answer = cli(group, "show", tmp_path)
        assert answer.code == 2 and "no_such_module" in answer.err and "pip install '.[peer]'" in answer.err


def test_agreement_keys_come_to_the_list_by_commands(consortium, cli):
    file = consortium / "members.json"
    shown = json.loads(cli("identity", "show", consortium / "hospital-a", "--json").out)
    asked = json.loads(
        cli("identity", "request", consortium / "hospital-a", "--to", consortium / "again.csr", "--json").out
    )
    assert shown["agreement"] == asked["agreement"] and len(shown["agreement"]) == 64
    assert shown["agreement"] in cli("identity", "show", consortium / "hospital-a").out
    agreed = cli("members", "agree", file, "--site", "hospital-a", "--agreement", shown["agreement"], "--json")
    listed = json.loads(agreed.out)
    assert listed["format"] == 2 and listed["members"][0]["agreement"] == shown["agreement"]
    assert "agreement" not in listed["members"][1]
    assert cli("members", "show", file).out.count("agreement key") == 1
    bad = cli("members", "agree", file, "--site", "hospital-a", "--agreement", "short")
    assert bad.code == 2 and "member list" in bad.err
    assert cli("members", "sign", file, "--authority", consortium / "authority").code == 0
    assert cli("members", "verify", file, "--trust", consortium / "authority/trust.pem").code == 0
