"""Every command with one failing system call: run again it ends as if undisturbed, and it has said what failed.

A seeded sample of $FEDCLI_FAULTS faults a command (6; `all`: each call with each failure). docs/RELIABILITY.md has the
figures of a long campaign, which $FEDCLI_RECORD=DIR writes as errno.json.
"""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import faults
from support.faults import FAILURES, OF_AN_UPDATE, Done, Fault, copied, recorded, snapshot
from support.federation import all_take_part, restart
from support.processes import SMALL, settings

from fedcli import Federation
from fedcli.workspace.layout import Workspace

NOTHING_DUE = 6
"""How a server ends whose round was published before a later call failed, when it is run again."""
NUM_FAULTS = os.environ.get("FEDCLI_FAULTS", "6")
NOT_WRITTEN = "the table is not written"
"""What is told to a reader who may not write to the workspace, beside the table itself."""
TOKENS = re.compile(r"private/\d+/tokens-\w+\.safetensors")
"""A cache: a disk that refuses it costs time later, and nothing else."""
CHANGING = ("write", "fsync", "close", "rename", "link", "mkdir", "unlink", "chmod", "fchmod")


@dataclass(frozen=True)
class Scenario:
    """A command in a state of a workspace; `first` makes the state of a small workspace, with all commands at hand."""

    name: str
    arguments: tuple[object, ...]
    first: Callable[[Path], object] = lambda root: None
    algorithm: str = "fedavg"
    start: str = "small"


def command(*arguments: object) -> Callable[[Path], object]:
    def work(root: Path) -> None:
        done = faults.run(arguments, root)
        assert done.code == 0, done.err

    return work


def after(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    def work(root: Path) -> None:
        for step in steps:
            step(root)

    return work


def closed(root: Path) -> None:
    """Let the federation go to its end with clients that answer without a model."""
    for _ in range(2):
        all_take_part(root)
        Federation.open(root).server.aggregate()


def without_rounds(root: Path) -> None:
    shutil.rmtree(root / "rounds")


PARTY = ("client", "join", "-w", "fed", "--id", 0, "--data", "rows.jsonl", "--home", "H0", "--yes")
train_0, train_1, train_2 = (command("client", "train", "--id", client) for client in range(3))
merged = command("server", "aggregate")
SCENARIOS = (
    Scenario("init", ("init", *settings(*SMALL)), start="empty"),
    Scenario("server open", ("server", "open"), without_rounds),
    Scenario("status", ("status",), all_take_part),
    Scenario("verify", ("verify",), closed),
    Scenario("client status", ("client", "status", "--id", 1)),
    Scenario("client train", ("client", "train", "--id", 0)),
    Scenario("client train --any", ("client", "train", "--any"), train_0),
    Scenario(
        "client train (scaffold)",
        ("client", "train", "--id", 0),
        after(train_0, train_1, train_2, merged),
        "scaffold",
    ),
    Scenario("server aggregate", ("server", "aggregate"), all_take_part),
    Scenario("server aggregate (scaffold)", ("server", "aggregate"), after(train_0, train_1, train_2), "scaffold"),
    Scenario("server aggregate (fedyogi)", ("server", "aggregate"), all_take_part, "fedyogi"),
    Scenario("server discard", ("server", "discard", "--id", 1), all_take_part),
    Scenario("run", ("run",)),
    Scenario("train-alone", ("train-alone", "--id", 1)),
    Scenario("train-pooled", ("train-pooled",)),
    Scenario("report", ("report",), closed),
    Scenario("report again", ("report",), after(closed, command("report"))),
    Scenario("export", ("export", "out"), closed),
    Scenario("export --merge", ("export", "out", "--merge"), closed),
    Scenario("client join", PARTY, start="parties"),
    Scenario("eval", ("eval", "run", "demo", "--round", 2), closed),
    Scenario("eval table", ("eval", "table"), after(closed, command("eval", "run", "demo", "--round", 2))),
    Scenario("data preview", ("data", "preview")),
    Scenario("gc", ("gc",), after(closed, lambda root: _keep(root, 1))),
)


def _keep(root: Path, number: int) -> None:
    from support.federation import configure

    configure(root, f"retention.keep_last={number}")


@pytest.fixture(scope="module")
def templates(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Scenario], Path]]:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path_factory.mktemp("faults")
    base = memory / f"fedcli-faults-{os.getpid()}"
    base.mkdir()
    made: dict[str, Path] = {}

    def template(scenario: Scenario) -> Path:
        if scenario.name in made:
            return made[scenario.name]
        folder = base / f"template-{len(made)}" / "W"
        if scenario.start == "small":
            shutil.copytree(small_template, folder)
            if scenario.algorithm != "fedavg":
                restart(folder, scenario.algorithm)
        else:
            folder.mkdir(parents=True)
        if scenario.start == "parties":
            command("init", "fed", *settings(*SMALL, "data.source=null", "federation.signatures=off"))(folder)
            rows = [{"instruction": f"say {n}", "output": f"{n} is said"} for n in range(9)]
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        # The paths that a state was made under are those that it is tried under.
        place = base / "W"
        shutil.rmtree(place, ignore_errors=True)
        folder.rename(place)
        scenario.first(place)
        shutil.copytree(place, folder, symlinks=True)
        made[scenario.name] = folder
        return folder

    yield template
    shutil.rmtree(base)


