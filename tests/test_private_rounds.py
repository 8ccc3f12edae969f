"""Rounds of unit client: the noisy mean byte for byte, what stays untold, what is spent, and what a kill leaves."""

import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import load_file, save
from support.federation import (
    ADAPTER,
    CONTROL_DELTA,
    NUM_SAMPLES,
    all_take_part,
    answer,
    configure,
    noisy,
    read_adapter,
    read_manifest,
    read_update,
    restart,
    train_as,
)
from support.kills import copies_killed_at_every_call
from support.processes import Run, runner

from fedcli import Federation
from fedcli.errors import ConfigError, NotReadyError
from fedcli.privacy.accounting import gaussian_epsilon
from fedcli.privacy.noise import NoiseStream, hash_of
from fedcli.workspace.layout import Workspace

slow = pytest.mark.slow
PRIVACY = ("unit: client", "clip: 0.5", "noise: 1.5")


def private(workspace: Path, *more: str, algorithm: str = "fedavg") -> Path:
    """Let round 0, which nobody has answered, be one of unit client."""
    configure(workspace, f"privacy={{{', '.join([*PRIVACY, *more])}}}")
    restart(workspace, algorithm)
    return workspace


@pytest.fixture(scope="module")
def template(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of unit client with round 0 open, and no rows; tests must not change it."""
    folder = tmp_path_factory.mktemp("private") / "W"
    return private(Path(shutil.copytree(small_template, folder, ignore=shutil.ignore_patterns("data"))))


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    folder = Path(shutil.copytree(template, tmp_path / "W"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


def aggregate(workspace: Path, **options: bool) -> None:
    assert Federation.open(workspace).server.aggregate(**options).published


def edited(workspace: Path, edit: Callable[[dict], object]) -> None:
    """Edit round 1's manifest, which no other names as its parent."""
    path = workspace / "rounds/00001/manifest.json"
    manifest = json.loads(path.read_bytes())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def keys(workspace: Path) -> list[Path]:
    return sorted(workspace.glob("private/server/noise/*.key"))


def clipped(differences: list[dict[str, np.ndarray]], clip: float) -> tuple[list[dict[str, np.ndarray]], int]:
    """Return vectors scaled to a norm of `clip` at most, and how many were not changed."""
    factors = [factor_of(difference, clip) for difference in differences]
    scaled = [
        {name: array * factor for name, array in difference.items()}
        for difference, factor in zip(differences, factors, strict=True)
    ]
    return scaled, factors.count(1.0)


def factor_of(difference: dict[str, np.ndarray], clip: float) -> float:
    """Return min(1, C / n), with all but 40 bits of its mantissa cut off."""
    norm = math.sqrt(sum(float((array**2).sum()) for array in difference.values()))
    if norm <= clip:
        return 1.0
    scale = 2.0 ** (40 - math.frexp(clip / norm)[1])
    return int(clip / norm * scale) / scale


def expected_mean(
    workspace: Path, key: bytes, *, clip: float, noise: float, weights: dict[int, float], divisor: int = 3
) -> dict[str, np.ndarray]:
    """Return x + (sum of weighted clipped differences + noise) / m, written out."""
    x = {name: array.astype(np.float64) for name, array in read_adapter(workspace, 0).items()}
    updates = {client: read_update(workspace, 0, client) for client in weights}
    differences = [{name: update[name] - x[name] for name in x} for update in updates.values()]
    stream = NoiseStream(key)
    following = {}
    factors = [factor_of(difference, clip) for difference in differences]
    for name in x:
        total = np.zeros_like(x[name])
        for difference, factor, weight in zip(differences, factors, weights.values(), strict=True):
            total = total + difference[name] * (weight * factor)
        drawn = stream.normal(total.shape, name=f"{ADAPTER}/{name}")
        following[name] = (x[name] + (total + drawn * (noise * clip)) / divisor).astype(np.float32)
    return following


@pytest.mark.parametrize(
    ("more", "weights"),
    [
        ((), {0: 1.0, 1: 1.0, 2: 1.0}),
        pytest.param(("row_cap: 100",), {0: 0.03, 1: 0.5, 2: 1.0}, marks=slow),
        pytest.param(("clip: 1000000.0",), {0: 1.0, 1: 1.0, 2: 1.0}, marks=slow),
    ],
)
def test_the_next_round_is_the_noisy_mean_of_clipped_updates_over_a_fixed_number(
    workspace: Path, more: tuple[str, ...], weights: dict[int, float]
) -> None:
    if more:
        private(workspace, *more)
    all_take_part(workspace)
    aggregate(workspace)
    asked, done = (read_manifest(workspace, number) for number in (0, 1))
    key = bytes.fromhex(keys(workspace)[0].read_text())
    assert done["aggregation"]["privacy"] == {"noise": 1.5, "noise_sha256": hash_of(key)}
    assert (asked["privacy"]["expected"], asked["privacy"]["relation"]) == (3, "add_or_remove_one")
    expected = expected_mean(workspace, key, clip=asked["privacy"]["clip"], noise=1.5, weights=weights)
    assert {name: array.tobytes() for name, array in read_adapter(workspace, 1).items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
    result = Federation.open(workspace).verify(noise_keys=keys(workspace))
    assert (result.violations, result.num_recomputed, result.noisy_rounds) == ([], 1, [])


@slow
def test_whoever_answers_the_divisor_is_the_number_that_was_expected(workspace: Path) -> None:
    take_part(workspace, 1, noisy(1), NUM_SAMPLES[1])
    aggregate(workspace, partial=True)
    key = bytes.fromhex(keys(workspace)[0].read_text())
    expected = expected_mean(workspace, key, clip=0.5, noise=1.5, weights={1: 1.0})
    assert all(np.abs(array - expected[name]).max() <= 1e-6 for name, array in read_adapter(workspace, 1).items())
    assert read_manifest(workspace, 1)["aggregation"]["counted"][0]["weight"] == 1.0


@slow
def test_an_update_of_any_size_moves_the_sum_by_the_clip(workspace: Path) -> None:
    private(workspace, "noise: 1.0e-6")
    take_part(workspace, 0, lambda array: array + 1e4, 2**53)
    aggregate(workspace, partial=True)
    moved = [read_adapter(workspace, 1)[name] - array for name, array in read_adapter(workspace, 0).items()]
    assert math.sqrt(sum(float((array**2).sum()) for array in moved)) == pytest.approx(0.5 / 3, rel=1e-4)


@slow
def test_an_update_that_changes_nothing_is_summed_as_zero(workspace: Path) -> None:
    take_part(workspace, 0, lambda array: array)
    aggregate(workspace, partial=True)
    assert all(np.isfinite(array).all() for array in read_adapter(workspace, 1).values())


@slow
def test_scaffolds_control_is_clipped_and_hidden_with_the_adapter(workspace: Path) -> None:
    private(workspace, algorithm="scaffold")
    cohort = answer(workspace, 0)
    aggregate(workspace)
    x = {name: array.astype(np.float64) for name, array in read_adapter(workspace, 0).items()}
    vectors = []
    for client in cohort:
        control = load_file(workspace / f"inbox/{client}/round-00000/{CONTROL_DELTA}")
        update = read_update(workspace, 0, client)
        both = {f"{ADAPTER}/{name}": update[name] - x[name] for name in x}
        vectors.append(both | {f"{CONTROL_DELTA}/{name}": array.astype(np.float64) for name, array in control.items()})
    vectors, below = clipped(vectors, 0.5)
    assert below < len(vectors)
    stream = NoiseStream(bytes.fromhex(keys(workspace)[0].read_text()))
    names = {place: stream.normal(vectors[0][place].shape, name=place) for place in sorted(vectors[0])}
    sums = {place: sum(vector[place] for vector in vectors) + 0.75 * drawn for place, drawn in names.items()}
    control = load_file(workspace / "rounds/00001/control.safetensors")
    for name, array in read_adapter(workspace, 1).items():
        assert np.abs(array - (x[name] + sums[f"{ADAPTER}/{name}"] / 3)).max() <= 1e-6
        assert np.abs(control[name] - sums[f"{CONTROL_DELTA}/{name}"] / 3).max() <= 1e-6


@slow
def test_the_servers_step_comes_behind_the_noise(workspace: Path) -> None:
    private(workspace, algorithm="fedadam")
    all_take_part(workspace)
    aggregate(workspace)
    key = bytes.fromhex(keys(workspace)[0].read_text())
    x = read_adapter(workspace, 0)
    mean = expected_mean(workspace, key, clip=0.5, noise=1.5, weights={0: 1.0, 1: 1.0, 2: 1.0})
    momentum = load_file(workspace / "rounds/00001/optimizer.safetensors")
    for name in x:
        assert np.abs(momentum[f"m.{name}"] - (mean[name] - x[name])).max() <= 1e-6


def test_clipping_follows_the_noisy_quantile_of_the_norms(workspace: Path) -> None:
    private(workspace, "noise: 0.2", "clip: 2.0", "adaptive: {bit_noise: 0.4}")
    for client, size in ((0, 0.001), (1, 0.002), (2, 5.0)):
        take_part(workspace, client, lambda array, size=size: array + size)
    aggregate(workspace)
    done = read_manifest(workspace, 1)
    noise = (0.2**-2 - 0.8**-2) ** -0.5
    below = 2 + 0.4 * NoiseStream(bytes.fromhex(keys(workspace)[0].read_text())).normal(1, name="below")[0]
    assert done["aggregation"]["privacy"]["noise"] == pytest.approx(noise, rel=1e-12)
    assert done["aggregation"]["privacy"]["below"] == pytest.approx(below, rel=1e-12)
    assert done["privacy"]["clip"] == pytest.approx(2.0 * math.exp(-0.2 * (below / 3 - 0.5)), rel=1e-12)
    assert Federation.open(workspace).verify(noise_keys=keys(workspace)).violations == []
    edited(workspace, lambda manifest: manifest["privacy"].update(clip=0.01))
    assert any("adaptive clipping has reached" in found.problem for found in verify(workspace).violations)


def verify(workspace: Path):
    return Federation(Workspace(workspace)).verify()


def test_the_handbooks_adaptive_vectors() -> None:
    from fedcli.workspace.privacy_records import AdaptiveRecord, MergeNoise, PrivacyRecord, next_clip, noise_multiplier

    adaptive = AdaptiveRecord(quantile=0.5, rate=0.2, bit_noise=5.0)
    asked = PrivacyRecord(unit="client", clip=1.0, noise=1.0, delta=1e-5, expected=100, adaptive=adaptive)
    assert noise_multiplier(asked) == pytest.approx(1.005038, abs=1e-6)
    ten = asked.model_copy(update={"expected": 10})
    assert next_clip(ten, MergeNoise(noise_sha256="0" * 64, noise=1.0, below=3.0)) == pytest.approx(1.0408108, abs=1e-7)


def test_adaptive_clipping_that_would_spend_more_is_a_fault_that_names_both_numbers(workspace: Path, run: Run) -> None:
    configure(workspace, "privacy={unit: client, clip: 1.0, noise: 1.0, adaptive: {}}")
    code, _, err = run("status")
    assert code == 3
    assert "bit_noise is 0.15" in err
    assert "noise is 1" in err


def test_an_algorithm_that_merges_in_its_own_way_is_refused_with_both_names() -> None:
    from fedcli.algos import FedAvg
    from fedcli.server.merge_privately import check_algorithm

    class Median(FedAvg):
        def reducer(self):
            raise AssertionError

    with pytest.raises(ConfigError, match=r"privacy\.unit is client, and the algorithm fedavg merges"):
        check_algorithm(Median())


@slow
def test_a_rule_of_fedcli_yaml_is_not_obeyed_in_a_round_that_promised_noise(workspace: Path, run: Run) -> None:
    all_take_part(workspace)
    configure(workspace, "privacy={}", "aggregation.rule=median", "aggregation.tolerate=1")
    code, _, err = run("server", "aggregate")
    assert code == 3
    assert "privacy.unit: client, and aggregation.rule is median" in err


def test_a_dry_run_draws_no_noise_and_tells_no_figure(workspace: Path, run: Run) -> None:
    all_take_part(workspace)
    code, out, _ = run("server", "aggregate", "--dry-run", "--json")
    entries = json.loads(out)["aggregation"]["counted"]
    assert (code, len(entries), keys(workspace)) == (0, 3, [])
    assert {entry["num_samples"] for entry in entries} == {None}
    assert not (workspace / "rounds/00001").exists()


def test_verify_without_the_key_names_the_round_and_checks_the_rest(workspace: Path, run: Run) -> None:
    all_take_part(workspace)
    aggregate(workspace)
    code, out, _ = run("verify")
    assert code == 0
    assert "3 counted updates, 0 aggregates computed again" in out
    assert "(--noise-key): the adapter of round 1" in out
    code, out, _ = run("verify", "--noise-key", keys(workspace)[0], "--json")
    assert (code, json.loads(out)["num_recomputed"], json.loads(out)["noisy_rounds"]) == (0, 1, [])
    wrong = workspace.parent / "wrong.key"
    wrong.write_text("00" * 32)
    assert json.loads(run("verify", "--noise-key", wrong, "--json")[1])["noisy_rounds"] == [1]
    wrong.write_text("no key")
    assert run("verify", "--noise-key", wrong)[0] == 4
    adapter = workspace / "rounds/00001/adapter" / ADAPTER
    adapter.write_bytes(save({name: array + 1 for name, array in load_file(adapter).items()}))
    assert run("verify", "--noise-key", workspace / "private/server/noise")[0] == 7


@slow
@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda merge: merge.pop("privacy"), "records no noise"),
        (lambda merge: merge["privacy"].update(noise=0.1), "was merged with noise 0.1, and 1.5 was asked for"),
        (lambda merge: merge["counted"][0].update(train_loss=1.0), "tells train_loss of client 0"),
        (lambda merge: merge["counted"][0].update(weight=0.9), "records other weights"),
        (lambda merge: merge["privacy"].update(below=1.0), "where clipping is not adaptive"),
    ],
)
def test_verify_finds_a_round_that_was_not_merged_as_it_promised(workspace: Path, edit, problem: str) -> None:
    all_take_part(workspace)
    aggregate(workspace)
    edited(workspace, lambda manifest: edit(manifest["aggregation"]))
    assert any(problem in found.problem for found in verify(workspace).violations)


