"""
BigQuery, by ``sqlalchemy-bigquery`` and its client library.

How it differs: a transaction of several statements lives in a session
(https://cloud.google.com/bigquery/docs/sessions-write-queries#multi_transactions), DDL of tables
that stay is not allowed in it
(https://cloud.google.com/bigquery/docs/transactions#limitations), and of two transactions that
write rows of one table at a time one is aborted. Rows are set by MERGE, where two source rows of
one target row are an error always
(https://cloud.google.com/bigquery/docs/reference/standard-sql/dml-syntax#merge_statement).

**What a crash leaves.** A transaction of a worker that died stays open as long as its session, up
to 24 hours without a statement (https://cloud.google.com/bigquery/docs/sessions-terminating), and
all that time the others' on the same table are aborted. So there is none where one statement is all
that writes: in tables with ``recognition_version``. A session that could not be ended because
nobody answered is ended before the next one begins.

Tables are looked at by the API and not by INFORMATION_SCHEMA, each question to which is a job that
is billed as 10 MB at least (https://cloud.google.com/bigquery/docs/information-schema-intro).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypeVar

import requests
import sqlalchemy as sa
from google.api_core.exceptions import GoogleAPIError, NotFound, RetryError
from google.api_core.retry import Retry
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud import bigquery
from google.cloud.bigquery import DEFAULT_RETRY, dbapi
from google.cloud.exceptions import GoogleCloudError
from sqlalchemy.engine import make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy_bigquery.base import unnest
from sqlalchemy_bigquery.parse_url import parse_url

from recognition.errors import (
    ConfigurationError,
    OutcomeUnknownError,
    SinkError,
    SinkReadOnlyError,
    SinkUnavailableError,
    TableError,
)
from recognition.sinks.merging import MergingSink
from recognition.sinks.rows import Column, greatest
from recognition.sinks.sql import LEDGER, Target, Transaction

_log = logging.getLogger(__name__)

# The dialect puts this in the place of everybody's `func.unnest`: SQLAlchemy's own look at the
# indexes of a PostgreSQL table warns where it is not said that a statement with it may be cached.
unnest.inherit_cache = True

_Prepared = TypeVar("_Prepared")
_Result = TypeVar("_Result")

_URL = "bigquery://project/dataset?location=EU"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# https://cloud.google.com/bigquery/docs/reference/standard-sql/data-types#timestamp_type, in
# microseconds since 1970-01-01.
_FIRST = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
_LAST = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)

# https://cloud.google.com/bigquery/docs/reference/standard-sql/data-types#numeric_types
_FLOATS = {"FLOAT64": sys.float_info.max, "NUMERIC": greatest(38, 9), "BIGNUMERIC": 5.7e38}

# What the API calls a type, and what a statement does.
# https://cloud.google.com/bigquery/docs/reference/rest/v2/tables#TableFieldSchema
_TYPES = {"INTEGER": "INT64", "FLOAT": "FLOAT64", "BOOLEAN": "BOOL"}

# The texts by which BigQuery says that another transaction was first; the reason of these errors is
# that of any other wrong query. https://cloud.google.com/bigquery/docs/transactions#transaction_concurrency
# and https://cloud.google.com/bigquery/docs/data-manipulation-language#comparing_dml_concurrency
_CONFLICTS = ("due to concurrent update", "Could not serialize access")

# https://cloud.google.com/bigquery/docs/error-messages
_BUSY = {
    "backendError",
    "internalError",
    "jobBackendError",
    "jobInternalError",
    "jobRateLimitExceeded",
    "rateLimitExceeded",
    "tableUnavailable",
    "timeout",
}
_SAID: Mapping[str, tuple[type[SinkError], str]] = {
    "accessDenied": (
        SinkReadOnlyError,
        "a permission is missing; grant roles/bigquery.jobUser on the project of the URL and "
        "roles/bigquery.dataEditor on the dataset, or the single ones of the documentation",
    ),
    "billingNotEnabled": (SinkError, "the project has no billing, without which there is no DML"),
    "billingTierLimitExceeded": (SinkError, "the query costs more than it may"),
    "bytesBilledLimitExceeded": (
        SinkError,
        "the statement would read more than maximum_bytes_billed of the URL allows",
    ),
    "notFound": (
        TableError,
        "a dataset or table is missing, or not in the location of the URL",
    ),
    "quotaExceeded": (SinkUnavailableError, "a quota of the project is used up for now"),
    "resourcesExceeded": (SinkError, "the statement needs more than BigQuery gives one"),
    "responseTooLarge": (SinkError, "an answer is too large"),
    "stopped": (SinkUnavailableError, "a statement was cancelled"),
}


class BigquerySink(MergingSink):
    """
    A dataset of BigQuery, ``bigquery://project/dataset``.

    Credentials are those of the environment (https://cloud.google.com/docs/authentication), or
    ``?credentials_path=``. Of what else may follow ``?``, ``location``, ``maximum_bytes_billed``,
    ``priority`` and ``labels`` are of use.

    Several processes may write to a table: of two that do at a time, one is aborted and tries
    again, up to ``timeout`` seconds.

    Args:
        statement_timeout: How long one statement may run, in seconds.
        client: Asked in the place of one that is made from the URL, for credentials of another
            kind.
    """

    ledger_first = True
    primary_key = " NOT NULL"  # what is not enforced but trusted by the optimizer is no help
    inline_rows = 10_000
    # https://cloud.google.com/bigquery/quotas#query_jobs: 10 MB for a request with its parameters.
    # It is JSON in JSON, so that each quote and backslash of a page is two bytes.
    page_bytes = 5_000_000
    makes_stage = "CREATE TEMP TABLE"
    integer = "INT64"
    types: ClassVar[Mapping[str, str]] = {
        "text": "STRING",
        "time": "TIMESTAMP",
        "integer": "INT64",
        "float": "FLOAT64",
        "boolean": "BOOL",
    }

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 120.0,
        ledger_days: int = 90,
        add_missing_columns: bool = False,
        statement_timeout: int = 3_600,
        client: bigquery.Client | None = None,
    ) -> None:
        if statement_timeout < 1:
            raise ConfigurationError(
                f"statement_timeout is {statement_timeout} seconds; it is at least 1"
            )
        self._statement_timeout = statement_timeout
        self._client = client
        super().__init__(
            url,
            timeout=timeout,
            ledger_days=ledger_days,
            add_missing_columns=add_missing_columns,
        )

    def make_engine(self, url: str, timeout: float) -> sa.Engine:
        """Whose connections are sessions of one client, which is made when it is first needed."""
        try:
            parsed = make_url(url)
            found = parse_url(parsed)
        except (sa.exc.ArgumentError, ValueError, TypeError) as exc:
            raise ConfigurationError(f"a URL of BigQuery is {_URL}") from exc
        project, location, dataset, _, credentials_path, *_ = found
        config = found[6] or bigquery.QueryJobConfig()
        if not (project and dataset) or "credentials_base64" in parsed.query:
            raise ConfigurationError(
                f"a URL of BigQuery names project and dataset, and holds no secret: {_URL}; "
                "credentials are those of the environment, or credentials_path names their file"
            )
        self._project, self._dataset = project, dataset
        self._location: str | None = location
        self._left: list[str] = []  # sessions that could not be ended
        # By itself the client asks again for ten minutes.
        self._retry = DEFAULT_RETRY.with_timeout(max(1.0, timeout))
        config.default_dataset = f"{project}.{dataset}"
        config.labels = {"application": "recognition", **config.labels}  # who ran it
        config.job_timeout_ms = self._statement_timeout * 1_000

        def client() -> bigquery.Client:
            if self._client is None:
                self._client = _make_client(project, location, credentials_path)
            return self._client

        # The dialect would make its client here, and ask for credentials before they are needed.
        engine = sa.create_engine(
            "bigquery://?user_supplied_client=true",
            creator=lambda: _Connection(
                _Session(client(), config, self._retry, self._where(client()), self._left)
            ),
            hide_parameters=True,
        )
        dialect: Any = engine.dialect
        # The dialect's own does nothing: it knows no transactions.
        dialect.do_rollback = lambda connection: connection.rollback()
        sa.event.listen(engine, "handle_error", _note_lost_session)
        return engine

    def _where(self, client: bigquery.Client) -> str | None:
        """
        Where jobs run: as the URL or the client says, else where the dataset is.

        A session is bound to the place of its first statement, which names no table by which
        BigQuery could find it: https://cloud.google.com/bigquery/docs/sessions-create
        """
        self._location = self._location or client.location
        if self._location is None:
            with _told_as_the_driver_does():
                dataset = client.get_dataset(f"{self._project}.{self._dataset}", retry=self._retry)
            self._location = str(dataset.location)
        return self._location

    def exists(self) -> bool:
        """A dataset that is missing is an error."""
        return True

    def _do(
        self,
        transaction: Transaction,
        tables: Sequence[str],
        prepare: Callable[[Transaction], _Prepared],
        work: Callable[[Transaction, _Prepared], _Result],
        needs_ledger: bool,
    ) -> tuple[_Result, int]:
        session = _session(transaction.connection)
        session.alone, session.written = transaction.alone, False
        try:
            return super()._do(transaction, tables, prepare, work, needs_ledger)
        except sa.exc.DBAPIError as exc:
            if session.is_unsure(exc.connection_invalidated):
                raise OutcomeUnknownError(
                    "no answer came to the statement that writes, or to one after it; it commits "
                    "by itself, so that all was written, or nothing; applying the same again is "
                    "safe"
                ) from exc
            raise
        finally:
            session.alone = False

    # Tables -------------------------------------------------------------------------------------

    def find_table(self, connection: sa.Connection, parts: Sequence[str]) -> Target | None:
        """
        By the exact name, else by the one that differs in case alone.

        Names of tables tell case apart, those of columns do not:
        https://cloud.google.com/bigquery/docs/reference/standard-sql/lexical#case_sensitivity
        """
        if len(parts) > 3:
            return None
        project, dataset, name = (self._project, self._dataset, *parts)[-3:]
        if len(parts) == 2:
            project, dataset = self._project, parts[0]
        held = f"{project}.{dataset}"
        table = self._table(connection, f"{held}.{name}")
        if table is None:
            names = self._tables(connection, held)
            found = [each for each in names if each.lower() == name.lower()]
            if len(found) > 1:
                several = " and ".join(sorted(map(repr, found)))
                return Target(parts=tuple(parts), columns={}, ambiguous={"": several})
            table = self._table(connection, f"{held}.{found[0]}") if found else None
        if table is None:
            return None
        columns = {field.name.lower(): _describe(field) for field in table.schema}
        return Target(
            parts=(*parts[:-1], table.table_id),
            columns=columns,
            collated=any(field.to_api_repr().get("collation") for field in table.schema),
            view=table.table_type != "TABLE",
        )

    def list_tables(self, connection: sa.Connection) -> Sequence[str]:
        """Those of the URL's dataset."""
        return self._tables(connection, f"{self._project}.{self._dataset}")

    def _table(self, connection: sa.Connection, name: str) -> bigquery.Table | None:
        client = _session(connection).client
        with _told_as_sqlalchemy_does("tables.get"):
            try:
                return client.get_table(name, retry=self._retry)
            except NotFound:
                return None

    def _tables(self, connection: sa.Connection, dataset: str) -> list[str]:
        client = _session(connection).client
        with _told_as_sqlalchemy_does("tables.list"):
            try:
                tables = client.list_tables(dataset, retry=self._retry)
                return [table.table_id for table in tables]
            except NotFound:
                if dataset == f"{self._project}.{self._dataset}":
                    raise
                return []  # an update named it: only its own table is missing

    def noted_name(self, target: Target) -> str:
        """With project and dataset, however they were given."""
        *holders, _ = target.parts
        before = (self._project,) if holders else (self._project, self._dataset)
        return ".".join((*before, *target.parts)[-3:])

    def assume(self, kind: str, name: str) -> Column:
        """As `load` makes it."""
        return _describe(bigquery.SchemaField(name, self.types[kind]))

    def refuse_time(self, column: Column) -> str | None:
        """Numbers have no unit that the database could know."""
        if column.kind in ("time", "text"):
            return None
        return f"it is {column.declared}; a time column is a TIMESTAMP, DATETIME, DATE or a text"

    def bytes_read(self, connection: sa.Connection) -> int | None:
        """https://cloud.google.com/bigquery/docs/reference/rest/v2/Job#JobStatistics2."""
        return _session(connection).bytes_read

    def create_ledger(self, transaction: Transaction) -> None:
        """By a job of its own; nothing is asked for where there is one."""
        ledger = f"{self._project}.{self._dataset}.{LEDGER.name}"
        if self._table(transaction.connection, ledger) is not None:
            return
        kinds = {"starts": "INT64", "ends": "INT64", "sequence": "INT64", "applied_at": "INT64"}
        declared = ", ".join(
            f"{self._quote(column.name)} {kinds.get(column.name, 'STRING')}"
            f"{'' if column.nullable else ' NOT NULL'}"
            for column in LEDGER.columns
        )
        transaction.execute_text(
            f"CREATE TABLE IF NOT EXISTS {self._quote(LEDGER.name)} ({declared})"
            " CLUSTER BY table_name, key_column, key_value"
        )

    # Rows ---------------------------------------------------------------------------------------

    def unfold(self, columns: Sequence[tuple[str, str | None]]) -> str:
        """https://cloud.google.com/bigquery/docs/reference/standard-sql/json_functions."""
        cells = []
        for place, (name, type_) in enumerate(columns):
            cell = f"JSON_VALUE(line, '$[{place}]')"
            cells.append(f"{cell if type_ is None else _cast(cell, type_)} AS {name}")
        return f"SELECT {', '.join(cells)} FROM UNNEST(JSON_QUERY_ARRAY(:lines)) AS line"

    def type_of(self, column: Column) -> str | None:
        """As it is declared."""
        return None if column.kind == "text" else column.declared

    def time_type(self, like: Column) -> str:
        """A date is compared as the midnight that begins it."""
        return "DATETIME" if like.declared in ("DATE", "DATETIME") else "TIMESTAMP"

    def as_time(self, like: Column, time: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """https://cloud.google.com/bigquery/docs/reference/standard-sql/conversion_functions."""
        if like.kind == "text":
            return sa.try_cast(time, _OfBigquery("TIMESTAMP"))
        return sa.cast(time, _OfBigquery("DATETIME")) if like.declared == "DATE" else time

    def show_time(self, type_: str, microseconds: int) -> str:
        """Within what the types hold; they are all read as UTC."""
        moment = _EPOCH + timedelta(microseconds=max(_FIRST, min(microseconds, _LAST)))
        if type_ == "DATE":
            return moment.date().isoformat()
        if type_ == "DATETIME":
            moment = moment.replace(tzinfo=None)
        return moment.isoformat(sep=" ", timespec="microseconds")

    def gather(self, texts: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Of a group that has none there is no array."""
        return sa.func.array_agg(texts, type_=sa.ARRAY(sa.String()))

    def among(
        self, text: sa.ColumnElement[Any], texts: sa.ColumnElement[Any]
    ) -> sa.ColumnElement[bool]:
        """https://cloud.google.com/bigquery/docs/reference/standard-sql/operators#in_operators."""
        return text.op("IN", is_comparison=True)(sa.func.unnest(texts))

    def constant(self, type_: str, text: str) -> sa.ColumnElement[Any]:
        """Known before the query runs, so that partitions outside are not read."""
        return sa.cast(sa.literal(text, sa.String()), _OfBigquery(type_))

    def bytewise(self, expression: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Bytes have no collation."""
        return sa.cast(expression, sa.LargeBinary())

    # Errors -------------------------------------------------------------------------------------

    def translate(self, error: BaseException | None) -> SinkError:
        """By the reason that BigQuery gives; for conflicts there is only the text."""
        cause = _cause(error)
        reason = _reason(cause)
        if isinstance(cause, GoogleAuthError) and not isinstance(cause, TransportError):
            return SinkError(
                "the credentials have expired or were refused; renew them (gcloud auth "
                "application-default login, or the key of the service account); nothing was written"
            )
        text = str(cause)
        if any(sign in text for sign in _CONFLICTS):
            return SinkUnavailableError(
                "another transaction was writing to the same table; all was rolled back, a retry "
                "helps; if it goes on, a worker died in one: end its session (CALL "
                "BQ.ABORT_SESSION, see the documentation), which else lives for 24 hours"
            )
        if "streaming buffer" in text:
            return SinkUnavailableError(
                "rows that were streamed into the table in the last 30 minutes cannot be changed "
                "yet; nothing was written, a retry helps later; the Storage Write API has no such "
                "limit"
            )
        if "partition" in text and "filter" in text and reason == "invalidQuery":
            return TableError(
                "the table wants a filter on its partitions (require_partition_filter), and the "
                "updates name no time; give them a between on the column it is partitioned by, or "
                "lift the option; nothing was written"
            )
        if "Session" in text and reason in ("invalid", "invalidQuery", "notFound", "resourceInUse"):
            return SinkUnavailableError("the session has ended; nothing was committed")
        if reason in _BUSY or isinstance(cause, _NO_ANSWER):
            return SinkUnavailableError(
                f"BigQuery does not answer ({reason or type(cause).__name__}); nothing was "
                "committed"
            )
        if getattr(cause, "code", None) == 401:
            return SinkError("the credentials were refused (401); renew them; nothing was written")
        if reason in _SAID:
            kind, said = _SAID[reason]
            return kind(f"{said} ({reason}); nothing was written")
        return SinkError(
            f"BigQuery refused a statement ({reason or type(cause).__name__}); all was rolled back"
        )


class _OfBigquery(sa.types.UserDefinedType[Any]):
    """A type by the name that BigQuery gives it."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        """As it is written in a cast."""
        return self.name


def _cast(cell: str, type_: str) -> str:
    """
    What the column will hold of the value.

    One with a scale rounds what is stored, half away from zero as ROUND does
    (https://cloud.google.com/bigquery/docs/reference/rest/v2/tables#RoundingMode).
    """
    base, _, limits = type_.partition("(")
    if not limits:
        return f"CAST({cell} AS {type_})"
    return f"ROUND(CAST({cell} AS {base}), {limits.rstrip(')').partition(', ')[2]})"


# No answer came, or none that says what happened.
_NO_ANSWER = (requests.RequestException, RetryError, TransportError, TimeoutError)


class _Session:
    """
    The client as a connection of the driver asks it: in one session, and each statement once.

    A statement that fails has ended its transaction; what the client would send again by itself
    would be no part of it. So nothing goes on in a session after that.
    """

    def __init__(
        self,
        client: bigquery.Client,
        config: bigquery.QueryJobConfig,
        retry: Retry,
        location: str | None,
        left: list[str],
    ) -> None:
        self.client = client
        self.alone = False  # no transaction is begun
        self.written: bool | None = False  # by itself; None: no answer came yet
        self._config = config
        self._location = location
        self._left = left
        # An HTTP request may go twice: it has an id, by which the second is known.
        self._retry = retry
        self._id: str | None = None
        self._open = False
        self._failed = False
        self.bytes_read = 0

    def query_and_wait(
        self, query: str, *, job_config: bigquery.QueryJobConfig, page_size: int | None = None
    ) -> Any:
        """
        What a cursor sends.

        A transaction begins with the first statement that may be in one; DDL of tables that stay,
        which may not, comes before it.
        """
        if query.startswith(("CREATE TABLE", "ALTER TABLE")):
            return self._send(query, None)
        if self._id is None:
            self._id = self._begin()
        if self.alone:
            writes = query.startswith("MERGE")
            self.written = None if writes else self.written
            rows = self._send(query, self._id, job_config.query_parameters, page_size)
            self.written = writes or self.written
            return rows
        if not self._open:
            self._send("BEGIN TRANSACTION", self._id)
            self._open = True
        return self._send(query, self._id, job_config.query_parameters, page_size)

    def is_unsure(self, lost: bool) -> bool:
        """Something was written by itself, or may have been, when the answer was lost."""
        return lost if self.written is None else self.written

    def end(self, how: str) -> None:
        """COMMIT or ROLLBACK, where something is open."""
        if self._open and not self._failed:
            self._send(f"{how} TRANSACTION", self._id)
        if self.bytes_read:
            _log.debug("%s; %d bytes were processed", how, self.bytes_read)
        self._open = False
        self.bytes_read = 0
        if self._failed:
            self.close()

    def close(self) -> None:
        """End the session with all that is left in it, which else lives for a day."""
        if self._id is not None:
            self._left.append(self._id)
            self._end_those_left()
        self._id = None
        self._open = self._failed = False

    def _end_those_left(self) -> None:
        """Whose transactions would be in the way of all others; what is over already is no more."""
        for session in [*self._left]:
            try:
                self._send("CALL BQ.ABORT_SESSION()", session, retry=None)
            except dbapi.Error as exc:
                cause = _cause(exc)
                _log.debug("a session could not be ended: %s", type(cause).__name__)
                if _is_unanswered(cause):
                    continue
            with suppress(ValueError):  # another thread did it meanwhile
                self._left.remove(session)

    def _begin(self) -> str:
        self._end_those_left()
        config = deepcopy(self._config)
        config.create_session = True
        with _told_as_the_driver_does():
            job = self.client.query(
                "SELECT 1", config, location=self._location, job_retry=None, retry=self._retry
            )
            job.result()
        assert job.session_info is not None, "it was asked for"
        return str(job.session_info.session_id)

    def _send(
        self,
        query: str,
        session: str | None,
        parameters: Sequence[Any] = (),
        page_size: int | None = None,
        **given: Any,
    ) -> Any:
        config = deepcopy(self._config)
        config.query_parameters = [*parameters]
        if session is not None:
            config.connection_properties = [bigquery.ConnectionProperty("session_id", session)]
        how: Any = {"retry": self._retry, "job_retry": None, "page_size": page_size, **given}
        how["location"] = self._location
        self._failed = session is not None
        with _told_as_the_driver_does():
            rows = self.client.query_and_wait(query, job_config=config, **how)
        self._failed = False
        self.bytes_read += rows.total_bytes_processed or 0
        return rows


class _Connection(dbapi.Connection):
    """A connection of the driver that has transactions."""

    def __init__(self, session: _Session) -> None:
        driver: Any = super()  # it says no types
        driver.__init__(session, prefer_bqstorage_client=False)
        self.session = session

    def commit(self) -> None:
        self.session.end("COMMIT")

    def rollback(self) -> None:
        self.session.end("ROLLBACK")

    def close(self) -> None:
        self.session.close()
        driver: Any = super()
        driver.close()


@contextmanager
def _told_as_the_driver_does() -> Iterator[None]:
    """Errors of every layer as those of the driver, with the cause as their argument."""
    try:
        yield
    except GoogleCloudError as exc:
        raise dbapi.DatabaseError(exc) from exc
    except (GoogleAPIError, GoogleAuthError, *_NO_ANSWER) as exc:
        raise dbapi.OperationalError(exc) from exc


@contextmanager
def _told_as_sqlalchemy_does(what: str) -> Iterator[None]:
    """Errors of the client as those of a statement."""
    try:
        with _told_as_the_driver_does():
            yield
    except dbapi.Error as exc:
        raise sa.exc.DBAPIError(what, None, exc, hide_parameters=True) from exc


def _session(connection: sa.Connection) -> _Session:
    driver = connection.connection.driver_connection
    assert isinstance(driver, _Connection)
    return driver.session


def _make_client(
    project: str, location: str | None, credentials_path: str | None
) -> bigquery.Client:
    try:
        if credentials_path is not None:
            from_file: Any = bigquery.Client.from_service_account_json
            client: bigquery.Client = from_file(
                credentials_path, project=project, location=location
            )
            return client
        return bigquery.Client(project=project, location=location)
    except (DefaultCredentialsError, OSError, ValueError) as exc:
        # What a wrong file holds may stand in the error's text.
        raise ConfigurationError(
            "no credentials were found for BigQuery; run gcloud auth application-default login, "
            "set GOOGLE_APPLICATION_CREDENTIALS, or name a file of a service account by "
            "?credentials_path="
        ) from exc


def _cause(error: BaseException | None) -> BaseException | None:
    """What the driver's error was made of."""
    if isinstance(error, dbapi.Error) and error.args and isinstance(error.args[0], BaseException):
        return error.args[0]
    return error


def _is_unanswered(cause: BaseException | None) -> bool:
    return isinstance(cause, _NO_ANSWER) or (getattr(cause, "code", None) or 0) >= 500


def _reason(cause: BaseException | None) -> str:
    """https://cloud.google.com/bigquery/docs/error-messages; ``""`` where there is none."""
    for error in getattr(cause, "errors", None) or ():
        if isinstance(error, Mapping) and error.get("reason"):
            return str(error["reason"])
    return ""


def _note_lost_session(context: sa.engine.ExceptionContext) -> None:
    """Whether what was asked happened is not known; the session is not used again."""
    if _is_unanswered(_cause(context.original_exception)):
        context.is_disconnect = True


def _describe(field: bigquery.SchemaField) -> Column:
    """By https://cloud.google.com/bigquery/docs/reference/rest/v2/tables#TableFieldSchema."""
    declared = _TYPES.get(field.field_type, field.field_type)
    kind = {"STRING": "text", "INT64": "integer", "BOOL": "boolean"}.get(declared, "other")
    low: float | None = None
    high: float | None = None
    if declared == "INT64":
        low, high = -(2**63), 2**63 - 1
    elif declared in _FLOATS:
        kind, high = "float", _FLOATS[declared]
        if field.precision is not None:
            high = greatest(field.precision, field.scale or 0)
            declared = f"{declared}({field.precision}, {field.scale or 0})"
        low = -high
    elif declared in ("TIMESTAMP", "DATETIME", "DATE"):
        kind = "time"
    if field.max_length is not None:
        declared = f"{declared}({field.max_length})"
    if field.mode == "REPEATED":
        kind, declared = "other", f"ARRAY<{declared}>"
    return Column(
        name=field.name,
        declared=declared,
        kind=kind,
        nullable=field.mode != "REQUIRED",
        width=field.max_length if kind == "text" else None,
        low=low,
        high=high,
    )


@compiles(sa.TryCast, "bigquery")
def _render_safe_cast(element: sa.TryCast[Any], compiler: SQLCompiler, **kw: Any) -> str:
    expression = compiler.process(element.clause, **kw)
    return f"SAFE_CAST({expression} AS {compiler.process(element.typeclause, **kw)})"
