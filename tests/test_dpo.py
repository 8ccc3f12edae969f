"""Direct preference optimisation against trl, plain forward passes and a small federation of real rows."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import farthest, make_model, preference, sides
from support.oracles import gradients_of, noisy_adapter, one_step_of_trl, refer, train_step
from support.processes import FEW, Run, fedcli, results, runner, settings

from fedcli.cli import main
from fedcli.data.demo import demo_preferences
from fedcli.data.encoded import EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.data.templates import alpaca
from fedcli.model.likelihood import reference_log_probs
from fedcli.model.lora import AdaptedModel
from fedcli.tasks import DPO, Likelihood
from fedcli.tasks.conversation import Preference
from fedcli.training.reports import TrainSettings
from fedcli.training.trainer import fit

LN2 = math.log(2)
LONGER = preference("Tell of the wet harbour.", "The storm howls over the coast", "red, as the night is so very long")


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return make_model()


@pytest.fixture(scope="module")
def preferences() -> list[Preference]:
    """Pairs of different lengths."""
    rows = demo_preferences(0)["train"][::173]
    return [*(preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows), LONGER]


@pytest.fixture(scope="module")
def pairs(adapted: AdaptedModel, preferences: list[Preference]) -> list[EncodedRow]:
    return list(Encoder(adapted.tokenizer).encode(preferences, 512))


# The oracle


@pytest.mark.parametrize("reference_is_base", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_loss_and_gradients_are_those_of_trls_trainer(
    adapted: AdaptedModel,
    preferences: list[Preference],
    pairs: list[EncodedRow],
    tmp_path: Path,
    reference_is_base: bool,
) -> None:
    from datasets import Dataset
    from peft import set_peft_model_state_dict
    from trl import DPOConfig, DPOTrainer

    start, reference = noisy_adapter(1), noisy_adapter(2)
    nothing = {name: np.zeros_like(array) for name, array in reference.items()}
    referred = refer(adapted, nothing if reference_is_base else reference, pairs)
    loss, ours = train_step(adapted, start, referred, DPO, beta=0.1)
    other = make_model()
    other.load(start)
    columns = [
        {"prompt": alpaca(p.prompt[0].text), "chosen": " " + p.chosen, "rejected": " " + p.rejected}
        for p in preferences
    ]
    trainer = DPOTrainer(
        model=other.model,
        processing_class=other.tokenizer,
        train_dataset=Dataset.from_list(columns),
        args=DPOConfig(**one_step_of_trl(len(pairs), tmp_path, beta=0.1)),
    )
    if reference_is_base:
        trainer.model.delete_adapter("ref")  # trl's own reference would be a copy of the start
    else:
        tensors = {name: torch.tensor(array) for name, array in reference.items()}
        set_peft_model_state_dict(trainer.model, tensors, adapter_name="ref")
    theirs = gradients_of(other, trainer.train)
    assert loss == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-5)
    assert abs(loss - LN2) > 1e-3
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 1e-4
    assert farthest(ours, theirs) <= 1e-5 * largest


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_beta_scales_the_margin_in_the_loss(adapted: AdaptedModel, pairs: list[EncodedRow], beta: float) -> None:
    start, reference = noisy_adapter(1), noisy_adapter(2)
    referred = refer(adapted, reference, pairs)
    policy = refer(adapted, start, pairs)
    margins = [
        (ours.reference[0] - ours.reference[1]) - (theirs.reference[0] - theirs.reference[1])
        for ours, theirs in zip(policy, referred, strict=True)
    ]
    assert max(map(abs, margins)) > 0.1
    expected = sum(math.log1p(math.exp(-beta * margin)) for margin in margins) / len(margins)
    assert train_step(adapted, start, referred, DPO, beta=beta)[0] == pytest.approx(expected, rel=1e-5)


def test_a_pairs_reference_does_not_depend_on_its_neighbours(adapted: AdaptedModel, pairs: list[EncodedRow]) -> None:
    adapted.load(noisy_adapter(1))
    together = list(reference_log_probs(adapted, pairs))
    assert together == [next(reference_log_probs(adapted, [pair])) for pair in pairs]
    assert adapted.model.training is False


# Truncation


def test_long_responses_are_cut_and_counted_and_lose_their_end_token(adapted: AdaptedModel) -> None:
    encoder = Encoder(adapted.tokenizer)
    whole = sides(encoder.encode([LONGER], 512))
    lengths = sorted(len(side.ids) for side in whole)
    assert lengths[0] < lengths[1]
    assert whole[0].ids[-1] == whole[1].ids[-1] == encoder.end_id
    one_cut = encoder.encode([LONGER], lengths[0])
    both_cut = encoder.encode([LONGER], lengths[0] - 1)
    assert (one_cut.num_truncated, one_cut.left_out.total()) == (1, 0)
    assert (both_cut.num_truncated, both_cut.left_out.total()) == (1, 0)
    ends = [side.ids[-1] == encoder.end_id for side in sides(one_cut)]
    assert sorted(ends) == [False, True]
    for cut, before in zip(sides(both_cut), whole, strict=True):
        assert cut.ids.tolist() == before.ids[: lengths[0] - 1].tolist()
        assert encoder.end_id not in cut.ids
        assert cut.prompt_length == before.prompt_length
    assert len({pair[0].key for pair in (encoder.encode([LONGER], 512), one_cut, both_cut)}) == 3
    assert encoder.encode([LONGER], whole[0].prompt_length).left_out.total() == 1


# Rows that will not do


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of task dpo with round 0 open."""
    folder = tmp_path_factory.mktemp("dpo") / "workspace"
    assert main(["init", str(folder), "--preset", "demo-dpo", *settings(*FEW)]) == 0
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def write_rows(workspace: Path, client: int, rows: list[dict[str, object]]) -> Path:
    path = workspace / f"data/client-{client}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_that_teach_nothing_are_counted_unusable_and_cut_ones_truncated(workspace: Path, run: Run) -> None:
    config = workspace / "fedcli.yaml"
    assert "max_length: 128" in config.read_text()
    pair = {"prompt": "Say it.", "chosen": "green", "rejected": "red"}
    long = " ".join(["the storm howls"] * 60)
    write_rows(
        workspace,
        0,
        [
            pair,
            pair | {"rejected": "green"},
            pair | {"chosen": ""},
            pair | {"rejected": "  "},
            pair | {"chosen": long},
            pair | {"chosen": long + " now", "rejected": long + " then"},  # cut, they are alike
            pair | {"prompt": long},
        ],
    )
    done = results(run, "client", "train", "--id", 0, "-w", workspace)
    assert (done["num_samples"], done["num_truncated"], done["num_unusable"]) == (2, 1, 5)
    assert done["left_out"] == {"same responses": 2, "empty response": 2, "too long": 1}


