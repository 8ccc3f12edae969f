"""Several adapters a round: by groups, by loss, by direction; what is published, refused, scored and computed again."""

import json
from pathlib import Path

import numpy as np
import pytest
from protocol_client import take_part
from safetensors.numpy import load_file
from support.damage import replace_adapter
from support.federation import configure, read_adapter, read_manifest
from support.processes import SMALL, settings

from fedcli import Federation
from fedcli.algos.clusters import bipartition, cosines, disagreement
from fedcli.cli import main
from fedcli.errors import ConfigError, IntegrityError
from fedcli.randomness import stream
from fedcli.server import merge_clusters
from fedcli.workspace.layout import Workspace
from fedcli.workspace.tensors import encode

NAMES = ("adapter/adapter_model.safetensors", "adapter/cluster-1.safetensors")
VECTOR = np.array([(1, 0.1), (0.9, 0.2), (-0.8, 0.1), (-1, 0.3)])
"""Differences whose directions are two."""


def test_directions_of_the_vector_are_two_parts_with_its_cosines():
    products = VECTOR @ VECTOR.T
    found = cosines(products)
    assert found[0, 1] == pytest.approx(0.9929, abs=5e-5)
    assert found[:2, 2:].max() <= -0.87
    assert bipartition(products) == [[0, 1], [2, 3]]
    assert disagreement(products, np.full(4, 0.25)) == pytest.approx(
        np.linalg.norm(VECTOR.mean(0)) / np.linalg.norm(VECTOR, axis=1).max()
    )


def test_the_two_parts_have_the_least_largest_cosine_of_all_ways_to_split():
    generator = np.random.default_rng(5)
    for _ in range(20):
        rows = generator.normal(size=(6, 3))
        similar = cosines(rows @ rows.T)
        ways = [[i for i in range(6) if number >> i & 1] for number in range(1, 32)]
        worst = [max(similar[i, j] for i in way for j in {*range(6)} - {*way}) for way in ways]
        one, other = bipartition(rows @ rows.T)
        assert max(similar[i, j] for i in one for j in other) == pytest.approx(min(worst))


def test_updates_that_are_zero_do_not_split():
    assert disagreement(np.zeros((3, 3)), np.full(3, 1 / 3)) == 1.0
    assert cosines(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]


@pytest.fixture
def by_groups(tmp_path: Path) -> Path:
    """Three parties in two groups."""
    return _made(tmp_path, "clusters.by=groups", "clusters.groups={north: [0, 2], south: [1]}")


def _made(folder: Path, *changed: str) -> Path:
    off = ("data.source=null", "federation.signatures=off")
    assert main(["init", str(folder / "here"), *settings(*SMALL, *off, *changed)]) == 0
    return folder / "here"


def _clustered(folder: Path, number: int) -> list[dict[str, np.ndarray]]:
    """Return a round's two adapters."""
    return [load_file(folder / f"rounds/{number:05d}" / name) for name in NAMES]


def test_each_group_gets_the_weighted_mean_of_its_own_updates_and_no_other(by_groups: Path):
    moves = {0: 0.5, 1: -0.25, 2: 0.125}
    for client, cluster in ((0, 0), (1, 1), (2, 0)):
        assert take_part(by_groups, client, lambda x, c=client: x + np.float32(moves[c]), 10 * (client + 1), cluster)
    assert main(["server", "aggregate", "-w", str(by_groups)]) == 0
    north, south = _clustered(by_groups, 1)
    for name, start in read_adapter(by_groups, 0).items():
        expected = (10 * (start + np.float32(0.5)) + 30.0 * (start + np.float32(0.125))) / 40
        np.testing.assert_allclose(north[name], expected, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(south[name], start + np.float32(-0.25))
    merge = read_manifest(by_groups, 1)["aggregation"]
    assert [(each["client"], each["cluster"], each["weight"]) for each in merge["counted"]] == [
        (0, 0, 0.25),
        (1, 1, 1.0),
        (2, 0, 0.75),
    ]
    assert read_manifest(by_groups, 1)["clusters"]["names"] == ["north", "south"]
    assert Federation.open(by_groups).verify().violations == []


def test_a_group_whose_clients_did_not_answer_keeps_its_adapter(by_groups: Path):
    take_part(by_groups, 1, lambda x: x + 1, cluster=1)
    assert main(["server", "aggregate", "--partial", "-w", str(by_groups)]) == 0
    before, after = _clustered(by_groups, 0), _clustered(by_groups, 1)
    assert all((after[0][name] == array).all() for name, array in before[0].items())
    assert all((after[1][name] == array + 1).all() for name, array in before[1].items())
    assert read_manifest(by_groups, 1)["aggregation"]["missing"] == [0, 2]
    assert Federation.open(by_groups).verify().violations == []


def test_an_update_of_another_group_or_of_a_cluster_that_there_is_not_is_refused(by_groups: Path):
    take_part(by_groups, 0, cluster=0)
    take_part(by_groups, 1, cluster=None)  # a client that knows nothing of clusters trains the first adapter
    (by_groups / "rounds/00000/adapter/cluster-9.safetensors").write_bytes(
        (by_groups / "rounds/00000" / NAMES[0]).read_bytes()
    )
    take_part(by_groups, 2, cluster=9)
    (by_groups / "rounds/00000/adapter/cluster-9.safetensors").unlink()
    assert main(["server", "aggregate", "-w", str(by_groups)]) == 0
    refused = read_manifest(by_groups, 1)["aggregation"]["refused"]
    assert [(each["client"], each["code"]) for each in refused] == [(1, "wrong_cluster"), (2, "wrong_cluster")]
    assert "made for cluster 0, the client is of cluster 1" in refused[0]["reason"]
    assert Federation.open(by_groups).verify().violations == []


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            lambda manifest: manifest["clusters"].update(count=3, names=["a", "b", "c"], of={"1": 2}),
            "does not list adapter/cluster-2.safetensors",
        ),
        (lambda manifest: manifest["clusters"]["of"].update({"1": 2}), "a client is of cluster 2 of 2"),
        (lambda manifest: manifest["clusters"].update(names=["north"]), "1 names of 2 clusters"),
        (lambda manifest: manifest.update(private=["lora_C"]), "private names 'lora_C', which is no tensor"),
    ],
)
def test_a_round_of_clusters_or_tensors_that_are_not_there_is_a_violation_and_gives_no_adapter(
    by_groups: Path, edit, problem
):
    path = by_groups / "rounds/00000/manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest.pop("checksum")
    edit(manifest)
    path.write_text(json.dumps(manifest))
    violations = Federation(Workspace(by_groups)).verify().violations
    assert any(problem in each.problem for each in violations), violations
    with pytest.raises(IntegrityError, match="is damaged"):
        Federation.open(by_groups).state.head.of_cluster(2).adapter()


