"""Three parties and a server, four unix users on one workspace: nothing of a party's gets out, and none gets in."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.processes import SMALL, settings
from support.unix_users import several_users, skip_without_users
from support.warm import Warm

pytestmark = pytest.mark.slow
SERVER = 20_000
"""The user and group id of the server; party k has the k + 1-th after it."""
ROUNDS = 3


@dataclass(frozen=True)
class Party:
    """A party and its canaries: `secret` stands in the text of every row, `column` is one of a file's."""

    client: int
    name: str
    host: str
    folder: Path
    rows: Path
    home: Path | None
    format: str
    secret: str
    umask: int
    column: str | None = None

    @property
    def user(self) -> int:
        return SERVER + 1 + self.client

    def found_home(self, workspace: Path) -> Path:
        identity = json.loads((workspace / "workspace.json").read_bytes())["id"]
        return self.home or self.folder / ".local/share/fedcli" / identity / str(self.client)

    def canaries(self) -> list[str]:
        names = [self.name, self.host, self.folder.name, self.rows.name, self.rows.parent.name, self.secret]
        return [*names, *([self.home.name] if self.home else []), *([self.column] if self.column else [])]


@dataclass(frozen=True)
class World:
    """The folder with all of it; `warm` starts processes."""

    folder: Path
    workspace: Path
    parties: tuple[Party, ...]
    warm: Warm

    def copy(self, name: str, source: str = "workspace") -> Path:
        """Return a copy of a workspace, owners and modes too; of one without rounds no party has seen a later round."""
        target = self.workspace.with_name(name)
        subprocess.run(["cp", "-a", self.workspace.with_name(source), target], check=True)
        for party in self.parties if source == "fresh" else ():
            (party.found_home(self.workspace) / "history.jsonl").unlink(missing_ok=True)
        return target

    def server(self, *arguments: object, workspace: Path | None = None) -> subprocess.CompletedProcess[str]:
        folder = workspace or self.workspace
        return self.warm(
            *arguments, cwd=folder, user=SERVER, host="the-server", environment={"HOME": str(self.folder / "server")}
        )

    def run(self, party: Party, *arguments: object, workspace: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command as a party's user, with what a login would set."""
        names = dict.fromkeys(("USER", "LOGNAME"), party.name) | {"HOSTNAME": party.host}
        paths = {"HOME": party.folder, "PWD": party.folder, "FEDCLI_WORKSPACE": workspace or self.workspace}
        return self.warm(
            *arguments,
            cwd=party.folder,
            user=party.user,
            host=party.host,
            umask=party.umask,
            environment=names | {name: str(path) for name, path in paths.items()},
        )

    def join(self, party: Party, workspace: Path | None = None) -> subprocess.CompletedProcess[str]:
        where = ["--data", party.rows, *(["--home", party.home] if party.home else [])]
        return self.run(
            party, "client", "join", "--id", party.client, "--format", party.format, *where, workspace=workspace
        )

    def train(self, party: Party, workspace: Path | None = None) -> subprocess.CompletedProcess[str]:
        where = ["--home", party.home] if party.home else []
        return self.run(party, "client", "train", "--id", party.client, *where, workspace=workspace)


def write_alpaca(party: Party) -> None:
    rows = [{"instruction": f"{party.secret} {n}", "output": f"{n} {party.secret}"} for n in range(6)]
    party.rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_parquet(party: Party) -> None:
    import pyarrow
    from pyarrow import parquet

    column = [f"{party.secret} {number}" for number in range(7)]
    table = pyarrow.table({party.column: column, "answer": column})
    parquet.write_table(table, party.rows, compression="none", use_dictionary=False)


def write_csv(party: Party) -> None:
    lines = [f'"{party.secret}, {number}",{party.secret} {number}' for number in range(8)]
    party.rows.write_text("\n".join(["prompt,completion", *lines, ""]))


def make_parties(folder: Path) -> tuple[Party, ...]:
    """Make the folders and rows of three parties, each its own user's."""
    homes = [folder / "nightingalefolder", folder / "kingfisherfolder", folder / "woodpeckerfolder"]
    columns = "{columns: {instruction: wagtailcolumn, response: answer}}"
    parties = (
        Party(0, "sparrowuser", "goshawk-host", homes[0], homes[0] / "ospreydata/linnetrows.jsonl",
              homes[0] / "buzzardhome", "alpaca", "Zaunkönigsgeheimnis", 0o077),
        Party(1, "lapwinguser", "plover-host", homes[1], homes[1] / "siskindata/fulmarrows.parquet",
              homes[1] / "curlewhome", columns, "whimbrelsecret", 0o022, "wagtailcolumn"),
        Party(2, "dunlinuser", "gannet-host", homes[2], homes[2] / "avocetdata/bitternrows.csv",
              None, "prompt-completion", "cormorantsecret", 0o002),
    )  # fmt: skip
    for party, write in zip(parties, (write_alpaca, write_parquet, write_csv), strict=True):
        party.rows.parent.mkdir(parents=True)
        write(party)
        for path in (party.folder, party.rows.parent, party.rows):
            os.chown(path, party.user, party.user)
    return parties


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A folder that all can reach, a workspace of the server's with round 0 open, and three parties' rows."""
    skip_without_users()
    folder = Path(tempfile.mkdtemp(prefix="fedcli-users-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        parties = make_parties(folder)
        entries = [(party.name, party.user, party.folder) for party in parties]
        (folder / "server").mkdir()
        os.chown(folder / "server", SERVER, SERVER)
        with several_users(folder / "stage", [*entries, ("server", SERVER, folder / "server")]) as warm:
            created = World(folder, folder / "server/workspace", parties, warm)
            done = warm("init", created.workspace, *settings(*SETTINGS), cwd=folder, user=SERVER)
            assert done.returncode == 0, done.stderr
            created.copy("fresh")
            yield created
    finally:
        shutil.rmtree(folder)


SETTINGS = (
    *SMALL,
    f"federation.rounds={ROUNDS}",
    "data.source=null",
    "federation.signatures=off",
    "algorithm.name=scaffold",
    "federation.multi_user=true",
)


@pytest.fixture(scope="module")
def finished(world: World) -> World:
    """The federation after its last round."""
    for party in world.parties:
        done = world.join(party)
        assert done.returncode == 0, done.stderr
    for _ in range(ROUNDS):
        for party in world.parties:
            done = world.train(party)
            assert (done.returncode, done.stderr.splitlines()[:-1]) == (0, []), done.stderr
        done = world.server("server", "aggregate")
        assert done.returncode == 0, done.stderr
    return world


def forms(canary: str) -> set[bytes]:
    """Return what a text may look like in a file."""
    escaped = (json.dumps(canary)[1:-1].encode(), canary.encode("unicode_escape"))
    return {canary.encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le")} | {*escaped}


def everything_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every name below a folder and what is there: bytes, or where a link points."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                yield str(path.relative_to(folder)), os.fsencode(path.readlink())
            else:
                yield str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""


def leaks(folder: Path, canaries: list[str]) -> list[tuple[str, str]]:
    """Return every canary that stands in a name or in a file below a folder, in capitals or not."""
    return [
        (name, canary)
        for name, contents in everything_in(folder)
        if name != "server.lock"
        for canary in canaries
        if any(form.lower() in os.fsencode(name).lower() + b"\0" + contents.lower() for form in forms(canary))
    ]


def test_three_users_finish_three_rounds_in_which_each_is_counted(finished: World) -> None:
    counts = []
    for number in range(1, ROUNDS + 1):
        manifest = json.loads((finished.workspace / f"rounds/{number:05d}/manifest.json").read_bytes())
        aggregation = manifest["aggregation"]
        counts.append([(entry["client"], entry["num_samples"]) for entry in aggregation["counted"]])
        assert (aggregation["refused"], aggregation["missing"]) == ([], [])
    assert counts == [[(0, 6), (1, 7), (2, 8)]] * ROUNDS
    assert manifest["state"] == "finished"
    done = finished.server("verify", "--json")
    assert (done.returncode, json.loads(done.stdout)["violations"]) == (0, [])


def test_a_party_cannot_check_the_others_updates_and_does_not_call_them_damaged(finished: World) -> None:
    done = finished.run(finished.parties[0], "verify", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["violations"], found["num_hidden"]) == (0, [], 2 * ROUNDS)


def test_no_canary_of_a_party_is_anywhere_in_the_workspace(finished: World) -> None:
    canaries = [canary for party in finished.parties for canary in party.canaries()]
    assert len(canaries) == len(set(canaries)) == 21
    names = [name for name, _ in everything_in(finished.workspace)]
    assert "inbox/2/round-00002/control_delta.safetensors" in names
    assert "clients/0.json" in names
    assert leaks(finished.workspace, canaries) == []


def test_every_canary_was_planted_where_fedcli_saw_it(finished: World) -> None:
    for party in finished.parties:
        home = party.found_home(finished.workspace)
        record = (home / "party.json").read_text()
        assert str(party.rows) in record
        if party.column:
            assert party.column in record
        assert party.host in (home / "lock").read_text()
        assert party.secret.encode() in party.rows.read_bytes()
        assert {canary for _, canary in leaks(party.folder, party.canaries())} >= {party.rows.name, party.secret}
        whoami = "import getpass, os, pwd, socket; print(getpass.getuser(), pwd.getpwuid(os.getuid()).pw_name)"
        assert finished.run(party, "-c", whoami).stdout.split() == [party.name] * 2


def test_a_planted_canary_is_found_in_every_form(tmp_path: Path) -> None:
    for number, form in enumerate(sorted(forms("Zaunkönig"))):
        (tmp_path / f"{number}.bin").write_bytes(b"\0\xff" + form + b"\xfe")
    (tmp_path / "a zaunkönig").mkdir()
    (tmp_path / "link").symlink_to("../zaunkönig")
    (tmp_path / "server.lock").write_text("Zaunkönig")
    found = sorted(name for name, _ in leaks(tmp_path, ["Zaunkönig"]))
    assert found == [*(f"{number}.bin" for number in range(6)), "a zaunkönig", "link"]


def test_the_registry_holds_data_cards_and_nothing_else(finished: World) -> None:
    identity = json.loads((finished.workspace / "workspace.json").read_bytes())["id"]
    for party, (name, num_rows) in zip(
        finished.parties, [("alpaca", 6), ("columns", 7), ("prompt-completion", 8)], strict=True
    ):
        registration = json.loads((finished.workspace / f"clients/{party.client}.json").read_bytes())
        assert set(registration.pop("data").pop("token_quantiles")) == {"0.05", "0.25", "0.5", "0.75", "0.95"}
        assert registration == {"protocol": 1, "workspace": identity, "client": party.client}
        registration = json.loads((finished.workspace / f"clients/{party.client}.json").read_bytes())
        assert set(registration["data"]) == {"num_rows", "format", "left_out", "token_quantiles"}
        assert (registration["data"]["num_rows"], registration["data"]["format"]) == (num_rows, name)
        assert registration["data"]["left_out"] == {}


def test_private_state_is_closed_to_others_whatever_the_umask(finished: World) -> None:
    for party in finished.parties:
        home = party.found_home(finished.workspace)
        assert (home.stat().st_mode & 0o7777, home.stat().st_uid) == (0o700, party.user)
        candidates = sorted(path.name for path in (home / "control").iterdir())
        assert [name[:11] for name in candidates] == ["round-00001", "round-00002"]
        for path in [home / "party.json", *(home / "control").iterdir()]:
            assert path.stat().st_mode & 0o777 == 0o600
        inbox = finished.workspace / "inbox" / str(party.client)
        assert (inbox.stat().st_mode & 0o777, inbox.stat().st_uid, inbox.stat().st_gid) == (0o750, party.user, SERVER)


DEEDS: dict[str, Callable[[World, Party], list[str]]] = {
    "list its home": lambda world, other: ["ls", str(other.found_home(world.workspace))],
    "read its record": lambda world, other: ["cat", f"{other.found_home(world.workspace)}/party.json"],
    "list its inbox": lambda world, other: ["ls", f"{world.workspace}/inbox/{other.client}"],
    "read its update": lambda world, other: [
        "cat", f"{world.workspace}/inbox/{other.client}/round-00000/update.json"],
    "remove its registration": lambda world, other: ["rm", "-f", f"{world.workspace}/clients/{other.client}.json"],
    "rewrite its registration": lambda world, other: [
        "sh", "-c", f"echo >> {world.workspace}/clients/{other.client}.json"],
    "replace its registration": lambda world, other: [
        "mv", "-f", f"{world.workspace}/clients/0.json", f"{world.workspace}/clients/{other.client}.json"],
    "remove its inbox": lambda world, other: ["rm", "-rf", f"{world.workspace}/inbox/{other.client}"],
    "move its inbox": lambda world, other: [
        "mv", f"{world.workspace}/inbox/{other.client}", f"{world.workspace}/inbox/.gone"],
    "drop into its inbox": lambda world, other: ["mkdir", f"{world.workspace}/inbox/{other.client}/round-00009"],
    "add a round": lambda world, other: ["mkdir", f"{world.workspace}/rounds/00004"],
    "change a manifest": lambda world, other: ["sh", "-c", f"echo >> {world.workspace}/rounds/00000/manifest.json"],
    "remove a round's adapter": lambda world, other: ["rm", "-rf", f"{world.workspace}/rounds/00000/adapter"],
    "change the experiment": lambda world, other: ["sh", "-c", f"echo >> {world.workspace}/fedcli.yaml"],
    "remove the identity": lambda world, other: ["rm", "-f", f"{world.workspace}/workspace.json"],
    "take the inbox away": lambda world, other: ["mv", f"{world.workspace}/inbox", f"{world.workspace}/.gone"],
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
def test_no_party_can(finished: World, deed: str) -> None:
    thief, victim = finished.parties[0], finished.parties[1]
    before = sorted(everything_in(finished.workspace))
    command = DEEDS[deed](finished, victim)
    done = subprocess.run(
        command, user=thief.user, group=thief.user, extra_groups=[], cwd="/", capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Permission denied" in done.stderr or "Operation not permitted" in done.stderr
    assert sorted(everything_in(finished.workspace)) == before


def drop(world: World, thief: Party, client: int, workspace: Path) -> None:
    """Let a party's user drop a valid update in a client's inbox, with a program of its own; it may fail."""
    home = thief.folder / f"{workspace.name}-{client}"
    code = "import os; os.umask(0o022); from scaffold_client import take_part; "
    world.run(thief, "-c", f"{code}take_part({str(workspace)!r}, {client}, {str(home)!r}, 0.0, 3)", workspace=workspace)


def closing(world: World, workspace: Path, *more: object) -> dict:
    """Merge the open round 0; return how."""
    done = world.server("server", "aggregate", *more, workspace=workspace)
    assert done.returncode == 0, done.stderr
    return json.loads((workspace / "rounds/00001/manifest.json").read_bytes())["aggregation"]


def test_an_update_in_an_inbox_that_is_not_the_registered_users_is_refused(world: World) -> None:
    workspace = world.copy("owner", "fresh")
    thief, victim = world.parties[1], world.parties[2]
    assert world.join(thief, workspace).returncode == 0
    registration = json.loads((workspace / "clients/1.json").read_bytes()) | {"client": 2}
    code = f"open({str(workspace / 'clients/2.json')!r}, 'w').write({json.dumps(registration)!r})"
    assert world.run(victim, "-c", code).returncode == 0
    for client in (1, 2):
        drop(world, thief, client, workspace)
    aggregation = closing(world, workspace, "--partial")
    assert [entry["client"] for entry in aggregation["counted"]] == [1]
    assert [(entry["client"], entry["code"]) for entry in aggregation["refused"]] == [(2, "owner")]


def test_an_id_whose_inbox_another_user_has_made_cannot_be_joined(world: World) -> None:
    workspace = world.copy("squatted", "fresh")
    thief, victim = world.parties[1], world.parties[2]
    drop(world, thief, 2, workspace)
    done = world.join(victim, workspace)
    assert done.returncode == 4
    assert f"client 2 belongs to another user: {workspace}/inbox/2 is not yours" in done.stderr
    assert not (workspace / "clients/2.json").exists()


def test_an_update_of_an_id_that_nobody_has_joined_as_is_not_counted(world: World) -> None:
    workspace = world.copy("unregistered", "fresh")
    party = world.parties[1]
    assert world.join(party, workspace).returncode == 0
    for client in (0, 1, 2):
        drop(world, party, client, workspace)
    assert [entry["client"] for entry in closing(world, workspace, "--partial")["counted"]] == [1]


def test_a_link_in_the_place_of_an_inbox_does_not_lead_an_update_astray(world: World) -> None:
    workspace = world.copy("linked", "fresh")
    thief, victim = world.parties[1], world.parties[2]
    public = victim.folder / "public"
    public.mkdir()
    os.chown(public, victim.user, victim.user)
    code = f"import os; os.symlink({str(public)!r}, {str(workspace / 'inbox/2')!r})"
    assert world.run(thief, "-c", code).returncode == 0
    done = world.join(victim, workspace)
    world.train(victim, workspace)
    assert list(public.iterdir()) == []
    assert done.returncode == 4


def test_another_home_does_not_take_over_an_id(world: World) -> None:
    workspace = world.copy("taken", "fresh")
    thief, victim = world.parties[1], world.parties[2]
    assert world.join(victim, workspace).returncode == 0
    arguments = ["client", "join", "--id", 2, "--data", thief.rows, "--format", thief.format]
    done = world.run(thief, *arguments, "--home", thief.folder / "second", workspace=workspace)
    assert (done.returncode, "client 2 has joined already" in done.stderr) == (4, True)
    assert (workspace / "clients/2.json").stat().st_uid == victim.user


def test_the_operator_can_set_a_partys_update_aside(world: World) -> None:
    workspace = world.copy("aside", "fresh")
    party = world.parties[1]
    assert world.join(party, workspace).returncode == 0
    assert world.train(party, workspace).returncode == 0
    done = world.server("server", "discard", "--id", 1, workspace=workspace)
    assert done.returncode == 0, done.stderr
    assert json.loads(world.server("status", "--json", workspace=workspace).stdout)["answered"] == []
    assert (workspace / "inbox/1/round-00000").exists()  # it is the party's, and the server may move nothing of it
    assert world.train(party, workspace).returncode == 0
    assert json.loads(world.server("status", "--json", workspace=workspace).stdout)["answered"] == [1]
    done = world.run(party, "server", "discard", "--id", 1, workspace=workspace)
    assert done.returncode == 0, done.stderr
    assert json.loads(world.server("status", "--json", workspace=workspace).stdout)["answered"] == []
    assert world.train(party, workspace).returncode == 0
    assert [entry["client"] for entry in closing(world, workspace, "--partial")["counted"]] == [1]


def test_no_party_can_keep_the_server_from_its_lock(world: World) -> None:
    workspace = world.copy("locked", "fresh")
    thief = world.parties[1]
    assert world.join(thief, workspace).returncode == 0
    assert world.train(thief, workspace).returncode == 0
    holding = f"exec 9< {workspace}/server.lock && flock -n 9 && echo held && exec sleep 60"
    with subprocess.Popen(
        ["sh", "-c", holding], user=thief.user, group=thief.user, extra_groups=[], cwd="/", stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()  # empty where it may not even open the file
        try:
            assert [entry["client"] for entry in closing(world, workspace, "--partial")["counted"]] == [1]
        finally:
            holder.kill()


def test_a_party_sees_who_is_hidden_and_not_that_they_are_missing(world: World) -> None:
    workspace = world.copy("hidden", "fresh")
    for party in world.parties:
        assert world.join(party, workspace).returncode == 0
    assert world.train(world.parties[1], workspace).returncode == 0
    seen = json.loads(world.run(world.parties[0], "status", "--json", workspace=workspace).stdout)
    assert (seen["answered"], seen["missing"], seen["hidden"], seen["joined"]) == ([], [0], [1, 2], [0, 1, 2])
    seen = json.loads(world.server("status", "--json", workspace=workspace).stdout)
    assert (seen["answered"], seen["missing"], seen["hidden"]) == ([1], [0, 2], [])


def test_with_signatures_nothing_forged_counts_and_nothing_stops_the_honest(world: World) -> None:
    workspace = world.workspace.with_name("signed")
    chosen = [setting for setting in SETTINGS if not setting.startswith(("federation.signatures", "algorithm"))]
    done = world.server("init", workspace, *settings(*chosen), workspace=world.folder / "server")
    assert done.returncode == 0, done.stderr
    honest, thief = (replace(party, home=None) for party in world.parties[:2])  # their homes are of the other workspace
    for party in (honest, thief):
        assert world.join(party, workspace).returncode == 0
        told = world.server("server", "enrol", "--id", party.client, workspace=workspace)
        fingerprint = told.stderr.split("--fingerprint ")[1].split("`")[0]
        done = world.server("server", "enrol", "--id", party.client, "--fingerprint", fingerprint, workspace=workspace)
        assert done.returncode == 0, done.stderr
    identity = json.loads((workspace / "workspace.json").read_bytes())["id"]
    keys = [
        honest.found_home(workspace) / "keys.pem",
        world.folder / f"server/.local/share/fedcli/{identity}/server/keys.pem",
    ]
    for path in keys:
        assert path.stat().st_mode & 0o777 == 0o600
        done = subprocess.run(["cat", path], user=thief.user, group=thief.user, extra_groups=[], capture_output=True)
        assert done.returncode != 0
    squat = f"import os; os.mkdir({str(workspace / 'clients/0.acks')!r})"
    assert world.run(thief, "-c", squat).returncode == 0
    done = world.train(honest, workspace)
    assert done.returncode == 0, done.stderr
    assert "the round is not countersigned" in done.stderr
    unsigned = f"from protocol_client import take_part; [take_part({str(workspace)!r}, client) for client in (1, 2)]"
    assert world.run(thief, "-c", f"import os; os.umask(0o022); {unsigned}", workspace=workspace).returncode == 0
    aggregation = closing(world, workspace, "--partial", "--refuse-arriving")
    assert [entry["client"] for entry in aggregation["counted"]] == [0]
    refused = {entry["client"]: entry["code"] for entry in aggregation["refused"]}
    assert refused == {1: "unsigned", 2: "unknown_client"}
    done = world.server("verify", "--json", workspace=workspace)
    assert json.loads(done.stdout)["violations"] == []


PROJECT = 30_000
"""The group that the workspace's folder has, and that the hostile party is in."""
NOISE = """
mkdir clients/0.acks && echo garbage > clients/0.acks/round-00000.sig && mkfifo clients/0.acks/round-00001.sig
ln -s "$1" clients/2.acks
mkfifo clients/0.leave
truncate -s 1T clients/2.leave && chmod 000 clients/2.leave
chmod 000 clients/1.json clients/1.sig
echo garbage > clients/7.json
echo '{"protocol": 1}' > clients/99999999999999999999.json
mkfifo clients/5.json
ln -s /etc/shadow clients/6.json
mkdir clients/8.json clients/.hidden
echo x > "clients/$(printf '\\033[2J\\nname')"
mkdir inbox/7 inbox/7/round-00000 && mkfifo inbox/9
ln -s 0 inbox/8
mkdir inbox/00 inbox/x inbox/-1
mkdir -p inbox/1/round-00000/x && chmod 000 inbox/1/round-00000
"""
"""What a hostile party leaves in the folders that all write in; $1 is another one's home."""


def as_thief(world: World, party: Party, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a shell's code as a party's user, who is in the workspace's group, in the workspace."""
    return subprocess.run(
        ["sh", "-c", code, "sh", *map(str, arguments)], user=party.user, group=party.user, extra_groups=[PROJECT],
        cwd=world.folder / "project/W", capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def signed(world: World) -> tuple[World, Path]:
    """A workspace with signatures in a project's folder, whose group goes to all that is made there; all are in."""
    project = world.folder / "project"
    project.mkdir()
    os.chown(project, SERVER, PROJECT)
    project.chmod(0o2775)
    workspace = project / "W"
    chosen = [setting for setting in SETTINGS if not setting.startswith(("federation.signatures", "algorithm"))]
    done = world.server("init", workspace, *settings(*chosen), workspace=world.folder / "server")
    assert done.returncode == 0, done.stderr
    for party in away(world):
        assert world.join(party, workspace).returncode == 0
        told = world.server("server", "enrol", "--id", party.client, workspace=workspace)
        fingerprint = told.stderr.split("--fingerprint ")[1].split("`")[0]
        done = world.server("server", "enrol", "--id", party.client, "--fingerprint", fingerprint, workspace=workspace)
        assert done.returncode == 0, done.stderr
    return world, workspace


def away(world: World) -> list[Party]:
    """Return the parties with their default homes: the others are of another workspace."""
    return [replace(party, home=None) for party in world.parties]


def forging(party: Party, workspace: Path) -> str:
    """Return Python that reads a party's keys, for what it signs with them."""
    identity = json.loads((workspace / "workspace.json").read_bytes())["id"]
    return f"""
from pathlib import Path
from fedcli.trust.chain import acknowledgement
from fedcli.trust.keys import KeyPair
from fedcli.workspace.records import sha256
workspace, identity = Path({str(workspace)!r}), {identity!r}
own = KeyPair.read(Path({str(party.found_home(workspace))!r}) / "keys.pem")
"""


def test_a_hostile_party_in_the_workspaces_group_stops_nobody_and_learns_and_forges_nothing(
    signed: tuple[World, Path],
) -> None:
    world, workspace = signed
    honest, thief, other = away(world)
    identity = json.loads((workspace / "workspace.json").read_bytes())["id"]
    home = other.found_home(workspace)
    before = sorted(path.name for path in home.iterdir())
    done = as_thief(world, thief, f"set -e{NOISE}", home)
    assert done.returncode == 0, done.stderr
    for party in (honest, other):
        done = world.train(party, workspace)
        assert done.returncode == 0, done.stderr
        assert "the round is not countersigned" in done.stderr
    assert {path.name for path in home.iterdir()} - {*before} <= {"history.jsonl", "lock", "control"} | {
        path.name for path in home.glob("tokens-*")
    }  # nothing went through the link
    for what in ("inbox/0/round-00000/update.json", "inbox/0/round-00000/update.sig"):
        done = as_thief(world, thief, 'cat "$1"', what)
        assert (done.returncode != 0, done.stdout) == (True, "")
    server_home = world.folder / f"server/.local/share/fedcli/{identity}/server"
    for path in (
        server_home / "history.jsonl",
        server_home / "keys.pem",
        honest.found_home(workspace) / "history.jsonl",
    ):
        assert path.exists()
        assert as_thief(world, thief, 'cat "$1"', path).returncode != 0
        assert as_thief(world, thief, 'echo x >> "$1"', path).returncode != 0
    for name in ("enrolment/00000.json", "enrolment/00000.sig", "enrolment/00009.json", "rounds/00000/manifest.sig"):
        assert as_thief(world, thief, 'echo x >> "$1"', name).returncode != 0, name
    for name in ("clients/0.json", "clients/0.sig"):  # sticky: new keys of another cannot be put there
        assert as_thief(world, thief, 'rm -f "$1"; echo x >> "$1"', name).returncode != 0, name
    for command in (["keys", "rotate", "--id", 0], ["client", "leave", "--id", 0]):
        assert world.run(thief, *command, workspace=workspace).returncode == 2
    aggregation = closing(world, workspace)
    assert [entry["client"] for entry in aggregation["counted"]] == [0, 2]
    assert [(entry["client"], entry["code"]) for entry in aggregation["refused"]] == [(1, "not_regular")]
    for command in (["status"], ["verify"], ["report"], ["keys", "show"], ["export", world.folder / "server/E"]):
        done = world.server(*command, workspace=workspace)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    for command in (["status"], ["verify"], ["client", "status", "--id", 0]):
        done = world.run(honest, *command, workspace=workspace)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    # round 1: what the thief's key signs for others
    forged = forging(thief, workspace) + (
        "member = sha256((workspace / 'enrolment/00001.json').read_bytes())\n"
        "(workspace / 'clients/0.leave').unlink()\n"
        "(workspace / 'clients/0.leave').write_bytes(own.sign('leave', identity, member))\n"
        "head = sha256((workspace / 'rounds/00001/manifest.json').read_bytes())\n"
        "(workspace / 'clients/0.acks/round-00001.sig').unlink()\n"
        "ack = acknowledgement(own.sign('ack', identity, head), head)\n"
        "(workspace / 'clients/0.acks/round-00001.sig').write_bytes(ack)\n"
    )
    done = world.run(thief, "-c", forged, workspace=workspace)
    assert done.returncode == 0, done.stderr
    code = (
        "import json, os; os.umask(0o022); from protocol_client import take_part; from pathlib import Path\n"
        f"W = Path({str(workspace)!r}); take_part(W, 1)\n"
        "record = json.loads((W / 'inbox/1/round-00001/update.json').read_bytes()) | {'client': 0}\n"
        "(W / 'inbox/1/round-00001/update.json').write_text(json.dumps(record))\n"
    )
    assert world.run(thief, "-c", code, workspace=workspace).returncode == 0
    for party in (honest, other):
        assert world.train(party, workspace).returncode == 0
    done = world.server("server", "aggregate", "--refuse-arriving", workspace=workspace)  # its signature never comes
    assert done.returncode == 0, done.stderr
    aggregation = json.loads((workspace / "rounds/00002/manifest.json").read_bytes())["aggregation"]
    assert [entry["client"] for entry in aggregation["counted"]] == [0, 2]  # 0 has not left
    assert [(entry["client"], entry["code"]) for entry in aggregation["refused"]] == [(1, "wrong_client")]
    done = world.server("verify", "--json", workspace=workspace)
    found = json.loads(done.stdout)
    assert (done.returncode, found["violations"]) == (0, [])
    assert any("is not client 0's signature" in remark["problem"] for remark in found["remarks"])

    # whose name for leaving is taken: the operator can take it out
    done = world.run(honest, "client", "leave", "--id", 0, workspace=workspace)
    assert done.returncode == 4, done.stderr
    assert "ask the server's operator for `fedcli server revoke --id 0`" in done.stderr
    assert world.server("server", "revoke", "--id", 0, workspace=workspace).returncode == 0

    # a party that countersigns what nobody published is named: it signed that
    lies = forging(thief, workspace) + (
        "acks = workspace / 'clients/1.acks'; acks.mkdir(exist_ok=True)\n"
        "(acks / 'round-00000.sig').unlink(missing_ok=True)\n"
        "(acks / 'round-00000.sig').write_bytes(acknowledgement(own.sign('ack', identity, '0' * 64), '0' * 64))\n"
    )
    done = world.run(thief, "-c", lies, workspace=workspace)
    assert done.returncode == 0, done.stderr
    done = world.server("verify", "--json", workspace=workspace)
    assert [violation["problem"][:41] for violation in json.loads(done.stdout)["violations"]] == [
        "client 1 countersigned another round 0, 0"
    ]
