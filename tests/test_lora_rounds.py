"""aggregation.lora in real rounds: what is published, recorded, refused, exported and computed again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.damage import replace_adapter
from support.federation import ADAPTER, configure, read_adapter, read_manifest
from support.lora import ROWS, answer, dense, head_of, mean_product, restart_with
from support.processes import settings as given

from fedcli import Federation
from fedcli.algos.lora import pairs
from fedcli.cli import main
from fedcli.config import parse_config
from fedcli.errors import ConfigError, IntegrityError
from fedcli.operations.product_figures import describe_products
from fedcli.server.merge_lora import _LoraMerge
from fedcli.workspace.records import file_entry
from fedcli.workspace.tensors import encode

MIXED = {"0": 2, "1": 3, "default": 4}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of three clients; tests must not change it."""
    settings = {
        "data.source": None,
        "federation.signatures": "off",
        "federation.clients": 3,
        "federation.rounds": 4,
        "adapter.rank": 4,
        "adapter.alpha": 8,
        "adapter.target_modules": ["q_proj", "v_proj"],
    }
    return Path(Federation.create(tmp_path_factory.mktemp("lora"), preset="demo", settings=settings).path)


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    copy = Path(shutil.copytree(template, tmp_path / "workspace"))
    monkeypatch.chdir(copy)
    return copy


def merge(workspace: Path) -> tuple[dict[int, dict[str, np.ndarray]], dict]:
    """Let all three answer, and merge; return what they sent and the merge's record."""
    sent = {client: answer(workspace, client) for client in ROWS}
    Federation.open(workspace).server.aggregate()
    return sent, head_of(workspace).manifest.model_dump(mode="json")["aggregation"]


def verified(workspace: Path) -> list[str]:
    """Return the violations that `fedcli verify` finds."""
    found = Federation.open(workspace).verify()
    return [f"{violation.path}: {violation.problem}" for violation in found.violations]


def best(product: np.ndarray, rank: int) -> np.ndarray:
    """Return the best matrix of a rank by a dense SVD."""
    u, s, vt = np.linalg.svd(product)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_product_publishes_the_best_factors_of_the_mean_product_and_tells_what_they_lack(here: Path):
    configure(here, "aggregation.lora=product")
    for number in (1, 2):
        sent, record = merge(here)
        wanted, found = mean_product(sent, ROWS), dense(read_adapter(here, number))
        means = {name: sum(ROWS[k] / 100 * sent[k][name].astype(float) for k in sent) for name in sent[0]}
        for module, product in wanted.items():
            assert found[module] == pytest.approx(best(product, 4), abs=1e-6)
            told, size = record["lora"]["errors"], np.linalg.norm(product)
            assert told["merged"][module] == pytest.approx(np.linalg.norm(found[module] - product) / size, rel=1e-4)
            lack = np.linalg.norm(dense(means)[module] - product) / size
            assert told["factors"][module] == pytest.approx(lack, rel=1e-4)
            assert told["merged"][module] < told["factors"][module]
    assert record["lora"]["lapack"]
    assert verified(here) == []
    told = describe_products(head_of(here).manifest)
    assert told.startswith("lora: product; the means of A and B lack up to 0.")
    assert "what was published up to 0." in told
    merged_again = read_manifest(here, 2)
    assert "lora" not in merged_again  # clients need not know


def test_verify_takes_another_processors_digits_for_the_same_and_nothing_else(here: Path):
    configure(here, "aggregation.lora=product")
    merge(here)
    path = here / "rounds/00001/adapter" / ADAPTER
    arrays = load_file(path)
    rng = np.random.default_rng(0)

    def rewrite(changed: dict[str, np.ndarray]) -> list[str]:
        path.write_bytes(encode(changed))
        manifest = read_manifest(here, 1)
        manifest["files"][f"adapter/{ADAPTER}"] = file_entry(path.read_bytes()).model_dump()
        manifest.pop("checksum", None)
        (here / "rounds/00001/manifest.json").write_text(json.dumps(manifest))
        return [line for line in verified(here) if "counted updates give" in line]

    assert (
        rewrite(
            {name: array * (1 + 1e-7 * rng.normal(size=array.shape).astype("f4")) for name, array in arrays.items()}
        )
        == []
    )
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0].astype("f4")
    turned = {name: rotation.T @ array if "lora_A" in name else array @ rotation for name, array in arrays.items()}
    assert rewrite(turned) == []  # as near-equal singular values turn
    scaled = {name: array * np.float32(100 if "lora_A" in name else 0.01) for name, array in arrays.items()}
    assert "factors differ" in rewrite(scaled)[0]  # the same product, in factors that train otherwise
    assert "differ by 0.00" in rewrite({name: array * np.float32(1.001) for name, array in arrays.items()})[0]


