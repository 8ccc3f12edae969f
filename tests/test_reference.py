"""The reference model of direct preference optimisation: which it is, and the cache of what it says."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.models import TINY, preference, same_bits
from support.processes import FEW, Run, results, runner, settings

from fedcli import Federation
from fedcli.cli import main
from fedcli.client.runtime import Runtime
from fedcli.data.encoding import Encoder
from fedcli.data.templates import alpaca
from fedcli.parties.party import Party, find_party
from fedcli.tasks.conversation import Preference
from fedcli.workspace.caches import read_reference, reference_key
from fedcli.workspace.history import read_round
from fedcli.workspace.layout import Workspace


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


def plain_log_probs(model: Any, tokenizer: Any, rows: list[Preference]) -> list[tuple[float, float]]:
    """Return the log-probabilities of both responses of each row, by a plain forward pass over its text."""

    def response(row: Preference, text: str) -> float:
        prompt = tokenizer(alpaca(row.prompt[0].text))["input_ids"]
        ids = torch.tensor([*tokenizer(alpaca(row.prompt[0].text) + " " + text)["input_ids"], tokenizer.eos_token_id])
        assert ids[: len(prompt)].tolist() == prompt
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        return log_probs[torch.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :].sum().item()

    return [(response(row, row.chosen), response(row, row.rejected)) for row in rows]


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    """The plain base model, without peft, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(TINY)


def cache_of(workspace: Path, client: int) -> Path:
    (path,) = (workspace / f"private/{client}").glob("reference-*.safetensors")
    return path


