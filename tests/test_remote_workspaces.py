"""A workspace by URL: which URLs there are, whose credentials are used, what a poll costs, and what is kept here."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.object_stores import SERVERS, DyingObjects, new_objects
from support.processes import ENVIRONMENT
from support.updates import answer, protocol_files

from fedcli import Federation
from fedcli.errors import ConfigError, NotReadyError, UsageError
from fedcli.operations.doctor_store import _permissions
from fedcli.printable import printable, show_as
from fedcli.stores.aws_profile import profile_options
from fedcli.stores.cloud import PART, open_cloud
from fedcli.stores.objects import Entry, Objects, TooLargeError, UnlistableError
from fedcli.stores.probe import probe_store
from fedcli.stores.url import is_url, open_objects
from fedcli.workspace.address import workspace_at
from fedcli.workspace.arriving import arriving
from fedcli.workspace.kept_entries import KeptEntries
from fedcli.workspace.kept_objects import KeptObjects
from fedcli.workspace.layout import ADAPTER_NAME, Workspace, default_home
from fedcli.workspace.object_keys import attempt_key, record_of
from fedcli.workspace.object_store import ObjectStore
from fedcli.workspace.parsing import sha256
from fedcli.workspace.registrations import DataCard, Registration, is_own, joined_clients, mark_as_own, register
from fedcli.workspace.split_store import SplitStore
from fedcli.workspace.store import DirectoryStore

PASSWORD = "hunter2-of-the-hospital"


class Counted(DyingObjects):
    """Objects whose requests are counted by kind."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects)
        self.requests: Counter[str] = Counter()

    def get(self, key: str, limit: int) -> bytes:
        self.requests["get"] += 1
        return super().get(key, limit)

    def head(self, key: str) -> Entry | None:
        self.requests["head"] += 1
        return super().head(key)

    def heads(self, keys):
        self.requests["head"] += len(keys)
        return super().heads(keys)

    def below(self, folder: str) -> dict[str, int]:
        self.requests["list"] += 1
        return super().below(folder)

    def names(self, folder: str) -> list[str]:
        self.requests["list"] += 1
        return super().names(folder)


@pytest.fixture
def remote(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Workspace, Counted]:
    """The small workspace in a store of objects, with the rows of its simulated clients on this machine."""
    objects = Counted(new_objects("objects", monkeypatch))
    for name, contents in protocol_files(small).items():
        objects.put(name, contents)
    store = SplitStore(DirectoryStore(small), ObjectStore(objects, KeptObjects(tmp_path / "kept")))
    for name in ("rounds", "inbox", "fedcli.yaml", "workspace.json"):
        os.rename(small / name, tmp_path / name)  # of these nothing may be looked for in the folder
    return Workspace(small, store, "memory://objects"), objects


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3:/bucket/study", "names no place"),
        ("s3:bucket/study", "names no place"),
        ("s3://bucket/a%20b", "will not do"),
        ("s3://", "names no place"),
        ("s3://bucket/study?versionId=3", "names no place"),
        ("s3://bucket/a/../b", "'..' will not do"),
        ("s3://bucket/a%2e%2e/%2E%2E", "will not do"),
        ("s3://bucket/\x1b[31m", "will not do"),
        ("s3://key:secret@bucket/study", "password"),
        ("s3://key:with/secret@bucket/study", "is no URL"),
        ("sftp://me:the/secret@host/study", "is no URL"),
        ("az://container/study?sv=2026&sig=secret", "names no place"),
        ("s3://bucket:9000/study", "no bucket's name"),
        ("sftp://host:port/study", "is no URL"),
        ("ftp://host/study", "knows no ftp://"),
        ("file:///srv/study", "names no place"),
        ("https://bucket.s3.amazonaws.com/study", "knows no https://"),
    ],
)
def test_a_url_that_names_no_place_is_refused_in_one_line(address, words):
    assert is_url(address)
    with pytest.raises(UsageError) as error:
        open_objects(address)
    assert words in error.value.message
    assert error.value.hint
    assert "secret" not in error.value.message


