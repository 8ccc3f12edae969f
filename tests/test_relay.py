"""Hierarchy: a region's parties merge first, only their sum travels, and the whole equals the flat mean."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.federation import configure, read_adapter, read_manifest
from support.kills import copies_killed_at_every_call
from support.regions import answer, make, merge, region, relay, verified

from fedcli import Federation
from fedcli.errors import ConfigError, FedError, IntegrityError, NotReadyError, UsageError
from fedcli.workspace.layout import default_home

slow = pytest.mark.slow
NORTH, SOUTH = (3, 5), (1, 5, 2)
"""Rows of two regions' parties: sixteen in all, so that means of whole numbers are exact."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process keeps keys and homes; workspaces are made beside it."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def nation(small_template: Path, home: Path) -> tuple[Path, Path, Path]:
    """A parent of two clients, and its two regions."""
    parent = make(small_template, home / "parent", "federation.clients=2")
    return (
        parent,
        region(small_template, home / "north", rows=NORTH),
        region(small_template, home / "south", rows=SOUTH),
    )


def update_of(parent: Path, client: int, number: int) -> dict:
    return json.loads((parent / f"inbox/{client}/round-{number:05d}/update.json").read_bytes())


def round_of_region(parent: Path, child: Path, client: int, rows: tuple[int, ...], first: int = 0) -> None:
    """Let a region do its part of the parent's round."""
    assert relay(parent, child, client).status == "opened"
    answer(child, rows, first)
    merge(child)
    assert relay(parent, child, client).status == "sent"


def test_a_relayed_federation_is_the_flat_one_bit_for_bit_where_sums_are_exact(
    nation: tuple[Path, Path, Path], small_template: Path, home: Path
) -> None:
    parent, north, south = nation
    flat = make(small_template, home / "flat", rows=NORTH + SOUTH)
    for number in (0, 1):
        round_of_region(parent, north, 0, NORTH)
        round_of_region(parent, south, 1, SOUTH, first=2)
        merge(parent)
        answer(flat, NORTH + SOUTH)
        merge(flat)
        ours, theirs = read_adapter(parent, number + 1), read_adapter(flat, number + 1)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    sent = update_of(parent, 1, 0)
    assert (sent["num_samples"], sent["steps"]) == (8, 2)
    assert sent["relay"]["round"] == 2
    assert json.loads((parent / "clients/1.json").read_bytes())["data"]["num_rows"] == 8
    for child, client in ((north, 0), (south, 1)):
        assert relay(parent, child, client).status == "ended"
        assert relay(parent, child, client).status == "finished"
        last = read_manifest(child, 5)
        assert (last["state"], last["rounds"]) == ("finished", 5)
        assert last["files"] == read_manifest(parent, 2)["files"]
        assert [read_manifest(child, number)["train"]["learning_rate"] for number in (1, 3)] == [
            read_manifest(parent, number)["train"]["learning_rate"] for number in (0, 1)
        ]
        assert verified(child).num_relayed == 3
    verified(parent)


