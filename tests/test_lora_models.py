"""Whole federations whose products are merged, with a model: every task and quantisation, scores, chat and exports."""

from pathlib import Path

import pytest
import torch
from support.processes import run_ok, settings

pytestmark = pytest.mark.slow
IDS = torch.arange(24).view(2, 12) * 7 % 500
SMALL = (
    "federation.rounds=2",
    "federation.clients=3",
    "train.steps=2",
    "train.batch_size=4",
    "adapter.rank=4",
    "adapter.alpha=8",
    "adapter.dropout=0.1",
)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("demo", ("aggregation.lora=exact",)),
        ("demo-dpo", ("aggregation.lora=exact",)),
        ("demo", ("aggregation.lora=exact", "model.quantization=int8")),
        ("demo", ("aggregation.lora=exact", "model.quantization=nf4")),
        ("demo", ("aggregation.lora=exact", "privacy={unit: row, clip: 1.0, noise: 1.0}")),
        ("demo", ("aggregation.lora=exact", "aggregation.lora_fresh=true", "adapter.rank={0: 2, default: 4}")),
        ("demo", ("aggregation.lora=product", "algorithm.name=fedprox", "adapter.rank={0: 2, default: 4}")),
        ("demo-dpo", ("aggregation.lora=product", "adapter.rank={0: 2, default: 4}")),
        ("demo", ("aggregation.lora_weights=norm", "algorithm.name=fedavgm", "adapter.rank={0: 2, default: 4}")),
    ],
)
def test_two_rounds_run_and_are_computed_again(preset: str, overrides: tuple[str, ...], tmp_path: Path):
    run_ok("init", ".", "--preset", preset, *settings(*SMALL, *overrides), cwd=tmp_path)
    assert run_ok("run", cwd=tmp_path)["state"] == "finished"
    assert run_ok("verify", cwd=tmp_path)["violations"] == []
    name = "demo" if preset == "demo" else "demo-preferences"
    del name
    scored = run_ok("eval", "rows", "--data", "data/client-1.jsonl", "--limit", "2", "--client", "0", cwd=tmp_path)
    assert scored["scores"]
