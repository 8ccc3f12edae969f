"""Several models in one process: those that were dropped are freed, and a quantised one may follow a plain one."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import ENVIRONMENT

OPEN = """
import gc, sys, weakref
from pathlib import Path
from fedcli import Federation
from fedcli.client.runtime import Runtime

state = Federation.open(Path.cwd()).state
"""

FREED = """
first = Runtime(state)
model = weakref.ref(first.adapted.base)
second = Runtime(state)
del first
gc.collect()
print(model() is None)
"""

QUANTIZED = """
from fedcli.model.loading import load_base
from fedcli.model.lora import AdaptedModel, lora_config
from fedcli.parties.party import find_same_base

plain = Runtime(state)
print("bitsandbytes" in sys.modules)
folder = find_same_base(state, state.config.model.base, trust_remote_code=False).folder
settings = lora_config(rank=4, alpha=8, dropout=0.0, target_modules=["q_proj"], base=None)
for quantization in ("int8", "nf4"):
    adapted = AdaptedModel(folder, settings, trust_remote_code=False, quantization=quantization)
    (layer, *_) = (module for name, module in adapted.model.named_modules() if name.endswith("q_proj"))
    print(type(layer).__name__, layer.weight.dtype)
Runtime(state)
"""

STORED = """
from fedcli.model.loading import load_base, load_whole
from fedcli.parties.party import find_same_base
from transformers import AutoTokenizer, BitsAndBytesConfig

folder = find_same_base(state, state.config.model.base, trust_remote_code=False).folder
if not Path("stored").exists():
    model = load_whole(folder, device_map="cpu", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model.save_pretrained("stored")
    AutoTokenizer.from_pretrained(folder).save_pretrained("stored")
else:
    plain = Runtime(state)
    model, _ = load_base(Path("stored"), trust_remote_code=False)
    print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""


def run(script: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", OPEN + script], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_dropped_model_is_freed_though_another_was_made_since(small: Path) -> None:
    assert run(FREED, small) == ["True"]


@pytest.mark.slow
def test_a_quantised_model_may_follow_a_plain_one(small: Path) -> None:
    assert run(QUANTIZED, small) == ["False", "Linear8bitLt torch.int8", "Linear4bit torch.uint8"]


@pytest.mark.slow
def test_a_base_that_is_stored_quantised_may_follow_a_plain_one(small: Path) -> None:
    run(STORED, small)
    assert run(STORED, small) == ["Linear4bit"]
