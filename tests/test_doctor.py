"""fedcli doctor: what it finds on this machine, in a workspace, and where something is broken on purpose."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT, command, fedcli

from fedcli.model.base import find_base
from fedcli.model.loading import load_shapes
from fedcli.model.lora import lora_config, start_adapter
from fedcli.model.memory_estimate import estimate_memory
from fedcli.workspace.file_system_check import probe_file_system

TARGETS = ("q_proj", "v_proj")


def examine(cwd: Path, **environment: str) -> tuple[int, dict[str, dict]]:
    """Run doctor --json; return its exit code and the findings by name."""
    done = subprocess.run(
        command("doctor", "--json"), cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def configure(workspace: Path, before: str, after: str) -> None:
    config = workspace / "fedcli.yaml"
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, after))


@pytest.fixture
def without_bitsandbytes(tmp_path: Path) -> str:
    """A PYTHONPATH on which bitsandbytes is there and cannot be imported."""
    package = tmp_path / "broken" / "bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('built for another machine')\n")
    return str(package.parent)


@pytest.mark.slow
def test_a_healthy_workspace_has_no_failed_finding_and_is_left_as_it_was(small: Path) -> None:
    before = sorted(small.rglob("*"))
    code, findings = examine(small)
    assert code == 0
    assert {
        "python",
        "torch",
        "cpu",
        "quantised matmul",
        "sandbox",
        "hub",
        "disk: rename",
        "disk: fsync",
        "disk: lock",
        "memory",
    } <= (findings.keys())
    assert {finding["state"] for finding in findings.values()} <= {"ok", "warning"}
    assert (
        findings["disk: lock"]["state"] == findings["memory"]["state"] == findings["quantised matmul"]["state"] == "ok"
    )
    assert sorted(small.rglob("*")) == before


@pytest.mark.slow
def test_the_sandbox_is_tried_out_and_the_cure_named_where_it_is_missing(tmp_path: Path) -> None:
    code, findings = examine(tmp_path, PATH=str(tmp_path))
    assert (code, findings["sandbox"]["state"]) == (0, "warning")
    assert findings["sandbox"]["detail"].endswith("bubblewrap (bwrap) is not installed")
    assert "apt-get install bubblewrap" in findings["sandbox"]["cure"]
    if shutil.which("bwrap"):
        assert examine(tmp_path)[1]["sandbox"]["state"] == "ok"


def test_outside_a_workspace_the_machine_alone_is_looked_at(tmp_path: Path) -> None:
    done = fedcli("doctor", cwd=tmp_path)
    assert done.returncode == 0
    assert "no workspace here" in done.stdout
    assert "disk:" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_broken_bitsandbytes_fails_a_quantised_experiment_and_only_warns_another(
    small: Path, without_bitsandbytes: str
) -> None:
    code, findings = examine(small, PYTHONPATH=without_bitsandbytes)
    assert (code, findings["quantised matmul"]["state"]) == (0, "warning")
    configure(small, "base: builtin:tiny", "base: builtin:tiny\n  quantization: nf4")
    code, findings = examine(small, PYTHONPATH=without_bitsandbytes)
    assert (code, findings["quantised matmul"]["state"]) == (8, "failed")
    assert "built for another machine" in findings["quantised matmul"]["detail"]


@pytest.mark.slow
def test_a_batch_that_cannot_fit_into_memory_fails_with_the_cure(small: Path) -> None:
    configure(small, "max_length: 128", "max_length: 10000000")
    code, findings = examine(small)
    assert (code, findings["memory"]["state"]) == (8, "failed")
    assert "gradient_checkpointing" in findings["memory"]["cure"]


@pytest.mark.slow
def test_a_faulty_configuration_is_a_finding(small: Path) -> None:
    configure(small, "steps: 2", "stepps: 2")
    code, findings = examine(small)
    assert code == 8
    assert "train.stepps" in findings["fedcli.yaml"]["detail"]
    done = fedcli("doctor", "-w", small / "nowhere", cwd=small)
    assert done.returncode == 4


@pytest.mark.slow
def test_a_base_of_the_hub_is_whole_in_its_cache_or_a_finding_and_nothing_is_fetched(
    small: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    stored = cache / "models--some--model"
    snapshot = stored / "snapshots" / "0123abc"
    configure(small, "base: builtin:tiny", "base: some/model")

    def found() -> tuple[int, str, str]:
        code, findings = examine(small, HF_HUB_CACHE=str(cache))
        return code, findings["base model"]["state"], findings["base model"]["detail"]

    shutil.copytree(find_base("builtin:tiny", revision=None, root=tmp_path), snapshot)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(snapshot.name)
    assert found() == (0, "ok", "some/model")
    (snapshot / "model.safetensors").unlink()
    assert found() == (
        8,
        "failed",
        f"base model not found: {snapshot} does not hold config.json and weights (no *.safetensors, no *.bin)",
    )


class Hub(BaseHTTPRequestHandler):
    """Answers every HEAD."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_the_hub_is_asked_unless_that_is_switched_off(tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE" in examine(tmp_path)[1]["hub"]["detail"]
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    code, findings = examine(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
    assert (code, findings["hub"]["state"]) == (0, "ok")
    server.shutdown()
    server.server_close()
    code, findings = examine(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
    assert (code, findings["hub"]["state"]) == (0, "warning")
    assert "cannot be reached" in findings["hub"]["detail"]


def test_each_promise_of_a_file_system_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe_file_system(tmp_path) == {"rename": None, "fsync": None, "lock": None, "clock": None}

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        problems = probe_file_system(tmp_path)
    assert problems["fsync"] is not None
    assert "Input/output error" in problems["fsync"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", os.symlink)  # a file system that renames nothing
        assert probe_file_system(tmp_path)["rename"] is not None
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_is_exact_for_weights_adapter_and_optimiser(tmp_path: Path) -> None:
    folder = find_base("builtin:tiny", revision=None, root=tmp_path)
    options = {"rank": 4, "target_modules": TARGETS, "rows": 4, "length": 64, "compute_bytes": 4}
    shapes = load_shapes(folder, revision=None, trust_remote_code=False)
    plain = estimate_memory(shapes, quantization="none", has_checkpointing=False, **options)
    config = lora_config(rank=4, alpha=8, dropout=0.0, target_modules=TARGETS, base=None)
    adapter, num_parameters = start_adapter(folder, config, seed=0, trust_remote_code=False)
    assert plain.weights == 4 * num_parameters == 4 * 158_272
    assert plain.adapter == sum(array.nbytes for array in adapter.values())
    assert plain.optimizer == 3 * plain.adapter
    checkpointed = estimate_memory(shapes, quantization="none", has_checkpointing=True, **options)
    assert checkpointed.activations < plain.activations


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_the_estimate_of_a_quantised_base_is_what_its_weights_take(quantization: str, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from fedcli.model.base import find_base
from fedcli.model.loading import load_base, load_shapes
from fedcli.model.memory_estimate import estimate_memory
folder = find_base("builtin:tiny", revision=None, root=Path("."))
model, _ = load_base(folder, trust_remote_code=False, quantization="{quantization}")
estimate = estimate_memory(load_shapes(folder, revision=None, trust_remote_code=False), quantization="{quantization}",
    rank=4, target_modules=["q_proj"], rows=1, length=8, has_checkpointing=False, compute_bytes=4)
print(estimate.weights, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    estimated, real = map(int, done.stdout.split()[-2:])
    assert estimated == pytest.approx(real, rel=0.03)
