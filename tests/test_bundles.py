"""`fedcli bundle`: a party that never sees the workspace joins, trains and leaves by files that somebody carries."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import secure
from support.federation import all_take_part, read_adapter
from support.processes import Run, results, runner
from support.signed import at, join, make_signed, train, tree

from fedcli import Federation, Observer
from fedcli.errors import IntegrityError, NotReadyError, UsageError, WorkspaceError
from fedcli.operations.sync import sync
from fedcli.trust.chain import steps_back
from fedcli.workspace.bundle_file import opened_bundle
from fedcli.workspace.history import read_start
from fedcli.workspace.layout import Workspace
from fedcli.workspace.records import EnrolmentHead

slow = pytest.mark.slow


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


@pytest.fixture
def sites(signed_template: Path, tmp_path: Path) -> Path:
    """Sites that nothing but files connects: server/W, and a home for each."""
    return Path(shutil.copytree(signed_template, tmp_path / "sites"))


def taken_in(bundle: Path, place: Path, **options: object):
    return Federation(Workspace(place)).import_bundle(bundle, **options)


def bundle_round(sites: Path) -> Path:
    """Let the server write the latest round's bundle."""
    with at(sites / "server/home"):
        Federation.open(sites / "server/W").bundle_round(sites / "round")
    return sites / "round"


def bundle_update(sites: Path, client: int) -> Path:
    Federation.open(sites / f"{client}/W").client(client).bundle(sites / f"update-{client}")
    return sites / f"update-{client}"


def joined(sites: Path, *clients: int) -> None:
    """Let parties join by bundles, and be enrolled."""
    server = sites / "server/W"
    with at(sites / "server/home"):
        told = Federation.open(server).keys().server.fingerprint
    for client in clients:
        bundle = bundle_round(sites)
        with at(sites / f"{client}/home"):
            taken_in(bundle, sites / f"{client}/W", server=told)
            own = join(sites / f"{client}/W", client, server=told)
            update = bundle_update(sites, client)
        with at(sites / "server/home"):
            assert taken_in(update, server).unenrolled == own
            Federation.open(server).server.enrol(client, own)


def test_the_whole_life_of_parties_that_never_see_the_workspace(sites: Path, run: Run) -> None:
    server = sites / "server/W"
    joined(sites, 0, 1, 2)
    for number in range(2):
        bundle = bundle_round(sites)
        for client in range(3):
            with at(sites / f"{client}/home"):
                taken_in(bundle, sites / f"{client}/W")
                assert train(sites / f"{client}/W", client).round == number
                update = bundle_update(sites, client)
            with at(sites / "server/home"):
                found = results(run, "bundle", "import", update, "-w", server)
                assert found["carried"]["carried"] == {"updates": 1, "acknowledgements": 1}
        with at(sites / "server/home"):
            assert len(Federation.open(server).server.aggregate().aggregation.counted) == 3
    with at(sites / "2/home"):
        taken_in(bundle_round(sites), sites / "2/W")
        assert Federation.open(sites / "2/W").verify().violations == []
        assert all((read_adapter(sites / "2/W", 2)[name] == x).all() for name, x in read_adapter(server, 2).items())
        assert Federation.open(sites / "2/W").client(2).leave()
        update = bundle_update(sites, 2)
    with at(sites / "server/home"):
        assert taken_in(update, server).carried.carried == {"leaving": 1}
        assert Federation.open(server).verify().violations == []
    assert {path.name for path in (sites / "2/W/inbox").iterdir()} == {"2"}


def test_a_bundle_is_the_same_bytes_again_and_taken_in_again_changes_nothing(sites: Path) -> None:
    joined(sites, 0)
    first = bundle_round(sites).read_bytes()
    assert bundle_round(sites).read_bytes() == first
    with tarfile.open(sites / "round") as archive:
        members = archive.getmembers()
    assert {(member.mode, member.mtime, member.uid, member.isreg()) for member in members} == {(0o644, 0, 0, True)}
    assert [member.name for member in members[-2:]] == ["bundle.json", "bundle.sig"]
    with at(sites / "0/home"):
        taken_in(sites / "round", sites / "0/W")
        before = tree(sites / "0/W")
        assert taken_in(sites / "round", sites / "0/W").carried.carried == {}
        assert tree(sites / "0/W") == before
    with at(sites / "server/home"), pytest.raises(UsageError, match="exists, and is no bundle"):
        Federation.open(sites / "server/W").bundle_round(sites / "server/W/fedcli.yaml")


