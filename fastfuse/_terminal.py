"""Output to terminals and files whose encoding lacks some characters."""

from __future__ import annotations

import codecs
import io
import sys

__all__ = ["spell_out"]

_HANDLER = "fastfuse.spelled_out"
_SPELLED = {
    "→": "->", "×": "x", "²": "^2", "³": "^3", "·": "*", "√": "sqrt", "±": "+-", "≈": "~",
    "≤": "<=", "≥": ">=", "−": "-", "–": "-", "—": "-", "…": "...", "µ": "u", "μ": "u", "°": "deg",
}  # fmt: skip


def spell_out() -> None:
    """From now on stdout and stderr write what their encoding lacks in ASCII; nothing raises.

    Symbols as "->" and "x", all else, such as what the names of files may hold, as escapes.

    >>> from fastfuse._terminal import spell_out
    >>> spell_out()
    >>> "2 × 4 → é".encode("ascii", "fastfuse.spelled_out")
    b'2 x 4 -> \\\\xe9'
    """
    codecs.register_error(_HANDLER, _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escaped = (_SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(escaped), error.end
