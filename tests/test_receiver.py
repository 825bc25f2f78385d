"""
The HTTP receiver on loopback: real HTTP, the real clients of Segment, RudderStack and Jitsu, and
what happens when too much comes, when it is broken, and when the graph is away.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import logging
import os
import re
import select
import shutil
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from rudderstack.analytics.client import Client as RudderClient
from segment.analytics.client import Client as SegmentClient

from recognition.errors import ConfigurationError, GraphSchemaError, GraphUnavailableError
from recognition.events import Event, Reject, RejectsFile, parse_event, read_events
from recognition.graph.sqlite import SqliteGraph
from recognition.receiver import RETRY_AFTER, Receiver
from recognition.recognizer import Recognizer
from recognition.rules import Rules
from warehouse import Warehouse

HERE = Path(__file__).parent
CAPTURE = HERE / "data" / "segment_spec_sdk_capture.ndjson"

KEY, JITSU_KEY = "wk-21a2ae36", "key-1:secret/1"

Events = Sequence[dict[str, Any]]


class Taken:
    """What a worker does with events, seen from outside; it can be made slow, or fail."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, events: Events) -> None:
        self.entered.release()
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.batches.append(list(events))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for batch in self.batches for event in batch]

    @property
    def ids(self) -> list[object]:
        return [event.get("messageId") for event in self.events]


class Running:
    """A receiver in a thread, as a worker runs it."""

    def __init__(self, receiver: Receiver, take: Callable[[Events], None]) -> None:
        self.receiver = receiver
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(take,))
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._listens():
            assert self._thread.is_alive(), self.error
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _run(self, take: Callable[[Events], None]) -> None:
        try:
            self.receiver.run(take, self.stop)
        except BaseException as exc:
            self.error = exc

    def _listens(self) -> bool:
        return self.receiver.url is not None and self.get("/healthz")[0] == 200

    def join(self) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        url = urlsplit(self.receiver.url or "")
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)
        try:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, str]:
        status, body, _ = self.ask("GET", path)
        return status, body.decode()

    def post(self, path: str, body: object, key: str | None = KEY, **headers: str) -> int:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.ask("POST", path, raw, {**basic(key), **given})[0]


def basic(key: str | None) -> dict[str, str]:
    """Basic authentication as Segment's clients do it: the key and no password."""
    if key is None:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{key}:".encode()).decode()}


@contextmanager
def running(take: Callable[[Events], None], **options: Any) -> Iterator[Running]:
    found = Running(Receiver([KEY, JITSU_KEY], port=0, **options), take)
    try:
        yield found
    finally:
        found.join()


@pytest.fixture
def taken() -> Taken:
    return Taken()


@pytest.fixture
def rejects() -> list[Reject]:
    return []


@pytest.fixture
def server(taken: Taken, rejects: list[Reject]) -> Iterator[Running]:
    with running(taken, rejects=rejects.append) as found:
        yield found
    assert found.error is None


def event(message_id: str, **members: object) -> dict[str, object]:
    return {
        "messageId": message_id,
        "type": "page",
        "anonymousId": "a1",
        "timestamp": "2026-01-01T00:00:00Z",
        **members,
    }


# The paths and bodies of the three --------------------------------------------------------------


def test_a_batch_is_taken_before_it_is_answered(server: Running, taken: Taken) -> None:
    """All events of a batch, with what its envelope says of them, are handed over."""
    envelope = {
        "batch": [event("m1"), event("m2", context={"ip": "1.2.3.4"})],
        "context": {"ip": "0.0.0.0", "library": {"name": "x"}},
        "sentAt": "2026-01-01T00:00:01Z",
        "writeKey": KEY,
    }
    status = server.post("/v1/batch", envelope)

    assert status == 200
    assert taken.ids == ["m1", "m2"]
    assert [each["context"]["ip"] for each in taken.events] == ["0.0.0.0", "1.2.3.4"]
    assert {each["sentAt"] for each in taken.events} == {"2026-01-01T00:00:01Z"}


