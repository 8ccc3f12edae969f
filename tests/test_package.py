"""The wheel: what a user installs has the command, the template and the built-in model."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built by the build backend that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-c", "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"]
    subprocess.run([*build, folder], cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_template_and_the_model_and_is_small(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "fedcli/workspace_template/presets/demo.yaml",
        "fedcli/workspace_template/slurm/README.md",
        "fedcli/model/builtin/tiny/model.safetensors",
        "fedcli/model/builtin/tiny/tokenizer.json",
        "fedcli/report/card.md.j2",
        *(f"fedcli/report/{name}.html.j2" for name in ("layout", "parts", "page", "study")),
        "fedcli/py.typed",
        *(f"fedcli/docs/{path.name}" for path in (ROOT / "docs").iterdir() if path.is_file()),
    ):
        assert name in names
    assert wheel.stat().st_size < 3_000_000
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.slow
def test_fedcli_init_works_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """In an empty venv that sees this environment's packages, but not this tree."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    (site / "dependencies.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    work = tmp_path / "work"
    work.mkdir()
    where = subprocess.run(
        [python, "-c", "import fedcli; print(fedcli.__file__)"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site)), where.stdout + where.stderr
    done = subprocess.run(
        [tmp_path / "venv/bin/fedcli", "init", "--json"], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "created"
    assert os.listdir(work / "rounds") == ["00000"]
    done = subprocess.run(
        [tmp_path / "venv/bin/fedcli", "study", "init", "demo", "s", "--set", "seedz=[1]"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert f"{site}/fedcli/docs/STUDIES.md" in done.stderr, "a message names the page where it is"
    assert (site / "fedcli/docs/STUDIES.md").is_file()
