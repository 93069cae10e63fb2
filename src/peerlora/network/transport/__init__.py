"""How bytes travel between real peers."""

import os


def quiet_grpc() -> None:
    """Keep gRPC's own notes on closed connections off the terminal; to be called before it is first imported.

    Whatever matters of them is in a transport's events.  Who has set GRPC_VERBOSITY gets what was asked for.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
