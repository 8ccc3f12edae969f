"""Whole federations whose products are merged, with a model: every task and quantisation, scores, chat and exports."""

from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from support.lora import dense
from support.models import TINY, load_plain
from support.processes import fedcli, run_ok, settings

from fedcli import Federation

pytestmark = pytest.mark.slow
IDS = torch.arange(24).view(2, 12) * 7 % 500
SMALL = (
    "federation.rounds=2",
    "federation.clients=3",
    "data.partition=iid",
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
    run_ok("run", cwd=tmp_path)
    assert run_ok("verify", cwd=tmp_path)["violations"] == []
    rows = ("rows", "--data", "data/client-1.jsonl", "--limit", "2")
    assert len(run_ok("eval", *rows, "--client", "0", "--round", "latest", cwd=tmp_path)["scores"]) == 2


def test_a_client_alone_has_its_own_rank(tmp_path: Path):
    run_ok("init", ".", *settings(*SMALL, "aggregation.lora=product", "adapter.rank={0: 2, default: 4}"), cwd=tmp_path)
    for client, rank in ((0, 2), (1, 4)):
        run_ok("train-alone", "--id", client, cwd=tmp_path)
        for name, array in load_file(tmp_path / f"baselines/alone-{client}/adapter/adapter_model.safetensors").items():
            beyond = array[rank:] if ".lora_A." in name else array[:, rank:]
            used = array[:rank] if ".lora_A." in name else array[:, :rank]
            assert array.shape[0 if ".lora_A." in name else 1] == 4
            assert used.any()
            assert not beyond.any()


def logits(folder: Path) -> torch.Tensor:
    """Return a model's logits of a few tokens, in float32."""
    model = load_plain(folder)[0].float()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def test_chat_report_and_exports_have_both_adapters(tmp_path: Path):
    run_ok("init", ".", *settings(*SMALL, "aggregation.lora=exact", "train.steps=6"), cwd=tmp_path)
    run_ok("run", cwd=tmp_path)
    found = Federation.open(tmp_path).state.head
    base = load_plain(TINY)[0].float()
    with torch.no_grad():
        for module, product in dense(found.whole_adapter()).items():
            base.get_submodule(module).weight += torch.tensor(2.0 * product).float()
        wanted = base(input_ids=IDS).logits
    run_ok("export", "merged", "--merge", "--dtype", "float32", cwd=tmp_path)
    assert float((logits(tmp_path / "merged") - wanted).abs().max()) < 1e-5
    run_ok("export", "adapter", cwd=tmp_path)
    adapted = Federation.open(tmp_path).runtimes.load().adapted
    adapted.load_folder(tmp_path / "adapter")
    with torch.no_grad():
        assert float((adapted.base(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
        adapted.load(found.adapter())
        assert float((adapted.base(input_ids=IDS).logits - wanted).abs().max()) > 1e-5
        adapted.load(found.whole_adapter())
        assert float((adapted.base(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
    assert fedcli("chat", "--client", "0", "Say something.", cwd=tmp_path).returncode == 0
    run_ok("report", cwd=tmp_path)
    page = (tmp_path / "report/report.html").read_text()
    assert "What the last merge lacks" in page
    assert "base_delta/ has rank 16" in page
    assert torch.isfinite(wanted).all()
