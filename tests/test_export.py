"""`fedcli export`: what is handed over loads elsewhere, says what it is, and stands whole or not at all."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.handmade import merge, score
from support.processes import SMALL, fedcli, settings

from fedcli import Federation
from fedcli.errors import UsageError, WorkspaceError
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.merged import check_mergeable
from fedcli.report.card import Card, ClientData, render_card
from fedcli.workspace.layout import Workspace
from fedcli.workspace.publish import new_folder


@pytest.fixture
def merged(small: Path) -> Workspace:
    """A federation of two rounds that has finished."""
    workspace = Workspace(small)
    merge(workspace, {0: 2.0, 1: 1.0, 2: 1.0})
    merge(workspace, {1: 0.5})
    return workspace


def run_ok(*arguments: object, cwd: Path) -> dict:
    done = fedcli(*arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits.float().numpy()


def builtin():
    import torch
    from transformers import AutoModelForCausalLM

    from fedcli.model.base import find_base

    folder = find_base("builtin:tiny", revision=None, root=Path())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder: Path):
    from peft import PeftModel

    with quiet_libraries():
        return PeftModel.from_pretrained(builtin(), folder)


def no_path_of_this_machine(folder: Path) -> None:
    for path in folder.iterdir():
        contents = path.read_bytes()
        assert str(folder.parent).encode() not in contents, path
        assert str(Path.home()).encode() + b"/" not in contents, path
        assert str(Path(__file__).parents[1]).encode() not in contents, path


def test_an_exported_adapter_loads_with_peft_and_is_the_rounds(merged: Workspace, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    result = run_ok("export", tmp_path / "out", cwd=merged.root)
    assert (result["round"], result["merged_dtype"]) == (2, None)
    assert result["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = adapted(tmp_path / "out")
    expected = Federation(merged).round().adapter()
    found = {name: tensor.numpy() for name, tensor in get_peft_model_state_dict(model).items()}
    assert found.keys() == expected.keys()
    assert all((found[name] == expected[name]).all() for name in expected)
    assert json.loads((tmp_path / "out/adapter_config.json").read_bytes())["base_model_name_or_path"] is None
    no_path_of_this_machine(tmp_path / "out")


def test_the_card_tells_what_is_known_and_a_hub_reads_it(merged: Workspace, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    score(merged, "base", 0.25)
    score(merged, 1, 0.75)
    score(merged, 2, 0.5)
    run_ok("export", tmp_path / "last", cwd=merged.root)
    run_ok("export", tmp_path / "best", "--best", "demo", cwd=merged.root)
    card = ModelCard.load(tmp_path / "last/README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None, "a model that ships with fedcli is no hub's"
    assert {"federated-learning", "lora", "fedavg", "sft"} <= set(card.data.tags)
    assert "round 2 of 2" in card.text
    assert "| this adapter | base |\n|---|---|---|\n" in card.text, "no column of what was not scored"
    assert "0.500 [0.375, 0.625] | 0.250 [0.125, 0.375]" in card.text
    assert "| client | rows | format |\n" in card.text
    sizes = [int(rows) for rows in re.findall(r"^\| \d+ \| (\d+) \| alpaca", card.text, re.MULTILINE)]
    assert sizes == json.loads(merged.data_card.read_bytes())["sizes"]
    assert Federation(merged).round().manifest.model.fingerprint in card.text
    assert "licence" in card.text
    best = (tmp_path / "best/README.md").read_text()
    assert "round 1 of 2" in best
    assert "The federation was not finished" in best


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_merged_model_answers_as_base_and_adapter_do(merged: Workspace, tmp_path: Path, dtype: str | None) -> None:
    """In the base's own type, bfloat16, weights are rounded to 8 bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    option = ["--dtype", dtype] if dtype else []
    result = run_ok("export", out, "--merge", *option, "--max-shard-size", "300KB", cwd=merged.root)
    assert result["merged_dtype"] == (dtype or "bfloat16")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    expected = logits(adapted(merged.adapter(2)))
    error = np.abs(logits(model) - expected).max() / np.abs(expected).max()
    assert error < (1e-5 if dtype else 0.1)
    assert np.abs(logits(builtin()) - expected).max() / np.abs(expected).max() > 0.2
    assert (
        AutoTokenizer.from_pretrained(out)("a b").input_ids
        == AutoTokenizer.from_pretrained(builtin().config._name_or_path)("a b").input_ids
    )
    assert "library_name: transformers" in (out / "README.md").read_text()
    no_path_of_this_machine(out)


