"""What a disk holds after a power cut: of a folder only what was fsynced, or every name and no unsynced contents."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from support.kills import arm, fork, was_killed

Names = dict[str, tuple[int, bool]]
"""Of a folder: inodes by name, and whether each is a folder."""


def names_in(folder: Path) -> Names:
    """Return what a folder holds now."""
    with os.scandir(folder) as entries:
        return {entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False)) for entry in entries}


@dataclass
class Disk:
    """What has reached a disk, by inode."""

    root: int
    folders: dict[int, Names] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path) -> "Disk":
        """Return a disk that holds all of a folder."""
        disk = cls(root.stat().st_ino)
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            disk.folders[folder.stat().st_ino] = names_in(folder)
        for path in root.rglob("*"):
            if path.is_file():
                disk.files[path.stat().st_ino] = path.read_bytes()
        return disk

    def replay(self, log: Path) -> None:
        """Take in what was fsynced."""
        with log.open("rb") as file:
            while True:
                try:
                    inode, synced = pickle.load(file)
                except EOFError:
                    return
                (self.folders if isinstance(synced, dict) else self.files)[inode] = synced

    def write(self, target: Path) -> None:
        """Write what is there after a cut when nothing came by itself: names and contents that were fsynced."""
        shutil.rmtree(target, ignore_errors=True)
        self._write(self.root, target)

    def _write(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, (child, is_folder) in self.folders.get(inode, {}).items():
            if is_folder:
                self._write(child, target / name)
            else:
                (target / name).write_bytes(self.files.get(child, b""))

    def write_with_all_names(self, root: Path, target: Path) -> None:
        """Write what is there when names came first, as with ext4's delayed allocation: unsynced files are empty."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(root, target)
        for path in root.rglob("*"):
            if path.is_file():
                (target / path.relative_to(root)).write_bytes(self.files.get(path.stat().st_ino, b""))


def log_syncs(log: Path) -> None:
    """Let this process note what each fsync makes durable."""
    fsync = os.fsync
    file: BinaryIO = log.open("wb", buffering=0)

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced = names_in(path) if path.is_dir() else path.read_bytes()
        file.write(pickle.dumps((os.fstat(descriptor).st_ino, synced)))

    os.fsync = noted


def cut(root: Path, operation: Callable[[Path], object], position: int) -> bool:
    """Do something in a folder up to its `position`-th call that changes the disk; return whether it came so far.

    The images are written to `root` with `.durable` and `.named` behind its name.
    """
    disk, log = Disk.of(root), root.with_name("syncs")

    def work() -> None:
        log_syncs(log)
        arm(position, False)
        operation(root)

    killed = was_killed(fork(work))
    disk.replay(log)
    disk.write(root.with_name(root.name + ".durable"))
    disk.write_with_all_names(root, root.with_name(root.name + ".named"))
    return killed
