"""Calls that are awaited: the loop goes on, they overlap, and what is cancelled is not lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from random import Random
from typing import Any

import pytest

from oracle import Oracle, make_event
from recognition import Event, GraphError, Plan, Rules, Sink, TableRules, open_graph, open_sink
from recognition.aio import AsyncRecognizer
from recognition.attribution import AttributionRules, Policy
from recognition.graph import Observation, Outcome
from recognition.graph.sqlite import SqliteGraph
from recognition.recognizer import Recognition, Recognizer
from recognition.rules import Supersede
from recognition.sinks import Applied
from recognition.sinks.sqlite import SqliteSink
from test_end_to_end import load_rows, read_column

LOGIN = make_event("m2", 2, "d1", user_id="u1")
VISIT = make_event("m1", 1, "d1")


class Gate:
    """Where threads wait until the test lets them go, as they would for a slow server."""

    def __init__(self) -> None:
        self.reached = threading.Semaphore(0)
        self.open = threading.Event()

    def pass_through(self) -> None:
        self.reached.release()
        assert self.open.wait(60)

    async def wait_until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.acquire, True, 60)


class SlowGraph(SqliteGraph):
    """A real graph that keeps whoever writes waiting at a gate, before the write."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = Gate()

    def observe(self, rules: Rules, observations: Sequence[Observation]) -> Outcome:
        self.gate.pass_through()
        return super().observe(rules, observations)


class SlowSink(SqliteSink):
    """A real sink that keeps whoever applies waiting at a gate, before the write."""

    gate: Gate

    def apply(self, plan: Plan) -> Applied:
        self.gate.pass_through()
        return super().apply(plan)


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[SlowGraph]:
    """A graph in a file, whose gate is shut."""
    with SlowGraph(tmp_path / "graph.db") as graph:
        yield graph


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[SlowSink]:
    """An empty table of events, behind a gate that is shut."""
    sink = SlowSink(f"sqlite:///{tmp_path}/warehouse.sqlite")
    sink.gate = Gate()
    recognizer = Recognizer(open_graph("memory:"))
    load_rows(sink, recognizer, recognizer.process([]))
    yield sink
    sink.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    """On a real event loop, which says so when a task was lost or took the loop for too long."""
    asyncio.run(work, debug=True)


def identified(graph: SqliteGraph) -> int:
    return graph.stats().claims


async def cancel(task: asyncio.Task[Any], times: int = 1) -> None:
    """Ask it to end; let the loop tell it."""
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)


# ---------------------------------------------------------------- the loop


def test_the_three_calls_and_the_delivery_are_those_of_the_recognizer(tmp_path: Path) -> None:
    """Awaited, `process`, `rows`, `flushed` and `deliver` give what they give otherwise."""

    async def work() -> None:
        graph = open_graph(f"sqlite:///{tmp_path}/graph.db")
        sink: Any = open_sink(f"sqlite:///{tmp_path}/warehouse.sqlite")
        async with AsyncRecognizer(graph) as worker:
            for batch in ([VISIT], [LOGIN]):
                done = await worker.process(batch)
                assert await worker.rows(done) == worker.recognizer.rows(done)
                load_rows(sink, worker.recognizer, done)
                assert await worker.flushed(done.receipt) == 0
            delivered = await worker.deliver(sink)
        sink.close()
        graph.close()

        assert (delivered.updates, delivered.rows_changed) == (1, 1)

    run(work())
    assert read_column(tmp_path / "warehouse.sqlite", "user_id") == {"m1": "u1", "m2": "u1"}


def test_the_loop_goes_on_while_a_call_waits(graph: SlowGraph, sink: SlowSink) -> None:
    """While graph and sink keep their threads waiting, the loop does other work."""

    async def work() -> None:
        graph.gate.open.set()
        async with AsyncRecognizer(graph) as worker:
            events = [make_event(f"m{n}", 2, "d1", user_id="u1") for n in (2, 3)]
            worker.recognizer.process([VISIT])
            graph.gate.open.clear()
            calls = [asyncio.create_task(worker.process([event])) for event in events]
            for _ in range(3):  # the visit's passed it before
                await graph.gate.wait_until_reached()
            for _ in range(1_000):
                await asyncio.sleep(0)

            assert not any(call.done() for call in calls)
            graph.gate.open.set()
            await asyncio.gather(*calls)
            delivery = asyncio.create_task(worker.deliver(sink))
            await sink.gate.wait_until_reached()
            done = await worker.process([make_event("m4", 4, "d1")])

            assert not delivery.done()
            assert done.stamped == 1
            sink.gate.open.set()
            assert (await delivery).updates == 1

    run(work())


