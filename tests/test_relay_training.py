"""Hierarchy with real training, signatures and masks: what a region sends is what its parties learnt."""

from pathlib import Path

import numpy as np
import pytest
from support import regions
from support.federation import read_adapter, read_manifest
from support.object_stores import new_place
from support.regions import verified
from support.secure import ROWS, merge, visit
from support.warm import write_rows

from fedcli import Federation
from fedcli.errors import NotReadyError

pytestmark = pytest.mark.slow
SETTINGS = {
    "data.source": None,
    "federation.rounds": 2,
    "federation.seed": 7,
    "train.steps": 3,
    "train.batch_size": 4,
    "adapter.rank": 4,
    "adapter.dropout": 0.0,  # its masks are drawn by the round's number, which a region counts otherwise
    "adapter.target_modules": ["q_proj", "v_proj"],
}
NUM_ROWS = (9, 14, 6, 11)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


def create(folder: Path, clients: int, **more: object) -> Federation:
    named = {"federation.clients": clients, **{key.replace("__", "."): value for key, value in more.items()}}
    return Federation.create(folder, preset="demo", settings=SETTINGS | named)


def join(federation: Federation, *clients: int) -> None:
    """Let parties with rows of their own join, and enrol them."""
    for client in clients:
        texts = [{"instruction": f"say {client} {n}", "output": f"{n} is {client}"} for n in range(NUM_ROWS[client])]
        rows = write_rows(federation.path.parent / f"rows-{client}.jsonl", texts)
        federation.server.enrol(client, federation.client(client).join(rows).commit())


def test_real_training_through_two_signed_regions_is_that_of_the_flat_federation(home: Path) -> None:
    parent, flat = create(home / "parent", 2), create(home / "flat", 4)
    lower = [create(home / name, 4, federation__relay_every=1) for name in ("north", "south")]
    members = ((0, 1), (2, 3))
    join(flat, 0, 1, 2, 3)
    for region, own, others in zip(lower, members, members[::-1], strict=True):
        for client in others:  # the ids of the flat federation: what is drawn for a client depends on its id
            region.server.revoke(client)
        join(region, *own)
    for number in (0, 1):
        for client, (region, own) in enumerate(zip(lower, members, strict=True)):
            opened = parent.relay(client, region)
            assert opened.status == "opened"
            if number == 0:
                assert opened.joined is not None
                parent.server.enrol(client, opened.joined.fingerprint)
            for each in own:
                assert region.client(each).train().training is not None
            region.server.aggregate()
            sent = parent.relay(client, region)
            assert sent.summed is not None
            assert sent.summed.num_samples == sum(NUM_ROWS[each] for each in own)
        parent.server.aggregate()
        flat.train_clients([0, 1, 2, 3])
        flat.server.aggregate()
        ours, theirs = (read_adapter(each.path, number + 1) for each in (parent, flat))
        moved = max(float(np.abs(theirs[name] - read_adapter(flat.path, number)[name]).max()) for name in theirs)
        apart = max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs)
        assert moved > 1e-3
        assert apart <= 1e-7
    for client, region in enumerate(lower):
        assert parent.relay(client, region).status == "ended"
        found = verified(region.path)
        assert (found.num_relayed, found.num_recomputed) == (3, 2)
    assert verified(parent.path).num_signatures > 10


def test_a_parent_of_masked_regions_has_their_mean_and_sees_their_sum_alone(small_template: Path, home: Path) -> None:
    for mode in ("pairwise", "double"):
        folder = home / mode
        folder.mkdir()
        settings = ("federation.clients=3", f"privacy.secure_aggregation={mode}")
        parent = regions.make(small_template, folder / "parent", *settings, signed=True)
        rows = [(3 + number, 5) for number in range(3)]
        children = [regions.region(small_template, folder / f"child-{n}", rows=each) for n, each in enumerate(rows)]
        flat = regions.make(small_template, folder / "flat", rows=sum(rows, ()))
        for number, (child, own) in enumerate(zip(children, rows, strict=True)):
            joined = regions.relay(parent, child, number).joined
            assert joined is not None
            Federation.open(parent).server.enrol(number, joined.fingerprint)
            regions.answer(child, own, first=2 * number)
            regions.merge(child)
        regions.answer(flat, sum(rows, ()))
        regions.merge(flat)
        assert [regions.relay(parent, child, n).status for n, child in enumerate(children)] == ["sent"] * 3
        if mode == "double":
            with pytest.raises(NotReadyError, match="answer"):
                regions.merge(parent)
            assert [regions.relay(parent, child, n).status for n, child in enumerate(children)] == ["answered"] * 3
        regions.merge(parent)
        assert read_manifest(parent, 1)["aggregation"]["counted"][0]["num_samples"] is None
        ours, theirs = read_adapter(parent, 1), read_adapter(flat, 1)
        assert max(float(np.abs(ours[name] - theirs[name]).max()) for name in theirs) < 4e-6, "of values up to 38"
        assert regions.relay(parent, children[0], 0).status == "opened"
        verified(parent)
        verified(children[0])


def test_of_a_masked_region_the_sum_goes_up_with_its_rows(small_template: Path, home: Path) -> None:
    parent = regions.make(small_template, home / "parent", "federation.clients=1")
    settings = ("federation.clients=3", "federation.relay_every=1", "privacy.secure_aggregation=pairwise")
    child = regions.make(small_template, home / "W", *settings, signed=True)
    federation = Federation.open(child)
    for client in range(3):
        texts = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(ROWS[client])]
        rows = write_rows(home / f"rows-{client}.jsonl", texts)
        federation.server.enrol(client, federation.client(client).join(rows, share="minimal").commit())
    assert regions.relay(parent, child, 0).status == "opened"
    assert visit(child, 0, 1, 2) == ["submitted"] * 3
    merge(child)
    sent = regions.relay(parent, child, 0)
    assert sent.status == "sent"
    assert sent.summed is not None
    assert (sent.summed.num_samples, sent.summed.train_loss) == (sum(ROWS[client] for client in range(3)), None)
    regions.merge(parent)
    assert regions.relay(parent, child, 0).status == "opened"
    assert visit(child, 0) == ["submitted"]
    verified(child)
    verified(parent)


@pytest.mark.parametrize("kind", ["s3", "sftp"])
def test_a_region_on_a_disk_takes_part_in_a_parent_in_a_store(
    small_template: Path, home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    settings = {
        "data.source": None,
        "federation.clients": 1,
        "federation.rounds": 1,
        "adapter.rank": 4,
        "adapter.target_modules": ["q_proj", "v_proj"],
    }
    parent = Federation.create(new_place(kind, monkeypatch), preset="demo", settings=settings)
    child = regions.region(small_template, home / "child", rows=(3, 5))
    region = Federation.open(child)
    joined = parent.relay(0, region).joined
    assert joined is not None
    parent.server.enrol(0, joined.fingerprint)
    regions.answer(child, (3, 5))
    regions.merge(child)
    assert parent.relay(0, region).status == "sent"
    assert parent.server.aggregate().state == "finished"
    assert parent.relay(0, region).status == "ended"
    assert parent.verify().violations == []
    assert verified(child).num_relayed == 2
    assert read_manifest(child, 3)["files"] == parent.round().manifest.model_dump(mode="json")["files"]
