"""
What a plugin's author tests with: the conformance kits, loaded when they are asked for.

Nothing here imports a kit by itself, so that the pytest plugin beside it comes first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recognition.testing.graphs import GraphTests
    from recognition.testing.sinks import SinkTests

__all__ = ["GraphTests", "SinkTests"]

_PLACES = {"GraphTests": "recognition.testing.graphs", "SinkTests": "recognition.testing.sinks"}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