def ids(root: Path) -> list[bytes]:
    """Return what `init` draws: the workspace's id."""
    identity = root / "workspace.json"
    return [json.loads(identity.read_bytes())["id"].encode()] if identity.is_file() else []


def chosen(calls: list[list[str]], seed: str) -> list[Fault]:
    """Return all faults of a command with these calls, or a sample.

    EINTR is no failure that stays, and says that nothing was done; what only looks is not done and then failed.
    """
    every = [
        Fault(position, getattr(errno, name), mode, sticky)
        for position, (call, *_) in enumerate(calls, 1)
        for name in FAILURES
        for mode in ((faults.BEFORE, faults.AFTER) if call in CHANGING and name != "EINTR" else (faults.BEFORE,))
        for sticky in ((False, True) if name != "EINTR" else (False,))
    ]
    return every if NUM_FAULTS == "all" else random.Random(seed).sample(every, min(int(NUM_FAULTS), len(every)))


def is_refusal(done: Done, fault: Fault) -> bool:
    """Return whether the call was one of opening a dropped update, with an error that is the update's own fault."""
    if fault.position > len(done.calls):
        return False
    name, path, _ = done.calls[fault.position - 1]  # of two threads' calls the order is not always the same
    return name == "open" and "/inbox/" in path and fault.failure in OF_AN_UPDATE


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_failing_call_loses_nothing_doubles_nothing_and_leaves_nothing(templates, scenario: Scenario) -> None:
    template = templates(scenario)
    place = template.parents[1] / "W"
    undisturbed = faults.run(scenario.arguments, copied(template, place))
    assert undisturbed.code == 0, undisturbed.err
    names = ids(place)
    expected = snapshot(place, names)
    counts = dict.fromkeys(("tried", "failed", "lost", "doubled", "left over", "other"), 0)
    problems = []
    for fault in chosen(undisturbed.calls, scenario.name):
        done = faults.run(scenario.arguments, copied(template, place), fault)
        what = f"{errno.errorcode[fault.failure]} {fault} at {undisturbed.calls[fault.position - 1]}"
        counts["tried"] += 1
        if is_refusal(done, fault):
            continue
        if done.code != 0 or NOT_WRITTEN in done.err:
            counts["failed"] += 1
            for problem in faults_of(done, fault):
                counts["other"] += 1
                problems.append(f"{what}: {problem}: {done.err}")
            again = faults.run(scenario.arguments, place)
            if again.code not in (0, NOTHING_DUE):  # the files tell whether all is done
                counts["lost"] += 1
                problems.append(f"{what}: exit {done.code} and again {again.code}: {again.err}")
                continue
        found = snapshot(place, ids(place) or names)
        for kind, files in compared(found, expected).items():
            files = [name for name in files if kind != "lost" or name in found or not TOKENS.fullmatch(name)]
            if files:
                counts[kind] += 1
                problems.append(f"{what}: exit {done.code}: {kind}: {files}")
        if (place / "rounds/00000").exists():
            violations = Federation(Workspace(place)).verify().violations
            if violations:
                counts["doubled"] += 1
                problems.append(f"{what}: {violations}")
    recorded("errno.json", scenario.name, counts, problems)
    assert not problems, "\n".join(problems)


def faults_of(done: Done, fault: Fault) -> Iterator[str]:
    """Yield what is wrong with how a command says that it failed."""
    if "Traceback" in done.err or "internal error" in done.err:
        yield "a traceback"
    allowed = {0: NOT_WRITTEN in done.err, 4: True, 3: fault.failure == errno.EACCES and "the rows in" in done.err}
    if not allowed.get(done.code, False):
        yield f"exit {done.code}"
    if done.code != 0 and "fedcli: error: " not in done.err:
        yield "no error"


def compared(found: dict[str, str], expected: dict[str, str]) -> dict[str, list[str]]:
    """Return what is missing or another, and what should not be there."""
    return {
        "lost": [name for name in expected if found.get(name) != expected[name]],
        "left over": [name for name in found if name not in expected],
    }
