"""A bucket whose policy is that of docs/stores/: a party works with it, and can do nothing else.

The documents themselves are evaluated, by a proxy in front of moto's S3 (support/s3_policy.py).
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.fault_proxy import FaultProxy, Request
from support.processes import SMALL, settings, warm
from support.s3_policy import PARTY, SERVER, Act, federation_policy
from support.servers import KEY, new_bucket, s3_environment, s3_server, signed_by
from support.warm import write_rows

from fedcli.errors import DeniedError
from fedcli.workspace.address import workspace_at
from fedcli.workspace.layout import ADAPTER_NAME, MANIFEST, UPDATE_RECORD
from fedcli.workspace.store import Store

CLIENTS = range(3)
PREFIX = "hospitals/study-1"
"""Of names below the bucket."""


@dataclass
class World:
    """A federation in a bucket, each of whose members has a key and a home of its own."""

    folder: Path
    proxy: FaultProxy
    bucket: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{PREFIX}"

    def run(self, key: str, *arguments: object, code: int = 0):
        """Run a command with a key; whatever happens, no traceback and no secret is shown."""
        place = self.folder / key
        place.mkdir(exist_ok=True)
        homes = {"XDG_DATA_HOME": str(place / "data"), "XDG_CACHE_HOME": str(place / "cache"), "HOME": str(place)}
        environment = s3_environment(self.proxy.url, key) | homes | {"FEDCLI_WORKSPACE": self.url}
        done = warm()(*arguments, cwd=place, environment=environment)
        assert done.returncode == code, f"{arguments}: {done.returncode}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        assert "a-secret" not in done.stdout + done.stderr
        return done

    def party(self, client: int, *arguments: object, code: int = 0):
        return self.run(PARTY.format(client), *arguments, code=code)

    def join(self, client: int) -> None:
        texts = [{"instruction": f"say {n}", "output": f"{n} it is"} for n in range(4 + client)]
        rows = write_rows(self.folder / f"rows-{client}.jsonl", texts)
        done = self.party(client, "client", "join", "--id", client, "--data", rows, "--json")
        self.run(SERVER, "server", "enrol", "--id", client, "--fingerprint", json.loads(done.stdout)["fingerprint"])

    def objects(self) -> dict[str, bytes]:
        """Return all objects, by their names in the workspace."""
        listing = self.ask(KEY, "GET", f"?prefix={PREFIX}")[1].decode()
        names = [name.removeprefix(f"{PREFIX}/") for name in re.findall("<Key>(.*?)</Key>", listing)]
        return {name: self.ask(KEY, "GET", f"/{PREFIX}/{name}")[1] for name in names}

    def ask(self, key: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Ask the store itself, as any program may that has a key."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"{self.proxy.url}/{self.bucket}{path}"
        request = urllib.request.Request(url, body, {"Authorization": signed_by(key)} | named, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A federation of three parties after its first round; the policy binds server and parties from the start."""
    server = s3_server()
    bucket = new_bucket(server.url)
    with FaultProxy(server.url, guard=federation_policy(bucket, PREFIX, CLIENTS, KEY)) as proxy:
        made = World(tmp_path_factory.mktemp("policy"), proxy, bucket)
        made.run(SERVER, "init", made.url, *settings(*SMALL, "data.source=null", "federation.signatures=required"))
        for client in CLIENTS:
            made.join(client)
        for client in CLIENTS:
            made.party(client, "client", "train", "--id", client)
        made.run(SERVER, "server", "aggregate")
        yield made


@pytest.mark.slow
def test_a_party_joins_trains_looks_and_is_counted(world: World) -> None:
    for client in CLIENTS:
        done = world.party(client, "status", "--json")
        assert json.loads(done.stdout)["round"] == 1
        assert "round 1" in world.party(client, "client", "status", "--id", client).stdout
    manifest = json.loads(world.objects()["rounds/00001/manifest.json"])
    counted = [(entry["client"], entry["num_samples"]) for entry in manifest["aggregation"]["counted"]]
    assert counted == [(0, 4), (1, 5), (2, 6)]
    refused = {(one.method, one.path, one.principal) for one in world.proxy.log if one.status == 403}
    assert {principal for _, _, principal in refused} <= {PARTY.format(client) for client in CLIENTS}
    assert all(method in ("HEAD", "GET") and "/inbox/" in path for method, path, _ in refused), refused


