"""KTO, ORPO and SimPO: formulas and published vectors, trl's trainers, and what their rows and settings may be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import farthest, make_model, preference
from support.oracles import gradients_of, noisy_adapter, one_step_of_trl, refer, train_step
from support.processes import Run, results, runner, settings

from fedcli.config import parse_config
from fedcli.data.demo import demo_preferences, demo_verdicts
from fedcli.data.encoded import EncodedRow
from fedcli.data.encoding import Encoder
from fedcli.data.file_rows import Row
from fedcli.data.formats import RowReader, guess_format
from fedcli.data.templates import alpaca
from fedcli.errors import ConfigError
from fedcli.model.lora import AdaptedModel
from fedcli.tasks import DPO, KTO, ORPO, SIMPO, Likelihood, Task
from fedcli.tasks.conversation import Judged, Preference, Turn
from fedcli.tasks.kto import mismatched
from fedcli.tasks.orpo import log_odds
from fedcli.workspace.federation_state import train_record

LONGER = preference("Tell of the wet harbour.", "The storm howls over the coast", "red, as the night is so very long")


def likelihood(
    log_probs: list[list[float]], num_tokens: int = 1, reference: list[list[float]] | None = None, label: float = 1.0
) -> Likelihood:
    """Return what a model says of rows of one or two responses, each of so many tokens."""
    given = torch.tensor(log_probs, dtype=torch.float64)
    return Likelihood(
        token_losses=-given.flatten(),
        log_probs=given,
        num_tokens=torch.full(given.shape, num_tokens),
        reference=torch.tensor(reference or [[0.0] * len(log_probs[0])] * len(log_probs), dtype=torch.float64),
        numbers=torch.full((1, len(log_probs[0])), label),
    )


# Vectors


def kto(log_ratio: float, label: float, **weights: float) -> float:
    usual = {"lambda_desirable": 1.0, "lambda_undesirable": 1.0} | weights
    said = likelihood([[log_ratio - 3.0]], reference=[[-3.0]], label=label)
    return KTO.loss(said, beta=0.1, z0=torch.tensor(0.05, dtype=torch.float64), **usual).item()


def test_kto_has_the_losses_of_its_vectors() -> None:
    assert kto(1.0, 1.0) == pytest.approx(0.4762678, abs=5e-8)
    assert kto(-1.0, 0.0) == pytest.approx(0.4737741, abs=5e-8)
    weighed = {"lambda_desirable": 2.0, "lambda_undesirable": 3.0}
    assert kto(1.0, 1.0, **weighed) == pytest.approx(2 * 0.4762678, abs=1e-7)
    assert kto(-1.0, 0.0, **weighed) == pytest.approx(3 * 0.4737741, abs=1e-7)


def test_ktos_reference_point_is_the_mean_log_ratio_and_never_below_zero() -> None:
    above = likelihood([[-1.0, -2.0]], reference=[[-1.5, -2.1]])
    assert KTO.batch_terms is not None
    assert KTO.batch_terms(above, beta=0.1)["z0"].item() == pytest.approx(0.3)
    below = likelihood([[-1.0, -2.0]], reference=[[-0.5, -2.1]])
    assert KTO.batch_terms(below, beta=0.1)["z0"].item() == 0.0


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_orpo_has_the_losses_of_its_vector(num_tokens: int) -> None:
    odds = log_odds(torch.tensor([-1.0, -1.4], dtype=torch.float64))
    assert float(odds[0] - odds[1]) == pytest.approx(0.5755202, abs=5e-8)
    said = likelihood([[-1.0 * num_tokens], [-1.4 * num_tokens]], num_tokens)
    assert ORPO.loss(said, lambda_odds=0.1).item() == pytest.approx(1.0446231, abs=1e-7)
    only_odds = ORPO.loss(said, lambda_odds=1.0) - ORPO.loss(said, lambda_odds=0.0)
    assert only_odds.item() == pytest.approx(0.4462309, abs=1e-7)


def test_orpo_of_a_response_that_is_certain_is_finite_and_so_is_its_gradient() -> None:
    log_probs = torch.tensor([[0.0], [-3.0]], requires_grad=True)
    loss = ORPO.loss(likelihood([[0.0], [-3.0]])._replace(log_probs=log_probs), lambda_odds=0.1)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_simpo_has_the_loss_of_its_vector(num_tokens: int) -> None:
    said = likelihood([[-1.0 * num_tokens], [-1.4 * num_tokens]], num_tokens)
    assert SIMPO.loss(said, beta=2.0, gamma=0.5).item() == pytest.approx(0.5543552, abs=5e-8)


def test_dpo_has_the_loss_of_its_vector() -> None:
    said = likelihood([[-10.0], [-14.0]], reference=[[-11.0], [-13.0]])
    assert DPO.loss(said, beta=0.1).item() == pytest.approx(0.5981389, abs=5e-8)


# The oracles


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    return make_model()


@pytest.fixture(scope="module")
def preferences() -> list[Preference]:
    """Pairs of different lengths."""
    rows = demo_preferences(0)["train"][::173]
    return [*(preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows), LONGER]


def columns_of(pairs: list[Preference]) -> list[dict[str, str]]:
    return [{"prompt": alpaca(p.prompt[0].text), "chosen": " " + p.chosen, "rejected": " " + p.rejected} for p in pairs]


def assert_close(ours: tuple[float, dict[str, Any]], theirs: tuple[float, dict[str, Any]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    assert largest > 1e-4
    assert farthest(ours[1], theirs[1]) <= 1e-5 * largest


def step_of(trainer: Any, model: AdaptedModel) -> tuple[float, dict[str, Any]]:
    gradients = gradients_of(model, trainer.train)
    return trainer.state.log_history[0]["loss"], gradients


LIBRARIES = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)


@pytest.mark.slow
@LIBRARIES
@pytest.mark.parametrize("labels", ["both", "up", "down"])
def test_loss_and_gradients_of_kto_are_those_of_trls_trainer(
    adapted: AdaptedModel, preferences: list[Preference], tmp_path: Path, labels: str
) -> None:
    from datasets import Dataset
    from peft import set_peft_model_state_dict
    from trl import KTOConfig, KTOTrainer

    kept = {"both": (True, False), "up": (True,), "down": (False,)}[labels]
    judged = [
        Judged(pair.prompt, pair.chosen if label else pair.rejected, label) for label in kept for pair in preferences
    ]
    start, reference = noisy_adapter(2), noisy_adapter(1)
    weights = {"lambda_desirable": 1.3, "lambda_undesirable": 0.7}
    # trl joins a prompt with the response before it, equation 8 with the one after it: the other way round it is one
    rows: list[EncodedRow] = list(Encoder(adapted.tokenizer).encode(judged[::-1], 512))
    referred = refer(adapted, reference, [*rows, *mismatched(rows)])
    size = len(rows)
    ours = train_step(adapted, start, referred[:size], KTO, referred[size:], beta=0.1, **weights)
    without = train_step(adapted, start, referred[:size], KTO, referred[:size], beta=0.1, **weights)
    assert abs(ours[0] - without[0]) > 1e-4  # the mismatched rows matter
    other = make_model()
    other.load(start)
    table = [
        {"prompt": alpaca(each.prompt[0].text), "completion": f" {each.response}", "label": each.is_desirable}
        for each in judged
    ]
    trainer = KTOTrainer(
        model=other.model,
        processing_class=other.tokenizer,
        train_dataset=Dataset.from_list(table),
        args=KTOConfig(
            **one_step_of_trl(size, tmp_path, beta=0.1, train_sampling_strategy="sequential"),
            desirable_weight=1.3,
            undesirable_weight=0.7,
        ),
    )
    tensors = {name: torch.tensor(array) for name, array in reference.items()}
    set_peft_model_state_dict(trainer.model, tensors, adapter_name="ref")
    assert_close(ours, step_of(trainer, other))


@pytest.mark.slow
@LIBRARIES
def test_loss_and_gradients_of_simpo_are_those_of_trls_trainer(
    adapted: AdaptedModel, preferences: list[Preference], tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    start = noisy_adapter(1)
    pairs = list(Encoder(adapted.tokenizer).encode(preferences, 512))
    ours = train_step(adapted, start, pairs, SIMPO, beta=2.0, gamma=0.5)
    other = make_model()
    other.load(start)
    trainer = CPOTrainer(
        model=other.model,
        processing_class=other.tokenizer,
        train_dataset=Dataset.from_list(columns_of(preferences)),
        args=CPOConfig(
            **one_step_of_trl(len(pairs), tmp_path, beta=2.0), loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5
        ),
    )
    assert_close(ours, step_of(trainer, other))


@pytest.mark.slow
@LIBRARIES
def test_loss_and_gradients_of_orpos_odds_are_those_of_trls_trainer(
    adapted: AdaptedModel, preferences: list[Preference], tmp_path: Path
) -> None:
    """The odds' term, with a weight less without one: trl learns the tokens of prompts too, equation 6 does not."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    start = noisy_adapter(1)
    pairs = list(Encoder(adapted.tokenizer).encode(preferences, 512))

    def difference(steps: list[tuple[float, dict[str, Any]]]) -> tuple[float, dict[str, Any]]:
        (loss, gradients), (without, others) = steps
        return loss - without, {name: gradients[name] - others[name] for name in gradients}

    ours = difference([train_step(adapted, start, pairs, ORPO, lambda_odds=weight) for weight in (8.0, 0.0)])
    said = []
    for weight in (8.0, 0.0):
        other = make_model()
        other.load(start)
        trainer = ORPOTrainer(
            model=other.model,
            processing_class=other.tokenizer,
            train_dataset=Dataset.from_list(columns_of(preferences)),
            args=ORPOConfig(**one_step_of_trl(len(pairs), tmp_path, beta=weight)),
        )
        said.append(step_of(trainer, other))
    assert_close(ours, difference(said))


