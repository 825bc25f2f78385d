"""
Where updates go: what a sink is, what it reports, and how one is found by its URL.

Importing this loads no driver; a sink's module is imported when its scheme is opened. A third party
adds a sink by an entry point of the group ``recognition.sinks``, named like the scheme, without
touching us.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, isclass, signature
from typing import Protocol, cast, get_type_hints, runtime_checkable

from pydantic import ConfigDict, TypeAdapter, ValidationError

from recognition.errors import (
    ConfigurationError,
    MissingDependencyError,
    RecognitionError,
    UnknownSchemeError,
)
from recognition.planner import Plan, Step

_GROUP = "recognition.sinks"

# Also registered as entry points; named here so that a source tree that is not installed works.
_BUILT_IN = {
    "chdb": "recognition.sinks.clickhouse:ClickhouseSink",
    "clickhouse": "recognition.sinks.clickhouse:ClickhouseSink",
    "bigquery": "recognition.sinks.bigquery:BigquerySink",
    "databricks": "recognition.sinks.databricks:DatabricksSink",
    "duckdb": "recognition.sinks.duckdb:DuckdbSink",
    "snowflake": "recognition.sinks.snowflake:SnowflakeSink",
    "mariadb": "recognition.sinks.mysql:MysqlSink",
    "mysql": "recognition.sinks.mysql:MysqlSink",
    "postgres": "recognition.sinks.postgresql:PostgresqlSink",
    "postgresql": "recognition.sinks.postgresql:PostgresqlSink",
    "redshift": "recognition.sinks.redshift:RedshiftSink",
    "sqlite": "recognition.sinks.sqlite:SqliteSink",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """
    What a sink can do, known without a connection. Each default is the least.

    Args:
        ledger: Keeps in the destination what was applied, and so lets the greater ``sequence``
            stand in tables that have no ``recognition_version``. Without it the sink refuses
            updates that do not set this column.
        counts_per_update: Can tell rows matched of each update, not of each step alone.
    """

    ledger: bool = False
    counts_per_update: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedStep:
    """What one step did; see `Applied` for what the counts mean."""

    table: str
    rows_matched: int
    rows_changed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """
    What a sink reports about one plan. It was committed when this exists.

    ``rows_changed`` were written. ``rows_matched`` are as the updates want them now: they hold the
    values (or a later version), whether this call or an earlier one wrote them. Matched rows are
    counted by a query of their own only where `Step.needs_count` says so: fewer rows changed than
    the updates expected, for example; otherwise they are taken to be the changed ones.

    Args:
        rows_matched: The sum over the steps.
        rows_changed: The sum over the steps.
        steps: One entry for each statement that was made for the plan, in order.
        matched_by_update: Rows matched by update id, for the updates whose rows were counted.
            An update of which a later one covered everything is not in it. What it expects and a
            later one took, in this plan or by the ledger, is expected of that one: the ledger's
            part counts as matched here.
            A sink that publishes values for rows that are still to come, and reads none, has none
            in it, and no rows matched: what an update expects is taken as met.
        rejected: The ids of updates of which nothing was written, each with its reason. All others
            of the plan were applied. A refused update still hides what it covers of its own plan.
        statements: How many statements were sent, those that stage and look up included.
        bytes_read: How many bytes of tables the engine says that it went through for all of them;
            ``None``: it does not say. BigQuery bills by these.
    """

    rows_matched: int = 0
    rows_changed: int = 0
    steps: tuple[AppliedStep, ...] = ()
    matched_by_update: Mapping[str, int] = field(default_factory=dict)
    rejected: tuple[tuple[str, RecognitionError], ...] = ()
    statements: int = 0
    bytes_read: int | None = None


@runtime_checkable
class Sink(Protocol):
    """A destination that can apply updates."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can do; constant, and known without a connection."""
        ...

    def compile(self, step: Step) -> str:
        """
        The statement that ``apply()`` would send for the step. Nothing is written.

        It may look at the table's columns, where there is such a table.
        """
        ...

    def apply(self, plan: Plan) -> Applied:
        """
        Set the rows that meet the plan; applying twice leaves the rows as once does.

        It never inserts a row. An update that this destination cannot hold is reported in
        ``Applied.rejected``, the others are applied.

        Raises:
            SinkError: The destination failed; the error says whether anything was written.
        """
        ...

    def close(self) -> None:
        """Give back what is held open; the second time nothing happens."""
        ...


