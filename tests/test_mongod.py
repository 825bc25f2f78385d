"""The server of the tests: found, started, replaced when killed, and never left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure
from pymongo.uri_parser import parse_uri

import mongod
from mongod import (
    URI_VARIABLE,
    GivenServer,
    MongodError,
    Server,
    describe,
    find_mongod,
    mongod_version,
    open_server,
    with_database,
)

NOBODY = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=100"

# Starts a server, says what it started, and waits to be killed.
OWNER = """
import json, sys, time
from mongod import Server
server = Server(sys.argv[1], replica_set=False)
print(json.dumps([str(server.folder), *(member.pid for member in server.members)]), flush=True)
time.sleep(300)
"""

FORKING_OWNER = """
import json, os, sys
from mongod import Server
with Server(sys.argv[1], replica_set=False) as server:
    child = os.fork()
    if child == 0:
        server.stop()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    with server.client() as client:
        client.admin.command("ping")
print(json.dumps([status, "alive", server.folder.exists()]))
"""


def start_owner(script: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(mongod.__file__).parent)},
    )


def is_gone(pid: int) -> bool:
    """No such process, or only its entry, which nobody has read yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def soon(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)


@pytest.fixture
def nothing_installed(nothing_given: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(mongod, "WHEEL", "a-wheel-that-nobody-has-installed")


class TestFinding:
    @pytest.mark.usefixtures("nothing_installed")
    def test_the_error_names_the_three_ways(self) -> None:
        """Without any mongod the error says what to set, what to install, or which wheel."""
        with pytest.raises(MongodError) as caught:
            open_server()

        assert f"{URI_VARIABLE} with the URI of a running replica set (it is not set)" in str(
            caught.value
        )
        assert "mongod 6.0 or newer on PATH" in str(caught.value)
        assert "pip install a-wheel-that-nobody-has-installed==0.4.0" in str(caught.value)
        assert describe().startswith("mongod missing: There is no MongoDB server")

    @pytest.mark.usefixtures("nothing_installed")
    def test_a_given_server_cannot_be_killed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who needs processes of its own is told that the given URI is not enough."""
        monkeypatch.setenv(URI_VARIABLE, NOBODY)

        with pytest.raises(MongodError, match="set, but not enough for what starts and kills"):
            Server()

    @pytest.mark.usefixtures("nothing_installed")
    def test_the_path_is_looked_at(self, tmp_path: Path) -> None:
        """A mongod on PATH is found, and its version is what it says itself."""
        binary = tmp_path / "bin" / "mongod"
        binary.parent.mkdir()
        binary.write_text("#!/bin/sh\necho 'db version v7.0.99'\n")
        binary.chmod(0o755)

        assert find_mongod() == binary
        assert mongod_version(binary) == "7.0.99"
        assert describe() == f"mongod 7.0.99 ({binary})"

    @pytest.mark.usefixtures("nothing_installed")
    def test_a_binary_that_does_not_run(self, tmp_path: Path) -> None:
        """A mongod that cannot run here is named, with what it said."""
        binary = tmp_path / "bin" / "mongod"
        binary.parent.mkdir()
        binary.write_text("#!/bin/sh\necho 'libcurl.so.4: cannot open' >&2\nexit 127\n")
        binary.chmod(0o755)

        with pytest.raises(MongodError, match=r"does not run here: libcurl\.so\.4: cannot open"):
            mongod_version(binary)
        with pytest.raises(MongodError, match=r"libcurl\.so\.4: cannot open"):
            Server(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["bin"]

    def test_a_given_server_is_used_and_left(
        self, mongodb: GivenServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the variable set nothing is started, and nothing is ended."""
        monkeypatch.setenv(URI_VARIABLE, mongodb.uri)
        with open_server() as server:
            version = server.version

        assert not isinstance(server, Server)
        assert version == mongodb.version
        assert describe() == f"MongoDB {version} ({URI_VARIABLE})"

    def test_a_given_server_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the variable, and does not show who logs in."""
        monkeypatch.setenv(URI_VARIABLE, NOBODY.replace("//", "//somebody:secret@"))

        with pytest.raises(MongodError, match=f"{URI_VARIABLE} is set, but no server") as caught:
            open_server()
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        ("uri", "expected"),
        [
            ("mongodb://a:1", "mongodb://a:1/new"),
            ("mongodb://a:1,b:2/?replicaSet=x", "mongodb://a:1,b:2/new?replicaSet=x"),
            ("mongodb://a:1/old?replicaSet=x", "mongodb://a:1/new?replicaSet=x"),
            ("mongodb://u:p@a:1", "mongodb://u:p@a:1/new?authSource=admin"),
            ("mongodb://u:p@a:1/old?w=1", "mongodb://u:p@a:1/new?w=1&authSource=old"),
            ("mongodb://u:p@a:1/?authSource=b", "mongodb://u:p@a:1/new?authSource=b"),
        ],
    )
    def test_the_database_of_a_uri(self, uri: str, expected: str) -> None:
        """Naming a database does not change where the user is looked up."""
        assert with_database(uri, "new") == expected
        assert parse_uri(expected)["database"] == "new"

    def test_the_header(self, request: pytest.FixtureRequest) -> None:
        """The report's header says which server and which driver were tested."""
        header = request.config.hook.pytest_report_header(
            config=request.config, start_path=request.config.rootpath
        )

        assert f", {describe()}" in str(header)
        assert "pymongo 4." in str(header)


class TestDatabases:
    def test_a_replica_set_that_takes_writes(self, mongodb_url: str) -> None:
        """The tests' server is a replica set of version 6 or newer, with transactions."""
        with MongoClient(mongodb_url) as client:
            database = client.get_default_database()
            with client.start_session() as session, session.start_transaction():
                database["some"].insert_one({"_id": 1}, session=session)

            hello = client.admin.command("hello")
            assert hello["setName"]
            assert hello["isWritablePrimary"]
            assert client.server_info()["versionArray"][0] >= 6
            assert database["some"].find_one() == {"_id": 1}
            assert database.name.startswith("recognition_test_")

    def test_each_is_new_and_dropped(self, mongodb: GivenServer) -> None:
        """A database is nobody else's, and gone in the end, after an error too."""

        def write_and_fail(url: str) -> None:
            with MongoClient(url) as client:
                client.get_default_database()["some"].insert_one({})
            raise ValueError("a test that fails")

        names = set()
        for _ in range(2):
            with contextlib.suppress(ValueError), mongodb.database() as url:
                names.add(parse_uri(url)["database"])
                write_and_fail(url)

        with mongodb.client() as client:
            assert len(names) == 2
            assert names.isdisjoint(client.list_database_names())


class TestStarting:
    def test_a_killed_primary_is_replaced(self, tmp_path: Path) -> None:
        """Of three members another takes over with all the data; the killed one can come back."""
        with Server(tmp_path, members=3) as server, server.client() as client:
            rows = client["some"]["rows"]
            rows.insert_one({"_id": 1})
            first = server.primary()
            server.kill(first)
            second = server.primary()
            rows.insert_one({"_id": 2})
            states = [member.running for member in (first, second)]
            server.restart(first)
            with server.direct(first) as restarted:
                again = restarted.admin.command("hello")
                assert soon(lambda: restarted["some"]["rows"].count_documents({}) == 2)

            assert second is not first
            assert states == [False, True]
            assert again["secondary"]
            assert len(again["hosts"]) == 3

    def test_a_stopped_primary_is_replaced(self, tmp_path: Path) -> None:
        """One that hangs (SIGSTOP) is not taken for the primary, nor once it goes on."""
        with Server(tmp_path, members=3) as server:
            first = server.primary()
            server.kill(first, signal.SIGSTOP)
            second = server.primary()
            server.kill(first, signal.SIGCONT)

            assert second is not first
            assert soon(lambda: server.primary() is second)

    def test_one_member_restarts_with_its_data(self, tmp_path: Path) -> None:
        """What was acknowledged is there after a kill, at the same URI."""
        with Server(tmp_path) as server, server.client() as client:
            client["some"]["rows"].insert_one({"_id": 1})
            (member,) = server.members
            before = (member.pid, member.port)
            server.kill(member)
            server.restart(member)

            assert (member.pid, member.port) != before
            assert member.port == before[1]
            assert server.primary() is member
            assert client["some"]["rows"].find_one() == {"_id": 1}

    def test_nothing_is_left_behind(self, tmp_path: Path) -> None:
        """Stopping ends the processes, removes the folder, and is harmless the second time."""
        with Server(tmp_path, replica_set=False) as server:
            (member,) = server.members
            was_there = not is_gone(member.pid)
            server.kill(member, signal.SIGSTOP)
        server.stop()

        assert was_there
        assert is_gone(member.pid)
        assert list(tmp_path.iterdir()) == []

    def test_a_port_that_was_taken_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If somebody else has the port by the time the server comes up, it takes another."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            ports = [taken.getsockname()[1], mongod._free_port(())]
            expected = ports[-1]
            monkeypatch.setattr(mongod, "_free_port", lambda others: ports.pop(0))
            with Server(tmp_path) as server:
                assert server.members[0].port == expected
                assert server.primary() is server.members[0]

    def test_a_server_that_does_not_come_up(self, tmp_path: Path) -> None:
        """The error carries what the server said, and nothing is left behind."""
        with pytest.raises(MongodError, match="unrecognised option '--nonsense'") as caught:
            Server(tmp_path, options=("--nonsense",))

        assert "Waited in vain for the mongod at 127.0.0.1:" in str(caught.value)
        assert "exit code 2" in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_no_such_set(self, tmp_path: Path) -> None:
        """Several members are a replica set, and none is no server."""
        with pytest.raises(ValueError, match="2 members, replica_set=False"):
            Server(tmp_path, members=2, replica_set=False)
        with pytest.raises(ValueError, match="0 members"):
            Server(tmp_path, members=0)

    def test_a_standalone_server(self, tmp_path: Path) -> None:
        """A server can be had that is no replica set, and so refuses transactions."""
        with Server(tmp_path, replica_set=False) as server, server.client() as client:
            assert "setName" not in client.admin.command("hello")
            with client.start_session() as session:
                session.start_transaction()
                with pytest.raises(OperationFailure, match="only allowed on a replica set"):
                    client["some"]["rows"].insert_one({}, session=session)

    @pytest.mark.parametrize("replica_set", [True, False])
    def test_users(self, tmp_path: Path, replica_set: bool) -> None:
        """With `auth` a stranger may nothing, a reader may read, and the URI's user may all."""
        with Server(tmp_path, replica_set=replica_set, auth=True) as server:
            with server.client() as client:
                client["some"]["rows"].insert_one({"_id": 1})
            (member,) = server.members
            with (
                MongoClient(f"mongodb://{member.address}/") as stranger,
                pytest.raises(OperationFailure, match="requires authentication"),
            ):
                stranger["some"]["rows"].find_one()
            with MongoClient(server.create_user("some")) as reader:
                database = reader.get_default_database()
                assert database.name == "some"
                assert database["rows"].find_one() == {"_id": 1}
                with pytest.raises(OperationFailure, match="not authorized on some"):
                    database["rows"].insert_one({})


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
class TestOwner:
    def test_killed(self, tmp_path: Path) -> None:
        """The servers of a killed process die with it; the next one clears its folder away."""
        with start_owner(OWNER, tmp_path) as owner:
            assert owner.stdout is not None
            folder, pid = json.loads(owner.stdout.readline())
            with Server(tmp_path, replica_set=False) as neighbour:
                kept = Path(folder).exists() and not is_gone(pid)
                owner.kill()
                owner.wait(timeout=20)
                ended = soon(lambda: is_gone(pid))
                with Server(tmp_path, replica_set=False):
                    left = Path(folder).exists()
                    neighbours = neighbour.folder.exists()

        assert kept
        assert ended
        assert not left
        assert neighbours

    def test_ends_without_stopping(self, tmp_path: Path) -> None:
        """A process that forgets to stop its server ends all the same, and the server with it."""
        with start_owner(OWNER.replace("time.sleep(300)", ""), tmp_path) as owner:
            said, _ = owner.communicate(timeout=60)
        _, pid = json.loads(said)

        assert owner.returncode == 0
        assert soon(lambda: is_gone(pid))

    def test_a_thread_that_ends(self, tmp_path: Path) -> None:
        """A server lives as long as the process, not as the thread in which it was started."""
        servers: list[Server] = []
        thread = threading.Thread(
            target=lambda: servers.append(Server(tmp_path, replica_set=False))
        )
        thread.start()
        thread.join(timeout=60)
        with servers[0] as server:
            time.sleep(0.3)  # as long as it would take the kernel to kill it, many times over

            with server.client() as client:
                assert client.admin.command("ping")["ok"] == 1

    def test_a_forked_child(self, tmp_path: Path) -> None:
        """A child that inherits the server does not end it."""
        with start_owner(FORKING_OWNER, tmp_path) as owner:
            said, _ = owner.communicate(timeout=60)

        assert json.loads(said) == [0, "alive", False]
