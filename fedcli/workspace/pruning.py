"""Removing what old rounds no longer need: a PRUNED.json that lists it with its hashes is durable before it goes."""

import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path

from fedcli.workspace.history import PRUNABLE, PrunedRecord, Round
from fedcli.workspace.layout import DISCARDED_PREFIX, PRUNED, UPDATE_RECORD, Workspace, update_name
from fedcli.workspace.publish import explained, publish_file, remove_temporaries


@dataclass
class Pruning:
    """Removes files, or with `is_dry_run` only looks at them; counts both those and what is another unix user's."""

    workspace: Workspace
    is_dry_run: bool
    num_files: int = 0
    num_bytes: int = 0
    num_foreign: int = 0
    """Updates that lie in the folder of another user, who alone can remove them."""
    _listings: dict[int, list[str]] = field(default_factory=dict)

    def prune(self, closed: Round, closing: Round) -> None:
        """Remove a closed round's arrays, and its updates' files but update.json of the counted ones.

        `closing` is the round that its updates opened. What a killed call left is removed by the next. Raises
        IntegrityError where a PRUNED.json is there and damaged.
        """
        files = {name: closed.manifest.files[name] for name in PRUNABLE if name in closed.manifest.files}
        record = PrunedRecord(round=closed.number, files=files)
        if not self.is_dry_run:
            remove_temporaries(closed.folder)
            if closed.pruned() != record:
                publish_file(closed.folder / PRUNED, record.to_bytes())
        for name in files:
            self._remove(closed.folder / name)
        assert closing.manifest.aggregation is not None
        counted = {entry.client for entry in closing.manifest.aggregation.counted}
        for client in closed.manifest.cohort:
            self._prune_inbox(closed, client, client in counted)

    def _prune_inbox(self, closed: Round, client: int, is_counted: bool) -> None:
        own, name = self.workspace.client_inbox(client), update_name(closed.number)
        if client not in self._listings:
            self._listings[client] = _names(own)
        set_aside = f"{DISCARDED_PREFIX}{name}-"
        doomed = [own / found for found in self._listings[client] if found == name or found.startswith(set_aside)]
        for path in doomed:
            if {os.lstat(own).st_uid, os.lstat(path).st_uid} != {os.geteuid()}:
                self.num_foreign += path.name != name or not is_counted or _has_more(path)
            elif path.name == name and is_counted:
                for file in _names(path):
                    if file != UPDATE_RECORD:
                        self._remove(path / file)
            else:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a file, or a folder and all that is in it; no link is followed."""
        with explained(path):
            try:
                found = os.lstat(path)
            except FileNotFoundError:
                return
            if not stat.S_ISDIR(found.st_mode):
                self.num_files += 1
                self.num_bytes += found.st_size
                if not self.is_dry_run:
                    os.unlink(path)
                return
            for name in os.listdir(path):
                self._remove(path / name)
            if not self.is_dry_run:
                shutil.rmtree(path)


def _names(folder: Path) -> list[str]:
    """Return what lies in a folder; nothing where it is a link, no folder, or closed to this user."""
    if folder.is_symlink() or not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return []
    return sorted(os.listdir(folder))


def _has_more(update: Path) -> bool:
    return any(name != UPDATE_RECORD for name in _names(update))