def test_the_key_is_the_servers_alone(workspace: Path) -> None:
    all_take_part(workspace)
    aggregate(workspace)
    (key,) = keys(workspace)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(key.parent.parent.stat().st_mode) == 0o700


def published(workspace: Path) -> bytes:
    """Return all that others can read."""
    folders = ("rounds", "clients", "eval", "report", "baselines")
    files = [path for folder in folders for path in sorted((workspace / folder).rglob("*")) if path.is_file()]
    return b"\n".join(path.read_bytes() for path in files)


def test_no_figure_of_an_update_is_in_what_others_read(workspace: Path, run: Run) -> None:
    losses, counts, size = (1.23456789, 2.3456789, 3.456789), (61_357, 71_357, 81_357), 0.0271828
    for client in range(3):
        take_part(workspace, client, lambda array: array + size, counts[client])
        path = workspace / f"inbox/{client}/round-00000/update.json"
        record = json.loads(path.read_bytes()) | {"train_loss": losses[client]}
        path.write_text(json.dumps(record))
    refused = workspace / "inbox/2/round-00000/update.json"
    refused.write_text(json.dumps(json.loads(refused.read_bytes()) | {"num_samples": counts[2], "round": 61357}))
    code, out, err = run("server", "aggregate", "--partial")
    told = out + err
    for command in (("status",), ("status", "--json"), ("privacy",), ("privacy", "--json"), ("verify", "--json")):
        code, out, err = run(*command)
        assert code == 0, err
        told += out + err
    assert run("report")[0] == 0
    assert run("export", workspace.parent / "exported")[0] == 0
    told += (workspace.parent / "exported/README.md").read_text()
    everything = published(workspace) + told.encode()
    norm = math.sqrt(2048) * size
    canaries = [*(f"{loss:.5f}" for loss in losses), *map(str, counts), *(f"{count:,}" for count in counts)]
    canaries += [f"{norm:.4f}", f"{norm:.3g}", f"{losses[0]:.3f}", f"{losses[1]:.3f}"]
    assert [canary for canary in canaries if canary.encode() in everything] == []
    assert b"withheld" in everything
    assert "differentially private for adding or removing one client" in told