def test_calls_beyond_the_threads_wait_their_turn(graph: SlowGraph) -> None:
    """No more calls run at once than there are threads, and all are done."""

    async def work() -> None:
        async with AsyncRecognizer(graph, threads=2) as worker:
            events = [make_event(f"m{n}", n, f"d{n}", user_id=f"u{n}") for n in range(6)]
            calls = [asyncio.create_task(worker.process([event])) for event in events]
            await graph.gate.wait_until_reached()
            await graph.gate.wait_until_reached()

            assert not await asyncio.to_thread(graph.gate.reached.acquire, True, 0.2)
            graph.gate.open.set()
            assert [done.claims for done in await asyncio.gather(*calls)] == [1] * 6

    run(work())


def test_the_thread_sees_the_context_of_the_caller(graph: SlowGraph, sink: SlowSink) -> None:
    """Context variables, by which spans of a trace and fields of logs travel, are the caller's."""
    request: ContextVar[str] = ContextVar("request")
    seen: list[str] = []

    async def work() -> None:
        graph.gate.open.set()
        sink.gate.open.set()
        async with AsyncRecognizer(graph) as worker:
            await worker.process([VISIT])
            await worker.process([LOGIN])
            request.set("r1")
            await worker.deliver(sink, watch=lambda plan, applied: seen.append(request.get()))

    run(work())
    assert seen == ["r1"]


def test_errors_pass_through(graph: SlowGraph) -> None:
    """What the call raises is raised where it is awaited; other calls go on."""

    async def work() -> None:
        graph.gate.open.set()
        async with AsyncRecognizer(graph) as worker:
            graph.close()
            with pytest.raises(GraphError, match="closed"):
                await worker.process([VISIT])
            with pytest.raises(GraphError, match="closed"):
                await worker.deliver([])

    run(work())


# ---------------------------------------------------------------- cancellation


def test_a_call_that_runs_goes_on_to_its_end_when_it_is_cancelled(graph: SlowGraph) -> None:
    """The cancellation is raised when the call has ended, not before; what it wrote is there."""

    async def work() -> None:
        async with AsyncRecognizer(graph) as worker:
            call = asyncio.create_task(worker.process([LOGIN]))
            await graph.gate.wait_until_reached()
            await cancel(call, times=3)

            assert not call.done()
            graph.gate.open.set()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert identified(graph) == 1
            again = await worker.process([LOGIN])
            assert (again.claims, again.owners[0] is not None) == (0, True)

    run(work())


def test_a_call_that_waits_is_never_begun_when_it_is_cancelled(graph: SlowGraph) -> None:
    """It gets no thread any more and writes nothing; it ends at once."""

    async def work() -> None:
        async with AsyncRecognizer(graph, threads=1) as worker:
            first = asyncio.create_task(worker.process([VISIT]))
            await graph.gate.wait_until_reached()
            second = asyncio.create_task(worker.process([LOGIN]))
            await asyncio.sleep(0)
            await cancel(second)

            assert second.cancelled()
            graph.gate.open.set()
            await first

        assert identified(graph) == 0

    run(work())


def test_what_a_cancelled_call_raised_is_the_cause(graph: SlowGraph) -> None:
    """The error of a call that was cancelled is not lost."""

    async def work() -> None:
        async with AsyncRecognizer(graph) as worker:
            call = asyncio.create_task(worker.process([LOGIN]))
            await graph.gate.wait_until_reached()
            await cancel(call)
            graph.close()
            graph.gate.open.set()
            with pytest.raises(asyncio.CancelledError) as caught:
                await call

            assert isinstance(caught.value.__cause__, GraphError)

    run(work())


def test_a_timeout_is_a_cancellation(graph: SlowGraph) -> None:
    """`asyncio.timeout` is told as such, once the call has ended."""

    async def process_in_time(worker: AsyncRecognizer) -> None:
        async with asyncio.timeout(0.05) as limit:
            # After it, however late the loop is: it goes by the order of the times.
            end = limit.when()
            assert end is not None
            asyncio.get_running_loop().call_at(end + 0.15, graph.gate.open.set)
            await worker.process([LOGIN])

    async def work() -> None:
        async with AsyncRecognizer(graph) as worker:
            with pytest.raises(TimeoutError):
                await process_in_time(worker)

            assert identified(graph) == 1

    run(work())


