"""A past that is rewritten with consistent hashes, as whoever may write the workspace's folder can."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from fedcli.trust.keys import KeyPair

ADAPTER = "adapter/adapter_model.safetensors"
HEAD = 2
"""The round that attacks are on; rounds 0 and 1 are merged, and it is open."""


def rewrite(workspace: Path, number: int, change: Callable[[dict], object], *, key: KeyPair | None = None) -> None:
    """Change a round's manifest and make all later ones consistent."""
    rounds = sorted(path for path in (workspace / "rounds").iterdir() if path.name >= f"{number:05d}")
    parent = None
    for path in rounds:
        document = json.loads((path / "manifest.json").read_bytes())
        document.pop("checksum", None)
        if parent is None:
            change(document)
        else:
            document["parent"] = parent
        parent = write_manifest(path, document, key)


def write_manifest(folder: Path, document: dict, key: KeyPair | None = None) -> str:
    """Write a manifest with its checksum, and sign it with a key; return its hash."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    contents = json.dumps(document).encode()
    (folder / "manifest.json").write_bytes(contents)
    digest = hashlib.sha256(contents).hexdigest()
    if key is not None:
        (folder / "manifest.sig").write_bytes(key.sign("round", document["workspace"], digest))
    return digest


def in_head(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda workspace: rewrite(workspace, HEAD, change)


def in_first(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda workspace: rewrite(workspace, 0, change)


def in_counted(**values: object) -> Callable[[Path], None]:
    """Change what the head says of the first counted update."""
    return in_head(lambda document: document["aggregation"]["counted"][0].update(values))


def train(**values: object) -> Callable[[Path], None]:
    return in_head(lambda document: document["train"].update(values))


def file_of(contents: bytes) -> dict:
    return {"sha256": hashlib.sha256(contents).hexdigest(), "bytes": len(contents)}


def moved(contents: bytes) -> bytes:
    """Return an adapter with 1 added to all numbers."""
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(contents)
        file.flush()
        return save({name: array + np.float32(1) for name, array in load_file(file.name).items()}, {"format": "pt"})


def forged_adapter(workspace: Path) -> None:
    """Put another adapter into the head, with its hash."""
    path = workspace / f"rounds/{HEAD:05d}" / ADAPTER
    path.write_bytes(moved(path.read_bytes()))
    rewrite(workspace, HEAD, lambda document: document["files"].update({ADAPTER: file_of(path.read_bytes())}))


def other_settings(workspace: Path) -> None:
    """Change lora_alpha in the head's adapter_config.json, of the same length."""
    name = "adapter/adapter_config.json"
    path = workspace / f"rounds/{HEAD:05d}" / name
    config = json.loads(path.read_bytes())
    digits = str(config["lora_alpha"])
    path.write_text(path.read_text().replace(digits, digits.replace("2", "9")))
    assert json.loads(path.read_bytes())["lora_alpha"] != config["lora_alpha"]
    rewrite(workspace, HEAD, lambda document: document["files"].update({name: file_of(path.read_bytes())}))


def without_a_client(workspace: Path) -> None:
    """Say that a client of the round before was missing, and leave the rest."""

    def change(document: dict) -> None:
        entry = document["aggregation"]["counted"].pop(0)
        document["aggregation"]["missing"] = [entry["client"]]

    rewrite(workspace, HEAD, change)


def one_more_round(workspace: Path, counted: bool) -> None:
    """Add a round with an adapter of one's own, which counts what the round before counted, or nothing."""
    rounds = workspace / "rounds"
    shutil.copytree(rounds / f"{HEAD:05d}", rounds / f"{HEAD + 1:05d}")
    folder = rounds / f"{HEAD + 1:05d}"
    (folder / ADAPTER).write_bytes(moved((folder / ADAPTER).read_bytes()))
    document = json.loads((folder / "manifest.json").read_bytes())
    document.pop("checksum")
    document["parent"] = hashlib.sha256((rounds / f"{HEAD:05d}/manifest.json").read_bytes()).hexdigest()
    document["round"] = HEAD + 1
    document["files"][ADAPTER] = file_of((folder / ADAPTER).read_bytes())
    if not counted:
        document["aggregation"] |= {"counted": [], "missing": document["cohort"]}
    write_manifest(folder, document)


def all_anew(workspace: Path) -> None:
    """Make another past with other updates, all of it consistent: only keys and witnesses can tell."""
    from protocol_client import take_part

    from fedcli import Federation
    from support.federation import noisy

    config = (workspace / "fedcli.yaml").read_text()
    for name in ("rounds/00001", "rounds/00002", "inbox"):
        shutil.rmtree(workspace / name)
    (workspace / "inbox").mkdir()
    for number in range(2):
        for client in range(3):
            take_part(workspace, client, noisy(50 + client + number))
        Federation.open(workspace).server.aggregate()
    (workspace / "fedcli.yaml").write_text(config)


