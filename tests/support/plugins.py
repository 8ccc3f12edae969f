"""A package with entry points of fedcli's, built and installed as a user's would be."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path, name: str, source: str, entry_points: Mapping[str, Mapping[str, str]], version: str = "1.0"
) -> Path:
    """Build and install a package of one module with pip; return the directory that makes it importable.

    `name` is the package's; its module has underscores for hyphens, and `source` as its code. `entry_points` are
    objects ("module:object") by group and name. Processes see it with `python_path(DIR)` in their environment.
    """
    project, target = folder / f"{name}-project", folder / f"{name}-site"
    project.mkdir(parents=True)
    (project / f"{name.replace('-', '_')}.py").write_text(source, encoding="utf-8")
    lines = [
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"',
        f'[project]\nname = "{name}"\nversion = "{version}"\nrequires-python = ">=3.11"',
        f'[tool.hatch.build.targets.wheel]\nonly-include = ["{name.replace("-", "_")}.py"]',
    ]
    for group, objects in entry_points.items():
        table = "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in objects.items())
        lines.append(f'[project.entry-points."{group}"]\n{table}')
    (project / "pyproject.toml").write_text("\n\n".join(lines), encoding="utf-8")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(project)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return target


def python_path(*directories: Path) -> dict[str, str]:
    """Return the variable that makes installed packages importable, for a process's environment."""
    path = [*map(str, directories), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}