@slow
def test_an_older_bundle_does_not_bring_an_older_registration_back(sites: Path) -> None:
    joined(sites, 0)
    old = Path(shutil.copy(sites / "update-0", sites / "old"))
    with at(sites / "0/home"):
        taken_in(bundle_round(sites), sites / "0/W")
        join(sites / "0/W", 0, num_rows=7)
        new = bundle_update(sites, 0)
    with at(sites / "server/home"):
        assert taken_in(new, sites / "server/W").carried.carried == {"registrations": 1}
        assert taken_in(old, sites / "server/W").carried.carried == {}
    assert json.loads((sites / "server/W/clients/0.json").read_bytes())["data"]["num_rows"] == 7


def tampered(bundle: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> None:
    """Write a bundle's members anew after a change."""
    with tarfile.open(bundle) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    change(members)
    with tarfile.open(bundle, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member, contents in members:
            if member.isreg():
                member.size = len(contents)
            archive.addfile(member, io.BytesIO(contents) if member.isreg() else None)


def renamed(name: str, **fields: object) -> Callable[[list], object]:
    def change(members: list) -> None:
        for key, value in {"name": name, **fields}.items():
            setattr(members[0][0], key, value)

    return change


def emptied(members: list) -> None:
    members[0] = (members[0][0], members[0][1][:-1] + b"x")


ATTACKS = {
    "climbs out": (renamed("../../stolen"), "which no bundle does"),
    "climbs out of a round": (renamed("rounds/00000/../../stolen"), "which no bundle does"),
    "is absolute": (renamed("/tmp/stolen"), "which no bundle does"),
    "a hidden name": (renamed("rounds/00000/.hidden"), "which no bundle does"),
    "a lock": (renamed("server.lock"), "which no bundle does"),
    "a link": (renamed("enrolment/00000.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "something that no"),
    "a hard link": (renamed("enrolment/00000.json", type=tarfile.LNKTYPE, linkname="fedcli.yaml"), "something that no"),
    "a folder": (renamed("rounds", type=tarfile.DIRTYPE), "something that no bundle does"),
    "a device": (renamed("rounds", type=tarfile.CHRTYPE), "something that no bundle does"),
    "an owner": (renamed("enrolment/00000.json", uid=7), "something that no bundle does"),
    "a mode": (renamed("enrolment/00000.json", mode=0o4755), "something that no bundle does"),
    "twice": (lambda members: members.insert(0, members[0]), r"holds enrolment/00000\.\w+ twice"),
    "a file more": (lambda members: members.insert(0, (tarfile.TarInfo("rounds/00009/x"), b"x")), "other files than"),
    "a file less": (lambda members: members.pop(0), "other files than bundle.json lists"),
    "another byte": (emptied, "does not have the hash that bundle.json gives"),
    "no record": (lambda members: members.pop(-2), "bundle.json is missing"),
    "not signed": (lambda members: members.pop(), "is not signed by the server"),
    "a file behind its end": (lambda members: members.append(members.pop(0)), "stands behind its end"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_bundle_that_is_not_as_it_was_written_is_refused_and_leaves_nothing(
    sites: Path, signed_bundle: Path, name: str
) -> None:
    change, problem = ATTACKS[name]
    bundle = Path(shutil.copy(signed_bundle, sites / "bundle"))
    tampered(bundle, change)
    with at(sites / "0/home"), pytest.raises(IntegrityError, match=problem):
        taken_in(bundle, sites / "0/W")
    assert not (sites / "0/W").exists()


@pytest.fixture(scope="session")
def signed_bundle(signed_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    with at(signed_template / "server/home"):
        Federation.open(signed_template / "server/W").bundle_round(folder / "round")
    return folder / "round"


def test_a_bundle_that_is_cut_or_changed_anywhere_is_refused(sites: Path, signed_bundle: Path) -> None:
    whole = signed_bundle.read_bytes()
    bundle = sites / "bundle"
    with at(sites / "0/home"):
        for length in (*range(0, len(whole), len(whole) // 60), len(whole) - 1):
            bundle.write_bytes(whole[:length])
            with pytest.raises(IntegrityError, match="is refused"):
                taken_in(bundle, sites / "0/W")
        for place in range(7, len(whole), len(whole) // 60):
            bundle.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(IntegrityError, match=r"is refused|is damaged"):
                taken_in(bundle, sites / "0/W")
        bundle.write_bytes(whole + bytes(512))
        with pytest.raises(IntegrityError, match="something follows its end"):
            taken_in(bundle, sites / "0/W")
    assert not (sites / "0/W").exists()


def test_another_servers_bundle_and_another_workspaces_are_refused(
    sites: Path, signed_bundle: Path, small_template: Path
) -> None:
    wrong = "-".join(["0000"] * 8)
    with at(sites / "0/home"):
        with pytest.raises(IntegrityError, match="signed by another server than yours"):
            taken_in(signed_bundle, sites / "0/W", server=wrong)
        with pytest.raises(UsageError, match="no fingerprint"):
            taken_in(signed_bundle, sites / "0/W", server="friend")
        taken_in(signed_bundle, sites / "0/W")
        before = tree(sites / "0/W")
    make_signed(small_template, sites / "impostor/W", sites / "impostor/home")  # the same id, other keys
    with at(sites / "impostor/home"):
        Federation.open(sites / "impostor/W").bundle_round(sites / "other")
    with at(sites / "0/home"):
        with pytest.raises(IntegrityError, match="entry 0 of its enrolment is not that of"):
            taken_in(sites / "other", sites / "0/W")
        assert tree(sites / "0/W") == before
    path = sites / "impostor/W/workspace.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"id": "other"}))
    with at(sites / "0/home"), pytest.raises(IntegrityError, match="it is of workspace"):
        taken_in(signed_bundle, sites / "impostor/W")


def test_a_strangers_bundle_replaces_no_registration_that_waits(sites: Path, signed_bundle: Path) -> None:
    server, prints, bundles = sites / "server/W", {}, {}
    for who in ("honest", "mallory"):
        with at(sites / who / "home"):
            taken_in(signed_bundle, sites / who / "W")
            prints[who] = join(sites / who / "W", 0)
            bundles[who] = sites / f"from-{who}"
            Federation.open(sites / who / "W").client(0).bundle(bundles[who])
    with at(sites / "honest/home"):
        sync(Workspace(sites / "honest/W"), Workspace(server), observer=Observer())
    waiting = (server / "clients/0.json").read_bytes()
    with at(sites / "server/home"):
        assert list(taken_in(bundles["mallory"], server).carried.changed) == ["clients/0.json"]
        taken_in(bundles["honest"], server)  # what is remembered now is no reason to let mallory's later one in
        assert list(taken_in(bundles["mallory"], server).carried.changed) == ["clients/0.json"]
        assert (server / "clients/0.json").read_bytes() == waiting
        Federation.open(server).server.enrol(0, prints["honest"])
        Federation.open(server).server.revoke(0)
        with pytest.raises(IntegrityError, match="client 0 was revoked"):
            taken_in(bundles["honest"], server)
    with at(sites / "anew/home"):  # new keys are asked to be enrolled
        taken_in(signed_bundle, sites / "anew/W")
        own = join(sites / "anew/W", 0)
        Federation.open(sites / "anew/W").client(0).bundle(sites / "anew/update")
    with at(sites / "server/home"):
        found = taken_in(sites / "anew/update", server)
        assert (found.unenrolled, found.carried.carried) == (own, {"registrations": 1})


def test_a_server_key_that_was_rotated_out_signs_no_bundle_and_no_round_goes_back_before_it(sites: Path) -> None:
    joined(sites, 0)
    server = sites / "server/W"
    shutil.copytree(sites / "server", sites / "thief")  # who has the old key, and the enrolment of its time
    with at(sites / "server/home"):
        Federation.open(server).server.rotate_keys()
    with at(sites / "0/home"):
        taken_in(bundle_round(sites), sites / "0/W")
    with at(sites / "thief/home"):
        Federation.open(sites / "thief/W").bundle_round(sites / "stolen")
    with at(sites / "0/home"):
        before = tree(sites / "0/W")
        with pytest.raises(IntegrityError, match="it is not signed by the server"):
            taken_in(sites / "stolen", sites / "0/W")
        assert tree(sites / "0/W") == before
    now = read_start(Workspace(server)).manifest
    head = EnrolmentHead(number=1, sha256="0" * 64)
    later = now.model_copy(update={"enrolment": head})
    assert steps_back(now, later)
    assert steps_back(now.model_copy(update={"enrolment": None}), later)
    assert not steps_back(later, now)


@slow
def test_an_update_is_taken_from_nobody_but_its_enrolled_client(sites: Path) -> None:
    joined(sites, 0, 1)
    bundle = bundle_round(sites)
    with at(sites / "0/home"):
        taken_in(bundle, sites / "0/W")
        train(sites / "0/W", 0)
        update = bundle_update(sites, 0)
    with at(sites / "mallory/home"):
        taken_in(bundle, sites / "mallory/W")
        join(sites / "mallory/W", 2)
        Federation.open(sites / "mallory/W").client(2).bundle(sites / "forged")
    for name in ("json", "sig"):  # what mallory signs, in the place of client 0's
        shutil.copy(sites / "mallory/W/clients" / f"2.{name}", sites / "mallory/W/clients" / f"0.{name}")
    before = tree(sites / "server/W")
    with at(sites / "server/home"):

        def as_0(members: list) -> None:
            for member, _ in members:
                member.name = member.name.replace("clients/2", "clients/0")
            record = json.loads(members[-2][1])
            record["files"] = {name.replace("clients/2", "clients/0"): entry for name, entry in record["files"].items()}
            record["modified"] = {}
            del record["checksum"]
            members[-2] = (members[-2][0], json.dumps(record | {"client": 0}).encode())

        tampered(sites / "forged", as_0)
        with pytest.raises(IntegrityError, match="in it: it is of client 2"):
            taken_in(sites / "forged", sites / "server/W")
        assert tree(sites / "server/W") == before
        assert taken_in(update, sites / "server/W").carried.carried == {"updates": 1, "acknowledgements": 1}
        with pytest.raises(UsageError, match="no workspace that an update could be taken into"):
            taken_in(update, sites / "nowhere")


def test_who_has_not_joined_has_nothing_to_send(sites: Path, signed_bundle: Path) -> None:
    with at(sites / "0/home"):
        taken_in(signed_bundle, sites / "0/W")
        with pytest.raises(NotReadyError, match="it has not joined"):
            bundle_update(sites, 0)
    assert not (sites / "update-0").exists()


def test_a_federation_without_signatures_goes_by_bundles_too(
    small: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    results(run, "bundle", "round", tmp_path / "round", "-w", small)
    found = results(run, "bundle", "import", tmp_path / "round", "-w", tmp_path / "party")
    assert found["carried"]["is_first"]
    all_take_part(tmp_path / "party")
    results(run, "bundle", "update", "--id", 1, tmp_path / "update", "-w", tmp_path / "party")
    assert results(run, "bundle", "import", tmp_path / "update", "-w", small)["carried"]["carried"] == {"updates": 1}
    assert [path.name for path in (small / "inbox").iterdir()] == ["1"]
    code, _, err = run("bundle", "import", tmp_path / "round", "-w", tmp_path / "new", "--server", "0" * 32)
    assert code == 7
    assert "this workspace's server signs" in err


@slow
@pytest.mark.parametrize("way", ["bundles", "sync"])
def test_masked_rounds_go_by_files_too_and_a_late_update_is_not_carried_to_be_unmasked(
    small_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    (tmp_path / "made").mkdir()
    server = secure.used(secure.make(small_template, tmp_path / "made", "double", 4), tmp_path, monkeypatch)
    places = {client: tmp_path / f"party-{client}" for client in range(4)}

    def down(client: int) -> None:
        if way == "sync":
            Federation(Workspace(server)).sync(places[client], client=client)
        else:
            Federation.open(server).bundle_round(tmp_path / "round")
            taken_in(tmp_path / "round", places[client])

    def up(client: int) -> dict[str, str]:
        if way == "sync":
            return Federation(Workspace(places[client])).sync(server, client=client).left
        Federation.open(places[client]).client(client).bundle(tmp_path / "update")
        return taken_in(tmp_path / "update", server).carried.left

    with pytest.raises(NotReadyError):
        secure.merge(server)  # fixes who takes part
    for client in range(4):
        down(client)
        for name in (f"{client}.json", f"{client}.sig"):  # all have joined the server's own workspace
            (places[client] / "clients").mkdir(exist_ok=True)
            shutil.copy(server / "clients" / name, places[client] / "clients" / name)
        assert secure.visit(places[client], client) == ["submitted"]
    for client in range(3):
        assert up(client) == {}
    with pytest.raises(NotReadyError, match="repair"):
        secure.merge(server, partial=True)
    assert list(up(3).values()) == ["a repair goes on without it, and would unmask it"]
    assert not (server / "inbox/3/round-00000").exists()
    for client in range(3):
        down(client)
        assert secure.visit(places[client], client) == ["answered"]
        up(client)
    merge = secure.merge(server).aggregation
    assert ([entry.client for entry in merge.counted], merge.missing) == ([0, 1, 2], [3])
    assert Federation.open(server).verify().violations == []


def test_a_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="is no regular file"), opened_bundle(tmp_path):
        pass
