"""The protocol is the same in every store: in a directory, in memory, in objects, and on servers of objects and files.

Killed at each call that changes the store, a command that is run again ends where an undisturbed one does. The servers
are real ones of the loopback: moto's S3, azurite and sshd (support/servers.py); most of their tests are slow.
"""

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.memory_store import Killed, MemoryStore
from support.object_stores import SERVERS, DyingObjects, contents, fill, new_objects
from support.processes import ENVIRONMENT
from support.updates import PROTOCOL_PARTS, answer, protocol_files, update_of

from fedcli import Federation
from fedcli.config import apply_overrides, read_document
from fedcli.errors import IntegrityError, NotReadyError, WorkspaceError
from fedcli.workspace.baselines import BaselineRecord, publish_baseline, read_baseline
from fedcli.workspace.federation_state import config_text
from fedcli.workspace.history import Round, read_round
from fedcli.workspace.idle import glance
from fedcli.workspace.inbox import drop_update, read_update
from fedcli.workspace.layout import ADAPTER_FILE, ADAPTER_NAME, MANIFEST, Workspace
from fedcli.workspace.object_store import ObjectStore
from fedcli.workspace.records import file_entry
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.registrations import DataCard, Registration, joined_clients, read_registration, register
from fedcli.workspace.scores import publish_table
from fedcli.workspace.slurm_jobs import Job, read_jobs, save_jobs
from fedcli.workspace.split_store import SplitStore
from fedcli.workspace.store import DirectoryStore, Store
from fedcli.workspace.tensors import encode

SLOW_SERVERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in SERVERS]


def in_store(folder: Path, store: Store) -> Workspace:
    """Return a workspace of which the folder holds locks and rows, and the store all else that is the protocol's."""
    is_split = isinstance(store, ObjectStore)
    return Workspace(folder, SplitStore(DirectoryStore(folder), store) if is_split else store)


def taken(small: Path) -> dict[str, bytes]:
    """Take what is the protocol's out of the folder: nothing of it may be looked for there."""
    files = protocol_files(small)
    for name in PROTOCOL_PARTS:
        path = small / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return files


def emptied(small: Path, kind: str, patch: pytest.MonkeyPatch) -> Workspace:
    """Move what is the protocol's into a store of a kind."""
    files = taken(small)
    if kind == "memory":
        return in_store(small, MemoryStore(files))
    return in_store(small, ObjectStore(fill(new_objects(kind, patch), files)))