@pytest.mark.parametrize(
    ("path", "type"),
    [
        *((f"/v1/{type}", type) for type in ("track", "identify", "page", "screen", "group")),
        ("/v1/alias", "alias"),
        ("/v1/t", "track"),
        ("/v1/i", "identify"),
        ("/api/s/page", "page"),
        ("/api/s/s2s/track", "track"),
    ],
)
def test_the_path_says_the_type(server: Running, taken: Taken, path: str, type: str) -> None:
    """An event without a type has that of its path, and one without a time the present."""
    status = server.post(path, {"messageId": "m1", "anonymousId": "a1"})
    (found,) = taken.events

    assert status == 200
    assert found["type"] == type
    assert abs(parse_event(found).time / 1e6 - time.time()) < 60


def test_what_an_event_says_itself_is_left_alone(server: Running, taken: Taken) -> None:
    """Type, times and everything else of an event come through as sent."""
    sent = event("m1", type="custom", receivedAt="2026-01-01T00:00:09Z", x={"y": [1, None]})
    server.post("/v1/track", sent)

    assert taken.events == [sent]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Basic " + base64.b64encode(f"{KEY}:".encode()).decode()},
        {"Authorization": "basic " + base64.b64encode(JITSU_KEY.encode()).decode()},
        {"X-Write-Key": KEY},
        {},
    ],
    ids=["basic", "basic with a secret", "header", "body"],
)
def test_the_key_may_stand_in_three_places(
    server: Running, taken: Taken, headers: dict[str, str]
) -> None:
    """A header, basic authentication or the body let in; the key goes no further."""
    body = {"batch": [{**event("m1"), "writeKey": KEY}], **({} if headers else {"writeKey": KEY})}
    status, _, _ = server.ask("POST", "/v1/batch", json.dumps(body).encode(), headers)

    assert status == 200
    assert taken.ids == ["m1"]
    assert KEY not in json.dumps(taken.events)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("wk-21a2ae3"),
        basic(KEY + "6"),
        basic(""),
        basic("ü"),
        {"X-Write-Key": "x"},
        {"Authorization": "Basic ###"},
        {"Authorization": f"Bearer {KEY}"},
    ],
)
def test_without_a_right_key_nothing_is_taken(
    server: Running, taken: Taken, rejects: list[Reject], headers: dict[str, str]
) -> None:
    """Missing, wrong, longer, shorter or unreadable: 401, counted, and nothing kept of it."""
    status, body, _ = server.ask("POST", "/v1/page", json.dumps(event("m1")).encode(), headers)

    assert status == 401
    assert json.loads(body)["success"] is False
    assert (taken.events, rejects) == ([], [])
    assert server.receiver.counts.requests == {401: 1}


def test_half_of_a_character_is_no_key(server: Running, taken: Taken) -> None:
    """JSON may hold half of a surrogate pair: refused like any other wrong key."""
    status = server.post("/v1/page", b'{"messageId": "m1", "writeKey": "\\ud800"}', key=None)

    assert status == 401
    assert taken.events == []


