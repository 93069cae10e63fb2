"""One real peer: its checks, its startup and its rounds."""