def test_the_ledger_tells_of_each_client_what_its_own_rounds_spent(workspace: Path, run: Run) -> None:
    all_take_part(workspace)
    aggregate(workspace)
    take_part(workspace, 1, noisy(1))
    aggregate(workspace, partial=True)
    code, out, _ = run("privacy", "--json")
    document = json.loads(out)
    assert code == 0
    found = {entry["client"]: entry for entry in document["clients"]}
    for client, rounds in ((0, [0]), (1, [0, 1]), (2, [0])):
        assert found[client]["rounds"] == rounds
        assert found[client]["epsilon"] == pytest.approx(gaussian_epsilon(1.5, 1e-5, len(rounds)), rel=1e-9)
    most = gaussian_epsilon(1.5, 1e-5, 2)
    assert f"({most:.4g}, 1e-05)-differentially private for adding or removing one client" in document["sentence"]
    assert [entry["client"] for entry in json.loads(run("privacy", "--id", 1, "--json")[1])["clients"]] == [1]
    assert run("privacy", "--id", 7)[0] == 2
    assert f"client 1: epsilon {most:.4g} at delta 1e-05, unit client, of 2 rounds" in run("privacy")[1]


@slow
def test_a_round_without_noise_is_said_plainly(workspace: Path, run: Run) -> None:
    configure(workspace, "privacy={}")
    restart(workspace, "fedavg")
    all_take_part(workspace)
    configure(workspace, "privacy={unit: client, clip: 0.5, noise: 1.5}")
    aggregate(workspace)
    all_take_part(workspace)
    aggregate(workspace)
    out = run("privacy")[1]
    assert out.count("no guarantee: round 0 was merged without noise") == 4  # of three clients, and for everyone
    assert all(entry["epsilon"] is None for entry in json.loads(run("privacy", "--json")[1])["clients"])


