"""
A real MariaDB server for tests: found, started, killed, restarted, ended.

It knows no pytest and nothing of `recognition`, so that worker processes import it too. What it
starts dies with the process that started it, in whatever way that one ends.

    with open_server() as server, server.database() as url:
        ...                             # a server of your own; a database of your own
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote_plus, unquote, urlsplit

import pymysql
from pymysql.connections import Connection

from mongod import _free_port, _launch, _make_folder

URI_VARIABLE = "RECOGNITION_TEST_MARIADB_URI"

_PREFIX = "recognition-mariadb-"
_POLL = 0.02  # seconds
_PLACES = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", "/usr/libexec"])  # not on every PATH


class MariadbError(RuntimeError):
    """There is no MariaDB, or it does not do what was asked. Says which, with its log's end."""


class MissingMariadbError(MariadbError):
    """There is none on this machine."""


def given_uri() -> str | None:
    """The URI of a server that somebody else runs, or None."""
    return os.environ.get(URI_VARIABLE) or None


def find_mariadbd() -> Path:
    """
    The server's binary: of ``PATH``, else of where systems keep their servers.

    Raises:
        MissingMariadbError: There is none.
    """
    found = shutil.which("mariadbd") or shutil.which("mariadbd", path=_PLACES)
    if found is None:
        raise MissingMariadbError(
            "there is no MariaDB server to test with; one of these is needed: mariadbd 10.6 or "
            "newer on PATH or in /usr/sbin (Debian, Ubuntu: apt-get install mariadb-server); or "
            f"{URI_VARIABLE} with the URI of one whose user may create databases and users"
        )
    return Path(found).absolute()


class GivenServer:
    """
    A server that somebody else runs. It is used and left running. A context manager.

    Args:
        uri: Of a user who may do everything, without a database.
    """

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or 3306
        self.user = unquote(parts.username or "")
        self.password = unquote(parts.password or "")

    def url(
        self,
        database: str,
        *,
        user: str = "",
        password: str = "",
        scheme: str = "mariadb+pymysql",
        port: int = 0,
    ) -> str:
        """As `open_sink` takes it; by default of the user who may do everything."""
        name, secret = (user, password) if user else (self.user, self.password)
        return (
            f"{scheme}://{quote_plus(name)}:{quote_plus(secret)}"
            f"@{self.host}:{port or self.port}/{quote_plus(database)}"
        )

    def connect(self, database: str | None = None, **options: Any) -> Connection[Any]:
        """A connection of the user who may do everything, in UTC; the caller closes it."""
        return pymysql.connect(
            **{
                "host": self.host,
                "port": self.port,
                "user": self.user,
                "password": self.password,
                "database": database,
                "autocommit": True,
                "connect_timeout": 10,
                "ssl_disabled": True,  # looking for certificates takes longer than all else
                "init_command": "SET time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES'",
                **options,
            }
        )

    def run(self, statement: str, *parameters: object, database: str | None = None) -> Any:
        """One statement, committed; gives all rows."""
        with self.connect(database) as connection, connection.cursor() as cursor:
            cursor.execute(statement, parameters)
            return list(cursor.fetchall())

    @property
    def version(self) -> str:
        """Such as ``10.11.6-MariaDB``; asks the server."""
        ((version,),) = self.run("SELECT version()")
        return str(version)

    @contextlib.contextmanager
    def database(self, declared: str = "") -> Iterator[str]:
        """
        Gives the name of a database that nobody else has; drops it in the end.

        Args:
            declared: Such as ``CHARACTER SET latin1``.
        """
        name = f"recognition_test_{secrets.token_hex(8)}"
        self.run(f"CREATE DATABASE {name} {declared}")
        try:
            yield name
        finally:
            self.run(f"DROP DATABASE {name}")

    @contextlib.contextmanager
    def new_user(self, *grants: str) -> Iterator[tuple[str, str]]:
        """A user who may do this and no more, such as ``SELECT ON shop.*``; name and password."""
        name, password = f"u_{secrets.token_hex(6)}", secrets.token_hex(16)
        self.run(f"CREATE USER {name}@'%%' IDENTIFIED BY %s", password)
        try:
            for grant in grants:
                self.run(f"GRANT {grant} TO {name}@'%%'")
            yield name, password
        finally:
            self.run(f"DROP USER {name}@'%%'")

    def stop(self) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