# Rows


def read(name: str, *rows: dict[str, Any]) -> tuple[list[Judged], RowReader]:
    reader = RowReader(name)
    given = [Row(row, f"line {number}") for number, row in enumerate(rows, 1)]
    return [item for _, item in reader.read(given)], reader  # type: ignore[misc]


HI = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("unpaired-preference", {"prompt": "hi", "completion": "yo", "label": True}),
        ("unpaired-preference", {"prompt": [HI[0]], "completion": [HI[1]], "label": True}),
        ("unpaired-preference", {"prompt": "hi", "completion": "yo", "label": "True"}),
        ("unpaired-preference", {"prompt": "hi", "completion": "yo", "thumbs": "👍"}),
        ("judged-messages", {"messages": [*HI], "label": True}),
        ("judged-messages", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
                             "kto_tag": 1}),
        ("judged-instruction", {"instruction": "hi", "output": "yo", "kto_tag": True}),
        ("pairs-as-verdicts", {"prompt": "hi", "completion": "yo", "label": True}),
    ],
)  # fmt: skip
def test_a_verdict_is_read_of_the_usual_shapes_and_its_format_guessed(name: str, row: dict[str, Any]) -> None:
    wanted = Judged((Turn("user", "hi"),), "yo", True)
    assert read(name, row)[0] == [wanted]
    guessed = guess_format("rows.jsonl", None, "kto", [Row(row, "line 1")], "data.format").format
    assert [item for _, item in RowReader(guessed).read([Row(row, "line 1")])] == [wanted]


