"""Ports for one run: those the user gave, checked before anything starts, and free ones for the rest."""

import contextlib
import errno
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from kvtuner_sglang.config import DistConfig
from kvtuner_sglang.errors import UserError

# Below Linux's ephemeral range (32768 up), so that no outgoing connection takes a port between choice and use.
CHOICES = range(20000, 32000)
# SGLang derives further ports: six above the rendezvous port, and the HTTP port + 233 (server_args.py, PortArgs).
DERIVED_FROM_DIST = range(7)
DERIVED_FROM_HTTP = (0, 233)
TRIES = 200


@dataclass(frozen=True)
class Ports:
    """http: one port per node; dist: where the ranks meet, None if SGLang may choose it (one node)."""

    http: tuple[int, ...]
    dist: int | None


def choose_ports(dist: DistConfig) -> Ports:
    """The ports of one run; raises UserError if a given one is in use or given twice on one host."""
    taken: set[tuple[str, int]] = set()
    http = tuple(_one(host, port, DERIVED_FROM_HTTP, taken)
                 for host, port in zip(dist.hosts, dist.http_ports, strict=True))
    needs_dist = dist.nnodes > 1 or dist.dist_port != 0
    return Ports(http, _one(dist.hosts[0], dist.dist_port, DERIVED_FROM_DIST, taken) if needs_dist else None)


def _one(host: str, port: int, offsets: range | tuple[int, ...], taken: set[tuple[str, int]]) -> int:
    if port:
        if (host, port) in taken:
            raise UserError(f"port {port} is given twice on {host}: choose another, or 0 for a free one.")
        if not is_free(host, port):
            raise UserError(f"port {port} is in use on {host}: choose another, or 0 for a free one.")
    else:
        port = _free_block(host, offsets, taken)
    taken.update((host, port + offset) for offset in offsets)
    return port


def _free_block(host: str, offsets: range | tuple[int, ...], taken: set[tuple[str, int]]) -> int:
    # Random, so that two runs that start together on one host do not meet.
    for _ in range(TRIES):
        port = random.SystemRandom().choice(CHOICES)
        block = [port + offset for offset in offsets]
        if all((host, p) not in taken and is_free(host, p) for p in block):
            return port
    raise UserError(f"no free port was found on {host} between {CHOICES.start} and {CHOICES.stop}: end other servers.")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen on `port` of every local address of `host`'s machine, `host` included."""
    with contextlib.ExitStack() as sockets:
        try:
            for address in _addresses(host):
                listener = sockets.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address, port))
                listener.listen(1)
                listener.close()
        except OSError as error:
            if _not_ours(error):
                raise UserError(f"{host} is not an address of this machine: the local launcher needs one, so set "
                                "dist.hosts to 127.0.0.1.") from error
            return False
    return True


def _addresses(host: str) -> Iterator[str]:
    yield host
    yield ""  # all addresses: a server that listens on another one of this machine is found, too


def _not_ours(error: OSError) -> bool:
    return isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
