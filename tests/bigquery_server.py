"""
A server that speaks BigQuery's REST protocol, for tests: its SQL runs on DuckDB.

The statements that arrive are those of the real client; `sqlglot` reads them as GoogleSQL and
writes them as DuckDB's. Sessions have transactions and temporary tables of their own. What BigQuery
is known to refuse and DuckDB would take is refused here too: DDL of tables that stay inside of a
transaction, a subquery in the ON of a MERGE, a request of more than 10 MB, a parameter without its
type, a session of another place than the dataset's. A statement that fails ends its transaction.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import duckdb
import sqlglot
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from sqlglot import exp

MOST_BYTES = 10 * 1_024 * 1_024
LOCATION = "EU"  # of all datasets

_TYPES = {
    "VARCHAR": "STRING",
    "BIGINT": "INTEGER",
    "DOUBLE": "FLOAT",
    "BOOLEAN": "BOOLEAN",
    "TIMESTAMP WITH TIME ZONE": "TIMESTAMP",
    "TIMESTAMP": "DATETIME",
    "DATE": "DATE",
}
_PATH = r"/bigquery/v2/projects/([^/?]+)"


class RefusedError(Exception):
    """What the server answers in the place of a result."""

    def __init__(self, reason: str, message: str, code: int = 400) -> None:
        super().__init__(message)
        self.reason, self.message, self.code = reason, message, code


@dataclass(slots=True)
class _Session:
    """A connection of its own, and whether a transaction is open in it."""

    cursor: duckdb.DuckDBPyConnection
    location: str = LOCATION
    lock: threading.Lock = field(default_factory=threading.Lock)
    open: bool = False


class Server:
    """
    One that runs; a dataset is a schema of DuckDB.

    Args:
        statements: What arrived, in order: text, labels and the session.
    """

    def __init__(self) -> None:
        self.database = duckdb.connect()
        self.database.execute("SET TimeZone = 'UTC'")
        self.statements: list[tuple[str, Mapping[str, str], str | None]] = []
        self.sizes: list[int] = []
        self._faults: list[dict[str, Any]] = []
        self._sessions: dict[str, _Session] = {}
        self._declared: dict[tuple[str, str, str], str] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._done: dict[str, dict[str, Any]] = {}
        outer = self

        class Handler(_Handler):
            server_of_tests = outer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"

    def client(self, project: str = "p1") -> bigquery.Client:
        """The real one."""
        return bigquery.Client(
            project=project,
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": self.address},
        )

    def fail(self, **fault: Any) -> None:
        """
        Refuse statements (or paths) that begin with a text from now on.

        Args:
            fault: ``begins``, ``reason``, ``message``, ``code`` (400), ``times`` (1), and
                ``after``: it is carried out before. Reason ``cut`` ends the HTTP connection.
        """
        self._faults.append({"code": 400, "times": 1, "after": False, "message": "-", **fault})

    @property
    def sessions(self) -> int:
        """How many are alive."""
        return len(self._sessions)

    def run(self, project: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out one query; gives what ``jobs.query`` answers."""
        text = body["query"]
        session = None
        for each in body.get("connectionProperties", ()):
            if each["key"] == "session_id":
                session = each["value"]
        self.statements.append((text, body.get("labels", {}), session))
        self._fault(text, after=False)
        # What the client sends again because no answer came has the same id.
        request = body.get("requestId", "")
        answer = self._done.get(request) or self._run(project, text, body, session)
        self._done = {request: answer} if request else {}
        self._fault(text, after=True)
        return answer

    def _fault(self, what: str, *, after: bool) -> None:
        for fault in self._faults:
            if fault["after"] == after and fault["times"] and what.startswith(fault["begins"]):
                fault["times"] -= 1
                raise RefusedError(fault["reason"], fault["message"], fault["code"])

    def _run(
        self, project: str, text: str, body: Mapping[str, Any], session: str | None
    ) -> dict[str, Any]:
        made = None
        if body.get("createSession"):
            made = session = secrets.token_hex(8)
            # `SELECT 1` names no table by which a place could be found.
            place = body.get("location", "US")
            self._sessions[made] = _Session(self.database.cursor(), place)
        if session is None:
            held = _Session(self.database.cursor())
        elif session in self._sessions:
            held = self._sessions[session]
        else:
            raise RefusedError("invalid", f"Session {session} is not found")
        with held.lock:
            if text == "CALL BQ.ABORT_SESSION()":
                held.cursor.close()
                del self._sessions[str(session)]
                return _answer([], [])
            try:
                answer = self._execute(held, project, text, body)
            except Exception:
                if held.open:
                    held.cursor.execute("ROLLBACK")
                    held.open = False
                raise
        if made is not None:
            answer["sessionInfo"] = {"sessionId": made}
        return answer

    def _execute(
        self, held: _Session, project: str, text: str, body: Mapping[str, Any]
    ) -> dict[str, Any]:
        held.cursor.execute("SET TimeZone = 'UTC'")
        dataset = body["defaultDataset"]["datasetId"]
        if held.location != LOCATION and not body.get("createSession"):
            raise RefusedError("notFound", f"Not found: Dataset {project}:{dataset}", 404)
        self.dataset(project, dataset)
        held.cursor.execute(f"SET search_path = '\"{dataset}\"'")
        match text.removesuffix(" TRANSACTION"):
            case "BEGIN":
                held.cursor.execute("BEGIN")
                held.open = True
                return _answer([], [])
            case "COMMIT" | "ROLLBACK" as how:
                if not held.open:
                    raise RefusedError("invalidQuery", "There is no transaction")
                held.open = False
                held.cursor.execute(how)
                return _answer([], [])
        parsed = sqlglot.parse_one(text, read="bigquery")
        self._look_at(parsed, held)
        parameters = _parameters(body)
        # Backquotes around a parameter are BigQuery's alone.
        translated = re.sub(r'\$"(\w+)"', r"$\1", parsed.sql("duckdb"))
        try:
            done = held.cursor.execute(translated, parameters or None)
        except duckdb.TransactionException as exc:
            raise RefusedError(
                "invalidQuery",
                f"Transaction is aborted due to concurrent update against table {project}:x",
            ) from exc
        except duckdb.CatalogException as exc:
            raise RefusedError("notFound", "Not found: Table", 404) from exc
        except duckdb.Error as exc:
            raise RefusedError("invalidQuery", f"{exc} in {translated}") from exc
        if isinstance(parsed, exp.Create):
            self._note(parsed, dataset)
        rows = done.fetchall()
        if isinstance(parsed, (exp.Merge, exp.Update, exp.Insert, exp.Delete)):
            return {**_answer([], []), "numDmlAffectedRows": str(rows[0][0])}
        if not isinstance(parsed, exp.Select):
            return _answer([], [])
        return _answer(
            [(name, _api_type(str(type_))) for name, type_, *_ in done.description], rows
        )

    def _look_at(self, parsed: exp.Expr, held: _Session) -> None:
        lasting = isinstance(parsed, (exp.Create, exp.Alter)) and not parsed.find(
            exp.TemporaryProperty
        )
        if held.open and lasting:
            raise RefusedError("invalidQuery", "DDL is not supported in a transaction")
        if isinstance(parsed, exp.Merge) and parsed.args["on"].find(exp.Select):
            raise RefusedError("invalidQuery", "Unsupported subquery in MERGE")
        if isinstance(parsed, exp.Update) and parsed.args.get("from_"):
            raise RefusedError("invalidQuery", "the sink sends MERGE")

    def _note(self, parsed: exp.Create, dataset: str) -> None:
        """DuckDB forgets the width of a text."""
        if isinstance(parsed.this, exp.Schema):
            table = parsed.this.this.name
            for column in parsed.this.find_all(exp.ColumnDef):
                declared = column.args["kind"].sql("bigquery")
                self._declared[parsed.this.this.db or dataset, table, column.name] = declared

    def table(self, project: str, dataset: str, name: str) -> dict[str, Any]:
        """What ``tables.get`` answers."""
        cursor = self.database.cursor()
        tables = cursor.execute(
            "SELECT table_name, table_type FROM information_schema.tables"
            " WHERE table_schema = ? AND table_name = ?",
            [dataset, name],
        ).fetchall()
        if not tables:
            raise RefusedError("notFound", f"Not found: Table {project}:{dataset}.{name}", 404)
        columns = cursor.execute(
            "SELECT column_name, data_type, is_nullable FROM information_schema.columns"
            " WHERE table_schema = ? AND table_name = ? ORDER BY ordinal_position",
            [dataset, name],
        ).fetchall()
        fields = []
        for column, type_, nullable in columns:
            found: dict[str, Any] = {"name": column, "type": _TYPES.get(type_, "STRUCT")}
            found["mode"] = "NULLABLE" if nullable == "YES" else "REQUIRED"
            declared = self._declared.get((dataset, name, column), "")
            if match := re.fullmatch(r"(\w+)\((\d+)(?:, (\d+))?\)", declared):
                found["type"] = match[1]
                if match[1] == "STRING":
                    found["maxLength"] = match[2]
                else:
                    found |= {"precision": match[2], "scale": match[3] or "0"}
            if type_.endswith("[]"):
                found |= {"type": "STRING", "mode": "REPEATED"}
            fields.append(found)
        return {
            "tableReference": {"projectId": project, "datasetId": dataset, "tableId": name},
            "type": "TABLE" if tables[0][1] == "BASE TABLE" else "VIEW",
            "schema": {"fields": fields},
        }

    def dataset(self, project: str, dataset: str) -> dict[str, Any]:
        """What ``datasets.get`` answers."""
        found = self.database.cursor().execute(
            "SELECT 1 FROM information_schema.schemata WHERE schema_name = ?", [dataset]
        )
        if not found.fetchall():
            raise RefusedError("notFound", f"Not found: Dataset {project}:{dataset}", 404)
        reference = {"projectId": project, "datasetId": dataset}
        return {"datasetReference": reference, "location": LOCATION}

    def tables(self, project: str, dataset: str) -> dict[str, Any]:
        """What ``tables.list`` answers."""
        names = self.database.cursor().execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = ?", [dataset]
        )
        return {
            "tables": [
                {"tableReference": {"projectId": project, "datasetId": dataset, "tableId": name}}
                for (name,) in names.fetchall()
            ]
        }

    def answer(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Route a request."""
        path = unquote(path.partition("?")[0])
        if found := re.fullmatch(rf"{_PATH}/queries", path):
            return self.run(found[1], body)
        if found := re.fullmatch(rf"{_PATH}/jobs", path):
            query = body["configuration"]["query"]
            labels = body["configuration"].get("labels", {})
            place = {k: v for k, v in body["jobReference"].items() if k == "location" and v}
            answer = self.run(found[1], {**query, **place, "labels": labels})
            reference = {"projectId": found[1], "jobId": secrets.token_hex(8)}
            self._answers[reference["jobId"]] = {**answer, "jobReference": reference}
            return {
                "jobReference": reference,
                "configuration": body["configuration"],
                "status": {"state": "DONE"},
                "statistics": {"query": {}, "sessionInfo": answer.get("sessionInfo")},
            }
        if found := re.fullmatch(rf"{_PATH}/queries/([^/]+)", path):
            return self._answers.pop(found[2])
        self._fault(f"{method} {path.rpartition('/')[2]}", after=False)
        if found := re.fullmatch(rf"{_PATH}/datasets/([^/]+)/tables/([^/]+)", path):
            return self.table(*found.groups())
        if found := re.fullmatch(rf"{_PATH}/datasets/([^/]+)/tables", path):
            return self.tables(*found.groups())
        if found := re.fullmatch(rf"{_PATH}/datasets/([^/]+)", path):
            return self.dataset(*found.groups())
        raise RefusedError("notFound", f"{method} {path} is no part of this server", 404)


class _Handler(BaseHTTPRequestHandler):
    """JSON in, JSON out."""

    server_of_tests: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(size) or b"{}")
        self.server_of_tests.sizes.append(size)
        try:
            if size > MOST_BYTES:
                raise RefusedError("invalid", "Request payload size exceeds the limit", 413)
            answer = self.server_of_tests.answer(self.command, self.path, body)
            code = 200
        except RefusedError as exc:
            if exc.reason == "cut":
                self.close_connection = True
                self.connection.close()
                return
            code = exc.code
            errors = [{"reason": exc.reason, "message": exc.message}] if exc.reason else []
            answer = {"error": {"code": code, "message": exc.message, "errors": errors}}
        sent = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""


def _parameters(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in body.get("queryParameters", ()):
        if each["parameterType"]["type"] not in ("STRING", "INT64"):
            raise RefusedError("invalidQuery", "a parameter of another type")
        value = each["parameterValue"].get("value")
        whole = each["parameterType"]["type"] == "INT64" and value is not None
        found[each["name"]] = int(value) if whole else value
    return found


def _api_type(type_: str) -> str:
    return _TYPES.get(type_, "INTEGER" if "INT" in type_ else "STRING")


def _answer(columns: list[tuple[str, str]], rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    def show(value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        return json.dumps(value) if isinstance(value, (bool, int, float)) else str(value)

    return {
        "jobComplete": True,
        "jobReference": {"projectId": "p1", "jobId": secrets.token_hex(8)},
        "schema": {"fields": [{"name": n, "type": t, "mode": "NULLABLE"} for n, t in columns]},
        "rows": [{"f": [{"v": show(value)} for value in row]} for row in rows],
        "totalRows": str(len(rows)),
        "totalBytesProcessed": "10485760",
    }


@contextmanager
def open_server() -> Iterator[Server]:
    """Start one on a free port of the loopback; it ends with the block."""
    server = Server()
    thread = threading.Thread(target=server._http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        thread.join()
        server._http.server_close()
        server.database.close()
