"""train.personal: a client's own adapter beside the shared one, and all that takes it: eval, chat and export."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.federation import NUM_SAMPLES, Stub, adapter_hashes, configure, read_adapter, read_manifest, train_as
from support.processes import SMALL, runner, settings
from support.sharing import play, sharing

from fedcli import Federation, Observer
from fedcli.algos.client_rule import Proximal
from fedcli.cli import main
from fedcli.client.due import train_client
from fedcli.client.personal import begin
from fedcli.client.selection import Selection
from fedcli.config import SelectConfig
from fedcli.data.row_report import RowReport
from fedcli.errors import ConfigError, IntegrityError, NotReadyError
from fedcli.scoring.client_table import client_rows
from fedcli.scoring.own_adapters import OwnAdapter, own_adapter
from fedcli.scoring.request import _check_own_adapters
from fedcli.scoring.targets import Targets, find_targets
from fedcli.training.reports import StepReport
from fedcli.workspace.client_state import GLOBAL, PERSONAL
from fedcli.workspace.layout import Workspace
from fedcli.workspace.target_name import TargetName
from fedcli.workspace.train_records import PersonalRecord

slow = pytest.mark.slow
A, B = "model.q_proj.lora_A.weight", "model.q_proj.lora_B.weight"


def personal(small: Path, folder: Path, name: str, *more: str) -> Path:
    """Return a copy of the small workspace whose clients train an adapter of their own."""
    return sharing(small, folder, "[A, B]", "fedavg", f"train.personal={{name: {name}}}", *more)


def kept_by(workspace: Path, client: int, number: int) -> dict[str, np.ndarray]:
    (path,) = (workspace / f"private/{client}/{PERSONAL}").glob(f"round-{number:05d}-*")
    return load_file(path)


def test_dittos_step_is_that_of_the_paper_digit_for_digit():
    """v <- v - lr (grad f(v) + lambda (v - x)): Li et al. 2021 (2012.04221), algorithm 1."""
    v, x, gradient = np.array([2.0, 1.0]), np.array([1.0, 0.0]), np.array([0.5, -1.0])
    after = v - 0.1 * (gradient + Proximal({"v": x}, 0.1).gradient_term(v, x))
    assert after.round(12).tolist() == [1.94, 1.09]


def test_feddpas_two_adapters_joined_are_the_sum_of_their_products_and_its_local_one_begins_at_zero():
    """W x + s (B_g A_g + w B_l A_l) x: FedDPA (2403.19211)."""
    draw = np.random.default_rng(0).normal
    one, other = ({A: draw(size=(4, 6)).astype("f4"), B: draw(size=(5, 4)).astype("f4")} for _ in range(2))
    own = OwnAdapter(0, 1, "feddpa", one, {"global": other}, 0.5)
    joined = own.joined()
    assert (joined[A].shape, joined[B].shape) == ((8, 6), (5, 8))
    np.testing.assert_allclose(joined[B] @ joined[A], other[B] @ other[A] + 0.5 * (one[B] @ one[A]), rtol=1e-5)
    start = begin(PersonalRecord(name="feddpa", weight=0.5), one, 0, 3)
    assert start[A].any()
    assert not start[B].any()
    assert not np.array_equal(start[A], begin(PersonalRecord(name="feddpa", weight=0.5), one, 0, 4)[A])
    assert begin(PersonalRecord(name="ditto", pull=0.1), one, 0, 3) is one


def test_dittos_adapters_follow_their_formula_and_change_nothing_of_the_global_one(small_template, tmp_path):
    """The stand-in for a model descends to the point `client`; one update of client 1 is discarded on the way."""
    workspace = personal(small_template, tmp_path / "W", "ditto")
    plain = sharing(small_template, tmp_path / "plain", "[A, B]")
    play(plain, 3)
    own = {client: read_adapter(workspace, 0) for client in NUM_SAMPLES}
    for number in range(3):
        train, x = read_manifest(workspace, number)["train"], read_adapter(workspace, number)
        assert train["personal"] == {"name": "ditto", "pull": 0.1}
        play(workspace, 1)
        for client, v in own.items():
            kept = kept_by(workspace, client, number)
            for name in v:
                for _ in range(train["steps"]):
                    v[name] = v[name] - train["learning_rate"] * (v[name] - client + 0.1 * (v[name] - x[name]))
                np.testing.assert_allclose(kept[name], v[name], rtol=1e-5, atol=1e-6)
    assert adapter_hashes(workspace)[:4] == adapter_hashes(plain)[:4]
    assert not list(workspace.glob("inbox/*/*/*personal*"))
    assert Federation(Workspace(workspace)).verify().violations == []
    state = Federation.open(workspace).state
    (target,) = find_targets(state, Targets(clients=(2,)))
    assert target.name == "own-2-round-00003"
    assert all(np.array_equal(array, kept_by(workspace, 2, 2)[name]) for name, array in target.arrays().items())
    assert [found.name for found in find_targets(state, Targets(all_clients=True))] == [
        f"own-{client}-round-00003" for client in NUM_SAMPLES
    ]


def test_an_own_adapter_makes_the_steps_that_the_shared_one_made_on_rows_of_its_scores(small_template, tmp_path):
    """A time limit stopped client 1's shared adapter behind its first step of two."""
    workspace, asked, reports = personal(small_template, tmp_path / "W", "feddpa"), [], []

    class Slow(Stub):
        def train(self, adapter, train, *, on_step, limit=None, **given):
            asked.append((adapter, train.steps, given))
            losses = [1.0] * (train.steps if limit is None else 1)
            for step in range(1, 1 + len(losses)):
                on_step(StepReport(step, 1.0, 10))
            return {name: np.asarray(array) for name, array in adapter.items()}, losses

    class Heard(Observer):
        def step_done(self, client, report):
            reports.append(report.step)

    configure(workspace, "train.steps={max: 2, minutes: 1}")
    shutil.rmtree(workspace / "rounds")
    Federation(Workspace(workspace)).server.open()
    train_client(Federation.open(workspace).state, 1, Slow(), observer=Heard())
    (shared, most, _), (own, steps, given) = asked
    assert (most, steps, reports) == (2, 1, [1, 2])
    assert own is not shared
    assert given["selection"] is None


