"""Training on int8 and nf4 bases, on the CPU, and what happens where their package is missing.

Quantised models live in processes of their own: once one process has loaded a plain model, bitsandbytes is hidden from
peft in it.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.processes import ENVIRONMENT, SMALL, command, fedcli, settings

from fedcli.cli import main
from fedcli.model.base import find_base

TINY = find_base("builtin:tiny", revision=None, root=Path.cwd())
CASES = [(quantization, algorithm) for quantization in ("int8", "nf4") for algorithm in ("fedavg", "scaffold")]
SETTINGS = (
    "federation.clients=2", "federation.per_round=1", "federation.rounds=2", "train.steps=20",
    "data.partition=iid",
)  # fmt: skip
SEPARATE = [("int8", "scaffold"), ("nf4", "fedavg")]
"""Of these the second round is trained by a `client train` process of its own."""

SCRIPT = """
import contextlib, io, json, sys
from pathlib import Path
from fedcli.cli import main
from fedcli.client.runtime import Runtime
from fedcli import Federation, Observer
from fedcli.workspace.layout import Workspace

def run(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*map(str, arguments), "--json"])
    assert code == 0, out.getvalue()
    return json.loads(out.getvalue())

def dtypes(folder):
    workspace = Workspace(folder)
    runtime = Runtime(Federation(workspace).state)
    return {name: str(value.dtype) for name, value in runtime.adapted.model.named_parameters()}

