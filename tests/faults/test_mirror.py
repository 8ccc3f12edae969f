"""Kills in a workspace that rsync mirrors: of rsync at each change that it makes, and of fedcli at each of its own.

The server works in one folder and its parties in another, in processes of their own. Whatever was killed is run again,
and all ends as if undisturbed.
"""

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.federation import read_manifest
from support.mirror import WAYS, Mirror, left
from support.signed import at, join, make_signed, train

from fedcli import Federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed"),
]
PARTIES = range(3)
STRIDE = int(os.environ.get("FEDCLI_KILL_STRIDE", "3"))
"""Every so many changes of rsync, and of fedcli five times so many; 1 takes all of both, which takes half an hour."""


@pytest.fixture(scope="module")
def enrolled(small_template: Path) -> Iterator[Path]:
    """A signed workspace and its mirror, three enrolled parties, round 0 open; nobody has answered."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fedcli-mirror-", dir=memory) as folder:
        mirror = Mirror(Path(folder) / "enrolled", "whole files")
        make_signed(small_template, mirror.server, mirror.folder / "server/home")
        mirror.both()
        for client in PARTIES:
            with at(mirror.folder / "party/home"):
                own = join(mirror.party, client)
            mirror.both()
            with at(mirror.folder / "server/home"):
                Federation.open(mirror.server).server.enrol(client, own)
            mirror.both()
        yield mirror.folder


def fresh(start: Path, way: str, name: str = "killed") -> Mirror:
    """Return a new copy of a mirror under one name."""
    shutil.rmtree(start.parent / name, ignore_errors=True)
    return Mirror(Path(shutil.copytree(start, start.parent / name)), way)


def reached(start: Path, name: str, *steps: Callable[[Mirror], object]) -> Path:
    """Return a copy of a mirror that has gone on by some steps."""
    mirror = fresh(start, "whole files", name)
    for step in steps:
        step(mirror)
    return mirror.folder


def aggregate(workspace: Path) -> None:
    Federation.open(workspace).server.aggregate()


def sweep(workspace: Path) -> None:
    """Remove what was half-written by processes that died, and carried by rsync."""
    Federation.open(workspace).gc()


def discard(workspace: Path) -> None:
    assert Federation.open(workspace).server.discard(1)


def answer(mirror: Mirror, *clients: int) -> None:
    for client in clients or PARTIES:
        assert not mirror.at("party", partial(train, client=client))


def merge(mirror: Mirror) -> None:
    """Merge round 0, unless it was."""
    if not (mirror.server / "rounds/00001").exists():
        assert not mirror.at("server", aggregate)


def ends(mirror: Mirror) -> list[dict]:
    """Return of each round its files, and what was counted."""
    found = []
    for number in range(len(list((mirror.server / "rounds").glob("[0-9]*")))):
        manifest = read_manifest(mirror.server, number)
        merged = manifest["aggregation"] or {"counted": [], "refused": [], "missing": []}
        counted = [entry["client"] for entry in merged["counted"]]
        found.append({"files": manifest["files"], "counted": counted} | {k: merged[k] for k in ("refused", "missing")})
    return found


def check(mirror: Mirror, undisturbed: Mirror) -> None:
    """All is as undisturbed: the same rounds of the same updates, and no name more but what rsync leaves."""
    assert ends(mirror) == ends(undisturbed)
    for side, folder in (("server", mirror.server), ("party", mirror.party)):
        assert left(folder) == left(undisturbed.folder / side / "W")
        with at(mirror.folder / side / "home"):
            found = Federation.open(folder).verify()
        assert found.violations == []
        assert all("such as other tools leave" in remark.problem for remark in found.remarks)


@pytest.fixture(scope="module")
def answered(enrolled: Path) -> Path:
    """All have answered round 0, and the update of party 1 alone has not been carried."""
    return reached(enrolled, "answered", lambda mirror: answer(mirror, 0, 2), Mirror.both, answer)


@pytest.fixture(scope="module")
def merged(answered: Path) -> Path:
    """Round 0 is merged at the server, and no party has seen round 1."""
    return reached(answered, "merged", Mirror.both, merge)


@pytest.fixture(scope="module")
def goal(merged: Path) -> Mirror:
    """Round 0 was merged undisturbed, and party 1 has answered round 1."""
    mirror = Mirror(reached(merged, "goal", Mirror.both, lambda mirror: answer(mirror, 1), Mirror.both), "whole files")
    (merge,) = ends(mirror)[1:]
    assert (merge["counted"], merge["refused"], merge["missing"]) == ([0, 1, 2], [], [])
    check(mirror, mirror)
    return mirror


def go_on(mirror: Mirror) -> None:
    """Do what the loop and cron do, until the goal is reached."""
    mirror.both()
    merge(mirror)
    mirror.both()
    answer(mirror, 1)
    mirror.both()


def copies_killed(start: Path, way: str, direction: str) -> Iterator[Mirror]:
    """Yield mirrors whose rsync was killed before its 1st, 2nd, ... change, until it comes to its end."""
    for position in itertools.count(1 + [*WAYS].index(way) % STRIDE, STRIDE):
        mirror = fresh(start, way)
        if getattr(mirror, direction)(position):
            assert position > 17
            return
        yield mirror


@pytest.mark.parametrize("way", WAYS)
def test_an_update_whose_copying_is_killed_at_any_change_counts_once(answered, goal, way):
    for mirror in copies_killed(answered, way, "up"):
        assert not mirror.at("server", aggregate)
        go_on(mirror)
        check(mirror, goal)


@pytest.mark.parametrize("way", WAYS)
def test_a_round_whose_copying_is_killed_at_any_change_is_answered_once(merged, goal, way):
    for mirror in copies_killed(merged, way, "down"):
        answer(mirror, 1)
        go_on(mirror)
        check(mirror, goal)


def nothing_done(mirror: Mirror) -> None:
    """Parties 0 and 2 have answered, and party 1 has not."""
    answer(mirror, 0, 2)
    mirror.both()


KILLED = {
    "train": ("enrolled", [nothing_done], "party", partial(train, client=1)),
    "aggregate": ("answered", [Mirror.both], "server", aggregate),
}
"""Commands: from where, after which steps, at which side, and what they do."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("command", KILLED)
def test_rsync_may_carry_what_a_command_left_that_was_killed_at_any_call(request, goal, command, after):
    """What was half-written has its host in its name, and goes with `gc` wherever rsync has brought it."""
    fixture, steps, side, work = KILLED[command]
    start = reached(request.getfixturevalue(fixture), f"before {command}", *steps)
    ways = itertools.cycle(WAYS)
    for position in itertools.count(1, 1 if STRIDE == 1 else 5 * STRIDE):
        mirror = fresh(start, next(ways))
        if not mirror.at(side, work, position, after=after):
            assert position > 60
            return
        mirror.both()
        mirror.at("server", aggregate)
        answer(mirror, 1)
        go_on(mirror)
        mirror.at("server", sweep)
        mirror.at("party", sweep)
        check(mirror, goal)


def test_rsync_brings_back_what_the_server_alone_has_discarded_and_not_what_both_have(answered):
    mirror = fresh(reached(answered, "carried", Mirror.both), "whole files")
    update = mirror.server / "inbox/1/round-00000"
    assert not mirror.at("server", discard)
    assert not update.exists()
    mirror.both()
    assert update.exists()
    for side in ("party", "server"):
        assert not mirror.at(side, discard)
    mirror.both()
    assert not update.exists()
    answer(mirror, 1)
    mirror.both()
    merge(mirror)
    assert ends(mirror)[1]["counted"] == [0, 1, 2]
