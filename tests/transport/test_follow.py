import asyncio
from datetime import timedelta

import pytest
from rigs import SITES, GrpcRig, free_port

from peerlora.transport.authority import issue, list_signer, throwaway
from peerlora.transport.follow import follow
from peerlora.transport.identity import read_key
from peerlora.transport.members import SignedList, remove_member, sign_list, write_list


@pytest.fixture
def rig(tmp_path):
    throwaway(tmp_path, {site: None if site == "c" else f"127.0.0.1:{free_port()}" for site in SITES}, "test")
    return GrpcRig(tmp_path)


def test_a_new_list_and_a_renewed_certificate_are_taken_up_while_the_peer_runs(rig, caplog):
    folder = rig.folder

    async def scenario(rig):
        await rig.all_up()
        a = rig.transports["a"]
        following = asyncio.ensure_future(follow(a, folder / "a", folder / "members.json", every=0.05))
        await asyncio.sleep(0.1)
        public = read_key(folder / "a/key.pem").public_key()
        (folder / "a/certificate.pem").write_bytes(issue(folder / "authority", public, "a", timedelta(days=80)))
        await rig.until(lambda: a.identity.certificate == (folder / "a/certificate.pem").read_bytes())
        await rig.until(lambda: rig.edge("a", "b") and rig.edge("b", "a") and rig.edge("a", "c"))

        shorter = remove_member(rig.members, "c")
        write_list(folder / "members.json", SignedList(shorter))  # a draft is not taken up
        await rig.until(lambda: "draft without signature" in caplog.text)
        assert rig.edge("a", "c") and not following.done()
        write_list(folder / "members.json", sign_list(shorter, list_signer(folder / "authority"), timedelta(days=30)))
        await rig.until(lambda: a.roster.members.version == 2 and not rig.edge("a", "c"))
        await rig.until(lambda: any("not-a-member" in text for _, _, text in rig.told["c"]))
        await rig.transports["a"].send("b", b"h", b"x", deadline=5)
        (folder / "a/certificate.pem").unlink()
        await rig.until(lambda: "certificate.pem cannot be read" in caplog.text)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    rig.run(scenario)