def test_a_cancelled_delivery_ends_after_its_window(graph: SlowGraph, sink: SlowSink) -> None:
    """The window that is applied is acknowledged; the others stay in the outbox, not leased."""

    async def work() -> None:
        graph.gate.open.set()
        async with AsyncRecognizer(graph) as worker:
            visits = [make_event(f"v{n}", 1, f"d{n}") for n in range(5)]
            logins = [make_event(f"w{n}", 2, f"d{n}", user_id=f"u{n}") for n in range(5)]
            load_rows(sink, worker.recognizer, await worker.process(visits))
            load_rows(sink, worker.recognizer, await worker.process(logins))
            delivery = asyncio.create_task(worker.deliver(sink, window=2))
            await sink.gate.wait_until_reached()
            await cancel(delivery)
            sink.gate.open.set()
            with pytest.raises(asyncio.CancelledError):
                await delivery

            assert graph.stats().pending_updates == 3
            assert (await worker.deliver(sink, window=2)).updates == 3

    run(work())


def test_closing_waits_for_what_was_called(graph: SlowGraph, sink: SlowSink) -> None:
    """Calls come to their end, a delivery to that of its window; later calls are refused."""

    async def work() -> None:
        graph.gate.open.set()
        worker = AsyncRecognizer(graph)
        for number in range(4):
            await worker.process([make_event(f"v{number}", 1, f"d{number}")])
            await worker.process([make_event(f"w{number}", 2, f"d{number}", user_id="u1")])
        delivery = asyncio.create_task(worker.deliver(sink, window=1))
        await sink.gate.wait_until_reached()
        closing = asyncio.create_task(worker.close())
        await asyncio.sleep(0.05)

        assert not closing.done()
        sink.gate.open.set()
        await closing
        assert (await delivery).updates == 1
        await worker.close()
        with pytest.raises(RuntimeError):
            await worker.process([VISIT])

    run(work())


# ---------------------------------------------------------------- all of it at once


@pytest.mark.parametrize("versioned", [False, True])
def test_overlapping_and_cancelled_batches_leave_the_rows_of_the_oracle(
    versioned: bool, tmp_path: Path
) -> None:
    """Many batches at once, each cancelled at any moment until one comes through, lose nothing."""
    draw = Random(7)
    events = [
        make_event(
            f"{number:03}",
            draw.randrange(1_000),
            draw.choice(["kiosk", "phone", "tablet"]),
            user_id=draw.choice([None] * 4 + ["ann", "bob"]),
        )
        for number in range(160)
    ]
    supersede = Supersede.VERSION if versioned else Supersede.AUTO
    rules = Rules(
        attribution=AttributionRules(policy=Policy.DEVICE_SPLIT),
        default=TableRules(supersede=supersede),
    )
    graph = open_graph(f"sqlite:///{tmp_path}/graph.db")
    url = f"sqlite:///{tmp_path}/warehouse.sqlite"
    cancelled = 0

    def write(worker: AsyncRecognizer, done: Recognition) -> None:
        sink = open_sink(url)
        load_rows(sink, worker.recognizer, done)
        sink.close()

    async def take(worker: AsyncRecognizer, batch: Sequence[Event]) -> None:
        done = await worker.process(batch)
        await asyncio.to_thread(write, worker, done)
        await worker.flushed(done.receipt)

    async def carry(worker: AsyncRecognizer, batch: Sequence[Event]) -> None:
        nonlocal cancelled
        while True:
            call = asyncio.create_task(take(worker, batch))
            if draw.random() < 0.5:
                await asyncio.sleep(draw.random() / 50)
                call.cancel()
            try:
                await call
            except asyncio.CancelledError:
                cancelled += 1
            else:
                return

    async def keep_delivering(worker: AsyncRecognizer, sink: Sink) -> None:
        while True:
            await worker.deliver(sink, window=5)
            await asyncio.sleep(0.01)

    async def work() -> None:
        sink = open_sink(url)
        async with AsyncRecognizer(graph, rules, threads=3) as worker:
            write(worker, worker.recognizer.process([]))
            async with asyncio.TaskGroup() as group:
                background = group.create_task(keep_delivering(worker, sink))
                async with asyncio.TaskGroup() as carrying:
                    for start in range(0, len(events), 8):
                        carrying.create_task(carry(worker, events[start : start + 8]))
                background.cancel()
            await worker.deliver(sink)
        sink.close()

    asyncio.run(work())
    graph.close()
    oracle = Oracle(
        policy="device_split",
        lookback=rules.attribution.lookback,
        own_column=False,
        events=events,
    )

    assert cancelled > 0
    assert read_column(tmp_path / "warehouse.sqlite", "user_id") == oracle.owners()
