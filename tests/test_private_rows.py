"""Privacy of rows and groups at the party, in real rounds: the ledger of steps, the budget, the claim, refusals."""

import json
import math
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from support import processes
from support.federation import NUM_SAMPLES, configure, read_manifest, train_as
from support.processes import ENVIRONMENT, SMALL, Run, command, initialised, results, run_ok, runner, settings
from support.warm import Place, Warm, write_rows

from fedcli import Federation
from fedcli.errors import ConfigError, IntegrityError, NotReadyError
from fedcli.privacy.accounting import poisson_epsilon
from fedcli.trust.history import note
from fedcli.workspace.inbox import read_update
from fedcli.workspace.layout import Home, Workspace
from fedcli.workspace.refusal import Refusal
from fedcli.workspace.step_ledger import StepsRecord, charge, read_steps, spent

PRIVATE = (*SMALL, "privacy.unit=row", "privacy.clip=0.5", "privacy.noise=1.5", "privacy.delta=1e-4")
"""Two rounds of two steps, batches of 4 rows."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulation whose parties protect rows, with round 0 open."""
    return initialised(tmp_path_factory.mktemp("private"), *PRIVATE)


@pytest.fixture
def private(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def record(number: int, **changes: object) -> StepsRecord:
    values = {
        **{"time": 1.0, "round": number, "manifest": f"{number:064x}", "unit": "row", "group_by": None},
        **{"num_units": 40, "q": 0.1, "clip": 0.5, "noise": 1.5, "steps": 2},
    }
    return StepsRecord.model_validate(values | changes)


def rewrite(workspace: Path, client: int, **changes: object) -> None:
    """Change update.json of a client's update of round 0."""
    path = workspace / "inbox" / str(client) / "round-00000" / "update.json"
    document = json.loads(path.read_bytes()) | {"num_samples": 1} | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "absent"}))


# The ledger


def test_a_line_that_a_kill_cut_short_is_none_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert (read_steps(home), spent(home, 1e-4)) == ([], None)
    charge(home, record(0))
    with home.steps.open("ab") as file:
        file.write(b'{"clip": 0.5, "gro')
    assert read_steps(home) == [record(0)]
    charge(home, record(1))
    assert read_steps(home) == [record(0), record(1)]
    assert stat.S_IMODE(home.steps.stat().st_mode) == 0o600
    lines = home.steps.read_bytes().splitlines(keepends=True)
    home.steps.write_bytes(lines[0][:30] + b"\n" + lines[1])
    with pytest.raises(IntegrityError, match="line 1, is no record"):
        read_steps(home)


def test_steps_of_two_units_are_not_added_up(tmp_path: Path) -> None:
    home = Home(tmp_path)
    charge(home, record(0))
    charge(home, record(1, unit="group", group_by="patient"))
    with pytest.raises(IntegrityError, match="the unit row, and now it is group by patient"):
        spent(home, 1e-5)


# Refusals


CLAIM = {"unit": "row", "epsilon": 2.0, "delta": 1e-4}


def test_an_update_without_the_claim_that_its_round_asks_for_is_refused(private: Path) -> None:
    manifest = json.loads((private / "rounds/00000/manifest.json").read_bytes())
    assert (manifest["privacy"]["unit"], manifest["privacy"]["delta"]) == ("row", 1e-4)
    for client in NUM_SAMPLES:
        take_part(private, client)
    faults = [
        ({}, "claims no privacy"),
        ({"privacy": CLAIM | {"unit": "group"}}, "claims unit group"),
        ({"privacy": CLAIM | {"delta": 1e-3}}, "at delta 0.001"),
        ({"privacy": CLAIM, "num_samples": 7}, "how many rows"),
        ({"privacy": CLAIM, "train_loss": 1.25}, "its loss"),
        ({"privacy": CLAIM | {"epsilon": -1.0}}, "privacy.epsilon"),
        ({"privacy": CLAIM | {"epsilon": "2"}}, "privacy.epsilon"),
    ]
    head = Federation.open(private).state.head
    for changes, reason in faults:
        rewrite(private, 1, **{"privacy": "absent", **changes})
        with pytest.raises(Refusal, match=reason) as caught:
            read_update(head, 1)
        assert caught.value.code == ("json" if "epsilon" in reason else "privacy")
    rewrite(private, 0, privacy=CLAIM)
    rewrite(private, 1, privacy="absent")
    rewrite(private, 2, privacy=CLAIM)
    Federation.open(private).server.aggregate()
    merged = read_manifest(private, 1)["aggregation"]
    assert [(entry["client"], entry["weight"]) for entry in merged["counted"]] == [(0, 0.5), (2, 0.5)]
    assert [(entry["client"], entry["code"]) for entry in merged["refused"]] == [(1, "privacy")]


