"""Loaded by every Python process that has this folder on its path: keeps the process on this machine.

A name outside `LOCAL_NAMES` is not looked up and an address beyond loopback not connected to; the attempt ends the
process, so that no client can swallow it. `queue.localhost` and `upscaler`, the name of a service in a compose network,
are given the address that a user's DNS would give them.
"""

import os
import socket
import sys

NAMED_BY_DNS = {"queue.localhost", "upscaler"}
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"} | NAMED_BY_DNS
LEFT_THE_MACHINE = 77

look_up = socket.getaddrinfo


def text(name):
    """A host's name, which some callers pass as bytes."""
    return name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)


def look_up_locally(host, *arguments, **keywords):
    """`socket.getaddrinfo`, with an address for the names that users would have given one."""
    return look_up("localhost" if text(host) in NAMED_BY_DNS else host, *arguments, **keywords)


def watch(event, arguments):
    """End the process when it is about to talk to somebody else."""
    name = None
    if event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        name = arguments[1][0]
    elif event == "socket.getaddrinfo":
        name = arguments[0]
    if name is not None and text(name) not in LOCAL_NAMES:
        sys.stderr.write(f"tried to reach {text(name)}\n")
        sys.stderr.flush()
        os._exit(LEFT_THE_MACHINE)


socket.getaddrinfo = look_up_locally
sys.addaudithook(watch)
