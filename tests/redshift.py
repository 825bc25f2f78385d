"""
What makes a PostgreSQL server look like Redshift to its drivers: a proxy, and a bucket of S3.

redshift_connector sends settings at the start that PostgreSQL does not know, and refuses a version
that does not look like Redshift's. It also takes the end of the list of ways to log in for one
more. And Redshift copies from a bucket: the proxy gets the object from a server that speaks S3
(moto), and hands it to ``COPY .. FROM STDIN``; of COPY's options it takes those that the sink uses,
in their order, and no others. Nothing else is changed on the way.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import secrets
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.request import Request, urlopen

import boto3
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

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

_COPY = re.compile(
    rb"(COPY \w+ \([\w, ]+\)) FROM 's3://([^/']+/[^']+)'"
    rb" IAM_ROLE (?:default|'arn:aws:iam::\d{12}:role/\w+')(?: REGION '[\w-]+')?"
    rb" FORMAT AS CSV GZIP NULL AS '([^']*)' TIMEFORMAT 'auto' COMPUPDATE OFF STATUPDATE OFF"
)
_ANYBODY = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
_DENIED = b"S3ServiceException:Access Denied,Status 403,Error AccessDenied,Rid 7F2A,ExtRid secret"


class S3:
    """
    A server that speaks S3, on a free loopback port. A context manager.

    It takes any credentials until `guarded`; ``reader`` are those of one who may read then too, as
    the role of a cluster may.
    """

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.reader = self._add_user("reader", "s3:GetObject")

    @contextmanager
    def client(self, service: str = "s3", user: Mapping[str, str] = _ANYBODY) -> Iterator[Any]:
        """A client of boto3's."""
        made = boto3.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            **{name.lower(): value for name, value in user.items()},
        )
        with contextlib.closing(made):
            yield made

    @contextmanager
    def bucket(self, name: str) -> Iterator[str]:
        """An empty bucket, which must be empty again at the end."""
        with self.client() as client:
            client.create_bucket(Bucket=name)
            yield name
            client.delete_bucket(Bucket=name)

    def keys(self, bucket: str) -> list[str]:
        """What is in the bucket."""
        with self.client() as client:
            found = client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return [each["Key"] for each in found]

    def remove(self, bucket: str) -> None:
        """Remove all that is in the bucket."""
        with self.client() as client:
            for key in self.keys(bucket):
                client.delete_object(Bucket=bucket, Key=key)

    @contextmanager
    def guarded(self, *actions: str) -> Iterator[dict[str, str]]:
        """Look at who asks; gives a new user who may do these, as the environment names one."""
        user = self._add_user(f"u{secrets.token_hex(6)}", *actions)
        self._look_after(0)
        try:
            yield user
        finally:
            self._look_after(1_000_000_000)

    def _add_user(self, name: str, *actions: str) -> dict[str, str]:
        with self.client("iam") as iam:
            iam.create_user(UserName=name)
            policy = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
            document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
            iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=document)
            key = iam.create_access_key(UserName=name)["AccessKey"]
        return {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }

    def _look_after(self, calls: int) -> None:
        """moto looks at who asks after so many calls."""
        asked = Request(
            f"{self.url}/moto-api/reset-auth",
            str(calls).encode(),
            {"Content-Type": "text/plain"},  # a form's fields would not be its data
        )
        with urlopen(asked) as answer:
            answer.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop()


@dataclass
class _Link:
    """
    What the two directions of one connection tell each other.

    Args:
        lenient: The client is redshift_connector.
        source, refused: Of the COPY that is under way: the object, and whether it could not be had.
        prepared: The statement that the client will execute is a COPY.
        unsynced: It is executed, and a Sync is owed to the server, by whoever passes its answer.
    """

    lenient: bool = False
    source: bytes = b""
    refused: bool = False
    prepared: bool = False
    unsynced: bool = False


