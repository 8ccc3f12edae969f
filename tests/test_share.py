"""aggregation.share: which of LoRA's factors are trained, sent and kept, with every algorithm and way to merge."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.federation import (
    ADAPTER,
    NUM_SAMPLES,
    configure,
    read_adapter,
    read_manifest,
)
from support.processes import settings
from support.secure import make, merge, used, visit
from support.sharing import play, sharing

from fedcli import Federation
from fedcli.algos import ALGORITHMS, FedAvg, MergedUpdates
from fedcli.algos.fedavgm import FedAvgM
from fedcli.algos.share import freezing, private_tensors, sent_tensors, without_unsent
from fedcli.cli import main
from fedcli.errors import NotReadyError, UsageError
from fedcli.scoring.own_adapters import own_adapter
from fedcli.scoring.targets import Targets, find_targets
from fedcli.workspace.layout import Workspace

SHARES = ("[B]", "alternate", "[A]")
A, B = "q_proj.lora_A.weight", "q_proj.lora_B.weight"


def sent_by(workspace: Path, number: int, client: int) -> dict[str, np.ndarray]:
    return load_file(workspace / "inbox" / str(client) / f"round-{number:05d}" / ADAPTER)


def letters(names) -> set[str]:
    return {"A" if ".lora_A." in name else "B" for name in names}


def test_ffas_mean_of_b_times_the_common_a_is_the_mean_of_the_products_digit_for_digit():
    """The vector of FFA-LoRA (2403.12313), K = 2, p = (1/4, 3/4)."""
    p, x = (0.25, 0.75), {A: np.array([[1.0, 2]]), B: np.zeros((3, 1))}
    sent = [np.array([[1.0], [0], [2]]), np.array([[2.0], [1], [0]])]
    difference = {A: np.zeros((1, 2)), B: sum(share * b for share, b in zip(p, sent, strict=True))}
    assert sent_tensors(FedAvg(), "B", 0, x) == [B]
    step = FedAvg().apply(x, MergedUpdates(difference), {})
    after, _ = without_unsent(FedAvg(), step, {A}, x, {})
    assert (after[B] @ after[A]).tolist() == [[1.75, 3.5], [0.75, 1.5], [0.5, 1.0]]
    assert (after[B] @ after[A]).tolist() == sum(s * (b @ x[A]) for s, b in zip(p, sent, strict=True)).tolist()


def test_rolora_trains_b_in_the_first_round_and_a_in_the_next_and_freezes_the_other():
    assert [sent_tensors(FedAvg(), "alternate", number, {A, B}) for number in range(4)] == [[B], [A], [B], [A]]
    rule = freezing(None, {A}, {A: 0, B: 0})
    assert (rule.trains(A), rule.trains(B), rule.gradient_term(1, 1), rule.weight_term(1, 1)) == (
        False,
        True,
        None,
        None,
    )
    assert freezing(None, set(), {}) is None


def test_momentum_moves_nothing_of_a_factor_that_was_not_sent_and_stands_still_itself():
    x = {A: np.ones(2, np.float32), B: np.ones(2, np.float32)}
    state = {f"m.{name}": np.full(2, 3, np.float32) for name in x}
    step = FedAvgM().apply(x, MergedUpdates({A: np.zeros(2), B: np.ones(2)}), state)
    after, following = without_unsent(FedAvgM(), step, {A}, x, state)
    assert (after[A].tolist(), following[f"m.{A}"].tolist()) == ([1, 1], [3, 3])
    assert (after[B] == step[0][B]).all()
    assert (following[f"m.{B}"] == step[1][f"m.{B}"]).all()


@pytest.mark.parametrize("share", SHARES)
def test_updates_have_half_the_bytes_and_what_is_not_sent_stays_as_it_was(small_template, tmp_path, share):
    workspace = sharing(small_template, tmp_path / "W", share)
    play(workspace, 2)
    start, whole = read_adapter(workspace, 0), sum(array.size for array in read_adapter(workspace, 0).values())
    for number in range(2):
        factor = {"[B]": "B", "[A]": "A", "alternate": "BA"[number]}[share]
        manifest = read_manifest(workspace, number)
        assert manifest["share"] == share.strip("[]")
        assert letters(manifest["update_tensors"]) == {factor}
        numbers = sum(start[name].size for name in manifest["update_tensors"])
        assert manifest["cost"]["communicated_parameters"] == numbers < whole
        before, after = read_adapter(workspace, number), read_adapter(workspace, number + 1)
        assert letters(name for name in before if not np.array_equal(before[name], after[name])) == {factor}
        updates = {client: sent_by(workspace, number, client) for client in NUM_SAMPLES}
        for client, update in updates.items():
            assert sorted(update) == manifest["update_tensors"]
            path = workspace / "inbox" / str(client) / f"round-{number:05d}" / ADAPTER
            assert path.stat().st_size == manifest["cost"]["client_bytes_up"]
        if share != "[A]":  # the mean of the factors is that of the products
            weights = {client: rows / sum(NUM_SAMPLES.values()) for client, rows in NUM_SAMPLES.items()}
            for a in filter(lambda name: ".lora_A." in name, before):
                b = a.replace(".lora_A.", ".lora_B.")
                each = {client: before | updates[client] for client in updates}
                mean = sum(weights[client] * each[client][b].astype(float) @ each[client][a] for client in updates)
                np.testing.assert_allclose(after[b].astype(float) @ after[a], mean, rtol=1e-5, atol=1e-6)
    assert Federation(Workspace(workspace)).verify().violations == []
    assert (workspace / "private/0/own-factors").exists() == (share == "[A]")


def test_fedsas_clients_go_on_from_their_own_b_and_begin_with_the_rounds(small_template, tmp_path):
    """The stand-in for a model descends to the point `client`: y = client + (begin - client) (1 - rate)^steps."""
    workspace = sharing(small_template, tmp_path / "W", "[A]")
    expected = {client: read_adapter(workspace, 0) for client in NUM_SAMPLES}
    for number in range(3):
        manifest = read_manifest(workspace, number)
        shrink = (1 - manifest["train"]["learning_rate"]) ** manifest["train"]["steps"]
        play(workspace, 1)
        for client, own in expected.items():
            kept = load_file(sorted((workspace / f"private/{client}/own-factors").glob(f"round-{number:05d}-*"))[0])
            assert letters(kept) == {"B"}
            for name, array in kept.items():
                own[name] = client + (own[name] - client) * shrink
                np.testing.assert_allclose(array, own[name], rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match=r"round 3 has no global adapter: with aggregation.share: \[A\]"):
        find_targets(Federation.open(workspace).state, Targets(rounds=("3",)))
    targets = find_targets(Federation.open(workspace).state, Targets())
    assert [target.name for target in targets] == ["base", *(f"own-{client}-round-00003" for client in NUM_SAMPLES)]
    whole = targets[2].arrays()
    latest = read_adapter(workspace, 3)
    for name, array in whole.items():
        wanted = latest[name] if ".lora_A." in name else expected[1][name]
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-7)


def test_own_factors_that_are_gone_are_a_violation_and_those_of_a_round_merged_from_them_are_still_had(
    small_template, tmp_path, monkeypatch
):
    workspace = sharing(small_template, tmp_path / "W", "[A]")
    play(workspace, 1)
    configure(workspace, "aggregation.share=[A, B]")
    play(workspace, 1)  # made with [A] as it was opened; the next one is not
    state = Federation.open(workspace).state
    assert [found.name for found in find_targets(state, Targets())] == ["base"] + [
        f"own-{client}-round-00002" for client in NUM_SAMPLES
    ]
    own = own_adapter(state, 1)
    kept = load_file(sorted((workspace / "private/1/own-factors").glob("round-00001-*"))[0])
    assert all(np.array_equal(own.arrays[name], kept.get(name, array)) for name, array in state.head.adapter().items())
    monkeypatch.chdir(workspace)
    assert main(["export", str(tmp_path / "out"), "--client", "1"]) == 0
    assert main(["export", str(tmp_path / "other")]) == 2
    play(workspace, 1)
    assert [found.name for found in find_targets(Federation.open(workspace).state, Targets())] == [
        "base",
        "round-00003",
    ]
    back = sharing(small_template, tmp_path / "again", "[A]")
    play(back, 1)
    shutil.rmtree(back / "private/0/own-factors")
    (violation,) = Federation(Workspace(back)).verify().violations
    assert "client 0's private state of aggregation.share is gone or damaged" in violation.problem


def test_private_tensors_are_named_by_parts_of_their_names_and_stay_with_their_clients(small_template, tmp_path):
    names = {
        f"model.layers.{layer}.{module}_proj.lora_{f}.weight" for layer in range(12) for module in "qv" for f in "AB"
    }
    assert private_tensors(["layers.3"], names) == sorted(name for name in names if ".layers.3." in name)
    assert len(private_tensors(["layers.9-11", "v_proj.lora_A"], names)) == 3 * 4 + 9
    assert private_tensors(["layers.1.lora_A", "proj"], names) == []
    workspace = sharing(small_template, tmp_path / "W", "[B]", "fedavg", "aggregation.private=[v_proj]")
    play(workspace, 2)
    manifest, start, after = read_manifest(workspace, 1), read_adapter(workspace, 0), read_adapter(workspace, 2)
    assert manifest["private"] == sorted(name for name in start if "v_proj" in name)
    assert manifest["update_tensors"] == sorted(name for name in start if "q_proj" in name and ".lora_B." in name)
    assert {name for name in start if not np.array_equal(start[name], after[name])} == {*manifest["update_tensors"]}
    (target,) = find_targets(Federation.open(workspace).state, Targets(clients=(1,)))
    own = {name for name, array in target.arrays().items() if not np.array_equal(array, after[name])}
    assert own == {*manifest["private"]}  # both factors, though A is frozen elsewhere
    assert Federation(Workspace(workspace)).verify().violations == []


def test_an_update_of_one_factor_is_scored_with_the_frozen_other(small_template, tmp_path):
    workspace = sharing(small_template, tmp_path / "W", "alternate")
    play(workspace, 1)
    (target,) = find_targets(Federation.open(workspace).state, Targets(clients=(1,)))
    assert target.name == "client-1-round-00000"
    expected = read_adapter(workspace, 0) | sent_by(workspace, 0, 1)
    found = target.arrays()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_manifest_whose_share_and_tensors_differ_is_a_violation(small_template, tmp_path):
    workspace = sharing(small_template, tmp_path / "W", "[B]")
    path = workspace / "rounds/00000/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"share": "A"}))
    problems = [violation.problem for violation in Federation(Workspace(workspace)).verify().violations]
    assert "asks for other tensors than its algorithm has updates carry" in problems


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("train.personal={name: ditto}", "aggregation.share: [A] and train.personal: {name: ditto} exclude each other"),
        ("eval={every: 1, benchmarks: [demo]}", "aggregation.share: [A] and eval.every: 1 exclude each other"),
        ("federation.relay_every=2", "aggregation.share: [A] and federation.relay_every: 2 exclude each other"),
        ("aggregation.share=[B, C]", "aggregation.share: it is none of [A, B]; [A]; [B]; alternate (found ['B', 'C'])"),
        ("aggregation.share=B", "aggregation.share: it is none of [A, B]; [A]; [B]; alternate (found B)"),
    ],
)
def test_what_cannot_stand_beside_it_is_told_with_both_keys(tmp_path, capsys, more, told):
    assert main(["init", str(tmp_path / "W"), *settings("aggregation.share=[A]", more)]) == 3
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("share", "algorithm"), [*product(SHARES, ALGORITHMS)])
def test_every_algorithm_shares_every_way_and_is_verified(small_template, tmp_path, share, algorithm):
    workspace = sharing(small_template, tmp_path / "W", share, algorithm)
    play(workspace, 3)
    assert Federation(Workspace(workspace)).verify().violations == []
    before, after = read_manifest(workspace, 2), read_adapter(workspace, 3)
    start = read_adapter(workspace, 0)
    if share != "alternate":
        frozen = start.keys() - before["update_tensors"]
        assert all(np.array_equal(start[name], after[name]) for name in frozen)
    if algorithm == "scaffold":
        control = [load_file(workspace / f"rounds/{number:05d}/control.safetensors") for number in (2, 3)]
        moved = {name for name in control[0] if not np.array_equal(control[0][name], control[1][name])}
        assert moved == {*before["update_tensors"]}
        kept = [sorted((workspace / "private/1/control").glob(f"round-0000{number}-*"))[-1] for number in (1, 2)]
        one, two = map(load_file, kept)
        assert {name for name in one if not np.array_equal(one[name], two[name])} == {*before["update_tensors"]}


@pytest.mark.slow
@pytest.mark.parametrize(("share", "rule"), [*product(SHARES, ("median", "krum", "geometric_median"))])
def test_robust_rules_and_noise_of_clients_merge_what_is_sent(small_template, tmp_path, share, rule):
    more = [f"aggregation.rule={rule}", "aggregation.tolerate=0"]
    workspace = sharing(small_template, tmp_path / "W", share, "fedavg", *more)
    play(workspace, 2)
    assert Federation(Workspace(workspace)).verify().violations == []
    private = sharing(small_template, tmp_path / "P", share, "fedavg", "privacy={unit: client, clip: 0.5, noise: 1.5}")
    play(private, 2)
    start, after = read_adapter(private, 0), read_adapter(private, 2)
    moved = letters(name for name in start if not np.array_equal(start[name], after[name]))
    assert moved == {"[A]": {"A"}, "[B]": {"B"}, "alternate": {"A", "B"}}[share]


@pytest.mark.slow
@pytest.mark.parametrize(("share", "mode"), [*product(SHARES, ("pairwise", "double"))])
def test_masked_sums_are_of_what_is_sent(small_template, tmp_path, monkeypatch, share, mode):
    template = make(small_template, tmp_path / "made", mode, 4, share=share)
    workspace = used(template, tmp_path / "W", monkeypatch)
    for _ in range(2):
        visit(workspace, 0, 1, 2, 3)
        if mode == "double":  # what hides a late update has to be taken off with a visit of its own
            with pytest.raises(NotReadyError):
                merge(workspace)
            visit(workspace, 0, 1, 2, 3)
        merge(workspace)
    start, after = read_adapter(workspace, 0), read_adapter(workspace, 2)
    moved = letters(name for name in start if not np.array_equal(start[name], after[name]))
    assert moved == {"[A]": {"A"}, "[B]": {"B"}, "alternate": {"A", "B"}}[share]
    assert Federation(Workspace(workspace)).verify().violations == []
    if share == "[A]":  # of parties, whose homes are not in the workspace
        targets = find_targets(Federation.open(workspace).state, Targets(all_clients=True))
        assert [target.name for target in targets] == [f"own-{client}-round-00002" for client in range(4)]
        assert not (workspace / "private/0").exists()
