"""Three parties and a server, four unix users without a common folder: over S3, or by bundles, they get what one disk
gives them.

With signatures, SCAFFOLD and secure aggregation; the bucket's policy is that of docs/stores/.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fault_proxy import FaultProxy
from support.object_stores import contents
from support.processes import SMALL, settings, warm
from support.s3_policy import PARTY, SERVER, federation_policy
from support.servers import KEY, SECRET, new_bucket, s3_environment, s3_server
from support.unix_users import several_users, skip_without_users
from support.warm import write_rows

from fedcli.stores.url import open_objects

pytestmark = pytest.mark.slow
USER = 21_000
"""Of party 0; the others and then the server have the numbers after it."""
CLIENTS = range(3)
ROUNDS = 2
SETTINGS = (
    *SMALL,
    "data.source=null",
    "federation.signatures=required",
    "algorithm.name=scaffold",
    "privacy.secure_aggregation=pairwise",
)
Run = Callable[..., str]
"""Runs a command as a party, or as the server (None), which must succeed; returns what it prints."""


def take_part(run: Run, folders: dict[int | None, Path]) -> None:
    """Let three parties join, be enrolled, train and be merged until the federation is finished."""
    for client in CLIENTS:
        fingerprint = join(run, client, folders[client])
        run(None, "server", "enrol", "--id", client, "--fingerprint", fingerprint)
    for _ in range(ROUNDS):
        for client in CLIENTS:
            assert "dropped its update" in run(client, "client", "train", "--id", client)
        run(None, "server", "aggregate")
    assert json.loads(run(None, "verify", "--json"))["violations"] == []


def join(run: Run, client: int, folder: Path) -> str:
    """Let a party join with rows in a folder; return the fingerprint of its keys."""
    texts = [{"instruction": f"say {n} of {client}", "output": f"{n} it is"} for n in range(5 + client)]
    rows = write_rows(folder / "rows.jsonl", texts)
    rows.chmod(0o644)
    told = run(client, "client", "join", "--id", client, "--data", rows, "--share", "minimal", "--json")
    return str(json.loads(told)["fingerprint"])


def take_part_by_stick(run: Run, folders: dict[int | None, Path], stick: Path) -> None:
    """Do the same where nothing but bundles goes between the parties' folders and the server's."""

    def carry_up(client: int) -> None:
        run(client, "bundle", "update", "--id", client, stick / f"{client}.tar")
        run(None, "bundle", "import", stick / f"{client}.tar")

    run(None, "bundle", "round", stick / "round.tar")
    for client in CLIENTS:
        run(client, "bundle", "import", stick / "round.tar", "-w", folders[client] / "W")
        fingerprint = join(run, client, folders[client])
        carry_up(client)
        run(None, "server", "enrol", "--id", client, "--fingerprint", fingerprint)
    for _ in range(ROUNDS):
        run(None, "bundle", "round", stick / "round.tar")
        for client in CLIENTS:
            run(client, "bundle", "import", stick / "round.tar")
            assert "dropped its update" in run(client, "client", "train", "--id", client)
            carry_up(client)
        run(None, "server", "aggregate")
    assert json.loads(run(None, "verify", "--json"))["violations"] == []


def on_one_disk(folder: Path) -> dict[str, str]:
    """Return the hashes of all rounds' files of the federation on one disk, of one user."""

    def run(client: int | None, *arguments: object) -> str:
        home = folder / str(client)
        environment = {"FEDCLI_WORKSPACE": str(folder / "W"), "XDG_DATA_HOME": str(home)}
        done = warm()(*arguments, cwd=folder, environment=environment)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    folders: dict[int | None, Path] = {client: folder / f"rows-{client}" for client in CLIENTS}
    for place in folders.values():
        place.mkdir(parents=True)
    run(None, "init", folder / "W", *settings(*SETTINGS))
    take_part(run, folders)
    manifests = {path.parent.name: path.read_bytes() for path in (folder / "W/rounds").glob("*/manifest.json")}
    return hashes(manifests)


