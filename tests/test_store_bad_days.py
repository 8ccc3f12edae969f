"""A store on a bad day: what may be asked again is, and a create-only write knows whether it was its own that won."""

import re

import pytest
from support.fault_proxy import KINDS, FaultProxy, Faults
from support.federation import configure, train_as
from support.object_stores import upload
from support.servers import new_bucket, s3_environment, s3_server

from fedcli import Federation
from fedcli.cli import main
from fedcli.errors import WorkspaceError
from fedcli.stores import cloud
from fedcli.stores.objects import Objects
from fedcli.stores.url import open_objects

QUICK = ("409", "truncated")
"""Of the kinds, those that the default suite tries."""


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_bad_day_costs_time_and_nothing_else(kind, monkeypatch):
    server = s3_server()
    bucket = new_bucket(server.url)
    with FaultProxy(server.url, Faults({kind: 0.25}, seed=3)) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        objects = open_objects(f"s3://{bucket}/study")
        for number in range(6):
            name = f"rounds/{number}.json"
            assert objects.create(name, b"first" * 20)
            assert not objects.create(name, b"second")
            for _ in range(2):  # a cache may have what was asked before
                assert objects.get(name, 2**20) == b"first" * 20
            assert objects.head("rounds/nothing.json") is None
            assert objects.get_part(name, 5, 9) == b"firs"
            objects.put("settings", str(number).encode())
            objects.put(f"passing/{number}", b"x")
            objects.delete(f"passing/{number}")
        assert set(objects.below("")) == {*(f"rounds/{number}.json" for number in range(6)), "settings"}
        assert objects.names("rounds") == [f"{number}.json" for number in range(6)]
        assert proxy.faults.counts[kind] >= 1


@pytest.fixture
def down(monkeypatch: pytest.MonkeyPatch) -> tuple[FaultProxy, Objects]:
    """A store that has an object, and does not answer any more; nobody waits long for it."""
    monkeypatch.setitem(cloud.RETRIES, "max_retries", 1)
    monkeypatch.setattr(cloud, "_CONFLICTS", 2)
    monkeypatch.setattr(cloud, "_BREAKS", 2)
    server = s3_server()
    proxy = FaultProxy(server.url)
    for name, value in s3_environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    objects = open_objects(f"s3://{new_bucket(server.url)}/study")
    objects.put("there", b"x")
    proxy.stop()
    return proxy, objects


def test_a_store_that_does_not_answer_is_told_of_in_one_line_and_comes_back(down):
    proxy, objects = down
    for call in (
        lambda: objects.get("there", 9),
        lambda: objects.head("there"),
        lambda: objects.put("new", b"x"),
        lambda: objects.create("new", b"x"),
        lambda: objects.below(""),
        lambda: objects.names(""),
        lambda: objects.delete("there"),
    ):
        with pytest.raises(WorkspaceError) as told:
            call()
        assert re.search("no answer from http://127.0.0.1|the connection breaks off", told.value.message)
        assert "goes on where it was" in told.value.hint
    proxy.start()
    assert objects.get("there", 9) == b"x"
    proxy.stop()


@pytest.mark.slow
@pytest.mark.parametrize("ignores", [False, True])
def test_doctor_refuses_a_store_that_ignores_the_condition_and_no_other(ignores, monkeypatch, capsys):
    server = s3_server()
    with FaultProxy(server.url, strips=("if-none-match",) if ignores else ()) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        url = f"s3://{new_bucket(server.url)}/study"
        code = main(["doctor", "-w", url])
    told = capsys.readouterr()
    assert ("ignores its condition" in told.out) == ignores, told
    assert code == 8  # of a URL at which no workspace lies; a store that will not do is no reason less


@pytest.mark.slow
def test_what_a_round_costs_does_not_grow_with_the_rounds_before_it(small, tmp_path, monkeypatch):
    configure(small, "federation.rounds=9")
    server = s3_server()
    with FaultProxy(server.url) as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        url = upload(small, f"s3://{new_bucket(server.url)}/study")
        requests = []
        for _ in range(8):
            proxy.forget()
            for client in range(3):
                train_as(client, url)
            Federation.open(url).server.aggregate()
            requests.append(proxy.count())
    assert max(requests) <= min(requests) + 3, requests
