"""Federations of parties that sign, made without a model, in places of their own that nothing but files connects."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedcli import Federation, Observer
from fedcli.client.due import ClientResult, train_client
from fedcli.server.enrol import found_trust
from fedcli.workspace.history import publish_round, read_identity, read_start
from fedcli.workspace.layout import Workspace
from support.federation import NUM_SAMPLES, Stub, configure
from support.warm import write_rows


@contextmanager
def at(home: Path, **names: str) -> Iterator[None]:
    """Be a user of this machine whose own files lie in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home))
        patch.delenv("FEDCLI_HOME", raising=False)
        for name, value in names.items():
            patch.setenv(name, value)
        yield


def make_signed(template: Path, folder: Path, home: Path, *overrides: str) -> Path:
    """Make a workspace that waits for parties, whose server's keys lie in `home`."""
    workspace = Workspace(Path(shutil.copytree(template, folder, ignore=shutil.ignore_patterns("data"))))
    configure(workspace.root, "data.source=null", *overrides)
    old = read_identity(workspace)
    identity = old.model_copy(update={"signatures": "required", "simulation": False})
    workspace.identity.write_bytes(identity.to_bytes())
    start = read_start(workspace)
    files = {name: start.read(name) for name in start.manifest.files}
    shutil.rmtree(workspace.rounds)
    with at(home):
        trust = found_trust(workspace, identity)
        assert trust is not None
        named = {"enrolment": trust.enrolment.head, "fedcli": "1"}
        assert publish_round(workspace, start.manifest.model_copy(update=named), files, trust.sign_round)
        trust.note_round(read_start(workspace))
    return workspace.root


def join(workspace: Path, client: int, *, server: str | None = None, num_rows: int | None = None) -> str:
    """Join as a party of this user; return the fingerprint of its keys."""
    count = NUM_SAMPLES[client] if num_rows is None else num_rows
    texts = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(count)]
    rows = write_rows(workspace.parent / f"rows-{client}.jsonl", texts)
    found = Federation.open(workspace).client(client).join(rows, share="minimal", server=server).commit()
    assert found is not None
    return found


def train(workspace: Path, client: int) -> ClientResult:
    """Do all that `client train` does, but for the model."""
    return train_client(Federation.open(workspace).state, client, Stub(), observer=Observer())


def identity_of(workspace: Path) -> str:
    return json.loads((workspace / "workspace.json").read_bytes())["id"]


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder, by name; not of locks and marks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("server.lock", ".copied"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
