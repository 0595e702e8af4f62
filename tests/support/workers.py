"""What one of several processes that share the tests makes for all of them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """A file that is there whole or not at all: several processes may make the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process is in it for the same path; a file beside it stays."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_once(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, as JSON has it; in a run of several workers the first one calls it."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return make()
    # An option may name two runs alike; their processes have two parents.
    folder = Path(tempfile.gettempdir(), f"fastfuse-tests-{run}-{os.getppid()}")
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
    with alone(path):
        if not path.exists():
            write(path, json.dumps(make()))
    return json.loads(path.read_text(encoding="utf-8"))
