"""From rows to token ids: the boundary between prompt and response, the end token, and what is cut or unusable.

The tokenizers are made here, one for each family that base models come with.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import sides
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedcli.data.encoded import EncodedExample
from fedcli.data.encoding import Encoder, encode_source
from fedcli.data.formats import RowReader
from fedcli.data.source import Source
from fedcli.data.templates import alpaca
from fedcli.errors import RequirementError
from fedcli.tasks.conversation import Turn, instruct

TEXTS = [
    alpaca("name the colour of the sky at noon") + " the sky is blue at noon, of course.",
    alpaca("add one and two: what comes out?") + " three",
    "red green blue yellow one two three",
] * 20
RESPONSES = ["blue", "the sky is blue", "  two  ", "x", "three\none\n", "Blue, of course.", "\n\nyellow: red", "zebra!"]
EXAMPLES = [instruct(f"add {number} to the sky", response) for number, response in enumerate(RESPONSES)]


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", clean_up_tokenization_spaces=False, **special
    )


def byte_level(*, starts: bool = False, merges_all: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind; with `starts` it puts <s> in front as Llama 3's does, with `merges_all` no word ends a merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges_all)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([": x", ": b"] * 500 if merges_all else TEXTS, trainer)
    if starts:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace(model: str, scheme: str) -> PreTrainedTokenizerFast:
    """Sentencepiece's kind, as Llama 2, Gemma and T5 have it: a space is the letter U+2581."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.Unigram() if model == "unigram" else models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    alphabet = sorted(set("".join([*TEXTS, *RESPONSES, "0123456789"])))
    trainer = (
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", initial_alphabet=alphabet, show_progress=False
        )
        if model == "unigram"
        else trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", tokenizer.token_to_id("</s>"))]
    )
    return wrapped(tokenizer, bos_token="<s>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind: no eos_token, and [CLS] and [SEP] around a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["<pad>", "<unk>", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *RESPONSES, "0 1 2 3 4 5 6 7 8 9"], trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return wrapped(tokenizer, cls_token="[CLS]", sep_token="[SEP]")


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level with <s>": lambda: byte_level(starts=True),
    "byte-level that merges across words": lambda: byte_level(merges_all=True),
    "unigram, always a space in front": lambda: metaspace("unigram", "always"),
    "unigram, a space in front of the first": lambda: metaspace("unigram", "first"),
    "metaspace BPE, always a space in front": lambda: metaspace("bpe", "always"),
    "metaspace BPE, a space in front of the first": lambda: metaspace("bpe", "first"),
    "word piece": word_piece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level()


def asked(instruction: str) -> tuple[Turn, ...]:
    return (Turn("user", instruction),)


def one(tokenizer: PreTrainedTokenizerFast, instruction: str, response: str, max_length: int = 512) -> EncodedExample:
    (example,) = sides(Encoder(tokenizer).encode([instruct(instruction, response)], max_length))
    return example


def letters(text: str) -> str:
    return "".join(text.split())


def test_the_prompt_in_training_is_the_prompt_in_generation(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(EXAMPLES, 512)
    assert (len(encoded), encoded.num_truncated, encoded.left_out.total()) == (len(EXAMPLES), 0, 0)
    for example, row in zip(EXAMPLES, sides(encoded), strict=True):
        assert row.ids[: row.prompt_length].tolist() == encoder.prompts([example.prompt])[0]


def test_the_prompt_starts_as_the_tokenizer_starts_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    whole = tokenizer(alpaca("name the sky"))["input_ids"]
    start = whole[: len(encoder.start_ids)]
    prompt = encoder.prompts([asked("name the sky")])[0]
    assert prompt == whole[: len(prompt)]
    assert encoder.start_ids == start
    assert tokenizer.convert_ids_to_tokens(start) in ([], ["<s>"], ["[CLS]"])


def test_what_is_supervised_is_the_response_and_one_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoder.end_id) in ("</s>", "[SEP]")
    for example, row in zip(EXAMPLES, sides(encoder.encode(EXAMPLES, 512)), strict=True):
        supervised = row.ids[row.prompt_length :].tolist()
        assert row.supervised.tolist() == [False] * row.prompt_length + [True] * len(supervised)
        assert supervised[-1] == encoder.end_id
        assert row.ids.tolist().count(encoder.end_id) == 1
        response = example.response.lower() if tokenizer.sep_token else example.response  # BERT's is uncased
        assert tokenizer.unk_token_id not in supervised
        assert letters(tokenizer.decode(supervised[:-1])) == letters(response)


def test_a_response_begins_behind_a_space_and_keeps_its_own(plain: PreTrainedTokenizerFast) -> None:
    for response in RESPONSES:
        row = one(plain, "name it", response)
        assert plain.decode(row.ids[row.prompt_length : -1]) == " " + response


def test_a_tokenizer_that_merges_across_the_boundary_gets_prompt_and_response_apart() -> None:
    tokenizer = byte_level(merges_all=True)
    before = tokenizer(alpaca("name it"))["input_ids"]
    joint = tokenizer(alpaca("name it") + " x")["input_ids"]
    assert joint[: len(before)] != before  # else this test would prove nothing
    row = one(tokenizer, "name it", "x")
    assert row.ids.tolist() == [*before, *tokenizer(" x")["input_ids"], tokenizer.eos_token_id]


def test_a_response_that_does_not_fit_is_cut_and_has_no_end(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer)
    example = instruct("name it", "blue red green three")
    (whole,) = sides(encoder.encode([example], 512))
    for max_length in range(whole.prompt_length + 1, len(whole.ids)):
        encoded = encoder.encode([example], max_length)
        assert (encoded.num_truncated, encoded.left_out.total()) == (1, 0)
        (cut,) = sides(encoded)
        assert cut.ids.tolist() == whole.ids[:max_length].tolist()
        assert cut.prompt_length == whole.prompt_length
        assert encoder.end_id not in cut.ids
    assert encoder.encode([example], len(whole.ids)).num_truncated == 0
    too_short = encoder.encode([example], whole.prompt_length)
    assert (list(too_short), too_short.num_truncated, too_short.left_out.total()) == ([], 0, 1)


@pytest.mark.parametrize("response", ["", " ", "\n\t", "\u3000"])
def test_an_empty_or_blank_response_is_unusable(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, response: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": "name it", "output": text}) + "\n" for text in (response, "blue"))
    )
    encoded = encode_source(Encoder(tokenizer), RowReader("alpaca"), Source(path), 512)
    assert (len(encoded), encoded.num_truncated, encoded.left_out) == (1, 0, {"empty response": 1})
    assert sides(encoded)[0].ids.tolist() == one(tokenizer, "name it", "blue").ids.tolist()


def test_no_rows_give_no_examples(plain: PreTrainedTokenizerFast) -> None:
    encoded = Encoder(plain).encode([], 512)
    assert (list(encoded), encoded.num_truncated, encoded.left_out.total()) == ([], 0, 0)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(RequirementError, match="no end-of-sequence token") as caught:
        Encoder(tokenizer)
    assert caught.value.exit_code == 8
    assert "eos_token" in caught.value.hint


@given(instruction=st.text(max_size=30), response=st.text(max_size=30), room=st.integers(-3, 40))
def test_any_text_keeps_its_prompt_whole_and_its_response_as_it_is(
    plain: PreTrainedTokenizerFast, instruction: str, response: str, room: int
) -> None:
    encoder = Encoder(plain)
    prompt = encoder.prompts([asked(instruction)])[0]
    max_length = len(prompt) + room
    encoded = encoder.encode([instruct(instruction, response)], max_length)
    assert len(encoded) + encoded.left_out.total() == 1
    if encoded.left_out.total():
        assert room <= 0
        return
    (row,) = sides(encoded)
    supervised = row.ids[row.prompt_length :].tolist()
    assert row.ids[: row.prompt_length].tolist() == prompt
    assert 1 <= len(supervised) <= room
    assert supervised.count(encoder.end_id) == 1 - encoded.num_truncated
    if not encoded.num_truncated:
        assert plain.decode(supervised[:-1]) == " " + response


def test_a_response_that_spells_the_end_token_has_one_end_all_the_same(plain: PreTrainedTokenizerFast) -> None:
    # A row about markup must not teach the model to stop at the word "write".
    row = one(plain, "name it", "write </s> to stop")
    assert row.ids.tolist().count(plain.eos_token_id) == 1
    assert plain.decode(row.ids[row.prompt_length : -1]) == " write </s> to stop"