ATTACKS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "the head's adapter": (forged_adapter, "is not what the counted updates give"),
    "lora_alpha": (other_settings, "changes adapter/adapter_config.json, which is fixed"),
    "num_samples": (in_counted(num_samples=7), "records other weights"),
    "weight": (in_counted(weight=0.9), "records other weights"),
    "norm": (in_counted(delta_norm=1.0), "records other weights"),
    "loss": (in_counted(train_loss=0.1), "records other weights"),
    "bytes": (in_counted(bytes=1), "states another cost"),
    "another update's hash": (in_counted(update="0" * 64), "is not the update that was counted"),
    "an honest client as missing": (without_a_client, "is not what the counted updates give"),
    "cohort": (in_head(lambda document: document.update(cohort=[1, 2])), "another cohort"),
    "cohort twice": (in_head(lambda document: document.update(cohort=[0, 0, 1])), "names a client twice"),
    "learning rate": (train(learning_rate=5.0), "learning_rate"),
    "seed": (train(seed=1), "the seed 1"),
    "model": (in_head(lambda document: document["model"].update(base="other")), "changes model"),
    "task": (in_head(lambda document: document.update(task="dpo")), "changes task"),
    "tensors": (in_head(lambda document: document["tensors"].popitem()), "changes tensors"),
    "cost": (in_head(lambda document: document["cost"].update(total_bytes_up=0)), "states another cost"),
    "history": (in_head(lambda document: document.update(history=[])), "states another history"),
    "a file that is not there": (
        in_head(lambda document: document["files"].update({"x.safetensors": file_of(b"")})),
        "is missing",
    ),
    "a file that nobody lists": (
        lambda workspace: (workspace / "rounds/00001/adapter/more.bin").write_bytes(b"x"),
        "is not listed in the manifest",
    ),
    "update_files": (
        in_head(lambda document: document.update(update_files=["adapter_model.safetensors", "x.safetensors"])),
        "which its algorithm does not fit",
    ),
    "update_tensors": (in_head(lambda document: document.update(update_tensors=[])), "asks for other tensors"),
    "rule": (
        in_head(
            lambda document: document["aggregation"].update(
                rule={"rule": "median", "tolerate": 1, "nearest_mixing": False, "weight_cap": None}
            )
        ),
        "is not what the counted updates give",
    ),
    "an enrolment of nobody": (
        in_head(lambda document: document.update(enrolment={"number": 0, "sha256": "0" * 64})),
        "does not say that signatures are required",
    ),
    "finished early with a cohort": (in_head(lambda document: document.update(state="finished")), "with a cohort of"),
    "finished early": (
        in_head(lambda document: document.update(state="finished", cohort=[])),
        "is finished, and it is round 2 of 4",
    ),
    "the first round": (in_first(lambda document: document.update(note="x")), "wrong_base"),
    "a round in between is gone": (lambda workspace: shutil.rmtree(workspace / "rounds/00001"), "is missing though"),
    "one more round of counted updates": (lambda workspace: one_more_round(workspace, True), "which round 2 did"),
    "one more round of nothing": (lambda workspace: one_more_round(workspace, False), "counts no update, and of"),
    "a middle manifest alone": (
        lambda workspace: (workspace / "rounds/00001/manifest.json").write_bytes(
            (workspace / "rounds/00001/manifest.json").read_bytes() + b" "
        ),
        "names another parent",
    ),
    # what nothing but a signature tells (docs/PROTOCOL.md, "What this protocol does not promise")
    "a key that nobody reads": (in_head(lambda document: document.update(note="x")), None),
    "a smaller cohort, as drawn": (in_head(lambda document: document.update(cohort=[0, 1])), None),
    "steps": (train(steps=1_000_000), None),
    "max_length": (train(max_length=2), None),
    "template": (train(template="vicuna"), None),
    "the next algorithm": (
        in_head(lambda document: document.update(algorithm={"name": "fedprox", "mu": 1.0})),
        None,
    ),
    "the cost and history of early versions": (
        in_head(lambda document: [document.pop(name) for name in ("cost", "history")]),
        None,
    ),
    "the last round is gone": (lambda workspace: shutil.rmtree(workspace / f"rounds/{HEAD:05d}"), None),
    "all anew": (all_anew, None),
}
"""What is done, and what `verify` says of it without signatures: None where it cannot tell."""
