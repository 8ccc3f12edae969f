"""Tokenizers of every family that base models come with, trained on the spot, and how to read their ids back."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedcli.data.encoded import EncodedExample
from fedcli.tasks.conversation import Turn

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False, **special
    )


def byte_level(texts: Iterable[str], *, starts: bool = False, merges_all: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind; with `starts` Llama 3's, which puts <s> in front; with `merges_all` no word ends a merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not (merges_all or starts))
    if starts:
        words = pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace(texts: list[str], model: str, scheme: str, *, merges_all: bool = False) -> PreTrainedTokenizerFast:
    """Sentencepiece's kind, as Llama 2, Gemma and T5 have it: a space is the letter U+2581.

    With `scheme` always there is a space in front of every text, with first only of what begins a whole text. As with
    sentencepiece no token spans lines; with `merges_all` some do.
    """
    tokenizer = Tokenizer(models.Unigram() if model == "unigram" else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=not merges_all)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    options = {"special_tokens": SPECIAL, "initial_alphabet": sorted(set("".join(texts))), "show_progress": False}
    trainer = (
        trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **options)
        if model == "unigram"
        else trainers.BpeTrainer(vocab_size=600, **options)
    )
    lines = [line for text in texts for line in text.split("\n")]
    tokenizer.train_from_iterator(texts if merges_all else lines, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>")


def word_piece(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """BERT's kind: uncased, no eos_token, and [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=800, special_tokens=[*SPECIAL, "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return _wrapped(tokenizer, cls_token="[CLS]", sep_token="[SEP]")


KINDS: dict[str, Callable[[list[str]], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level with <s>": lambda texts: byte_level(texts, starts=True),
    "byte-level that merges across words": lambda texts: byte_level(texts, merges_all=True),
    "unigram, always a space in front": lambda texts: metaspace(texts, "unigram", "always"),
    "unigram, a space in front of the first": lambda texts: metaspace(texts, "unigram", "first"),
    "metaspace BPE, always a space in front": lambda texts: metaspace(texts, "bpe", "always"),
    "metaspace BPE, a space in front of the first": lambda texts: metaspace(texts, "bpe", "first"),
    "metaspace BPE that merges across words": lambda texts: metaspace(texts, "bpe", "first", merges_all=True),
    "word piece": word_piece,
}


def with_every_kind(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the cases with every kind of tokenizer, its name in front.

    By default the cases of the first template (their first value) run with every kind, and all cases with the first
    kind; the rest of the product is slow.
    """
    kind_of_all, template_of_all = next(iter(KINDS)), cases[0][0]
    return [
        pytest.param(kind, *case, marks=[] if kind == kind_of_all or case[0] == template_of_all else pytest.mark.slow)
        for kind in KINDS
        for case in cases
    ]


def is_metaspace(tokenizer: PreTrainedTokenizerFast) -> bool:
    return isinstance(tokenizer.backend_tokenizer.decoder, decoders.Metaspace)


def is_lossless(tokenizer: PreTrainedTokenizerFast) -> bool:
    return tokenizer.sep_token is None


def read_back(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """Return what ids say, without the decoder's habit of dropping a first space."""
    if is_metaspace(tokenizer):
        return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("\u2581", " ")
    return tokenizer.decode(ids)


def normalised(tokenizer: PreTrainedTokenizerFast, text: str, *, parses_special: bool = False) -> str:
    """Return the text that a tokenizer can give back of a text: all of it, but for word piece."""
    if is_lossless(tokenizer):
        return text
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=not parses_special)["input_ids"]
    return tokenizer.decode(ids)


def merges(tokenizer: PreTrainedTokenizerFast, prompt: str, rest: str) -> bool:
    """Whether a prompt has other tokens where the rest of the text follows it."""
    alone, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + rest))
    return whole[: len(alone)] != alone


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that are supervised, or not."""

    ids: list[int]
    is_supervised: bool


def stretches(example: EncodedExample) -> list[Stretch]:
    pairs = zip(example.ids.tolist(), example.supervised.tolist(), strict=True)
    return [Stretch([token for token, _ in group], key) for key, group in groupby(pairs, key=lambda pair: pair[1])]


def turns_of(*texts: str, system: str | None = None) -> tuple[Turn, ...]:
    """Return the turns of user and assistant, one after the other."""
    spoken = [Turn("assistant" if position % 2 else "user", text) for position, text in enumerate(texts)]
    return (*([] if system is None else [Turn("system", system)]), *spoken)


MARKERS = (
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: USER: {system} ASSISTANT: A: x"
    "</s><s><pad><|im_start|>assistant\n<|im_end|>\n"
)
CONVERSATIONS: dict[str, tuple[Turn, ...]] = {
    "one turn": turns_of("What colour is the sky at noon?", "The sky is blue."),
    "an input": (Turn("user", "Add them.", "1 and 2"), Turn("assistant", "three")),
    "a system turn": turns_of("What is it?", "Blue.", system="Answer in one word."),
    "an empty system turn": turns_of("What is it?", "Blue.", system=""),
    "five turns": turns_of("Name one.", "Red.", "Another?", "Green, of course.", system="You name colours."),
    "nine turns": turns_of(*[f"{word} {n}?" for n in range(1, 5) for word in ("and", "so")], system="Be brief."),
    "unicode": turns_of("Wie heißt 東京? 🏳️‍🌈", "東京 — Tōkyō, e\u0301té, 🏳️‍🌈\u200b\u00a0\u2028 ذهب"),
    "markers": turns_of(MARKERS, "stop" + MARKERS, "again " + MARKERS, MARKERS + "end", system=MARKERS),
    "newlines in front": turns_of("Write it.", "\n\nBlue.", "Again.", "\nBlue.\n\n"),
    "spaces in front": turns_of("Write it.", "  Blue.  ", "Again.", " Blue. "),
    "punctuation in front": turns_of("Write it.", ": x", "Again.", "):, x:"),
    "50,000 characters": turns_of("Write a lot.", "blue sky, \n" * 4545 + "green"),
}
