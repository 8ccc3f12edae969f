"""A workspace in two folders, the server's and its parties', that rsync keeps in step, which can be killed."""

import functools
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fedcli.errors import ArrivingError, NotReadyError
from support.kills import arm, fork, was_killed
from support.processes import ENVIRONMENT

SOURCE = Path(__file__).with_name("dying_copies.c")
UP = ("inbox", "clients")
DOWN = ("rounds", "enrolment", "workspace.json", "fedcli.yaml")
"""What each side alone writes, and the other has a copy of."""
RECORDS = ("--include=*/", "--include=*.json", "--include=*.sig", "--exclude=*")
WAYS = {
    "whole files": (("-a",),),
    "in place": (("-a", "--inplace"),),
    "delayed": (("-a", "--delay-updates"),),
    "records first": (("-a", *RECORDS), ("-a",)),
}
"""Options of the calls of rsync that carry one way."""
LEFT_BY_RSYNC = re.compile(r"\.~tmp~|\..+\.[A-Za-z0-9]{6}")


@functools.cache
def library() -> Path:
    """Compile dying_copies.c; return the library."""
    made = Path(tempfile.mkdtemp(prefix="fedcli-copies-")) / "dying_copies.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"], check=True, capture_output=True)
    return made


class Mirror:
    """`server/W` and `party/W`, each with a home of its user's beside it."""

    def __init__(self, folder: Path, way: str) -> None:
        self.folder, self.way = folder, WAYS[way]
        self.server, self.party = folder / "server/W", folder / "party/W"

    def up(self, dies_at: int = 0) -> bool:
        """Carry to the server what parties write; return whether rsync came to its end."""
        return self._carry(self.party, self.server, UP, dies_at)

    def down(self, dies_at: int = 0) -> bool:
        """Carry to the parties what the server writes; return whether rsync came to its end."""
        return self._carry(self.server, self.party, DOWN, dies_at)

    def both(self) -> None:
        """Carry both ways; nothing is killed."""
        assert self.up()
        assert self.down()

    def at(self, side: str, work: Callable[[Path], object], dies_at: int = 0, *, after: bool = False) -> bool:
        """Work in a process at a side; return whether it was killed before or after its n-th change (0: at none)."""

        def is_done() -> None:
            os.environ["XDG_DATA_HOME"] = str(self.folder / side / "home")
            os.environ.pop("FEDCLI_HOME", None)
            if dies_at:
                arm(dies_at, after)
            with suppress(NotReadyError, ArrivingError):
                work(self.folder / side / "W")

        return was_killed(fork(is_done))

    def _carry(self, source: Path, target: Path, names: Sequence[str], dies_at: int) -> bool:
        """Run rsync; it dies, with what it has forked, before its n-th change of the target (0: at none)."""
        there = [str(source / name) for name in names if (source / name).exists()]
        target.mkdir(parents=True, exist_ok=True)
        for options in self.way if there else ():
            log = self.folder / "changes"
            log.unlink(missing_ok=True)
            dying = {"DIES_AT": str(dies_at), "CHANGES": str(log), "LD_PRELOAD": str(library())} if dies_at else {}
            line = ["rsync", *options, *there, str(target)]
            done = subprocess.run(line, env=ENVIRONMENT | dying, capture_output=True, text=True, start_new_session=True)
            if done.returncode == -signal.SIGKILL:
                return False
            assert done.returncode == 0, done.stderr
            if dies_at:
                changes = log.stat().st_size if log.exists() else 0
                assert changes < dies_at
                dies_at -= changes
        return True


def left(folder: Path) -> set[str]:
    """Return all names below a folder, without those that rsync leaves when it is killed, and locks."""
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not any(LEFT_BY_RSYNC.fullmatch(part) for part in name.parts) and path.name not in ("server.lock", "lock"):
            found.add(os.fspath(name))
    return found