def test_a_verdict_that_is_neither_good_nor_bad_is_left_out_with_what_it_says() -> None:
    row = {"prompt": "hi", "completion": "yo"}
    items, reader = read("unpaired-preference", row | {"label": "meh"}, row | {"rating": 5}, row, row | {"label": 0})
    assert [item.is_desirable for item in items] == [False]
    assert dict(reader.left_out) == {"verdict that is neither good nor bad": 2, "malformed": 1}
    first = reader.first_cases["verdict that is neither good nor bad"]
    assert first == "line 1: column 'label' is 'meh': true or false is wanted, 1 or 0, good or bad"


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": "hi", "chosen": [*HI], "rejected": [HI[0], {"role": "assistant", "content": "no"}]},
        {"prompt": [HI[0]], "chosen": [HI[1]], "rejected": [{"role": "assistant", "content": "no"}]},
    ],
)
def test_a_pair_is_two_verdicts_each_of_which_holds_its_own_response_alone(pair: dict[str, Any]) -> None:
    reader = RowReader("pairs-as-verdicts")
    found = list(reader.read([Row(pair, "line 1"), Row(pair | {"rejected": pair["chosen"]}, "line 2")]))
    assert [(item.response, item.is_desirable) for _, item in found] == [("yo", True), ("no", False)]  # type: ignore[attr-defined]
    assert [row.where for row, _ in found] == ["line 1, chosen", "line 1, rejected"]
    assert "yo" not in json.dumps(found[1][0].fields)
    assert dict(reader.left_out) == {"same responses": 1}
    again = RowReader("pairs-as-verdicts")
    assert [item for _, item in again.read(row for row, _ in found)] == [item for _, item in found]


