"""A base model is known by its files alone: what it is, and why one that will not do is refused before torch loads."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from support.processes import ENVIRONMENT, SMALL, fedcli, run_ok, settings
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from fedcli.data.chat_template import ChatTemplate
from fedcli.errors import ConfigError, RequirementError
from fedcli.model.architectures import UNIFORM, find_architecture
from fedcli.model.base import find_base
from fedcli.model.finite import check_answers, check_weights
from fedcli.model.inspection import inspect
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import load_base, load_tokenizer
from fedcli.model.stored_quantization import PACKAGES, UNTRAINED
from fedcli.model.tokenizer_files import chat_abilities
from fedcli.operations.doctor import _tokenizer

TINY = find_base("builtin:tiny", revision=None, root=Path.cwd())
ROWS = Path(__file__).parent / "benchmark_rows"
Change = Callable[[Path], object]


def configure(**changes: Any) -> Change:
    """Return what changes config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rename(renamed: Callable[[str], str | None]) -> Change:
    """Return what gives weights other names, or none: they are left out."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {renamed(name): each for name, each in load_file(path).items()}
        save_file({name: each for name, each in weights.items() if name is not None}, path)

    return change


def add_token(token: str, number: int = 900, *, special: bool = False, role: str | None = None) -> Change:
    """Return what adds a token to the tokenizer, and not to the embedding."""

    def change(folder: Path) -> None:
        path = folder / "tokenizer.json"
        document = json.loads(path.read_text())
        entry = {"id": number, "content": token, "special": special, "single_word": False}
        document["added_tokens"].append(entry | dict.fromkeys(("lstrip", "rstrip", "normalized"), False))
        path.write_text(json.dumps(document))
        if role is not None:
            settings = folder / "tokenizer_config.json"
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {role: token}))

    return change


def remove(*patterns: str) -> Change:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def write(name: str, contents: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(contents)


def cut(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def shard(folder: Path) -> None:
    """Split the weights into two files, the second of which is lost."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:5]}, folder / "model-00001-of-00002.safetensors")
    mapped = {name: f"model-0000{1 + (name not in names[:5])}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))


def without_layer(number: int) -> Callable[[str], str | None]:
    return lambda name: None if f".layers.{number}." in name else name


def quantized(method: str | None, **settings: Any) -> Change:
    return configure(quantization_config={"quant_method": method, **settings})


def stored_as(dtype: torch.dtype, part: str = "weight", *more: str) -> Change:
    """Return what stores every linear layer's weights in another type, under another name, with tensors beside them."""

    def change(folder: Path) -> None:
        weights = {}
        for name, weight in load_file(folder / "model.safetensors").items():
            if "_proj.weight" not in name:
                weights[name] = weight
                continue
            module = name.removesuffix("weight")
            weights[module + part] = (weight * 100).to(dtype)
            weights |= {module + each: torch.ones(1) for each in more}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
PREFIXES = ("module.", "base_model.model.", "_orig_mod.", "model.", "policy.", "_forward_module.model.")
WRONG: dict[str, tuple[Change, str]] = {
    **{
        f"keys prefixed {prefix}": (
            rename(lambda name, prefix=prefix: prefix + name),
            rf"20 missing \(model.embed_tokens.weight, .*; 20 unexpected \({prefix}model.embed_tokens.weight",
        )
        for prefix in PREFIXES
    },
    "the first layer is missing": (rename(without_layer(0)), r"9 missing \(model.layers.0.input_layernorm.weight"),
    "the last layer is missing": (rename(without_layer(1)), r"9 missing \(model.layers.1.input_layernorm.weight"),
    "a layer more in config.json": (configure(num_hidden_layers=3), r"9 missing \(model.layers.2.input_layernorm"),
    "a layer fewer in config.json": (configure(num_hidden_layers=1), r"9 unexpected \(model.layers.1.input_layernorm"),
    "an untied head is missing": (configure(tie_word_embeddings=False), r"1 missing \(lm_head.weight\)"),
    "one weight of a layer is missing": (
        rename(lambda name: None if name == "model.layers.1.self_attn.k_proj.weight" else name),
        r"1 in half of the layers \(model.layers.0.self_attn.k_proj.weight\)",
    ),
    "a .bin file that is cut off": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            write("pytorch_model.bin", b"PK\3\4" + b"0" * 99)(folder),
        ),
        "pytorch_model.bin is cut off",
    ),
    "vocab_size is wrong": (configure(vocab_size=1000), "embed_tokens.weight has 900 rows, vocab_size is 1000"),
    "an encoder": (configure(model_type="bert", architectures=["BertModel"]), "BertModel is an encoder, which reads"),
    "a masked model": (
        configure(model_type="roberta", architectures=["RobertaForMaskedLM"]),
        "RobertaForMaskedLM is an encoder",
    ),
    "an encoder-decoder": (
        configure(model_type="bart", architectures=["BartForConditionalGeneration"]),
        "BartForConditionalGeneration is an encoder-decoder model",
    ),
    "t5": (configure(model_type="t5", architectures=["T5ForConditionalGeneration"]), "is an encoder-decoder model"),
    "vision": (configure(model_type="vit", architectures=["ViTModel"]), "ViTModel is no language model"),
    "a classifier": (configure(architectures=["LlamaForSequenceClassification"]), "has a head of another task"),
    "an embedding model": (configure(is_causal=False), "reads a text in both directions"),
    "an unknown architecture": (configure(model_type="nosuch"), "of the architecture 'nosuch', which the installed"),
    "no model_type": (configure(model_type=None), "its config.json has no model_type"),
    "code of its own": (
        configure(model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"}),
        r"needs code of its own \(modeling_own.py\), and that may not run",
    ),
    "an added token": (add_token("<new>"), r"embedding of 900 tokens, and its tokenizer has 901: 1 without .*<new>"),
    "an added special token": (add_token("<new>", 950, special=True), "an embedding of 900 tokens, .* has 951"),
    "an end token beyond": (add_token("<end>", special=True, role="eos_token"), "900 tokens, .* has 901"),
    "no tokenizer": (remove("tokenizer*"), "has no tokenizer"),
    "an adapter beside the weights": (write("adapter_config.json", b"{}"), "adapter_config.json beside its weights"),
    "weights that are a git-lfs pointer": (write("model.safetensors", LFS), "model.safetensors is a git-lfs pointer"),
    "a tokenizer that is a git-lfs pointer": (write("tokenizer.json", LFS), "tokenizer.json is a git-lfs pointer"),
    "weights that are cut off": (cut("model.safetensors"), "model.safetensors is cut off, or no safetensors file"),
    "weights that are a web page": (write("model.safetensors", b"<!doctype html>" * 9), "model.safetensors is cut off"),
    "a shard is missing": (shard, r"of its index's files 1 are not there \(model-00002-of-00002.safetensors\)"),
    "an adapter's folder": (
        lambda folder: (
            remove("config.json", "model.safetensors")(folder),
            write("adapter_config.json", b'{"base_model_name_or_path": "some/base"}')(folder),
            save_numpy({"a": np.zeros(1)}, folder / "adapter_model.safetensors"),
        ),
        "is an adapter's folder",
    ),
    "no weights": (remove("*.safetensors"), r"does not hold config.json and weights \(no \*.safetensors"),
    "weights of another format": (
        lambda folder: (remove("*.safetensors")(folder), write("flax_model.msgpack", b"")(folder)),
        "flax_model.msgpack is of another format",
    ),
    "a file of weights that transformers does not read": (
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.safetensors"),
        "has no model.safetensors and no model.safetensors.index.json; it holds consolidated.safetensors",
    ),
    "GPTQ": (quantized("gptq", bits=4), "stored quantised by gptq, which needs .* not installed: optimum, gptqmodel"),
    "AWQ": (quantized("awq", bits=4), "stored quantised by awq, which needs .* not installed: gptqmodel"),
    "compressed tensors": (quantized("compressed-tensors", format="pack-quantized"), "not installed: compressed-tens"),
    "HQQ": (quantized("hqq"), "stored quantised by hqq, which needs a package that is not installed: hqq"),
    "AQLM": (quantized("aqlm"), "stored quantised by aqlm, which needs a package that is not installed: aqlm"),
    "Quanto": (quantized("quanto", weights="int8"), "which needs a package that is not installed: optimum-quanto"),
    "quantised in the text's part": (
        configure(text_config={"quantization_config": {"quant_method": "gptq"}}),
        "stored quantised by gptq",
    ),
    "FP8": (quantized("fp8", weight_block_size=[128, 128]), "stored quantised by fp8, on which nothing can be trained"),
    "FP8 of FBGEMM": (quantized("fbgemm_fp8"), "stored quantised by fbgemm_fp8, on which nothing can be trained"),
    "BitNet": (quantized("bitnet", linear_class="bitlinear"), "stored quantised by bitnet, on which nothing can be"),
    "a method of another tool": (quantized("exl2"), "its config.json names the method 'exl2', an unknown one"),
    "no method": (quantized(None, bits=4), "its config.json does not say by which method"),
    "int8 untold": (
        stored_as(torch.int8),
        r"no quantization_config: 14 weights are of the type I8 \(model.layers.0.mlp.down_proj.weight, ",
    ),
    "uint8 untold": (stored_as(torch.uint8), "14 weights are of the type U8"),
    "int8 with scales": (stored_as(torch.int8, "weight", "SCB"), "14 weights are of the type I8"),
    "GPTQ untold": (stored_as(torch.int32, "qweight", "qzeros", "scales"), "14 weights are of the type I32"),
    "packed untold": (stored_as(torch.int32, "weight_packed", "weight_scale"), "14 weights are of the type I32"),
    "nf4 untold": (stored_as(torch.uint8, "weight", "weight.absmax"), "14 weights are of the type U8"),
    "scaled FP8 untold": (stored_as(torch.float8_e4m3fn, "weight", "weight_scale"), "are of the type F8_E4M3"),
    "no config.json": (remove("config.json"), "does not hold config.json and weights"),
    "a config.json that is no JSON": (write("config.json", b"{"), "config.json cannot be read"),
    "a folder that is not there": (shutil.rmtree, "does not exist"),
}