def test_a_budget_stops_before_it_is_passed_with_exit_6(workspace: Path, run: Run) -> None:
    first, second = (gaussian_epsilon(1.5, 1e-5, rounds) for rounds in (1, 2))
    private(workspace, f"max_epsilon: {(first + second) / 2}")
    all_take_part(workspace)
    aggregate(workspace)
    code, _, err = run("server", "aggregate")
    assert (code, "would pass privacy.max_epsilon" in err, "client train" in err) == (6, True, False)
    code, _, err = run("run")
    assert (code, "would pass privacy.max_epsilon" in err, "failed" in err) == (6, True, False)
    all_take_part(workspace)
    code, _, err = run("server", "aggregate")
    assert code == 6
    told = f"has spent epsilon {first:.4g} of {(first + second) / 2:g} at delta 1e-05, this round costs "
    assert f"{told}{second - first:.4g} and makes it {second:.4g}, {(second - first) / 2:.4g} is left" in err
    assert run("server", "aggregate", "--dry-run")[0] == 6
    assert len(keys(workspace)) == 1
    code, out, err = run("status")
    assert "budget     used up: client 0 has spent" in out
    assert "fedcli privacy" in err
    assert not json.loads(run("status", "--json")[1])["budget"]["next"] <= (first + second) / 2


