"""
A port that the SDKs of Segment, RudderStack and Jitsu post their events to.

`Receiver` is a source of a worker: a request is answered with 200 when its events are durable in
the graph, never before. Requests that come together are handed over together. What cannot be taken
now is answered with 429 or 503 and ``Retry-After``, upon which the SDKs of Segment and RudderStack
keep their events and come again; Jitsu's does not. So what was received is offered to the graph
again until it takes it, whether somebody still waits for it or not.

It speaks HTTP without TLS and listens on loopback unless it is told otherwise: anything else
belongs behind a proxy. Write keys are compared in constant time. They, and what is in events, are
neither logged nor kept; only rejects, which somebody asked for, hold events.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

from recognition.errors import ConfigurationError, GraphError, MissingDependencyError
from recognition.events import Reject, expand_batch

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ModuleNotFoundError as exc:
    raise MissingDependencyError(
        f"the HTTP receiver needs the package {exc.name!r}, which is not installed; "
        'run: pip install "recognition[server]"'
    ) from exc

_log = logging.getLogger("recognition.receiver")

#: Returns when a batch of raw events is durable in the graph; see `recognition.worker.Source`.
Take: TypeAlias = Callable[[Sequence[dict[str, Any]]], None]

#: One of the numbers of a source; see `recognition.metrics.Measure`.
Measure: TypeAlias = tuple[str, str, str, tuple[str, ...], Mapping[tuple[str, ...], float]]

# The last part of a path, and the type of an event that does not say it itself: in full as in
# https://www.twilio.com/docs/segment/connections/sources/catalog/libraries/server/http-api, and
# in one letter as the browsers' SDK has it.
_TYPES = {
    "track": "track",
    "identify": "identify",
    "page": "page",
    "screen": "screen",
    "group": "group",
    "alias": "alias",
    "t": "track",
    "i": "identify",
    "p": "page",
    "s": "screen",
    "g": "group",
    "a": "alias",
}
_BATCHES = frozenset(("batch", "b", "import"))

#: Seconds after which whoever was sent away may come again.
RETRY_AFTER = 2

# For a whole body; the SDKs themselves give up after 15.
_BODY_SECONDS = 30.0

# Longer than proxies keep a connection, so that they close it first.
_KEEP_ALIVE_SECONDS = 75

# So long a connection may be without a request that is whole as far as its headers: uvicorn closes
# those that it has answered, and keeps one that never asks, or asks letter by letter, for ever.
_IDLE_SECONDS = 90.0

# A member of a batch is an event only if it has more bytes; in memory an empty one has some 300.
_LEAST_BYTES = 50

# What a reject keeps of a body that is too long; as for lines of files.
_KEPT_BYTES = 4 * 1024


# Why nothing can be taken now, as ``/readyz`` shows it.
_NOT_STARTED = "not started"
_NOT_TAKEN = "the graph does not take events"
_STOPPING = "stopping"


class _RefusedError(Exception):
    """A request is answered with this status; ``reason`` is the same for the same fault."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        #: The beginning of the body, as far as it was read.
        self.begin = b""


@dataclass(slots=True)
class _Waiting:
    """The events of one request, until they are durable."""

    events: list[dict[str, Any]]
    size: int
    done: asyncio.Future[None]


@dataclass(slots=True)
class Counts:
    """What has happened since the receiver was made; only ever grows, but for what waits."""

    #: By status of the answer.
    requests: Counter[int] = field(default_factory=Counter)
    #: By reason: requests and members of batches that were no events.
    rejected: Counter[str] = field(default_factory=Counter)
    #: Events that are durable.
    events: int = 0
    #: How often events were offered again.
    retries: int = 0
    #: Of bodies, as they came over the wire.
    bytes: int = 0
    #: Of bodies, unpacked, that are held now.
    waiting_bytes: int = 0

    def measures(self) -> Iterator[Measure]:
        """The same for metrics: name, kind, meaning, names of labels, numbers by labels."""
        measures: list[Measure] = [
            ("requests", "counter", "Requests that brought events, by status.", ("status",),
             {(str(status),): n for status, n in sorted(self.requests.items())}),
            ("rejected", "counter", "Requests and events that were refused, by reason.",
             ("reason",), {(reason,): n for reason, n in sorted(self.rejected.items())}),
            ("events", "counter", "Events that are durable.", (), {(): self.events}),
            ("retries", "counter", "How often events were offered again.", (), {(): self.retries}),
            ("bytes", "counter", "Bytes of bodies as they came.", (), {(): self.bytes}),
            ("waiting_bytes", "gauge", "Bytes of bodies that wait.", (), {(): self.waiting_bytes}),
        ]  # fmt: skip
        for name, kind, help, labels, values in measures:
            yield f"receiver_{name}", kind, help, labels, values