@pytest.fixture(params=["directory", "memory", "objects", *SLOW_SERVERS])
def place(request: pytest.FixtureRequest, small: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The small workspace with round 0 open."""
    return Workspace(small) if request.param == "directory" else emptied(small, request.param, monkeypatch)


def merge_round(workspace: Workspace, number: int) -> None:
    """Merge a round unless that is done."""
    if Federation(workspace).round().number == number:
        Federation(workspace).server.aggregate()


def test_a_federation_runs_to_its_end_and_verifies(place):
    for number in (0, 1):
        with pytest.raises(NotReadyError):
            Federation(place).server.aggregate()
        for client in range(3):
            assert glance(place).may_train
            assert not place.has_update(number, client)
            answer(place, client)
        assert not glance(place).may_train
        assert Federation(place).status().missing == []
        assert Federation(place).server.aggregate().published
    result = Federation(place).verify()
    assert (result.violations, result.num_rounds, result.num_updates) == ([], 3, 6)
    assert glance(place).is_finished
    assert Federation(place).round().published > 0


@pytest.mark.parametrize("kind", ["memory", "objects", *SLOW_SERVERS])
def test_both_stores_end_with_the_same_bytes(small, kind, tmp_path, monkeypatch):
    stored = []
    for folder in (small, Path(shutil.copytree(small, tmp_path / "other"))):
        workspace = Workspace(folder) if folder is small else emptied(folder, kind, monkeypatch)
        for client in range(3):
            answer(workspace, client)
        Federation(workspace).server.aggregate()
        store = workspace.store
        stored.append({name: store.read(name, 2**30) for top in ("rounds", "inbox") for name in below(workspace, top)})
    assert stored[0] == stored[1]
    assert len(stored[0]) == 2 * 3 + 3 * 2


def below(workspace: Workspace, top: str) -> list[str]:
    return sorted(f"{top}/{path}" for path in workspace.store.files(top))


def test_of_two_updates_and_two_rounds_the_first_stands(place):
    head = Federation(place).round()
    assert drop_update(head, 0, update_of(head, 0))
    before = place.store.read("inbox/0/round-00000/update.json", 2**16)
    assert not drop_update(head, 0, update_of(head, 0, num_samples=77))
    assert place.store.read("inbox/0/round-00000/update.json", 2**16) == before
    assert not place.store.publish("rounds/00000", [], (MANIFEST, b"another"))
    assert Federation(place).round().sha256 == head.sha256
    assert place.store.names("rounds") == ["00000"]


def test_a_name_is_written_once_by_put_new_and_replaced_by_put(place):
    store = place.store
    assert store.put_new("clients/0.json", b"first")
    assert not store.put_new("clients/0.json", b"second")
    assert store.read("clients/0.json", 5) == b"first"
    assert store.names("clients") == ["0.json"]
    store.put("clients/0.json", b"third")
    assert store.read("clients/0.json", 5) == b"third"
    with pytest.raises(Refusal):
        store.read("clients/0.json", 4)
    assert (store.files("clients"), store.files("clients/0.json")) == ({"0.json": 5}, {".": 5})
    store.delete("clients/0.json")
    store.delete("clients/0.json")
    assert not store.exists("clients/0.json")
    with pytest.raises(FileNotFoundError):
        store.read("clients/0.json", 4)
    assert (store.names("nowhere"), store.files("nowhere"), store.set_aside("nowhere")) == ([], {}, False)


def nan(base: Round) -> bytes:
    return encode({name: np.full_like(array, np.nan) for name, array in base.adapter().items()})


HOSTILE: dict[str, Callable[[Round], dict[str, object]]] = {
    "hash": lambda base: {"adapter": bytes(file_entry(dict(update_of(base, 0))[ADAPTER_FILE]).bytes)},
    "size": lambda base: {"adapter": b"short"},
    "nonfinite": lambda base: {"adapter": nan(base), "files": {ADAPTER_FILE: file_entry(nan(base)).model_dump()}},
    "header": lambda base: {"adapter": b"x" * 9, "files": {ADAPTER_FILE: file_entry(b"x" * 9).model_dump()}},
    "json": lambda base: {"text": b"{"},
    "duplicate": lambda base: {"text": b'{"round": 0, "round": 0}'},
    "samples": lambda base: {"num_samples": 0},
    "protocol": lambda base: {"protocol": 2},
    "workspace": lambda base: {"workspace": "another"},
    "wrong_round": lambda base: {"round": 1},
    "wrong_base": lambda base: {"base": "0" * 64},
    "wrong_client": lambda base: {"client": 1},
}


@pytest.mark.parametrize("code", HOSTILE)
def test_hostile_bytes_are_refused_with_the_same_code(place, code):
    head = Federation(place).round()
    drop_update(head, 0, update_of(head, 0, **HOSTILE[code](head)))
    with pytest.raises(Refusal) as refusal:
        read_update(head, 0)
    assert refusal.value.code == code
    for client in (1, 2):
        answer(place, client)
    aggregation = Federation(place).server.aggregate(refuse_arriving=True).aggregation
    assert [(entry.client, entry.code) for entry in aggregation.refused] == [(0, code)]
    assert Federation(place).verify().violations == []


def test_an_update_without_its_record_or_its_adapter_is_refused_and_none_is_none(place):
    head = Federation(place).round()
    assert read_update(head, 0) is None
    place.store.put(f"inbox/0/round-00000/{ADAPTER_FILE}", b"x")
    with pytest.raises(Refusal, match=r"update\.json is missing"):
        read_update(head, 0)
    drop_update(head, 1, update_of(head, 1)[1:])
    with pytest.raises(Refusal, match=f"{ADAPTER_FILE} is missing"):
        read_update(head, 1)


def test_a_discarded_update_is_set_aside_and_its_client_may_send_another(place):
    assert not Federation(place).server.discard(0)
    answer(place, 0)
    assert Federation(place).server.discard(0)
    assert not place.has_update(0, 0)
    (hidden,) = place.store.names("inbox/0")
    assert re.fullmatch(r"\.discarded-round-00000-[0-9a-f]{8}", hidden)
    answer(place, 0)
    assert place.has_update(0, 0)


def test_damage_is_found(place):
    for client in range(3):
        answer(place, client)
    Federation(place).server.aggregate()
    name = f"rounds/00001/{ADAPTER_NAME}"
    whole = place.store.read(name, 2**30)
    place.store.delete(name)
    place.store.put(name, whole[:-1] + bytes([whole[-1] ^ 1]))
    place.store.put("rounds/00001/extra", b"")
    place.store.put("rounds/other/manifest.json", b"")
    place.store.delete(f"inbox/2/round-00000/{ADAPTER_FILE}")
    verification = Federation(place).verify()
    found = "\n".join(map(str, verification.violations))
    for words in ("the hash differs", "not listed in the manifest", "is no round"):
        assert words in found
    assert "files of it are gone" in "\n".join(map(str, verification.remarks))
    with pytest.raises(IntegrityError):
        read_round(place, 1).adapter()


def old_rounds(workspace: Workspace) -> None:
    """Have two closed rounds behind the latest, of which the first and the last must stay."""
    document = read_document(config_text(workspace), workspace.config)
    apply_overrides(document, ["federation.rounds=3", "retention.keep_last=1"])
    workspace.store.put("fedcli.yaml", yaml.safe_dump(document).encode())
    for _ in range(3):
        for client in range(3):
            answer(workspace, client)
        Federation(workspace).server.aggregate()


def test_what_is_pruned_is_gone_and_verifies(place):
    old_rounds(place)
    looked = Federation(place).gc(dry_run=True)
    done = Federation(place).gc()
    assert (done.num_files, done.num_bytes, done.rounds) == (looked.num_files, looked.num_bytes, [1, 2])
    assert done.num_files == 2 * (1 + 3)
    assert read_round(place, 1).pruned() is not None
    with pytest.raises(WorkspaceError, match="removed by `fedcli gc`"):
        read_round(place, 1).adapter()
    assert below(place, "inbox/0/round-00001") == ["inbox/0/round-00001/update.json"]
    result = Federation(place).verify()
    assert (result.violations, result.num_pruned) == ([], 2)
    assert Federation(place).gc().num_files == 0


def joined(workspace: Workspace, client: int) -> None:
    """Let a party join."""
    head = Federation(workspace).round()
    card = DataCard(num_rows=3)
    register(workspace, Registration(workspace=head.manifest.workspace, client=client, data=card))


def test_parties_join_and_their_updates_count(place):
    joined(place, 2)
    joined(place, 2)
    assert ([*joined_clients(place, 3)], read_registration(place, 2).data.num_rows) == ([2], 3)
    assert read_registration(place, 1) is None
    answer(place, 2)
    assert read_update(Federation(place).round(), 2).record.client == 2
    place.store.put("clients/1.json", b"{}")
    with pytest.raises(IntegrityError) as damaged:
        read_registration(place, 1)
    assert damaged.value.exit_code == 7


def a_baseline(workspace: Workspace) -> BaselineRecord:
    """Return what a baseline says of itself."""
    start = Federation(workspace).round()
    return BaselineRecord(name="pooled", start=start.sha256, train=start.manifest.train, last_loss=1.0, files={})


def test_jobs_and_baselines_are_kept(place):
    assert read_jobs(place, 0) == []
    save_jobs(place, 0, [Job(id=7, kind="server")])
    save_jobs(place, 0, [Job(id=8, kind="server")])
    assert [job.id for job in read_jobs(place, 0)] == [8]
    start = Federation(place).round()
    publish_baseline(place, a_baseline(place), {ADAPTER_NAME: encode(start.adapter())})
    assert read_baseline(place, "pooled", start.manifest.tensors).keys() == start.adapter().keys()
    assert Federation(place).verify().num_baselines == 1
    assert place.store.set_aside("baselines/pooled")
    assert read_baseline(place, "pooled", start.manifest.tensors) is None


# --- killed at every change


def opened(workspace: Workspace) -> None:
    Federation(workspace).server.open()


def answered(workspace: Workspace) -> None:
    for client in range(3):
        answer(workspace, client)


def merged(workspace: Workspace) -> None:
    merge_round(workspace, 0)


def set_aside(workspace: Workspace) -> None:
    Federation(workspace).server.discard(0)


def pruned(workspace: Workspace) -> None:
    Federation(workspace).gc()


STEPS: dict[str, tuple[list[Callable[[Workspace], None]], Callable[[Workspace], None]]] = {
    "open": ([], opened),
    "drop": ([opened], answered),
    "aggregate": ([opened, answered], merged),
    "discard": ([opened, answered], set_aside),
    "prune": ([opened, old_rounds], pruned),
    "join": ([opened], partial(joined, client=1)),
}


def settled(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return what a store holds, without what differs between two undisturbed runs: the names of what is set aside.

    Of objects also without attempts that no record names: they are nothing, and are swept after a day.
    """
    attempts = {name: re.fullmatch(r"(inbox/\d+/round-\d+/)\.[0-9a-f]{16}/.+", name) for name in files}
    files = {
        name: text for name, text in files.items() if not (found := attempts[name]) or f"{found[1]}update.json" in files
    }
    return {re.sub(r"(\.discarded-round-\d+)-[0-9a-f]{8}", r"\1", name): text for name, text in files.items()}


def stored(workspace: Workspace) -> dict[str, bytes]:
    """Return all that a store holds, by the names that it has there."""
    store = workspace.store
    if isinstance(store, SplitStore):
        assert isinstance(store.remote, ObjectStore)
        return contents(store.remote.objects)
    assert isinstance(store, MemoryStore)
    return dict(store.contents)


def workspaces_that_die(kind: str, folder: Path, before: dict[str, bytes], after: bool, patch) -> Iterator[Workspace]:
    """Yield workspaces whose stores die at their 1st, 2nd, ... change, for ever; on servers at fewer of many."""
    position, stride = 1, 4 if kind in SERVERS and len(before) > 20 else 1
    while True:
        if kind == "memory":
            yield in_store(folder, MemoryStore(before, dies_at=position, dies_after=after))
        else:
            objects = fill(new_objects(kind, patch), before)
            yield in_store(folder, ObjectStore(DyingObjects(objects, dies_at=position, dies_after=after)))
        position += stride


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=pytest.mark.slow) if step == "prune" else step for step in STEPS]
)
@pytest.mark.parametrize("kind", ["memory", "objects", *SLOW_SERVERS])
def test_killed_at_any_change_and_run_again_it_ends_as_if_undisturbed(small, kind, step, after, monkeypatch):
    undisturbed = emptied(small, kind, monkeypatch)
    for name in undisturbed.store.files("rounds"):
        undisturbed.store.delete(f"rounds/{name}")
    preparation, command = STEPS[step]
    for prepare in preparation:
        prepare(undisturbed)
    before = stored(undisturbed)
    command(undisturbed)
    end = settled(stored(undisturbed))
    assert end != before
    deaths = 0
    for workspace in workspaces_that_die(kind, small, before, after, monkeypatch):
        try:
            command(workspace)
            break
        except Killed:
            deaths += 1
        if step != "open":
            assert Federation(workspace).verify().violations == []
        command(workspace)
        assert settled(stored(workspace)) == end
    assert deaths >= 1


