"""SLURM's own commands, each with a time limit: with the controller down they take long to give up."""

import os
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcli.errors import RequirementError

PATIENCE = 30.0
"""Seconds that a command may take; without a controller SLURM's give up by themselves after some ten."""

_SILENT = "Is its controller up? See `scontrol ping`. Run this again later: jobs that got through are known."
_REFUSED = "Correct the slurm section of fedcli.yaml, or ask whoever runs the cluster; then run this again."
_FORMAT = "%F|%K|%T|%j|%r"
_PREFIXES = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_")
_OVER = frozenset(
    # PREEMPTED: what runs again is PENDING
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED")
) | {"TIMEOUT"}
_WAITING = frozenset(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"))


@dataclass(frozen=True)
class Element:
    """A job, or one element of an array job, as squeue shows it; `index` is its place in the array."""

    job: int
    index: int | None
    state: str
    name: str
    reason: str

    @property
    def is_live(self) -> bool:
        """Whether its command has still to run or to end."""
        return self.state not in _OVER and self.state != "COMPLETING"

    @property
    def is_waiting(self) -> bool:
        """Whether it has no node yet."""
        return self.state in _WAITING

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not, and has left its node."""
        return self.state in _OVER


def list_elements(names: Collection[str] = (), *, patience: float = PATIENCE) -> list[Element]:
    """Return the elements of the jobs with these names, whoever's they are; without names, of all of this user's jobs.

    Jobs that have ended are among them for as long as the controller remembers (MinJobAge, five minutes by default).
    Raises RequirementError where SLURM is not here or does not answer within `patience` seconds.
    """
    whose = ["--name", ",".join(names)] if names else ["--me"]
    text = _call("squeue", "--noheader", "--array", "--states", "all", "--format", _FORMAT, *whose, patience=patience)
    found = []
    for line in text.splitlines():
        job, index, state, name, reason = line.split("|", 4)
        found.append(Element(int(job), int(index) if index.isdigit() else None, state, name, reason))
    return found


def send(script: Path, options: Sequence[str]) -> int:
    """Send a batch script, with more options of sbatch; return the job's id.

    Raises RequirementError where SLURM is not here, does not answer, or will not have it.
    """
    return int(_call("sbatch", "--parsable", *options, str(script)).split(";")[0])  # JOB, or JOB;CLUSTER


def cancel(jobs: Collection[int]) -> None:
    """Cancel jobs, whole arrays; one that has ended already is no error."""
    _call("scancel", *map(str, sorted(jobs)))


def _call(*command: str, patience: float = PATIENCE) -> str:
    # What SLURM told a job of itself is not for the jobs that it sends, and options of a user's would override ours.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(_PREFIXES)}
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience)
    except FileNotFoundError as error:
        raise RequirementError(
            f"SLURM is not here: there is no {command[0]} on the PATH",
            hint="Run this where jobs are sent from; `fedcli slurm script` writes the scripts on any machine.",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise RequirementError(
            f"SLURM does not answer: {command[0]} took more than {patience:g} seconds", hint=_SILENT
        ) from error
    if done.returncode != 0:
        raise RequirementError(
            f"{command[0]} failed: {done.stderr.strip()}", hint=_REFUSED if command[0] == "sbatch" else _SILENT
        )
    return done.stdout