@pytest.mark.slow
def test_a_server_verifies_and_prunes_and_a_party_verifies_what_it_may_see(world: World) -> None:
    assert json.loads(world.run(SERVER, "verify", "--json").stdout)["violations"] == []
    found = json.loads(world.party(0, "verify", "--json").stdout)
    assert (found["violations"], found["num_hidden"]) == ([], 2)


ROUND = f"/{PREFIX}/rounds/00001/manifest.json"
OWN = f"/{PREFIX}/inbox/0/round-00000/update.json"
OTHERS = f"/{PREFIX}/inbox/1/round-00000/update.json"
NEW = {"If_None_Match": "*"}
FORBIDDEN: dict[str, tuple[str, str, dict[str, str]]] = {
    "another's update is read": ("GET", OTHERS, {}),
    "another's update is removed": ("DELETE", OTHERS, {}),
    "another's update is replaced": ("PUT", OTHERS, {}),
    "another's update is created": ("PUT", f"/{PREFIX}/inbox/1/round-00001/update.json", NEW),
    "its own update is replaced": ("PUT", OWN, {}),
    "its own update is replaced where its ETag is the one that it read": ("PUT", OWN, {"If_Match": "*"}),
    "another's registration is replaced": ("PUT", f"/{PREFIX}/clients/1.json", {}),
    "a client is registered whose number begins with its own": ("PUT", f"/{PREFIX}/clients/01.json", NEW),
    "a name is put beside its registration": ("PUT", f"/{PREFIX}/clients/0.json//x", NEW),
    "a name is put beside its registration, with a line break": ("PUT", f"/{PREFIX}/clients/0.%0A/x", NEW),
    "a round is replaced": ("PUT", ROUND, {}),
    "a round is removed": ("DELETE", ROUND, {}),
    "the next round is opened": ("PUT", f"/{PREFIX}/rounds/00002/manifest.json", NEW),
    "an attempt at a round is written": ("PUT", f"/{PREFIX}/rounds/00002/.0123456789abcdef/adapter", {}),
    "the settings are replaced": ("PUT", f"/{PREFIX}/fedcli.yaml", {}),
    "the identity is replaced": ("PUT", f"/{PREFIX}/workspace.json", {}),
    "somebody is enrolled": ("PUT", f"/{PREFIX}/enrolment/00099.json", NEW),
    "an enrolment is removed": ("DELETE", f"/{PREFIX}/enrolment/00001.json", {}),
    "something lies beside the workspace": ("PUT", "/hospitals/study-2/fedcli.yaml", NEW),
    "another's update is copied into its own inbox": (
        "PUT", f"/{PREFIX}/inbox/0/copy", {"x_amz_copy_source": "/BUCKET" + OTHERS},
    ),
    "the policy is replaced": ("PUT", "?policy", {}),
    "the bucket is removed": ("DELETE", "", {}),
    "a multipart upload of a round begins": ("POST", f"{ROUND}?uploads", {}),
}  # fmt: skip


def test_the_documents_forbid_it_all_and_take_no_more_than_a_bucket_has_room_for_with_fifteen_parties() -> None:
    policy = federation_policy("hospitals", PREFIX, range(15), KEY)
    for deed, (method, path, headers) in FORBIDDEN.items():
        named = {
            name.replace("_", "-").lower(): value.replace("BUCKET", "hospitals") for name, value in headers.items()
        }
        target, _, query = path.partition("?")
        asked = Request(method, f"/hospitals{target}", {query: ""} if query else {}, named, b"", PARTY.format(0))
        assert policy(asked, lambda bucket, key: True), deed
    own = Act("s3:PutObject", "hospitals", f"{PREFIX}/inbox/14/x")
    assert [client for client in range(15) if policy.allows(PARTY.format(client), own)] == [14]
    registered = [f"{PREFIX}/clients/3.{name}" for name in ("json", "sig", "leave", "acks/round-00001.sig")]
    assert all(policy.allows(PARTY.format(3), Act("s3:PutObject", "hospitals", name)) for name in registered)
    noted = Act("s3:GetObject", "hospitals", f"{PREFIX}/discarded/3/round-00000.json")
    assert not policy.allows(PARTY.format(3), noted)


@pytest.mark.slow
@pytest.mark.parametrize("deed", FORBIDDEN)
def test_the_store_refuses_a_party(world: World, deed: str) -> None:
    method, path, headers = FORBIDDEN[deed]
    before = world.objects()
    headers = {name: value.replace("BUCKET", world.bucket) for name, value in headers.items()}
    status, answer = world.ask(PARTY.format(0), method, path, b"x" if method in ("PUT", "POST") else None, **headers)
    assert (status, b"<Code>AccessDenied</Code>" in answer) == (403, True)
    assert world.objects() == before


