"""SIGKILL at every system call that changes the disk: nothing is lost, counted twice or half there."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest
from protocol_client import take_part
from support.federation import (
    ADAPTER,
    NUM_SAMPLES,
    all_take_part,
    configure,
    noisy,
    read_manifest,
    stored_hashes,
    train_as,
)
from support.kills import arm, copies_killed_at_every_call, die, fork, was_killed

from fedcli import Federation
from fedcli.errors import BusyError, FedError, NotReadyError
from fedcli.server import aggregate as aggregation
from fedcli.workspace import publish
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import Workspace


def finish(workspace: Path) -> None:
    """Let clients and server go on until the last round."""
    while Federation.open(workspace).round().manifest.state == "open":
        all_take_part(workspace)
        assert Federation.open(workspace).server.aggregate().published


def stored_adapters(workspace: Path) -> list[bytes]:
    """Return the bytes of all global adapters."""
    return [path.read_bytes() for path in sorted(workspace.glob(f"rounds/?????/adapter/{ADAPTER}"))]


@pytest.fixture(scope="module")
def template(small_template: Path) -> Iterator[Path]:
    """The small workspace without the rows, which nothing here reads."""
    # In memory where there is such a place: SIGKILL is the same there, and thousands of fsyncs take no time.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fedcli-kill-", dir=memory) as folder:
        yield Path(shutil.copytree(small_template, Path(folder) / "template", ignore=shutil.ignore_patterns("data")))


@pytest.fixture(scope="module")
def answered(template: Path) -> Path:
    """A workspace in which all have answered round 0."""
    folder = Path(shutil.copytree(template, template.parent / "answered"))
    all_take_part(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(template: Path) -> Path:
    """A federation in which nobody was killed."""
    folder = Path(shutil.copytree(template, template.parent / "undisturbed"))
    finish(folder)
    return folder


def take_part_as_client_0(workspace: Path) -> None:
    """Drop an update with the client that was written from the page."""
    assert take_part(workspace, 0, noisy(0), NUM_SAMPLES[0])


def drop_as_client_0(undisturbed: Path, workspace: Path) -> None:
    """Drop the same update with fedcli's own code."""
    files = undisturbed / "inbox" / "0" / "round-00000"
    drop_update(
        Federation.open(workspace).round(0),
        0,
        [(name, (files / name).read_bytes()) for name in (ADAPTER, "update.json")],
    )


def merge_round_0(workspace: Path) -> None:
    """Aggregate, unless the round was merged by the process that was killed."""
    if Federation.open(workspace).round().number == 0:
        assert Federation.open(workspace).server.aggregate().published