@pytest.mark.parametrize("address", ["study", "./s3/study", "C:study", "/srv/s3:study", "."])
def test_a_path_is_no_url(address):
    assert not is_url(address)
    assert not workspace_at(address).store.is_remote


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("sftp://me@host:2222/srv/study", "sftp://me@host:2222/srv/study"),
        ("sftp://host/~/study", "sftp://host/~/study"),
    ],
)
def test_a_url_is_shown_in_one_spelling(url, shown, monkeypatch):
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    assert open_objects(url).address == shown


def test_a_password_in_a_url_is_printed_nowhere(tmp_path):
    for words in (["status"], ["client", "train", "--id", "0"], ["doctor"], ["init"]):
        place = [f"sftp://me:{PASSWORD}@host/study"]
        done = subprocess.run(
            [sys.executable, "-m", "fedcli", *words, *(place if words == ["init"] else ["-w", *place])],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            cwd=tmp_path,
        )
        assert done.returncode == 2
        assert PASSWORD not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_an_endpoint_without_tls_is_taken_for_this_machine_alone(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.hospital.example")
    with pytest.raises(ConfigError, match="has no TLS"):
        open_cloud("s3", "bucket", "study")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    assert open_cloud("s3", "bucket", "study").address == "s3://bucket/study"


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write ~/.aws/config and ~/.aws/credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)

    def write(config: str, credentials: str) -> None:
        for name, text in (("CONFIG", config), ("SHARED_CREDENTIALS", credentials)):
            (tmp_path / name).write_text(text)
            monkeypatch.setenv(f"AWS_{name}_FILE", str(tmp_path / name))

    return write


def test_the_profile_of_aws_configure_gives_keys_region_and_endpoint(profiles, monkeypatch):
    profiles(
        "[default]\nregion = eu-west-1\n[profile study]\nregion = eu-central-1\nendpoint_url = https://s3.example\n",
        "[default]\naws_access_key_id = A\naws_secret_access_key = B%C\n"
        "[study]\naws_access_key_id = D\naws_secret_access_key = E\naws_session_token = F\n",
    )
    assert profile_options() == {"region": "eu-west-1", "access_key_id": "A", "secret_access_key": "B%C"}
    monkeypatch.setenv("AWS_PROFILE", "study")
    told = {"region": "eu-central-1", "endpoint": "https://s3.example", "access_key_id": "D", "secret_access_key": "E"}
    assert profile_options() == told | {"session_token": "F"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the environment")
    assert "access_key_id" not in profile_options()


def test_a_profile_that_is_not_there_or_damaged_is_named(profiles, monkeypatch):
    profiles("", "")
    assert profile_options() == {"region": "us-east-1"}
    monkeypatch.setenv("AWS_PROFILE", "study")
    with pytest.raises(ConfigError, match="no AWS profile study"):
        profile_options()
    profiles("", "no section\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        profile_options()


# --- what is where in a store


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("rounds/00003", "rounds/00003/manifest.json"),
        ("rounds/00003/adapter/adapter_model.safetensors", "rounds/00003/manifest.json"),
        ("inbox/12/round-00003/update.sig", "inbox/12/round-00003/update.json"),
        ("inbox/12/repair-00003-0", "inbox/12/repair-00003-0/answer.json"),
        ("enrolment/00001.sig", "enrolment/00001.json"),
        ("attempts/round-00003-0.sig", "attempts/round-00003-0.json"),
        ("enrolment/00001.json", None),
        ("clients/3.sig", None),
        ("inbox/12", None),
        ("inbox/x/round-00003", None),
        ("fedcli.yaml", None),
    ],
)
def test_a_file_is_there_by_its_record(name, record):
    assert record_of(name) == record