class Receiver:
    """
    Events over HTTP.

    ``POST /v1/batch`` and ``/v1/{type}`` as Segment and RudderStack have them, ``POST
    /api/s/{type}`` and ``/api/s/s2s/{type}`` as Jitsu has them; ``GET /healthz``, ``/readyz`` and
    ``/metrics``. A body is JSON, plain or gzip. The key is the header ``X-Write-Key``, the user of
    basic authentication, or ``writeKey`` in the body.

    A member of a batch that is no object is rejected and the others are taken. What an object lacks
    to be an event is found out by ``take``.

    Args:
        keys: The write keys that are let in; at least one.
        host: The address to listen on.
        port: 0: any free one, see `url`.
        origins: The web pages (``https://shop.example``) whose scripts may post; ``*``: all. None:
            browsers post to the receiver's own origin only.
        max_body: The most bytes of a body, packed and unpacked. Segment's SDKs send 500 KB at most,
            Jitsu 1 MB.
        max_waiting: The most bytes of bodies that are held at a time, unpacked; beyond it requests
            are answered with 429.
        batch_size: So many events are handed over at a time, unless one request has more.
        patience: How many seconds a request waits for its events to be durable; then it is answered
            with 503, and the events are taken all the same.
        rejects: Called with each reject, in the receiver's thread; the ``source`` is the path.
            Requests without a right key are counted and not kept.
        ready: Whether what is behind is ready; asked by ``/readyz``, in a thread of its own.
        metrics: The text of ``/metrics``, in Prometheus's format. ``None``: that of the receiver's
            own `render_counts`.

    Raises:
        ConfigurationError: There is no key, or one is empty.
    """

    def __init__(
        self,
        keys: Iterable[str],
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        origins: Sequence[str] = (),
        max_body: int = 5 * 1024 * 1024,
        max_waiting: int = 32 * 1024 * 1024,
        batch_size: int = 1_000,
        patience: float = 10.0,
        rejects: Callable[[Reject], object] | None = None,
        ready: Callable[[], bool] | None = None,
        metrics: Callable[[], str] | None = None,
    ) -> None:
        given = list(keys)
        if not given or not all(key.strip() for key in given):
            raise ConfigurationError(
                "the receiver needs at least one write key, and none that is empty"
            )
        # Hashes: of one length, so that comparing tells nothing, and no key is kept.
        self._keys = [_hash(key) for key in given]
        self._host = host
        self._port = port
        self._max_body = max_body
        self._max_waiting = max_waiting
        self._batch_size = batch_size
        self._patience = patience
        self._rejects = rejects
        self._ready = ready
        self._metrics = metrics
        self._queue: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._trouble: str | None = _NOT_STARTED
        self._url: str | None = None
        self.counts = Counts()
        self._app = Starlette(
            routes=[
                Route("/v1/{type}", self._receive, methods=["POST"]),
                Route("/api/s/{type}", self._receive, methods=["POST"]),
                Route("/api/s/s2s/{type}", self._receive, methods=["POST"]),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/metrics", self._show_metrics),
            ],
            middleware=[
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(origins),
                    allow_methods=["POST"],
                    allow_headers=["*"],
                    max_age=86_400,
                )
            ]
            if origins
            else [],
        )

    @property
    def url(self) -> str | None:
        """Where it listens, such as ``http://127.0.0.1:8080``; ``None`` while it does not."""
        return self._url

    def measures(self) -> Iterator[Measure]:
        """The counts as metrics have them."""
        return self.counts.measures()

    def run(self, take: Take, stop: threading.Event) -> None:
        """
        Listen until ``stop`` is set; then finish what was begun, and return.

        While ``take`` raises a `GraphError` that may pass, the same events are offered again, and
        whoever waits longer than the patience is answered with 503; after any other `GraphError` at
        once. It goes on in both cases.

        Raises:
            ConfigurationError: The address cannot be listened on.
            Exception: ``take`` raised anything else. Nothing that was answered with 200 is lost.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listening = socket.create_server((self._host, self._port), family=family, backlog=512)
        except OSError as exc:
            raise ConfigurationError(
                f"{self._host} port {self._port} cannot be listened on: {exc.strerror or exc}",
                retryable=True,  # whoever holds the port may go
            ) from exc
        with listening:
            address, port = listening.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            self._url = f"http://{shown}:{port}"
            if not address.startswith("127.") and address != "::1":
                _log.warning("listening on %s without TLS: put a proxy before it", self._url)
            try:
                asyncio.run(self._serve(listening, take, stop))
            finally:
                self._url = None
                self._trouble = _NOT_STARTED

    async def _serve(self, listening: socket.socket, take: Take, stop: threading.Event) -> None:
        server = _Server(
            uvicorn.Config(
                self._app,
                access_log=False,
                log_config=None,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                # Connections and requests; more are answered with 503.
                limit_concurrency=1_000,
                timeout_graceful_shutdown=round(self._patience) + 5,
            )
        )
        self._queue.clear()
        self.counts.waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._trouble = None
        # A thread of its own: those that all share may wait for `ready` or `metrics`.
        pool = ThreadPoolExecutor(1, "recognition-receiver")
        taking = asyncio.create_task(self._take_forever(pool, take, stop))

        async def watch() -> None:
            while not stop.is_set() and not taking.done():
                await asyncio.sleep(0.05)
            self._trouble = _STOPPING
            server.should_exit = True

        async def sweep() -> None:
            idle: dict[Any, tuple[Any, float]] = {}
            while True:
                idle = _close_idle(server.server_state.connections, idle)
                await asyncio.sleep(_IDLE_SECONDS / 90)

        helpers = [asyncio.create_task(watch()), asyncio.create_task(sweep())]
        try:
            # Returns when the requests that were begun are answered.
            await server.serve(sockets=[listening])
        finally:
            for helper in helpers:
                helper.cancel()
            if not taking.done():
                taking.cancel()
        try:
            await taking
        except asyncio.CancelledError:
            pass
        finally:
            # What is in the graph's hands is finished, too.
            await asyncio.to_thread(pool.shutdown)

    # Taking ---------------------------------------------------------------------------------------

    async def _take_forever(self, pool: Executor, take: Take, stop: threading.Event) -> None:
        """Hand over what waits, one batch at a time; the next one gathers meanwhile."""
        while True:
            await self._arrived.wait()
            batch: list[_Waiting] = []
            events: list[dict[str, Any]] = []
            while self._queue and (
                not batch or len(events) + len(self._queue[0].events) <= self._batch_size
            ):
                batch.append(self._queue.pop(0))
                events += batch[-1].events
            if not self._queue:
                self._arrived.clear()
            try:
                taken = await self._offer(pool, take, events, stop)
            except BaseException:
                self._trouble = _STOPPING
                self._finish([*batch, *self._queue], _RefusedError(503, _NOT_TAKEN))
                self._queue.clear()
                raise
            if taken:
                self.counts.events += len(events)
            self._finish(batch, None if taken else _RefusedError(503, _NOT_TAKEN))

    async def _offer(
        self, pool: Executor, take: Take, events: Sequence[dict[str, Any]], stop: threading.Event
    ) -> bool:
        """Offer events until the graph has them; ``False``: it will not, or there is no time."""
        pause = 0.1
        while True:
            try:
                await asyncio.get_running_loop().run_in_executor(pool, take, events)
            except GraphError as exc:
                # Its text is written for logs; what the clients get says nothing of the inside.
                _log.warning("the graph did not take %d events: %s", len(events), exc)
                self._trouble = _NOT_TAKEN
                if stop.is_set() or not exc.retryable:
                    return False
            else:
                if self._trouble == _NOT_TAKEN:
                    self._trouble = None
                return True
            self.counts.retries += 1
            # By and by, as long as nobody wants it to end.
            until = time.monotonic() + pause
            while time.monotonic() < until and not stop.is_set():
                await asyncio.sleep(0.05)
            pause = min(5.0, 2 * pause)

    def _finish(self, batch: Iterable[_Waiting], refused: _RefusedError | None) -> None:
        for each in batch:
            self.counts.waiting_bytes -= each.size
            if each.done.done():
                continue  # whoever waited went away
            if refused is None:
                each.done.set_result(None)
            else:
                each.done.set_exception(refused)
                each.done.exception()  # looked at, even if nobody waits any more

    # Requests -------------------------------------------------------------------------------------

    async def _receive(self, request: Request) -> Response:
        kind = request.path_params["type"]
        let_in = False
        try:
            if kind not in _TYPES and kind not in _BATCHES:
                raise _RefusedError(404, "no such type of event")
            if self._trouble == _STOPPING:
                raise _RefusedError(503, _STOPPING)
            given = _key_of(request)
            let_in = given is not None and self._lets_in(given)
            if given is not None and not let_in:
                raise _RefusedError(401, "the write key is not known")
            with self._held() as held:
                body = await self._read(request, held)
                try:
                    events = self._parse(body, kind, let_in=let_in, path=request.url.path)
                except _RefusedError as refused:
                    # What was not understood may hold the key anywhere: then nothing is kept.
                    refused.begin = b"" if b"writeKey" in body else body[:_KEPT_BYTES]
                    raise
                let_in = True
                if events:
                    waiting = _Waiting(events, held.hand_over(), asyncio.Future())
                    self._queue.append(waiting)
                    self._arrived.set()
                    await self._await(waiting)
        except ClientDisconnect:
            return self._answer(400, "the connection was cut")
        except _RefusedError as refused:
            if refused.status not in (429, 503):
                self._reject(refused.reason, refused.begin if let_in else None, request.url.path)
            return self._answer(refused.status, refused.reason)
        return self._answer(200, None)

    async def _await(self, waiting: _Waiting) -> None:
        try:
            # Shielded: whoever waits no longer does not take the events back.
            await asyncio.wait_for(asyncio.shield(waiting.done), self._patience)
        except TimeoutError:
            raise _RefusedError(503, "the events are not durable yet") from None

    def _answer(self, status: int, reason: str | None) -> Response:
        self.counts.requests[status] += 1
        if reason is None:
            # What each of the three expects to be told.
            return JSONResponse({"success": True, "ok": True})
        headers = {"Retry-After": str(RETRY_AFTER)} if status in (429, 503) else {}
        return JSONResponse(
            {"success": False, "code": str(status), "message": reason}, status, headers
        )

    def _lets_in(self, key: str) -> bool:
        given = _hash(key)
        found = False
        for each in self._keys:  # all of them, whichever it is
            found |= hmac.compare_digest(each, given)
        return found

    @contextmanager
    def _held(self) -> Iterator[_Held]:
        held = _Held(self.counts, self._max_waiting)
        try:
            yield held
        finally:
            held.release()

    async def _read(self, request: Request, held: _Held) -> bytes:
        """The body, unpacked; no more of it is held than may be."""
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip"):
            raise _RefusedError(415, "a body is plain or gzip")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_body:
            raise _RefusedError(413, "the body is too large")
        unzip = zlib.decompressobj(31) if encoding in ("gzip", "x-gzip") else None
        parts: list[bytes] = []
        size = received = 0
        try:
            # A body that trickles in holds memory for somebody who may not even have a key.
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    received += len(chunk)
                    self.counts.bytes += len(chunk)
                    part = chunk if unzip is None else unzip.decompress(chunk, self._max_body + 1)
                    size += len(part)
                    parts.append(part)
                    if size > self._max_body or received > self._max_body:
                        raise _RefusedError(413, "the body is too large")
                    if unzip is not None and unzip.unused_data:
                        raise _RefusedError(400, "the gzip stream is damaged")
                    held.add(len(part))
            if unzip is not None and not unzip.eof:
                raise _RefusedError(400, "the gzip stream ends too early")
        except TimeoutError:
            # Not 408, after which RudderStack's SDK drops its events.
            raise _RefusedError(503, "the body did not come") from None
        except (zlib.error, _RefusedError) as exc:
            refused = (
                exc
                if isinstance(exc, _RefusedError)
                else _RefusedError(400, "the gzip stream is damaged")
            )
            begin = b"".join(parts)[:_KEPT_BYTES]
            refused.begin = b"" if b"writeKey" in begin else begin
            raise refused from None
        return b"".join(parts)

    def _parse(self, body: bytes, kind: str, *, let_in: bool, path: str) -> list[dict[str, Any]]:
        """The events of a body, without a key; members that are none are rejected."""
        try:
            read = json.loads(body.decode(), parse_constant=_refuse_constant)
        except UnicodeDecodeError:
            raise _RefusedError(400, "not UTF-8") from None
        except ValueError:
            raise _RefusedError(400, "not JSON") from None
        except RecursionError:
            raise _RefusedError(400, "nested too deeply") from None
        envelope = read if isinstance(read, dict) else {}
        inside = envelope.pop("writeKey", None)
        if not let_in and not (isinstance(inside, str) and self._lets_in(inside)):
            raise _RefusedError(401, "the write key is missing or not known")
        members = expand_batch(read) if isinstance(read, list) or "batch" in envelope else None
        if members is None:
            if kind in _BATCHES or not envelope:
                raise _RefusedError(400, "the body is no batch" if kind in _BATCHES else "no event")
            members = [envelope]
        if len(members) * _LEAST_BYTES > self._max_body:
            raise _RefusedError(413, "the batch has too many members")
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        events = []
        for index, member in enumerate(members):
            if not isinstance(member, dict):
                self._reject("the event is not an object", _render(member), path, index)
                continue
            member.pop("writeKey", None)
            if kind in _TYPES and member.get("type") is None:
                member["type"] = _TYPES[kind]
            # The last resort for an event without a time of its own, as Segment's servers have it.
            if member.get("receivedAt") is None:
                member["receivedAt"] = now
            events.append(member)
        return events

    def _reject(self, reason: str, raw: bytes | None, path: str, index: int | None = None) -> None:
        self.counts.rejected[reason] += 1
        if self._rejects is not None and raw is not None:
            self._rejects(Reject(source=path, line=1, reason=reason, raw=raw, index=index))

    # Operations -----------------------------------------------------------------------------------

    async def _healthz(self, _: Request) -> Response:
        """The process is alive: whoever reads this sees it."""
        return PlainTextResponse("ok")

    async def _readyz(self, _: Request) -> Response:
        """Events would be taken now."""
        trouble = self._trouble
        if trouble is None and self.counts.waiting_bytes >= self._max_waiting:
            trouble = "too much is waiting"
        if trouble is None and self._ready is not None and not await asyncio.to_thread(self._ready):
            trouble = "what is behind is not ready"
        if trouble is None:
            return PlainTextResponse("ready")
        return PlainTextResponse(trouble, 503, {"Retry-After": str(RETRY_AFTER)})

    async def _show_metrics(self, _: Request) -> Response:
        if self._metrics is None:
            text = render_counts(self.counts)
        else:
            text = await asyncio.to_thread(self._metrics)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


class _Server(uvicorn.Server):
    """One that leaves signals to the process it runs in."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _close_idle(
    connections: Iterable[Any], before: Mapping[Any, tuple[Any, float]]
) -> dict[Any, tuple[Any, float]]:
    """
    Close connections that have waited for a request too long.

    Args:
        connections: Of uvicorn; ``cycle`` is the request that is at work or was, if there was any.
        before: What this gave the last time: since when each waits, and after which request.
    """
    now = time.monotonic()
    waiting: dict[Any, tuple[Any, float]] = {}
    for each in list(connections):
        cycle = each.cycle
        if cycle is not None and not cycle.response_complete:
            continue
        last, since = before.get(each, (cycle, now))
        waiting[each] = (cycle, since if last is cycle else now)
        if now - waiting[each][1] > _IDLE_SECONDS:
            each.transport.close()
    return waiting


