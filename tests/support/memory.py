"""The most memory that statements hold beyond what was there before."""

from __future__ import annotations

import subprocess
import sys

import pytest

__all__ = ["peak_of", "reads_proc"]

reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

_SCRIPT = """
import re, torch, fastfuse

def status(key):
    with open("/proc/self/status") as file:
        return int(re.search(key + r":\\s+(\\d+)", file.read())[1]) * 1024

{before}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
start = status("VmRSS")
{measured}
print(status("VmHWM") - start)
"""


def peak_of(measured: str, *, before: str) -> int:
    """Bytes, in a process of its own, which has ``torch`` and ``fastfuse``. What comes before loads
    code and starts threads; what statements leave counts too."""
    script = _SCRIPT.format(before=before, measured=measured)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(run.stdout)
