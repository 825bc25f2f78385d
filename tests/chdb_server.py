"""
A ClickHouse server for the tests: the embedded engine behind the HTTP interface, in a process of
its own, so that clients can die while the server lives.

    python chdb_server.py PATH [--password PASSWORD]

It speaks the part of https://clickhouse.com/docs/interfaces/http that clickhouse-connect uses:
statements in the URL or the body, parameters and settings of the server, inserts in the Native
format, compressed bodies and answers, errors with their codes, users. It keeps no sessions. What it
is not: many users with grants, replicas, a keeper, clusters.

The user ``reader`` may only read. A fault is set by ``/fault?kind=KIND&pattern=PATTERN&skip=N`` and
befalls one statement that the pattern is found in, after the first N of them: ``drop`` cuts the
connection before it is carried out, ``cut`` afterwards, ``hang`` carries it out and does not
answer, ``pause`` answers when it is told by ``/resume``; ``&seconds=`` says for how long at most; a
number answers with this HTTP status and a page, as a proxy does, without carrying it out.
``/faulted`` says whether it happened.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.request import urlopen

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# What the client says about the transport, and no engine knows.
_TRANSPORT = {
    "query", "database", "default_format", "session_id", "session_timeout", "session_check",
    "query_id", "compress", "decompress", "enable_http_compression", "wait_end_of_query",
    "client_protocol_version", "send_progress_in_http_headers", "buffer_size", "role",
    "http_headers_progress_interval_ms",
}  # fmt: skip


class Engine(ThreadingHTTPServer):
    """The server, and the fault that it waits to commit."""

    daemon_threads = True
    fault: Mapping[str, Any] | None = None
    faulted = False
    lock = threading.Lock()
    resumed = threading.Event()

    def take_fault(self, statement: str) -> tuple[str | None, float]:
        with self.lock:
            fault = self.fault
            if fault is None or re.search(fault["pattern"], statement) is None:
                return None, 0.0
            if fault["skip"] > 0:
                self.fault = {**fault, "skip": fault["skip"] - 1}
                return None, 0.0
            self.fault = None
            return str(fault["kind"]), float(fault["seconds"])


class Handler(BaseHTTPRequestHandler):
    """One connection; each request has a connection to the engine for itself."""

    protocol_version = "HTTP/1.1"
    #: A body that follows its head at once would wait 40 ms for the client's delayed ACK.
    disable_nagle_algorithm = True
    server: Engine
    connection_string: str
    password: str

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self.read_chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        encoding = self.headers.get("Content-Encoding", "")
        if encoding == "gzip":
            body = gzip.decompress(body)
        elif encoding == "zstd":
            body = zstd.decompress(body)
        elif encoding == "lz4":
            import lz4.frame

            # A block of rows is a frame of its own; `lz4.frame.decompress` stops after the first.
            with lz4.frame.open(io.BytesIO(body)) as frames:
                body = frames.read()
        else:
            assert encoding == "", encoding
        self.answer(body)

    def read_chunk(self) -> bytes:
        size = int(self.rfile.readline().strip(), 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def answer(self, body: bytes) -> None:
        url = urlsplit(self.path)
        if url.path == "/ping":
            self.reply(200, b"Ok.\n", {})
            return
        given = dict(parse_qsl(url.query, keep_blank_values=True))
        if url.path == "/fault":
            self.server.fault = {**given, "skip": int(given.get("skip", "0"))}
            self.server.faulted = False
            self.server.resumed.clear()
        if url.path == "/resume":
            self.server.resumed.set()
        if url.path in ("/fault", "/faulted", "/resume"):
            self.reply(200, str(int(self.server.faulted)).encode(), {})
            return
        user = self.user()
        if user is None:
            self.refuse("Code: 516. DB::Exception: Authentication failed (AUTHENTICATION_FAILED)")
            return
        # The rows of an insert follow its statement, after one line break.
        text = given.get("query", "").encode() + b"\n" + body
        head = re.match(rb"\s*INSERT INTO [^\n]*FORMAT Native\s*?\n", text)
        insert, body = head is not None, text[head.end() :] if head else b""
        statement = (head[0] if head else text).decode().strip()
        fault, seconds = self.server.take_fault(statement)
        if fault is not None and fault.isdigit():
            self.server.faulted = True
            self.reply(int(fault), b"<html><body>it was 'a1'</body></html>", {})
            return
        if fault != "drop":
            try:
                result = self.run(statement, body if insert else None, given, user)
            except Exception as error:
                self.refuse(str(error))
                return
        if fault in ("hang", "pause"):
            self.server.faulted = True
            if fault == "hang":
                time.sleep(seconds)
            else:
                self.server.resumed.wait(seconds)
        if fault in ("drop", "cut", "hang"):
            # It was noted before a pause: by now another one may be waited for.
            if fault != "hang":
                self.server.faulted = True
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.reply(200, result, {"X-ClickHouse-Summary": "{}", "X-ClickHouse-Format": "Native"})

    def user(self) -> str | None:
        name = self.headers.get("X-ClickHouse-User", "default")
        password = self.headers.get("X-ClickHouse-Key", "")
        kind, _, credentials = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            name, _, password = base64.b64decode(credentials).decode().partition(":")
        return name if password == self.password else None

    def run(self, statement: str, body: bytes | None, given: Mapping[str, str], user: str) -> bytes:
        import chdb

        connection = chdb.connect(self.connection_string)
        try:
            for name, value in given.items():
                if name not in _TRANSPORT and not name.startswith("param_"):
                    literal = value.replace("\\", "\\\\").replace("'", "\\'")
                    connection.query(f"SET {name} = '{literal}'", "Native")
            if database := given.get("database"):
                connection.query(f"USE `{database}`", "Native")
            if user == "reader":
                connection.query("SET readonly = 2", "Native")
            if body is not None:
                with tempfile.NamedTemporaryFile() as file:
                    file.write(body)
                    file.flush()
                    # As clickhouse-connect gives rows to the embedded engine.
                    head = re.sub(r"FORMAT Native\s*$", "", statement)
                    text = f"{head} FROM INFILE '{file.name}' FORMAT Native"
                    connection.query(text, "Native")
                return b""
            parameters = {k[6:]: v for k, v in given.items() if k.startswith("param_")}
            named = re.search(r"\bFORMAT\s+(\w+)\s*$", statement)
            kind = named[1] if named else given.get("default_format", "TabSeparated")
            return bytes(connection.query(statement, kind, params=parameters).bytes())
        finally:
            connection.close()

    def refuse(self, text: str) -> None:
        code = re.search(r"Code: (\d+)", text)
        headers = {"X-ClickHouse-Exception-Code": code[1]} if code else {}
        self.reply(403 if code and code[1] == "516" else 500, text.encode(), headers)

    def reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        if "gzip" in self.headers.get("Accept-Encoding", "") and len(body) > 100:
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--password", default="")
    arguments = parser.parse_args()
    import chdb

    Handler.connection_string = arguments.path
    Handler.password = arguments.password
    held = chdb.connect(arguments.path)  # the engine runs as long as this is open
    server = Engine(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    server.shutdown()
    held.close()


class Server:
    """Such a process, seen from outside. A context manager, which ends it."""

    def __init__(self, path: Path, password: str = "") -> None:
        self.password = password
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(path), "--password", password],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def url(self, database: str, user: str = "default", **options: str) -> str:
        """For `open_sink`; ``options`` follow the ``?``."""
        more = "&".join(f"{key}={value}" for key, value in options.items())
        key = f":{self.password}" if self.password else ""
        return f"clickhouse://{user}{key}@127.0.0.1:{self.port}/{database}?{more}"

    def fault(self, kind: str, pattern: str, skip: int = 0, seconds: float | None = None) -> None:
        """Let one statement go wrong."""
        if seconds is None:
            seconds = 20.0 if kind == "hang" else 60.0
        given = {"kind": kind, "pattern": pattern, "skip": skip, "seconds": seconds}
        self._ask(f"fault?{urlencode(given)}")

    def resume(self) -> None:
        """Let the statement that pauses be answered."""
        self._ask("resume")

    def faulted(self) -> bool:
        """Whether it did."""
        return self._ask("faulted") == "1"

    def _ask(self, path: str) -> str:
        with urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=20)


if __name__ == "__main__":
    main()
