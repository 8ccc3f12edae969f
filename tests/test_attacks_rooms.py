"""Garbage in clients/, the inbox or a manifest stops nobody but whom it names; what a server asks for is bounded."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.federation import all_take_part
from support.processes import Run, fedcli, results, runner

from fedcli import Federation
from fedcli.cli import main
from fedcli.errors import IntegrityError, NotReadyError
from fedcli.workspace import registrations
from fedcli.workspace.history import read_head, read_identity
from fedcli.workspace.layout import Workspace


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


def write(contents: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(contents)


GARBAGE: dict[str, Callable[[Path], object]] = {
    "no UTF-8": write(b"\xff\x00"),
    "nothing": write(b""),
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "another client's": write(b'{"protocol":1,"workspace":"x","client":0,"data":{"num_rows":1}}'),
    "deep JSON": write(b"[" * 60_000),
    "large": write(b" " * 10**5),
    "a FIFO": os.mkfifo,
}


@pytest.mark.slow
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("is_simulation", [True, False])
def test_garbage_as_a_registration_keeps_no_other_client_from_its_work(
    small: Path, run: Run, monkeypatch: pytest.MonkeyPatch, garbage: Callable[[Path], object], is_simulation: bool
) -> None:
    monkeypatch.chdir(small)
    path = small / "workspace.json"
    identity = json.loads(path.read_bytes())
    path.write_text(json.dumps(identity if is_simulation else {k: v for k, v in identity.items() if k != "simulation"}))
    garbage(small / "clients/2.json")
    assert 2 not in results(run, "status")["joined"]
    done = fedcli("client", "train", "--any", "--json", cwd=small)
    assert done.returncode == 0, done.stderr
    assert {each["client"] for each in json.loads(done.stdout)["clients"]} == ({0, 1, 2} if is_simulation else {0, 1})
    assert run("export", "out")[0] == 0
    assert run("report")[0] == 0


def test_an_update_of_a_user_who_has_not_joined_does_not_count_as_an_answer(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_take_part(small)
    monkeypatch.setattr(registrations, "is_stranger", lambda _, owner: owner == 77)
    owner = type(Workspace(small).store).owner
    monkeypatch.setattr(
        type(Workspace(small).store), "owner", lambda self, name: 77 if name == "inbox/2" else owner(self, name)
    )
    federation = Federation.open(small)
    status = federation.status()
    assert (status.answered, status.missing) == ([0, 1], [2])
    with pytest.raises(NotReadyError, match="sent by a user who has not joined: 2"):
        federation.server.aggregate()


@pytest.mark.parametrize(
    "what",
    ["empty folder", "a file", "a link", "a link to nothing", "a folder of garbage"],
)
def test_garbage_in_the_place_of_an_update_stops_no_round(small: Path, what: str) -> None:
    all_take_part(small)
    update = small / "inbox/2/round-00000"
    shutil.rmtree(update)
    deeds: dict[str, Callable[[], object]] = {
        "empty folder": update.mkdir,
        "a file": update.touch,
        "a link": lambda: update.symlink_to(small / "inbox/1/round-00000"),
        "a link to nothing": lambda: update.symlink_to("nowhere"),
        "a folder of garbage": lambda: shutil.copytree(small / "data", update),
    }
    deeds[what]()
    result = Federation.open(small).server.aggregate(partial=True)
    assert result.aggregation is not None
    assert [entry.client for entry in result.aggregation.counted] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [1.7e308, -1.7e308, 2e9])
def test_a_loss_that_nobody_can_draw_is_told_and_left_out_of_the_report(
    small: Path, run: Run, monkeypatch: pytest.MonkeyPatch, loss: float
) -> None:
    monkeypatch.chdir(small)
    all_take_part(small)
    path = small / "inbox/1/round-00000/update.json"
    record = json.loads(path.read_bytes())
    record.pop("checksum", None)
    path.write_text(json.dumps(record | {"train_loss": loss}))
    Federation.open(small).server.aggregate()
    code, _, err = run("report")
    assert code == 0
    assert f"losses beyond 1e+09 are left out: 1, such as {loss:.3g} by client 1 in round 0" in err
    assert main(["verify"]) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 10**9), ("steps", 0), ("batch_size", 10**9), ("micro_batch_size", 10**9), ("max_length", 10**9),
        ("learning_rate", 1e300), ("learning_rate", -1.0), ("weight_decay", -1.0), ("max_grad_norm", 0.0),
        ("max_grad_norm", float("inf")),
    ],
)  # fmt: skip
def test_a_round_that_asks_for_what_never_ends_is_refused(small: Path, key: str, value: float) -> None:
    path = small / "rounds/00000/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["train"][key] = value
    path.write_text(json.dumps(manifest))
    workspace = Workspace(small)
    with pytest.raises(IntegrityError, match=key if value != float("inf") else "JSON"):
        read_head(workspace, read_identity(workspace))
