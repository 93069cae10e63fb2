"""Transports that carry bytes between real peers."""

import os


def quiet_grpc() -> None:
    """Keep gRPC's own log lines about closed connections off the terminal; call it before gRPC is first imported.

    A transport's events report all that matters of them.  A GRPC_VERBOSITY that is set already is kept.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
