"""A machine whose memory is too small: exit 8 with the cure, in training, in loading the base and in scoring.

A process of its own sets a limit to its address space, so that its allocator fails as on a full machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import ENVIRONMENT

from fedcli.model.loading import short_memory

LIMIT = """
import resource, sys
from pathlib import Path
from fedcli.errors import RequirementError

def leave(num_bytes):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

def told(act):
    try:
        act()
    except RequirementError as error:
        print(error.message, "|", error.hint)
    else:
        sys.exit("it had enough memory")
"""

TRAIN = """
from dataclasses import replace
from fedcli import Federation
from fedcli.parties.party import find_party
from fedcli.client.runtime import Runtime

state = Federation.open(Path.cwd()).state
head, runtime = state.head, Runtime(state)
train = head.manifest.train.model_copy(update={"batch_size": 1024, "micro_batch_size": 1024})
party = find_party(state, 0)
runtime.rows(party, train)
leave(2**23)
told(lambda: runtime.train(head.adapter(), train, party=party, round_number=0, first_draw=0, rule=None,
    on_step=lambda report: None))
"""

LOAD = """
import torch
from fedcli.model.loading import load_base, load_whole
from transformers import LlamaForCausalLM
from fedcli.model.library_logging import quiet_libraries

with quiet_libraries():
    load_whole(Path("base"), dtype=torch.float32, device_map="meta")
    leave(int(sys.argv[1]))
    told(lambda: load_base(Path("base"), trust_remote_code=False))
"""

SCORE = """
from transformers import AutoModelForCausalLM, LlamaConfig
from fedcli.data.encoding import Encoder
from fedcli.eval.local_model import LocalModel
from fedcli.eval.requests import Likelihood
from fedcli.model.base import find_base
from fedcli.model.loading import load_tokenizer

tokenizer = load_tokenizer(find_base("builtin:tiny", revision=None, root=Path()), trust_remote_code=False)
config = LlamaConfig(vocab_size=2**17, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
engine = LocalModel(AutoModelForCausalLM.from_config(config), tokenizer, Encoder(tokenizer))
text = "the river rises when rain falls " * 60
leave(2**26)
told(lambda: engine.log_likelihoods([Likelihood("a", text)] * 3, lambda index, answer: None))  # 200 MB of logits
"""


def run(script: str, folder: Path, *arguments: object) -> list[str]:
    """Run a script; return what it was told."""
    done = subprocess.run(
        [sys.executable, "-c", LIMIT + script, *map(str, arguments)],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_training_that_does_not_fit_names_this_machine_and_the_cure(small: Path) -> None:
    (told,) = run(TRAIN, small)
    assert told.startswith("this machine's memory is too small for this training: ")
    assert "train.micro_batch_size" in told


@pytest.mark.slow
@pytest.mark.parametrize("num_bytes", [0, 2**28], ids=["for the file", "for the weights"])
def test_a_base_that_does_not_fit_names_this_machine_and_the_cure(num_bytes: int, tmp_path: Path) -> None:
    """A base of 134 MB that takes twice as much when it is loaded; the file's weights are a hole."""
    base = tmp_path / "base"
    base.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 2**16,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    shapes = {
        "embed_tokens": (2**16, 1024), "norm": (1024,),
        "layers.0.input_layernorm": (1024,), "layers.0.post_attention_layernorm": (1024,),
        "layers.0.self_attn.q_proj": (1024, 1024), "layers.0.self_attn.o_proj": (1024, 1024),
        "layers.0.self_attn.k_proj": (256, 1024), "layers.0.self_attn.v_proj": (256, 1024),
        "layers.0.mlp.gate_proj": (64, 1024), "layers.0.mlp.up_proj": (64, 1024), "layers.0.mlp.down_proj": (1024, 64),
    }  # fmt: skip
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[f"model.{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (told,) = run(LOAD, tmp_path, num_bytes)
    assert told.startswith("this machine's memory is too small for the base model base")
    assert "model.quantization" in told


@pytest.mark.slow
def test_scoring_that_does_not_fit_names_this_machine_and_the_cure(tmp_path: Path) -> None:
    (told,) = run(SCORE, tmp_path)
    assert told.startswith("this machine's memory is too small for a single prompt")
    assert "model.quantization" in told


def test_the_memory_that_an_error_speaks_of_is_told_from_a_bug() -> None:
    gpu = [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ]
    assert {short_memory(RuntimeError(each)) for each in gpu} == {"the GPU's memory"}
    assert short_memory(torch.OutOfMemoryError("x")) == "the GPU's memory"
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert short_memory(error.value) == "this machine's memory"
    for each in (MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc")):
        assert short_memory(each) == "this machine's memory"
    for each in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(2, "No such file"),
        KeyError("alloc"),
    ):
        assert short_memory(each) is None