def broken(fault: str, parent: Path) -> Path:
    folder = Path(shutil.copytree(TINY, parent / "".join(filter(str.isalnum, fault))))
    WRONG[fault][0](folder)
    return folder


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_base_is_refused_with_its_own_sentence(fault: str, tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match=WRONG[fault][1]) as error:
        inspect(broken(fault, tmp_path)).require()
    assert error.value.hint


def test_init_and_doctor_refuse_every_wrong_base_before_torch_is_imported(tmp_path: Path) -> None:
    """All in one process, which has imported neither torch nor transformers in the end."""
    bases = [*(broken(fault, tmp_path) for fault in WRONG), with_64_positions(tmp_path / "short", "gpt2")]
    script = f"""
import contextlib, io, sys
from fedcli.cli import main
for number, base in enumerate({list(map(str, bases))!r}):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["init", "new", "--set", f"model.base={{base}}", "--set", "train.max_length=256"])
        told = main(["doctor", "--model", base]) if number % 9 == 0 else code
    print(code, told, "Traceback" in said.getvalue(), base)
print(said.getvalue().splitlines()[0])
print(*sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    *lines, last, message, imported = done.stdout.split("\n")[:-1]
    assert lines == [f"8 8 False {base}" for base in bases[:-1]], done.stderr
    assert (last, imported) == (f"3 3 False {bases[-1]}", "")
    assert message == "fedcli: error: train.max_length 256, the base has 64 positions"
    assert not (tmp_path / "new").exists()


KINDS: dict[str, tuple[dict[str, Any], str | None]] = {
    "t5": ({}, "is an encoder-decoder model"),
    "bart": ({}, "is an encoder-decoder model"),
    "whisper": ({}, "is an encoder-decoder model"),
    "bert": ({}, "is an encoder, which reads a text in both directions"),
    "roberta": ({}, "is an encoder"),
    "electra": ({}, "is an encoder"),
    "xlnet": ({}, "is an encoder"),
    "modernbert": ({}, "is no language model that transformers has a causal form of"),
    "distilbert": ({}, "is no language model"),
    "vit": ({}, "is no language model"),
    "clip": ({}, "is no language model"),
    "wav2vec2": ({}, "is no language model"),
    "llava": ({}, "is no language model"),
    "gpt2": ({}, None),
    "gpt_neox": ({}, None),
    "bert as a decoder": ({"is_decoder": True}, None),
    "bart's decoder": ({"is_decoder": True, "is_encoder_decoder": False}, None),
    "modernbert-decoder": ({}, None),
    "qwen3_next": ({}, None),
    "gemma3": ({}, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_a_base_is_told_by_the_config_json_that_transformers_writes(name: str, tmp_path: Path) -> None:
    changes, reason = KINDS[name]
    kind = name.partition("'")[0].partition(" as ")[0]
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    CONFIG_MAPPING[kind](**changes).save_pretrained(folder)
    found = inspect(folder)
    assert found.is_causal is (reason is None)
    told = " ".join(fault.message for fault in found.faults if "no causal language model" in fault.message)
    assert reason is None or reason in told
    assert bool(told) is (reason is not None)


@pytest.mark.slow
def test_a_pad_token_without_an_embedding_trains_and_scores(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    add_token("[PAD]", 1000, special=True, role="pad_token")(folder)
    run_ok("init", "w", *settings(*SMALL, f"model.base={folder}"), cwd=tmp_path)
    run_ok("init", "plain", *settings(*SMALL), cwd=tmp_path)
    losses = []
    for workspace in ("w", "plain"):
        run_ok("run", "-w", workspace, cwd=tmp_path)
        run_ok("eval", "tfns", "--data", ROWS, "--limit", "3", "-w", workspace, cwd=tmp_path)
        losses.append((tmp_path / workspace / "rounds/00002/adapter/adapter_model.safetensors").read_bytes())
    assert losses[0] == losses[1], "which id pads changes nothing"


@pytest.mark.slow
def test_rows_beyond_the_positions_of_a_federation_that_is_under_way_are_one_sentence(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gpt2"](n_embd=32, n_layer=2, n_head=4, vocab_size=900, n_positions=24)
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    with quiet_libraries():
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    base = (f"model.base={folder}", "adapter.target_modules=[c_attn]")
    run_ok("init", "w", *settings(*SMALL, *base, "train.max_length=24"), cwd=tmp_path)
    path = tmp_path / "w/fedcli.yaml"
    path.write_text(path.read_text().replace("max_length: 24", "max_length: 128"))
    for client in range(3):
        run_ok("client", "train", "--id", client, "-w", "w", cwd=tmp_path)
    run_ok("server", "aggregate", "-w", "w", cwd=tmp_path)
    done = fedcli("client", "train", "--id", 0, "-w", "w", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "a row has 29 tokens, the base has 24 positions" in done.stderr


def test_doctor_tells_what_a_base_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    )
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    done = fedcli("doctor", "--model", "base", "--json", cwd=tmp_path)
    model = json.loads(done.stdout)["model"]
    assert (done.returncode, model["licence"], model["num_parameters"]) == (0, "apache-2.0", 158_272)
    assert model["lora_targets"] == ["q_proj", "v_proj"]
    assert model["chat"] == {"system": False, "tools": False, "thoughts": False, "several_turns": True, "error": None}
    (finding,) = (each for each in json.loads(done.stdout)["findings"] if each["name"] == "chat template")
    assert finding["detail"] == "writes several turns; does not write a system turn, tools, thoughts"


BROKEN_TEMPLATES = {
    "a brace is missing": ("{% for m in messages %}\n{{ m.role }\n{% endfor %}", "line 2, unexpected '}'"),
    "a block is not closed": ("\n{% for m in messages %}{{ m.content }}", "line 2, Unexpected end of template."),
    "an unknown tag": ("{{ bos_token }}\n\n{% turn %}", "line 3, Encountered unknown tag 'turn'."),
    "an unknown filter": ("{{ messages[0].content | nosuch }}", "line 1, No filter named 'nosuch'."),
    "a key that is not there": ("\n{{ messages[0].who.name }}", "line 2, 'dict object' has no attribute 'who'"),
    "a function that is not there": ("\n\n{{ nosuch(messages) }}", "line 3, 'nosuch' is undefined"),
    "its own refusal": ("\n{{ raise_exception('no way') }}", "no way"),
}


@pytest.mark.parametrize("case", BROKEN_TEMPLATES)
def test_a_chat_template_that_fails_is_told_with_its_line(case: str) -> None:
    tokenizer = load_tokenizer(TINY, trust_remote_code=False)
    tokenizer.chat_template, told = BROKEN_TEMPLATES[case]
    abilities = chat_abilities(tokenizer)
    assert abilities is not None
    (finding,) = (each for each in _tokenizer(replace(inspect(TINY), chat=abilities)) if each.name == "chat template")
    assert finding.state == "warning"
    assert finding.detail.startswith(f"writes nothing, it fails: {told}")
    with pytest.raises(ConfigError, match=f"cannot be followed: the chat template refuses it: {re.escape(told)}"):
        ChatTemplate(tokenizer)


def test_a_whole_base_has_no_fault_and_is_described() -> None:
    found = inspect(TINY)
    assert (found.faults, found.notes, found.missing, found.unexpected) == ((), (), (), ())
    assert (found.kind, found.num_layers, found.vocab_size, found.embedding_rows) == ("llama", 2, 900, 900)
    assert (found.tokenizer_size, found.positions, found.max_positions) == (900, "rotary", 1024)
    assert (found.head, found.num_parameters) == ("tied", 158_272)
    assert found.memory["float32"] == 4 * 158_272


@pytest.mark.slow
def test_every_method_of_quantisation_that_transformers_knows_is_known_here() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    theirs = {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}
    assert theirs == {*PACKAGES, *UNTRAINED}


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "load_in_8bit"])
def test_a_base_that_is_stored_quantised_and_can_be_trained_has_no_fault(method: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    (quantized(None, load_in_8bit=True) if method == "load_in_8bit" else quantized(method))(folder)
    assert inspect(folder).require().quantization == {"load_in_8bit": "bitsandbytes"}.get(method, method)


def with_head(head: Callable[[Any], Any], **settings: object) -> Change:
    """Return what stores an output head beside the embedding, made of it."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = head(weights["model.embed_tokens.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        configure(**settings)(folder)

    return change