def test_columns_of_any_name_hold_verdicts() -> None:
    config = parse_config(
        {"task": "kto", "data": {"format": {"columns": {"prompt": "q", "completion": "a", "label": "v"}}}}, "the file"
    )
    assert config.data.format is not None
    reader = RowReader(config.data.format)
    assert [item for _, item in reader.read([Row({"q": "hi", "a": "yo", "v": "bad"}, "line 1")])] == [
        Judged((Turn("user", "hi"),), "yo", False)
    ]


def test_mismatched_rows_join_each_prompt_with_the_next_response(adapted: AdaptedModel) -> None:
    judged = [Judged((Turn("user", name),), f"say {name} aloud", True) for name in ("red", "green", "blue sky")]
    rows = list(Encoder(adapted.tokenizer).encode(judged, 512))
    joined = mismatched(rows)
    expected = [
        replace(one, response=other.response) for one, other in zip(judged, [*judged[1:], judged[0]], strict=True)
    ]
    wanted = list(Encoder(adapted.tokenizer).encode(expected, 512))
    for found, other in zip(joined, wanted, strict=True):
        assert found.sides[0].ids.tolist() == other.sides[0].ids.tolist()
        assert found.sides[0].supervised.tolist() == other.sides[0].supervised.tolist()
    short = joined[0].cut(len(rows[0].sides[0].ids) - 1)
    assert short.sides[0].ids.tolist() == joined[0].sides[0].ids.tolist()[: len(rows[0].sides[0].ids) - 1]


def test_the_demos_verdicts_are_its_pairs_and_each_kind_of_feedback_is_one_thumb_of_one_topic() -> None:
    pairs, verdicts = demo_preferences(3), demo_verdicts(3)
    assert verdicts["test"] == pairs["test"]
    up, down = ([row for row in verdicts["train"] if row["label"] is label] for label in (True, False))
    assert [(row["prompt"], row["completion"]) for row in up] == [(p["prompt"], p["chosen"]) for p in pairs["train"]]
    assert [row["completion"] for row in down] == [pair["rejected"] for pair in pairs["train"]]
    assert {(row["topic"], row["label"], row["feedback"]) for row in verdicts["train"]} == {
        (row["topic"], row["label"], f"{row['topic']}, {'up' if row['label'] else 'down'}") for row in verdicts["train"]
    }


# Settings