@slow
def test_a_client_is_not_trained_for_a_round_that_may_not_be_merged(workspace: Path) -> None:
    (workspace / "data").mkdir()
    (workspace / "data/client-0.jsonl").write_text('{"instruction": "say a", "output": "a"}\n')
    private(workspace, "max_epsilon: 0.01")
    with pytest.raises(NotReadyError, match=r"would pass privacy\.max_epsilon"):
        train_as(0, workspace)


@slow
def test_a_target_is_spent_by_all_rounds_together_and_no_more(workspace: Path) -> None:
    configure(workspace, "privacy={unit: client, clip: 0.5, target: {epsilon: 2.0, delta: 1.0e-6}}")
    restart(workspace, "fedavg")
    for _ in range(2):
        all_take_part(workspace)
        aggregate(workspace)
    assert read_manifest(workspace, 0)["privacy"]["max_epsilon"] == 2.0
    found = Federation.open(workspace).privacy().clients
    assert [entry.epsilon for entry in found] == [pytest.approx(2.0, rel=1e-6)] * 3


def test_other_updates_get_another_key_and_the_ledger_counts_both(workspace: Path, monkeypatch) -> None:
    from fedcli.server import aggregate as aggregation

    take_part(workspace, 1, noisy(1))
    with monkeypatch.context() as patch:
        patch.setattr(aggregation, "open_next_round", lambda *_: (_ for _ in ()).throw(OSError("power")))
        for _ in range(2):
            with pytest.raises(OSError, match="power"):
                Federation.open(workspace).server.aggregate(partial=True)
    assert len(keys(workspace)) == 1  # the same sum has the same key
    take_part(workspace, 0, noisy(0))
    aggregate(workspace, partial=True)
    assert len(keys(workspace)) == 2
    assert read_manifest(workspace, 1)["aggregation"]["privacy"]["releases"] == 2
    spent = {entry.client: entry.epsilon for entry in Federation.open(workspace).privacy().clients}
    twice = gaussian_epsilon(1.5, 1e-5, 2)
    assert spent == {client: pytest.approx(twice, rel=1e-9) for client in (0, 1, 2)}
    assert verify(workspace).violations == []


