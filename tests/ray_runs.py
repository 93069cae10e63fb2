"""What tests of runs on real Ray clusters have in common."""

import os
import signal

import psutil
import torch

from peerlora.tree import leaves


def same_bits(one, other):
    one, other = leaves(one), leaves(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def actor_processes():
    """The processes of this process's actors that are alive, by the title that Ray gives them."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            if "BlockActor" in " ".join(each.cmdline()):
                found.append(each.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return sorted(found)


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