def test_files_beside_the_record_are_read_and_those_of_its_attempt_first(monkeypatch):
    objects = new_objects("objects", monkeypatch)
    store, folder, record = ObjectStore(objects), "inbox/0/round-00000", b'{"files": {}}'
    objects.put(f"{folder}/a", b"plain")
    objects.put(f"{folder}/.0123456789abcdef/a", b"of an attempt that lost")
    assert not store.exists(folder)
    objects.create(f"{folder}/update.json", record)
    assert store.exists(folder)
    assert store.read(f"{folder}/a", 100) == b"plain"
    objects.put(attempt_key(f"{folder}/a", f"{folder}/update.json", record), b"the record's")
    assert store.read(f"{folder}/a", 100) == b"the record's"
    with store.opened(folder) as opened:
        assert (opened.names(), opened.read("a", 100)) == (["a", "update.json"], b"the record's")
        assert opened.read_part("a", 4, 100) == b"record's"
        assert opened.read_part("a", 100, 200) == b""
    assert store.files(folder) == {"a": 12, "update.json": len(record)}
    store.sweep("inbox/0")
    assert sorted(objects.below(folder)) == sorted([f".{sha256(record)[:16]}/a", "a", "update.json"])


def test_of_two_servers_signatures_the_records_own_stands(monkeypatch):
    objects = new_objects("objects", monkeypatch)
    first, second = ObjectStore(objects), ObjectStore(objects)
    key = attempt_key("enrolment/00001.sig", "enrolment/00001.json", b"second")
    objects.put(key, b"the second's signature, put before its record lost")
    assert first.put_new_signed("enrolment/00001.json", b"first", b"the first's")
    assert not second.put_new_signed("enrolment/00001.json", b"second", b"the second's")
    assert second.read("enrolment/00001.sig", 100) == b"the first's"
    assert second.names("enrolment") == ["00001.json"]


# --- what a poll costs, and what is kept on this machine


def test_the_poll_of_an_idle_client_is_two_requests(remote):
    workspace, objects = remote
    answer(workspace, 1)
    assert Federation(workspace).client(1).train().status == "already_submitted"
    objects.requests.clear()
    result = Federation(workspace).client(1).train()
    assert (result.status, result.round) == ("already_submitted", 0)
    assert objects.requests == {"head": 2}


def test_a_poll_sees_the_next_round_and_that_its_update_was_set_aside(remote):
    workspace, _ = remote
    for client in range(3):
        answer(workspace, client)
    assert Federation(workspace).client(1).train().status == "already_submitted"
    Federation(workspace).server.discard(1)
    assert Federation(workspace).client(1).status().status == "due"
    answer(workspace, 1)
    assert Federation(workspace).client(1).train().status == "already_submitted"
    Federation(workspace).server.aggregate()
    assert Federation(workspace).client(1).status().round == 1
    assert Federation(workspace).client(1).train().round == 1


def test_a_poll_for_any_client_sees_one_that_joins_from_this_machine(remote, tmp_path, monkeypatch):
    workspace, _ = remote
    document = json.loads(workspace.store.read("workspace.json", 2**16)) | {"simulation": False}
    workspace.store.put("workspace.json", json.dumps(document).encode())
    for rows in (workspace.root / "data").glob("client-*.jsonl"):
        rows.unlink()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "homes"))
    for _ in range(2):
        seen = Federation(workspace).look()
        assert seen is not None
        assert not seen.may_train
    home = default_home(document["id"], 1)
    home.folder.mkdir(parents=True)
    home.party.write_text("{}")
    seen = Federation(workspace).look()
    assert seen is not None
    assert seen.may_train


def test_what_a_party_sends_while_its_last_update_is_set_aside_stays(monkeypatch):
    class Interrupted(DyingObjects):
        def delete(self, key: str) -> None:
            super().delete(key)
            if key.endswith("update.json") and "/." not in key and not sent:
                sent.append(ObjectStore(self.objects).publish(folder, [("a", b"again")], ("update.json", b"second")))

    sent: list[bool] = []
    folder, objects = "inbox/0/round-00000", new_objects("objects", monkeypatch)
    assert ObjectStore(objects).publish(folder, [("a", b"once")], ("update.json", b"first"))
    assert ObjectStore(Interrupted(objects)).set_aside(folder)
    assert sent == [True]
    store = ObjectStore(objects)
    assert (store.read(f"{folder}/update.json", 100), store.read(f"{folder}/a", 100)) == (b"second", b"again")


