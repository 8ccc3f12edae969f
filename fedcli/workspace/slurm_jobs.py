"""What was sent to SLURM: the scripts of a round, the ids of its jobs, and the folder of their logs."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import Field

from fedcli.workspace.history import read_record
from fedcli.workspace.layout import Workspace
from fedcli.workspace.publish import make_folder, publish_file
from fedcli.workspace.record import Natural, Record

JobKind: TypeAlias = Literal["clients", "server", "timer"]
KINDS: tuple[JobKind, ...] = get_args(JobKind)
"""The array of a cohort; the job that merges once that is over; the one that starts by the clock."""


class Job(Record):
    """A job that was sent; `clients` are an array's elements, `attempt` counts how often something was tried."""

    id: Annotated[int, Field(ge=1)]
    kind: JobKind
    attempt: Annotated[int, Field(ge=1)] = 1
    clients: list[Natural] = Field(default_factory=list)


class JobsRecord(Record):
    """slurm/round-NNNNN/jobs.json."""

    round: Natural
    jobs: list[Job]


def read_jobs(workspace: Workspace, round_number: int) -> list[Job]:
    """Return the jobs that were sent for a round, in their order; raise IntegrityError where the record is damaged."""
    hint = "Remove it: `fedcli slurm submit` finds the jobs that are in the queue by their names."
    record = read_record(workspace, JobsRecord, workspace.jobs(round_number), hint=hint)
    return [] if record is None else record.jobs


def save_jobs(workspace: Workspace, round_number: int, jobs: list[Job]) -> None:
    """Keep the list of the jobs that were sent for a round."""
    record = JobsRecord(round=round_number, jobs=jobs)
    workspace.store.put(workspace.name(workspace.jobs(round_number)), record.to_bytes())


def save_script(workspace: Workspace, round_number: int, kind: JobKind, text: str) -> Path:
    """Keep a batch script, and make the folder of its log: without that SLURM fails the job; return its path."""
    make_folder(workspace.job_logs(round_number))
    path = workspace.jobs(round_number).with_name(f"{kind}.sh")
    publish_file(path, text.encode())
    return path
