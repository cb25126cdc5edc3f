"""Ports: bind before anything is loaded, and say who is in the way.

Knows no HTTP.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from quire.errors import AddressInUse, ConfigError

BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises AddressInUse naming the port and, where it can be read,
    the process that holds it; ConfigError when the address can't be used."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error}.") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            holder = port_holder(port)
            by = f" by {holder}" if holder else ""
            raise AddressInUse(
                f"port {port} on {host} is taken{by}; stop it or give another --port."
            ) from None
        raise ConfigError(
            f"can't listen on {host} port {port}: {error.strerror}; give another --host or --port."
        ) from None
    return sock


def port_holder(port: int) -> str:
    """'name (pid 123)' of the process that listens on a local port; "" when unreadable."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            listening = columns[3] == "0A"
            if listening and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = {os.readlink(fd) for fd in (process / "fd").iterdir()}
            if links & inodes:
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:  # gone meanwhile, or another user's
            continue
    return ""