def test_a_client_without_a_usable_pair_is_told_so(workspace: Path, run: Run) -> None:
    path = write_rows(workspace, 0, [{"prompt": "Say it.", "chosen": "red", "rejected": "red"}])
    code, out, err = run("client", "train", "--id", 0, "-w", workspace)
    assert (code, out) == (3, "")
    assert f"{path}: none of 1 rows is usable as preference (1 same responses)" in err


PAIR = {"prompt": "Say it.", "chosen": "green", "rejected": "red"}
LACKING = {"prompt": "Say it.", "chosen": "green"}


def test_a_row_without_rejected_is_left_out_and_counted(workspace: Path, run: Run, tmp_path: Path) -> None:
    path = write_rows(workspace, 0, [PAIR, PAIR, LACKING])
    done = results(run, "client", "train", "--id", 0, "-w", workspace)
    assert (done["num_samples"], done["num_unusable"], done["left_out"]) == (2, 1, {"malformed": 1})
    other = tmp_path / "other"
    overrides = settings(*FEW, f"data.source={path}", "data.partition=iid")
    assert results(run, "init", other, "--preset", "demo-dpo", *overrides)["status"] == "created"
    files = [other / f"data/client-{client}.jsonl" for client in range(2)]
    kept = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert kept == [PAIR, PAIR]
    assert json.loads((other / "data/card.json").read_text())["left_out"] == {"malformed": 1}