def test_a_client_that_knows_no_clusters_counts_for_the_first_where_clients_choose(tmp_path: Path):
    folder = _made(tmp_path, "clusters.by=loss", "clusters.count=2")
    for client, cluster in ((0, 1), (1, None), (2, 1)):
        take_part(folder, client, lambda x, c=client: x + c + 1, cluster=cluster)
    assert main(["server", "aggregate", "-w", str(folder)]) == 0
    counted = read_manifest(folder, 1)["aggregation"]["counted"]
    assert [each["cluster"] for each in counted] == [1, 0, 1]
    assert Federation.open(folder).verify().violations == []


def test_a_cluster_splits_where_its_clients_point_apart_and_each_part_goes_on_from_its_own_mean(tmp_path: Path):
    folder = _made(tmp_path, "clusters.by=direction", "clusters.count=2")
    for client, move in enumerate((0.5, -0.5, 0.25)):
        take_part(folder, client, lambda x, m=move: x + np.float32(m), cluster=0)
    assert main(["server", "aggregate", "-w", str(folder)]) == 0
    manifest, start = read_manifest(folder, 1), read_adapter(folder, 0)
    assert manifest["aggregation"]["splits"] == [{"cluster": 0, "into": 1, "clients": [1]}]
    assert manifest["clusters"]["of"] == {"0": 0, "1": 1, "2": 0}
    first, second = _clustered(folder, 1)
    for name, array in start.items():
        np.testing.assert_allclose(first[name], array + 0.375, atol=1e-7)
        np.testing.assert_array_equal(second[name], array + np.float32(-0.5))
    for client, cluster in enumerate((0, 1, 0)):
        take_part(folder, client, lambda x: x + 1, cluster=cluster)
    assert main(["server", "aggregate", "-w", str(folder)]) == 0
    assert Federation.open(folder).verify().violations == []
    document = json.loads((folder / "rounds/00001/manifest.json").read_text())
    document["clusters"]["of"]["2"] = 1  # the server moves a client of its own accord
    (folder / "rounds/00001/manifest.json").write_text(json.dumps(document))
    assert any("other clusters" in each.problem for each in Federation.open(folder).verify().violations)


def test_a_client_that_changes_its_update_again_and_again_does_not_keep_clusters_from_being_merged(
    by_groups: Path, monkeypatch
):
    for client, cluster in ((0, 0), (1, 1), (2, 0)):
        take_part(by_groups, client, lambda x, c=client: x + c, 10, cluster)
    members, moves = merge_clusters._members, iter(range(10, 20))

    def spoilt(base, order):
        found = members(base, order)
        move = np.float32(next(moves))
        values = {name: array + move for name, array in base.adapter().items()}
        replace_adapter(by_groups / "inbox/0/round-00000", encode(values))
        return found

    monkeypatch.setattr(merge_clusters, "_members", spoilt)
    assert main(["server", "aggregate", "-w", str(by_groups)]) == 0
    merge = read_manifest(by_groups, 1)["aggregation"]
    assert [entry["client"] for entry in merge["counted"]] == [1, 2]
    assert [(entry["client"], entry["code"]) for entry in merge["refused"]] == [(0, "hash")]