# The budget


def test_the_budget_stops_a_client_before_it_trains_and_what_it_spent_stays(private: Path) -> None:
    """Client 1 has 50 rows: q = 4 / 50, two steps a round."""
    first, second = (poisson_epsilon([(4 / 50, 1.5, steps)], 1e-4) for steps in (2, 4))
    configure(private, f"privacy.max_epsilon={(first + second) / 2}")
    shutil.rmtree(private / "rounds")
    Federation(Workspace(private)).server.open()
    train_as(1, private)
    update = json.loads((private / "inbox/1/round-00000/update.json").read_bytes())
    assert (update["num_samples"], update["train_loss"], update["steps"]) == (1, None, 2)
    assert (update["privacy"]["unit"], update["privacy"]["delta"]) == ("row", 1e-4)
    assert first <= update["privacy"]["epsilon"] <= 1.1 * first
    home = Workspace(private).private(1)
    assert spent(home, 1e-4).epsilon == pytest.approx(first, rel=1e-9)
    Federation.open(private).server.aggregate(partial=True)
    before = home.steps.read_bytes()
    with pytest.raises(NotReadyError) as caught:
        train_as(1, private)
    assert caught.value.exit_code == 6
    told = f"have spent epsilon {first:.4g} of {(first + second) / 2:.4g}"
    assert told in caught.value.message
    assert f"{(second - first) / 2:.4g} is left, and the round costs {second - first:.4g}" in caught.value.message
    assert home.steps.read_bytes() == before
    assert not (private / "inbox/1/round-00001").exists()


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"train": {"minutes": 1.0}}, "train.minutes"),
        ({"train": {"personal": {"name": "ditto", "pull": 0.1}}}, "train.personal"),
        ({"clusters": {"by": "loss", "count": 1}}, "clusters.by: loss"),
    ],
)
def test_a_round_that_asks_for_what_its_noise_does_not_cover_trains_nobody(private: Path, edit, told) -> None:
    path = private / "rounds/00000/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest.pop("checksum")
    for key, value in edit.items():
        manifest[key] = {**(manifest.get(key) or {}), **value}
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=f"round 0 asks for {told} beside a privacy.unit"):
        train_as(1, private)
    assert not Workspace(private).private(1).steps.exists()
    assert not (private / "inbox/1/round-00000").exists()


