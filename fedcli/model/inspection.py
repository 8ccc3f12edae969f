"""What a base model is, as its files say: config.json, the tokenizer's files, names and shapes of weights.

Neither torch nor transformers is imported and no weight is read, so that a base that will not do is refused at once.
Only what is certain is a fault here; `loading.load_whole` tells the rest, when transformers makes the model.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedcli.errors import ConfigError, RequirementError
from fedcli.model.architectures import (
    Architecture,
    find_architecture,
    is_encoder,
    version_of_transformers,
)
from fedcli.model.base_files import Fault, Weights, read_object, require_files
from fedcli.model.memory_estimate import weights_memory
from fedcli.model.stored_quantization import faults_of_quantization, quantization_of
from fedcli.model.tokenizer_files import ChatAbilities, TokenizerFiles, beyond, too_large
from fedcli.model.weight_structure import Structure, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|positions_embed|position_embeddings)\.weight$")
_OTHER_HEADS = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|MaskedLM|NextSentencePrediction"
    r"|PreTraining|RewardModel\w*)$"
)
_LEARNT_POSITIONS = {"biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt"}
_POSITION_TABLES = {"codegen", "ctrl", "gptj", "mpt"}
"""Architectures whose rotary, sinusoidal or ALiBi positions end with a table."""

Positions = Literal["learnt", "table", "rotary", "alibi", "other"]


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
    lora_targets: tuple[str, ...] | None = None
    """The layers that LoRA adapts by default, told by a model that was made: `targets_of`."""
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
        if "unk_token" in roles:  # of its files' own it is known already; its class may bring one that no text needs
            roles["other_token"] = roles.pop("unk_token")
        ids, special = tokenizer.get_vocab(), set(map(str, tokenizer.all_special_tokens))
        config, template = read_object(self.folder / "config.json"), str(tokenizer.chat_template or "")
        written, _ = beyond(ids, roles, special, template, config, self.embedding_rows)
        if written:
            fault = too_large(self.folder, self.embedding_rows, max(ids.values()) + 1, written)
            raise RequirementError(fault.message, hint=fault.hint)


def inspect(folder: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Return what the base model in a folder is, faults and all.

    Raises RequirementError where the folder holds no model that could be looked at: each reason has its own sentence.
    """
    require_files(folder)
    config = read_object(folder / "config.json")
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    kind = str(config.get("model_type") or "")
    whole = find_architecture(kind)
    known = find_architecture(str(text.get("model_type") or kind)) or whole
    own_code = _own_code(config, whole, trusts_code=trust_remote_code)
    weights = Weights.read(folder)

    def setting(name: str) -> Any:
        return known.setting(text, name) if known else text.get(name)

    tokenizer = TokenizerFiles.read(folder)
    is_tied = config.get("tie_word_embeddings", setting("tie_word_embeddings"))
    positions = _positions(known, text, weights)
    num_linear, num_other = weights.counts()
    found = Structure.of(folder, weights, known if text is config and own_code is None else None, config)
    rows = found.embedding_rows
    is_plain = bool(weights.shapes) and quantization_of(config) is None
    draft = Inspection(
        folder=folder,
        kind=kind,
        architecture=next(iter(config.get("architectures") or []), None),
        is_causal=None if own_code else _why_not_causal(config, whole) is None,
        own_code=own_code,
        num_layers=whole_number(setting("num_hidden_layers")),
        vocab_size=whole_number(setting("vocab_size")),
        embedding_rows=rows,
        tokenizer_size=tokenizer.size,
        positions=positions,
        max_positions=_max_positions(kind, setting),
        dropouts=_dropouts(text, known),
        head="own" if is_tied is False or found.has_two_heads else "tied" if is_tied else None,
        has_chat_template=tokenizer.chat_template is not None,
        licence=_licence(folder),
        quantization=quantization_of(config),
        num_parameters=num_linear + num_other if is_plain else None,
        memory=weights_memory(num_linear, num_other) if is_plain else {},
        missing=tuple(found.missing),
        unexpected=tuple(found.unexpected),
        reshaped=tuple(found.reshaped),
        uneven=tuple(found.uneven),
    )
    faults = [
        *_faults_of_kind(folder, config, whole, own_code, trust_remote_code),
        *faults_of_quantization(folder, config, weights),
        *found.faults,
        *tokenizer.faults(folder, config, rows, trusts_code=trust_remote_code),
    ]
    notes = tokenizer.notes(config, rows)
    if is_tied and found.has_two_heads:
        notes.append("config.json ties the output head to the embedding, and the weights hold two, which are both used")
    return Inspection(**{**vars(draft), "faults": tuple(faults), "notes": tuple(notes)})


def _own_code(config: Mapping[str, Any], known: Architecture | None, *, trusts_code: bool) -> str | None:
    """Return the file of a base's own code; None where transformers' own class is taken, as it is without trust."""
    mapped = config.get("auto_map")
    named = mapped.get("AutoModelForCausalLM") if isinstance(mapped, dict) else None
    if named is None or (not trusts_code and known is not None and known.causal_class is not None):
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
    found = whole_number(setting("max_seq_len" if kind == "mpt" else "max_position_embeddings"))
    if found is not None and re.search("roberta|camembert|data2vec-text|xmod", kind):
        return found - 1 - (whole_number(setting("pad_token_id")) or 0)  # the first positions are those of padding
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
