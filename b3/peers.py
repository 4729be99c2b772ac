"""Which processes of a job have ended, known without the help of any collective call.

A collective over NCCL neither fails nor returns when a rank is gone, and a thread that waits in C++ cannot be
interrupted. So the news takes a way of its own: rank 0 holds a plain TCP connection with each other rank. The kernel
closes it with the process, however that ends and on whatever machine; a machine that vanishes is missed by its
heartbeats after the time limit. Rank 0 passes on which rank ended and why. A rank that is told has `GRACE` seconds to
end by its own error, then a thread ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

GRACE = 5.0  # seconds
CONNECT_SECONDS = 10.0
EXIT_LOST = 2
KILLED = "has ended without a message (it was killed; look for memory)"

_ending = threading.Lock()  # held by the thread that ends the process: it says so once
_watch: Watch | None = None
_rank, _size = 0, 1


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    return _size > 1


def start(rank: int, size: int, limit: float, gather: Callable[[Any], list[Any]]) -> None:
    """Watch all ranks from now on; every rank calls this.

    Args:
        rank, size: of this process, and how many there are.
        limit: seconds without a heartbeat after which a rank counts as lost.
        gather: a value of every rank, in rank order, on every rank.
    """
    global _watch, _rank, _size
    _rank, _size = rank, size
    server = _listener() if rank == 0 else None
    port = server.getsockname()[1] if server else 0
    hosts, port, token = gather((_addresses(), port, secrets.token_hex(16)))[0]
    if server:
        _watch = Watch(rank, limit, token, server=server)
        return
    try:
        connection = _connect(hosts, port, token, rank)
    except OSError as error:
        where = f"{' or '.join(hosts)}, port {port}"
        text = f"note: rank {rank} cannot reach rank 0 at {where} ({error}); it learns of a rank that ended only"
        print(f"{text} from messages that fail", file=sys.stderr, flush=True)
        return
    _watch = Watch(rank, limit, token, connection=connection)


def stop() -> None:
    """Stop watching, and tell the others that this rank ends as it should."""
    global _watch, _size
    if _watch is not None:
        _watch.send({"bye": _rank})
    _watch, _size = None, 1


def tell(reason: str) -> None:
    """Tell the other ranks why this one is about to end."""
    if _watch is not None:
        _watch.send({"rank": _rank, "text": f"has ended: {reason}"})


def news(patience: float = GRACE) -> str | None:
    """Which rank has ended and why, in words; waits at most so many seconds for it. None: no rank is known to."""
    if _watch is None or not _watch.is_told.wait(patience):
        return None
    return _watch.text


def end(line: str, code: int) -> NoReturn:
    """Print a line on stderr, tell the other ranks, and end this process at once, whatever its threads do."""
    _ending.acquire()
    with contextlib.suppress(OSError, ValueError):
        print(f"[rank {_rank}] {line}" if _size > 1 else line, file=sys.stderr, flush=True)
        sys.stdout.flush()
    tell(line.partition("\n")[0].removeprefix("error: "))
    os._exit(code)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _addresses() -> list[str]:
    """Where other machines may reach this one: the address that faces the launcher's, and names."""
    names = [os.environ.get("MASTER_ADDR", "localhost"), socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((names[0], 9))  # sends nothing
        names.insert(0, probe.getsockname()[0])
    return list(dict.fromkeys(names))


def _connect(hosts: list[str], port: int, token: str, rank: int) -> socket.socket:
    problem: OSError | None = None
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), CONNECT_SECONDS)
            connection.sendall(_line({"token": token, "hello": rank}))
            if connection.recv(1) == b"\n":
                return connection
            problem = OSError("another program answers")
        except OSError as error:
            problem = error
    raise problem or OSError("no address")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


class Watch:
    """One end (rank 0: the middle) of the star of connections, and the thread that listens to them."""

    def __init__(
        self,
        rank: int,
        limit: float,
        token: str,
        server: socket.socket | None = None,
        connection: socket.socket | None = None,
    ) -> None:
        self.rank, self.limit, self.token, self.server = rank, limit, token, server
        self.beat = min(5.0, limit / 20)  # seconds between heartbeats
        self.text = ""
        self.is_told = threading.Event()
        self._last_beat = 0.0
        self._selector = selectors.DefaultSelector()
        self._rank_of: dict[socket.socket, int] = {}
        self._heard: dict[socket.socket, float] = {}
        self._rest: dict[socket.socket, bytes] = {}
        self._lock = threading.Lock()  # of sending
        if server is not None:
            self._selector.register(server, selectors.EVENT_READ)
        if connection is not None:
            self._add(connection)
            self._rank_of[connection] = 0
        threading.Thread(target=self._listen, name="b3-peers", daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """To every rank that is connected: from rank 0 to all others, from those to rank 0."""
        self._write(_line(message))

    def _write(self, data: bytes) -> None:
        with self._lock:
            for connection in self._rank_of:
                with contextlib.suppress(OSError):
                    connection.sendall(data)

    def _add(self, connection: socket.socket) -> None:
        connection.settimeout(CONNECT_SECONDS)  # of one write
        self._heard[connection], self._rest[connection] = time.monotonic(), b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _drop(self, connection: socket.socket) -> int | None:
        """Close a connection; the rank at its other end, if it has said which."""
        self._selector.unregister(connection)
        with self._lock:
            rank = self._rank_of.pop(connection, None)
        del self._heard[connection], self._rest[connection]
        connection.close()
        return rank

    def _listen(self) -> None:
        while not self.is_told.is_set():
            for key, _ in self._selector.select(self.beat):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self.server:
                    self._add(connection.accept()[0])
                else:
                    self._read(connection)
            now = time.monotonic()
            for connection in [c for c, heard in self._heard.items() if now - heard > self.limit]:
                self._lost(self._drop(connection), f"has not answered for {self.limit:.0f} seconds")
            if now - self._last_beat >= self.beat / 2:
                self._last_beat = now
                self._write(b"\n")
        time.sleep(GRACE)
        if _watch is self:
            end(f"error: {self.text}", EXIT_LOST)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._lost(self._drop(connection), KILLED)
            return
        self._heard[connection] = time.monotonic()
        *lines, self._rest[connection] = (self._rest[connection] + data).split(b"\n")
        for message in map(json.loads, filter(None, lines)):
            if "bye" in message or (connection not in self._rank_of and message.get("token") != self.token):
                self._drop(connection)
                return
            if "hello" in message:
                connection.sendall(b"\n")  # welcome
                with self._lock:
                    self._rank_of[connection] = message["hello"]
            else:
                self._lost(message["rank"], message["text"])

    def _lost(self, rank: int | None, text: str) -> None:
        """Note the first news and pass it on."""
        if rank is None or self.is_told.is_set():
            return
        if self.rank == 0:
            self.send({"rank": rank, "text": text})
        self.text = f"rank {rank} {text}; this rank stops too, and the same command continues"
        self.is_told.set()