def hashes(manifests: dict[str, bytes]) -> dict[str, str]:
    """Return the hash of each round's arrays, of which the manifests tell."""
    return {
        f"{number}/{name}": entry["sha256"]
        for number, text in sorted(manifests.items())
        for name, entry in json.loads(text)["files"].items()
    }


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that every user can look into, and nobody but root writes in."""
    skip_without_users()
    folder = Path(tempfile.mkdtemp(prefix="fedcli-apart-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def members(reachable: Path) -> dict[int | None, tuple[int, Path]]:
    """The parties and the server (None): users, each with a folder that nobody else looks into."""
    found: dict[int | None, tuple[int, Path]] = {}
    for position, member in enumerate([*CLIENTS, None]):
        user = USER + position
        folder = reachable / f"user-{user}"
        folder.mkdir(mode=0o700)
        os.chown(folder, user, user)
        found[member] = user, folder
    return found


def test_four_users_without_a_common_folder_end_with_the_adapters_of_one_disk(
    reachable, members, tmp_path, monkeypatch
):
    users = {member: user for member, (user, _) in members.items()}
    folders = {member: folder for member, (_, folder) in members.items()}
    server = s3_server()
    bucket = new_bucket(server.url)
    url = f"s3://{bucket}/apart"
    entries = [(f"user{users[member]}", users[member], folder) for member, folder in folders.items()]
    guard = federation_policy(bucket, "apart", CLIENTS, KEY)
    with several_users(reachable / "stage", entries) as machine, FaultProxy(server.url, guard=guard) as proxy:

        def run(member: int | None, *arguments: object) -> str:
            environment = s3_environment(proxy.url, SERVER if member is None else PARTY.format(member))
            environment |= {"HOME": str(folders[member]), "FEDCLI_WORKSPACE": url}
            done = machine(*arguments, cwd=folders[member], user=users[member], environment=environment)
            assert done.returncode == 0, f"{arguments}: {done.stderr}"
            return done.stdout

        run(None, "init", url, *settings(*SETTINGS))
        take_part(run, folders)
    for name, value in s3_environment(server.url).items():
        monkeypatch.setenv(name, value)
    found = contents(open_objects(url))
    manifests = {name.split("/")[1]: text for name, text in found.items() if name.endswith("/manifest.json")}
    expected = on_one_disk(tmp_path)
    assert hashes(manifests) == expected
    assert len([name for name in expected if name.endswith("adapter_model.safetensors")]) == ROUNDS + 1
    assert [json.loads(text)["algorithm"]["name"] for text in manifests.values()] == ["scaffold"] * (ROUNDS + 1)
    assert any(name.endswith("masked.safetensors") for name in found)
    assert not any(SECRET.encode() in text for text in found.values())
    for member, folder in folders.items():
        owners = {path.lstat().st_uid for path in (folder, *folder.rglob("*")) if path.name != "rows.jsonl"}
        assert (owners, folder.stat().st_mode & 0o777) == ({users[member]}, 0o700)
        assert not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_four_users_with_a_stick_between_them_end_with_the_adapters_of_one_disk(reachable, members, tmp_path):
    folders = {member: folder for member, (_, folder) in members.items()}
    stick = reachable / "stick"
    stick.mkdir()
    stick.chmod(0o1777)
    entries = [(f"user{user}", user, folder) for user, folder in members.values()]
    with several_users(reachable / "stage", entries) as machine:

        def run(member: int | None, *arguments: object) -> str:
            user, folder = members[member]
            environment = {"HOME": str(folder), "FEDCLI_WORKSPACE": str(folder / "W")}
            done = machine(*arguments, cwd=folder, user=user, environment=environment)
            assert done.returncode == 0, f"{arguments}: {done.stderr}"
            return done.stdout

        run(None, "init", folders[None] / "W", *settings(*SETTINGS))
        take_part_by_stick(run, folders, stick)
    manifests = {path.parent.name: path.read_bytes() for path in (folders[None] / "W/rounds").glob("*/manifest.json")}
    assert hashes(manifests) == on_one_disk(tmp_path)
    assert {path.name for path in stick.iterdir()} == {"round.tar", *(f"{client}.tar" for client in CLIENTS)}
