"""Trying what the protocol needs of a store: that a create-only write is one, and that what is written is read."""

import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from fedcli.errors import DeniedError, FedError
from fedcli.quantities import describe_bytes
from fedcli.stores.objects import Objects

WRITERS = 8
_RACES = 3
_NUM_BYTES = 8 * 2**20
LARGEST_SKEW = 60.0


@dataclass(frozen=True)
class Probed:
    """One thing that was tried: what is wrong with it, None where nothing is, and what was measured."""

    name: str
    problem: str | None
    detail: str
    is_needed: bool = True
    """Whether nothing works where it is wrong."""


def probe_store(objects: Objects, scratch: str) -> Iterator[Probed]:
    """Try a store below a key, which is emptied in the end, as far as that is allowed.

    A store that cannot be reached, or may not be written there, ends it with one finding.
    """
    try:
        yield _latency(objects, scratch)
        objects.put(f"{scratch}/first", b"first")
    except FedError as error:
        yield Probed("reach", error.message, error.hint)
        return
    try:
        for probe in (_create_twice, _race, _read_back, _clock, _bandwidth):
            try:
                yield probe(objects, f"{scratch}/{uuid.uuid4().hex[:8]}")
            except FedError as error:
                yield Probed(probe.__name__.strip("_").replace("_", " "), error.message, error.hint)
    finally:
        left = empty(objects, scratch)
    if left:
        yield Probed("clean up", f"{left} objects stay below {scratch}/: this key may not delete them", "", False)


def empty(objects: Objects, folder: str) -> int:
    """Remove all below a folder; return how many objects this key may not delete."""
    left = 0
    for key in objects.below(folder):
        try:
            objects.delete(f"{folder}/{key}")
        except DeniedError:
            left += 1
    return left


def _latency(objects: Objects, scratch: str) -> Probed:
    """Ask for what is not there, which a poll does."""
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        objects.head(f"{scratch}/missing")
        seconds.append(time.monotonic() - start)
    return Probed("latency", None, f"{1000 * statistics.median(seconds):.0f} ms a request")


def _create_twice(objects: Objects, scratch: str) -> Probed:
    key = f"{scratch}/created"
    answers = [objects.create(key, contents) for contents in (b"first", b"second")]
    stands = objects.get(key, 100)
    problem = None
    if not answers[0]:
        problem = "the first creation of a name is refused"
    elif answers[1] and stands == b"second":
        problem = "a create-only write replaces what stands there: the store ignores its condition"
    elif answers[1]:
        problem = "a second creation of a name is said to succeed, and changes nothing"
    elif stands != b"first":
        problem = "a second creation of a name is refused, and replaces what stands there"
    return Probed("create twice", problem, "the second is refused")


def _race(objects: Objects, scratch: str) -> Probed:
    """Let writers create one name at once, each with contents of its own."""
    writers = [objects.another() for _ in range(WRITERS)]
    for race in range(_RACES):
        key = f"{scratch}/race-{race}"
        with ThreadPoolExecutor(WRITERS) as pool:
            calls = [pool.submit(each.create, key, f"{writer}".encode() * 100) for writer, each in enumerate(writers)]
            won = [writer for writer, call in enumerate(calls) if call.result()]
        stands = objects.get(key, 1000)
        if len(won) != 1:
            return Probed("race", f"of {WRITERS} writers that create one name {len(won)} are told that they did", "")
        if stands != f"{won[0]}".encode() * 100:
            return Probed("race", f"writer {won[0]} is told that it created a name, and another's contents stand", "")
    return Probed("race", None, f"{_RACES} times {WRITERS} writers, one winner each")


def _read_back(objects: Objects, scratch: str) -> Probed:
    """Read and list at once what was just written, and what has just been replaced and deleted."""
    key, problem = f"{scratch}/written", None
    for contents in (b"first", b"second"):
        objects.put(key, contents)
        if objects.get(key, 100) != contents:
            problem = "what was just written is not what is read"
    if objects.names(scratch) != ["written"]:
        problem = problem or "a list does not show what was just written"
    with suppress(DeniedError):
        objects.delete(key)
        if objects.head(key) is not None:
            problem = problem or "what was just deleted is still there"
    return Probed("read back", problem, "what is written is read and listed at once")


def _clock(objects: Objects, scratch: str) -> Probed:
    objects.put(f"{scratch}/now", b"")
    entry = objects.head(f"{scratch}/now")
    skew = 0.0 if entry is None else time.time() - entry.modified
    problem = None
    if abs(skew) > LARGEST_SKEW:
        problem = f"this machine's clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the store's"
    return Probed("clock", problem, "as the store's", False)


def _bandwidth(objects: Objects, scratch: str) -> Probed:
    contents = os.urandom(_NUM_BYTES)
    up = _seconds(lambda: objects.put(f"{scratch}/large", contents))
    start = time.monotonic()
    read = objects.get(f"{scratch}/large", _NUM_BYTES)
    down = time.monotonic() - start
    problem = None if read == contents else "a large object comes back changed"
    rates = f"{describe_bytes(_NUM_BYTES / up)}/s up, {describe_bytes(_NUM_BYTES / down)}/s down"
    return Probed("bandwidth", problem, rates)


def _seconds(call: Callable[[], None]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start