def test_the_key_is_nowhere_to_be_seen(
    server: Running, rejects: list[Reject], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither logs, nor rejects, nor metrics, nor the receiver itself hold a key."""
    caplog.set_level(logging.DEBUG)
    server.post("/v1/batch", {"batch": [1], "writeKey": KEY})
    server.post("/v1/batch", b'{"writeKey": "' + KEY.encode() + b'", ')
    server.post("/v1/page", event("m1", writeKey="wrong-key"), key=None)
    told = [caplog.text, server.get("/metrics")[1], repr(vars(server.receiver))]
    told += [reject.raw.decode() for reject in rejects]

    assert [text for text in told if KEY in text or "wrong-key" in text] == []
    assert [reject.raw for reject in rejects] == [b"1", b""]


def test_gzip_is_unpacked(server: Running, taken: Taken) -> None:
    """A packed body is the same as a plain one."""
    body = gzip.compress(json.dumps({"batch": [event("m1")]}).encode())

    assert server.post("/v1/batch", body, Content_Encoding="gzip") == 200
    assert taken.ids == ["m1"]


# What is broken ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"", {}, 400, "not JSON"),
        (b'{"a": NaN}', {}, 400, "not JSON"),
        (b"\xff\xfe", {}, 400, "not UTF-8"),
        (b"[" * 100_000, {}, 400, "nested too deeply"),
        (b'"text"', {}, 400, "the body is no batch"),
        (b'{"batch": 1}', {}, 400, "the body is no batch"),
        (b"{}", {}, 400, "the body is no batch"),
        (b"no gzip", {"Content-Encoding": "gzip"}, 400, "the gzip stream is damaged"),
        (gzip.compress(b"{}", mtime=0)[:-9], {"Content-Encoding": "gzip"}, 400, "ends too early"),
        (gzip.compress(b"{}", mtime=0) + b"x", {"Content-Encoding": "gzip"}, 400, "is damaged"),
        (b"{}", {"Content-Encoding": "br"}, 415, "plain or gzip"),
        (b" " * 1_001, {}, 413, "too large"),
        (gzip.compress(b" " * 100_000, mtime=0), {"Content-Encoding": "gzip"}, 413, "too large"),
    ],
)
def test_a_broken_body_is_refused_counted_and_kept(
    taken: Taken,
    rejects: list[Reject],
    body: bytes,
    headers: dict[str, str],
    status: int,
    reason: str,
) -> None:
    """Whoever sent it is told why, it is kept for whoever mends it, and the receiver goes on."""
    limit = 1_000_000 if len(body) > 50_000 else 1_000
    with running(taken, rejects=rejects.append, max_body=limit) as server:
        found, answer, _ = server.ask("POST", "/v1/batch", body, {**basic(KEY), **headers})
        after = server.post("/v1/batch", {"batch": [event("m1")]})

    assert found == status
    assert reason in json.loads(answer)["message"]
    assert [reason in each.reason for each in rejects] == [True]
    assert sum(server.receiver.counts.rejected.values()) == 1
    assert (after, taken.ids) == (200, ["m1"])
    assert server.receiver.counts.waiting_bytes == 0


def test_a_body_without_a_declared_length_is_bounded(taken: Taken) -> None:
    """A chunked body that grows beyond the limit is refused while it grows."""
    with running(taken, max_body=10_000) as server:
        url = urlsplit(server.receiver.url or "")
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
        chunks = iter([b" " * 6_000] * 2)
        connection.request("POST", "/v1/batch", chunks, basic(KEY), encode_chunked=True)
        status = connection.getresponse().status
        connection.close()

    assert status == 413


def many_with_context() -> bytes:
    context = {f"k{n}": 1 for n in range(20_000)}
    members = [{"context": {"x": 1}} for _ in range(20_000)]
    return json.dumps({"batch": members, "context": context}).encode()


@pytest.mark.parametrize(
    ("body", "status"),
    [(many_with_context(), 400), (b'{"batch": [' + b"{}," * 200_000 + b"{}]}", 413)],
    ids=["context of an envelope", "members"],
)
def test_a_small_body_does_not_fill_the_memory(
    server: Running, taken: Taken, body: bytes, status: int
) -> None:
    """What takes a thousand times its bytes in memory is refused before it does."""
    tracemalloc.start()
    try:
        found = server.post("/v1/batch", body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert found == status
    assert taken.events == []
    assert peak < 200_000_000


def test_one_bad_member_does_not_hold_the_others(
    server: Running, taken: Taken, rejects: list[Reject]
) -> None:
    """A member that is no object is rejected by its place; what is an object goes to the worker."""
    members = [event("m1"), "text", None, {"no": "event"}, event("m2")]
    status = server.post("/v1/batch", {"batch": members})

    assert status == 200
    assert taken.ids == ["m1", None, "m2"]
    assert [(each.index, each.raw, each.source) for each in rejects] == [
        (1, b'"text"', "/v1/batch"),
        (2, b"null", "/v1/batch"),
    ]


def test_rejects_go_into_the_file_of_rejects(taken: Taken, tmp_path: Path) -> None:
    """The file that `recognition run` writes is written here too."""
    with (
        RejectsFile(tmp_path / "rejects.ndjson") as file,
        running(taken, rejects=file) as server,
    ):
        server.post("/v1/page", b"{not json")
    (line,) = (tmp_path / "rejects.ndjson").read_text().splitlines()

    assert json.loads(line) == {
        "source": "/v1/page", "line": 1, "reason": "not JSON", "raw": "{not json",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/unknown", "/api/s/unknown", "/", "/v1/batch/x"])
def test_other_paths_are_not_found(server: Running, taken: Taken, path: str) -> None:
    """What is no type of event is told so, and not taken."""
    assert server.post(path, event("m1")) == 404
    assert taken.events == []


def test_a_cut_connection_leaves_nothing_behind(server: Running, taken: Taken) -> None:
    """A client that goes away in the middle of its body: nothing is taken, nothing is held."""
    url = urlsplit(server.receiver.url or "")
    with socket.create_connection((url.hostname or "", url.port or 0)) as connection:
        head = f"POST /v1/batch HTTP/1.1\r\nHost: x\r\nX-Write-Key: {KEY}\r\nContent-Length: 99"
        connection.sendall(head.encode() + b'\r\n\r\n{"batch"')
        time.sleep(0.2)
    deadline = time.monotonic() + 60
    while not server.receiver.counts.requests and time.monotonic() < deadline:
        time.sleep(0.01)

    assert server.receiver.counts.requests == {400: 1}
    assert server.receiver.counts.waiting_bytes == 0
    assert taken.events == []


# Back-pressure ----------------------------------------------------------------------------------


def test_nothing_is_answered_before_it_is_durable(server: Running, taken: Taken) -> None:
    """While the graph works, the request waits; what comes meanwhile is handed over together."""
    taken.gate.clear()
    with ThreadPoolExecutor(10) as pool:
        first = pool.submit(server.post, "/v1/page", event("m0"))
        assert taken.entered.acquire(timeout=60)
        others = [pool.submit(server.post, "/v1/page", event(f"m{n}")) for n in range(1, 10)]
        deadline = time.monotonic() + 60
        while len(server.receiver._queue) < 9 and time.monotonic() < deadline:
            time.sleep(0.01)
        answered = [each.done() for each in (first, *others)]
        taken.gate.set()
        statuses = {each.result() for each in (first, *others)}

    assert answered == [False] * 10
    assert statuses == {200}
    assert [len(batch) for batch in taken.batches] == [1, 9]


def test_too_much_is_sent_away(taken: Taken) -> None:
    """Beyond the bytes that may wait it is 429 and when to come again; later all is taken."""
    with running(taken, max_waiting=1_000, rejects=lambda reject: None) as server:
        taken.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(server.post, "/v1/page", event("m1", x="y" * 700))
            assert taken.entered.acquire(timeout=60)
            status, _, headers = server.ask(
                "POST", "/v1/page", json.dumps(event("m2", x="y" * 700)).encode(), basic(KEY)
            )
            small = pool.submit(server.post, "/v1/page", event("m3"))
            taken.gate.set()
            assert (waiting.result(), small.result()) == (200, 200)
        again = server.post("/v1/page", event("m2", x="y" * 700))

    assert (status, headers["retry-after"]) == (429, str(RETRY_AFTER))
    assert again == 200
    assert sorted(map(str, taken.ids)) == ["m1", "m2", "m3"]
    assert server.receiver.counts.rejected == {}


def test_a_graph_that_is_away_is_waited_for(taken: Taken) -> None:
    """
    503 after the patience and when to come again, ``/readyz`` says why; then all goes on.

    What was received is offered again all the while: Jitsu's client does not come again.
    """
    with running(taken, patience=0.3) as server:
        taken.error = GraphUnavailableError("mongodb://user:secret@host does not answer")
        status, body, headers = server.ask(
            "POST", "/v1/page", json.dumps(event("m1")).encode(), basic(KEY)
        )
        away = server.get("/readyz")
        alive = server.get("/healthz")
        taken.error = None
        server.receiver._patience = 60.0
        deadline = time.monotonic() + 60
        while taken.ids != ["m1"] and time.monotonic() < deadline:
            time.sleep(0.02)
        again = server.post("/v1/page", event("m2"))
        back = server.get("/readyz")

    assert (status, headers["retry-after"]) == (503, str(RETRY_AFTER))
    assert b"secret" not in body
    assert away == (503, "the graph does not take events")
    assert alive == (200, "ok")
    assert (again, back) == (200, (200, "ready"))
    assert taken.ids == ["m1", "m2"]
    assert server.receiver.counts.waiting_bytes == 0


def test_a_short_outage_is_not_noticed(server: Running, taken: Taken) -> None:
    """Back within the patience: the request is answered with 200, and was offered again."""
    taken.error = GraphUnavailableError("away")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.post, "/v1/page", event("m1"))
        assert taken.entered.acquire(timeout=60)
        assert taken.entered.acquire(timeout=60)
        taken.error = None
        status = waiting.result()

    assert status == 200
    assert taken.ids == ["m1"]
    assert server.receiver.counts.retries >= 1


def test_a_graph_that_will_never_take_them_is_told_at_once(server: Running, taken: Taken) -> None:
    """An error that no retry mends is answered with 503 at once, and the receiver goes on."""
    taken.error = GraphSchemaError("of another version")
    status = server.post("/v1/page", event("m1"))
    taken.error = None

    assert status == 503
    assert server.receiver.counts.retries == 0
    assert server.post("/v1/page", event("m2")) == 200
    assert taken.ids == ["m2"]


def test_a_body_that_does_not_come_is_not_waited_for(
    taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that trickles in too slowly is sent away, and may come again."""
    monkeypatch.setattr("recognition.receiver._BODY_SECONDS", 0.3)
    with running(taken) as server:
        url = urlsplit(server.receiver.url or "")
        with socket.create_connection((url.hostname or "", url.port or 0), timeout=20) as slow:
            head = f"POST /v1/batch HTTP/1.1\r\nX-Write-Key: {KEY}\r\nHost: x\r\nContent-Length: 9"
            slow.sendall(head.encode() + b"\r\n\r\n{")
            answer = slow.recv(1_000)

    assert answer.startswith(b"HTTP/1.1 503 ")
    assert server.receiver.counts.waiting_bytes == 0


@pytest.mark.parametrize("begin", [b"", b"POST /v1/batch HTTP/1.1\r\nHost: x\r\nX-", b"answered"])
def test_a_connection_that_asks_nothing_is_closed(
    taken: Taken, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    """It would be one of a thousand for ever; letter by letter is as good as nothing."""
    monkeypatch.setattr("recognition.receiver._IDLE_SECONDS", 0.5)
    with running(taken) as server:
        url = urlsplit(server.receiver.url or "")
        with socket.create_connection((url.hostname or "", url.port or 0), timeout=20) as idle:
            if begin == b"answered":
                idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert idle.recv(1_000).startswith(b"HTTP/1.1 200 ")
                begin = b"GET /healthz HTTP/1.1\r\nX-"
            idle.sendall(begin)
            began = time.monotonic()
            with suppress(OSError):  # of a socket that is closed
                while time.monotonic() - began < 60 and not select.select([idle], [], [], 0.1)[0]:
                    if begin:
                        idle.sendall(b"a")
            took = time.monotonic() - began

    assert took < 30


def test_what_is_asked_for_readiness_takes_no_thread_from_the_graph(taken: Taken) -> None:
    """However many ask ``/readyz`` while what is behind does not answer, events are taken."""
    go_on = threading.Event()
    with running(taken, ready=lambda: go_on.wait(30)) as server, ThreadPoolExecutor(50) as pool:
        asked = [pool.submit(server.get, "/readyz") for _ in range(50)]
        time.sleep(0.3)
        status = server.post("/v1/page", event("m1"))
        waiting = [each.done() for each in asked]
        go_on.set()

    assert status == 200
    assert not any(waiting)


def test_whoever_waits_too_long_is_told(taken: Taken) -> None:
    """503 after the patience; the events are taken all the same, once they can be."""
    with running(taken, patience=0.3) as server:
        taken.gate.clear()
        status = server.post("/v1/page", event("m1"))
        taken.gate.set()

    assert status == 503
    assert taken.ids == ["m1"]


def test_a_fault_ends_the_receiver_and_nothing_is_said_to_be_taken() -> None:
    """An error that is none of the graph's comes out of ``run``; the clients keep their events."""
    taken = Taken()
    taken.error = RuntimeError("fault")
    found = Running(Receiver([KEY], port=0), taken)
    status = found.post("/v1/page", event("m1"))
    found.join()

    assert status == 503
    assert found.error is taken.error
    assert found.receiver.url is None


def test_stopping_finishes_what_was_begun(taken: Taken) -> None:
    """What was handed over is answered with 200, then ``run`` returns and the port is free."""
    found = Running(Receiver([KEY], port=0), taken)
    port = urlsplit(found.receiver.url or "").port
    taken.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(found.post, "/v1/page", event("m1"))
        assert taken.entered.acquire(timeout=60)
        found.stop.set()
        time.sleep(0.3)
        assert not begun.done()
        taken.gate.set()
        assert begun.result() == 200
    found.join()

    assert found.error is None
    assert taken.ids == ["m1"]
    with socket.create_server(("127.0.0.1", port or 0)):
        pass


def test_it_can_be_run_again(taken: Taken) -> None:
    """A worker may start a source again: it listens anew, and nothing of before is left."""
    receiver = Receiver([KEY], port=0)
    for message_id in ("m1", "m2"):
        found = Running(receiver, taken)
        assert found.post("/v1/page", event(message_id)) == 200
        found.join()

    assert taken.ids == ["m1", "m2"]


# Operations -------------------------------------------------------------------------------------


def test_metrics_and_readiness_are_shown(taken: Taken) -> None:
    """The receiver's own counters, or the page of whoever runs it; ready when all behind is."""
    with running(taken) as own:
        own.post("/v1/page", event("m1"))
        own.post("/v1/page", b"{")
        shown = own.get("/metrics")[1]
    behind = {"ready": False}
    with running(taken, metrics=lambda: "x 1\n", ready=lambda: behind["ready"]) as server:
        page = server.get("/metrics")
        not_ready = server.get("/readyz")
        behind["ready"] = True
        ready = server.get("/readyz")

    assert 'recognition_receiver_requests_total{status="200"} 1\n' in shown
    assert 'recognition_receiver_rejected_total{reason="not JSON"} 1\n' in shown
    assert "recognition_receiver_events_total 1\n" in shown
    assert page == (200, "x 1\n")
    assert not_ready == (503, "what is behind is not ready")
    assert ready == (200, "ready")


def test_it_listens_on_loopback_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    """The default is loopback; elsewhere a warning says that there is no TLS."""
    taken = Taken()
    with running(taken) as own:
        assert (own.receiver.url or "").startswith("http://127.0.0.1:")
    assert "TLS" not in caplog.text
    found = Running.__new__(Running)
    receiver = Receiver([KEY], host="0.0.0.0", port=0)
    Running.__init__(found, receiver, taken)
    found.join()

    assert "without TLS" in caplog.text


def test_a_port_that_is_taken_is_said() -> None:
    """The error names the address, and that it may pass."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} cannot be listened on") as told:
            Receiver([KEY], port=port).run(Taken(), threading.Event())

    assert told.value.retryable


@pytest.mark.parametrize("keys", [[], [KEY, " "]])
def test_a_receiver_needs_keys(keys: list[str]) -> None:
    """Without a key anybody could post: that is refused at once."""
    with pytest.raises(ConfigurationError, match="at least one write key"):
        Receiver(keys)


def test_browsers_of_named_pages_may_post(taken: Taken) -> None:
    """A page that is named gets the headers that let its scripts post; another one does not."""
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    with running(taken, origins=["https://shop.example"]) as server:
        allowed, refused = (
            server.ask("OPTIONS", "/api/s/page", b"", {"Origin": origin, **preflight})
            for origin in ("https://shop.example", "https://other.example")
        )

    assert allowed[0] == 200
    assert allowed[2]["access-control-allow-origin"] == "https://shop.example"
    assert "access-control-allow-origin" not in refused[2]


# The real clients -------------------------------------------------------------------------------


class Graph:
    """What a worker does: events into a graph, updates into rows."""

    def __init__(self, path: Path) -> None:
        self._graph = SqliteGraph(path)
        self._rules = Rules(stamps=False)
        self.events: list[Event] = []
        self.raw: list[dict[str, Any]] = []

    def __call__(self, events: Events) -> None:
        parsed = [parse_event(each) for each in events]
        Recognizer(self._graph, self._rules).process(parsed)
        self.raw += events
        self.events += parsed

    def users(self) -> dict[str, object]:
        """The user of each row in the end, by message id."""
        warehouse = Warehouse()
        for each in self.events:
            warehouse.load("events", [self._rules.layout.row_of(each, "events")])
        warehouse.apply([leased.update for leased in self._graph.lease_updates(10_000, 60)])
        return {key: row["user_id"] for key, row in warehouse.tables["events"].items()}

    def close(self) -> None:
        self._graph.close()


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    with closing(Graph(tmp_path / "graph.db")) as found:
        yield found


def play(client: Any) -> None:
    """The journey of one visitor on two devices, by a client of Segment's interface."""
    for number in range(3):
        client.page(anonymous_id="anon-1", name=f"p{number}")
    client.track(anonymous_id="anon-1", event="Product Viewed", properties={"sku": "Ä1"})
    client.page(anonymous_id="anon-2", name="p0")
    for device in ("anon-1", "anon-2"):
        client.identify("u-1", {"email": "u1@example.com"}, anonymous_id=device)
    client.track("u-1", "Order Completed", {"total": 12.5}, anonymous_id="anon-1")
    client.group("u-1", "acme", {"plan": "x"})
    client.alias("u-0", "u-1")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("make", [SegmentClient, RudderClient], ids=["segment", "rudderstack"])
def test_the_python_clients_are_understood(graph: Graph, make: Any, packed: bool) -> None:
    """Segment's and RudderStack's own clients: every event arrives, once, and is recognised."""
    failed: list[object] = []
    with running(graph) as server:
        client = make(
            KEY,
            host=server.receiver.url,
            gzip=packed,
            upload_size=4,
            upload_interval=0.05,
            max_retries=2,
            on_error=lambda *error: failed.append(error),
        )
        play(client)
        client.shutdown()
    users = graph.users()
    anonymous = [each for each in graph.events if not each.known and each.anonymous_id]

    assert failed == []
    assert len(graph.events) == len(users) == 10
    assert len(anonymous) == 5
    assert {users[each.message_id] for each in anonymous} == {"u-1"}
    assert server.receiver.counts.requests.keys() == {200}


def test_a_client_that_is_sent_away_comes_again(graph: Graph) -> None:
    """503 is understood by Segment's client: it keeps its events, and all of them arrive."""

    def take(events: Events) -> None:
        if not server.receiver.counts.requests[503]:
            raise GraphUnavailableError("away")
        server.receiver._patience = 60.0
        graph(events)

    with running(take, patience=0.1) as server:
        client = SegmentClient(KEY, host=server.receiver.url, upload_interval=0.05, max_retries=9)
        client.page(anonymous_id="anon-1", name="p0")
        client.shutdown()

    assert len({each.message_id for each in graph.events}) == 1
    assert server.receiver.counts.requests.keys() == {503, 200}


@pytest.fixture(scope="session")
def jitsu_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Jitsu's client from npm, installed as tests/jitsu_client/package.json pins it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        if os.environ.get("RECOGNITION_TEST_REQUIRE_SERVERS") == "1":
            raise RuntimeError("node and npm are missing, which Jitsu's client needs")
        pytest.skip("node and npm are missing, which Jitsu's client needs")
    folder = tmp_path_factory.mktemp("jitsu") / "client"
    shutil.copytree(HERE / "jitsu_client", folder)
    done = subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.timeout(420)  # npm, on a slow line
@pytest.mark.parametrize("mode", ["", "s2s"], ids=["browser's paths", "server to server"])
def test_jitsus_client_is_understood(jitsu_client: Path, graph: Graph, mode: str) -> None:
    """Jitsu's own client on node: every event arrives, once, and the anonymous ones are u-1's."""
    with running(graph) as server:
        subprocess.run(
            ["node", "journey.cjs", server.receiver.url or "", JITSU_KEY, mode],
            cwd=jitsu_client,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    users = graph.users()

    assert [each.type for each in graph.events] == ["page", "track", "identify", "track", "group"]
    assert len({each.message_id for each in graph.events}) == 5
    assert set(users.values()) == {"u-1"}
    assert graph.events[2].traits == {"email": "u1@example.com", "firstName": "Ünal"}
    assert "writeKey" not in json.dumps(graph.raw)


def test_the_capture_is_the_same_over_http(taken: Taken) -> None:
    """49 events that five clients once sent: over HTTP they are read as they are from the file."""
    bodies = [json.loads(line) for line in CAPTURE.read_text(encoding="utf-8").splitlines()]
    with running(taken) as server:
        statuses = {
            server.post(
                body["_received_from"]["path"],
                {"batch": [body]} if body["_received_from"]["path"] == "/v1/batch" else body,
            )
            for body in bodies
        }

    assert statuses == {200}
    assert [parse_event(each) for each in taken.events] == list(read_events(CAPTURE))


def test_the_example_of_the_page_runs(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/receiver.md: the receiver is made and run, told to stop at once."""
    page = (HERE.parent / "docs" / "receiver.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("WRITE_KEY", KEY)
    stop = threading.Event()
    stop.set()
    names: dict[str, Any] = {"stop": stop, "worker": SimpleNamespace(take=taken)}
    text = block.replace("threading.Event()", "stop").replace("port=8080", "port=0")
    exec(compile(text, "receiver.md", "exec"), names)

    assert names["receiver"].url is None