class Proxy:
    """
    Listens on a free loopback port and passes on to a server. A context manager.

    Args:
        port: Of the PostgreSQL server, on loopback.
        s3: Where the objects of COPY are; only a COPY needs it.
    """

    def __init__(self, port: int, s3: S3 | None = None) -> None:
        self._server = port
        self._stack = contextlib.ExitStack()
        self._s3 = s3 and self._stack.enter_context(s3.client(user=s3.reader))
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
        self._stack.close()

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
            link = _Link()
            try:
                server.sendall(_without_unknown(client, link))
                back = threading.Thread(
                    target=self._pass_answers, args=(server, client, link), daemon=True
                )
                back.start()
                self._pass_questions(client, server, link)
                with contextlib.suppress(OSError):
                    server.shutdown(socket.SHUT_RDWR)
                back.join(10)
            except (ConnectionError, EOFError):
                pass  # one side went; the other one notices

    def _pass_questions(self, client: socket.socket, server: socket.socket, link: _Link) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, body = _receive(client)
                if kind in (b"Q", b"P"):
                    copy = _COPY.search(body)
                    link.prepared = copy is not None and kind == b"P"
                    if copy is not None:
                        link.source = copy[2]
                        told = b"%s FROM STDIN (FORMAT csv, NULL '%s')" % (copy[1], copy[3])
                        body = body[: copy.start()] + told + body[copy.end() :]
                elif kind == b"E" and link.prepared:
                    # A server that awaits rows ignores a Sync. The client's may come before that,
                    # or too late and be one too many: it stays here, and ours comes in its time.
                    link.unsynced = True
                    server.sendall(_message(kind, body))
                    while kind != b"S":
                        kind, body = _receive(client)
                    continue
                server.sendall(_message(kind, body))

    def _pass_answers(self, server: socket.socket, client: socket.socket, link: _Link) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                kind, body = _receive(server)
                if kind == b"G":  # it is ready for the rows
                    self._hand_over(server, link)
                if kind in (b"G", b"E") and link.unsynced:
                    link.unsynced = False
                    server.sendall(_message(b"S", b""))
                if kind == b"G":
                    continue
                if kind == b"S" and body.startswith(b"server_version\0"):
                    body = b"server_version\0" + _VERSION + b"\0"
                elif kind == b"R" and body[:4] == _SASL and link.lenient:
                    body = body[:-1]  # the driver takes the end of the list for one more mechanism
                elif kind == b"E" and link.refused:
                    link.refused = False
                    body = b"SERROR\0VERROR\0CXX000\0M" + _DENIED + b"\0\0"
                client.sendall(_message(kind, body))
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _hand_over(self, server: socket.socket, link: _Link) -> None:
        assert self._s3 is not None
        bucket, _, key = link.source.decode().partition("/")
        try:
            found = self._s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        except ClientError:
            link.refused = True
            server.sendall(_message(b"f", b"refused\0"))
        else:
            server.sendall(_message(b"d", gzip.decompress(found)) + _message(b"c", b""))


def _receive(source: socket.socket) -> tuple[bytes, bytes]:
    kind, size = struct.unpack("!ci", _read(source, 5))
    return kind, _read(source, size - 4)


def _message(kind: bytes, body: bytes) -> bytes:
    return struct.pack("!ci", kind, len(body) + 4) + body


def _read(source: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = source.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def _without_unknown(client: socket.socket, link: _Link) -> bytes:
    """The start-up message: length, protocol, then names and values."""
    (size,) = struct.unpack("!i", _read(client, 4))
    body = _read(client, size - 4)
    fields = body[4:].rstrip(b"\0").split(b"\0")
    link.lenient = not _UNKNOWN.isdisjoint(fields[::2])
    kept = b"".join(
        name + b"\0" + value + b"\0"
        for name, value in zip(fields[::2], fields[1::2], strict=True)
        if name not in _UNKNOWN
    )
    body = body[:4] + kept + b"\0"
    return struct.pack("!i", len(body) + 4) + body
