"""The benchmark's side of a measured system: a process that takes requests on stdin and answers on stdout, by lines.

    {"shape": "chain", "count": 50}  ->  {"duration_s": 0.71}

Where the system cannot be had, the first line is `{"absent": "why"}`. A request it cannot serve is answered with
`{"unsupported": true}`. With `--once SHAPE COUNT` it serves that one request and ends, which is how the time from the
shell is measured. It runs in the system's own environment and imports nothing else.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path


class Absent(Exception):
    """What is to be measured cannot be had on this machine; the text says why."""


Measure = Callable[[str, int], float | None]
"""Runs a plan of this shape and size; returns the seconds inside the runtime, or None where it has no such thing."""


def serve(version: str, opened: Callable[[Path], AbstractContextManager[Measure]]) -> None:
    """Open the system on an empty folder and serve requests until stdin ends."""
    # What the system itself prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, contextlib.ExitStack() as stack:
        try:
            measure = stack.enter_context(opened(Path(folder)))
        except Absent as error:
            print(json.dumps({"absent": str(error)}), file=answers)
            return
        if "--once" in sys.argv:
            shape, count = sys.argv[sys.argv.index("--once") + 1 :][:2]
            print(json.dumps(_answer(measure, shape, int(count))), file=answers)
            return
        print(json.dumps({"version": version, "pid": os.getpid()}), file=answers)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(_answer(measure, request["shape"], request["count"])), file=answers)


def _answer(measure: Measure, shape: str, count: int) -> dict[str, object]:
    duration_s = measure(shape, count)
    return {"unsupported": True} if duration_s is None else {"duration_s": duration_s}
