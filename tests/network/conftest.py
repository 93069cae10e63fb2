import pytest
from rigs import SITES, GrpcRig, MemoryRig, free_port


@pytest.fixture(scope="session")
def federation(tmp_path_factory):
    """Folder of a federation: authority/, a/, b/, c/, members.json; c has no address."""
    from peerlora.network.identity.authority import throwaway

    folder = tmp_path_factory.mktemp("federation")
    throwaway(folder, {site: None if site == "c" else f"127.0.0.1:{free_port()}" for site in SITES}, "test")
    return folder


@pytest.fixture(params=["memory", "grpc"])
def rig(request):
    """A federation on each transport."""
    return MemoryRig() if request.param == "memory" else GrpcRig(request.getfixturevalue("federation"))