LEAST_CALLS = [
    ("take_part", 10),
    pytest.param("drop", 20, marks=pytest.mark.slow),
    pytest.param("aggregate", 50, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "after", [pytest.param(False, id="before"), pytest.param(True, id="after", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("operation", "least"), LEAST_CALLS)
def test_killed_at_any_system_call_nothing_is_lost_or_counted_twice(
    template, answered, undisturbed, operation, least, after
):
    start, work = {
        "take_part": (template, take_part_as_client_0),
        "drop": (template, partial(drop_as_client_0, undisturbed)),
        "aggregate": (answered, merge_round_0),
    }[operation]
    points = 0
    for workspace in copies_killed_at_every_call(start, work, after):
        points += 1
        assert Federation(Workspace(workspace)).verify().violations == []
        work(workspace)
        assert Federation(Workspace(workspace)).verify().violations == []
        finish(workspace)
        aggregations = [read_manifest(workspace, number)["aggregation"] for number in (1, 2)]
        for done in aggregations:
            assert [entry["client"] for entry in done["counted"]] == [0, 1, 2]
            assert (done["refused"], done["missing"]) == ([], [])
        assert sorted(os.listdir(workspace / "rounds")) == ["00000", "00001", "00002"]  # no .tmp- is left
        assert stored_adapters(workspace) == stored_adapters(undisturbed)
        result = Federation(Workspace(workspace)).verify()
        assert (result.violations, result.num_updates, result.num_recomputed) == ([], 6, 2)
    assert points >= least


def stored(workspace: Path) -> dict[str, str]:
    """Return the hashes of all files of the rounds and of the updates."""
    return {
        f"{part}/{name}": found
        for part in ("rounds", "inbox")
        for name, found in stored_hashes(workspace / part).items()
    }


@pytest.fixture(scope="module")
def second_rounds(template: Path) -> dict[str, Path]:
    """Workspaces whose round 1 of 3 is open, by algorithm: servers and clients have a state to go on from."""
    workspaces = {}
    for algorithm in ("scaffold", "fedyogi"):
        folder = workspaces[algorithm] = Path(shutil.copytree(template, template.parent / algorithm))
        configure(folder, f"algorithm.name={algorithm}", "federation.rounds=3", "train.steps=3")
        shutil.rmtree(folder / "rounds")
        Federation(Workspace(folder)).server.open()
        (folder / "data").mkdir()
        for client in NUM_SAMPLES:
            row = '{"instruction": "q", "output": "a"}\n'  # the stub looks at none
            (folder / "data" / f"client-{client}.jsonl").write_text(row)
            train_as(client, folder)
        assert Federation.open(folder).server.aggregate().published
        train_as(1, folder)
        train_as(2, folder)
    return workspaces


def go_on(workspace: Path) -> None:
    """Let round 1 be merged, unless it was, and client 0 answer round 2, with the c_k of its update before."""
    if Federation.open(workspace).round().number == 1:
        assert Federation.open(workspace).server.aggregate().published
    train_as(0, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_scaffold_client_killed_at_any_system_call_goes_on_with_the_candidate_of_its_counted_update(
    second_rounds, tmp_path, after
):
    """The process that is killed trains to another end than the one behind it: its candidate must not be taken."""
    start = second_rounds["scaffold"]
    undisturbed = {}
    for goal in (0.0, 7.0):
        folder = Path(shutil.copytree(start, tmp_path / f"{goal}"))
        train_as(0, folder, goal)
        go_on(folder)
        assert Federation(Workspace(folder)).verify().violations == []
        undisturbed[goal] = stored(folder)
    points = {0.0: 0, 7.0: 0}
    strays = 0
    for workspace in copies_killed_at_every_call(start, partial(train_as, 0, goal=7.0), after):
        counts = 7.0 if (workspace / "inbox" / "0" / "round-00001").exists() else 0.0
        points[counts] += 1
        assert Federation(Workspace(workspace)).verify().violations == []
        train_as(0, workspace)
        candidates = workspace / "private" / "0" / "control"
        strays += len(list(candidates.glob("round-00001-*"))) - 1
        go_on(workspace)
        assert stored(workspace) == undisturbed[counts]
        # The one that was counted, and that of the open round; strays have gone.
        assert sorted(path.name[:11] for path in candidates.glob("round-*")) == ["round-00001", "round-00002"]
    assert points[0.0] >= 20
    assert points[7.0] >= 1
    assert strays >= 10  # kills between the candidate and the drop


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("algorithm", "state"), [("scaffold", "control.safetensors"), ("fedyogi", "optimizer.safetensors")]
)
def test_a_server_with_a_state_killed_at_any_system_call_loses_nothing_of_it(
    second_rounds, tmp_path, algorithm, state, after
):
    start = Path(shutil.copytree(second_rounds[algorithm], second_rounds[algorithm].parent / f"{algorithm}-{after}"))
    train_as(0, start)
    folder = Path(shutil.copytree(start, tmp_path / "undisturbed"))
    go_on(folder)
    assert Federation(Workspace(folder)).verify().violations == []
    undisturbed = stored(folder)
    assert [f"rounds/0000{number}/{state}" in undisturbed for number in range(3)] == [False, True, True]
    points = 0
    for workspace in copies_killed_at_every_call(
        start, lambda folder: Federation.open(folder).server.aggregate(), after
    ):
        points += 1
        assert Federation(Workspace(workspace)).verify().violations == []
        go_on(workspace)
        assert stored(workspace) == undisturbed
    assert points >= 50


def careless(final: Path, files) -> bool:
    """Publish as one must not: under the final name, piece by piece."""
    for name, contents in files:
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(final / name, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(descriptor, contents)
        os.close(descriptor)
    return True


@pytest.mark.slow
def test_the_harness_catches_a_server_that_writes_under_the_final_name(answered, monkeypatch):
    monkeypatch.setattr(publish, "publish_directory", careless)
    violated = [
        bool(Federation(Workspace(workspace)).verify().violations)
        for workspace in copies_killed_at_every_call(answered, merge_round_0, after=False)
    ]
    assert any(violated)
    assert not all(violated)  # the calls before the first write harm nobody


def slow_disk(seed: int) -> None:
    """Let each fsync of this process take up to 5 ms, as on a network's disk: it opens the windows for races."""
    generator, fsync = random.Random(seed), os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(generator.uniform(0, 0.005))
        fsync(descriptor)

    os.fsync = slow


def merge_until_it_is_done(workspace: Path) -> None:
    """Aggregate again and again, as servers that know nothing of each other would."""
    while Federation.open(workspace).round().number == 0:
        with suppress(BusyError, NotReadyError):  # not ready: between two lines another merged the round
            Federation.open(workspace).server.aggregate()


def merge_without_a_lock(workspace: Path) -> None:
    """Do the same where locks do nothing: a server may fail there (its temporary went), but never publish a part."""
    aggregation.hold = lambda path, purpose: nullcontext()
    while Federation.open(workspace).round().number == 0:
        with suppress(FedError):
            Federation.open(workspace).server.aggregate()


@pytest.mark.slow
@pytest.mark.parametrize("merge", [merge_until_it_is_done, merge_without_a_lock])
def test_of_servers_that_merge_at_once_one_publishes_and_kills_harm_nothing(answered, undisturbed, merge):
    kills = 0
    for seed in range(10):
        generator = random.Random(seed)
        workspace = answered.parent / "contested"
        shutil.rmtree(workspace, ignore_errors=True)
        shutil.copytree(answered, workspace)

        def serve(position: int | None, own_seed: int, workspace: Path = workspace) -> None:
            slow_disk(own_seed)
            if position is not None:
                arm(position, after=own_seed % 2 == 0)
            merge(workspace)

        # Every other server dies at a call drawn at random, unless the round is merged before it comes to that.
        positions = [generator.randint(1, 80) if number % 2 else None for number in range(8)]
        children = [fork(partial(serve, position, 8 * seed + n)) for n, position in enumerate(positions)]
        kills += sum([was_killed(child) for child in children])
        assert sorted(path.name for path in (workspace / "rounds").glob("0*")) == ["00000", "00001"]
        assert Federation(Workspace(workspace)).verify().violations == []
        assert read_manifest(workspace, 1)["aggregation"] == read_manifest(undisturbed, 1)["aggregation"]
        finish(workspace)
        assert sorted(os.listdir(workspace / "rounds")) == ["00000", "00001", "00002"]
        assert stored_adapters(workspace) == stored_adapters(undisturbed)
    assert kills >= 3


def test_a_server_whose_temporary_goes_while_it_writes_publishes_nothing(answered, undisturbed):
    """Two hosts on a file system whose locks hold on one host only: the renames alone must keep rounds whole."""
    workspace = Path(shutil.copytree(answered, answered.parent / "two-hosts"))
    final, rename = workspace / "rounds" / "00001", os.rename

    def stop_before_the_rename() -> None:
        def stopped(source, target, **options) -> None:
            if target == final:
                os.kill(os.getpid(), signal.SIGSTOP)
            rename(source, target, **options)

        os.rename = stopped
        with suppress(FedError):
            merge_without_a_lock(workspace)

    def die_while_removing() -> None:
        unlink = os.unlink

        def last(*arguments, **options) -> None:
            unlink(*arguments, **options)
            die()

        os.unlink = last
        merge_without_a_lock(workspace)

    first = fork(stop_before_the_rename)
    assert os.WIFSTOPPED(os.waitpid(first, os.WUNTRACED)[1])
    os.waitpid(fork(die_while_removing), 0)
    os.kill(first, signal.SIGCONT)
    while os.WIFSTOPPED(status := os.waitpid(first, os.WUNTRACED)[1]):  # it tries again
        os.kill(first, signal.SIGCONT)
    assert os.WIFEXITED(status)
    merge_round_0(workspace)
    assert Federation(Workspace(workspace)).verify().violations == []
    finish(workspace)
    assert stored_adapters(workspace) == stored_adapters(undisturbed)
