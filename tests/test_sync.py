"""`fedcli sync`: one place gets what it lacks of another, whole or not at all, and keeps what it has."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from support import secure, servers
from support.federation import all_take_part, configure
from support.kills import copies_killed_at_every_call
from support.memory_store import Killed, MemoryStore
from support.processes import Run, runner
from support.signed import at, identity_of, join, train, tree

from fedcli import Federation, Observer
from fedcli.errors import ConfigError, NotReadyError, UsageError, WorkspaceError
from fedcli.operations.sync import sync
from fedcli.workspace.address import workspace_at
from fedcli.workspace.enrolment import entry_bytes, read_enrolment
from fedcli.workspace.layout import Workspace, default_home
from fedcli.workspace.registrations import is_own

slow = pytest.mark.slow
NOBODY = Observer()


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's own files lie."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def played(small: Path, homes: Path) -> Path:
    """A simulation with a merged round and an open one."""
    all_take_part(small)
    Federation.open(small).server.aggregate()
    return small


def carry(source: Path | Workspace, target: Path | Workspace, **options: object):
    places = [place if isinstance(place, Workspace) else Workspace(place) for place in (source, target)]
    return sync(*places, observer=NOBODY, **options)


def protocol(folder: Path) -> dict[str, bytes]:
    """Return what of a workspace travels."""
    kept = ("private", "data", "README.md", "cron", "slurm")
    return {name: contents for name, contents in tree(folder).items() if not name.startswith(kept)}


def test_an_empty_place_becomes_a_copy_and_a_second_call_changes_nothing(played: Path, tmp_path: Path) -> None:
    first = carry(played, tmp_path / "copy")
    assert first.is_first
    assert first.carried == {"rounds": 2, "updates": 3, "fedcli.yaml": 1, "workspace.json": 1}
    assert protocol(tmp_path / "copy") == protocol(played)
    assert not (tmp_path / "copy/data").exists()
    assert not (tmp_path / "copy/private").exists()
    before = tree(tmp_path / "copy")
    again = carry(played, tmp_path / "copy")
    assert (again.carried, again.arriving, again.differing, again.changed) == ({}, {}, {}, {})
    assert tree(tmp_path / "copy") == before
    assert Federation.open(tmp_path / "copy").verify().violations == []


def test_a_store_without_files_gives_and_takes_the_same(played: Path, tmp_path: Path) -> None:
    memory = Workspace(tmp_path / "nowhere", MemoryStore(), "memory")
    carry(played, memory)
    carry(memory, tmp_path / "copy")
    assert protocol(tmp_path / "copy") == protocol(played)


def test_another_workspace_and_a_full_folder_are_refused(played: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(played, tmp_path / "other"))
    document = json.loads((other / "workspace.json").read_bytes())
    (other / "workspace.json").write_text(json.dumps(document | {"id": "other"}))
    with pytest.raises(WorkspaceError, match="is another workspace: other, not"):
        carry(played, other)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/letter.txt").write_text("dear")
    with pytest.raises(WorkspaceError, match=r"neither empty nor a copy of this workspace: letter\.txt"):
        carry(played, tmp_path / "documents")
    with pytest.raises(WorkspaceError, match="is no workspace"):
        carry(tmp_path / "documents", tmp_path / "copy")
    with pytest.raises(UsageError, match="is both places"):
        carry(played, played)


def test_what_is_not_whole_is_left_out_and_named_and_comes_later(played: Path, tmp_path: Path) -> None:
    adapter = played / "rounds/00001/adapter/adapter_model.safetensors"
    update = played / "inbox/1/round-00000/adapter_model.safetensors"
    whole = {path: path.read_bytes() for path in (adapter, update)}
    adapter.write_bytes(whole[adapter][:100])
    update.unlink()
    found = carry(played, tmp_path / "copy")
    assert found.arriving == {
        "rounds/00001": f"adapter/adapter_model.safetensors has 100 of {len(whole[adapter]):,} bytes",
        "inbox/1/round-00000": "adapter_model.safetensors is missing",
    }
    adapter.write_bytes(whole[adapter][:-1] + b"x")
    assert "does not have the hash" in carry(played, tmp_path / "copy").arriving["rounds/00001"]
    assert not (tmp_path / "copy/rounds/00001").exists()
    for path, contents in whole.items():
        path.write_bytes(contents)
    assert carry(played, tmp_path / "copy").carried == {"rounds": 1, "updates": 1}
    assert protocol(tmp_path / "copy") == protocol(played)


def test_files_that_a_copy_has_lost_are_named_and_a_pruned_one_has_lost_none(
    played: Path, tmp_path: Path, run: Run
) -> None:
    copy = tmp_path / "copy"
    carry(played, copy)
    (copy / "rounds/00001/adapter/adapter_model.safetensors").unlink()
    code, out, _ = run("sync", played, copy)
    assert code == 7
    assert "adapter/adapter_model.safetensors of its files is missing or cut short there" in out
    shutil.rmtree(copy / "rounds/00001")
    assert run("sync", played, copy)[0] == 0
    assert protocol(copy) == protocol(played)


def test_what_differs_is_named_and_left_and_no_round_follows_a_fork(played: Path, tmp_path: Path, run: Run) -> None:
    copy = tmp_path / "copy"
    carry(played, copy)
    for folder in (played, copy):  # both go on by themselves
        all_take_part(folder)
    update = copy / "inbox/0/round-00001/update.json"
    update.write_text(update.read_text().replace('"steps": 1', '"steps": 2'))
    for folder in (played, copy):
        Federation.open(folder).server.aggregate()
    before = tree(copy)
    code, out, err = run("sync", played, copy)
    assert code == 7
    assert "2 things differ that never change" in err
    assert "differs: rounds/00002/manifest.json and 1 more: another is there" in out
    assert tree(copy) == before


def test_both_ways_at_once_give_both_places_all(played: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    carry(played, copy)
    all_take_part(copy)
    shutil.copytree(copy / "inbox/0/round-00001", played / "inbox/0/round-00001")
    calls = [threading.Thread(target=carry, args=pair) for pair in ((played, copy), (copy, played)) * 3]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert protocol(played) == protocol(copy)
    assert len([name for name in tree(played) if name.endswith("round-00001/update.json")]) == 3


@slow
def test_weights_that_gc_removed_are_neither_put_back_nor_removed_elsewhere(played: Path, tmp_path: Path) -> None:
    all_take_part(played)
    Federation.open(played).server.aggregate()
    copy = tmp_path / "copy"
    carry(played, copy)
    configure(played, "retention.keep_last=1")
    assert Federation.open(played).gc().rounds == [1]
    before = (tree(played), tree(copy))
    there = carry(played, copy)
    back = carry(copy, played)
    for found in (there, back):
        assert list(found.left) == ["rounds/00001"]
        assert "its weights are not in" in found.left["rounds/00001"]
        assert found.arriving == {}
    assert {**before[1], "fedcli.yaml": (played / "fedcli.yaml").read_bytes()} == tree(copy)
    assert before[0] == tree(played)
    carry(played, tmp_path / "late")
    assert Federation.open(tmp_path / "late").verify().violations == []
    assert not (tmp_path / "late/rounds/00001/adapter/adapter_model.safetensors").exists()


def test_a_file_that_may_change_goes_from_where_it_changed(played: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    carry(played, copy)
    configure(played, "train.steps=3")
    assert carry(copy, played).changed == {}
    assert carry(played, copy).carried == {"fedcli.yaml": 1}
    configure(copy, "train.steps=4")
    assert carry(played, copy).carried == {}
    assert carry(copy, played).carried == {"fedcli.yaml": 1}
    configure(played, "train.steps=5")
    configure(copy, "train.steps=6")
    assert list(carry(played, copy).changed) == ["fedcli.yaml"]
    assert carry(played, copy, replace=True).carried == {"fedcli.yaml": 1}
    assert "steps: 5" in (copy / "fedcli.yaml").read_text()


def test_conflict_copies_and_half_written_files_of_tools_stay_where_they_are(played: Path, tmp_path: Path) -> None:
    for name in (
        "clients/0 (1).json",
        "inbox/0/round-00000 (conflicted copy)",
        "rounds/.00001.sync",
        "inbox/Thumbs.db",
    ):
        path = played / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (played / "inbox/0/round-00000/.update.json.Ab12Cd").write_text("{")
    (played / "rounds/00001/manifest.sync-conflict-20261130-101010-ABCDEFG.json").write_text("{}")
    found = carry(played, tmp_path / "copy")
    assert found.ignored == ["inbox/Thumbs.db", "clients/0 (1).json", "inbox/0/round-00000 (conflicted copy)"]
    assert not [name for name in tree(tmp_path / "copy") if "conflict" in name or "Ab12" in name or "(1)" in name]


def hostile(update: Path, **files: object) -> None:
    record = json.loads((update / "update.json").read_bytes())
    record["files"].update(files)
    (update / "update.json").write_text(json.dumps(record))


def test_a_hostile_update_leads_nowhere(played: Path, tmp_path: Path) -> None:
    entry = {"sha256": "0" * 64, "bytes": 2**50}
    hostile(played / "inbox/0/round-00000", **{"../../../stolen": entry})
    hostile(played / "inbox/1/round-00000", **{"adapter_model.safetensors": entry})
    shutil.move(played / "inbox/2/round-00000", tmp_path / "elsewhere")
    (played / "inbox/2/round-00000").symlink_to(tmp_path / "elsewhere")
    found = carry(played, tmp_path / "copy")
    assert found.carried["updates"] == 1  # the name that leads out is of no file that an update has
    assert sorted(found.arriving) == ["inbox/1/round-00000", "inbox/2/round-00000"]
    assert {name for name in tree(tmp_path) if "stolen" in name} == set()


@pytest.fixture
def signed(signed_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed_template, tmp_path / "sites"))


def enrolled(signed: Path) -> None:
    """Let party 0 join from a copy of its own, and be enrolled."""
    server, own = signed / "server/W", signed / "0/W"
    with at(signed / "0/home"):
        carry(server, own)
        first = join(own, 0)
        carry(own, server)
    with at(signed / "server/home"):
        Federation.open(server).server.enrol(0, first)


@slow
def test_parties_that_see_only_their_own_copy_train_with_a_server_that_sees_only_its_own(signed: Path) -> None:
    server, shared = signed / "server/W", signed / "shared"
    with at(signed / "server/home"):
        carry(server, shared)
        told = Federation.open(server).keys().server.fingerprint
    prints = {}
    for client in range(3):
        with at(signed / f"{client}/home"):
            carry(shared, signed / f"{client}/W", client=client)
            prints[client] = join(signed / f"{client}/W", client, server=told)
            carry(signed / f"{client}/W", shared, client=client)
    with at(signed / "server/home"):
        assert carry(shared, server).carried == {"registrations": 3}
        for client in range(3):
            Federation.open(server).server.enrol(client, prints[client])
        carry(server, shared)
    for number in range(2):
        for client in range(3):
            own = signed / f"{client}/W"
            with at(signed / f"{client}/home"):
                carry(shared, own, client=client)
                assert train(own, client).round == number
                sent = carry(own, shared, client=client)
                assert sent.carried == {"updates": 1, "acknowledgements": 1}
        with at(signed / "server/home"):
            carry(shared, server)
            assert len(Federation.open(server).server.aggregate().aggregation.counted) == 3
            carry(server, shared)
    with at(signed / "server/home"):
        assert Federation.open(server).verify().violations == []
        assert Federation.open(shared).verify().violations == []
    assert not any("private" in name or name.endswith(".pem") for name in tree(shared))


def test_new_keys_that_the_old_ones_signed_are_newer_without_any_memory(signed: Path, tmp_path: Path) -> None:
    server, own = signed / "server/W", signed / "0/W"
    enrolled(signed)
    with at(signed / "0/home"):
        carry(server, own)
        Federation.open(own).client(0).rotate_keys()
    with at(tmp_path / "another user"):
        assert carry(server, own).changed == {}
        assert carry(own, server).carried == {"registrations": 1}
    assert (server / "clients/0.json").read_bytes() == (own / "clients/0.json").read_bytes()
    assert (server / "clients/0.sig").read_bytes() == (own / "clients/0.sig").read_bytes()


def test_rounds_and_entries_that_the_server_did_not_sign_are_not_carried(signed: Path) -> None:
    server, shared = signed / "server/W", signed / "shared"
    with at(signed / "server/home"):
        carry(server, shared)
    with at(signed / "0/home"):
        carry(shared, signed / "0/W")
        join(signed / "0/W", 0)
    first = read_enrolment(Workspace(shared)).entries[0]
    forged = first.entry.model_copy(update={"number": 1, "parent": first.sha256})
    (shared / "enrolment/00001.json").write_bytes(entry_bytes(forged))
    (shared / "enrolment/00001.sig").write_bytes((shared / "enrolment/00000.sig").read_bytes())
    with at(signed / "server/home"):
        found = carry(shared, server)
    assert "00001.json: is not signed by the server" in found.arriving["enrolment"]
    assert not (server / "enrolment/00001.json").exists()


def test_planted_records_of_a_masked_round_do_not_take_the_real_ones_place(
    small_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").mkdir()
    server = secure.used(secure.make(small_template, tmp_path / "made", "double", 4), tmp_path, monkeypatch)
    shared = tmp_path / "shared"
    for step in ("attempts", "repair"):
        carry(server, shared)
        with pytest.raises(NotReadyError):
            secure.merge(server, partial=step == "repair")
        (shared / step).mkdir(exist_ok=True)
        name = f"{step}/round-00000-0"
        shutil.copy(server / f"{name}.json", shared / f"{name}.json")
        (shared / f"{name}.sig").write_text("0" * 128 + "\n")
        planted = carry(shared, tmp_path / step)
        assert "is not signed by the server" in planted.arriving[f"{name}.json"]
        assert not (tmp_path / f"{name}.json").exists()
        shutil.rmtree(shared / step)
        carry(server, shared)
        assert carry(shared, tmp_path / step).carried == {step: 1} | ({} if step == "attempts" else {"shares": 1})
        secure.visit(server, *range(3))
    answer = server / "inbox/1/repair-00000-0"
    genuine = (answer / "answer.sig").read_bytes()
    (answer / "answer.sig").write_bytes((server / "inbox/2/repair-00000-0/answer.sig").read_bytes())
    found = carry(server, shared)
    assert found.carried == {"answers": 2}
    assert "answer.sig is not client 1's" in found.arriving["inbox/1/repair-00000-0"]
    (answer / "answer.sig").write_bytes(genuine)
    assert carry(server, shared).carried == {"answers": 1}


def test_an_update_under_revoked_keys_does_not_take_the_place_of_its_client(signed: Path) -> None:
    server, own, shared = signed / "server/W", signed / "0/W", signed / "shared"
    enrolled(signed)
    with at(signed / "0/home"):
        carry(server, own)
        train(own, 0)
        carry(own, shared)
    with at(signed / "server/home"):
        Federation.open(server).server.revoke(0)
        for place in (own, shared):  # which show the enrolment as it was before
            found = carry(place, server)
            assert found.left == {"inbox/0/round-00000": "client 0 was revoked: it counts no more"}
    assert not (server / "inbox/0/round-00000").exists()


def test_what_a_damaged_home_knows_of_the_server_is_not_left_out(signed: Path) -> None:
    with at(signed / "0/home"):
        carry(signed / "server/W", signed / "0/W")
        join(signed / "0/W", 0)
        home = default_home(identity_of(signed / "0/W"), 0)
        home.party.write_text("{")
        with pytest.raises(ConfigError, match="is damaged"):
            carry(signed / "server/W", signed / "0/W")


@pytest.mark.parametrize("dies_after", [False, pytest.param(True, marks=slow)])
def test_killed_at_any_change_of_the_other_place_it_is_run_again(
    played: Path, tmp_path: Path, dies_after: bool
) -> None:
    whole = MemoryStore()
    carry(played, Workspace(tmp_path / "whole", whole, "whole"))
    kills = 0
    while True:
        store = MemoryStore(dies_at=kills + 1, dies_after=dies_after)
        place = Workspace(tmp_path / "dying", store, "dying")
        try:
            carry(played, place)
        except Killed:
            kills += 1
            carry(played, place)
            found = {name: contents for name, contents in store.contents.items() if "/.tmp-" not in name}
            assert found == whole.contents
        else:
            break
    assert kills == 19


@slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_system_call_it_is_run_again(played: Path, tmp_path: Path, after: bool) -> None:
    whole = tmp_path / "whole"
    carry(played, whole)
    (tmp_path / "start").mkdir()
    seen = 0
    for copy in copies_killed_at_every_call(tmp_path / "start", lambda place: carry(played, place), after, 4):
        carry(played, copy)
        found = {name: contents for name, contents in tree(copy).items() if "/.tmp-" not in f"/{name}"}
        assert found == tree(whole)
        seen += 1
    assert seen > 12


def test_an_update_that_was_set_aside_does_not_come_back(played: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    all_take_part(played)
    carry(played, copy)
    Federation.open(copy).server.discard(1)
    found = carry(played, copy)
    assert f"fedcli server discard --id 1 -w {played}" in found.left["inbox/1/round-00001"]
    assert not (copy / "inbox/1/round-00001").exists()
    Federation.open(played).server.discard(1)
    all_take_part(played)
    shutil.rmtree(played / "inbox/1/round-00001")
    assert carry(played, copy).left == {}


def test_a_copy_of_what_another_user_made_is_not_its_own(played: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    carry(played, mine)
    assert is_own(Workspace(mine))
    if os.geteuid() == 0:
        os.chown(played / "fedcli.yaml", 12_345, -1)
        carry(played, tmp_path / "copy")
        assert not is_own(Workspace(tmp_path / "copy"))
        configure(played, "train.steps=7")
        assert list(carry(played, mine).changed) == ["fedcli.yaml"]
        assert carry(played, mine, replace=True).carried == {"fedcli.yaml": 1}


@slow
@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_a_store_elsewhere_gives_and_takes_the_same(
    played: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if kind == "s3":
        server = servers.s3_server()
        address = f"s3://{servers.new_bucket(server.url)}/study"
    else:
        server = servers.sftp_server()
        address = f"{server.url}{servers.new_sftp_folder()}/study"
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    elsewhere = workspace_at(address)
    assert carry(played, elsewhere).is_first
    assert carry(played, elsewhere).carried == {}
    carry(elsewhere, tmp_path / "copy", client=1)
    all_take_part(tmp_path / "copy")
    assert carry(tmp_path / "copy", elsewhere, client=1).carried == {"updates": 1}
    assert carry(elsewhere, played).carried == {"updates": 1}
    assert carry(elsewhere, tmp_path / "all").is_first
    assert protocol(tmp_path / "all") == protocol(played)