def test_an_own_adapter_whose_update_did_not_count_is_not_taken(small_template, tmp_path):
    workspace = personal(small_template, tmp_path / "W", "ditto")
    train_as(0, workspace)
    state = Federation.open(workspace).state
    with pytest.raises(NotReadyError, match=r"client 0 has no adapter of its own \(ditto\) yet"):
        own_adapter(state, 0)
    play(workspace, 1)
    before = own_adapter(Federation.open(workspace).state, 0)
    train_as(0, workspace)
    after = own_adapter(Federation.open(workspace).state, 0)
    assert after.digest == before.digest
    configure(workspace, "train.personal=null")
    for client in (1, 2):
        train_as(client, workspace)
    Federation.open(workspace).server.aggregate()
    (target,) = find_targets(Federation.open(workspace).state, Targets(clients=(0,)))
    assert target.name == "client-0-round-00001"


def test_the_second_adapter_has_the_steps_and_rows_of_the_shared_one_and_base_delta_beside_it(small_template, tmp_path):
    seen = []

    class Recorder(Stub):
        def select(self, party, train, adapter, beside):
            scored.append(set(beside))
            return Selection(SelectConfig(score="length"), [0], [1.0], 1, RowReport(), None)

        def train(self, adapter, train, *, beside, selection, limit=None, **others):
            values, losses = super().train(adapter, train, **others)
            seen.append((train.steps, train.minutes, set(beside), selection.places))
            return values, losses[:1] if limit else losses

    scored: list[set[str]] = []
    workspace = sharing(small_template, tmp_path / "W", "[A, B]")
    configure(workspace, "aggregation.lora=exact", "train.steps={max: 3, minutes: 1}")
    play(workspace, 1)
    configure(workspace, "aggregation.lora=factors", "train.personal={name: feddpa}")
    play(workspace, 1)
    train_client(Federation.open(workspace).state, 0, Recorder(), observer=Observer())
    assert scored == [{"base_delta"}]
    assert seen == [(3, 1.0, {"base_delta"}, [0]), (1, None, {"base_delta", GLOBAL}, [0])]
    play(workspace, 1)
    own = own_adapter(Federation.open(workspace).state, 1)
    rank = sum(arrays[name].shape[0] for arrays in (own.arrays, *own.beside.values()) for name in [min(own.arrays)])
    assert set(own.beside) == {"base_delta", GLOBAL}
    Federation.open(workspace).export(tmp_path / "X", client=1)
    assert json.loads((tmp_path / "X/adapter_config.json").read_text())["r"] == rank


def test_a_missing_own_adapter_is_told_with_its_cure(small_template, tmp_path):
    workspace = personal(small_template, tmp_path / "W", "feddpa")
    play(workspace, 1)
    shutil.rmtree(workspace / f"private/1/{PERSONAL}")
    with pytest.raises(IntegrityError, match=r"client 1's private state of train.personal is gone or damaged"):
        own_adapter(Federation.open(workspace).state, 1)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("privacy={unit: row, clip: 1, noise: 1}", "train.personal: {name: ditto} and privacy.unit: row exclude"),
        ("train.personal.weight=0.3", "train.personal: weight is of feddpa, and name is ditto"),
        ("federation.relay_every=2", "train.personal: {name: ditto} and federation.relay_every: 2 exclude"),
    ],
)
def test_what_cannot_stand_beside_it_is_told_with_both_keys(tmp_path, capsys, more, told):
    assert main(["init", str(tmp_path / "W"), *settings("train.personal.name=ditto", more)]) == 3
    assert told in capsys.readouterr().err


