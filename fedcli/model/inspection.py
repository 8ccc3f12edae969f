"""What a base model is, as its files say: config.json, the tokenizer's files, names and shapes of weights.

Neither torch nor transformers is imported and no weight is read, so that a base that will not do is refused at once.
Only what is certain is a fault here. transformers itself decides the rest when it makes the model (`base.load_whole`).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import is_zipfile

from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from fedcli.errors import ConfigError, RequirementError
from fedcli.model.architectures import (
    Architecture,
    find_architecture,
    is_encoder,
    lora_targets,
    version_of_transformers,
)
from fedcli.model.memory_estimate import weights_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "*.tiktoken"),
)
MISMATCH_CURE = "Fetch or save the model again: its weights need the names, layers and sizes that config.json gives."
_LFS = b"version https://git-lfs"
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|head|output_projection)\.weight$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|embeddings|tokens_embed)\.weight$")
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|positions_embed|position_embeddings)\.weight$")
_LAYER = re.compile(r"(?P<at>.*?)\.(?P<number>\d+)\.(?P<name>.+)")
_OTHER_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction"
    r"|PreTraining|RewardModel\w*)$"
)
_LEARNT_POSITIONS = {"biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt"}
_POSITION_TABLES = {"codegen", "ctrl", "gptj", "mpt"}
"""Architectures whose rotary, sinusoidal or ALiBi positions end with a table."""
_PAD = re.compile(r"[<\[|]*pad[>\]|]*", re.IGNORECASE)
_TEXT_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")

Positions = Literal["learnt", "table", "rotary", "alibi", "other"]


@dataclass(frozen=True)
class Fault:
    """Why a base will not do, and what to do about it."""

    message: str
    hint: str


@dataclass(frozen=True)
class ChatAbilities:
    """What a chat template writes of what it is given; what it does not write is lost."""

    system: bool
    tools: bool
    thoughts: bool
    """Of the last response, given as `reasoning_content`."""
    several_turns: bool


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a base model is; None is what its files do not tell."""

    folder: Path
    kind: str
    """Its model_type."""
    architecture: str | None
    """The class that its config.json names."""
    is_causal: bool | None
    own_code: str | None
    """The file of its own code that transformers would have to run, if it needs that."""
    num_layers: int | None
    vocab_size: int | None
    embedding_rows: int | None
    tokenizer_size: int | None
    """The largest token id and one."""
    positions: Positions
    max_positions: int | None
    dropouts: Mapping[str, float]
    head: Literal["tied", "own"] | None
    has_chat_template: bool
    chat: ChatAbilities | None = None
    """Told by a tokenizer that was made: `chat_abilities`."""
    lora_targets: tuple[str, ...] | None
    licence: str | None
    quantization: str | None
    """What its weights are stored in, where that is quantised."""
    num_parameters: int | None
    memory: Mapping[str, int]
    """Bytes of its weights by the type or quantisation that they are loaded in."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    """Weights of another shape than config.json gives."""
    uneven: tuple[str, ...] = ()
    """Weights that half of the layers have, where all layers are alike."""
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def require(self) -> "Inspection":
        """Return it; raise RequirementError for its first fault."""
        for fault in self.faults:
            raise RequirementError(fault.message, hint=fault.hint)
        return self

    def check_length(self, max_length: int) -> None:
        """Raise ConfigError where the base has fewer positions than train.max_length, and cannot have more."""
        if self.position_limit is not None and max_length > self.position_limit:
            raise ConfigError(
                f"train.max_length {max_length}, the base has {self.position_limit} positions",
                hint=f"Set train.max_length to {self.position_limit} or less.",
            )

    @property
    def position_limit(self) -> int | None:
        """The most tokens that the base can take at all; None where it has no such end."""
        return self.max_positions if self.positions in ("learnt", "table") else None

    def notes_for(self, max_length: int) -> tuple[str, ...]:
        """Return what is odd and no fault, of a base that is to train on texts of `max_length` tokens."""
        if self.max_positions is None or max_length <= self.max_positions:
            return self.notes
        return (*self.notes, f"train.max_length {max_length}, the base was made for {self.max_positions} positions")

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise RequirementError where a loaded tokenizer, whatever its files, has tokens without an embedding."""
        roles = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
        ids, special = tokenizer.get_vocab(), set(map(str, tokenizer.all_special_tokens))
        config, template = _read_object(self.folder / "config.json"), str(tokenizer.chat_template or "")
        written, _ = beyond(ids, roles, special, template, config, self.embedding_rows)
        if written:
            fault = _too_large(self.folder, self.embedding_rows, max(ids.values()) + 1, written)
            raise RequirementError(fault.message, hint=fault.hint)