def test_a_large_object_is_read_in_parts(monkeypatch):
    objects = new_objects("objects", monkeypatch)
    contents = os.urandom(2 * PART + 12345)
    objects.put("large", contents)
    assert objects.get("large", len(contents)) == contents
    with pytest.raises(TooLargeError):
        objects.get("large", len(contents) - 1)


def test_a_poll_of_a_finished_federation_is_two_requests_for_any_client_here(remote):
    workspace, objects = remote
    for _ in range(2):
        for client in range(3):
            answer(workspace, client)
        Federation(workspace).server.aggregate()
    seen = Federation(workspace).look()
    assert seen is not None
    assert seen.is_finished
    objects.requests.clear()
    assert Federation(workspace).look() == seen
    assert objects.requests == {"head": 2}


def test_a_rounds_adapter_is_fetched_once_and_verify_reads_the_store(remote):
    workspace, objects = remote
    first = Federation(workspace).round().adapter()
    objects.requests.clear()
    again = Federation(workspace).round().adapter()
    assert objects.requests["get"] <= 5  # the identity, fedcli.yaml, manifests; not the adapter
    assert all((first[name] == again[name]).all() for name in first)
    (key,) = [key for key in objects.below("rounds") if key.endswith(ADAPTER_NAME)]
    contents = objects.get(f"rounds/{key}", 2**30)
    objects.put(f"rounds/{key}", contents[:-1] + bytes([contents[-1] ^ 1]))
    assert Federation(workspace).round().adapter()
    assert any("hash" in str(found) for found in Federation(workspace).verify().violations)


def test_entries_of_the_enrolment_are_fetched_once_and_those_of_another_workspace_are_none(tmp_path, monkeypatch):
    objects = Counted(new_objects("objects", monkeypatch))

    def opened() -> ObjectStore:
        store = ObjectStore(objects, entries=KeptEntries(tmp_path))
        store.read("workspace.json", 100)
        objects.requests.clear()
        return store

    objects.put("workspace.json", b"one")
    for number in range(40):
        ObjectStore(objects).put_new_signed(f"enrolment/{number:05d}.json", b"%d" % number, b"signature %d" % number)
    names = [f"enrolment/{number:05d}.{kind}" for number in range(40) for kind in ("json", "sig")]
    first = [opened().read(name, 100) for name in names[:1]] + [opened().read(name, 100) for name in names[1:]]
    assert len(objects.below("enrolment")) == 80
    assert first == [text for number in range(40) for text in (b"%d" % number, b"signature %d" % number)]
    again = opened()
    assert [again.read(name, 100) for name in names] == first
    assert objects.requests == {}
    with pytest.raises(FileNotFoundError):
        again.read("enrolment/00040.json", 100)
    assert objects.requests == {"get": 1}
    (path,) = tmp_path.glob("enrolment-*.jsonl")
    path.write_text(path.read_text() + '["enrolment/00001.json", ')
    assert opened().read(names[2], 100) == first[2]
    again.forget()
    assert not path.exists()
    assert opened().read(names[0], 100) == first[0]
    objects.put("workspace.json", b"another")
    objects.put("enrolment/00000.json", b"of another")
    assert opened().read("enrolment/00000.json", 100) == b"of another"


def test_kept_files_are_bounded_and_a_damaged_one_is_none(tmp_path):
    kept = KeptObjects(tmp_path / "kept", most_bytes=250)
    files = {sha256(contents): contents for contents in (bytes([number]) * 100 for number in range(3))}
    for seconds, (digest, contents) in enumerate(files.items()):
        kept.keep(digest, contents)
        os.utime(tmp_path / "kept" / digest, (seconds, seconds))
    first, second, third = files
    assert (kept.get(first), kept.get(second), kept.get(third)) == (None, files[second], files[third])
    (tmp_path / "kept" / third).write_bytes(b"x" * 100)
    assert kept.get(third) is None
    assert not (tmp_path / "kept" / third).exists()
    kept.keep("0" * 64, b"x" * 251)
    assert kept.get("0" * 64) is None
    (tmp_path / "file").write_bytes(b"")
    KeptObjects(tmp_path / "file").keep(first, files[first])  # no folder can be made there
    assert KeptObjects(tmp_path / "file").get(first) is None