@pytest.mark.slow
def test_many_are_removed_at_once_only_where_each_may_be(world: World) -> None:
    body = f"<Delete><Object><Key>{PREFIX}/inbox/0/x</Key></Object><Object><Key>{OTHERS[1:]}</Key></Object></Delete>"
    before = world.objects()
    assert world.ask(PARTY.format(0), "POST", "?delete", body.encode())[0] == 403
    assert world.objects() == before


@pytest.mark.slow
def test_not_even_the_server_replaces_or_removes_what_was_published(world: World) -> None:
    before = world.objects()
    for method, path in (("PUT", ROUND), ("DELETE", ROUND), ("PUT", OTHERS)):
        assert world.ask(SERVER, method, path, b"x" if method == "PUT" else None)[0] == 403
    assert world.ask(SERVER, "PUT", ROUND, b"x", If_None_Match="*")[0] == 412
    assert world.objects() == before


@pytest.mark.slow
def test_a_key_of_nobody_sees_nothing(world: World) -> None:
    for path in (ROUND, f"/{PREFIX}/nothing-there", f"?prefix={PREFIX}"):
        assert world.ask("AKIANOBODY", "GET", path)[0] == 403


RECORD = (MANIFEST, b"{}")
ACTS: dict[str, Callable[[Store], object]] = {
    "create rounds/00002/": lambda store: store.publish("rounds/00002", [(ADAPTER_NAME, b"x")], RECORD),
    "create inbox/1/": lambda store: store.publish("inbox/1/round-00001", [("x", b"x")], (UPDATE_RECORD, b"{}")),
    "read inbox/1/": lambda store: store.read("inbox/1/round-00000/update.json", 2**20),
    "set aside inbox/1/": lambda store: store.set_aside("inbox/1/round-00000"),
    "write clients/1.json": lambda store: store.put("clients/1.json", b"{}"),
    "create clients/7.json": lambda store: store.put_new("clients/7.json", b"{}"),
    "write fedcli.yaml": lambda store: store.put("fedcli.yaml", b"{}"),
    "write workspace.json": lambda store: store.put("workspace.json", b"{}"),
    "create enrolment/": lambda store: store.put_new_signed("enrolment/00099.json", b"{}", b"sig"),
    "create attempts/": lambda store: store.put_new("attempts/round-00001-0.json", b"{}"),
    "create repair/": lambda store: store.put_new("repair/round-00001-0.json", b"{}"),
    "write discarded/": lambda store: store.put("discarded/1/round-00000.json", b"{}"),
    "write inbox/0/round-00000/update.json": lambda store: store.put("inbox/0/round-00000/update.json", b"{}"),
    "delete rounds/00000/": lambda store: store.delete("rounds/00000"),
    "delete a file of rounds/00000/": lambda store: store.delete(f"rounds/00000/{ADAPTER_NAME}"),
    "delete enrolment/": lambda store: store.delete("enrolment/00001.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("act", ACTS)
def test_what_the_store_forbids_fedcli_says_and_names(world: World, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_environment(world.proxy.url, PARTY.format(0)).items():
        monkeypatch.setenv(name, value)
    before = world.objects()
    with pytest.raises(DeniedError) as refused:
        ACTS[act](workspace_at(world.url).store)
    assert world.objects() == before
    assert (refused.value.exit_code, "docs/STORES.md" in refused.value.hint) == (4, True)
    name = act.rpartition(" ")[2]
    assert re.fullmatch(rf"{world.url} does not let you [a-z ]+ {name}\S*", refused.value.message), refused.value


COMMANDS: dict[str, tuple[object, ...]] = {
    "merges": ("server", "aggregate", "--partial"),
    "discards": ("server", "discard", "--id", 1),
    "enrols": ("server", "enrol", "--id", 1, "--fingerprint", "0000-" * 7 + "0000"),
    "joins as another": ("client", "join", "--id", 1, "--data", "rows.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("deed", COMMANDS)
def test_fedcli_says_what_a_party_may_not_do_and_changes_nothing(world: World, deed: str) -> None:
    place = world.folder / PARTY.format(0)
    write_rows(place / "rows.jsonl", [{"instruction": "say 1", "output": "1"}] * 3)
    before = world.objects()
    done = world.party(0, *COMMANDS[deed], code=4)
    assert world.objects() == before
    assert done.stderr.startswith("fedcli: error: ")
