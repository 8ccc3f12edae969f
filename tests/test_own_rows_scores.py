"""`fedcli eval rows`: a user's own held-out rows, scored by likelihood; expected values are computed here, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import SMALL, settings, warm
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcli.model.base import find_base

pytestmark = pytest.mark.slow  # test_own_rows.py has the formulas; this is the model's

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
EXAMPLES = [("Say blue.", "blue"), ("Name a sea.", "the North Sea"), ("Count.", "one two three four")]
PAIRS = [("Say blue.", "blue", "red"), ("Name a sea.", "the North Sea is a sea", "no")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own-rows") / "w"
    done = warm()("init", folder, *settings(*SMALL), cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def log_prob() -> Any:
    """Return what computes (log p, tokens) of a response to an instruction, in Alpaca's words, its end included."""
    folder = find_base("builtin:tiny", revision=None, root=Path())
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )

    def compute(instruction: str, response: str) -> tuple[float, int]:
        prompt = tokenizer(f"{HEAD}\n\n### Instruction:\n{instruction}\n\n### Response:")["input_ids"]
        whole = tokenizer(f"{HEAD}\n\n### Instruction:\n{instruction}\n\n### Response: {response}")["input_ids"]
        whole.append(tokenizer.eos_token_id)
        assert whole[: len(prompt)] == prompt
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        answer = range(len(prompt), len(whole))
        return sum(float(logits[at - 1, whole[at]]) for at in answer), len(answer)

    return compute


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(path: Path) -> Path:
    return write(path, [{"instruction": asked, "output": answer} for asked, answer in EXAMPLES])


def score(workspace: Path, data: Path, *more: object) -> dict[str, float]:
    done = warm()("eval", "rows", "--base", "--data", data, "--json", *more, cwd=workspace)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)["scores"]
    return {name: entry["value"] for name, entry in record["scores"].items()}


def test_the_loss_is_nats_per_token_over_all_responses(workspace: Path, tmp_path: Path, log_prob: Any):
    found = score(workspace, examples(tmp_path / "held-out.jsonl"))
    answers = [log_prob(*example) for example in EXAMPLES]
    expected = -sum(value for value, _ in answers) / sum(count for _, count in answers)
    assert found == {"loss": pytest.approx(expected, abs=1e-4), "exact_match": 0.0}


def test_of_pairs_the_share_whose_chosen_response_is_likelier_is_scored(workspace: Path, tmp_path: Path, log_prob: Any):
    rows = [{"prompt": asked, "chosen": good, "rejected": bad} for asked, good, bad in PAIRS]
    found = score(workspace, write(tmp_path / "pairs.jsonl", rows))
    margins = [log_prob(asked, good)[0] - log_prob(asked, bad)[0] for asked, good, bad in PAIRS]
    assert found["preference_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert found["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def test_each_of_several_files_has_metrics_of_its_own(workspace: Path, tmp_path: Path, log_prob: Any):
    examples(tmp_path / "rows-all.jsonl")
    write(tmp_path / "rows-blue.jsonl", [{"question": "Say blue.", "answer": "blue"}])
    found = score(workspace, tmp_path)
    value, count = log_prob("Say blue.", "blue")
    assert found["loss:blue"] == pytest.approx(-value / count, abs=1e-4)
    assert found["loss:all"] != found["loss"] != found["loss:blue"]
    limited = score(workspace, tmp_path, "--limit", 1)
    assert limited["loss:all"] == pytest.approx(limited["loss:blue"], abs=1e-5), "the first row of each file"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a", "output": ""}], "empty response"),
        ([{"text": "a tale"}], "texts without a prompt"),
        ([{"colour": "blue"}], "none of 1 rows is usable"),
        ([], "holds no rows"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(workspace: Path, tmp_path: Path, rows: list[dict[str, Any]], said: str):
    done = warm()("eval", "rows", "--base", "--data", write(tmp_path / "bad.jsonl", rows), cwd=workspace)
    assert done.returncode == 3
    assert said in done.stderr
    assert "bad.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_data_the_message_says_how_to_name_rows(workspace: Path):
    done = warm()("eval", "rows", "--base", cwd=workspace)
    assert done.returncode == 8
    assert "--data FILE" in done.stderr


def test_a_file_in_place_of_the_folder_of_a_published_benchmark_is_refused(workspace: Path, tmp_path: Path):
    done = warm()("eval", "gsm8k", "--base", "--data", examples(tmp_path / "test.jsonl"), cwd=workspace)
    assert done.returncode == 2
    assert "is no folder" in done.stderr


def test_files_of_several_kinds_are_parts_and_two_of_one_name_are_refused(workspace: Path, tmp_path: Path):
    examples(tmp_path / "rows-all.jsonl")
    (tmp_path / "rows-blue.csv").write_text("question,answer\nSay blue.,blue\n")
    assert {"loss:all", "loss:blue"} <= score(workspace, tmp_path).keys()
    examples(tmp_path / "rows-blue.jsonl")
    done = warm()("eval", "rows", "--base", "--data", tmp_path, cwd=workspace)
    assert done.returncode == 3
    assert "rows-blue.csv" in done.stderr
    assert "both the part 'blue'" in done.stderr
