"""
fakesnow as a server to which connector 5 can log in; run by `fakesnow_server.py`, never imported.

It lives in a virtual environment of its own, because fakesnow needs a connector older than 5 and
`snowflake-sqlalchemy` 2.1 needs 5. Three things are added to fakesnow's own server:

- what connector 5 wants in the answer to a login: a master token, validities, role and warehouse;
- ``/test/logins``: which session parameters each login gave, so that a test can see what a real
  Snowflake would have been told;
- ``/test/faults``: what to answer instead of running the next statements that begin with a text:
  an error, or rows that fakesnow cannot hold.

It listens on a free loopback port, which it writes out, and ends when its standard input ends.
"""

from __future__ import annotations

import gzip
import json
import os
import socket
import threading
from typing import Any

import uvicorn
from fakesnow.server import login_request, query_request, routes
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

_HOUR = 3_600

_logins: list[dict[str, Any]] = []
_faults: list[dict[str, Any]] = []


async def _body(request: Request) -> dict[str, Any]:
    raw = await request.body()
    if request.headers.get("Content-Encoding") == "gzip":
        raw = gzip.decompress(raw)
    return json.loads(raw)


def _answer(fault: dict[str, Any]) -> JSONResponse:
    if "rows" in fault:
        return _rows(fault["columns"], fault["rows"])
    code = fault["code"]
    data = {"errorCode": code, "sqlState": fault.get("sqlstate", "")}
    return JSONResponse(
        {"data": data, "code": code, "message": fault["message"], "success": False},
        status_code=fault.get("status", 200),
    )


def _rows(columns: list[str], rows: list[list[str | None]]) -> JSONResponse:
    text = {"type": "text", "nullable": True, "length": 16_777_216, "byteLength": 16_777_216}
    data = {
        "parameters": [],
        "rowtype": [{"name": name, "precision": None, "scale": None, **text} for name in columns],
        "rowset": rows,
        "total": len(rows),
        "returned": len(rows),
        "queryId": "made-up",
        "statementTypeId": 0x1000,  # SELECT
        "queryResultFormat": "json",
    }
    return JSONResponse({"data": data, "code": None, "message": None, "success": True})


def _fault(text: str) -> dict[str, Any] | None:
    """The first fault that waits for this text; each is used ``times`` times."""
    for fault in _faults:
        if text.startswith(fault["begins"]):
            if fault.get("after", 0) > 0:
                fault["after"] -= 1
                return None
            fault["times"] -= 1
            if fault["times"] < 1:
                _faults.remove(fault)
            return fault
    return None


async def login(request: Request) -> Response:
    """fakesnow's answer, with what connector 5 misses in it."""
    asked = (await _body(request))["data"]
    query = request.query_params
    _logins.append(
        {
            "parameters": asked["SESSION_PARAMETERS"],
            "warehouse": query.get("warehouse"),
            "role": query.get("roleName"),
            "user": asked.get("LOGIN_NAME"),
        }
    )
    if (fault := _fault("login")) is not None:
        return _answer(fault)
    answer = json.loads(bytes((await login_request(request)).body))
    data = answer["data"]
    data["masterToken"] = data["token"]
    data["validityInSeconds"] = _HOUR
    data["masterValidityInSeconds"] = 4 * _HOUR
    data["sessionId"] = len(_logins)
    data["sessionInfo"]["roleName"] = query.get("roleName")
    data["sessionInfo"]["warehouseName"] = query.get("warehouse")
    return JSONResponse(answer)


async def query(request: Request) -> Response:
    """fakesnow's answer, or the fault that waits for the statement."""
    text = (await _body(request))["sqlText"]
    fault = _fault(text)
    if fault is None:
        return await query_request(request)
    if fault.get("after_running"):
        await query_request(request)
    if fault.get("ends"):
        os._exit(0)
    return _answer(fault)


async def renew(request: Request) -> Response:
    """No session of a test lives long enough to be renewed; one that is told to log in does."""
    return _answer({"code": "390114", "message": "Authentication token has expired."})


async def logins(request: Request) -> Response:
    """What each login gave, the first first."""
    return JSONResponse(_logins)


async def faults(request: Request) -> Response:
    """Replace the faults that wait."""
    _faults[:] = await _body(request)  # type: ignore[assignment]
    return JSONResponse({})


async def telemetry(request: Request) -> Response:
    """Taken, and forgotten."""
    return JSONResponse({"success": True, "data": None, "code": None, "message": None})


_OURS = [
    Route("/session/v1/login-request", login, methods=["POST"]),
    Route("/session/token-request", renew, methods=["POST"]),
    Route("/queries/v1/query-request", query, methods=["POST"]),
    Route("/telemetry/send", telemetry, methods=["POST"]),
    Route("/test/logins", logins),
    Route("/test/faults", faults, methods=["POST"]),
]


def _end_with_the_parent() -> None:
    os.read(0, 1)  # nothing is ever written to it
    os._exit(0)


def main() -> None:
    """Listen, say where, and serve until the parent is gone."""
    # Only where the protocol is named does asyncio send answers without waiting for more: the
    # other way each statement takes 40 milliseconds longer.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    os.write(1, b"%d\n" % listener.getsockname()[1])
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    app = Starlette(routes=[*_OURS, *routes])
    config = uvicorn.Config(app, lifespan="off", log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