class _Held:
    """The bytes that one request holds, until they are handed over or given back."""

    def __init__(self, counts: Counts, limit: int) -> None:
        self._counts = counts
        self._limit = limit
        self._size = 0

    def add(self, size: int) -> None:
        if self._counts.waiting_bytes + size > self._limit:
            raise _RefusedError(429, "too much is waiting")
        self._counts.waiting_bytes += size
        self._size += size

    def hand_over(self) -> int:
        """Whoever finishes the events gives the bytes back."""
        size, self._size = self._size, 0
        return size

    def release(self) -> None:
        self._counts.waiting_bytes -= self._size
        self._size = 0


def _hash(key: str) -> bytes:
    # Of what JSON and headers give, half of a surrogate pair is no key, and no reason to fail.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _key_of(request: Request) -> str | None:
    """The key of the headers: that of Jitsu, or the user of basic authentication."""
    key = request.headers.get("x-write-key")
    if key:
        return key
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        pair = base64.b64decode(encoded.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    user, _, password = pair.partition(":")
    # Jitsu's keys are ``id:secret``, Segment's have no password.
    return pair if password else user


def _refuse_constant(name: str) -> Any:
    raise ValueError("NaN and Infinity are not JSON")


def _render(member: object) -> bytes:
    try:
        return json.dumps(member).encode()[:_KEPT_BYTES]
    except RecursionError:
        return b"(nested too deeply)"


def render_counts(counts: Counts) -> str:
    """The receiver's own counters in Prometheus's text format, each with its meaning."""
    lines: list[str] = []
    for name, kind, help, labels, values in counts.measures():
        name = f"recognition_{name}{'_total' if kind == 'counter' else ''}"
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
        for texts, value in values.items():
            shown = ",".join(f'{key}="{text}"' for key, text in zip(labels, texts, strict=True))
            lines.append(f"{name}{{{shown}}} {value}" if shown else f"{name} {value}")
    return "\n".join(lines) + "\n"