def test_a_workspace_elsewhere_is_ones_own_where_it_was_made(remote):
    workspace, _ = remote
    assert not is_own(workspace)
    mark_as_own(workspace, Federation(workspace).state.identity.id)
    assert is_own(workspace)
    mark_as_own(workspace, "of what was at this URL before")
    assert not is_own(workspace)


def test_messages_show_the_url_and_paths_of_this_machine_as_they_are(tmp_path):
    own = tmp_path / "s3-b"
    show_as(str(own), "s3://b/study", ("eval", "server.lock"))
    told = f"{own}/rounds/00001 {own}/eval/a.json {own}c {own}"
    assert printable(told) == f"s3://b/study/rounds/00001 {own}/eval/a.json {own}c s3://b/study"


# --- doctor


class Careless(DyingObjects):
    """A store that takes create-only writes for plain ones, or only says that it refuses them."""

    def __init__(self, objects: Objects, *, answers: bool, writes: bool) -> None:
        super().__init__(objects)
        self._answers = answers
        self._writes = writes

    def create(self, key: str, contents: bytes) -> bool:
        is_new = self.objects.head(key) is None
        if is_new or self._writes:
            self.objects.put(key, contents)
        return is_new or self._answers


@pytest.mark.parametrize(
    ("answers", "writes", "words"),
    [
        (True, True, "replaces what stands there: the store ignores its condition"),
        (True, False, "is said to succeed, and changes nothing"),
        (False, True, "is refused, and replaces what stands there"),
    ],
)
def test_doctor_names_what_a_careless_store_did(answers, writes, words, monkeypatch):
    objects = Careless(new_objects("objects", monkeypatch), answers=answers, writes=writes)
    found = {probed.name: probed.problem for probed in probe_store(objects, ".doctor")}
    assert words in str(found["create twice"])
    assert objects.below("") == {}


@pytest.mark.parametrize("kind", ["objects", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SERVERS)])
def test_doctor_finds_nothing_wrong_with_a_store_that_keeps_its_word(kind, monkeypatch):
    objects = new_objects(kind, monkeypatch)
    found = list(probe_store(objects, ".doctor"))
    assert [probed.problem for probed in found] == [None] * len(found)
    assert {probed.name for probed in found} >= {"latency", "create twice", "race", "read back", "clock", "bandwidth"}
    assert objects.below("") == {}


def test_a_store_that_does_not_answer_is_one_error_with_its_address(monkeypatch):
    class Silent(DyingObjects):
        def head(self, key: str) -> Entry | None:
            raise self.unreachable("look at", key, "no answer")

    (found,) = probe_store(Silent(new_objects("objects", monkeypatch)), ".doctor")
    assert found.problem == "cannot look at memory://objects/.doctor/missing: no answer"


def test_a_folder_that_is_no_protocols_cannot_be_published(monkeypatch):
    store = ObjectStore(new_objects("objects", monkeypatch))
    with pytest.raises(ValueError, match="no folder that a record"):
        store.publish("rounds/00000", [], ("update.json", b""))


# --- keys that are no paths


class Littered(Counted):
    """A store in which keys lie that obstore fails each list for, as a `//` in them does."""

    keys: tuple[str, ...] = ()

    def _check(self, folder: str, *, is_deep: bool) -> None:
        for key in self.keys:
            at = key.partition("//")[0]
            if f"{key}/".startswith(f"{folder}/" if folder else "") and (is_deep or at == folder):
                raise UnlistableError(f"cannot list {folder}", hint="")

    def below(self, folder: str) -> dict[str, int]:
        self._check(folder, is_deep=True)
        return super().below(folder)

    def names(self, folder: str) -> list[str]:
        self._check(folder, is_deep=False)
        return super().names(folder)


