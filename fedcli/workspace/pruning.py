"""Removing what old rounds no longer need: a PRUNED.json that lists it with its hashes is durable before it goes."""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from fedcli.errors import WorkspaceError
from fedcli.stores.objects import UnlistableError
from fedcli.workspace.history import Round, prunable
from fedcli.workspace.layout import PRUNED, UPDATE_RECORD, UPDATE_SIGNATURE, Workspace, attempt_name, update_name
from fedcli.workspace.publish import DISCARDED_PREFIX
from fedcli.workspace.records import PrunedRecord
from fedcli.workspace.refusal import Refusal


@dataclass
class Pruning:
    """Removes files, or with `is_dry_run` only looks at them; counts both those and what is another unix user's."""

    workspace: Workspace
    is_dry_run: bool
    num_files: int = 0
    num_bytes: int = 0
    num_foreign: int = 0
    """Updates that lie in the folder of another user, who alone can remove them, or in one that cannot be listed."""
    _listings: dict[int, list[str]] = field(default_factory=dict)

    def prune(self, closed: Round, counted: Collection[int]) -> None:
        """Remove a closed round's arrays, and its updates' files but update.json of the counted ones.

        `counted` are the clients of these. What a killed call left is removed by the next. Raises
        IntegrityError where a PRUNED.json is there and damaged.
        """
        files = prunable(closed.manifest)
        record = PrunedRecord(round=closed.number, files=files)
        for name in files:
            if (link := self.workspace.store.link_to(self.workspace.name(closed.folder / name))) is not None:
                hint = "Nothing is removed through it. Put a folder in its place, then run the command again."
                raise WorkspaceError(f"{link} is a symbolic link", hint=hint)
        if not self.is_dry_run:
            store, folder = self.workspace.store, self.workspace.name(closed.folder)
            store.sweep(folder)
            if closed.pruned() != record:
                store.put(f"{folder}/{PRUNED}", record.to_bytes())
        for name in files:
            self._remove(closed.folder / name)
        for client in closed.manifest.cohort:
            try:
                self._prune_inbox(closed, client, client in counted)
            except UnlistableError:
                self.num_foreign += 1
        if closed.manifest.secure_aggregation is not None:
            for path in repair_shares_of(self.workspace, closed.number):
                self._remove(path)

    def _prune_inbox(self, closed: Round, client: int, is_counted: bool) -> None:
        own, name = self.workspace.client_inbox(client), update_name(closed.number)
        if client not in self._listings:
            self._listings[client] = self._names(own)
        set_aside = f"{DISCARDED_PREFIX}{name}-"
        answer = self.workspace.answer(closed.number, client).name
        names = (found for found in self._listings[client] if found in (name, answer) or found.startswith(set_aside))
        doomed = [own / found for found in names]
        for path in doomed:
            is_record_kept = path.name == name and is_counted
            kept = (UPDATE_RECORD, UPDATE_SIGNATURE)
            parts = [path / file for file in self._names(path) if file not in kept] if is_record_kept else [path]
            owners = {self.workspace.store.owner(self.workspace.name(folder)) for folder in (own, path)}
            if not owners <= {None, os.geteuid()}:
                self.num_foreign += bool(parts)
                continue
            for part in parts:
                self._remove(part)

    def _remove(self, path: Path) -> None:
        """Remove a file, or a folder and all that is in it; no link is followed."""
        store, name = self.workspace.store, self.workspace.name(path)
        sizes = store.files(name).values()
        self.num_files += len(sizes)
        self.num_bytes += sum(sizes)
        if not self.is_dry_run:
            store.delete(name)

    def _names(self, path: Path) -> list[str]:
        """Return what lies in a folder; nothing where it is a link, no folder, or closed to this user."""
        try:
            with self.workspace.store.opened(self.workspace.name(path)) as folder:
                return folder.names()
        except (FileNotFoundError, Refusal):
            return []


def repair_shares_of(workspace: Workspace, number: int) -> list[Path]:
    """Return the files of sealed shares of a round's repair: one, but where a killed server chose others before."""
    prefix = f"{attempt_name(number)}-shares-"
    return [workspace.repair / name for name in workspace.store.names("repair") if name.startswith(prefix)]