@pytest.mark.parametrize("template", ["alpaca", "chat", "vicuna", "custom"])
@pytest.mark.slow
def test_a_merged_model_writes_the_prompts_that_it_was_trained_on(template: str, tmp_path: Path) -> None:
    """With a chat template of the base's, or of no such thing; and it answers by what the base's settings say."""
    from support.chat_templates import CHATML
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedcli.config import CustomTemplate
    from fedcli.data.encoding import Encoder
    from fedcli.model.base import find_base
    from fedcli.tasks.conversation import Turn

    base = Path(shutil.copytree(find_base("builtin:tiny", revision=None, root=Path()), tmp_path / "base"))
    if template != "alpaca":  # in its place, where the adapter was not trained with it
        (base / "chat_template.jinja").write_text(CHATML)
    own = {"user": 'Q "{instruction}" é\n', "assistant": "A:", "default_system": "{% be kind %}"}
    named = json.dumps(own, ensure_ascii=False) if template == "custom" else template
    where = tmp_path / "W"
    where.mkdir()
    made = fedcli("init", *settings(*SMALL, f"model.base={base}", f"data.template={named}"), cwd=where)
    assert made.returncode == 0, made.stderr
    out = tmp_path / "model"
    run_ok("export", out, "--merge", cwd=where)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    plain = AutoTokenizer.from_pretrained(base)
    encoder = Encoder(plain, CustomTemplate(**own) if template == "custom" else template)
    for turns in (
        [("user", "the river")],
        [("system", "be brief"), ("user", "the river")],
        [("user", "the river"), ("assistant", "rises"), ("user", "when")],
    ):
        messages = [{"role": role, "content": text} for role, text in turns]
        if template == "chat":  # the base's own stays
            expected = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            (expected,) = encoder.prompts([tuple(Turn(role, text) for role, text in turns)])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert prompt["input_ids"] == expected
    told = json.loads((base / "generation_config.json").read_bytes())
    assert (model.generation_config.eos_token_id, model.generation_config.bos_token_id) == (
        told["eos_token_id"],
        told["bos_token_id"],
    )
    assert "apply_chat_template" in (out / "README.md").read_text()


@pytest.mark.slow
def test_an_adapter_of_a_local_base_loads_as_the_readme_says(merged: Workspace, tmp_path: Path) -> None:
    from fedcli.model.base import find_base

    base = shutil.copytree(find_base("builtin:tiny", revision=None, root=Path()), tmp_path / "base")
    code = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(base)!r}), {str(merged.adapter(2))!r})