def test_a_call_with_nothing_to_do_changes_nothing_and_says_what_is_waited_for(
    nation: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent, north, _ = nation
    with pytest.raises(NotReadyError, match="waits for its parent"):
        merge(north)
    assert Federation.open(north).status().next_command == f"fedcli relay --id N -w PARENT --from {north}"
    relay(parent, north, 0)
    with pytest.raises(ConfigError, match="whose parties hold the rows"):
        Federation.open(parent).client(0).train()
    assert Federation.open(parent).train_clients() == [], "--any passes a region over"
    assert relay(parent, north, 0).status == "waits_for_parties"
    answer(north, NORTH)
    merge(north)
    status = Federation.open(north).status()
    assert status.next_command == f"fedcli relay --id 0 -w {parent} --from {north}"
    assert status.relay is not None
    assert status.relay.parent is not None
    assert status.relay.parent.workspace == read_manifest(parent, 0)["workspace"]
    relay(parent, north, 0)
    monkeypatch.setattr(
        "fedcli.operations.relay.sum_up", lambda *_: pytest.fail("nothing is due: past rounds are read")
    )
    assert relay(parent, north, 0).status == "waits_for_parent"
    assert Federation.open(parent).status().regions == {0: read_manifest(north, 0)["workspace"]}


def test_a_parent_that_went_on_leaves_the_regions_round_behind(nation: tuple[Path, Path, Path]) -> None:
    parent, north, south = nation
    relay(parent, north, 0)
    answer(north, NORTH[:1])
    round_of_region(parent, south, 1, SOUTH)
    merge(parent, partial=True)
    assert relay(parent, north, 0).status == "opened"
    begun = read_manifest(north, 2)
    assert begun["relay"]["parent"]["round"] == 1
    assert (begun["aggregation"]["surplus"], begun["aggregation"]["missing"]) == ([0], [1])
    answer(north, NORTH)
    merge(north)
    assert relay(parent, north, 0).status == "sent"
    verified(north)
    verified(parent)


def test_a_discarded_sum_is_sent_again_and_more_rows_are_registered_before(nation: tuple[Path, Path, Path]) -> None:
    parent, north, _ = nation
    round_of_region(parent, north, 0, NORTH)
    assert Federation.open(parent).server.discard(0)
    assert relay(parent, north, 0).status == "sent"
    assert update_of(parent, 0, 0)["num_samples"] == 8
    registered = parent / "clients/0.json"
    registered.write_text(registered.read_text().replace('"num_rows": 8', '"num_rows": 7'))
    Federation.open(parent).server.discard(0)
    done = relay(parent, north, 0)
    assert done.joined is not None
    assert (done.status, done.joined.is_new, done.joined.region.num_rows) == ("sent", False, 8)


def test_a_region_of_a_region_is_one_more_level(small_template: Path, home: Path) -> None:
    top = make(small_template, home / "top", "federation.clients=1")
    middle = make(small_template, home / "middle", "federation.relay_every=1", "federation.clients=2")
    leaves = [region(small_template, home / f"leaf-{n}", rows=rows) for n, rows in enumerate((NORTH, SOUTH))]
    flat = make(small_template, home / "flat", rows=NORTH + SOUTH)
    assert relay(middle, leaves[0], 0).status == "waits_for_parent"
    with pytest.raises(NotReadyError, match="nobody has joined"):
        relay(make(small_template, home / "other", "federation.clients=1"), flat.parent / "top", 0)
    relay(middle, leaves[1], 1)
    for number in (0, 1):
        assert relay(top, middle, 0).status == "opened"
        round_of_region(middle, leaves[0], 0, NORTH)
        round_of_region(middle, leaves[1], 1, SOUTH, first=2)
        merge(middle)
        assert relay(top, middle, 0).status == "sent"
        merge(top)
        answer(flat, NORTH + SOUTH)
        merge(flat)
        ours, theirs = read_adapter(top, number + 1), read_adapter(flat, number + 1)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UsageError, match="itself a region below"):
        relay(leaves[0], top, 0)
    for parent, child, client in ((top, middle, 0), (middle, leaves[0], 0), (middle, leaves[1], 1)):
        assert relay(parent, child, client).status == "ended"
        verified(child)
    verified(top)


def test_several_rounds_of_a_region_go_into_one_of_its_parent(small_template: Path, home: Path) -> None:
    parent = make(small_template, home / "parent", "federation.clients=1")
    child = region(small_template, home / "child", rows=NORTH, every=3)
    relay(parent, child, 0)
    for left in (3, 2, 1):
        assert read_manifest(child, 4 - left)["relay"]["left"] == left
        assert read_manifest(child, 4 - left)["train"]["learning_rate"] == 0.004
        answer(child, NORTH, first=left)
        merge(child)
    done = relay(parent, child, 0)
    assert (done.status, update_of(parent, 0, 0)["steps"]) == ("sent", 6)
    merge(parent)
    assert relay(parent, child, 0).status == "opened"
    assert read_manifest(child, 5)["files"] == read_manifest(parent, 1)["files"]
    verified(child)


def test_a_federation_that_is_no_region_is_one_round_of_its_parent(small_template: Path, home: Path) -> None:
    parent = make(small_template, home / "parent", "federation.clients=1")
    child = make(small_template, home / "child", rows=NORTH)
    for number in (0, 1):
        assert relay(parent, child, 0).status == "waits_for_parties"
        answer(child, NORTH, first=number)
        merge(child)
    assert relay(parent, child, 0).status == "sent"
    merge(parent)
    assert relay(parent, child, 0).status == "finished"
    ours, theirs = read_adapter(parent, 1), read_adapter(child, 2)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    verified(parent)
    assert verified(child).num_relayed == 0


