"""
Spans through the OpenTelemetry API, where that package is installed; nothing otherwise.

Whoever wants them installs an SDK and configures it, in the process or by its environment; the API
alone costs next to nothing. Attributes are names and numbers, never identifiers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


@cache
def _tracer() -> Any:
    """Looked up late, so that `import recognition` loads nothing."""
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        return None
    return trace.get_tracer("recognition")


@contextmanager
def span(name: str, **attributes: str | int) -> Iterator[dict[str, str | int]]:
    """
    A span around a block; what the block puts into the dictionary becomes attributes.

    An exception is recorded by its class, because the text of what is not ours may hold anything.
    """
    found: dict[str, str | int] = {}
    tracer = _tracer()
    if tracer is None:
        yield found
        return
    with tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield found
        except BaseException as exc:
            from opentelemetry.trace import StatusCode

            current.set_attribute("error.type", type(exc).__name__)
            current.set_status(StatusCode.ERROR)
            raise
        finally:
            for key, value in {**attributes, **found}.items():
                current.set_attribute(f"recognition.{key}", value)