class Server(GivenServer):
    """
    A mariadbd on a free loopback port, in a folder of its own; started at once.

    Args:
        options: More arguments for mariadbd.

    Raises:
        MariadbError: There is no MariaDB, or it did not come up. Nothing is left behind.
    """

    def __init__(self, *options: str) -> None:
        self.binary = find_mariadbd()
        super().__init__(f"mariadb://recognition_admin:{secrets.token_hex(16)}@127.0.0.1")
        self._options = options
        self._owner = os.getpid()
        self.folder, self._lock = _make_folder(Path(tempfile.gettempdir()), _PREFIX)
        try:
            self._install()
            self._start()
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """End it as a crash does, and wait until it is gone."""
        self.process.kill()
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
        install = shutil.which("mariadb-install-db")
        if install is None:
            raise MariadbError(f"{self.binary} is there, but mariadb-install-db is not on PATH")
        # One that starts removes the temporary tables of others from a folder that it shares.
        self._scratch = self.folder / "tmp"
        self._scratch.mkdir()
        self._as_root = ["--user=root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        said = subprocess.run(
            [
                install,
                "--no-defaults",
                f"--datadir={self.folder / 'data'}",
                f"--tmpdir={self._scratch}",
                "--auth-root-authentication-method=socket",
                "--skip-test-db",
                "--innodb-log-file-size=32M",
                *self._as_root,
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if said.returncode != 0:
            raise MariadbError(f"mariadb-install-db failed: {said.stdout[-2_000:]}{said.stderr}")
        first = self.folder / "first.sql"
        first.touch(mode=0o600)
        first.write_text(
            f"CREATE USER IF NOT EXISTS {self.user}@'127.0.0.1' IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL ON *.* TO {self.user}@'127.0.0.1' WITH GRANT OPTION;\n"
        )

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
        self.process = _launch(
            [
                str(self.binary),
                "--no-defaults",
                f"--datadir={self.folder / 'data'}",
                f"--tmpdir={self._scratch}",
                f"--socket={self.folder / 's'}",
                f"--pid-file={self.folder / 'pid'}",
                f"--init-file={self.folder / 'first.sql'}",
                "--bind-address=127.0.0.1",
                f"--port={self.port}",
                "--skip-name-resolve",
                "--innodb-log-file-size=32M",
                "--innodb-buffer-pool-size=128M",
                # Survives a killed server, and spares the disk one flush for each transaction.
                "--innodb-flush-log-at-trx-commit=2",
                *self._as_root,
                *self._options,
            ],
            output,
        )

    def _await_start(self, *, port_may_be_taken: bool = False) -> bool:
        """By its own log: whoever answers at the port could be another's server."""
        end = time.monotonic() + 60
        while True:
            gone = self.process.poll() is not None
            with (self.folder / "output.log").open("rb") as file:
                file.seek(self._read_from)
                log = file.read().decode(errors="replace")
            if re.search(rf"ready for connections.*port: {self.port}\b", log, re.DOTALL):
                return True
            if gone and port_may_be_taken and "Bind on TCP/IP port" in log:
                return False
            if gone or time.monotonic() > end:
                why = f"it ended with code {self.process.returncode}" if gone else "60 seconds"
                raise MariadbError(f"mariadbd did not come up ({why}); its log:\n{self.tail}")
            time.sleep(_POLL)


def open_server() -> GivenServer:
    """
    The given server, else a new one.

    Raises:
        MariadbError: There is neither, or the given one does not answer.
    """
    uri = given_uri()
    if uri is None:
        return Server()
    server = GivenServer(uri)
    try:
        _ = server.version
    except pymysql.MySQLError as error:
        raise MariadbError(f"{URI_VARIABLE} is set, but no server answers there") from error
    return server


def describe() -> str:
    """Which server the tests would get, for a report's header. Starts none and does not raise."""
    try:
        if given_uri() is not None:
            return f"MariaDB {open_server().version} ({URI_VARIABLE})"
        binary = find_mariadbd()
    except MariadbError as error:
        return f"MariaDB missing: {error}"
    said = subprocess.run(
        [binary, "--no-defaults", "--version"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    ).stdout
    version = re.search(r"Ver (\S+)", said)
    return f"MariaDB {version[1] if version else 'of unknown version'} ({binary})"