def test_clients_that_agree_stay_together(tmp_path: Path):
    folder = _made(tmp_path, "clusters.by=direction", "clusters.count=2")
    for client in range(3):
        take_part(folder, client, lambda x, c=client: x + np.float32(c + 1), cluster=0)
    assert main(["server", "aggregate", "-w", str(folder)]) == 0
    manifest = read_manifest(folder, 1)
    assert manifest["clusters"]["count"] == 1
    assert "splits" not in manifest["aggregation"]
    assert not (folder / "rounds/00001" / NAMES[1]).exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (("clusters.by=loss",), "count is how many"),
        (("clusters.by=groups",), "groups names each group's clients"),
        (("clusters.by=groups", "clusters.groups={a: [0], b: [1]}"), "see client 2"),
        (("clusters.by=groups", "clusters.groups={a: [0, 1], b: [1, 2]}"), "see client 1"),
        (("clusters.by=loss", "clusters.count=2", "algorithm.name=scaffold"), "algorithm.name: scaffold exclude"),
        (("clusters.by=loss", "clusters.count=2", "algorithm.name=fedyogi"), "algorithm.name: fedyogi exclude"),
        (("clusters.by=direction", "clusters.count=2", "aggregation.rule=median"), "aggregation.rule: median exclude"),
    ],
)
def test_what_clusters_cannot_stand_with_is_a_configuration_error_that_says_why(changed, told, tmp_path, capsys):
    assert main(["init", str(tmp_path / "here"), *settings(*SMALL, *changed)]) == 3
    assert told in capsys.readouterr().err
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("edit", ["clusters={}", "clusters.groups={north: [0], south: [1, 2]}"])
def test_clusters_are_fixed_by_init(by_groups: Path, edit):
    configure(by_groups, edit)
    with pytest.raises(ConfigError, match=r"changes what was fixed by `fedcli init`:\n  clusters"):
        Federation.open(by_groups)


def test_groups_are_shown_before_anybody_answers_and_named_by_their_names_or_clients(by_groups: Path, tmp_path, capsys):
    assert Federation.open(by_groups).status().clusters == {"north": [0, 2], "south": [1]}
    for client, cluster in ((0, 0), (1, 1), (2, 0)):
        assert take_part(by_groups, client, lambda x, c=client: x + np.float32(c), 10, cluster)
    Federation.open(by_groups).server.aggregate()
    assert Federation.open(by_groups).status().clusters == {"north": [0, 2], "south": [1]}
    asked = {"north": ["--round", "latest:north"], "south": ["--client", "1"], "1": ["--round", "1:south"]}
    for name, options in asked.items():
        assert main(["export", str(tmp_path / name), "-w", str(by_groups), *options]) == 0
    north, south = _clustered(by_groups, 1)
    for name, expected in (("north", north), ("south", south), ("1", south)):
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(np.array_equal(found[tensor], array) for tensor, array in expected.items())
    capsys.readouterr()
    assert main(["export", str(tmp_path / "none"), "-w", str(by_groups), "--round", "latest:east"]) == 2
    assert "north, south" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none"), "-w", str(by_groups)]) == 2
    assert "--client N" in capsys.readouterr().err


@pytest.mark.slow
def test_clients_take_the_adapter_of_the_least_loss_and_two_kinds_of_rows_part(tmp_path: Path, capsys):
    """Rounds by loss, scored and exported."""
    folder = tmp_path / "demo"
    changed = ("clusters.by=loss", "clusters.count=2", "federation.rounds=3")
    assert main(["init", str(folder), "--preset", "demo", *settings(*changed)]) == 0
    assert main(["run", "-w", str(folder)]) == 0
    told = capsys.readouterr().err
    assert "takes cluster" in told
    first = [each["cluster"] for each in read_manifest(folder, 1)["aggregation"]["counted"]]
    dealt = stream(0, "clusters").permutation(5) % 2
    assert first == dealt.tolist()
    last = [each["cluster"] for each in read_manifest(folder, 3)["aggregation"]["counted"]]
    assert sorted({*last}) == [0, 1]
    assert Federation.open(folder).verify().violations == []
    assert main(["eval", "demo", "-w", str(folder), "--limit", "20", "--round", "latest"]) == 0
    assert sorted(path.name for path in (folder / "eval").glob("cluster-*")) == [
        "cluster-0-round-00003",
        "cluster-1-round-00003",
    ]
    assert main(["export", str(tmp_path / "out"), "-w", str(folder)]) == 2
    assert main(["export", str(tmp_path / "out"), "-w", str(folder), "--round", "latest:1"]) == 0
    exported = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all((exported[name] == array).all() for name, array in _clustered(folder, 3)[1].items())
    assert "latest:1" not in (tmp_path / "out/README.md").read_text()
    assert main(["status", "-w", str(folder)]) == 0
    assert "clusters   0: clients" in capsys.readouterr().out