def installed_schemes() -> tuple[str, ...]:
    """The URL schemes of all sinks, built in and by plugins, in alphabetical order."""
    return tuple(sorted({*_BUILT_IN, *(point.name for point in entry_points(group=_GROUP))}))


def open_sink(url: str, /, **options: object) -> Sink:
    """
    The sink of a URL's scheme; it connects when it is first used.

    Args:
        url: For example ``sqlite:///warehouse.db``. A driver may follow the scheme: ``scheme+x``.
        options: Handed to the sink, as what it says it takes: texts of the environment too, such as
            ``"60"`` for a number.

    Raises:
        UnknownSchemeError: No sink is installed for the scheme; the text lists those that are.
        MissingDependencyError: The sink's driver is not installed; the text names the command.
        ConfigurationError: This is no URL, or the sink takes no such option; the text names the
            nearest that it takes.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9_.-]*)(\+[A-Za-z0-9_.-]+)?:", url)
    if found is None:
        # The text is not shown: what is no URL may still hold a password.
        raise ConfigurationError(
            "a sink is given as a URL that begins with a scheme, such as sqlite:///warehouse.db"
        )
    scheme = found[1].lower()
    sink = _load(scheme)
    return sink(url, **_read_options(scheme, sink, options))


def _read_options(
    scheme: str, sink: Callable[..., Sink], options: Mapping[str, object]
) -> dict[str, object]:
    """The options as the sink's parameters of these names want them."""
    if not options:
        return {}
    _, *parameters = signature(sink).parameters.values()  # the first is the URL
    if any(each.kind is Parameter.VAR_KEYWORD for each in parameters):
        return dict(options)
    known = [each.name for each in parameters]
    types = get_type_hints(sink.__init__ if isclass(sink) else sink)
    read: dict[str, object] = {}
    for name, value in options.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise ConfigurationError(f"the sink {scheme!r} takes no option {name!r}; {hint}")
        try:
            adapter: TypeAdapter[object] = TypeAdapter(
                types.get(name, object),
                config=ConfigDict(arbitrary_types_allowed=True),  # a driver's own client
            )
            read[name] = adapter.validate_python(value)
        except ValidationError as exc:
            # The value is not shown: it may be a secret.
            reasons = "; ".join(error["msg"] for error in exc.errors(include_input=False))
            raise ConfigurationError(f"the sink {scheme!r}, option {name!r}: {reasons}") from None
    return read


def _load(scheme: str) -> Callable[..., Sink]:
    if scheme in _BUILT_IN:
        module, _, name = _BUILT_IN[scheme].partition(":")
        try:
            return cast(Callable[..., Sink], getattr(import_module(module), name))
        except ModuleNotFoundError as exc:
            raise MissingDependencyError(
                f"the sink {scheme!r} needs the package {exc.name!r}, which is not installed; "
                f'run: pip install "recognition[{scheme}]"'
            ) from exc
    for point in entry_points(group=_GROUP, name=scheme):
        try:
            return cast(Callable[..., Sink], point.load())
        except ModuleNotFoundError as exc:
            package = point.dist.name if point.dist is not None else point.module
            raise MissingDependencyError(
                f"the sink {scheme!r} of {package!r} needs the package {exc.name!r}, "
                f"which is not installed; run: pip install {exc.name}"
            ) from exc
    schemes = installed_schemes()
    near = get_close_matches(scheme, schemes, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UnknownSchemeError(
        f"no sink is installed for {scheme!r}{hint} (installed: {', '.join(schemes)})"
    )
