"""
What `import recognition` costs beside pydantic's own import. Target: under 150 ms.

Each figure is a fresh interpreter; the median of the rounds counts. Nothing is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

# Both halves are timed inside one interpreter, so that its start counts for neither. pydantic
# builds its parts when they are first asked for: a model with a few kinds of fields asks for them.
_CODE = """
import time
begin = time.perf_counter()
import pydantic
class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")
    text: str
    time: pydantic.AwareDatetime | None = None
pydantic.TypeAdapter(Model).json_schema()
middle = time.perf_counter()
import recognition
end = time.perf_counter()
print(middle - begin, end - middle)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--small", action="store_true", help="one round, to see that it runs")
    arguments = parser.parse_args()
    rounds = 1 if arguments.small else 5

    pairs = [_measure() for _ in range(rounds)]
    pydantic_ms = round(statistics.median(pair[0] for pair in pairs), 1)
    own_ms = round(statistics.median(pair[1] for pair in pairs), 1)

    if arguments.json:
        print(json.dumps({"rounds": rounds, "pydantic_ms": pydantic_ms, "recognition_ms": own_ms}))
    else:
        print(f"import pydantic      {pydantic_ms:8.1f} ms")
        print(f"import recognition   {own_ms:8.1f} ms more (median of {rounds}; target 150)")


def _measure() -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
    pydantic_seconds, own_seconds = done.stdout.split()
    return float(pydantic_seconds) * 1000, float(own_seconds) * 1000


if __name__ == "__main__":
    main()