def test_rows_that_all_lack_rejected_are_a_fault_that_names_the_first(
    workspace: Path, run: Run, tmp_path: Path
) -> None:
    path = write_rows(workspace, 0, [LACKING, LACKING])
    problem = f"{path}, line 1: no column 'rejected'; it has prompt, chosen"
    code, out, err = run("client", "train", "--id", 0, "-w", workspace)
    assert (code, out) == (3, "")
    assert f"{path}: none of 2 rows is usable as preference (2 malformed); first, {problem}" in err
    assert not (workspace / "inbox/0").exists() or not any((workspace / "inbox/0").iterdir())
    other = tmp_path / "other"
    overrides = settings(*FEW, f"data.source={path}", "data.partition=iid")
    done = fedcli("init", other, "--preset", "demo-dpo", *overrides, cwd=tmp_path)  # a process: nothing of it is left
    assert (done.returncode, done.stdout) == (3, "")
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert not other.exists()


# A term of the whole batch


def kto_loss(likelihood: Likelihood, *, beta: float, kl: torch.Tensor) -> torch.Tensor:
    chosen, rejected = likelihood.log_probs - likelihood.reference
    return (3 - 2 * torch.sigmoid(beta * (chosen - kl)) - torch.sigmoid(beta * (kl - rejected))).sum()


def mean_log_ratio(likelihood: Likelihood, *, beta: float) -> dict[str, torch.Tensor]:
    return {"kl": (likelihood.log_probs - likelihood.reference).clamp(min=0).mean()}


KTO = replace(DPO, name="kto", loss=kto_loss, batch_terms=mean_log_ratio)
"""Of the shape of Ethayarajh et al. 2024, equation 8: a loss with an estimate over the batch."""


@pytest.mark.parametrize("micro_batch_size", [None, 3, 1])
def test_a_term_of_the_whole_batch_is_the_same_however_the_batch_is_cut(
    adapted: AdaptedModel, pairs: list[EncodedRow], micro_batch_size: int | None
) -> None:
    beta, size = 0.5, 4
    start, reference = noisy_adapter(1), noisy_adapter(2)
    rows = refer(adapted, reference, pairs)[: 2 * size]
    policy = [row.reference for row in refer(adapted, start, pairs)[:size]]
    ratios = np.array(policy) - np.array([row.reference for row in rows[:size]])
    kl = float(ratios.clip(0).mean())
    with_term, without = (
        float((3 - [2, 1] @ (1 / (1 + np.exp(-beta * np.stack([ratios[:, 0] - z, z - ratios[:, 1]]))))).mean())
        for z in (kl, 0)
    )
    assert abs(with_term - without) > 1e-3
    settings = TrainSettings(
        batch_size=size, micro_batch_size=micro_batch_size, learning_rate=1e-3, weight_decay=0.0, max_grad_norm=1.0,
        gradient_checkpointing=False, seed=0, hyperparameters={"beta": beta},
    )  # fmt: skip
    adapted.load(start)
    losses = fit(adapted, rows, KTO, settings, on_step=lambda report: None)
    assert len(losses) == 2
    assert losses[0] == pytest.approx(with_term, rel=1e-5)
    trained = adapted.values()
    adapted.load(start)
    whole = fit(adapted, rows, KTO, replace(settings, micro_batch_size=size), on_step=lambda report: None)
    assert losses == pytest.approx(whole, rel=1e-5)
    assert farthest(trained, adapted.values()) <= 1e-5