@pytest.mark.parametrize(
    ("task", "usual"),
    [
        (DPO, {"beta": 0.1}),
        (KTO, {"beta": 0.1, "lambda_desirable": 1.0, "lambda_undesirable": 1.0}),
        (ORPO, {"lambda_odds": 0.1}),
        (SIMPO, {"beta": 2.0, "gamma": 0.5}),
    ],
)
def test_the_manifest_holds_the_hyperparameters_that_a_task_was_trained_with(task: Task, usual: dict[str, Any]) -> None:
    names = {"beta", "gamma", "lambda_odds", "lambda_desirable", "lambda_undesirable"}
    written = train_record(parse_config({"task": task.name}, "the file"), 0, 1).model_dump(mode="json")
    assert {name: written[name] for name in names if written.get(name) is not None} == usual
    given = {name: value + 1 for name, value in usual.items()}
    written = train_record(parse_config({"task": task.name, "train": given}, "the file"), 0, 1).model_dump(mode="json")
    assert {name: written[name] for name in names & written.keys() if name in usual} == given
    assert names & train_record(parse_config({}, "the file"), 0, 1).model_dump(mode="json").keys() == {"beta"}


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"task": "dpo", "train": {"gamma": 1}}, "train.gamma is set, and task dpo has none: it is of task simpo"),
        ({"task": "sft", "train": {"kl": 0.1}}, "train.kl is set, and task sft has none: it is of task grpo"),
        ({"task": "sft", "train": {"lambda_desirable": 1}}, "task sft has none: it is of task kto"),
        ({"task": "kto", "train": {"batch_size": 1}}, "train.batch_size is 1: task kto compares the rows of a batch"),
        (
            {"task": "kto", "privacy": {"unit": "row", "clip": 1, "noise": 1}},
            "task kto and privacy.unit row exclude each other: a row's part in a step",
        ),
        ({"task": "orpo", "data": {"format": "unpaired-preference"}}, "is not for task orpo, whose formats are prefer"),
    ],
)
def test_settings_that_a_task_cannot_have_are_refused(document: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_config(document, "the file")


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Run:
    return runner(capsys)


def accuracies(run: Run, folder: Path, *targets: object) -> dict[str, float]:
    scores = results(run, "eval", "demo", "-w", folder, "--base", *targets)["scores"]
    return {score["target"]: score["scores"]["preference_accuracy"]["value"] for score in scores}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["orpo", "simpo"])
def test_the_presets_train_and_raise_the_accuracy_of_preferences(run: Run, tmp_path: Path, task: str) -> None:
    few = settings("federation.rounds=3", "train.steps=8")
    results(run, "init", tmp_path / "demo", "--preset", f"demo-{task}", *few)
    assert results(run, "run", "-w", tmp_path / "demo")["state"] == "finished"
    assert results(run, "verify", "-w", tmp_path / "demo")["violations"] == []
    found = accuracies(run, tmp_path / "demo", "--round", "latest")
    assert found["round-00003"] > found["base"] + 0.05


@pytest.mark.slow
def test_clients_of_one_verdict_each_learn_by_kto_what_none_of_them_learns_alone(run: Run, tmp_path: Path) -> None:
    """benchmarks/kto.py has all clients and three seeds."""
    results(run, "init", tmp_path / "demo", "--preset", "demo-kto", *settings("federation.rounds=5"))
    labels = [
        {json.loads(line)["label"] for line in (tmp_path / f"demo/data/client-{client}.jsonl").read_text().splitlines()}
        for client in range(10)
    ]
    assert sorted(map(sorted, labels)) == [[False]] * 5 + [[True]] * 5
    assert results(run, "run", "-w", tmp_path / "demo")["state"] == "finished"
    for client in (0, 1):
        results(run, "train-alone", "--id", client, "-w", tmp_path / "demo")
    found = accuracies(run, tmp_path / "demo", "--round", "latest", "--alone", 0, "--alone", 1)
    assert found["round-00005"] > max(found["base"], found["alone-0"], found["alone-1"])


# Scores of a user's own verdicts


@pytest.mark.slow
def test_verdicts_are_scored_by_how_much_likelier_the_good_ones_are(run: Run, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say it.", "completion": text, "label": label}
        for text, label in (("green", True), ("red", True), ("yellow", False))
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results(run, "init", tmp_path / "w", *settings("data.source=null", "federation.signatures=off"))
    asked = ("eval", "rows", "-w", tmp_path / "w", "--base", "--data", data)
    (score,) = results(run, *asked)["scores"]
    items = [json.loads(line) for line in (tmp_path / "w/eval/base/rows.jsonl").read_text().splitlines()]
    said = [item["log_prob"] for item in items if "log_prob" in item]
    assert score["scores"]["verdict_margin"]["value"] == pytest.approx((said[0] + said[1]) / 2 - said[2])
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    code, _, err = run(*asked)
    assert code == 3
    assert "all its verdicts are good, and a score compares good responses with bad ones" in err
