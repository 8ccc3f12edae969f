"""A study's cells as jobs of SLURM: an array with an element for each cell, which `fedcli study run --cell` runs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fedcli.slurm.queue import list_elements, send
from fedcli.slurm.scripts import ScriptWriter
from fedcli.study.folder import StudyFolder
from fedcli.study.plan import cells_of
from fedcli.study.run import check_requirements
from fedcli.study.run_cell import unfinished
from fedcli.workspace.publish import make_folder, publish_file


@dataclass(frozen=True)
class SentStudy:
    """What was sent: the cells by job, and those that were in the queue already."""

    jobs: dict[int, list[str]]
    in_queue: list[str]


def send_study(folder: StudyFolder) -> SentStudy:
    """Send the cells of which something is missing, and which the queue does not hold; resources are fedcli.yaml's.

    Cells with other settings in their slurm section are an array of their own. It may be called at any time, and again:
    a cell that failed, or whose job was lost, is sent anew. Raises RequirementError where SLURM does not answer.
    """
    check_requirements(folder)
    cells = cells_of(folder.study)
    ids = [cell.id for cell in cells]
    name = job_name(folder)
    queued = {element.index for element in list_elements([name]) if element.is_live}
    todo = {cell.id for cell in unfinished(folder)}
    places = [place for place, cell in enumerate(ids) if cell in todo and place not in queued]
    logs = folder.root / "logs"
    make_folder(logs)
    publish_file(cells_file(folder), "".join(f"{cell}\n" for cell in ids).encode())
    jobs = {}
    for settings in dict.fromkeys(cells[place].config.slurm.model_dump_json() for place in places):
        own = [place for place in places if cells[place].config.slurm.model_dump_json() == settings]
        writer = ScriptWriter(folder.root, cells[own[0]].config.slurm)
        script = folder.root / "slurm" / f"cells-{'-'.join(map(str, own[:1]))}.sh"
        publish_file(script, writer.cells(name, own, cells_file(folder), logs).encode())
        jobs[send(script, [])] = [ids[place] for place in own]
    return SentStudy(jobs, [ids[place] for place in sorted(place for place in queued if place is not None)])


def job_name(folder: StudyFolder) -> str:
    """Return the name of a study's jobs: another one for another folder, and for other cells."""
    ids = "\n".join([str(folder.root), *(cell.id for cell in cells_of(folder.study))])
    return f"fedcli-study-{hashlib.sha256(ids.encode()).hexdigest()[:12]}"


def cells_file(folder: StudyFolder) -> Path:
    """The names of a study's cells, one a line, in the order of the array; another file for other cells."""
    return folder.root / "slurm" / f"{job_name(folder)}.txt"