print(sum(".lora_" in name for name, _ in model.named_parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.mark.parametrize("standing", ["a file", "a folder with something in it"])
def test_nothing_is_written_over(merged: Workspace, tmp_path: Path, standing: str) -> None:
    out = tmp_path / "out"
    if standing == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    done = fedcli("export", out, cwd=merged.root)
    assert done.returncode == 4
    assert "nothing is written over" in done.stderr
    assert (out if out.is_file() else out / "mine.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "workspace"}


def test_an_export_that_stands_there_already_is_done_and_another_is_refused(merged: Workspace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_ok("export", out, cwd=merged.root)
    made = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert (first["is_new"], run_ok("export", out, cwd=merged.root)) == (True, {**first, "is_new": False})
    assert "holds this very export already" in fedcli("export", out, cwd=merged.root).stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == made
    for changed in (["--round", "0"], ["--merge"]):
        assert fedcli("export", out, *changed, cwd=merged.root).returncode == 4
    (out / "README.md").write_text("mine")
    assert fedcli("export", out, cwd=merged.root).returncode == 4


@pytest.mark.parametrize("name", ["out", ".", "link"])
def test_an_empty_folder_may_be_filled(merged: Workspace, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    output, here = (".", folder) if name == "." else (tmp_path / name, tmp_path)
    assert len(run_ok("export", output, "-w", merged.root, cwd=here)["files"]) == 3
    assert len(list(folder.iterdir())) == 3


KEPT = ("inbox/0", "clients/x", "private/0/x", "eval/x")


@pytest.mark.parametrize("inside", ["rounds/00003", *(pytest.param(inside, marks=pytest.mark.slow) for inside in KEPT)])
def test_nothing_is_exported_into_what_the_workspace_keeps_for_itself(merged: Workspace, inside: str) -> None:
    done = fedcli("export", inside, cwd=merged.root)
    assert done.returncode == 4
    assert "where nothing else belongs" in done.stderr
    assert fedcli("report", "--output", inside, cwd=merged.root).returncode == 4
    assert json.loads(fedcli("verify", "--json", cwd=merged.root).stdout)["violations"] == []


def test_what_parties_say_of_their_rows_is_no_markup_in_the_card() -> None:
    odd = "<img src=x> | [x](y)\n\n# Injected"
    clients = [ClientData(1, 3, odd, odd, odd)]
    card = Card(
        title="t", task="sft", task_description="tuning",
        round=1, rounds=1, num_clients=1, is_simulation=False, algorithm="fedavg", base="b", base_id='a"b',
        template="x", datasets=[], facts={}, clients=clients, metrics=[], merged_dtype=None, notes=[], version="0",
    )  # fmt: skip
    text = render_card(card)
    assert "<img" not in text
    assert "\n# Injected" not in text
    assert " | [x]" not in text
    assert 'from_pretrained("a\\"b")' in text


def test_a_folder_that_could_not_be_filled_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError), new_folder(tmp_path / "out") as folder:  # noqa: PT012  # what fails is the block
        (folder / "part").write_text("half")
        raise OSError(28, "No space left on device", str(folder / "rest"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--dtype", "float32"], 2, "--merge"),
        (["--merge", "--dtype", "float8"], 2, "bfloat16"),
        (["--merge", "--max-shard-size", "huge"], 2, "500MB"),
        (["--round", "7"], 6, "the latest is 2"),
        (["--round", "x"], 2, "latest"),
        (["--best", "demo"], 6, "scored"),
        (["--best", "demo", "--round", "1"], 2, "--best"),
    ],
)
def test_what_cannot_be_exported_is_an_error_that_says_so(
    merged: Workspace, tmp_path: Path, options: list[str], code: int, said: str
) -> None:
    done = fedcli("export", tmp_path / "out", *options, cwd=merged.root)
    assert done.returncode == code
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_nothing(merged: Workspace, tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = fedcli("export", tmp_path / "out", "--merge", cwd=merged.root, preexec_fn=limit)
    assert done.returncode == 4, done.stderr
    assert "cannot write" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"workspace"}


@pytest.mark.slow
def test_an_adapter_of_the_tied_output_layer_is_not_merged(tmp_path: Path) -> None:
    overrides = [*SMALL[:-1], "adapter.target_modules=[lm_head]"]
    assert fedcli("init", *settings(*overrides), cwd=tmp_path).returncode == 0
    done = fedcli("export", "out", "--merge", cwd=tmp_path)
    assert done.returncode == 2
    assert "ties lm_head" in done.stderr
    assert not [path.name for path in tmp_path.iterdir() if path.name in ("out",) or path.name.startswith(".tmp")]
    assert fedcli("export", "out", cwd=tmp_path).returncode == 0


def test_a_base_that_is_stored_quantised_is_not_merged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(UsageError, match="stored quantised"):
        check_mergeable(tmp_path)