def inspect(folder: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Return what the base model in a folder is, faults and all.

    Raises RequirementError where the folder holds no model that could be looked at: each reason has its own sentence.
    """
    require_files(folder)
    config = _read_object(folder / "config.json")
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    kind = str(config.get("model_type") or "")
    whole = find_architecture(kind)
    known = find_architecture(str(text.get("model_type") or kind)) or whole
    own_code = _own_code(config, whole)
    weights = Weights.read(folder)

    def setting(name: str) -> Any:
        return known.setting(text, name) if known else text.get(name)

    tokenizer = TokenizerFiles.read(folder)
    is_tied = config.get("tie_word_embeddings", setting("tie_word_embeddings"))
    positions = _positions(known, text, weights)
    num_linear, num_other = weights.counts()
    found = _Structure.of(folder, weights, known if text is config else None, config)
    rows = found.embedding_rows
    is_plain = bool(weights.shapes) and _quantization(config) is None
    targets = lora_targets().get(kind)
    draft = Inspection(
        folder=folder,
        kind=kind,
        architecture=next(iter(config.get("architectures") or []), None),
        is_causal=None if own_code else _why_not_causal(config, whole) is None,
        own_code=own_code,
        num_layers=_whole_number(setting("num_hidden_layers")),
        vocab_size=_whole_number(setting("vocab_size")),
        embedding_rows=rows,
        tokenizer_size=tokenizer.size,
        positions=positions,
        max_positions=_max_positions(kind, setting),
        dropouts=_dropouts(text, known),
        head="tied" if is_tied else "own" if is_tied is False else None,
        has_chat_template=tokenizer.chat_template is not None,
        lora_targets=tuple(targets) if isinstance(targets, list) else None,
        licence=_licence(folder),
        quantization=_quantization(config),
        num_parameters=num_linear + num_other if is_plain else None,
        memory=weights_memory(num_linear, num_other) if is_plain else {},
        missing=tuple(found.missing),
        unexpected=tuple(found.unexpected),
        reshaped=tuple(found.reshaped),
        uneven=tuple(found.uneven),
    )
    faults = [
        *_faults_of_kind(folder, config, whole, own_code, trust_remote_code),
        *found.faults,
        *tokenizer.faults(folder, config, rows, trusts_code=trust_remote_code),
    ]
    notes = tokenizer.notes(config, rows)
    return Inspection(**{**vars(draft), "faults": tuple(faults), "notes": tuple(notes)})


def chat_abilities(tokenizer: "PreTrainedTokenizerBase") -> ChatAbilities | None:
    """Return what a tokenizer's chat template writes, found by trying it; None where it has none."""
    if not tokenizer.chat_template:
        return None
    asked: dict[str, Any] = {"role": "user", "content": "fedcliasked"}
    told: dict[str, Any] = {"role": "assistant", "content": "fedclitold"}
    schema = {"type": "object", "properties": {}}
    function = {"name": "fedclitool", "description": "A tool.", "parameters": schema}

    def writes(word: str, *messages: dict[str, Any], times: int = 1, tools: list[Any] | None = None) -> bool:
        in_parts = [each | {"content": [{"type": "text", "text": each["content"]}]} for each in messages]
        for form in (list(messages), in_parts):  # templates of vision models read lists of parts, some of them alone
            with suppress(Exception):  # a template is a program of the model's publisher: it may raise anything
                if str(tokenizer.apply_chat_template(form, tools=tools, tokenize=False)).count(word) >= times:
                    return True
        return False

    return ChatAbilities(
        system=writes("fedclisystem", {"role": "system", "content": "fedclisystem"}, asked),
        tools=writes("fedclitool", asked, tools=[{"type": "function", "function": function}]),
        thoughts=writes("fedclithought", asked, told | {"reasoning_content": "fedclithought"}),
        several_turns=writes("fedclitold", asked, told, asked, told, times=2),
    )


# Files


def require_files(folder: Path) -> None:
    """Raise RequirementError where a path is no folder with a config.json, whole weights and nothing in their way."""

    def refuse(problem: str, hint: str) -> RequirementError:
        return RequirementError(f"base model not found: {folder} {problem}", hint=hint)

    layout = "Check model.base in fedcli.yaml: a folder in transformers' layout, or a hub id."
    ggufs = [folder] if folder.is_file() and folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if ggufs and (folder.is_file() or not has_weights):
        raise refuse(  # the place for loading it: transformers' gguf_file
            f"{'is' if folder.is_file() else 'holds'} a GGUF file, and fedcli loads transformers' layout",
            f"Convert it: `{_CONVERT.format(folder=ggufs[0].parent, name=ggufs[0].name)}`, and name OUT.",
        )
    if folder.is_file():
        raise refuse("is a file, and a base model is a folder", layout)
    if not folder.is_dir():
        raise refuse("does not exist", layout)
    has_config, has_adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if has_adapter and not (has_config and set(_weight_files(folder)) - {"adapter_model.safetensors"}):
        base = _read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        hint = f"Name its base as model.base{f' ({base})' if base else ''}, and start from it with adapter.init."
        raise refuse("is an adapter's folder, and does not hold config.json and weights of a base model", hint)
    if not has_config:
        raise refuse("does not hold config.json and weights", layout)
    if not has_weights:
        others = sorted(
            path.name for end in ("pth", "pt", "h5", "msgpack", "onnx", "ot") for path in folder.glob(f"*.{end}")
        )
        kinds = f"; {others[0]} is of another format" if others else ""
        raise refuse(f"does not hold config.json and weights (no *.safetensors, no *.bin){kinds}", layout)
    for name in ("config.json", *TOKENIZER_FILES, "*.safetensors", "*.bin", "*.index.json"):
        for path in sorted(folder.glob(name)):
            if _starts_with(path, _LFS):
                raise RequirementError(
                    f"the base model {folder} is not fetched: {path.name} is a git-lfs pointer",
                    hint=f"Run `git lfs pull` in {folder}, or fetch the model again.",
                )
    if has_adapter:
        raise RequirementError(
            f"the base model {folder} has an adapter_config.json beside its weights: transformers would load both",
            hint="Move adapter_config.json and adapter_model.* to a folder of their own; adapter.init may name that.",
        )
    if not _weight_files(folder):
        names = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise RequirementError(
            f"the base model {folder} has no model.safetensors and no model.safetensors.index.json; it holds {names}"
            if names
            else f"the base model {folder} has no pytorch_model.bin and no pytorch_model.bin.index.json",
            hint="Fetch or save the model again: transformers reads the weights that these files name.",
        )
    if gone := [name for name in _weight_files(folder) if not (folder / name).is_file()]:
        raise RequirementError(
            f"the base model {folder} is not whole: of its index's files {len(gone)} are not there ({_some(gone)})",
            hint="Fetch or copy the model again.",
        )

    for name in _weight_files(folder):
        path = folder / name
        if name.endswith(".bin") and _starts_with(path, b"PK") and not is_zipfile(path):
            raise RequirementError(
                f"the base model {folder} is not whole: {name} is cut off", hint="Fetch or copy that file again."
            )


_CONVERT = (
    "python -c \"from transformers import *; d, f = '{folder}', '{name}'; [c.from_pretrained(d, gguf_file=f)"
    ".save_pretrained('OUT') for c in (AutoModelForCausalLM, AutoTokenizer)]\""
)


def _starts_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files that transformers reads weights from, there or not; in its order."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            mapped = _read_object(index).get("weight_map")
            if not isinstance(mapped, dict):
                raise RequirementError(f"{index} holds no weight_map", hint="Fetch or copy the model again.")
            return sorted({str(name) for name in mapped.values()})
    return []


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; raise RequirementError where a file holds none."""
    try:
        document = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RequirementError(f"{path} cannot be read: {error}", hint="Fetch or copy the model again.") from error
    if not isinstance(document, dict):
        raise RequirementError(f"{path} holds no JSON object", hint="Fetch or copy the model again.")
    return document


@dataclass(frozen=True)
class Weights:
    """Names and shapes of a base's weights: shapes are empty where only an index tells the names, both for one .bin."""

    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def read(cls, folder: Path) -> "Weights":
        """Read safetensors' headers, or the index of .bin files.

        Raises RequirementError for a file that is not whole, or that lacks a tensor which the index places in it.
        """
        files = _weight_files(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        for name in files:
            if not name.endswith(".safetensors"):
                index = folder / "pytorch_model.bin.index.json"
                mapped = _read_object(index)["weight_map"] if index.is_file() and len(files) > 1 else {}
                return cls(frozenset(mapped), {})
            try:
                with safe_open(folder / name, "np") as file:
                    shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise RequirementError(
                    f"the base model {folder} is not whole: {name} is cut off, or no safetensors file ({error})",
                    hint="Fetch or copy that file again.",
                ) from error
        index = folder / "model.safetensors.index.json"
        if files != ["model.safetensors"] and index.is_file():
            gone = sorted(_read_object(index)["weight_map"].keys() - shapes.keys())
            if gone:
                raise RequirementError(
                    f"the base model {folder} is not whole: {len(gone)} of its index's weights are missing "
                    f"({_some(gone)})",
                    hint="Fetch or copy the model again.",
                )
        return cls(frozenset(shapes), shapes)

    def counts(self) -> tuple[int, int]:
        """Return the numbers of parameters of linear layers and of all else."""
        linear = other = 0
        for name, shape in self.shapes.items():
            size = 1
            for length in shape:
                size *= length
            if len(shape) > 1 and _LAYER.match(name):
                linear += size
            else:
                other += size
        return linear, other


# Kind


def _own_code(config: Mapping[str, Any], known: Architecture | None) -> str | None:
    """Return the file of a base's own code; None where transformers' own class is taken."""
    mapped = config.get("auto_map")
    named = mapped.get("AutoModelForCausalLM") if isinstance(mapped, dict) else None
    if named is None or (known is not None and known.causal_class is not None):
        return None
    return str(named).partition("--")[2].rpartition(".")[0] or str(named).rpartition(".")[0] + ".py"


def _why_not_causal(config: Mapping[str, Any], known: Architecture | None) -> str | None:
    """Return what a base is instead of a causal language model."""
    if known is None:
        return None
    name = str(next(iter(config.get("architectures") or []), known.name))
    if known.setting(config, "is_encoder_decoder"):
        return f"{name} is an encoder-decoder model"
    if known.causal_class is None:
        return f"{name} is no language model that transformers has a causal form of"
    if is_encoder(known.name) and not (config.get("is_decoder") or config.get("causal")):
        return f"{name} is an encoder, which reads a text in both directions"
    if config.get("is_causal") is False or config.get("use_bidirectional_attention") in (True, "all"):
        return f"config.json says that {name} reads a text in both directions"
    if _OTHER_HEADS.search(name):
        return f"{name} has a head of another task"
    return None


def _faults_of_kind(
    folder: Path, config: Mapping[str, Any], known: Architecture | None, own_code: str | None, trusts_code: bool
) -> Iterator[Fault]:
    another = "Choose a decoder, such as a Llama, Qwen, Gemma or GPT-2."
    if own_code is not None:
        if not trusts_code:
            yield Fault(
                f"the base model {folder} needs code of its own ({own_code}), and that may not run",
                "Read that code. If you trust it, set model.trust_remote_code to true; "
                "a joined party: `client join --trust-remote-code`.",
            )
    elif not config.get("model_type"):
        yield Fault(
            f"the base model {folder} cannot be told: its config.json has no model_type",
            "Fetch or save the model again; config.json of another library (params.json ...) will not do.",
        )
    elif known is None:
        yield Fault(
            f"the base model {folder} is of the architecture {str(config['model_type'])!r}, which the installed "
            f"transformers {version_of_transformers()} does not have",
            "Install a transformers that has it, or choose another base model.",
        )
    elif reason := _why_not_causal(config, known):
        yield Fault(f"the base model {folder} is no causal language model: {reason}", another)


# Structure


@dataclass
class _Structure:
    """What is certain about weights of an architecture whose layers are all alike."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    uneven: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    embedding_rows: int | None = None

    @classmethod
    def of(cls, folder: Path, weights: Weights, known: Architecture | None, config: Mapping[str, Any]) -> "_Structure":
        found = cls()
        at = known.layers_at if known else None
        hint = MISMATCH_CURE
        names = {name for name in weights.names if name.endswith((".weight", ".bias"))}
        embeddings = sorted((name for name in names if _EMBEDDINGS.search(name)), key=len)
        if embeddings and weights.shapes:
            found.embedding_rows = weights.shapes[embeddings[0]][0]
        if known is not None and at is not None and names:
            container, layers = _layers(names)
            if container is not None and container != at and container.endswith(f".{at}"):
                prefix = container.removesuffix(at)
                found.missing = [name.removeprefix(prefix) for name in sorted(names)]
                found.unexpected = sorted(names)
                hint = f"Save it again without its wrapper: the names of its weights begin with {prefix!r}."
            elif container in (at, at.partition(".")[2]):
                found._compare_layers(f"{container}.", layers, known, config, weights.shapes)
                found._check_ends(names, container == at, known, config)
            heads = sorted(name for name in names if re.search(r"(^|\.)(lm_head|embed_out)\.weight$", name))
            found._check_sizes([*embeddings[:1], *heads], known, config, weights.shapes)
        if found.missing or found.unexpected or found.reshaped or found.uneven:
            told = mismatch(folder, found.missing, found.reshaped, found.unexpected, found.uneven)
            found.faults.append(Fault(told, hint))
        return found

    def _compare_layers(
        self,
        prefix: str,
        layers: Mapping[int, frozenset[str]],
        known: Architecture,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Compare the layers with each other, and their number with config.json's."""
        number = _whole_number(known.setting(config, "num_hidden_layers"))
        if number is None:
            return
        is_quantized = _quantization(config) is not None  # layers that are not hold other tensors
        inner = Counter(name for names in layers.values() for name in names)
        usual = {name for name, count in inner.items() if 2 * count > len(layers)}
        rare = {name for name, count in inner.items() if 2 * count < len(layers)}
        for layer in range(number):
            lacking = usual - layers.get(layer, frozenset())
            self.missing += sorted(
                f"{prefix}{layer}.{name}" for name in lacking if layer not in layers or not is_quantized
            )
        for layer, names in sorted(layers.items()):
            odd = names if layer >= number else rare & names if not is_quantized else frozenset()
            modules = {name.rpartition(".")[0] for name in usual | names if name.endswith(".weight")}
            self.unexpected += sorted(
                f"{prefix}{layer}.{name}"
                for name in odd
                if name.endswith(".weight") or name.rpartition(".")[0] in modules
            )
        half = {name for name, count in inner.items() if 2 * count == len(layers)}
        if not is_quantized:
            here = sorted((layer, name) for layer, names in layers.items() for name in names & half)
            modules = {name.rpartition(".")[0] for name in inner if name.endswith(".weight")}
            self.uneven += [
                f"{prefix}{layer}.{name}"
                for layer, name in here
                if name.endswith(".weight") or name.rpartition(".")[0] in modules
            ]
        if shapes and not is_quantized:
            for name in sorted(usual):
                found = {layer: shapes[f"{prefix}{layer}.{name}"] for layer in sorted(layers) if name in layers[layer]}
                (shape, count), *_ = Counter(found.values()).most_common(1)
                if 2 * count > len(found):
                    self.reshaped += [
                        f"{prefix}{layer}.{name} is {list(other)} instead of {list(shape)}"
                        for layer, other in found.items()
                        if other != shape
                    ]

    def _check_ends(self, names: set[str], is_full: bool, known: Architecture, config: Mapping[str, Any]) -> None:
        """The output head of its own that config.json promises."""
        is_tied = known.setting(config, "tie_word_embeddings")
        if is_tied is False and not any(_HEADS.search(name) for name in names) and _quantization(config) is None:
            self.missing.append("embed_out.weight" if known.name == "gpt_neox" else "lm_head.weight")

    def _check_sizes(
        self,
        names: Sequence[str],
        known: Architecture,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Compare the rows of embedding and output head with config.json's vocab_size."""
        vocab_size = _whole_number(known.setting(config, "vocab_size"))
        if vocab_size is None or _quantization(config) is not None:
            return
        self.reshaped += [
            f"{name} has {shapes[name][0]} rows, vocab_size is {vocab_size}"
            for name in names
            if name in shapes and shapes[name][0] != vocab_size
        ]


def mismatch(
    folder: Path,
    missing: Sequence[str],
    reshaped: Sequence[str],
    unexpected: Sequence[str],
    uneven: Sequence[str] = (),
) -> str:
    """Return the sentence about weights that do not belong to their config.json."""
    faults = {
        "missing": missing,
        "of another shape": reshaped,
        "unexpected": unexpected,
        "in half of the layers": uneven,
    }
    found = "; ".join(f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names)
    return f"config.json and weights of the base model {folder} do not belong together: {found}"


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])


def _layers(names: Iterable[str]) -> tuple[str | None, dict[int, frozenset[str]]]:
    """Return where the layers lie, of several places the one with most of them, and each layer's names."""
    found: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := _LAYER.fullmatch(name):
            found[match["at"]][int(match["number"])].add(match["name"])
    if not found:
        return None, {}
    at = max(sorted(found), key=lambda each: len(found[each]))
    return at, {number: frozenset(inner) for number, inner in found[at].items()}


# Settings


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _quantization(config: Mapping[str, Any]) -> str | None:
    found = config.get("quantization_config")
    return str(found.get("quant_method") or "unknown") if isinstance(found, dict) else None


def _positions(known: Architecture | None, config: Mapping[str, Any], weights: Weights) -> Positions:
    name = known.name if known else ""
    if any(_POSITIONS.search(each) for each in weights.names) or name in _LEARNT_POSITIONS:
        return "learnt"
    if name in _POSITION_TABLES:
        return "table"
    if name == "bloom" or config.get("alibi") is True:
        return "alibi"
    rotary = {"rope_theta", "rope_scaling", "rope_parameters", "rotary_dim", "rotary_pct", "rotary_emb_base"}
    return "rotary" if rotary & (config.keys() | (known.defaults.keys() if known else set())) else "other"


def _max_positions(kind: str, setting: Callable[[str], Any]) -> int | None:
    found = _whole_number(setting("max_seq_len" if kind == "mpt" else "max_position_embeddings"))
    if found is not None and re.search("roberta|camembert|data2vec-text|xmod", kind):
        return found - 1 - (_whole_number(setting("pad_token_id")) or 0)  # the first positions are those of padding
    return found


def _dropouts(config: Mapping[str, Any], known: Architecture | None) -> dict[str, float]:
    settings = {**(known.defaults if known else {}), **config}
    return {
        name: float(value)
        for name, value in sorted(settings.items())
        if re.search(r"drop(out)?(_|$)|pdrop$|layerdrop$", name)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in ("classifier_dropout", "summary_first_dropout")
    }


def _licence(folder: Path) -> str | None:
    """Return the licence that a model card's header names, or the first line of a LICENSE file."""
    for path in (folder / "README.md", *sorted(folder.glob("LICEN[CS]E*"))):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")[:20_000]
        if path.name == "README.md":
            if text.startswith("---") and (match := re.search(r"(?m)^licen[cs]e:[ \t]*(\S.*)$", text)):
                return match[1].strip("\"' ")
        elif line := next((line.strip() for line in text.splitlines() if line.strip()), None):
            return line
    return None


# Tokenizer


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files of a tokenizer say, without a tokenizer being made of them."""

    names: tuple[str, ...]
    ids: Mapping[str, int]
    """Of all tokens, or of the added ones alone where the others lie in a binary file."""
    special: frozenset[str]
    roles: Mapping[str, str]
    """pad_token, eos_token, image_token ... -> the token."""
    chat_template: str | None
    has_own_code: bool

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """Read them; raise RequirementError for one that is not JSON."""
        names = [path.name for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern))]
        ids: dict[str, int] = {}
        special: set[str] = set()
        added: list[Any] = []
        if "tokenizer.json" in names:
            document = _read_object(folder / "tokenizer.json")
            model = document.get("model")
            vocab = model.get("vocab") if isinstance(model, dict) else None
            if isinstance(vocab, dict):
                ids |= vocab
            elif isinstance(vocab, list):  # Unigram: [token, score]
                ids |= {str(entry[0]): number for number, entry in enumerate(vocab)}
            added += document.get("added_tokens") or []
        elif "vocab.json" in names:
            ids |= _read_object(folder / "vocab.json")
        elif "vocab.txt" in names:
            lines = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            ids |= {line: number for number, line in enumerate(lines)}
        config = _read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            added += [{**entry, "id": int(number)} for number, entry in decoder.items() if isinstance(entry, dict)]
        if (folder / "added_tokens.json").is_file():
            added += [
                {"content": token, "id": number} for token, number in _read_object(folder / "added_tokens.json").items()
            ]
        for entry in added:
            if isinstance(entry, dict) and isinstance(entry.get("id"), int):
                ids[str(entry.get("content"))] = entry["id"]
                special |= {str(entry.get("content"))} if entry.get("special") else set()
        mapped = folder / "special_tokens_map.json"
        settings = {**(_read_object(mapped) if mapped.is_file() else {}), **config}
        roles = {}
        for role, value in settings.items():
            token = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(token, str):
                roles[role] = token
        template: Any = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        elif isinstance(template, list):  # several, by name
            template = next((each.get("template") for each in template if each.get("name") == "default"), None)
        code = isinstance(config.get("auto_map"), dict)
        text = template if isinstance(template, str) else None
        return cls(tuple(names), ids, frozenset(special), roles, text, code)

    @property
    def size(self) -> int | None:
        """The largest id and one."""
        return max(self.ids.values()) + 1 if self.ids else None

    def beyond(self, config: Mapping[str, Any], rows: int | None) -> tuple[list[str], list[str]]:
        """Return tokens without an embedding: those that a text may hold, and those that none ever does.

        The second are the token that pads, and special tokens that stand for images or sounds.
        """
        return beyond(self.ids, self.roles, self.special, self.chat_template or "", config, rows)

    def faults(
        self, folder: Path, config: Mapping[str, Any], rows: int | None, *, trusts_code: bool
    ) -> Iterator[Fault]:
        """Yield why the tokenizer will not do."""
        if not self.names and not (trusts_code and self.has_own_code):
            yield Fault(
                f"the base model {folder} has no tokenizer: it holds none of {', '.join(TOKENIZER_FILES)}",
                "Fetch the model again with its tokenizer, or copy the tokenizer's files into the folder.",
            )
        written, _ = self.beyond(config, rows)
        if written:
            yield _too_large(folder, rows, self.size, written)

    def notes(self, config: Mapping[str, Any], rows: int | None) -> list[str]:
        """Return what is odd about the tokenizer, and harmless."""
        _, unwritten = self.beyond(config, rows)
        return [
            f"the tokenizer's {token!r} (id {self.ids[token]}) has no embedding; no text holds it, and padding takes "
            "another id"
            for token in unwritten
        ]


def _too_large(folder: Path, rows: int | None, size: int | None, tokens: Sequence[str]) -> Fault:
    return Fault(
        f"the base model {folder} has an embedding of {rows} tokens, and its tokenizer has {size}: "
        f"{len(tokens)} without an embedding ({_some(tokens)})",
        "Take these tokens out of the tokenizer, or resize the embedding and train it: "
        "model.resize_token_embeddings(len(tokenizer)).",
    )


def beyond(
    ids: Mapping[str, int],
    roles: Mapping[str, str],
    special: Collection[str],
    chat_template: str,
    config: Mapping[str, Any],
    rows: int | None,
) -> tuple[list[str], list[str]]:
    """Return `TokenizerFiles.beyond` of any tokenizer's ids."""
    if rows is None:
        return [], []
    written: list[str] = []
    unwritten: list[str] = []
    media = {
        value for key, value in config.items() if re.search(r"(image|video|audio|boi|eoi)_token(_id|_index)$", key)
    }
    in_text = {roles[role] for role in _TEXT_TOKENS if role in roles}
    elsewhere = {token for role, token in roles.items() if role not in _TEXT_TOKENS}
    for token in sorted((token for token, number in ids.items() if number >= rows), key=ids.__getitem__):
        is_other = token in elsewhere or (token in special and (ids[token] in media or _PAD.fullmatch(token)))
        is_padding = token == roles.get("pad_token")
        is_written = token in in_text or not is_other or (token in chat_template and not is_padding)
        (written if is_written else unwritten).append(token)
    return written, unwritten
