"""Batch scripts: one for the elements of a cohort's array, one for the job that merges."""

import shlex
import sys
from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from fedcli.config import JobConfig, SlurmConfig
from fedcli.errors import BusyError, NotReadyError

BUSY, NOT_READY = BusyError.exit_code, NotReadyError.exit_code
_PREVIOUS = 60
"""Seconds that an element waits for its client's lock: the one of the round before may still be on its way out."""


@dataclass(frozen=True)
class ScriptWriter:
    """Writes the scripts of one workspace or study, whose folder is `root`; `address` is a workspace's URL."""

    root: Path
    settings: SlurmConfig
    address: str | None = None

    def clients(self, name: str, clients: Collection[int], log_folder: Path) -> str:
        """Return the script of an array job with one element a client, whose index is the client's id."""
        throttle = f"%{self.settings.throttle}" if self.settings.throttle else ""
        options = [f"--array={ranges(clients)}{throttle}", f"--output={_pattern(log_folder)}/client-%a.log"]
        train = f'{self._fedcli("client train")} --id "$SLURM_ARRAY_TASK_ID" --wait {_PREVIOUS}'
        return self._script(
            name,
            self.settings,
            options,
            f"# exec: a SIGTERM (time limit, preemption, scancel) reaches fedcli itself.\nexec {train}\n",
        )

    def cells(self, name: str, places: Collection[int], cells: Path, log_folder: Path) -> str:
        """Return the script of an array job with one element a cell of a study, whose line in a file is its index."""
        throttle = f"%{self.settings.throttle}" if self.settings.throttle else ""
        options = [f"--array={ranges(places)}{throttle}", f"--output={_pattern(log_folder)}/cell-%a.log"]
        command = self.settings.command or shlex.join([sys.executable, "-P", "-m", "fedcli"])
        run = f'exec {command} study run -s {shlex.quote(str(self.root))} --cell "$cell"'
        cell = f'cell=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {shlex.quote(str(cells))})'
        return self._script(name, self.settings, options, f"{cell}\n{run}\n")

    def server(self, name: str, log_folder: Path) -> str:
        """Return the script of a job that merges the open round if it is ready, sends what is due then, and scores."""
        return self._script(
            name,
            self.settings.server,
            [f"--output={_pattern(log_folder)}/server.log"],
            f"{self._fedcli('server aggregate')} --no-score\n"
            "code=$?\n"
            f"# {BUSY}: another process merges; {NOT_READY}: too few have answered. `submit` decides what comes next.\n"
            f"case $code in 0 | {BUSY} | {NOT_READY}) ;; *) exit $code ;; esac\n"
            f"{self._fedcli('slurm submit')}\n"
            "code=$?\n"
            f"{self._fedcli('server score')}  # eval.every; nobody waits for it\n"
            "exit $code\n",
        )

    def _script(self, name: str, job: JobConfig, options: list[str], commands: str) -> str:
        lines = [
            f"--job-name={name}",
            *options,
            "--open-mode=append",  # a job that is requeued goes on in its log
            "--requeue",
            f"--chdir={self.root}",
            "--nodes=1",
            "--ntasks=1",
            f"--cpus-per-task={job.cpus}",
            *_given("account", self.settings.account),
            *_given("partition", job.partition),
            *_given("gres", job.gres),
            *_given("time", job.time),
            *_given("mem", job.memory),
            *job.options,
        ]
        head = "".join(f"#SBATCH {shlex.quote(line)}\n" for line in lines)
        setup = self.settings.setup.rstrip() + "\n" if self.settings.setup.strip() else ""
        threads = 'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"\n'
        head += "# Written by fedcli from the slurm section of fedcli.yaml.\n"
        return f"#!/bin/bash\n{head}{threads}{setup}{commands}"

    def _fedcli(self, words: str) -> str:
        # -P: Python would import what lies in the workspace, where jobs start
        command = self.settings.command or shlex.join([sys.executable, "-P", "-m", "fedcli"])
        return f"{command} {words} -w {shlex.quote(self.address or str(self.root))}"


def ranges(numbers: Collection[int]) -> str:
    """Return numbers as sbatch's --array takes them: 0,2,5-7."""
    parts = []
    for _, run in groupby(enumerate(sorted(numbers)), lambda entry: entry[1] - entry[0]):  # the same all through a run
        found = [number for _, number in run]
        parts.append(f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0]))
    return ",".join(parts)


def _given(option: str, value: object) -> list[str]:
    return [] if value is None else [f"--{option}={value}"]


def _pattern(path: Path) -> str:
    """Return a path as a file name pattern of SLURM, which reads % as the start of a symbol."""
    return str(path).replace("%", "%%")
