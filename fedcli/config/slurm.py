"""The slurm section of fedcli.yaml: what `fedcli slurm submit` asks the cluster for."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from fedcli.config.section import Count, Section


def _refuse_number(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(f"put it in quotes, as in '10:00:00': YAML reads that as a number (found {value})")
    return value


Word = Annotated[str, Field(pattern=r"^\S+$")]
Limit = Annotated[Word, BeforeValidator(_refuse_number)]
Option = Annotated[str, Field(pattern=r"^-.*$")]


class JobConfig(Section):
    """What one job asks for; `options` are more options of sbatch, each a string such as --qos=short."""

    partition: Word | None = None
    gres: Word | None = None
    time: Limit | None = None
    cpus: Count = 1
    memory: Word | Count | None = None
    options: tuple[Option, ...] = ()


class SlurmConfig(JobConfig):
    """What an element of the cohort's array asks for; `server` is the job that merges.

    `retry` is in seconds; `setup` are lines of bash; `command` is fedcli's, None: the Python that sent the jobs.
    """

    account: Word | None = None
    throttle: Count | None = None
    attempts: Count = 3
    retry: Count = 300
    setup: str = ""
    command: str | None = None
    server: JobConfig = JobConfig.model_construct()
