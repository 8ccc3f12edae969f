"""Scores of several workspaces side by side, under names that tell their models apart."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcli.errors import UsageError
from fedcli.scoring.targets import BASE, is_stale
from fedcli.workspace.federation_state import read_config
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import ItemMarks, ScoreRecord, read_marks, read_scores
from fedcli.workspace.target_name import TargetName


@dataclass(frozen=True)
class Scored:
    """A target's scores on a benchmark, the workspace that has them, and the target's name in a table."""

    workspace: Workspace
    kept: ScoreRecord
    shown: str

    @property
    def record(self) -> ScoreRecord:
        """The scores under the name in the table."""
        return self.kept.model_copy(update={"target": self.shown})

    @property
    def is_stale(self) -> bool:
        """Whether the target has been trained anew or removed since."""
        return is_stale(self.workspace, self.kept.target, self.kept.model)

    def marks(self) -> ItemMarks:
        """Return the marks of the items."""
        return read_marks(self.workspace, self.kept)


def gather(workspaces: Sequence[Workspace], records: Sequence[ScoreRecord] | None = None) -> list[Scored]:
    """Return all scores of workspaces, or some `records` of the only one, whose targets keep their names.

    In several workspaces a name has the folder, too: "runs/a: fedavg, round 15". A base model that is the same in all
    of them, asked the same, is there once. Raises UsageError for a workspace that is named twice.
    """
    if len(workspaces) == 1:
        (only,) = workspaces
        found = read_scores(only) if records is None else records
        return [Scored(only, record, record.target) for record in found]
    titles = _titles([workspace.root.resolve() for workspace in workspaces])
    scored: list[Scored] = []
    for workspace, title in zip(workspaces, titles, strict=True):
        algorithm = read_config(workspace).algorithm.name
        scored += [
            Scored(workspace, record, f"{title}: {_readable(record.target_name, algorithm)}")
            for record in read_scores(workspace)
        ]
    bases: dict[str, list[Scored]] = {}
    for found_base in scored:
        if found_base.kept.target == BASE:
            bases.setdefault(found_base.kept.name, []).append(found_base)
    is_one = all(len({_asked(each.kept) for each in same}) == 1 for same in bases.values())
    if not is_one:
        return scored
    once = [Scored(same[0].workspace, same[0].kept, BASE) for same in bases.values()]
    return [*once, *(each for each in scored if each.kept.target != BASE)]


def _asked(record: ScoreRecord) -> str:
    """Return what a base's scores depend on."""
    return repr((sorted(record.model.items(), key=str), record.data, sorted(record.settings.items(), key=str)))


def _readable(target: TargetName, algorithm: str) -> str:
    if target.kind == "round" and target.number is not None:
        return f"{algorithm}, round {target.number}"
    if target.kind == "alone":
        return f"client {target.which} alone"
    return "pooled rows" if target.kind == "pooled" else str(target)


def _titles(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell them apart."""
    if twice := [folder for folder, count in Counter(folders).items() if count > 1]:
        raise UsageError(f"--workspace {twice[0]} is given twice", hint="Name different workspaces.")
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]
