"""
Every error that this library raises, drawn as a tree.

::

    RecognitionError
    ├── ConfigurationError          a setting, URL or combination of them is wrong
    │   ├── UnknownSchemeError      no graph or sink is installed for the URL's scheme
    │   ├── MissingDependencyError  the driver of a part is not installed (names the command)
    │   └── UnsupportedPolicyError  the table cannot support the policy (says what to add)
    ├── InputError                  what was handed in is wrong; the rest of the batch goes on
    │   ├── EventError              an event cannot be read: goes to the rejects
    │   └── MessageError            an update message is malformed, foreign or unbounded
    ├── GraphError                  the graph failed
    │   ├── GraphUnavailableError   it cannot be reached, is locked or went away
    │   ├── GraphReadOnlyError      it may be read but not written
    │   └── GraphSchemaError        a foreign, older or newer schema was found
    ├── SourceError                 where events come from failed
    └── SinkError                   the destination failed
        ├── SinkUnavailableError    it cannot be reached, is locked or went away
        ├── SinkReadOnlyError       it may be read but not written
        ├── TableError              table or column missing, a view, or of the wrong type
        │   └── ValueRefusedError   the table is right, but one value does not fit its column
        └── OutcomeUnknownError     the connection went before the answer: it may have happened

Each class answers two questions, as attributes of the error:

``written``
    Was anything written? ``False``: no. ``True``: yes, in part. ``None``: not known.
``retryable``
    May the very same call succeed later without anybody changing anything?

An error's text never holds a password, and never an identifier's value.
"""

from __future__ import annotations

from types import TracebackType


class RecognitionError(Exception):
    """Root of the tree; catching it catches all that this library raises on purpose."""

    written: bool | None = False
    retryable: bool = False

    def __init__(
        self, message: str, *, written: bool | None = None, retryable: bool | None = None
    ) -> None:
        super().__init__(message)
        if written is not None:
            self.written = written
        if retryable is not None:
            self.retryable = retryable


class ConfigurationError(RecognitionError):
    """A setting, a URL, or a combination of them is wrong. Nothing was written."""


class UnknownSchemeError(ConfigurationError):
    """No graph or sink is installed for the scheme of a URL."""


class MissingDependencyError(ConfigurationError):
    """A part of the library needs a package that is not installed."""


class UnsupportedPolicyError(ConfigurationError):
    """The table cannot support the attribution policy; the text says what to add."""


class InputError(RecognitionError):
    """Something handed in is wrong; only it is refused. Nothing of it was written."""


class EventError(InputError):
    """An event cannot be read or is out of bounds. It goes to the rejects."""


class MessageError(InputError):
    """An update message is malformed, of an unknown version, or not bounded."""


class GraphError(RecognitionError):
    """The graph failed. A batch is one transaction: nothing of it was written."""


class GraphUnavailableError(GraphError):
    """The graph cannot be reached, is locked, or went away. A retry may help."""

    retryable = True


class GraphReadOnlyError(GraphError):
    """The graph may be read but not written."""


class GraphSchemaError(GraphError):
    """The graph holds a foreign schema, or one of another version."""


class SourceError(RecognitionError):
    """
    Where events come from failed, or refuses. What it did not confirm comes again.

    ``retryable`` says whether starting it again may help.
    """


class SinkError(RecognitionError):
    """The destination failed; its transaction was rolled back."""


class SinkUnavailableError(SinkError):
    """The destination cannot be reached, is locked, or went away. A retry may help."""

    retryable = True


class SinkReadOnlyError(SinkError):
    """The destination may be read but not written."""


class TableError(SinkError):
    """A table or a column is missing, or is nothing that can be set. Somebody has to mend it."""


class ValueRefusedError(TableError):
    """One value is too long for its column, or of another type. The table may stay as it is."""


class OutcomeUnknownError(SinkError):
    """
    The connection went away before the answer came.

    The statement may or may not have been carried out. Applying the same plan again is safe.
    """

    written = None
    retryable = True

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.written = None


def tell(exc: BaseException) -> str:
    """What may be told of an error: of one that is not ours the class; its text may hold a row."""
    return str(exc) if isinstance(exc, RecognitionError) else type(exc).__name__


def trace(
    exc: BaseException,
) -> tuple[type[BaseException], BaseException, TracebackType | None] | None:
    """What a log takes as ``exc_info``: of an error that is not ours the lines of code, no text."""
    if isinstance(exc, RecognitionError):
        return None
    told = RecognitionError(tell(exc))
    return type(told), told, exc.__traceback__
