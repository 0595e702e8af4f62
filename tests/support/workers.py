"""What one of several processes that share the tests makes for all of them."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    folder = Path(tempfile.gettempdir(), f"fastfuse-tests-{run}")
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    with alone(path):
        if not path.exists():
            path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