def test_clients_of_smaller_ranks_send_the_first_components_and_the_product_takes_all(here: Path):
    restart_with(here, MIXED)
    configure(here, "aggregation.lora=product")
    assert read_manifest(here, 0)["lora"] == {"ranks": {"0": 2, "1": 3}}
    sent, _ = merge(here)
    assert [
        sent[client]["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] for client in sent
    ] == [2, 3, 4]
    for module, product in mean_product(sent, ROWS).items():
        assert dense(read_adapter(here, 1))[module] == pytest.approx(best(product, 4), abs=1e-6)
    answer(here, 0, rank=4)  # as a client that knows no ranks would
    for client in (1, 2):
        answer(here, client)
    Federation.open(here).server.aggregate()
    (refused,) = head_of(here).manifest.aggregation.refused
    assert (refused.client, refused.code) == (0, "schema")
    assert verified(here) == []


@pytest.mark.parametrize("weights", ["rows", "norm"])
def test_means_of_factors_of_mixed_ranks_count_what_is_beyond_a_rank_as_zero(here: Path, weights: str):
    restart_with(here, MIXED)
    configure(here, f"aggregation.lora_weights={weights}")
    sent, record = merge(here)
    shares = {client: float(rows) for client, rows in ROWS.items()}
    if weights == "norm":
        shares = {
            client: np.sqrt(sum((product**2).sum() for product in dense(sent[client]).values())) for client in sent
        }
    total = sum(shares.values())
    assert [entry["weight"] for entry in record["counted"]] == pytest.approx([shares[k] / total for k in sent])
    for name, array in read_adapter(here, 1).items():
        wanted = np.zeros(array.shape)
        for client, update in sent.items():
            rows, columns = update[name].shape
            wanted[:rows, :columns] += shares[client] / total * update[name]
        assert array == pytest.approx(wanted, abs=1e-6)
    assert "errors" not in record["lora"]
    assert verified(here) == []


def test_exact_keeps_what_the_means_lack_in_a_second_adapter_and_recompresses_it_at_a_limit(here: Path):
    configure(here, "aggregation.lora=exact", "aggregation.max_rank=16")
    before = dict.fromkeys(pairs(read_adapter(here, 0)), 0.0)
    for number in (1, 2, 3):
        sent, record = merge(here)
        manifest = head_of(here).manifest
        assert manifest.lora.base_delta == min(8 * number, 16)
        delta = load_file(here / f"rounds/0000{number}/base_delta" / ADAPTER)
        settings = json.loads((here / f"rounds/0000{number}/base_delta/adapter_config.json").read_text())
        assert settings["lora_alpha"] / settings["r"] == 2
        found = dense(read_adapter(here, number))
        for module, product in mean_product(sent, ROWS).items():
            wanted, change = before[module] + product, found[module] + dense(delta)[module]
            if number < 3:
                assert change == pytest.approx(wanted, abs=1e-6)
            lack = np.linalg.norm(change - wanted) / np.linalg.norm(wanted)
            assert record["lora"]["errors"]["merged"][module] == pytest.approx(lack, abs=1e-6)
            before[module] = dense(delta)[module]
        assert ("lapack" in record["lora"]) == (number == 3)
    assert verified(here) == []


def test_an_update_that_does_not_say_that_it_trained_beside_the_second_adapter_is_refused(here: Path):
    configure(here, "aggregation.lora=exact")
    merge(here)
    for client in ROWS:
        answer(here, client, says_delta=client > 0)
    Federation.open(here).server.aggregate()
    (refused,) = head_of(here).manifest.aggregation.refused
    assert (refused.client, refused.code) == (0, "wrong_base")
    assert "base_delta" in refused.reason


def test_a_round_whose_second_adapter_was_taken_out_of_its_record_trains_nobody(here: Path):
    configure(here, "aggregation.lora=exact")
    merge(here)
    manifest = read_manifest(here, 1)
    del manifest["files"][f"base_delta/{ADAPTER}"]
    manifest.pop("checksum", None)
    (here / "rounds/00001/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"tells the rank of base_delta/, and does not list it"):
        head_of(here).base_delta()


def test_fresh_factors_leave_all_of_the_mean_product_in_the_second_adapter(here: Path):
    restart_with(here, MIXED)
    configure(here, "aggregation.lora=exact", "aggregation.lora_fresh=true", "aggregation.max_rank=18")
    sent, _ = merge(here)
    delta, adapter = (load_file(here / "rounds/00001" / name / ADAPTER) for name in ("base_delta", "adapter"))
    for module, product in mean_product(sent, ROWS).items():
        assert dense(delta)[module] == pytest.approx(product, abs=1e-6)
    assert not any(array.any() for name, array in adapter.items() if "lora_B" in name)
    assert all((array != read_adapter(here, 0)[name]).all() for name, array in adapter.items() if "lora_A" in name)
    merge(here)
    assert head_of(here).manifest.lora.base_delta == 18
    assert verified(here) == []


def test_another_rule_carries_the_second_adapter_on(here: Path):
    configure(here, "aggregation.lora=exact")
    merge(here)
    configure(here, "aggregation.lora=factors", "aggregation.rule=median")
    merge(here)
    first, second = ((here / f"rounds/0000{number}/base_delta" / ADAPTER).read_bytes() for number in (1, 2))
    assert first == second
    assert verified(here) == []


@pytest.mark.parametrize(
    "setting", ["train.personal={name: ditto}", "aggregation.share=[A]", "aggregation.private=[v_proj]"]
)
def test_the_second_adapter_stays_beside_what_clients_keep_to_themselves(here: Path, setting: str):
    configure(here, "aggregation.lora=exact")
    merge(here)
    configure(here, "aggregation.lora=factors", setting)
    for client in ROWS:
        answer(here, client)
    assert Federation.open(here).server.aggregate().published
    assert read_manifest(here, 2)["lora"]["base_delta"] == read_manifest(here, 1)["lora"]["base_delta"]
    assert verified(here) == []


@pytest.mark.slow
def test_clients_that_select_rows_go_on_beside_the_second_adapter(tmp_path: Path):
    small = (
        "data.source=builtin:demo",
        "federation.clients=2",
        "federation.rounds=3",
        "train.steps=2",
        "train.batch_size=4",
        "data.max_rows=40",
    )
    select = "data.select={score: ifd, keep: 0.5}"
    assert main(["init", str(tmp_path / "W"), *given(*small, "aggregation.lora=exact", select)]) == 0
    assert main(["run", "-w", str(tmp_path / "W")]) == 0
    assert verified(tmp_path / "W") == []


def test_an_export_joins_both_adapters_into_one_of_a_higher_rank(here: Path, tmp_path: Path):
    configure(here, "aggregation.lora=exact")
    merge(here)
    Federation.open(here).export(tmp_path / "out")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (12, 24)
    delta = load_file(here / "rounds/00001/base_delta" / ADAPTER)
    for module, product in dense(load_file(tmp_path / "out" / ADAPTER)).items():
        assert product == pytest.approx(dense(read_adapter(here, 1))[module] + dense(delta)[module])


def test_errors_of_the_means_are_told_where_somebody_asks_and_change_nothing_else(here: Path):
    for client in ROWS:
        answer(here, client)
    Federation.open(here).server.aggregate()
    plain = (here / "rounds/00001/adapter" / ADAPTER).read_bytes()
    assert "lora" not in read_manifest(here, 1)["aggregation"]
    shutil.rmtree(here / "rounds/00001")
    configure(here, "aggregation.lora_error=true")
    Federation.open(here).server.aggregate()
    assert (here / "rounds/00001/adapter" / ADAPTER).read_bytes() == plain
    errors = read_manifest(here, 1)["aggregation"]["lora"]["errors"]
    assert all(0.1 < error < 1 for error in errors["factors"].values())
    assert verified(here) == []


def test_lora_fair_lacks_less_than_the_means(here: Path):
    configure(here, "aggregation.lora_fair=0.01")
    merge(here)
    errors = read_manifest(here, 1)["aggregation"]["lora"]["errors"]
    assert all(errors["merged"][module] < error for module, error in errors["factors"].items())
    assert verified(here) == []


def test_a_cap_on_weights_holds_for_products(here: Path):
    configure(here, "aggregation.lora=product", "aggregation.weight_cap=1")
    sent, record = merge(here)
    capped = {client: min(rows, 47) for client, rows in ROWS.items()}
    assert [entry["weight"] for entry in record["counted"]] == pytest.approx([3 / 97, 47 / 97, 47 / 97])
    for module, product in mean_product(sent, capped).items():
        assert dense(read_adapter(here, 1))[module] == pytest.approx(best(product, 4), abs=1e-6)
    assert verified(here) == []


def test_a_client_whose_update_changes_again_and_again_does_not_keep_products_from_being_merged(here, monkeypatch):
    configure(here, "aggregation.lora=product")
    for client in ROWS:
        answer(here, client)
    merged, draws = _LoraMerge.result, np.random.default_rng(0)

    def spoilt(self):
        changed = {name: array + draws.normal(size=array.shape).astype("f4") for name, array in self.adapter.items()}
        replace_adapter(here / "inbox/1/round-00000", encode(changed))
        return merged(self)

    monkeypatch.setattr(_LoraMerge, "result", spoilt)
    assert Federation.open(here).server.aggregate().published
    found = read_manifest(here, 1)["aggregation"]
    assert [entry["client"] for entry in found["counted"]] == [0, 2]
    assert [(entry["client"], entry["code"]) for entry in found["refused"]] == [(1, "hash")]
    monkeypatch.undo()
    assert verified(here) == []


@pytest.mark.parametrize("algorithm", ["scaffold", "fedavgm", "fedyogi"])
def test_what_keeps_numbers_of_the_factors_excludes_products_in_the_file_and_in_a_round(
    here: Path, algorithm: str, capsys
):
    for client in ROWS:
        answer(here, client)
    configure(here, "aggregation.lora=product")
    if algorithm == "fedavgm":
        assert main(["server", "aggregate", "--algo", algorithm]) == 3
        assert "aggregation.lora: product and the algorithm fedavgm" in " ".join(capsys.readouterr().err.split())
    configure(here, f"algorithm.name={algorithm}")
    assert main(["server", "aggregate"]) == 3
    err = " ".join(capsys.readouterr().err.split())
    assert f"aggregation.lora: product and algorithm.name: {algorithm} exclude each other" in err


@pytest.mark.parametrize(
    ("aggregation", "others", "named"),
    [
        ({"lora": "product", "rule": "krum", "tolerate": 0}, {}, "aggregation.rule: krum"),
        ({"lora": "exact", "nearest_mixing": True}, {}, "aggregation.nearest_mixing: True"),
        ({"lora": "product"}, {"privacy": {"secure_aggregation": "double"}}, "privacy.secure_aggregation: double"),
        ({"lora": "product"}, {"privacy": {"unit": "client", "clip": 1, "noise": 1}}, "privacy.unit: client"),
        ({"lora": "exact"}, {"federation": {"relay_every": 1}}, "federation.relay_every: 1"),
        ({"lora_weights": "norm"}, {"privacy": {"unit": "row", "clip": 1, "noise": 1}}, "privacy.unit: row"),
        ({"rule": "median"}, {"adapter": {"rank": MIXED}}, "adapter.rank: {0: 2, 1: 3, default: 4} and"),
        ({"lora": "exact", "private": ["v_proj"]}, {}, "aggregation.private: [v_proj] exclude each other"),
        ({"lora": "product"}, {"train": {"keep_optimizer": True}}, "train.keep_optimizer: True exclude each other"),
        ({"lora": "exact", "lora_fresh": True}, {"train": {"keep_optimizer": True}}, "train.keep_optimizer: True"),
        ({"lora": "exact"}, {"adapter": {"rank": MIXED}}, "Set lora_fresh"),
        ({"lora": "product"}, {"train": {"keep_optimizer": True}}, "train.keep_optimizer: True"),
        ({"max_rank": 8}, {}, "It belongs to lora: exact"),
        ({"lora": "product", "lora_fair": 0.1}, {}, "it corrects the means of lora: factors"),
    ],
)
def test_what_cannot_stand_beside_it_is_named_with_its_reason(aggregation, others, named):
    with pytest.raises(ConfigError, match=r".") as caught:
        parse_config({"aggregation": aggregation, **others}, "fedcli.yaml")
    assert named in caught.value.message


def test_the_cost_of_clients_of_several_ranks_is_their_mean(here: Path):
    """The workspace's clients are 0, 1 and 2, of ranks 2, 3 and 4."""
    one = read_manifest(here, 0)["cost"]["client_bytes_up"]
    restart_with(here, MIXED)
    cost = read_manifest(here, 0)["cost"]
    assert cost["communicated_parameters"] == cost["trainable_parameters"] * 3 // 4
    assert cost["client_bytes_up"] < one


def test_ranks_by_client_that_are_all_the_same_are_one_rank():
    same = parse_config({"adapter": {"rank": {"0": 8, "default": 8}}, "aggregation": {"rule": "median"}}, "fedcli.yaml")
    assert not same.adapter.is_mixed
    assert (same.adapter.global_rank, same.adapter.smaller_ranks(5)) == (8, None)


@pytest.mark.parametrize(
    ("rank", "problem"),
    [
        ({"0": 4}, "need `default`"),
        ({"9": 4, "default": 8}, "names client 9, and federation.clients is 5"),
        ({"x": 4, "default": 8}, "adapter.rank: 'x' is no client's id, nor default"),
        ({"0": 0, "default": 8}, "greater than or equal to 1"),
        ({"0": True, "default": 8}, "valid integer"),
        ({0: 4, "0": 8, "default": 8}, "a client is named twice"),
        (dict.fromkeys("01234", 4) | {"default": 8}, "default is 8, which is no client's rank"),
        (True, "valid integer"),
    ],
)
def test_ranks_by_client_that_make_no_sense_are_faults(rank, problem):
    with pytest.raises(ConfigError) as caught:
        parse_config({"adapter": {"rank": rank}}, "fedcli.yaml")
    assert problem in caught.value.message
