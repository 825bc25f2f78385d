"""
Stands between redshift_connector and a PostgreSQL server, so that it takes that for Redshift.

The driver sends settings at the start that PostgreSQL does not know, and refuses a version that
does not look like Redshift's. It also takes the end of the list of ways to log in for one more.
Nothing else is changed on the way.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Self

# What PostgreSQL answers with "unrecognized configuration parameter".
_UNKNOWN = {
    b"client_protocol_version",
    b"driver_version",
    b"os_version",
    b"driver_discovery_version",
    b"plugin_name",
}
_SASL = struct.pack("!i", 10)
_VERSION = b"8.0.2"  # Redshift's server_version


class Proxy:
    """
    Listens on a free loopback port and passes on to a server. A context manager.

    Args:
        port: Of the PostgreSQL server, on loopback.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def cut(self) -> None:
        """Cut all connections that are open."""
        while self._open:
            end = self._open.pop()
            with contextlib.suppress(OSError):  # it may be gone on its own
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Listen no more, cut all, and wait for the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(10)
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._run(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server)) as server:
            self._open += [client, server]
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                server.sendall(_without_unknown(client))
                back = threading.Thread(target=_pass_answers, args=(server, client), daemon=True)
                back.start()
                _pass(client, server)
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                back.join(10)
            except (ConnectionError, EOFError):
                pass  # one side went; the other one notices


def _read(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _without_unknown(client: socket.socket) -> bytes:
    """The start-up message: length, protocol, then names and values."""
    (size,) = struct.unpack("!i", _read(client, 4))
    body = _read(client, size - 4)
    fields = body[4:].rstrip(b"\0").split(b"\0")
    kept = b"".join(
        name + b"\0" + value + b"\0"
        for name, value in zip(fields[::2], fields[1::2], strict=True)
        if name not in _UNKNOWN
    )
    body = body[:4] + kept + b"\0"
    return struct.pack("!i", len(body) + 4) + body


def _pass(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)


def _pass_answers(server: socket.socket, client: socket.socket) -> None:
    """Until the server is ready its messages are looked at, one by one."""
    with contextlib.suppress(OSError, EOFError):
        kind = b""
        while kind != b"Z":
            kind, size = struct.unpack("!ci", _read(server, 5))
            body = _read(server, size - 4)
            if kind == b"S" and body.startswith(b"server_version\0"):
                body = b"server_version\0" + _VERSION + b"\0"
            elif kind == b"R" and body[:4] == _SASL:
                body = body[:-1]  # the driver takes the end of the list for one more mechanism
            client.sendall(struct.pack("!ci", kind, len(body) + 4) + body)
        _pass(server, client)
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)