def cached(workspace: Path, client: int) -> list[tuple[Preference, tuple[float, float]]]:
    """Return the rows whose reference a client has computed, and what it is."""
    rows = [json.loads(line) for line in (workspace / f"data/client-{client}.jsonl").read_text().splitlines()]
    preferences = [preference(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    start = read_round(Workspace(workspace), 0)
    known = read_reference(Workspace(workspace).private(client), reference_key(start.manifest, "float32"))
    from transformers import AutoTokenizer

    examples = Encoder(AutoTokenizer.from_pretrained(TINY)).encode(preferences, 128)
    found = [(row, known[pair.key]) for row, pair in zip(preferences, examples, strict=True) if pair.key in known]
    assert len(found) == len(known) > 0
    return found


def assert_reference(workspace: Path, client: int, model: Any, tokenizer: Any) -> None:
    """Assert that what a client has cached are a model's log-probabilities."""
    found = cached(workspace, client)
    expected = plain_log_probs(model, tokenizer, [row for row, _ in found])
    np.testing.assert_allclose([log_probs for _, log_probs in found], expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_reference_of_a_fresh_adapter_is_the_plain_base_in_every_round(
    workspace: Path, run: Run, base: tuple[Any, Any]
) -> None:
    first = [results(run, "client", "train", "--id", client, "-w", workspace) for client in range(2)]
    assert [result["first_loss"] for result in first] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert_reference(workspace, 0, *base)
    assert results(run, "server", "aggregate", "-w", workspace)["round"] == 1
    later = results(run, "client", "train", "--id", 0, "-w", workspace)
    assert abs(later["first_loss"] - math.log(2)) > 1e-3
    assert len(cached(workspace, 0)) == 2 * 4 * 4  # rounds x steps x batch size: no row is drawn twice yet
    assert_reference(workspace, 0, *base)
    assert run("verify", "-w", workspace)[0] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_reference_of_a_federation_that_starts_from_an_sft_adapter_is_that_adapter(
    tmp_path: Path, run: Run, base: tuple[Any, Any]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    results(run, "init", sft, *settings(*FEW, "federation.rounds=1"))
    assert results(run, "run", "-w", sft)["state"] == "finished"
    tuned = sft / "rounds/00001/adapter"
    results(run, "init", dpo, "--preset", "demo-dpo", *settings(*FEW, f"adapter.init={tuned}"))
    started = load_file(dpo / "rounds/00000/adapter/adapter_model.safetensors")
    assert same_bits(started, load_file(tuned / "adapter_model.safetensors"))
    first = results(run, "client", "train", "--id", 1, "-w", dpo)
    assert first["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    results(run, "client", "train", "--id", 0, "-w", dpo)
    results(run, "server", "aggregate", "-w", dpo)
    assert abs(results(run, "client", "train", "--id", 1, "-w", dpo)["first_loss"] - math.log(2)) > 1e-3
    model, tokenizer = base
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tuned).eval()
    assert_reference(dpo, 1, reference, tokenizer)
    found = cached(dpo, 1)
    untuned = plain_log_probs(model, tokenizer, [row for row, _ in found])
    assert np.abs(np.array([log_probs for _, log_probs in found]) - untuned).max() > 0.05


# The cache of the reference


@pytest.fixture
def warm(workspace: Path) -> tuple[Workspace, Runtime]:
    """A loaded model, and the workspace that it is of."""
    found = Workspace(workspace)
    return found, Runtime(Federation(found).state)


def party_of(workspace: Workspace) -> Party:
    return find_party(Federation(workspace).state, 0)


def forwards(warm: tuple[Workspace, Runtime], **changes: Any) -> int:
    """Train client 0 on round 0; return how many forward passes were made beside those of the steps."""
    workspace, runtime = warm
    start = read_round(workspace, 0)
    train = start.manifest.train.model_copy(update=changes)
    calls: list[None] = []
    hook = runtime.adapted.model.get_base_model().register_forward_pre_hook(lambda *_: calls.append(None))
    runtime.train(
        start.adapter(),
        train,
        party=party_of(workspace),
        round_number=0,
        first_draw=0,
        rule=None,
        on_step=lambda report: None,
    )
    hook.remove()
    return len(calls) - train.steps


def fresh(warm: tuple[Workspace, Runtime]) -> tuple[Workspace, Runtime]:
    """Return another process's model, which remembers nothing."""
    return warm[0], Runtime(Federation(warm[0]).state)


def test_each_rows_reference_is_computed_once(warm: tuple[Workspace, Runtime]) -> None:
    assert forwards(warm) == 16  # one pass for both sides of each of the rows that four steps draw
    assert forwards(warm) == 0
    assert forwards(fresh(warm)) == 0
    assert forwards(warm, steps=6) == 8  # the rows of the two further steps


def test_a_changed_row_and_another_max_length_are_computed_anew(warm: tuple[Workspace, Runtime]) -> None:
    workspace, runtime = warm
    forwards(warm)
    (drawn, _), *_ = cached(workspace.root, 0)
    longest = max(
        len(side.ids) for pair in runtime.rows(party_of(workspace), read_round(workspace, 0).manifest.train)
        for side in pair.sides
    )  # fmt: skip
    assert forwards(warm, max_length=longest) == 0  # nothing is cut: the same tokens
    assert 0 < forwards(warm, max_length=longest - 3) <= 16
    path = workspace.client_rows(0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["prompt"] == drawn.prompt[0].text:
            row["chosen"] += " indeed"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert forwards(fresh(warm)) == 1


def flip(contents: bytes) -> bytes:
    """Flip one bit of a log-probability: the safetensors file is as well-formed as before."""
    values = 8 + int.from_bytes(contents[:8], "little")  # float64 before uint8
    return contents[: values + 6] + bytes([contents[values + 6] ^ 0x10]) + contents[values + 7 :]


@pytest.mark.parametrize(
    "damage",
    [lambda contents: b"", lambda contents: contents[: len(contents) // 2], lambda contents: b"x" * 100, flip],
    ids=["empty", "torn", "garbage", "flipped"],
)
def test_a_damaged_cache_is_computed_anew(warm: tuple[Workspace, Runtime], damage: Callable[[bytes], bytes]) -> None:
    forwards(warm)
    path = cache_of(warm[0].root, 0)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert forwards(fresh(warm)) > 0
    assert path.read_bytes() == whole


def test_a_cache_whose_arrays_do_not_fit_is_computed_anew(warm: tuple[Workspace, Runtime]) -> None:
    forwards(warm)
    path = cache_of(warm[0].root, 0)
    whole = load_file(path)
    for wrong in (
        whole | {"values": whole["values"][1:]},
        whole | {"values": whole["values"][:, :1].copy()},
        whole | {"keys": whole["keys"][:, :7].copy()},
        {"keys": whole["keys"]},
    ):
        save_file(wrong, path)
        assert forwards(fresh(warm)) == 16
        assert load_file(path)["values"].tolist() == whole["values"].tolist()