cases, separate, overrides = json.loads(sys.argv[1])
results = {}
for quantization, algorithm in cases:
    folder = Path.cwd() / f"{quantization}-{algorithm}"
    options = [*overrides, "--set", f"model.quantization={quantization}", "--set", f"algorithm.name={algorithm}"]
    cohort = run("init", folder, *options)["cohort"]
    found = results[folder.name] = {"trained": [run("client", "train", "--id", cohort[0], "-w", folder)]}
    run("server", "aggregate", "-w", folder)
    found["dtypes"] = dtypes(folder)
    if [quantization, algorithm] not in separate:
        (client,) = run("status", "-w", folder)["cohort"]
        found["trained"].append(run("client", "train", "--id", client, "-w", folder))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def federations(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Federations of two rounds, both trained, the second not merged yet; what the commands said, by federation."""
    folder = tmp_path_factory.mktemp("quantized")
    arguments = json.dumps([CASES, SEPARATE, settings(*SETTINGS)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    for case in SEPARATE:
        workspace = folder / "-".join(case)
        (client,) = json.loads(fedcli("status", "--json", cwd=workspace).stdout)["cohort"]
        trained = fedcli("client", "train", "--id", client, "--json", cwd=workspace)
        assert (trained.returncode, trained.stderr) == (0, "")
        results[workspace.name]["trained"].append(json.loads(trained.stdout))
    return folder, results


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "algorithm"), CASES)
def test_a_quantised_federation_trains_verifies_and_sends_float32(
    federations: tuple[Path, dict[str, Any]], tmp_path: Path, quantization: str, algorithm: str
) -> None:
    folder, results = federations
    trained = results[f"{quantization}-{algorithm}"]["trained"]
    workspace = Path(shutil.copytree(folder / f"{quantization}-{algorithm}", tmp_path / "workspace"))
    assert [result["status"] for result in trained] == ["submitted", "submitted"]
    assert all(math.isfinite(result[key]) for result in trained for key in ("first_loss", "last_loss", "train_loss"))
    assert trained[1]["train_loss"] < trained[0]["train_loss"] - 0.02
    manifest = json.loads((workspace / "rounds/00001/manifest.json").read_text())
    assert manifest["model"]["quantization"] == quantization
    names = manifest["update_files"]
    assert ("control_delta.safetensors" in names) == (algorithm == "scaffold")
    (update,) = workspace.glob("inbox/*/round-00001")
    start = load_file(workspace / "rounds/00001/adapter/adapter_model.safetensors")
    for name in names:
        arrays = load_file(update / name)
        assert arrays.keys() == start.keys()
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
        assert all(np.isfinite(array).all() and array.any() for array in arrays.values())
    sent = load_file(update / "adapter_model.safetensors")
    assert all(not np.array_equal(sent[name], start[name]) for name in start)
    # LoRA weights were float32 in training, not bfloat16 that was written as float32.
    assert all((array.view(np.uint32) & 0xFFFF).any() for array in sent.values())
    assert fedcli("server", "aggregate", cwd=workspace).returncode == 0
    verified = fedcli("verify", "--json", cwd=workspace)
    assert (verified.returncode, json.loads(verified.stdout)["violations"]) == (0, [])


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "stored"), [("int8", "torch.int8"), ("nf4", "torch.uint8")])
def test_the_layers_of_the_base_are_stored_in_a_byte_or_less_and_all_else_is_float32(
    federations: tuple[Path, dict[str, Any]], quantization: str, stored: str
) -> None:
    dtypes = federations[1][f"{quantization}-fedavg"]["dtypes"]
    layers = {name: dtype for name, dtype in dtypes.items() if "_proj." in name and ".lora_" not in name}
    assert len(layers) == 2 * 7
    assert set(layers.values()) == {stored}
    lora = {name: dtype for name, dtype in dtypes.items() if ".lora_" in name}
    assert len(lora) == 2 * 7 * 2
    rest = {name: dtype for name, dtype in dtypes.items() if name not in layers}
    assert any("embed_tokens" in name for name in rest)
    assert any("norm" in name for name in rest)
    assert set(rest.values()) == {"torch.float32"}


@pytest.mark.slow
def test_quantisations_train_differently(federations: tuple[Path, dict[str, Any]]) -> None:
    results = federations[1]
    first = {name: result["trained"][0]["first_loss"] for name, result in results.items()}
    assert first["int8-fedavg"] == first["int8-scaffold"]  # the same base and rows; SCAFFOLD's c is zero yet
    assert first["nf4-fedavg"] == first["nf4-scaffold"]
    assert 1e-5 < abs(first["int8-fedavg"] - first["nf4-fedavg"]) < 0.2


# An evaluation pass before a training

EVAL_SCRIPT = """
import contextlib, io, json, logging, shutil, sys
from pathlib import Path
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on such a CPU it tells of a kernel that is not there
import bitsandbytes.nn.modules
import torch
bitsandbytes.nn.modules.has_avx512bf16 = lambda: True  # as on a CPU where an evaluation pass would repack the weights
from fedcli.cli import main
from fedcli.model.base import find_base
from fedcli.model.lora import AdaptedModel, lora_config

def run(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*map(str, arguments), "--json"])
    assert code == 0, out.getvalue()

def gradients():
    adapted.model.train()
    adapted.model(ids, labels=ids).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in adapted.parameters.items()}
    adapted.model.zero_grad()
    return found

config = lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"], base=None)
base = find_base("builtin:tiny", revision=None, root=Path.cwd())
adapted = AdaptedModel(base, config, trust_remote_code=False, quantization="nf4")
generator = torch.Generator().manual_seed(0)
adapted.load({  # with a B of zeros the gradient of A would be zero
    name: torch.normal(0, 0.1, parameter.shape, generator=generator).numpy()
    for name, parameter in adapted.parameters.items()
})
ids = torch.randint(1, 200, (2, 24), generator=generator)
before = gradients()
adapted.model.eval()
with torch.no_grad():
    adapted.model(ids)
after = gradients()
assert before.keys() == after.keys()

overrides = json.loads(sys.argv[1])
run("init", "dpo", "--preset", "demo-dpo", *overrides)
shutil.copytree("dpo", "again")
for folder in ("dpo", "again"):
    run("client", "train", "--id", 0, "-w", folder)