def test_a_region_that_nobody_answers_sends_nothing_and_takes_part_again(small_template: Path, home: Path) -> None:
    parent = make(small_template, home / "parent", "federation.clients=2")
    child = region(small_template, home / "child", rows=NORTH)
    relay(parent, child, 0)
    with pytest.raises(NotReadyError, match="waits for 2 more"):
        merge(child)
    (child / "inbox/0/round-00001").write_text("nonsense")
    with pytest.raises(NotReadyError, match="no valid update"):
        merge(child, partial=True)
    assert relay(parent, child, 0).status == "waits_for_parties"
    round_of_region(parent, region(small_template, home / "other", rows=SOUTH), 1, SOUTH)
    merge(parent, partial=True)
    assert relay(parent, child, 0).status == "opened"
    assert read_manifest(child, 2)["aggregation"]["surplus"] == [0]
    verified(child)


@pytest.mark.parametrize(
    ("above", "below", "message"),
    [
        (("algorithm.name=scaffold",), (), "cannot take part in scaffold"),
        (("privacy.unit=row", "privacy.clip=1", "privacy.noise=1"), (), "has privacy.unit: row"),
        (("clusters={by: groups, groups: {a: [0], b: [1]}}",), (), "has clusters: a region sends one adapter"),
        (("aggregation.lora=exact",), (), "has aggregation.lora: exact: a region sends the mean"),
        (("aggregation.lora=product",), (), "has aggregation.lora: product: a region sends the mean"),
        (("train.steps={max: 3, epochs: 1}",), (), "has train.steps with epochs or minutes"),
        ((), ("task=dpo",), "differs from .* in task"),
    ],
)
def test_what_cannot_be_relayed_is_refused_by_name(
    small_template: Path, home: Path, above: tuple[str, ...], below: tuple[str, ...], message: str
) -> None:
    parent = make(small_template, home / "parent", "federation.clients=2", *above)
    child = region(small_template, home / "child", *below, rows=NORTH)
    with pytest.raises(ConfigError, match=message):
        relay(parent, child, 0)
    assert not (parent / "clients/0.json").exists()
    assert len([*(child / "rounds").iterdir()]) == 1


def test_a_federation_is_not_its_own_parent_nor_a_clients_rows(nation: tuple[Path, Path, Path]) -> None:
    parent, north, south = nation
    with pytest.raises(UsageError, match="its own parent"):
        relay(parent, parent, 0)
    relay(parent, north, 0)
    with pytest.raises(UsageError, match="itself a region below"):
        relay(north, parent, 0)
    with pytest.raises(UsageError, match="client 0 has joined for"):
        relay(parent, south, 0)
    with pytest.raises(UsageError, match="no client 7"):
        relay(parent, south, 7)


@pytest.mark.parametrize(
    "setting",
    [
        "algorithm.name=fedadam",
        "aggregation.rule=median",
        pytest.param("aggregation.weight_cap=10", marks=slow),
        pytest.param("aggregation.nearest_mixing=true", marks=slow),
    ],
)
def test_a_region_that_would_send_another_mean_is_a_fault_of_its_configuration(
    nation: tuple[Path, Path, Path], setting: str
) -> None:
    configure(nation[1], setting, "aggregation.tolerate=0")
    with pytest.raises(ConfigError, match=f"relay_every and {setting.partition('=')[0]}"):
        Federation.open(nation[1])


def test_verify_names_a_region_that_began_elsewhere_or_a_parent_that_counted_another_sum(
    nation: tuple[Path, Path, Path],
) -> None:
    parent, north, south = nation
    round_of_region(parent, north, 0, NORTH)
    round_of_region(parent, south, 1, SOUTH)
    merge(parent)
    relay(parent, north, 0)
    shutil.rmtree(default_home(read_manifest(parent, 0)["workspace"], 0).folder)
    unseen = verified(north)
    assert "which are not looked at" in unseen.remarks[0].problem
    assert verified(north, parent=str(parent)).num_relayed == 2
    with pytest.raises(IntegrityError, match="no round begins from one of"):
        verified(north, parent=str(south))
    swapped = north.parent / "swapped"
    shutil.copytree(parent, swapped)
    shutil.rmtree(swapped / "rounds/00001")
    shutil.rmtree(swapped / "inbox/0/round-00000")
    found = Federation.open(north).verify(parent=str(swapped)).violations
    assert [each.path.name for each in found] == ["00003"]
    assert "is gone" in found[0].problem


