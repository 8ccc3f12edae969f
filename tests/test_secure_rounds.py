"""Rounds of secure aggregation: the sum is the plain one, and nothing else is ever known to the server."""

import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import secure_client
import yaml
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from support.federation import configure
from support.processes import SMALL, settings, warm
from support.secure import ROWS, Party, differences, journal, make, merge, used, visit
from support.warm import Place

import fedcli.client.secure_round
from fedcli import Federation, Observer
from fedcli.algos import FedAvg
from fedcli.client.due import train_client
from fedcli.errors import ConfigError, FedError, IntegrityError, NotReadyError, UsageError
from fedcli.operations.run import run_federation
from fedcli.parties.membership import rotate
from fedcli.secure_aggregation.fixed_point import from_ring, to_ring
from fedcli.server.enrol import open_trust
from fedcli.trust.keys import KeyPair
from fedcli.workspace.floors import Asked, Floors, faults
from fedcli.workspace.history import read_identity
from fedcli.workspace.inbox import read_update
from fedcli.workspace.layout import Workspace, default_home, server_home
from fedcli.workspace.parsing import sha256
from fedcli.workspace.privacy_records import PrivacyRecord
from fedcli.workspace.refusal import Refusal

slow = pytest.mark.slow
OTHER = X25519PrivateKey.generate()


