"""The tokenizer of a base model: whether its embedding has all tokens, and what its chat template writes."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcli.data.template_errors import describe_template_error
from fedcli.data.template_limits import limited
from fedcli.errors import FedError
from fedcli.model.base_files import TOKENIZER_FILES, Fault, read_object, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAD = re.compile(r"[<\[|]*pad[>\]|]*", re.IGNORECASE)
_TEXT_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatAbilities:
    """What a chat template writes of what it is given; what it does not write is lost."""

    system: bool
    tools: bool
    thoughts: bool
    """Of the last response, given as `reasoning_content`."""
    several_turns: bool
    error: str | None = None
    """Why it writes not even a question, with the template's line; None where it writes one."""


def chat_abilities(tokenizer: "PreTrainedTokenizerBase") -> ChatAbilities | None:
    """Return what a tokenizer's chat template writes, found by trying it; None where it has none.

    Raises ConfigError where it does not end.
    """
    if not tokenizer.chat_template:
        return None
    asked: dict[str, Any] = {"role": "user", "content": "fedcliasked"}
    told: dict[str, Any] = {"role": "assistant", "content": "fedclitold"}
    schema = {"type": "object", "properties": {}}
    function = {"name": "fedclitool", "description": "A tool.", "parameters": schema}

    errors: list[str] = []

    def writes(word: str, *messages: dict[str, Any], times: int = 1, tools: list[Any] | None = None) -> bool:
        in_parts = [each | {"content": [{"type": "text", "text": each["content"]}]} for each in messages]
        for form in (list(messages), in_parts):  # templates of vision models read lists of parts, some of them alone
            render = partial(tokenizer.apply_chat_template, form, tools=tools, tokenize=False)
            try:
                if str(limited(tokenizer, render)).count(word) >= times:
                    return True
            except FedError:
                raise
            except Exception as error:  # a template is a program of the model's publisher: it may raise anything
                errors.append(describe_template_error(error))
        return False

    system = {"role": "system", "content": "fedclisystem"}
    answers = writes("fedcliasked", asked) or writes("fedcliasked", asked, told) or writes("fedcliasked", system, asked)
    error = errors[0] if errors and not answers else None

    return ChatAbilities(
        system=writes("fedclisystem", system, asked),
        tools=writes("fedclitool", asked, tools=[{"type": "function", "function": function}]),
        thoughts=writes("fedclithought", asked, told | {"reasoning_content": "fedclithought"}),
        several_turns=writes("fedclitold", asked, told, asked, told, times=2),
        error=error,
    )


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
        needs_unknown = True
        if "tokenizer.json" in names:
            document = read_object(folder / "tokenizer.json")
            found = document.get("model")
            model: dict[str, Any] = found if isinstance(found, dict) else {}
            is_of_bytes = "ByteLevel" in str(document.get("decoder"))  # as bytes all is known
            needs_unknown = model.get("type") != "BPE" or (model.get("unk_token") is not None and not is_of_bytes)
            vocab = model.get("vocab")
            if isinstance(vocab, dict):
                ids |= vocab
            elif isinstance(vocab, list):  # Unigram: [token, score]
                ids |= {str(entry[0]): number for number, entry in enumerate(vocab)}
            added += document.get("added_tokens") or []
        elif "vocab.json" in names:
            ids |= read_object(folder / "vocab.json")
        elif "vocab.txt" in names:
            lines = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
            ids |= {line: number for number, line in enumerate(lines)}
        config = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            added += [{**entry, "id": int(number)} for number, entry in decoder.items() if isinstance(entry, dict)]
        if (folder / "added_tokens.json").is_file():
            added += [
                {"content": token, "id": number} for token, number in read_object(folder / "added_tokens.json").items()
            ]
        for entry in added:
            if isinstance(entry, dict) and isinstance(entry.get("id"), int):
                ids[str(entry.get("content"))] = entry["id"]
                special |= {str(entry.get("content"))} if entry.get("special") else set()
        mapped = folder / "special_tokens_map.json"
        settings = {**(read_object(mapped) if mapped.is_file() else {}), **config}
        roles: dict[str, str] = {}
        for role, value in settings.items():
            token = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(token, str):
                roles["other_token" if role == "unk_token" and not needs_unknown else role] = token
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
            yield too_large(folder, rows, self.size, written)

    def notes(self, config: Mapping[str, Any], rows: int | None) -> list[str]:
        """Return what is odd about the tokenizer, and harmless."""
        _, unwritten = self.beyond(config, rows)
        return [
            f"the tokenizer's {token!r} (id {self.ids[token]}) has no embedding; no text holds it, and padding takes "
            "another id"
            for token in unwritten
        ]


def too_large(folder: Path, rows: int | None, size: int | None, tokens: Sequence[str]) -> Fault:
    """Return what is wrong with tokens that have no embedding."""
    return Fault(
        f"the base model {folder} has an embedding of {rows} tokens, and its tokenizer has {size}: "
        f"{len(tokens)} without an embedding ({some(tokens)})",
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
