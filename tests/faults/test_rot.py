"""Bit rot: of every flip in a workspace's files either nothing changes, or verify or whoever reads the file tells.

$FEDCLI_FAULTS flips are drawn (60; docs/RELIABILITY.md: 400), evenly over the files.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support.faults import recorded
from support.federation import own, restart, train_as
from support.scores import ACCURACY, keep

from fedcli import Federation
from fedcli.cli import main
from fedcli.errors import FedError
from fedcli.workspace.layout import Workspace

NUM_FLIPS = int(os.environ.get("FEDCLI_FAULTS", "60").replace("all", "4000"))
FOR_PEOPLE = ("fedcli.yaml", "README.md", "crontab")
"""What people write or read: no program can tell a change of these from an edit. What `init` fixed is told."""


@pytest.fixture(scope="module")
def whole(small_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of scaffold in its last open round, with scores."""
    folder = Path(shutil.copytree(small_template, tmp_path_factory.mktemp("rot") / "W"))
    restart(folder, "scaffold")
    for client in range(3):
        train_as(client, folder)
    Federation.open(folder).server.aggregate()
    train_as(0, folder)
    for target in ("base", "round-00000", "round-00001"):
        keep(Workspace(folder), target, "fpb", {ACCURACY: [1.0, 0.0, 1.0, 1.0]})
    return folder


def results(root: Path) -> dict[str, object]:
    """Return all that comes of a workspace: what commands print, and what clients and server compute with."""
    found: dict[str, object] = {}
    for arguments in (["status", "--json"], ["eval", "table", "--json"]):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            code = main([*arguments, "-w", str(root)])
        found[" ".join(arguments)] = (code, said.getvalue())
    federation = Federation.open(root)
    head = federation.round()
    head.check_unchanged()
    found["train"] = head.manifest.train.model_dump()
    for client in range(3):
        arrays = {name: array.tobytes() for name, array in sorted(own(root, client).items())}
        found[f"own {client}"] = hashlib.sha256(repr(arrays).encode()).hexdigest()
    found["adapter"] = {name: array.tobytes() for name, array in sorted(head.adapter().items())}
    for client in (1, 2):
        train_as(client, root)
    result = federation.server.aggregate()
    found["aggregation"] = result.aggregation.model_dump() if result.aggregation else None
    found["end"] = json.loads((root / "rounds/00002/manifest.json").read_bytes())["files"]
    return found


def told(root: Path) -> str | None:
    """Return who tells of damage: verify, or a reader; None for nobody."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return "verify" if main(["verify", "-w", str(root)]) != 0 else None


@pytest.mark.slow
def test_every_flip_that_changes_a_result_is_told(whole: Path, tmp_path: Path) -> None:
    place = tmp_path / "W"
    expected = results(Path(shutil.copytree(whole, place)))
    files = sorted(
        path.relative_to(whole)
        for path in whole.rglob("*")
        if path.is_file() and path.stat().st_size and path.name not in FOR_PEOPLE and "data" not in path.parts
    )
    generator = random.Random(2026)
    counts: Counter[str] = Counter()
    silent = []
    for _ in range(NUM_FLIPS):
        shutil.rmtree(place)
        shutil.copytree(whole, place)
        path = place / generator.choice(files)
        contents = bytearray(path.read_bytes())
        position, bit = generator.randrange(len(contents)), generator.randrange(8)
        contents[position] ^= 1 << bit
        path.write_bytes(contents)
        counts["tried"] += 1
        if told(place) is not None:
            counts["told by verify"] += 1
            continue
        try:
            found = results(place)
        except (FedError, OSError):
            counts["told by who reads it"] += 1
            continue
        except Exception as error:
            silent.append(f"{path.relative_to(place)} byte {position} bit {bit}: {type(error).__name__}: {error}")
            continue
        changed = [name for name in expected if found[name] != expected[name]]
        merged = found["aggregation"]
        if isinstance(merged, dict) and (merged["refused"] or merged["missing"]):
            counts["told by who reads it"] += 1  # the manifest says whose update is not counted, and why
            continue
        is_told = [name for name in changed if isinstance(found[name], tuple) and found[name][0] not in (0, 1)]
        if is_told:
            counts["told by who reads it"] += 1
        elif changed:
            silent.append(f"{path.relative_to(place)} byte {position} bit {bit}: {changed}")
        else:
            counts["changes nothing"] += 1
    recorded("rot.json", "flips", {**counts, "silent": len(silent)}, silent)
    assert silent == []
