"""Programs of the system that benchmarks of code run in the sandbox, beside Python: which of them are to be had."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedcli.errors import RequirementError
from fedcli.eval.sandbox import ENVIRONMENT, visible_paths

PACKAGES = {"node": "nodejs", "g++": "g++", "bash": "bash"}
"""Debian's package of a program."""


def missing_programs(names: Sequence[str]) -> dict[str, str]:
    """Return which programs a sandbox cannot start, and why.

    It sees the system's folders alone: a program of somebody's home, or one that is a link into it, is not there.
    """
    shown = visible_paths()
    missing = {}
    for name in names:
        found = shutil.which(name, path=ENVIRONMENT["PATH"])
        elsewhere = shutil.which(name)
        if found is not None and not any(Path(os.path.realpath(found)).is_relative_to(path) for path in shown):
            missing[name] = f"{found} is a link to {os.path.realpath(found)}, which the sandbox does not show"
        elif found is None and elsewhere is not None:
            missing[name] = (
                f"{elsewhere} is not in {ENVIRONMENT['PATH'].replace(':', ' or ')}, all that the sandbox shows"
            )
        elif found is None:
            missing[name] = "it is not installed"
    return missing


def require_programs(benchmark: str, names: Sequence[str]) -> None:
    """Raise RequirementError, which names the benchmark, for the first of some programs that a sandbox cannot start."""
    for name, why in missing_programs(names).items():
        raise RequirementError(
            f"{benchmark} runs its answers with {name}, and this machine cannot: {why}",
            hint=f"Install it for all users (on Debian: apt-get install {PACKAGES.get(name, name)}), or leave the "
            "benchmark or --allow-code-execution out: without that the answers are kept, and no code is run.",
        )