@pytest.fixture(scope="session")
def pairwise(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parties whose updates have pairwise masks; never changed."""
    return make(small_template, tmp_path_factory.mktemp("pairwise"), "pairwise", 4)


@pytest.fixture(scope="session")
def double(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parties whose updates have a mask of their own, too; never changed."""
    return make(small_template, tmp_path_factory.mktemp("double"), "double", 4)


@pytest.fixture(params=["pairwise", "double"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of either."""
    return used(request.getfixturevalue(request.param), tmp_path, monkeypatch)


def mode_of(workspace: Path) -> str:
    return Federation.open(workspace).round(0).manifest.secure_aggregation


def weighted_mean(workspace: Path, clients) -> dict[str, np.ndarray]:
    """Return the plain mean of what these clients' trainings add, by their rows."""
    total = sum(ROWS[client] for client in clients)
    found = [(ROWS[client], differences(workspace, client)) for client in clients]
    return {name: sum(rows * each[name] for rows, each in found) / total for name in found[0][1]}


def check_mean(workspace: Path, number: int, mean: dict[str, np.ndarray]) -> None:
    """The round is the one before with this mean added, to half a unit of the ring for each client, and float32's."""
    federation = Federation.open(workspace)
    before, after = federation.round(number - 1).adapter(), federation.round(number).adapter()
    for name, array in mean.items():
        exact = before[name].astype(np.float64) + array
        assert (abs(after[name] - exact) <= 2.0**-32 + np.spacing(abs(exact).astype(np.float32)) / 2).all()


def problems(workspace: Path) -> list[str]:
    return [f"{each.path}: {each.problem}" for each in Federation.open(workspace).verify().violations]


def test_without_drop_outs_a_pairwise_round_takes_one_visit(
    pairwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = used(pairwise, tmp_path, monkeypatch)
    mean = weighted_mean(place, range(4))
    assert visit(place, 0, 1, 2, 3, 0) == ["submitted"] * 4 + ["already_submitted"]
    done = merge(place)
    check_mean(place, 1, mean)
    assert (done.status, done.aggregation.secure.weight) == ("published", float(sum(ROWS[each] for each in range(4))))
    withheld = [(each.weight, each.num_samples, each.train_loss, each.delta_norm) for each in done.aggregation.counted]
    assert withheld == [(None,) * 4] * 4
    assert not (place / "repair").exists()
    assert Federation.open(place).verify().num_recomputed == 1
    assert problems(place) == []


def test_with_a_drop_out_the_others_answer_and_the_sum_is_that_of_those_counted(place: Path) -> None:
    mean = weighted_mean(place, (0, 1, 3))
    assert visit(place, 0, 1, 3) == ["submitted"] * 3
    with pytest.raises(NotReadyError, match="missing: 2"):
        merge(place)
    with pytest.raises(NotReadyError, match=r"waits for their clients' answers .*: 0, 1, 3"):
        merge(place, partial=True)
    assert visit(place, 2, 0, 1) == ["too_late", "answered", "answered"]
    assert Federation.open(place).status().next_command == "fedcli client train --id 3"
    with pytest.raises(NotReadyError, match="1 more answers"):
        merge(place)
    assert visit(place, 3, 3) == ["answered", "already_answered"]
    assert merge(place).aggregation.missing == [2]
    check_mean(place, 1, mean)
    assert problems(place) == []
    assert Federation.open(place).verify().num_recomputed == 1
    assert visit(place, 0, 1, 2, 3) == ["submitted"] * 4, "the next round has an attempt of its own"


@slow
def test_double_needs_no_more_answers_than_its_threshold(
    double: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = used(double, tmp_path, monkeypatch)
    mean = weighted_mean(place, range(4))
    visit(place, 0, 1, 2, 3)
    with pytest.raises(NotReadyError, match="answers"):
        merge(place)
    assert visit(place, 3, 1) == ["answered"] * 2
    with pytest.raises(NotReadyError, match="1 more answers to its repair, of: 0, 2"):
        merge(place)
    visit(place, 0)
    assert sorted(merge(place).aggregation.secure.answers) == ["0", "1", "3"]
    check_mean(place, 1, mean)
    assert problems(place) == []


@slow
@pytest.mark.parametrize("mode", ["pairwise", "double"])
@pytest.mark.parametrize("algorithm", ["scaffold", "fedadam"])
def test_control_variates_travel_inside_and_unweighted_algorithms_weigh_the_same(
    small_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, algorithm: str
) -> None:
    folder = make(small_template, tmp_path, mode, 3, algorithm=algorithm, rounds=3)
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
    workspace = folder / "W"
    for number in range(2):
        visit(workspace, 0, 1, 2)
        if mode == "double":
            with pytest.raises(NotReadyError, match="answers"):
                merge(workspace)
            visit(workspace, 0, 1, 2)
        found = [differences(workspace, client) for client in range(3)]
        manifest = Federation.open(workspace).round(number).manifest
        done = merge(workspace).aggregation
        assert done.secure.weight == (9.0 if algorithm == "scaffold" else 3.0)
        if algorithm == "scaffold" and number == 0:
            scale = manifest.train.steps * manifest.train.learning_rate
            control = Federation.open(workspace).round(1)
            stored = control.arrays("control.safetensors", manifest.tensors)
            for name, array in stored.items():
                exact = -sum(each[name] for each in found) / scale / 3
                assert np.allclose(array, exact, rtol=1e-6, atol=1e-6)
    assert problems(workspace) == []


@slow
def test_an_update_that_does_not_fit_is_not_sent(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, 1, 3)
    honest = Party.train
    monkeypatch.setattr(
        Party, "train", lambda self, adapter, train, **rest: ({n: a + 1e6 for n, a in adapter.items()}, [1.0])
    )
    with pytest.raises(ConfigError, match=r"client 1's update does not fit .* 3e\+06 is not between"):
        visit(place, 1)
    monkeypatch.setattr(Party, "train", honest)
    assert visit(place, 1) == ["submitted"]


# What the server can read


def readable(workspace: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield every file of the workspace and of the server's own home, but for what it publishes of rounds."""
    identity = read_identity(Workspace(workspace)).id
    for folder in (workspace, server_home(identity).folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_relative_to(workspace / "rounds"):
                yield path, path.read_bytes()


def forms_of(values: np.ndarray, origin: np.ndarray, weight: float) -> dict[str, bytes]:
    """Return some numbers of an update in every form that they might stand in."""
    change = values.astype(np.float64) - origin
    return {
        "values": values.astype("<f4").tobytes(),
        "changes": change.astype("<f4").tobytes(),
        "changes in float64": change.tobytes(),
        "weighted changes": (weight * change).tobytes(),
        "fixed point": to_ring(change, weight).tobytes(),
        "fixed point, unweighted": to_ring(change).tobytes(),
        "half": values.astype("<f2").tobytes(),
    }


def check_nothing_is_readable(workspace: Path, number: int = 0) -> None:
    """No byte that the server can read holds two numbers in a row of any update, nor a weight, a loss or a seed."""
    federation = Federation.open(workspace)
    base = federation.round(number)
    adapter = base.adapter()
    answered = Federation.open(workspace).round().number > number or (workspace / "repair").exists()
    for client in [client for client in base.manifest.cohort if client != 2]:  # who never came
        wanted: dict[str, bytes] = {}
        values, losses = Party().train(adapter, base.manifest.train, party=type("P", (), {"client": client}), rule=None)
        for name, array in values.items():
            flat, origin = array.reshape(-1), adapter[name].reshape(-1)
            for begin in (0, array.size // 2, array.size - 2):
                for form, data in forms_of(flat[begin : begin + 2], origin[begin : begin + 2], ROWS[client]).items():
                    wanted[f"{form} of {name} at {begin}"] = data
        wanted["loss"] = f"{losses[0]}".encode()
        wanted["packed loss"] = struct.pack("<d", losses[0])
        wanted["num_samples"] = b"num_samples"
        kept = journal(workspace, client, number)
        secret = {} if answered else {**kept["seeds"], "own": kept["own"]}
        wanted |= {f"secret {key}": value.encode() for key, value in secret.items() if value}
        wanted |= {f"raw secret {key}": bytes.fromhex(value) for key, value in secret.items() if value}
        for path, contents in readable(workspace):
            for what, data in wanted.items():
                assert data not in contents, f"{path} holds client {client}'s {what}"


@slow
def test_no_byte_that_the_server_can_read_is_of_an_unmasked_update(place: Path) -> None:
    visit(place, 0, 1, 3)
    check_nothing_is_readable(place)
    with pytest.raises(NotReadyError):
        merge(place, partial=True)
    visit(place, 0, 1, 3)
    check_nothing_is_readable(place)
    merge(place)
    check_nothing_is_readable(place)


# A server that lies


class Lying:
    """A server with the keys of the true one, which signs what it likes."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.trust = open_trust(Workspace(workspace), read_identity(Workspace(workspace)))
        assert self.trust is not None

    def rewrite(self, name: str, purpose: str, **changes: object) -> None:
        """Put another record in the place of a signed one, and sign it."""
        path = self.workspace / name
        document = json.loads(path.read_bytes()) | changes
        document.pop("checksum", None)
        contents = json.dumps({key: value for key, value in document.items() if value is not ...}).encode()
        path.write_bytes(contents)
        path.with_suffix(".sig").write_bytes(self.trust.sign(purpose, contents))

    def repair(self, **changes: object) -> None:
        """Ask for another repair."""
        self.rewrite("repair/round-00000-0.json", "repair", **changes)

    def updates(self, *clients: int) -> dict[str, str]:
        """Return the hashes of updates that lie in the inbox."""
        found = {str(client): self.workspace / f"inbox/{client}/round-00000/update.json" for client in clients}
        return {client: sha256(path.read_bytes()) for client, path in found.items()}


@pytest.fixture
def repaired(place: Path) -> Path:
    """A place where clients 0, 1 and 3 are asked, and none has answered."""
    visit(place, 0, 1, 3)
    with pytest.raises(NotReadyError):
        merge(place, partial=True)
    return place


def refuses(workspace: Path, client: int, match: str) -> None:
    """A client refuses, and nothing of it lies there afterwards."""
    with pytest.raises(IntegrityError, match=match):
        visit(workspace, client)
    assert not (workspace / f"inbox/{client}/repair-00000-0").exists()


@slow
def test_a_client_answers_one_repair_of_a_round_and_no_other(repaired: Path) -> None:
    visit(repaired, 0)
    (kept,) = [path.read_bytes() for path in repaired.glob("inbox/0/repair-*/answer.json")]
    shutil.rmtree(repaired / "inbox/0/repair-00000-0")
    assert visit(repaired, 0) == ["answered"], "the same once more"
    assert [path.read_bytes() for path in repaired.glob("inbox/0/repair-*/answer.json")] == [kept]
    visit(repaired, 2)
    shutil.rmtree(repaired / "inbox/0/repair-00000-0")
    lying = Lying(repaired)
    lying.repair(counted=lying.updates(0, 1, 3), dropped=[2], note="another")
    refuses(repaired, 0, "has answered another repair of this round")


@slow
def test_a_client_refuses_every_other_question(repaired: Path) -> None:
    lying, path = Lying(repaired), repaired / "repair/round-00000-0.json"
    kept, signature = path.read_bytes(), path.with_suffix(".sig").read_bytes()
    updates = lying.updates(0, 1, 3)
    asked: dict[str, dict[str, object]] = {
        "it sums 2 of 4 clients, and 3 are needed": {"counted": lying.updates(0, 1), "dropped": [2, 3]},
        "it sums 1 of 4": {"counted": lying.updates(0), "dropped": [1, 2, 3]},
        "it counts clients that it says are missing": {"counted": updates, "dropped": [1, 2]},
        "exactly once": {"counted": updates, "dropped": []},
        "it counts another update of client 0": {"counted": updates | {"0": "0" * 64}},
        "of another workspace, round or attempt": {"attempt": 1},
        "of another workspace, round": {"round": 1},
        "of another workspace": {"workspace": "elsewhere"},
        "of another manifest": {"base": "0" * 64},
        "it is of another attempt": {"started": "0" * 64},
        "is damaged": {"counted": {"-1": "0" * 64}},
    }
    for told, changes in asked.items():
        path.write_bytes(kept)
        lying.repair(**changes)
        refuses(repaired, 0, told)
    path.write_bytes(kept)
    path.with_suffix(".sig").write_bytes(signature[:20])
    refuses(repaired, 0, "is not signed by the server")
    path.with_suffix(".sig").write_bytes(lying.trust.sign("round", kept))
    refuses(repaired, 0, "is not signed by the server")
    path.with_suffix(".sig").write_bytes(signature)
    assert visit(repaired, 0) == ["answered"]


@slow
def test_a_second_attempt_of_a_round_is_refused(place: Path) -> None:
    visit(place, 0, 1, 3)
    lying = Lying(place)
    lying.rewrite("attempts/round-00000-0.json", "attempt", cohort=[0, 1, 3])
    shutil.rmtree(place / "inbox/0/round-00000")
    with pytest.raises(IntegrityError, match="is not the attempt that client 0 has masked its update for"):
        visit(place, 0)
    assert visit(place, 2) == ["too_late"]
    for changes, told in (
        ({"cohort": [1, 2]}, "2 of 4 clients take part, and 3 are needed"),
        ({"cohort": [0, 1, 2, 3], "mode": "pairwise" if mode_of(place) == "double" else "double"}, "of another kind"),
        ({"mode": mode_of(place), "cohort": [0, 1, 2, 7]}, "not of the round's cohort"),
        ({"cohort": [0, 1, 2, 3], "enrolment": {"number": 0, "sha256": "0" * 64}}, "an enrolment that is not"),
        ({"attempt": 1}, "of another workspace, round or attempt"),
    ):
        lying.rewrite("attempts/round-00000-0.json", "attempt", **changes)
        with pytest.raises(IntegrityError, match=told):
            visit(place, 2)
    assert not (place / "inbox/2/round-00000").exists()


@slow
def test_what_the_two_sums_of_one_round_would_tell_is_never_known(place: Path) -> None:
    """Whatever is asked in whatever order: each client answers at most once, so no set but one is summed."""
    visit(place, 0, 1, 2, 3)
    lying = Lying(place)
    if mode_of(place) == "double":
        with pytest.raises(NotReadyError):
            merge(place)
    else:
        (place / "repair").mkdir()
        (place / "repair/round-00000-0.json").write_text("{}")
        record = json.loads((place / "attempts/round-00000-0.json").read_bytes())
        facts = {key: record[key] for key in ("protocol", "workspace", "round", "attempt", "base")}
        facts |= {"started": sha256((place / "attempts/round-00000-0.json").read_bytes()), "shares": None}
        lying.repair(**facts, counted=lying.updates(0, 1, 2, 3), dropped=[])
        refuses(place, 0, "nobody is missing")
        return
    kept = (place / "repair/round-00000-0.json").read_bytes()
    visit(place, 0, 1)
    lying.repair(counted=lying.updates(0, 1, 2), dropped=[3])
    for client in (0, 1):
        shutil.rmtree(place / f"inbox/{client}/repair-00000-0")
        refuses(place, client, "has answered another repair")
    assert visit(place, 2, 3) == ["answered", "too_late"]
    with pytest.raises(NotReadyError, match="2 more answers"):
        merge(place)
    (place / "repair/round-00000-0.json").write_bytes(kept)
    lying.repair()
    with pytest.raises(FedError):
        merge(place)


# Another implementation


def test_the_page_s_client_is_summed_with_fedcli_s(place: Path) -> None:
    folder, identity = place.parent, read_identity(Workspace(place)).id
    keys = KeyPair.read(default_home(identity, 1).keys)
    add = {1: 0.25}
    mean = {
        name: sum(ROWS[each] * (add[each] if each in add else own[name]) for each, own in found.items()) / 10
        for found in [{each: differences(place, each) for each in (0, 1, 3)}]
        for name in found[0]
    }
    party = secure_client.Party(str(place), str(folder / "home-1"), 1, keys.signing, keys.sealing)
    party.drop(lambda array: array + np.float32(0.25), ROWS[1])
    visit(place, 0, 3)
    with pytest.raises(NotReadyError, match="answers"):
        merge(place, partial=True)
    visit(place, 0, 3)
    party.answer()
    assert merge(place).aggregation.missing == [2]
    before, after = (Federation.open(place).round(number).adapter() for number in (0, 1))
    for name, array in mean.items():
        assert abs(after[name].astype(np.float64) - before[name] - array).max() < 2.0**-20
    assert problems(place) == []


def test_the_page_s_client_needs_few_lines_and_no_fedcli() -> None:
    text = Path(secure_client.__file__).read_text()
    assert len(text.splitlines()) <= 120
    assert "import fedcli" not in text
    assert "from fedcli" not in text


# By commands


@slow
def test_three_parties_join_and_two_rounds_are_masked_by_commands_pairwise_and_then_double(tmp_path: Path) -> None:
    place = Place(tmp_path, warm())
    place("init", "W", *settings(*SMALL, "data.source=null", "privacy.secure_aggregation=pairwise"))
    assert "cannot be masked yet: 0 of its 3" in place("server", "aggregate", code=6).stderr
    told = {}
    for client in range(3):
        floors = ("--floor", "secure=required") if client else ()
        rows = place.rows(f"rows-{client}.jsonl", 6 + client)
        told[client] = json.loads(place.join(client, rows, "--share", "minimal", *floors, "--json").stdout)[
            "fingerprint"
        ]
    assert "waits until its clients are enrolled" in place.train(0).stdout
    for client in range(3):
        place("server", "enrol", "--id", client, "--fingerprint", told[client])
    assert "pairwise: waits for masked updates, 3 or more" in place("status").stdout
    for client in range(3):
        assert "dropped its update" in place.train(client).stdout
        assert "has been sent" in place.train(client).stdout
    configure(tmp_path / "W", "privacy.secure_aggregation=double")
    assert "round 1 is open" in place("server", "aggregate").stdout
    for client in range(3):
        place.train(client)
    waits = place("server", "aggregate", code=6).stderr
    assert "waits for their clients' answers" in waits
    assert "fedcli client train --id 0" in place("status").stderr
    for client in range(3):
        assert "answered the repair of round 1" in place.train(client).stdout
    assert "round 2 is finished" in place("server", "aggregate").stdout
    place("verify")
    place("report")
    place("gc")
    first = json.loads((tmp_path / "W/rounds/00001/manifest.json").read_bytes())
    assert first["aggregation"]["secure"]["weight"] == 21.0
    assert "masked: nobody but the client" in place("eval", "run", "demo", "--client", 0, "--limit", 1, code=6).stderr
    refused = place("client", "train", "--id", 0, "--home", "H0")
    assert "finished" in refused.stdout


# What goes wrong


@slow
def test_a_party_s_floor_wins_over_what_the_round_has(
    pairwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = used(pairwise, tmp_path, monkeypatch)
    client = Federation.open(place).client(0)
    client.join(place.parent / "rows-0.jsonl", floors=["secure=double"]).commit()
    with pytest.raises(ConfigError, match="sends what was learnt masked pairwise, and your floor is secure=double"):
        visit(place, 0)
    client.join(place.parent / "rows-0.jsonl", floors=["secure=required"]).commit()
    assert visit(place, 0) == ["submitted"]
    asked = Asked.by(Federation.open(place).round(0).manifest, 5)
    assert faults(Floors(secure="required"), replace(asked, secure=None))[0][1] == "secure=any"
    baseline = Asked.by(Federation.open(place).round(0).manifest, 5, Federation.open(place).round(0).manifest.train)
    assert faults(Floors(secure="required"), baseline), "a baseline is published as it is"


CONFLICTS = {
    "aggregation.rule=median": r"secure_aggregation: pairwise and aggregation\.rule: median exclude",
    "aggregation.weight_cap=3.0": r"secure_aggregation: pairwise and aggregation\.weight_cap exclude",
    "federation.signatures=off": r"secure_aggregation: pairwise and federation\.signatures: off exclude",
    "federation.per_round=2": r"needs 3 or more clients a round, and 2 count",
    "federation.per_round=3 federation.select=4": r"secure_aggregation: pairwise and federation\.select exclude",
    "federation.clients=600": r"is for 512 clients a round or fewer, and 600 count",
    "privacy.unit=client privacy.clip=1 privacy.noise=1": "unit is client and secure_aggregation is pairwise",
}


@pytest.mark.parametrize("settings", CONFLICTS)
def test_what_excludes_secure_aggregation_is_named_with_it(settings: str, tmp_path: Path) -> None:
    given = dict(part.split("=") for part in settings.split())
    chosen = {key: yaml.safe_load(value) for key, value in given.items()}
    with pytest.raises(ConfigError, match=CONFLICTS[settings]):
        Federation.create(
            tmp_path / "W", settings={"privacy.secure_aggregation": "pairwise", "data.source": None} | chosen
        )
    assert not (tmp_path / "W").exists()


def test_a_simulation_has_no_keys_and_so_no_masks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the clients of a simulation have no keys"):
        Federation.create(tmp_path / "W", settings={"privacy.secure_aggregation": "double"})
    assert not (tmp_path / "W").exists()


@slow
def test_what_was_set_aside_is_sent_again_as_it_was_and_after_a_repair_nothing_is(place: Path) -> None:
    visit(place, 0, 1, 3)
    sent = {path.name: path.read_bytes() for path in (place / "inbox/0/round-00000").iterdir()}
    assert Federation.open(place).server.discard(0)
    assert not list((place / "inbox/0").iterdir())
    Party.trained = 0
    assert visit(place, 0) == ["submitted"]
    assert Party.trained == 0
    assert {path.name: path.read_bytes() for path in (place / "inbox/0/round-00000").iterdir()} == sent
    with pytest.raises(NotReadyError):
        merge(place, partial=True)
    with pytest.raises(UsageError, match="has a repair"):
        Federation.open(place).server.discard(0)


@slow
def test_who_left_after_it_sent_is_not_unmasked(place: Path) -> None:
    visit(place, 0, 1, 2, 3)
    Federation.open(place).client(2).leave()
    if mode_of(place) == "pairwise":
        with pytest.raises(NotReadyError, match=r"cannot go on without client 2: inbox/2/round-00000 lies there"):
            merge(place, partial=True)
        assert not (place / "repair").exists()
        Federation.open(place).server.discard(2)
    with pytest.raises(NotReadyError, match="waits for their clients' answers"):
        merge(place, partial=True)
    assert visit(place, 0, 1, 3) == ["answered"] * 3
    assert merge(place).aggregation.missing == [2]
    assert problems(place) == []


def masked_elsewhere(place: Path, client: int) -> Path:
    """Return the update that a client masks in a copy of workspace and home: one that is still to come here."""
    copy = Path(shutil.copytree(place.parent, place.parent.with_name("beside")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(copy / "data"))
        visit(copy / "W", client)
    return copy / f"W/inbox/{client}/round-00000"


@slow
def test_an_update_that_comes_after_the_repair_is_taken_back(place: Path) -> None:
    late = masked_elsewhere(place, 2)
    visit(place, 0, 1, 3)
    with pytest.raises(NotReadyError):
        merge(place, partial=True)
    shutil.copytree(late, place / "inbox/2/round-00000")
    assert visit(place, 2) == ["too_late"]
    assert (place / "inbox/2/round-00000").exists() == (mode_of(place) == "double")
    visit(place, 0, 1, 3)
    assert merge(place).aggregation.missing == [2]
    assert problems(place) == []


@slow
def test_what_a_kill_left_of_a_late_update_is_removed_in_a_later_round(
    pairwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = used(pairwise, tmp_path, monkeypatch)
    late = masked_elsewhere(place, 2)
    visit(place, 0, 1, 3)
    with pytest.raises(NotReadyError):
        merge(place, partial=True)
    visit(place, 0, 1, 3)
    merge(place)
    shutil.copytree(late, place / "inbox/2/round-00000")
    visit(place, 2)
    assert not (place / "inbox/2/round-00000").exists()
    assert (place / "inbox/2/round-00001").exists()


@slow
def test_a_party_whose_journal_is_gone_does_not_mask_other_numbers(place: Path) -> None:
    visit(place, 2)
    shutil.rmtree(place / "inbox/2/round-00000")
    for path in (place.parent / "data").rglob("secure"):
        if "/2/" in f"{path}/":
            shutil.rmtree(path)
    with pytest.raises(IntegrityError, match="other numbers under the same masks"):
        visit(place, 2)
    assert not (place / "inbox/2/round-00000").exists()


@slow
def test_pairwise_asks_for_no_repair_while_anything_of_a_missing_client_lies_there(
    pairwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = used(pairwise, tmp_path, monkeypatch)
    visit(place, 0, 1, 2, 3)
    own = place / "inbox/2"
    for name in (".discarded-round-00000-abc", ".tmp-of-another-program"):
        (own / "round-00000").rename(own / name)
        with pytest.raises(NotReadyError, match=rf"inbox/2/{name} lies there"):
            merge(place, partial=True)
        (own / name).rename(own / "round-00000")
    (own / "round-00000/masked.safetensors").write_bytes(b"x")
    with pytest.raises(NotReadyError, match="would tell the server what is in it"):
        merge(place, partial=True)
    assert not (place / "repair").exists()


@slow
def test_a_round_without_its_sum_is_ended_and_the_next_one_goes_on(place: Path) -> None:
    visit(place, 0, 1, 3)
    with pytest.raises(NotReadyError):
        merge(place, partial=True)
    visit(place, 0)
    before = Federation.open(place).round().adapter()
    assert merge(place, abandon=True).aggregation.counted == []
    after = Federation.open(place).round().adapter()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    found = Federation.open(place).verify()
    assert found.violations == []
    assert any("was abandoned" in remark.problem for remark in found.remarks)
    assert visit(place, 0, 1, 2, 3) == ["submitted"] * 4


@slow
def test_a_plain_round_is_not_abandoned(small: Path) -> None:
    with pytest.raises(UsageError, match="has no secure aggregation"):
        merge(small, abandon=True)


@slow
def test_with_fewer_than_three_enrolled_no_round_is_opened(place: Path) -> None:
    visit(place, 0, 1, 2, 3)
    if mode_of(place) == "double":
        with pytest.raises(NotReadyError):
            merge(place)
        visit(place, 0, 1, 2, 3)
    else:
        (place / "inbox/3/round-00000").rename(place.parent / "kept")
        with pytest.raises(NotReadyError):
            merge(place, partial=True)
        visit(place, 0, 1, 2)
    for client in (1, 2):
        Federation.open(place).server.revoke(client)
    with pytest.raises(NotReadyError, match="round 1 cannot be opened: 2 clients are enrolled"):
        merge(place)


@slow
def test_masks_of_other_keys_and_sums_that_are_none_stop_the_merge(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fedcli.client.secure_round.make_secrets
    monkeypatch.setattr(
        fedcli.client.secure_round, "make_secrets", lambda terms, key, client: honest(terms, OTHER, client)
    )
    visit(place, 1)
    monkeypatch.setattr(fedcli.client.secure_round, "make_secrets", honest)
    visit(place, 0, 2, 3)
    with pytest.raises(IntegrityError, match="the masks of clients 0 and 1, 1 and 2, 1 and 3 do not cancel"):
        merge(place)
    shutil.rmtree(place / "inbox/1/round-00000")
    home = default_home(read_identity(Workspace(place)).id, 1)
    shutil.rmtree(home.masked(0).parent)
    lines = home.history.read_text().splitlines(keepends=True)
    home.history.write_text("".join(line for line in lines if '"sent"' not in line))  # a hostile party's own
    monkeypatch.setattr(fedcli.client.secure_round, "mask", lambda numbers, client, secrets: None)
    visit(place, 1)
    if mode_of(place) == "double":
        with pytest.raises(NotReadyError):
            merge(place)
        visit(place, 0, 1, 2, 3)
    with pytest.raises(IntegrityError, match="the sum of round 0 is none of updates"):
        merge(place)


@slow
def test_answers_that_are_wrong_or_another_s_are_not_used(repaired: Path) -> None:
    visit(repaired, 0, 1, 3)
    path = repaired / "inbox/0/repair-00000-0/answer.json"
    kept = path.read_bytes()
    key = KeyPair.read(default_home(read_identity(Workspace(repaired)).id, 0).keys)
    document = json.loads(kept)
    for changes, told in (
        ({"repair": "0" * 64}, "wrong_round"),
        ({"client": 1}, "wrong_round"),
        ({"workspace": "w"}, "wrong_round"),
        ({"seeds": {"2": "00"}, "shares": {}}, "waits for|cannot be had"),
        (
            {"seeds": {"2": "ab" * 32}, "shares": {str(n): {"self": "00" * 64, "2": "00" * 64} for n in (0, 1, 3)}},
            "cannot be had",
        ),
    ):
        changed = {name: value for name, value in (document | changes).items() if name != "checksum"}
        path.write_text(json.dumps(changed))
        path.with_name("answer.sig").write_bytes(key.sign("answer", document["workspace"], sha256(path.read_bytes())))
        with pytest.raises(FedError, match=told):
            merge(repaired)
    path.write_bytes(kept)
    with pytest.raises(NotReadyError, match="client 0: signature"):
        merge(repaired)
    path.with_name("answer.sig").write_bytes(key.sign("answer", document["workspace"], sha256(kept)))
    assert merge(repaired).status == "published"


@slow
def test_what_was_summed_is_checked_again_and_what_was_changed_is_named(repaired: Path) -> None:
    visit(repaired, 0, 1, 3)
    merge(repaired)
    assert problems(repaired) == []
    changed = {
        "attempts/round-00000-0.json": lambda data: data.replace(b"3", b"2"),
        "attempts/round-00000-0.sig": lambda data: data[::-1],
        "repair/round-00000-0.json": lambda data: data.replace(b'"dropped"', b'"doubled"'),
        "inbox/0/round-00000/masked.safetensors": lambda data: data[:-8] + bytes(8),
        "inbox/0/round-00000/update.json": lambda data: data + b" ",
        "inbox/0/round-00000/update.sig": lambda data: data[::-1],
    }
    for name, change in changed.items():
        path = repaired / name
        kept = path.read_bytes()
        path.write_bytes(change(kept))
        assert problems(repaired), name
        path.write_bytes(kept)
    (repaired / "inbox/1/repair-00000-0/answer.json").write_text("{}")
    found = Federation.open(repaired).verify()
    assert (found.violations, found.num_recomputed) == ([], 0)
    assert any("is not the answer that was used" in remark.problem for remark in found.remarks)


@slow
def test_old_rounds_lose_their_masked_numbers_answers_and_shares_and_stay_checkable(place: Path) -> None:
    for _ in range(2):
        visit(place, 0, 1, 3)
        with pytest.raises(NotReadyError):
            merge(place, partial=True)
        visit(place, 0, 1, 3)
        merge(place)
    configure(place, "retention.keep_last=1")
    Federation.open(place).gc()
    assert sorted(path.name for path in (place / "inbox/0/round-00001").iterdir()) == ["update.json", "update.sig"]
    assert not (place / "inbox/0/repair-00001-0").exists()
    assert (place / "inbox/0/repair-00000-0").exists(), "round 0 stays whole"
    assert sorted(path.name for path in (place / "repair").glob("*1-0*")) == ["round-00001-0.json", "round-00001-0.sig"]
    assert problems(place) == []


@slow
def test_a_party_without_its_journal_reveals_nothing(repaired: Path) -> None:
    shutil.rmtree(default_home(read_identity(Workspace(repaired)).id, 0).masked(0).parent)
    refuses(repaired, 0, "is gone, and client 0 has sent an update of round 0")


@slow
def test_keys_that_were_rotated_in_an_open_round_count_from_the_next_on(place: Path) -> None:
    visit(place, 0, 1, 3)
    for client in (0, 2):
        Federation.open(place).keys  # noqa: B018
        rotate(Federation.open(place).state, client)
        Federation.open(place).server.enrol(client)
    with pytest.raises(ConfigError, match="counts on other keys of client 2"):
        visit(place, 2)
    with pytest.raises(NotReadyError):
        merge(place, partial=True)
    assert visit(place, 0, 1, 3) == ["answered"] * 3
    merge(place)
    assert problems(place) == []
    assert visit(place, 0, 1, 2, 3) == ["submitted"] * 4


@slow
def test_one_command_for_all_parties_of_a_machine_lets_them_train_and_answer(place: Path) -> None:
    done = run_federation(Federation.open(place).state, runtimes=Party(), rounds=2, observer=Observer())
    assert (done.round, done.state, done.failed) == (2, "finished", [])
    assert problems(place) == []


@slow
def test_a_masked_update_counts_in_no_plain_round_and_a_plain_one_in_no_masked_round(place: Path) -> None:
    visit(place, 0, 1, 2, 3)
    record = place / "inbox/3/round-00000/update.json"
    document = json.loads(record.read_bytes())
    plain = {key: document[key] for key in ("protocol", "workspace", "round", "base", "client", "files")}
    record.write_text(json.dumps(plain | {"num_samples": 5, "steps": 1, "train_loss": None}))
    with pytest.raises(NotReadyError, match="json"):
        merge(place)
    base = Federation.open(place).round(0)
    unmasked = replace(base, manifest=base.manifest.model_copy(update={"privacy": None}))
    with pytest.raises(Refusal, match=r"json: update\.json"):
        read_update(unmasked, 0)


class Notes(Observer):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def noted(self, message: str) -> None:
        self.told.append(message)


@slow
def test_a_party_is_told_of_another_one_s_keys_that_the_old_ones_did_not_sign(
    pairwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = used(pairwise, tmp_path, monkeypatch)
    visit(place, 0, 1, 2, 3)
    merge(place)
    server = Federation.open(place).server
    server.revoke(2)
    default_home(read_identity(Workspace(place)).id, 2).keys.unlink()
    server.enrol(2, Federation.open(place).client(2).join(place.parent / "rows-2.jsonl", share="minimal").commit())
    with pytest.raises(NotReadyError):
        merge(place)
    notes = Notes()
    state = Federation.open(place).state
    # the attempt of round 1 has client 2's old keys; an attempt that began now would have the new ones
    lying = Lying(place)
    head = {"number": lying.trust.enrolment.head.number, "sha256": lying.trust.enrolment.head.sha256}
    lying.rewrite("attempts/round-00001-0.json", "attempt", enrolment=head)
    assert train_client(state, 0, Party(), observer=notes).status == "submitted"
    assert any("client 2 has new keys that its old ones did not sign" in told for told in notes.told)


@slow
def test_a_rule_that_is_set_in_a_masked_round_holds_from_the_next_on(
    pairwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = used(pairwise, tmp_path, monkeypatch)
    visit(place, 0, 1, 2, 3)
    configure(place, "privacy.secure_aggregation=off", "aggregation.rule=median")
    notes = Notes()
    done = merge(place, observer=notes)
    assert (done.status, done.aggregation.rule) == ("published", None)
    assert any("median holds from the next round on" in told for told in notes.told)
    assert Federation.open(place).round(1).manifest.privacy is None
    assert visit(place, 0, 1, 2, 3) == ["submitted"] * 4
    assert merge(place).aggregation.rule["rule"] == "median"
    assert problems(place) == []


@slow
def test_where_parties_make_the_noise_all_weigh_the_same(
    pairwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Federation.open(used(pairwise, tmp_path, monkeypatch)).round(0)
    privacy = PrivacyRecord(unit="row", clip=1.0, noise=1.0, delta=1e-5, secure_aggregation="pairwise")
    noisy = replace(base, manifest=base.manifest.model_copy(update={"privacy": privacy}))
    adapter = base.adapter()
    files = {"adapter_model.safetensors": {name: array + np.float32(0.5) for name, array in adapter.items()}}
    for each, weight in ((base, 50), (noisy, 1)):
        numbers = from_ring(fedcli.client.secure_round._to_ring(each, FedAvg(), adapter, files, 50, 0))
        assert numbers[-1] == weight == each.weight(FedAvg(), 50)
        assert abs(numbers[:-1] - weight * 0.5).max() < weight * 2.0**-22
