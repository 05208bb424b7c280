"""Checks of `python -m maws doctor`: functions that look at one thing each and say what they saw and what to do.

They change nothing, ask no network, and end within seconds. What cannot be looked at is a finding too.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from maws.devices import GIB

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """What a check saw: `level` is ok, warning (it will run, but) or problem (it will not); `do` is the way out."""

    subject: str
    level: str
    seen: str
    do: str = ""


Check = Callable[[], Finding | Iterable[Finding]]


def found(subject: str, check: Check) -> Iterator[Finding]:
    """The findings of one check; one that fails itself is a warning, so that the others are still heard."""
    try:
        result = check()
        yield from [result] if isinstance(result, Finding) else result
    except Exception as e:  # a check meets broken installations: whatever they raise
        yield Finding(subject, WARNING, f"could not be looked at: {type(e).__name__}: {e}", "look at it by hand")


def gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