@pytest.fixture(scope="module")
def answered(template: Path) -> Iterator[Path]:
    """A private round that all have answered, in memory where there is such a place."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else template.parent
    folder = memory / f"fedcli-private-{os.getpid()}"
    shutil.copytree(template, folder / "answered")
    all_take_part(folder / "answered")
    yield folder / "answered"
    shutil.rmtree(folder)


def merge(workspace: Path) -> None:
    """Aggregate, unless the round was merged by the process that was killed."""
    if Federation.open(workspace).round().number == 0:
        aggregate(workspace)


@slow
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_call_one_noise_of_a_sum_is_ever_written(answered: Path, after: bool) -> None:
    points, with_key = 0, 0
    for workspace in copies_killed_at_every_call(answered, merge, after):
        points += 1
        before = keys(workspace)
        seen = {path.read_bytes() for path in workspace.glob(f"rounds/.tmp-*/adapter/{ADAPTER}")}
        merge(workspace)
        now = keys(workspace)
        assert len(now) == 1
        assert before in ([], now)
        with_key += bool(before)
        whole = (workspace / "rounds/00001/adapter" / ADAPTER).read_bytes()
        assert all(whole.startswith(part[: len(whole)]) for part in seen), "another noise of the same sum was written"
        result = Federation(Workspace(workspace)).verify(noise_keys=now)
        assert (result.violations, result.num_recomputed) == ([], 1)
        assert "releases" not in read_manifest(workspace, 1)["aggregation"]["privacy"]
    assert points >= 50
    assert 10 <= with_key < points
