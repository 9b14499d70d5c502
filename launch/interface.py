"""Which network interface gloo and NCCL talk over. Left alone they may pick a bridge that no other node sees."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from shards.errors import UserError

LOOPBACK = "lo"
_SIOCGIFADDR = 0x8915
_DISCARD_PORT = 9


def interfaces() -> list[str]:
    """Names of this machine's interfaces."""
    return [name for _, name in socket.if_nameindex()]


def check_interface(name: str) -> str:
    """The name, if this machine has such an interface; raises `UserError` otherwise."""
    if name not in interfaces():
        raise UserError(
            f"launch.interface is {name}; it must be an interface that every node has, and {socket.gethostname()} has "
            f"{', '.join(interfaces())}: name one of them, or leave it out"
        )
    return name


def interface_to(host: str) -> str | None:
    """The interface that packets to this host leave by; None where that cannot be told.

    The kernel is asked which local address it would send from (connecting a UDP socket sends nothing).
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, _DISCARD_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            source = str(probe.getsockname()[0]).partition("%")[0]
    except OSError:
        return None
    if ipaddress.ip_address(source).is_loopback:
        return LOOPBACK
    return next((name for name in interfaces() if source in addresses_of(name)), None)


def addresses_of(name: str) -> set[str]:
    """The addresses of an interface: its first IPv4 one, and its IPv6 ones."""
    found: set[str] = set()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            found.add(socket.inet_ntoa(answer[20:24]))
        except OSError:
            pass  # it has no IPv4 address, which is an answer too
    try:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    except OSError:
        rows = []
    return found | {str(ipaddress.ip_address(bytes.fromhex(row[0]))) for row in rows if row[-1] == name}
