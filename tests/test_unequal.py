"""Updates of unequal steps, and of earlier rounds: FedNova, FedBuff, time limits and AdamW's moments."""

import json
import math
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import load_file
from support.damage import edited, tear
from support.federation import Stub, configure, noisy, read_adapter, read_manifest, read_update, train_as
from support.federation import restart as reopen
from support.kills import copies_killed_at_every_call, fork, was_killed
from support.signed import at, identity_of, join, make_signed, train

from fedcli import Federation, Observer
from fedcli.algos.unequal import age_factor, factors
from fedcli.cli import main
from fedcli.client.draws import first_draw
from fedcli.client.due import train_client
from fedcli.config import parse_config
from fedcli.errors import ConfigError, FedError, IntegrityError, NotReadyError
from fedcli.server.late import late_of
from fedcli.training.limits import TimeLimit
from fedcli.workspace.client_state import read_states
from fedcli.workspace.federation_state import train_record
from fedcli.workspace.layout import Workspace
from fedcli.workspace.registrations import own_homes


def test_fednova_makes_the_step_of_its_vector():
    differences = np.array([(-1.0, 0.0), (0.0, -4.0)])
    given = factors([1, 3], steps=[10, 40])
    np.testing.assert_allclose(given @ differences, (-0.8125, -2.4375), rtol=1e-15)
    np.testing.assert_allclose(factors([1, 3]) @ differences, (-0.25, -3.0), rtol=1e-15)
    assert factors([1, 3], steps=[7, 7]) == pytest.approx([0.25, 0.75], rel=1e-15)