def test_a_table_of_clients_names_the_mean_the_worst_and_the_gains():
    scores = {"own-0-round-00002": 0.5, "own-1-round-00002": 0.75, "round-00002": 0.5, "alone-1": 0.25, "base": 0.1}
    (row,) = client_rows("demo", {TargetName.parse(name): v for name, v in scores.items()}, higher_is_better=True)
    assert (row.round, row.num_clients, row.mean, row.worst, row.worst_client) == (2, 2, 0.625, 0.5, 0)
    assert (row.over_global.mean, row.over_global.worst, row.over_global.worst_client) == (0.125, 0.0, 0)
    assert (row.over_alone.mean, row.over_alone.num_clients) == (0.5, 1)
    (row,) = client_rows("loss", {TargetName.parse(name): v for name, v in scores.items()}, higher_is_better=False)
    assert (row.worst_client, row.over_global.worst) == (1, -0.25)


@slow
def test_a_private_federation_publishes_no_answers_of_own_adapters(small_template, tmp_path):
    workspace = personal(small_template, tmp_path / "W", "ditto", "privacy={unit: client, clip: 1, noise: 1}")
    play(workspace, 1)
    state = Federation.open(workspace).state
    assert own_adapter(state, 0).kind == "ditto"  # a simulation has nobody to protect
    (target,) = find_targets(state, Targets(clients=(0,)))
    _check_own_adapters(state, [target])
    state.identity = state.identity.model_copy(update={"simulation": False})
    with pytest.raises(ConfigError, match="own-0-round-00001 has no noise"):
        _check_own_adapters(state, [target])


@slow
@pytest.mark.parametrize("kind", ["aggregation.share=[A]", "train.personal.name=ditto", "train.personal.name=feddpa"])
def test_own_adapters_are_trained_scored_talked_to_and_exported_as_one(tmp_path, capsys, kind):
    run, workspace = runner(capsys), tmp_path / "W"
    assert main(["init", str(workspace), *settings(*SMALL, kind)]) == 0
    assert main(["run", "-w", str(workspace)]) == 0
    assert main(["verify", "-w", str(workspace)]) == 0
    capsys.readouterr()
    assert main(["eval", "demo", "--limit", "12", "--client", "all", "-w", str(workspace), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [score["target"] for score in scores] == [f"own-{client}-round-00002" for client in range(3)]
    assert main(["eval", "table", "-w", str(workspace), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["clients"]
    assert (row["round"], row["num_clients"]) == (2, 3)
    assert main(["export", str(tmp_path / "X"), "--client", "1", "-w", str(workspace)]) == 0
    config = json.loads((tmp_path / "X/adapter_config.json").read_text())
    assert config["r"] == (8 if "feddpa" in kind else 4)
    assert "client 1's own" in (tmp_path / "X/README.md").read_text()
    assert main(["export", str(tmp_path / "X"), "--client", "1", "-w", str(workspace)]) == 0
    assert main(["export", str(tmp_path / "M"), "--merge", "--client", "1", "-w", str(workspace)]) == 0
    capsys.readouterr()
    assert main(["chat", "hello", "--client", "1", "-w", str(workspace), "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["target"] == "own-1-round-00002"
    assert main(["export", str(tmp_path / "Y"), "-w", str(workspace)]) == (2 if "share" in kind else 0)
    assert run is not None
    check_logits(workspace, tmp_path / "X")


def check_logits(workspace: Path, exported: Path) -> None:
    """The adapters side by side, and the one that they were joined into, give the same logits."""
    import torch

    federation = Federation.open(workspace)
    adapted = federation.runtimes.load().adapted
    words = torch.arange(12).view(1, 12)
    own = own_adapter(federation.state, 1)
    adapted.load(own.arrays, own.beside, weight=own.weight)
    adapted.model.eval()
    with torch.no_grad():
        together = adapted.model(input_ids=words).logits
        adapted.load_folder(exported)
        joined = adapted.model(input_ids=words).logits
        adapted.load(federation.state.start.adapter())
        start = adapted.model(input_ids=words).logits
    torch.testing.assert_close(together, joined, rtol=1e-4, atol=1e-5)
    assert not torch.equal(together, start)


@slow
def test_a_frozen_adapter_beside_the_trained_one_stays_as_it_is_and_the_switch_leaves_nothing(tmp_path):
    import torch

    assert main(["init", str(tmp_path / "W"), *settings(*SMALL, "federation.clients=2")]) == 0
    federation = Federation.open(tmp_path / "W")
    adapted = federation.runtimes.load().adapted
    start = federation.state.start.adapter()
    draw = np.random.default_rng(0).normal
    wide = {  # of three times the rank
        name: draw(scale=0.1, size=(12, array.shape[1]) if ".lora_A." in name else (array.shape[0], 12)).astype("f4")
        for name, array in start.items()
    }
    words = torch.arange(12).view(1, 12)
    adapted.model.eval()
    plain = adapted.model(input_ids=words).logits
    adapted.load(start, {"further": wide}, weight=0.5)
    adapted.start_training(has_dropout=True, has_checkpointing=False)
    adapted.model(input_ids=words).logits.sum().backward()
    trained = {name for name, parameter in adapted.model.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(".default." in name for name in trained)
    adapted.model.eval()
    assert not torch.equal(adapted.model(input_ids=words).logits, plain)
    adapted.load(start)
    adapted.model.eval()
    assert torch.equal(adapted.model(input_ids=words).logits, plain)
    assert list(adapted.model.peft_config) == ["default"]
