"""Regular expressions of rows, matched in a process that is bounded in time and memory: a pattern may be hostile.

`(a+)+$` takes longer than the world is old, and a thread cannot be stopped while it is matched.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

LONGEST = 1000
"""Characters of a pattern."""
SECONDS = 1.0
"""Of one match; one that takes longer is none."""
_START = 30.0
"""Seconds in which the process starts and ends, beside its matches."""
_CHILD = """
import json, re, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

class Late(BaseException):
    pass

def ring(*_):
    raise Late

signal.signal(signal.SIGALRM, ring)
pairs, seconds = json.load(sys.stdin)
for pattern, text in pairs:
    found = None
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            compiled = re.compile(pattern)
            found = False
            found = compiled.fullmatch(text) is not None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (Late, Exception):
        pass
    print(json.dumps(found), flush=True)
"""


def match_all(pairs: Sequence[tuple[str, str]], *, seconds: float = SECONDS) -> list[bool | None]:
    """Return of each pattern and text whether the pattern matches the whole text; None for what is no pattern.

    One that takes too long, or too much memory, does not match.
    """
    found: list[bool | None] = []
    while len(found) < len(pairs):
        rest = [(pattern[: LONGEST + 1], text) for pattern, text in pairs[len(found) :]]
        told = _matched(rest, seconds)
        found += told[: len(rest)]
        if len(told) < len(rest):  # the process died of this one
            found.append(False)
    return found


def _matched(pairs: Sequence[tuple[str, str]], seconds: float) -> list[bool | None]:
    """Return what a process says of pairs, up to where it ends."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([pairs, seconds]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_START + seconds * len(pairs),
            check=False,
        )
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
    return [json.loads(line) for line in said.splitlines() if line in (b"true", b"false", b"null")]
