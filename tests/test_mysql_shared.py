"""What is shown of SQLite and DuckDB in `test_sinks.py` and holds on MariaDB too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mariadb import GivenServer
from recognition.sinks import open_sink
from recognition.sinks.sql import SqlSink
from test_mysql import TYPES, Database
from test_sinks import (  # noqa: F401 - collected here, with the fixtures of this file
    _apply_in_any_order,
    _expected,
    _windows_by_ledger,
    _windows_by_version,
    test_a_computed_column_is_refused,
    test_a_missing_column_comes_with_the_command_that_adds_it,
    test_a_missing_table_names_the_nearest,
    test_a_table_that_changed_is_looked_at_again,
    test_a_value_is_looked_for_and_replaced,
    test_compile_is_what_apply_sends,
    test_compile_shows_the_bounds,
    test_load_adds_columns,
    test_load_keeps_the_first_of_a_key,
    test_load_makes_the_table_and_inserts,
    test_load_refuses_a_view,
    test_load_replaces_the_stamp,
    test_numbers_become_texts_where_texts_are,
    test_rows_are_counted_only_when_some_are_missing,
    test_rows_that_a_later_update_named_are_spared,
    test_rows_without_time_belong_to_the_update_of_all_rows,
    test_the_ledger_does_not_grow_by_repetition,
    test_the_ledger_forgets_after_its_days,
    test_threads_share_a_sink,
    test_two_names_of_one_column_are_refused,
    test_ways_of_one_key_are_kept_apart,
)


class Portable(Database):
    """Takes the SQL of the other two."""

    scheme = "mariadb"
    types = TYPES

    def run(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """With its quotes, marks and casts."""
        for theirs, ours in (('"', "`"), ("?", "%s"), ("AS VARCHAR", "AS CHAR")):
            statement = statement.replace(theirs, ours)
        return super().run(statement, *parameters)


@pytest.fixture
def database(mariadb: GivenServer) -> Iterator[Portable]:
    """An empty database."""
    with mariadb.database("CHARACTER SET utf8mb4") as name:
        yield Portable(mariadb, name)


@pytest.fixture
def opened() -> Iterator[Callable[..., SqlSink]]:
    """Open sinks that are closed at the end."""
    sinks: list[SqlSink] = []

    def open_it(database: Portable, **options: object) -> SqlSink:
        sink = open_sink(database.url, **options)
        assert isinstance(sink, SqlSink)
        sinks.append(sink)
        return sink

    yield open_it
    for sink in sinks:
        sink.close()


@pytest.mark.parametrize("way", ["ledger", "version"])
def test_any_order_and_any_plans_converge(mariadb: GivenServer, way: str) -> None:
    """Shuffled, repeated and cut into plans at random, updates leave what the last one says."""
    windows = _windows_by_ledger() if way == "ledger" else _windows_by_version()

    @settings(max_examples=12, deadline=None, database=None)
    @given(windows, st.integers(0, 10**6))
    def check(window: list[Any], seed: int) -> None:
        with mariadb.database("CHARACTER SET utf8mb4") as name:
            database = Portable(mariadb, name)

            _apply_in_any_order(database, window, Random(seed))  # type: ignore[arg-type]

            for column in ("stitched_user_id", "context_traits_email", "user_id"):
                assert database.column(column) == _expected(window, column)

    check()