def test_fedbuff_makes_the_step_of_its_vector_and_ages_as_its_authors_do():
    assert [round(age_factor(age), 6) for age in (0, 1, 3, 8)] == [1, 0.707107, 0.5, 0.333333]
    differences = np.array([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
    assert [round(each, 6) for each in factors([1, 1, 1], ages=[0, 3, 8]) @ differences] == [0.444444, 0.277778]
    assert [round(each, 6) for each in factors([1, 1, 1]) @ differences] == [0.666667, 0.666667]


WINDOW = ("aggregation.staleness=2", "federation.per_round=2", "federation.select=3")


@pytest.fixture
def open_small(small: Path, monkeypatch: pytest.MonkeyPatch):
    """Return what opens a workspace of three clients with settings, as the current folder."""

    def opened(*overrides: str, algorithm: str = "fedavg") -> Path:
        configure(small, "federation.rounds=8", *overrides)
        reopen(small, algorithm)
        monkeypatch.chdir(small)
        return small

    return opened


def answer(workspace: Path, client: int, steps: int = 2, number: int | None = None) -> None:
    """Let a client answer the open round with noise of its own, having made so many steps."""
    number = len(list((workspace / "rounds").glob("0*"))) - 1 if number is None else number
    assert take_part(workspace, client, noisy(10 * number + client), 3 + client)
    path = workspace / f"inbox/{client}/round-{number:05d}/update.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"steps": steps, "checksum": None}))


def merge(workspace: Path, **options) -> dict:
    """Merge the open round; return what the next manifest says of it."""
    federation = Federation.open(workspace)
    assert federation.server.aggregate(**options).published
    return read_manifest(workspace, federation.state.head.number)["aggregation"]


def two_answer(workspace: Path) -> None:
    """Let clients 0 and 1 answer the open round, and merge it."""
    for client in (0, 1):
        answer(workspace, client)
    merge(workspace)


def is_clean(workspace: Path) -> bool:
    found = Federation(Workspace(workspace)).verify()
    return (found.violations, found.num_recomputed) == ([], found.num_rounds - 1)


def check_step(workspace: Path, number: int, expected: dict[tuple[int, int], float]) -> None:
    """Assert that a round is the one before and the sum of differences from their own bases, by (base, client)."""
    for name, before in read_adapter(workspace, number - 1).items():
        step = sum(
            factor * (read_update(workspace, base, client)[name] - read_adapter(workspace, base)[name].astype(float))
            for (base, client), factor in expected.items()
        )
        np.testing.assert_allclose(read_adapter(workspace, number)[name], before + step, atol=1e-7)


@pytest.mark.parametrize("cap", [None, 1.0])
def test_a_round_merged_by_fednova_is_its_formula_and_is_computed_again(open_small, cap):
    workspace = open_small(
        "aggregation.step_weighting=fednova", "train.steps=10", f"aggregation.weight_cap={cap or 'null'}"
    )
    made = {0: 10, 1: 4, 2: 1}
    for client, steps in made.items():
        answer(workspace, client, steps)
    found = merge(workspace)
    assert found["step_weighting"] == "fednova"
    assert {entry["client"]: entry["steps"] for entry in found["counted"]} == made
    rows = {client: 3 + client for client in made}
    if cap is not None:  # no difference is multiplied by more than the median's 4 / 4
        rows = {client: made[client] * min(rows[client] / made[client], 1.0) for client in made}
    total = sum(rows.values())
    effective = sum(rows[client] * made[client] for client in made) / total
    given = {client: rows[client] / total * effective / made[client] for client in made}
    assert {entry["client"]: entry["weight"] for entry in found["counted"]} == pytest.approx(given)
    check_step(workspace, 1, {(0, client): factor for client, factor in given.items()})
    assert is_clean(workspace)


def test_momentum_moves_nothing_of_the_factor_that_fednovas_round_did_not_send(open_small):
    workspace = open_small(
        "aggregation.step_weighting=fednova", "aggregation.share=alternate", "train.steps=2", algorithm="fedavgm"
    )
    for number, frozen in ((1, ".lora_A."), (2, ".lora_B."), (3, ".lora_A.")):
        for client in range(3):
            train_as(client, workspace)
        merge(workspace)
        before, after = read_adapter(workspace, number - 1), read_adapter(workspace, number)
        assert {name for name in after if np.array_equal(after[name], before[name])} == {
            name for name in after if frozen in name
        }
    assert is_clean(workspace)


def test_a_window_that_is_open_when_products_take_its_place_is_computed_again_as_merged(open_small):
    workspace = open_small(*WINDOW)
    configure(workspace, "aggregation.staleness=0", "aggregation.lora=product")
    for client in (0, 1):
        answer(workspace, client)
    assert merge(workspace)["lora"]["lora"] == "product"
    assert is_clean(workspace)


def test_a_late_update_of_a_round_that_does_not_exist_or_asked_for_other_tensors_is_a_violation(open_small):
    workspace = open_small(*WINDOW, "train.keep_optimizer=true", "aggregation.share=[B]")
    for number in range(2):
        if number == 0:
            configure(workspace, "aggregation.share=[A, B]")
        for client in (0, 1):
            train_as(client, workspace)
        merge(workspace)
    assert is_clean(workspace)
    digest = read_manifest(workspace, 1)["aggregation"]["counted"][0]["update"]
    edited(lambda manifest: manifest["aggregation"]["counted"][0].update(base=0, update=digest), workspace)
    problems = [each.problem for each in Federation(Workspace(workspace)).verify().violations]
    assert "speaks of client 0's update of round 0, whose updates carry other files or tensors" in problems
    edited(lambda manifest: manifest["aggregation"]["counted"][0].update(base=77), workspace)
    state = Federation.open(workspace).state
    with pytest.raises(IntegrityError, match="counts client 0's update of round 77, and there is none"):
        read_states(Workspace(workspace).private(0), [*state.past(), state.head], 0)


@pytest.mark.parametrize("setting", ["aggregation.step_weighting=fednova", "aggregation.staleness=1"])
def test_a_round_of_refused_updates_alone_waits_for_a_valid_one(open_small, setting):
    workspace = open_small(setting)
    for client in range(3):
        answer(workspace, client)
        tear(workspace, client)
    with pytest.raises(NotReadyError, match=r"has no valid update:\n  client 0: size|waits for 3 more"):
        Federation.open(workspace).server.aggregate(refuse_arriving=True)


@pytest.mark.slow
def test_an_update_that_claims_more_steps_than_were_asked_for_is_refused_where_they_weigh(open_small):
    workspace = open_small("aggregation.step_weighting=fednova")
    for client, steps in ((0, 2), (1, 2), (2, 2**53)):
        answer(workspace, client, steps)
    found = merge(workspace)
    assert [(entry["client"], entry["code"]) for entry in found["refused"]] == [(2, "steps")]
    assert Federation(Workspace(workspace)).verify().remarks == []


def late(workspace: Path, client: int, number: int, then) -> None:
    """Let a client's update of the open round come only after `then` was done."""
    answer(workspace, client, number=number)
    update = workspace / f"inbox/{client}/round-{number:05d}"
    update.rename(workspace / "held-back")
    then()
    (workspace / "held-back").rename(update)


def test_late_updates_count_as_differences_from_their_own_base_and_once(open_small, capsys):
    workspace = open_small(*WINDOW)

    def two_rounds() -> None:
        for _ in range(2):
            for client in (0, 1):
                answer(workspace, client)
            merge(workspace)

    late(workspace, 2, 0, two_rounds)
    assert main(["status"]) == 0
    assert "late       client 2 from round 0 of the last 2 rounds may count now\n" in capsys.readouterr().out
    answer(workspace, 0)
    assert main(["server", "aggregate"]) == 0
    assert "merged 2 updates (clients 0, 2 from round 0)\n" in capsys.readouterr().out
    found = read_manifest(workspace, 3)["aggregation"]
    factor = {(0, 2): 5 / 8 / 3**0.5, (2, 0): 3 / 8}
    weights = {(entry.get("base", 2), entry["client"]): entry["weight"] for entry in found["counted"]}
    assert weights == pytest.approx(factor)
    assert (found["missing"], found["surplus"]) == ([1, 2], [])
    check_step(workspace, 3, factor)
    assert is_clean(workspace)
    answer(workspace, 1)
    assert main(["server", "aggregate"]) == 6  # nothing of client 2 counts again
    answer(workspace, 2)
    assert {(entry["client"], entry.get("base")) for entry in merge(workspace)["counted"]} == {(1, None), (2, None)}
    assert is_clean(workspace)
    edited(lambda manifest: manifest["aggregation"]["counted"][0].update(base=0), workspace)
    assert main(["verify"]) == 7


@pytest.mark.slow
def test_what_is_not_needed_counts_in_a_later_round_and_lapses_with_the_window(open_small):
    workspace = open_small(*WINDOW, "aggregation.staleness=1")
    for client in range(3):
        answer(workspace, client)
    first = merge(workspace)
    (surplus,) = first["surplus"]
    others = [client for client in range(3) if client != surplus]
    answer(workspace, others[0])
    found = merge(workspace)
    assert [(entry["client"], entry.get("base")) for entry in found["counted"]] == sorted(
        [(surplus, 0), (others[0], None)]
    )
    assert is_clean(workspace)


def test_a_fast_client_counts_so_often_in_a_window_and_no_more(open_small, capsys):
    workspace = open_small("aggregation.staleness=1", "federation.per_round=1", "federation.select=3")
    configure(workspace, "aggregation.most_counted=1")
    answer(workspace, 1)
    assert merge(workspace)["most_counted"] == 1
    answer(workspace, 1)
    assert main(["server", "aggregate"]) == 6
    assert (
        "client 1 counted 1 times in 2 rounds, as often as aggregation.most_counted allows" in capsys.readouterr().err
    )
    answer(workspace, 0)
    assert [entry["client"] for entry in merge(workspace)["counted"]] == [0]
    answer(workspace, 2)
    found = merge(workspace)  # of round 2: the window has passed that counted client 1, and its update waits
    assert [(entry["client"], entry.get("base")) for entry in found["counted"]] == [(1, 1)]
    assert is_clean(workspace)


def test_a_late_update_may_be_set_aside_and_then_does_not_count(open_small, capsys):
    workspace = open_small(*WINDOW)

    late(workspace, 2, 0, partial(two_answer, workspace))
    assert main(["server", "discard", "--id", "2"]) == 0
    assert main(["server", "discard", "--id", "2"]) == 0
    assert capsys.readouterr().out == (
        "client 2: its update is set aside\nclient 2: has no update that may still count\n"
    )
    for client in (0, 1):
        answer(workspace, client)
    assert [(entry["client"], entry.get("base")) for entry in merge(workspace)["counted"]] == [(0, None), (1, None)]
    assert is_clean(workspace)


def test_a_round_whose_own_adapter_was_pruned_and_that_counted_late_updates_alone_is_no_violation(open_small):
    """Clients 0 and 1 answer round 0, of which one counts; the other one is all that round 1's merge counts."""
    workspace = open_small(
        "aggregation.staleness=1", "federation.per_round=1", "federation.select=3", "retention.keep_last=1"
    )
    for client in (0, 1, 2):
        answer(workspace, client)
    for _ in range(2):
        merge(workspace)
    for _ in range(2):
        answer(workspace, 0)
        merge(workspace)
    assert {entry.get("base") for entry in read_manifest(workspace, 2)["aggregation"]["counted"]} == {0}
    done = Federation.open(workspace).gc()
    assert 1 in done.rounds
    found = Federation(Workspace(workspace)).verify()
    assert found.violations == []
    assert found.num_pruned > 0


def test_late_updates_of_who_has_left_take_no_places_of_the_others(small_template, tmp_path):
    home = tmp_path / "home"
    workspace = make_signed(small_template, tmp_path / "signed", home, *WINDOW, "federation.rounds=8")
    with at(home):
        for client in range(3):
            Federation.open(workspace).server.enrol(client, join(workspace, client))
        for client in range(3):
            train(workspace, client)
        merge(workspace)  # round 0 was opened without a window
        for client in range(3):
            train(workspace, client)
        (surplus,) = merge(workspace)["surplus"]
        assert Federation.open(workspace).status().late == {1: [surplus]}
        Federation.open(workspace).client(surplus).leave()
        assert Federation.open(workspace).status().leaving == [surplus]
        stays = next(client for client in range(3) if client != surplus)
        train(workspace, stays)
        with pytest.raises(NotReadyError, match="waits for 1 more"):
            Federation.open(workspace).server.aggregate()
        status = Federation.open(workspace).status()
        assert (status.late, status.leaving, status.gone) == ({}, [], {surplus: "leave"})


@pytest.mark.parametrize("edit", ["aggregation.lora=product", "aggregation.lora_error=true", "aggregation.rule=median"])
def test_where_a_merge_can_take_no_late_update_the_round_waits_for_enough_of_its_own(open_small, edit):
    workspace = open_small(*WINDOW)

    late(workspace, 2, 0, partial(two_answer, workspace))
    answer(workspace, 0)
    configure(workspace, "aggregation.staleness=0", "aggregation.tolerate=0", edit)
    with pytest.raises(NotReadyError, match="waits for 1 more of its 3 clients"):
        Federation.open(workspace).server.aggregate()
    answer(workspace, 1)
    assert [(entry["client"], entry.get("base")) for entry in merge(workspace)["counted"]] == [(0, None), (1, None)]
    assert is_clean(workspace)


@pytest.mark.slow
def test_gc_keeps_what_late_updates_need(open_small):
    workspace = open_small(*WINDOW, "retention.keep_last=1")

    def rounds() -> None:
        for _ in range(4):
            for client in (0, 1):
                answer(workspace, client)
            merge(workspace)

    late(workspace, 2, 0, rounds)  # too late, and gone with its round
    done = Federation.open(workspace).gc()
    assert (done.rounds, done.kept[2], done.kept[3]) == ([1], "updates made from it may still count", done.kept[2])
    assert Federation(Workspace(workspace)).verify().violations == []


@pytest.mark.parametrize(
    ("sections", "names"),
    [
        (
            {"aggregation": {"staleness": 1}, "algorithm": {"name": "scaffold"}},
            ("aggregation.staleness", "algorithm.name"),
        ),
        ({"aggregation": {"staleness": 1, "rule": "median"}}, ("aggregation.staleness", "aggregation.rule")),
        ({"aggregation": {"step_weighting": "fednova", "rule": "krum"}, "federation": {"clients": 9}},
         ("aggregation.step_weighting", "aggregation.rule")),
        ({"train": {"steps": {"max": 4, "minutes": 1}}, "privacy": {"unit": "row", "clip": 1, "noise": 1}},
         ("train.steps", "privacy.unit")),
        ({"train": {"steps": {"max": 4, "epochs": 1}}, "privacy": {"unit": "client", "clip": 1, "noise": 1}},
         ("train.steps", "privacy.unit")),
        ({"train": {"steps": {"max": 4, "epochs": 1}}, "privacy": {"secure_aggregation": "double"}},
         ("train.steps", "privacy.secure_aggregation")),
        ({"aggregation": {"most_counted": 1}}, ("most_counted", "staleness")),
        ({"aggregation": {"staleness": 1, "most_counted": 1}}, ("aggregation.most_counted", "federation.per_round")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_configuration_error_that_names_both(sections, names):
    with pytest.raises(ConfigError) as caught:
        parse_config(sections, "fedcli.yaml")
    assert all(name in caught.value.message for name in names)


def test_a_federation_without_any_of_it_writes_no_key_of_it(open_small):
    workspace = open_small()
    for client in range(3):
        answer(workspace, client)
    merge(workspace)
    manifest = read_manifest(workspace, 1)
    assert not {"minutes", "epochs", "keep_optimizer"} & manifest["train"].keys()
    assert "staleness" not in manifest
    assert not {"step_weighting", "most_counted"} & manifest["aggregation"].keys()
    assert not {"steps", "base"} & manifest["aggregation"]["counted"][0].keys()


def test_a_time_limit_stops_before_a_step_that_would_not_fit_and_never_before_the_first(monkeypatch):
    clock = iter([100.0, 104.0, 107.0, 111.0, 0.0, 99.0])
    monkeypatch.setattr("fedcli.training.limits.time.monotonic", lambda: next(clock))
    limit = TimeLimit(12.0)
    limit.begin()
    assert [limit.is_over(number) for number in (1, 2, 3)] == [False, False, True]  # 7 + 4 fit into 12, 11 + 4 do not
    limit = TimeLimit(1.0)
    limit.begin()
    assert limit.is_over(1)


def test_a_draw_goes_on_where_the_rounds_before_left_off(open_small):
    workspace = open_small("federation.per_round=2")
    for number in range(3):
        state = Federation.open(workspace).state
        rounds = [*state.past(), state.head]
        took_part = [sum(client in each.manifest.cohort for each in rounds[:-1]) for client in range(3)]
        assert [first_draw(rounds, client) for client in range(3)] == [8 * times for times in took_part]
        for client in state.head.manifest.cohort:
            answer(workspace, client, number=number)
        merge(workspace)


@pytest.mark.slow
def test_what_lies_in_the_window_is_drawn_and_what_lapsed_is_drawn_again(open_small):
    workspace = open_small(*WINDOW, "aggregation.staleness=1")

    def draws() -> list[int]:
        state = Federation.open(workspace).state
        return [first_draw([*state.past(), state.head], client) for client in range(3)]

    for client in range(3):
        answer(workspace, client)
    (surplus,) = merge(workspace)["surplus"]
    others = [client for client in range(3) if client != surplus]
    assert draws() == [8, 8, 8]
    configure(workspace, "aggregation.rule=norm_clip", "aggregation.staleness=0")  # of round 1's updates alone
    for client in others:
        answer(workspace, client)
    merge(workspace)
    assert [draws()[client] for client in (*others, surplus)] == [16, 16, 0]
    assert Federation(Workspace(workspace)).verify().violations == []


def test_a_client_that_its_limit_stops_says_how_many_steps_it_made_and_goes_on_where_it_stopped(open_small, capsys):
    workspace = open_small("train.steps={max: 1000, minutes: 0.02}")
    manifest = read_manifest(workspace, 0)
    assert (manifest["train"]["steps"], manifest["train"]["minutes"]) == (1000, 0.02)
    answer(workspace, 0, steps=7)
    answer(workspace, 1, steps=1000)
    answer(workspace, 2, steps=3)
    state = Federation.open(workspace).state
    assert [first_draw([state.head], client) for client in range(3)] == [0, 0, 0]
    found = merge(workspace)
    assert {entry["client"]: entry["steps"] for entry in found["counted"]} == {0: 7, 1: 1000, 2: 3}
    state = Federation.open(workspace).state
    assert [first_draw([*state.past(), state.head], client) for client in range(3)] == [28, 4000, 28 - 16]
    assert main(["status"]) == 0
    assert "steps      0: 7, 1: 1000, 2: 3 (by client, round 0)\n" in capsys.readouterr().out


def test_a_client_makes_its_passes_over_its_own_rows_and_goes_on_behind_them(open_small):
    workspace = open_small("train.steps={max: 400, epochs: 1.5}")
    train = read_manifest(workspace, 0)["train"]
    assert (train["steps"], train["epochs"], train["batch_size"]) == (400, 1.5, 4)

    def one_round() -> list[int]:
        for client in range(3):
            train_as(client, workspace)
        return [entry["steps"] for entry in merge(workspace)["counted"]]

    assert one_round() == [math.ceil(rows * 1.5 / 4) for rows in (3, 50, 447)] == [2, 19, 168]
    configure(workspace, "train.steps={max: 400, epochs: 0.1}")
    one_round()
    assert one_round() == [1, 2, 12]
    configure(workspace, "train.steps={max: 1, epochs: 2}", "aggregation.step_weighting=fednova")
    one_round()
    assert one_round() == [1, 1, 1]
    state = Federation.open(workspace).state
    rounds = [*state.past(), state.head]
    made = [(2, 19, 168), (2, 19, 168), (1, 2, 12), (1, 2, 12), (1, 1, 1)]
    assert [first_draw(rounds, client) for client in range(3)] == [4 * sum(each) for each in zip(*made, strict=True)]
    assert Federation(Workspace(workspace)).verify().violations == []


def test_a_party_whose_passes_are_few_still_makes_the_steps_of_its_floors():
    train = parse_config({"train": {"steps": {"max": 9, "epochs": 0.1}, "batch_size": 4}}, "fedcli.yaml")
    record = train_record(train, 0, 1)
    assert [record.for_rows(20, least=least).steps for least in (1, 3, 99)] == [1, 3, 9]
    assert [record.for_rows(rows).steps for rows in (1, 40, 41, 10**6)] == [1, 1, 2, 9]


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ({"max": 9}, "max stands beside minutes or epochs"),
        ({"max": 9, "epochs": 0}, "train.steps.epochs"),
        ({"epochs": 1}, "train.steps.max"),
        ({"max": 9, "epochs": 1, "minutes": -1}, "train.steps.minutes"),
    ],
)
def test_limits_of_steps_that_make_no_sense_are_faults(steps, problem):
    with pytest.raises(ConfigError) as caught:
        parse_config({"train": {"steps": steps}}, "fedcli.yaml")
    assert problem in caught.value.message


@pytest.mark.slow
def test_a_merge_of_late_updates_killed_at_any_system_call_loses_and_doubles_nothing(open_small, tmp_path):
    workspace = open_small(*WINDOW)

    late(workspace, 2, 0, partial(two_answer, workspace))
    answer(workspace, 0)
    answer(workspace, 1)

    def merge_it(copy: Path) -> None:
        Federation.open(copy).server.aggregate()

    undisturbed = Path(shutil.copytree(workspace, tmp_path / "undisturbed"))
    merge_it(undisturbed)
    for after in (False, True):
        for copy in copies_killed_at_every_call(workspace, merge_it, after, stride=3):
            if not (copy / "rounds/00002").exists():
                merge_it(copy)
            assert read_manifest(copy, 2)["aggregation"] == read_manifest(undisturbed, 2)["aggregation"]
            assert is_clean(copy)


class Slow(Stub):
    """A training that takes a while, so that kills and merges come in between."""

    def train(self, adapter, train, *, party, rule, **others):
        time.sleep(0.02 * (3 if party.client == 2 else 1))
        return super().train(adapter, train, party=party, rule=rule, **others)


def train_for_ever(workspace: Path, client: int) -> None:
    while train_client(Federation.open(workspace).state, client, Slow(), observer=Observer()).status != "finished":
        time.sleep(0.01)


def merge_for_ever(workspace: Path) -> None:
    federation = Federation.open(workspace)
    while True:
        try:
            if federation.server.aggregate().status == "finished":
                return
        except FedError:
            time.sleep(0.01)


@pytest.mark.slow
def test_kill_9_at_any_moment_of_an_asynchronous_federation_loses_and_doubles_nothing(open_small):
    workspace = open_small(*WINDOW, "aggregation.staleness=1000", "federation.rounds=5000")
    works = [partial(train_for_ever, workspace, client) for client in range(3)] + [partial(merge_for_ever, workspace)]
    draws, children = random.Random(2026), [fork(work) for work in works]
    for _ in range(80):
        time.sleep(draws.uniform(0, 0.4))
        place = draws.randrange(4)
        os.kill(children[place], signal.SIGKILL)
        was_killed(children[place])
        children[place] = fork(works[place])
    for child in children:
        os.kill(child, signal.SIGKILL)
        was_killed(child)
    found = Federation(Workspace(workspace)).verify()
    assert (found.violations, found.remarks) == ([], [])
    assert found.num_recomputed == found.num_rounds - 1 >= 5
    merged = {number: read_manifest(workspace, number + 1)["aggregation"] for number in range(found.num_rounds - 1)}
    entries = [(number, entry) for number, merge in merged.items() for entry in merge["counted"]]
    counted = [(entry.get("base", number), entry["client"]) for number, entry in entries]
    assert any("base" in entry for _, entry in entries)
    assert len(counted) == len(set(counted))
    sent = {(int(path.name[6:]), int(path.parent.name)) for path in (workspace / "inbox").glob("*/round-*")}
    assert {*counted} <= sent
    state = Federation.open(workspace).state
    waiting = {(base.number, client) for base, client in late_of(state)[0]}
    waiting |= {(state.head.number, client) for client in range(3) if state.head.has_update(client)}
    assert sent - {*counted} == waiting
    assert {client for _, client in counted} == {0, 1, 2}


@pytest.mark.slow
def test_a_late_update_of_a_party_is_checked_by_its_signature_and_its_home_hears_what_came_of_it(
    small_template, tmp_path
):
    home = tmp_path / "home"
    workspace = make_signed(small_template, tmp_path / "signed", home, *WINDOW, "federation.rounds=8")
    with at(home):
        for client in range(3):
            Federation.open(workspace).server.enrol(client, join(workspace, client))
        for client in range(3):
            train(workspace, client)
        merge(workspace)  # round 0 was opened without a window
        train(workspace, 2)
        update = workspace / "inbox/2/round-00001"
        update.rename(workspace / "held-back")
        for client in (0, 1):
            train(workspace, client)
        merge(workspace)
        (workspace / "held-back").rename(update)
        train(workspace, 2)  # which knows of no outcome yet
        found = merge(workspace)
        assert [(entry["client"], entry.get("base")) for entry in found["counted"]] == [(2, 1), (2, None)]
        assert is_clean(workspace)
        train(workspace, 2)
        lines = [json.loads(line) for line in (own_homes(identity_of(workspace))[2].history).read_text().splitlines()]
        outcomes = [(line["round"], line["result"]) for line in lines if line["event"] == "outcome"]
        assert outcomes == [(0, "counted"), (1, "counted"), (2, "counted")]
        signature = update / "update.sig"
        signature.write_text("0" * 128 + "\n")
        problems = [each.problem for each in Federation(Workspace(workspace)).verify().violations]
        assert any("signature" in problem for problem in problems)


@pytest.mark.slow
def test_clients_keep_adamws_moments_from_counted_round_to_counted_round(open_small):
    workspace = open_small("train.keep_optimizer=true", "federation.rounds=2")
    assert read_manifest(workspace, 0)["train"]["keep_optimizer"] is True
    assert main(["run"]) == 0
    kept = sorted((workspace / "private/0/optimizer").iterdir())
    steps = [{array.item() for name, array in load_file(path).items() if name.startswith("steps.")} for path in kept]
    assert steps[-1] == {4}
    assert is_clean(workspace)
    kept[-1].write_bytes(kept[-1].read_bytes()[:-1])
    assert main(["verify"]) == 7


@pytest.mark.slow
def test_a_real_client_stops_at_its_limit_and_its_update_counts(open_small, capsys):
    workspace = open_small("train.steps={max: 5000, minutes: 0.01}", "federation.rounds=1")
    assert main(["run"]) == 0
    made = {entry["client"]: entry["steps"] for entry in read_manifest(workspace, 1)["aggregation"]["counted"]}
    assert made.keys() == {0, 1, 2}
    assert all(1 <= steps < 5000 for steps in made.values())
    record = json.loads((workspace / "inbox/0/round-00000/update.json").read_bytes())
    assert record["steps"] == made[0]
    assert is_clean(workspace)
