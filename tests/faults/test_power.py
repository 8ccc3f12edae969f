"""Power cuts: whatever of the unsynced reached the disk, nothing that was told is lost, and the federation goes on.

At each system call that changes the disk the power goes; $FEDCLI_FAULTS cuts are drawn of each (30; `all`: each).
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.faults import recorded
from support.federation import ADAPTER, configure, restart, train_as
from support.power import cut

from fedcli import Federation
from fedcli.workspace.layout import Workspace

NUM_CUTS = os.environ.get("FEDCLI_FAULTS", "15")


def aggregate(workspace: Path) -> None:
    Federation.open(workspace).server.aggregate()


def train_all(workspace: Path) -> None:
    for client in range(3):
        train_as(client, workspace)


def go_on(workspace: Path) -> None:
    """Let all that is due be done, until the last round."""
    federation = Federation.open(workspace)
    while federation.state.head.manifest.state == "open":
        train_all(workspace)
        federation.server.aggregate()


def merge_again(workspace: Path, number: int) -> None:
    if Federation.open(workspace).round().number == number:
        aggregate(workspace)


def discard(workspace: Path) -> None:
    Federation.open(workspace).server.discard(1)


def collect(workspace: Path) -> None:
    Federation.open(workspace).gc()


def export(workspace: Path) -> None:
    Federation.open(workspace).export(workspace / "out")


@pytest.fixture(scope="module")
def states(small_template: Path) -> Iterator[Callable[[str], Path]]:
    memory = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp")
    base = memory / f"fedcli-power-{os.getpid()}"
    base.mkdir()

    def state(algorithm: str) -> Path:
        folder = base / algorithm
        if not folder.exists():
            shutil.copytree(small_template, folder)
            if algorithm != "fedavg":
                restart(folder, algorithm)
            train_all(folder)
            aggregate(folder)
            train_as(1, folder)
            train_as(2, folder)
        return folder

    yield state
    shutil.rmtree(base)


def adapters(workspace: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(workspace.glob(f"rounds/?????/adapter/{ADAPTER}"))]


OPERATIONS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    "client train": ("fedavg", lambda root: None, partial(train_as, 0)),
    "client train (scaffold)": ("scaffold", lambda root: None, partial(train_as, 0)),
    "server aggregate": ("fedavg", partial(train_as, 0), aggregate),
    "server aggregate (scaffold)": ("scaffold", partial(train_as, 0), aggregate),
    "server discard": ("fedavg", lambda root: None, discard),
    "gc": ("fedavg", lambda root: configure(root, "federation.rounds=4", "retention.keep_last=1"), collect),
    "export": ("fedavg", lambda root: None, export),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_loses_nothing_that_was_told(states, name):
    algorithm, prepare, operation = OPERATIONS[name]
    start = states(algorithm)
    root = start.with_name("cut")

    def fresh() -> Path:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        prepare(root)
        return root

    operation(fresh())
    go_on(root)
    undisturbed = adapters(root)
    num_calls = 1
    while cut(fresh(), operation, num_calls) and num_calls < 2**10:
        num_calls *= 2
    positions = list(range(1, num_calls + 1))
    if NUM_CUTS != "all":
        drawn = random.Random(name).sample(positions[:-1], min(int(NUM_CUTS), num_calls - 1))
        positions = [*sorted(drawn), num_calls]
    counts = dict.fromkeys(("tried", "lost", "doubled", "left over"), 0)
    problems = []
    for position in positions:
        killed = cut(fresh(), operation, position)
        for image in (root.with_name("cut.durable"), root.with_name("cut.named")):
            counts["tried"] += 1
            where = f"cut at {position}, {image.suffix}"
            if violations := Federation(Workspace(image)).verify().violations:
                counts["doubled"] += 1
                problems.append(f"{where}: {violations}")
            if not killed and is_lost(name, root, image):
                counts["lost"] += 1
                problems.append(f"{where}: what was told is lost")
            operation_again(name, image, operation)
            go_on(image)
            if adapters(image) != undisturbed and name != "gc":
                counts["lost"] += 1
                problems.append(f"{where}: another end")
            left = [path for folder in ("rounds", "inbox") for path in (image / folder).rglob(".tmp-*")]
            if left:
                counts["left over"] += 1
                problems.append(f"{where}: {left}")
        if not killed:
            break
    recorded("power.json", name, counts, problems)
    assert not problems, "\n".join(problems)


def is_lost(name: str, root: Path, image: Path) -> bool:
    """Return whether what a command that has ended did is not on the disk."""
    part = {"client train": "inbox", "server aggregate": "rounds", "server discard": "inbox", "export": "out"}
    folder = part.get(name.partition(" (")[0], "rounds")

    def names(place: Path) -> set[str]:
        return {
            path.relative_to(place).as_posix()
            for path in (place / folder).rglob("*")
            if not path.name.startswith(".")
        }  # fmt: skip

    return name != "gc" and names(root) != names(image)


def operation_again(name: str, image: Path, operation: Callable[[Path], object]) -> None:
    if name.startswith("server aggregate"):
        merge_again(image, 1)
    elif name != "export" or not (image / "out").exists():
        operation(image)