shutil.copytree("dpo", "cached")
shutil.rmtree("cached/inbox/0/round-00000")
run("client", "train", "--id", 0, "-w", "cached")
print(json.dumps({
    "smallest": min(float(gradient.abs().max()) for gradient in before.values()),
    "changed": [name for name in before if not torch.equal(before[name], after[name])],
}))
"""


@pytest.fixture(scope="module")
def after_evaluation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What an nf4 base's gradients are before and after an evaluation pass, and DPO trainings of one client."""
    folder = tmp_path_factory.mktemp("evaluated")
    arguments = json.dumps(settings(*SMALL, "federation.clients=2", "model.quantization=nf4"))
    done = subprocess.run(
        [sys.executable, "-c", EVAL_SCRIPT, arguments], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_an_evaluation_pass_of_an_nf4_base_changes_no_gradient_of_a_later_step(
    after_evaluation: tuple[Path, dict[str, Any]],
) -> None:
    found = after_evaluation[1]
    assert found["smallest"] > 1e-6
    assert found["changed"] == []


@pytest.mark.slow
def test_an_nf4_client_of_task_dpo_trains_the_same_bits_again_with_and_without_a_cached_reference(
    after_evaluation: tuple[Path, dict[str, Any]],
) -> None:
    first, again, cached = (
        (after_evaluation[0] / name / "inbox/0/round-00000/adapter_model.safetensors").read_bytes()
        for name in ("dpo", "again", "cached")
    )
    assert first == again
    assert first == cached  # without an evaluation pass before it


# A package is missing


@pytest.fixture
def broken(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment whose bitsandbytes does not import, and a file that is there once that was tried."""
    tried = tmp_path / "tried"
    package = tmp_path / "packages/bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(tried)!r}, 'w').close()\nraise ImportError('libcuda is lost')\n")
    return ENVIRONMENT | {"PYTHONPATH": str(package.parent)}, tried


def run_broken(environment: dict[str, str], cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_without_bitsandbytes_a_quantised_training_fails_before_anything_loads_and_names_the_cure(
    federations: tuple[Path, dict[str, Any]], broken: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    workspace = Path(shutil.copytree(federations[0] / "int8-fedavg", tmp_path / "workspace"))
    (update,) = workspace.glob("inbox/*/round-00001")
    shutil.rmtree(update)
    environment, tried = broken
    script = (
        "import sys; from fedcli.cli import main; code = main(sys.argv[1:])\n"
        "print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "client", "train", "--id", update.parent.name],
        cwd=workspace, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 8
    assert tried.exists()
    assert "model.quantization int8 needs the package bitsandbytes" in done.stderr
    assert "libcuda is lost" in done.stderr
    assert "pip install bitsandbytes" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "[]\n"
    assert not update.exists()


def test_init_of_a_quantised_federation_needs_no_bitsandbytes_or_says_so(
    broken: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    done = run_broken(broken[0], tmp_path, "init", "new", *settings(*SMALL, "model.quantization=nf4"))
    assert done.returncode in (0, 8), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode == 8:
        assert "bitsandbytes" in done.stderr
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_unquantised_federation_never_imports_bitsandbytes(small: Path, broken: tuple[dict[str, str], Path]) -> None:
    environment, tried = broken
    done = run_broken(environment, small, "run", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["state"] == "finished"
    assert not tried.exists()


def test_a_base_that_needs_a_missing_quantiser_is_an_error_that_names_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (base / "config.json").write_text(json.dumps(config))
    workspace = tmp_path / "workspace"
    code = main(["init", str(workspace), *settings(*SMALL, f"model.base={base}")])
    if code == 0:  # round 0 needs the shapes of the base only
        code = main(["client", "train", "--id", "0", "-w", str(workspace)])
    message = capsys.readouterr().err
    assert code == 8, message
    assert "gptqmodel" in message.lower() or "optimum" in message.lower()
    assert "internal error" not in message
    assert not list(workspace.glob("inbox/*/*"))
