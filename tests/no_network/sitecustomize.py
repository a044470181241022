"""Refuses the network in every Python process that has this folder on PYTHONPATH, and notes each attempt.

Python announces what its sockets are about to do, so Python code cannot go round this. Only this machine may
be reached, as Jupyter does. Attempts are noted in the file named by NETWORK_ATTEMPTS, since whoever tries
may swallow the error.
"""

import ipaddress
import os
import sys

# Audit events of the standard library, and where in their arguments the host stands.
HOST = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
    "socket.getnameinfo": 0,
}


def is_here(host: object) -> bool:
    """Whether a host is this machine: no name at all, a socket file, localhost or a loopback address."""
    if isinstance(host, tuple):
        host = host[0]
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if not host or not isinstance(host, str) or host.startswith("/") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook: raise before a packet leaves."""
    if event in HOST and not is_here(host := arguments[HOST[event]]):
        attempt = f"{event} {host!r} in {' '.join(sys.argv[:2])}"
        with open(os.environ["NETWORK_ATTEMPTS"], "a", encoding="utf-8") as file:
            file.write(f"{attempt}\n")
        raise ConnectionRefusedError(f"This test refuses the network: {attempt}")


sys.addaudithook(refuse)