# --- what killed processes left


def left_behind(folder: Path, hours: float) -> tuple[Path, Path]:
    """Leave a file and a folder half-written, as a process does that was killed so many hours ago."""
    file, inner = (folder / f".tmp-{uuid.uuid4().hex}" for _ in range(2))
    inner.mkdir(parents=True)
    (inner / "model.safetensors").write_bytes(b"half")
    file.write_bytes(b"half")
    then = time.time() - hours * 3600
    for path in (file, inner):
        os.utime(path, (then, then))
    return file, inner


WRITERS: dict[str, tuple[str, Callable[[Workspace], object]]] = {
    "slurm": ("slurm/round-00000", lambda workspace: save_jobs(workspace, 0, [])),
    "join": ("clients", lambda workspace: joined(workspace, 1)),
    "baseline": (
        "baselines",
        lambda workspace: publish_baseline(workspace, a_baseline(workspace), {ADAPTER_NAME: b"x"}),
    ),
    "export": ("..", lambda workspace: Federation(workspace).export(workspace.root.parent / "out")),
    "eval table": ("eval", lambda workspace: publish_table(workspace, {"table.md": "x"})),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_process_left_a_day_ago_goes_when_another_writes_there(small, writer):
    name, write = WRITERS[writer]
    old, new, own = left_behind(small / name, 25), left_behind(small / name, 1), small / name / ".tmp-of-another"
    own.write_bytes(b"")
    os.utime(own, (0, 0))
    write(Workspace(small))
    assert [path.exists() for path in (*old, *new, own)] == [False, False, True, True, True]


def test_gc_removes_what_killed_processes_left_anywhere(small):
    left = [
        left_behind(small / name, 25) for name in ("eval/base", "private/0", "slurm/round-00000", "data", "inbox/1", "")
    ]
    at_work = left_behind(small / "eval/base", 23)
    workspace = Workspace(small)
    old_rounds(workspace)
    Federation(workspace).gc(dry_run=True)
    assert left[0][0].exists()
    Federation(workspace).gc()
    assert not any(path.exists() for paths in left for path in paths)
    assert all(path.exists() for path in at_work)


ON_AN_OVERLAY = """
set -e
mount -t tmpfs none "$1"
cd "$1"
mkdir lower upper work merged
mkdir -p lower/inbox/0/round-00000
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged || exit 77
"$2" -c 'from pathlib import Path
from fedcli.workspace.store import DirectoryStore
try:
    DirectoryStore(Path("merged")).set_aside("inbox/0/round-00000")
except Exception as error:
    print(error.hint)
    raise'
"""


def test_what_lies_in_a_lower_layer_of_an_overlay_cannot_be_set_aside_and_it_says_so(tmp_path):
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", ON_AN_OVERLAY, "sh", tmp_path, sys.executable],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    if "Traceback" not in done.stderr:
        pytest.skip("no overlay can be mounted here")
    assert "cannot write merged/inbox/0/round-00000: Invalid cross-device link" in done.stderr
    assert "use a copy of the workspace" in done.stdout
