"""
The pytest plugin of the library: the kit's assertions say what they compared.

It is found by the entry point ``pytest11``. Without it a failing assertion of a kit that was
installed from a wheel prints nothing but ``AssertionError``. It adds no fixtures and no options.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("recognition.testing.sinks", "recognition.testing.graphs")
