"""What :func:`fastfuse.convert` found in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ConversionReport", "Found"]


@dataclass(frozen=True)
class Found:
    """A module whose class is known.

    Attributes:
        name: in the model; "" is the model itself.
        target: its class, as patterns name it.
        reason: why it is left; None: it is converted.
        again: whether it had been converted before.
        other_names: of the same module, if it is there more than once.
    """

    name: str
    target: str
    reason: str | None = None
    again: bool = False
    other_names: Sequence[str] = ()

    @property
    def what(self) -> str:
        if self.reason is not None:
            return "left"
        return "converted before" if self.again else "converted"


@dataclass(frozen=True)
class ConversionReport:
    """``print(report)`` is a table.

    Attributes:
        found: every module whose class is known.
        modules: how many modules the model has.
        flops: of one call, by the original and by the converted model, each multiplication and
            each addition of matrix products and convolutions; None: without ``inputs``.
    """

    found: Sequence[Found]
    modules: int
    flops: tuple[int, int] | None = None

    @property
    def converted(self) -> list[str]:
        """Names of the converted modules."""
        return [f.name for f in self.found if f.reason is None]

    @property
    def left(self) -> dict[str, str]:
        """Modules that are known and left, with the reason."""
        return {f.name: f.reason for f in self.found if f.reason is not None}

    def __str__(self) -> str:
        count = len(self.converted)
        plural = "" if count == 1 else "s"
        lines = [f"{count} module{plural} of {self.modules} converted"]
        if not self.found:
            lines[0] = f"none of {self.modules} modules is known: nothing was changed"
        groups: dict[tuple[str, str, str], list[str]] = {}
        for f in self.found:
            name = " = ".join(name or "(the model)" for name in (f.name, *f.other_names))
            groups.setdefault((f.what, f.target, f.reason or ""), []).append(name)
        width = max((len(what) for what, _, _ in groups), default=0)
        for (what, target, reason), names in sorted(groups.items(), key=lambda group: group[0][0]):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            lines.append(f"  {what:{width}}  {target}  {shown}" + (f": {reason}" if reason else ""))
        if self.flops is not None:
            before, after = self.flops
            lines.append(f"  {before / 1e9:.2f} -> {after / 1e9:.2f} GFLOP a call")
        return "\n".join(lines)
