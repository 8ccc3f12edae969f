"""Updates, rounds and scores made by hand, with the functions that make real ones: no model is loaded."""

from collections.abc import Mapping

import numpy as np

from fedcli import Federation
from fedcli.workspace.inbox import drop_update
from fedcli.workspace.layout import ADAPTER_FILE, UPDATE_RECORD, Workspace, update_name
from fedcli.workspace.records import UpdateRecord, file_entry
from fedcli.workspace.scores import ScoreEntry, ScoreRecord, publish_scores
from fedcli.workspace.tensors import encode

Arrays = dict[str, np.ndarray]


def drop(workspace: Workspace, client: int, *, loss: float | None = 1.0, base: str | None = None) -> Arrays:
    """Drop an update of the open round, and return what it adds to the adapter; another `base` makes it wrong."""
    head = Federation(workspace).round()
    rng = np.random.default_rng([head.number, client])
    adapter = head.adapter()
    change = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in adapter.items()}
    contents = encode({name: array + change[name] for name, array in adapter.items()})
    record = UpdateRecord(
        protocol=1,
        workspace=head.manifest.workspace,
        round=head.number,
        base=base or head.sha256,
        client=client,
        num_samples=10,
        steps=2,
        train_loss=loss,
        files={ADAPTER_FILE: file_entry(contents)},
    )
    assert drop_update(head, client, [(ADAPTER_FILE, contents), (UPDATE_RECORD, record.to_bytes())])
    return change


def merge(workspace: Workspace, losses: Mapping[int, float | None]) -> dict[int, Arrays]:
    """Let these clients answer the open round, and merge it; return what each update adds to the adapter."""
    changes = {client: drop(workspace, client, loss=loss) for client, loss in losses.items()}
    Federation(workspace).server.aggregate(partial=True)
    return changes


def score(workspace: Workspace, target: str | int, value: float, *, name: str = "demo", adapter: str = "") -> None:
    """Keep a score of a target, or of a round by its number, with an interval of 1/8 to each side."""
    entry = ScoreEntry(
        value=value,
        standard_error=0.05,
        low=value - 0.125,
        high=value + 0.125,
        num_items=10,
        unit="share",
        higher_is_better=True,
        is_detail=False,
    )
    record = ScoreRecord(
        benchmark=name,
        variant="",
        target=update_name(target) if isinstance(target, int) else target,
        model={"adapter": adapter},
        settings={},
        data={"sha256": "0"},
        scores={"exact_match": entry},
        awaits=None,
        num_items=10,
        num_unscored=0,
        notes=[],
        seconds=1.0,
        num_generated_tokens=10,
        tokens_per_second=10.0,
        versions={},
        created="2026-01-01",
    )
    publish_scores(workspace, record, [])