def test_a_key_that_is_no_path_in_one_inbox_stops_nobody(remote, tmp_path):
    workspace, objects = remote
    littered = Littered(objects)
    Littered.keys = ("inbox/1/round-00000//x", "inbox/2/round-00000//x", "inbox/7//x")
    store = SplitStore(workspace.store.local, ObjectStore(littered, KeptObjects(tmp_path / "kept-2")))
    workspace = Workspace(workspace.root, store, "memory://objects")
    for client in (0, 1):
        answer(workspace, client)
    objects.put("inbox/5/round-00000/.0123456789abcdef/x", b"x")
    objects.put("inbox/7/y", b"x")
    status = Federation(workspace).status()
    assert (status.answered, status.missing) == ([0, 1], [2])
    merge = Federation(workspace).server.aggregate(partial=True).aggregation
    assert [entry.client for entry in merge.counted] == [0, 1]
    result = Federation(workspace).sync(tmp_path / "copy")
    assert result.left == {"inbox/7": "cannot list inbox/7"}
    assert workspace_at(tmp_path / "copy").has_round(1)
    Federation(workspace).gc()
    assert Federation(workspace).verify().violations == []


def test_parties_are_found_by_name_where_clients_cannot_be_listed_and_strangers_registrations_are_not_read(
    monkeypatch,
):
    objects = Littered(new_objects("objects", monkeypatch))
    Littered.keys = ()
    workspace = Workspace(Path("/nowhere"), ObjectStore(objects), "memory://objects")
    for client in (0, 2, 7, 8):
        register(workspace, Registration(workspace="w", client=client, data=DataCard(num_rows=3)))
    objects.requests.clear()
    assert [*joined_clients(workspace, 4)] == [0, 2]
    assert objects.requests == {"list": 1, "get": 2}
    Littered.keys = ("clients//x",)
    assert [*joined_clients(workspace, 4)] == [0, 2]


# --- what a server's look costs


class Together(Counted):
    """Lists of three inboxes end only once all three are asked for."""

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects)
        self.asked: list[str] = []
        self.waits = False
        self._all = threading.Barrier(3)

    def get(self, key: str, limit: int) -> bytes:
        if key.startswith("inbox/") and not self.waits:
            self.asked.append(key)
        return super().get(key, limit)

    def below(self, folder: str) -> dict[str, int]:
        self.asked.append(folder)
        if self.waits:
            self._all.wait(timeout=20)
        return super().below(folder)


def test_a_server_looks_into_no_update_before_enough_have_come_and_then_into_all_at_once(remote):
    workspace, objects = remote
    together = Together(objects)
    workspace = Workspace(workspace.root, SplitStore(workspace.store.local, ObjectStore(together)), "memory://objects")
    for client in (0, 1):
        answer(workspace, client)
    server = Federation(workspace).server
    together.asked.clear()
    with pytest.raises(NotReadyError, match="waits for 1 more"):
        server.aggregate()
    assert together.asked == []
    answer(workspace, 2)
    head = Federation(workspace).state.head
    together.asked.clear()
    together.waits = True
    assert arriving(head, range(3), is_quick=True) == {}
    assert sorted(together.asked) == [f"inbox/{client}/round-00000" for client in range(3)]


class Halfway(DyingObjects):
    """A store where a key may create in enrolment/ and delete nothing, and that fails for rounds/."""

    def create(self, key: str, contents: bytes) -> bool:
        if key.startswith("enrolment/"):
            return self.objects.create(key, contents)
        raise self.unreachable("create", key, "503") if key.startswith("rounds/") else self.denied("create", key)

    def delete(self, key: str) -> None:
        raise self.denied("delete", key)


def test_doctor_tells_what_it_may_not_delete_and_goes_on_where_the_store_fails(monkeypatch):
    objects = Halfway(new_objects("objects", monkeypatch))
    workspace = Workspace(Path("/nowhere"), ObjectStore(objects), "memory://objects")
    found = [*_permissions(workspace, objects, 3, ".doctor-1")]
    assert [(each.name, each.state) for each in found] == [
        ("store: permissions", "warning"),
        ("store: clean up", "warning"),
        ("store: permissions", "warning"),
    ]
    told = [each.detail for each in found]
    assert told[0].startswith("not known for rounds/.doctor-1/: cannot create")
    assert told[1].startswith("an object stays below enrolment/.doctor-1/: ")
    assert "may also write in enrolment/" in told[2]