@pytest.mark.parametrize(
    ("step", "after", "stride"),
    [
        ("join", False, 17),
        *(pytest.param(step, after, 1, marks=slow) for step in ("join", "send") for after in (False, True)),
    ],
)
def test_killed_at_any_call_the_next_one_goes_on_with_nothing_lost_or_doubled(
    nation: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, step: str, after: bool, stride: int
) -> None:
    parent, north, _ = nation
    template = parent.parent / "template"
    if step == "send":
        relay(parent, north, 0)
        answer(north, NORTH)
        merge(north)
    template.mkdir()
    for name in ("parent", "north", "data"):
        if (parent.parent / name).exists():
            shutil.move(parent.parent / name, template / name)

    def work(folder: Path) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
        relay(folder / "parent", folder / "north", 0)

    num_killed = 0
    for folder in copies_killed_at_every_call(template, work, after, stride):
        num_killed += 1
        monkeypatch.setenv("XDG_DATA_HOME", str(folder / "data"))
        done = relay(folder / "parent", folder / "north", 0).status
        assert done in (("opened", "waits_for_parties") if step == "join" else ("sent", "waits_for_parent"))
        assert len([*(folder / "north/rounds").glob("0*")]) == (2 if step == "join" else 3)
        verified(folder / "north")
        if step == "send":
            merge(folder / "parent", partial=True)
            assert [each["client"] for each in read_manifest(folder / "parent", 1)["aggregation"]["counted"]] == [0]
            verified(folder / "parent")
    assert num_killed * stride > 30


def test_a_region_that_is_set_free_goes_on_by_itself(nation: tuple[Path, Path, Path]) -> None:
    parent, north, _ = nation
    relay(parent, north, 0)
    configure(north, "federation.relay_every=null", "federation.rounds=4")
    answer(north, NORTH)
    merge(north)
    assert read_manifest(north, 2)["cohort"] == [], "what began from the parent goes on to its sum"
    merge(north)
    assert read_manifest(north, 3)["cohort"] == [0, 1]
    assert read_manifest(north, 3)["files"] == read_manifest(north, 2)["files"]
    with pytest.raises(UsageError, match="whose parties hold the rows"):
        Federation.open(parent).client(0).join(north / "rows.jsonl")
    assert relay(parent, north, 0).status == "waits_for_parties"
    verified(north)


@slow
@pytest.mark.parametrize(
    ("settings", "remark"),
    [
        (
            ("privacy.unit=client", "privacy.clip=1", "privacy.noise=1"),
            "privacy.unit: client: this region counts as one",
        ),
        (("algorithm.name=fedyogi",), "fedyogi weighs its clients alike"),
        (
            ("aggregation.rule=median", "aggregation.tolerate=0"),
            "aggregation.rule: median looks at one update a client",
        ),
        (("aggregation.weight_cap=10",), "weight_cap: 10 is of its clients"),
        (("algorithm.name=fedprox", "algorithm.mu=0.1"), None),
        (("algorithm.name=fedavgm",), None),
    ],
)
def test_a_parent_whose_rounds_are_no_mean_by_rows_is_told(
    small_template: Path, home: Path, settings: tuple[str, ...], remark: str | None
) -> None:
    parent = make(small_template, home / "parent", "federation.clients=1", *settings)
    child = region(small_template, home / "child", rows=NORTH)
    round_of_region(parent, child, 0, NORTH)
    done = relay(parent, child, 0)
    assert [remark in each for each in done.remarks] == [True] if remark else done.remarks == ()
    name = read_manifest(parent, 0)["algorithm"]["name"]
    assert read_manifest(child, 1)["algorithm"]["name"] == ("fedprox" if name == "fedprox" else "fedavg")
    merge(parent)
    assert relay(parent, child, 0).status == "opened"
    verified(child)
    assert Federation.open(parent).verify().violations == []


@slow
def test_a_sum_of_nobody_or_that_changed_is_not_sent(small_template: Path, home: Path) -> None:
    parent = make(small_template, home / "parent", "federation.clients=1")
    child = make(small_template, home / "child", "federation.relay_every=1", rows=NORTH, signed=True)
    relay(parent, child, 0)
    for client in (0, 1):
        Federation.open(child).server.revoke(client)
    assert relay(parent, child, 0).status == "waits_for_parties"
    merge(child)
    assert relay(parent, child, 0).status == "nothing_counted", "all of the region have left"
    parent = make(small_template, home / "another", "federation.clients=1")
    child = region(small_template, home / "plain", rows=NORTH)
    relay(parent, child, 0)
    answer(child, NORTH)
    merge(child)
    manifest = child / "rounds/00002/manifest.json"
    was = manifest.read_text()
    manifest.write_text(was.replace('"num_samples": 3', '"num_samples": 4'))
    with pytest.raises(FedError, match=r"damaged|weighs"):
        relay(parent, child, 0)
    assert not (parent / "inbox/0/round-00000").exists()
    manifest.write_text(was)
    assert relay(parent, child, 0).status == "sent"