def test_privacy_shows_a_party_its_own_ledger_beside_the_claim(
    private: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1 has 50 rows, and trains round 0 twice; the first update is lost."""
    run: Run = runner(capsys)
    monkeypatch.chdir(private)
    configure(private, "privacy.max_epsilon=9.0")
    shutil.rmtree(private / "rounds")
    Federation(Workspace(private)).server.open()
    empty = results(run, "privacy", "--id", 1)
    assert [empty["own"][name] for name in ("unit", "epsilon", "steps", "left")] == ["row", 0.0, 0, 9.0]
    for _ in range(2):
        shutil.rmtree(private / "inbox/1", ignore_errors=True)
        train_as(1, private)
    Federation.open(private).server.aggregate(partial=True)
    exact = poisson_epsilon([(4 / 50, 1.5, 4)], 1e-4)
    home = Workspace(private).private(1)
    document = results(run, "privacy", "--id", 1)
    assert document["own"] == {
        **{"client": 1, "ledger": str(home.steps), "unit": "row", "epsilon": pytest.approx(exact), "delta": 1e-4},
        **{"steps": 4, "rounds": 1, "trainings": 2, "budget": 9.0, "left": pytest.approx(9.0 - exact)},
    }
    assert document["clients"][0]["epsilon"] > exact, "what the chain claims is rounded up"
    out = run("privacy", "--id", 1)[1]
    assert "client 1: claims epsilon" in out
    told = f"spent epsilon {exact:.6g} at delta 0.0001, unit row, by 4 steps in 1 round, 2 trainings (1 of them again)"
    assert f"{told}; {9 - exact:.6g} of its budget 9 is left" in out
    assert (run("privacy")[1].count("own ledger"), results(run, "privacy")["own"]) == (0, None)
    assert run("privacy", "--id", 1, "--home", private.parent)[0] == 3
    home.steps.write_text("{}\n")
    code, _, err = run("privacy", "--id", 1)
    assert (code, "line 1, is no record of private steps" in err) == (7, True)


def test_a_counted_update_that_the_ledger_does_not_have_stops_the_party(private: Path) -> None:
    train_as(1, private)
    Federation.open(private).server.aggregate(partial=True)
    Workspace(private).private(1).steps.unlink()
    with pytest.raises(IntegrityError, match="steps of round 0, whose update was sent"):
        train_as(1, private)


def test_rounds_without_privacy_before_are_not_forgotten(small: Path) -> None:
    train_as(1, small)
    Federation.open(small).server.aggregate(partial=True)
    configure(small, "privacy.unit=row", "privacy.clip=1.0", "privacy.noise=2.0")
    manifest = small / "rounds/00001"
    shutil.rmtree(manifest)
    Federation.open(small).server.aggregate(partial=True)
    with pytest.raises(ConfigError, match="round 0 was made without noise at the party"):
        train_as(1, small)


def test_an_update_that_the_server_has_read_without_noise_is_not_forgotten_though_it_was_set_aside(small: Path) -> None:
    train_as(1, small)
    sent = Federation.open(small).round(0).sha256
    note(Workspace(small).private(1).history, "sent", round=0, manifest=sent)  # as a joined party's home has it
    assert Federation.open(small).server.discard(1)
    train_as(0, small)
    configure(small, "privacy.unit=row", "privacy.clip=1.0", "privacy.noise=2.0")
    Federation.open(small).server.aggregate(partial=True)
    with pytest.raises(ConfigError, match="round 0 was made without noise at the party"):
        train_as(1, small)


# Real parties


@pytest.fixture(scope="session")
def warm() -> Warm:
    return processes.warm()


@pytest.fixture
def place(tmp_path: Path, warm: Warm) -> Place:
    """A workspace for parties that protect groups by the column patient, with three clients."""
    return made(tmp_path, warm, "privacy.unit=group", "privacy.group_by=patient")


def made(folder: Path, warm: Warm, *more: str) -> Place:
    overrides = (*PRIVATE, "data.source=null", "federation.signatures=off", *more)
    done = warm("init", "W", *settings(*overrides), cwd=folder)
    assert done.returncode == 0, done.stderr
    return Place(folder, warm)


def patients(place: Place, client: int, count: int = 37, **others: object) -> Path:
    rows = [
        {"instruction": f"say {n}", "output": f"{n} said", "patient": n // 5 if n % 2 else str(n // 5)} | others
        for n in range(count)
    ]
    return write_rows(place.folder / f"rows-{client}.jsonl", rows)


@pytest.mark.slow
def test_what_a_party_drops_tells_neither_rows_nor_losses(place: Place) -> None:
    for client in range(3):
        place.join(client, patients(place, client), "--share", "minimal", "--yes")
        done = json.loads(place.train(client, "--home", f"H{client}", "--json").stdout)
        assert (done["num_samples"], done["privacy"]["unit"]) == (37, "group")  # its own terminal tells it
        (line,) = read_steps(Home(place.folder / f"H{client}"))
        assert (line.num_units, line.q, line.noise, line.clip) == (8, 0.5, 1.5, 0.5)  # 1 and "1" are one patient
        for path in (path for path in place.workspace.rglob("*") if path.is_file() and path.suffix == ".json"):
            text = path.read_text()
            assert 'patient": "' not in text
            assert not any(f"{done[name]:.4f}"[:6] in text for name in ("train_loss", "first_loss", "last_loss")), path
    place("server", "aggregate")
    entries = read_manifest(place.workspace, 1)["aggregation"]["counted"]
    assert {entry["weight"] for entry in entries} == {1 / 3}
    assert {(entry["num_samples"], entry["train_loss"]) for entry in entries} == {(None, None)}
    assert {entry["privacy"]["unit"] for entry in entries} == {"group"}
    place("verify")


@pytest.mark.slow
def test_a_row_without_a_group_is_told_by_its_place_before_anything_is_charged(place: Place) -> None:
    rows = patients(place, 0, count=6)
    with rows.open("a") as file:
        file.write('{"instruction": "say no", "output": "no"}\n')
    place.join(0, rows, "--yes")
    error = place.train(0, "--home", "H0", code=3).stderr
    assert "rows-0.jsonl, line 7: column 'patient' is missing" in error
    assert not (place.folder / "H0/steps.jsonl").exists()


@pytest.mark.slow
def test_steps_of_a_training_that_was_killed_and_of_a_refused_update_are_spent(tmp_path: Path, warm: Warm) -> None:
    place = made(tmp_path, warm, "train.steps=2000")
    place.join(0, patients(place, 0, patient="x"), "--yes")
    home = Home(place.folder / "H0")
    environment = ENVIRONMENT | {"FEDCLI_WORKSPACE": str(place.workspace)}
    training = command("client", "train", "--id", 0, "--home", home.folder)
    process = subprocess.Popen(training, cwd=place.folder, env=environment, stderr=subprocess.DEVNULL)
    while not read_steps(home):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [line.steps for line in read_steps(home)] == [2000]
    assert not (place.workspace / "inbox/0/round-00000").exists()
    once = poisson_epsilon([(4 / 37, 1.5, 2000)], 1e-4)
    assert spent(home, 1e-4).epsilon == pytest.approx(once)
    configure(place.workspace, "train.steps=2")
    shutil.rmtree(place.workspace / "rounds")
    place("server", "open")
    place.train(0, "--home", "H0")
    rewrite(place.workspace, 0, privacy="absent")
    place("server", "aggregate", "--partial", code=6)  # nobody is counted
    assert [line.steps for line in read_steps(home)] == [2000, 2]
    place("server", "discard", "--id", 0)
    done = json.loads(place.train(0, "--home", "H0", "--json").stdout)
    assert [line.steps for line in read_steps(home)] == [2000, 2, 2]
    together = poisson_epsilon([(4 / 37, 1.5, 2004)], 1e-4)
    assert together <= done["privacy"]["epsilon"] <= 1.1 * together


@pytest.mark.slow
def test_a_party_trains_no_baseline_alone_where_privacy_is_asked_for(place: Place) -> None:
    place.join(0, patients(place, 0), "--yes")
    assert "without noise" in place("train-alone", "--id", 0, "--home", "H0", code=3).stderr


@pytest.mark.slow
def test_a_partys_floors_bound_its_noise_and_its_epsilon(tmp_path: Path, warm: Warm) -> None:
    target = "privacy.target={epsilon: 1.0, delta: 1e-3}"
    place = made(tmp_path, warm, "privacy.noise=null", target)
    place.join(0, patients(place, 0), "--yes", "--floor", "noise=3.0")
    place.join(1, patients(place, 1), "--yes", "--floor", "max_epsilon=0.01", "--floor", "delta=0.001")
    place.join(2, patients(place, 2), "--yes")
    place.train(0)
    place.train(2)
    assert [line.noise for line in read_steps(Home(place.folder / "H0"))] == [3.0]
    (line,) = read_steps(Home(place.folder / "H2"))
    assert poisson_epsilon([(line.q, line.noise, 4)], 1e-3) == pytest.approx(1.0, rel=0.01)  # of both rounds
    assert "of 0.01" in place.train(1, code=6).stderr
    assert not (place.folder / "H1/steps.jsonl").exists()
    place("server", "aggregate", "--partial")
    assert read_manifest(place.workspace, 1)["aggregation"]["missing"] == [1]


# Simulations


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedprox", "fedyogi"])
def test_every_round_of_a_simulation_claims_what_its_ledger_adds_up_to(
    tmp_path: Path, warm: Warm, algorithm: str
) -> None:
    done = warm("init", *settings(*PRIVATE, f"algorithm.name={algorithm}"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run_ok("run", "--workers", "2", cwd=tmp_path)
    for client in range(3):
        home = Workspace(tmp_path).private(client)
        records = read_steps(home)
        assert [record.round for record in records] == [0, 1]
        for number in range(2):
            update = json.loads((tmp_path / f"inbox/{client}/round-{number:05d}/update.json").read_bytes())
            events = [(record.q, record.noise, record.steps) for record in records[: number + 1]]
            epsilon = poisson_epsilon(events, 1e-4)
            assert epsilon <= update["privacy"]["epsilon"] <= 1.1 * epsilon
    assert run_ok("verify", cwd=tmp_path)["violations"] == []


@pytest.mark.slow
def test_a_target_holds_over_all_rounds_and_a_training_more_is_paid_by_more_noise(
    template: Path, tmp_path: Path
) -> None:
    """Client 1 has 50 rows."""
    workspace = Path(shutil.copytree(template, tmp_path / "W"))
    configure(workspace, "privacy.noise=null", "privacy.target={epsilon: 2.0, delta: 1e-4}", "federation.rounds=4")
    shutil.rmtree(workspace / "rounds")
    Federation(Workspace(workspace)).server.open()
    home = Workspace(workspace).private(1)
    for number in range(4):
        train_as(1, workspace)
        if number == 1:  # lost
            shutil.rmtree(workspace / "inbox/1/round-00001")
            train_as(1, workspace)
        Federation.open(workspace).server.aggregate(partial=True)
    noises = [record.noise for record in read_steps(home)]
    assert noises[0] == noises[1] < noises[2] <= noises[3] <= noises[4]
    assert 1.9 < spent(home, 1e-4).epsilon <= 2.0


# The accountant


def exact_epsilon(q: float, noise: float, steps: int, delta: float) -> float:
    """Return epsilon of Poisson steps by a discretised privacy loss, convolved by FFT: both ways, the worse."""
    grid, size = 2e-4, 2**19
    x = np.linspace(-12 * noise, 12 * noise + 1, 400_001)
    step = x[1] - x[0]
    without = np.exp(-(x**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    ratio = 1 - q + q * np.exp((2 * x - 1) / (2 * noise**2))
    worst = 0.0
    for density, loss in ((without * ratio, np.log(ratio)), (without, -np.log(ratio))):
        losses = np.bincount(
            (np.round(loss / grid).astype(int) + size // 2).clip(0, size - 1), density * step, minlength=size
        )
        spectrum = np.fft.rfft(np.fft.ifftshift(losses)) ** steps
        composed = np.fft.fftshift(np.fft.irfft(spectrum, size)).clip(0)
        values = (np.arange(size) - size // 2) * grid
        low, high = 0.0, 50.0
        for _ in range(30):
            middle = (low + high) / 2
            above = values > middle
            found = (composed[above] * -np.expm1(middle - values[above])).sum()
            low, high = (middle, high) if found > delta else (low, middle)
        worst = max(worst, high)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("q", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("noise", [0.8, 1.0, 1.5, 3.0, 6.0])
def test_epsilon_is_that_of_the_privacy_loss_convolved(q: float, noise: float) -> None:
    """Thirty settings in all."""
    for steps, delta in ((20, 1e-5), (200, 1e-4)):
        found = poisson_epsilon([(q, noise, steps)], delta)
        assert found == pytest.approx(exact_epsilon(q, noise, steps, delta), rel=0.01, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "expected"),
    [(0.6, (10.3, 19.5, 39.5)), (0.8, (4.50, 9.15, 19.5)), (1.0, (2.65, 5.61, 12.2)), (1.5, (1.33, 2.84, 6.17))],
)
def test_epsilon_of_a_hospital_of_5000_rows(noise: float, expected: tuple[float, ...]) -> None:
    for batch_size, epsilon in zip((64, 128, 256), expected, strict=True):
        assert poisson_epsilon([(batch_size / 5000, noise, 1000)], 2e-6) == pytest.approx(epsilon, rel=0.005)


@pytest.mark.slow
def test_epsilon_of_single_settings() -> None:
    assert poisson_epsilon([(0.1, 1.0, 100)], 1e-5) == pytest.approx(7.0466, rel=1e-3)
    assert poisson_epsilon([(1.0, 5.0, 100)], 1e-5) == pytest.approx(9.9973, rel=1e-3)
    assert poisson_epsilon([(0.05, 1.0, 100)], 1e-4) == pytest.approx(2.8696, rel=1e-3)
    assert poisson_epsilon([(1.0, 1.0, 1)], 1e-5) == pytest.approx(4.3772, rel=1e-3)