HEADS: dict[str, tuple[Change, str, bool]] = {
    "tied": (configure(), "tied", True),
    "tied, stored twice": (with_head(lambda rows: rows.clone()), "tied", True),
    "another head": (with_head(lambda rows: rows * 2), "own", False),
    "another last number": (with_head(lambda rows: rows.index_fill(0, torch.tensor([899]), 7)), "own", False),
    "its own": (with_head(lambda rows: rows * 2, tie_word_embeddings=False), "own", False),
    "its own, alike": (with_head(lambda rows: rows.clone(), tie_word_embeddings=False), "own", False),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_output_head_that_is_told_is_the_one_that_transformers_makes(case: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    change, head, is_tied = HEADS[case]
    change(folder)
    found = inspect(folder).require()
    assert found.head == head
    model, _ = load_base(folder, trust_remote_code=False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is is_tied
    assert any("the weights hold two" in note for note in found.notes) is case.startswith("another")


def test_a_token_of_the_chat_template_has_an_embedding_or_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    add_token("<|turn|>", special=True, role="turn_token")(folder)
    inspect(folder).require()
    (folder / "chat_template.jinja").write_text("{{ '<|turn|>' }}{{ messages[0]['content'] }}")
    with pytest.raises(RequirementError, match=r"1 without an embedding \(<\|turn\|>\)"):
        inspect(folder).require()


@pytest.mark.parametrize("role", ["pad_token", "image_token", "audio_token"])
def test_a_token_beyond_the_embedding_that_no_text_holds_is_a_note(role: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    add_token("<beyond>", special=True, role=role)(folder)
    found = inspect(folder).require()
    assert "'<beyond>' (id 900) has no embedding" in found.notes[0]


def with_64_positions(folder: Path, kind: str) -> Path:
    """Write a base of 64 positions, with as much of it as an inspection reads."""
    shutil.copytree(TINY, folder)
    names = ["wte.weight", "ln_f.weight", *(f"h.{layer}.attn.c_attn.weight" for layer in range(2))]
    names += ["wpe.weight"] if kind == "gpt2" else []
    tensors = {f"transformer.{name}": np.zeros((900 if "wte" in name else 64, 4)) for name in names}
    save_numpy(tensors | {"lm_head.weight": np.zeros((900, 4))}, folder / "model.safetensors")
    config = {"n_positions": 64, "n_embd": 4, "n_layer": 2, "n_head": 4, "vocab_size": 900}
    write("config.json", json.dumps({"model_type": kind} | config).encode())(folder)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_positions_that_are_learnt_or_lie_in_a_table_limit_max_length(kind: str, tmp_path: Path) -> None:
    found = inspect(with_64_positions(tmp_path / kind, kind)).require()
    found.check_length(64)
    with pytest.raises(ConfigError, match=r"train.max_length 65, the base has 64 positions"):
        found.check_length(65)


def test_a_length_beyond_rotary_positions_is_noted() -> None:
    found = inspect(TINY)
    found.check_length(10**6)
    assert found.notes_for(1024) == ()
    assert found.notes_for(1025) == ("train.max_length 1025, the base was made for 1024 positions",)


def test_headers_are_read_and_no_weights(tmp_path: Path) -> None:
    """A file of a terabyte, nearly all of it a hole, is inspected as any other."""
    folder = Path(shutil.copytree(TINY, tmp_path / "base"))
    path = folder / "model.safetensors"
    size = 2**40
    contents = path.read_bytes()
    (length,) = struct.unpack("<Q", contents[:8])
    header = json.loads(contents[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    header["v_head.summary.weight"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded + contents[8 + length :])
        try:
            file.truncate(8 + len(encoded) + end + size)
        except OSError:
            pytest.skip("this file system has no files of a terabyte")
    assert inspect(folder).require().num_parameters == 158_272 + size


def with_numbers(folder: Path, name: str, number: float) -> Path:
    """Write the built-in base with a number in one of its weights."""
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[7] = number
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_base_with_weights_that_are_not_finite_is_named_in_training_and_scoring(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with_numbers(tmp_path / "base", name, float("nan"))
    run_ok("init", "w", *settings(*SMALL, f"model.base={tmp_path / 'base'}"), cwd=tmp_path)
    for arguments in (("client", "train", "--id", "0"), ("eval", "tfns", "--base", "--data", ROWS)):
        done = fedcli(*arguments, "-w", "w", cwd=tmp_path)
        assert done.returncode == 8, done.stderr
        assert f"1 of 11,264 numbers of {name} are NaN or infinite" in done.stderr
        assert "learning_rate" not in done.stderr
    assert not list(tmp_path.glob("w/inbox/*/*"))


NUMBERS = [
    pytest.param(name, number, marks=[] if (name, str(number)) == ("model.norm.weight", "nan") else pytest.mark.slow)
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight")
    for number in (float("nan"), float("inf"), float("-inf"))
]


@pytest.mark.parametrize(("name", "number"), NUMBERS)
def test_every_number_that_is_not_finite_is_found(name: str, number: float, tmp_path: Path) -> None:
    model, _ = load_base(with_numbers(tmp_path / "base", name, number), trust_remote_code=False)
    for check in (check_answers, check_weights):
        with pytest.raises(RequirementError, match=rf"of {name} are NaN or infinite"):
            check(model)


def test_a_finite_base_passes() -> None:
    model, _ = load_base(TINY, trust_remote_code=False)
    check_answers(model)
    check_weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kinds in UNIFORM.values() for kind in kinds])
def test_layers_of_a_uniform_architecture_have_the_same_names_and_shapes(kind: str) -> None:
    """As transformers makes it of its default configuration, on the meta device."""
    with torch.device("meta"), quiet_libraries():
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    known = find_architecture(kind)
    assert known is not None
    assert known.setting({}, "num_hidden_layers") == model.config.num_hidden_layers
    assert known.setting({}, "vocab_size") == model.config.vocab_size
    assert known.setting({}, "tie_word_embeddings") in (None, model.config.tie_word_embeddings)
    layers: list[set[tuple[str, tuple[int, ...]]]] = [set() for _ in range(model.config.num_hidden_layers)]
    prefix = f"{known.layers_at}."
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix):
            number, _, inner = name.removeprefix(prefix).partition(".")
            layers[int(number)].add((inner, tuple(tensor.shape)))
    assert layers[0]
    assert all(layer == layers[0] for layer in layers)
