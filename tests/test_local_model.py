"""What a model on this machine answers: the same whatever the batch, and the same as transformers by itself."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.chat_templates import CHATML
from support.tokenizer_kinds import KINDS, byte_level, is_lossless

from fedcli.config import CustomTemplate
from fedcli.data.encoding import Encoder
from fedcli.errors import RequirementError
from fedcli.eval.local_model import LocalModel
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood
from fedcli.model.base import find_base
from fedcli.model.loading import load_base
from fedcli.tasks.conversation import Turn

TEXT = "the river rises when rain falls on the hills and what is the alert level of a storm near the coast"
WORDS = TEXT.split()
CONTEXT = 1024
"""Tokens that the built-in model takes."""


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """The built-in model and its tokenizer."""
    model, tokenizer = load_base(find_base("builtin:tiny", revision=None, root=Path()), trust_remote_code=False)
    return model.eval(), tokenizer


def local(tiny: tuple[Any, Any], batch_size: int | None = None, template: str = "alpaca") -> LocalModel:
    model, tokenizer = tiny
    return LocalModel(model, tokenizer, Encoder(tokenizer, template), batch_size=batch_size)


def generated(engine: LocalModel, requests: Sequence[Generation]) -> list[str]:
    """Return the answers in the requests' order; each must be told once."""
    answers: dict[int, str] = {}

    def hear(index: int, text: str) -> None:
        assert index not in answers
        answers[index] = text

    engine.generate(requests, hear)
    return [answers[index] for index in range(len(requests))]


def scored(engine: LocalModel, requests: Sequence[Likelihood]) -> list[LogLikelihood]:
    answers: dict[int, LogLikelihood] = {}
    engine.log_likelihoods(requests, answers.__setitem__)
    return [answers[index] for index in range(len(requests))]


def sentence(number: int) -> str:
    """Return a text of its own, of one word to a hundred."""
    return " ".join(WORDS[(number * 7 + position) % len(WORDS)] for position in range(number + 1))


def prompts() -> list[Any]:
    """Return a hundred prompts, every other one of turns."""
    return [sentence(n) if n % 2 else (Turn("user", sentence(n)),) for n in range(100)]


def full_logits(model: Any, ids: Sequence[int], num_tokens: int) -> LogLikelihood:
    """Return the log-likelihood of the last tokens, from the logits of all positions."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, -num_tokens - 1 : -1].float().log_softmax(-1).double()
    targets = torch.tensor(ids[-num_tokens:])
    found = log_probs.gather(-1, targets[:, None]).sum()
    return LogLikelihood(float(found), bool((log_probs.argmax(-1) == targets).all()), num_tokens)


def same(found: LogLikelihood, expected: LogLikelihood) -> bool:
    return (found.is_greedy, found.num_tokens) == (expected.is_greedy, expected.num_tokens) and (
        found.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
    )


def test_greedy_answers_do_not_depend_on_the_batch(tiny) -> None:
    requests = [Generation(prompt, 8) for prompt in prompts()]
    one, three, all_at_once = (generated(local(tiny, size), requests) for size in (1, 3, 64))
    assert one == three == all_at_once
    assert len(set(one)) > 10


@pytest.mark.parametrize(
    ("seconds", "temperature", "expected"),
    [(1e9, 0.0, [4, 16, 64, 16]), (0.0, 0.0, [4] + [1] * 96), (0.0, 0.7, [8] * 12 + [4])],
    ids=["quick ones grow", "slow ones shrink to one item", "sampled ones stay: their answers depend on them"],
)
def test_batches_are_bounded_by_time_and_their_answers_are_told_one_batch_after_another(
    tiny, monkeypatch: pytest.MonkeyPatch, seconds: float, temperature: float, expected: list[int]
) -> None:
    monkeypatch.setattr("fedcli.eval.batches.BATCH_SECONDS", seconds)
    sizes: list[int] = []
    model, _ = tiny

    def watch(_module, inputs) -> None:
        if not told or told[-1] is not None:  # the first pass of a batch
            sizes.append(len(inputs[0]))
            told.append(None)

    told: list[int | None] = []
    watched = model.get_input_embeddings().register_forward_pre_hook(watch)
    try:
        requests = [Generation(f"{n} {sentence(n)}", 2, temperature=temperature) for n in range(100)]
        local(tiny).generate(requests, lambda index, _: told.append(index))
    finally:
        watched.remove()
    assert sizes == expected
    assert sorted(index for index in told if index is not None) == list(range(100))


def test_greedy_answers_are_those_of_transformers(tiny) -> None:
    model, tokenizer = tiny
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts()[1::20]]
    expected = []
    for row in ids:
        rest = model.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False)[0, len(row) :]
        expected.append(tokenizer.decode(rest, skip_special_tokens=True))
    assert generated(local(tiny), [Generation(prompt, 12) for prompt in prompts()[1::20]]) == expected


def test_likelihoods_do_not_depend_on_the_batch_and_are_those_of_full_logits(tiny) -> None:
    model, tokenizer = tiny
    requests = [Likelihood(prompt, f" the alert level is {n % 5}") for n, prompt in enumerate(prompts())]
    one, three, all_at_once = (scored(local(tiny, size), requests) for size in (1, 3, 64))
    for request, first, *others in zip(requests, one, three, all_at_once, strict=True):
        if isinstance(request.prompt, str):
            start, between, end = request.prompt, "", []
        else:
            start = (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                f"request.\n\n### Instruction:\n{request.prompt[0].text}\n\n### Response:"
            )
            between, end = " ", [tokenizer.eos_token_id]
        ids = tokenizer(start + between + request.continuation)["input_ids"] + end
        expected = full_logits(model, ids, len(ids) - len(tokenizer(start)["input_ids"]))
        assert all(same(found, expected) for found in (first, *others))


def test_a_greedy_answer_is_told_to_be_greedy(tiny) -> None:
    prompt = sentence(30)
    (answer,) = generated(local(tiny), [Generation(prompt, 6)])
    (found, other) = scored(local(tiny), [Likelihood(prompt, answer), Likelihood(prompt, " zebra")])
    assert found.is_greedy
    assert not other.is_greedy
    assert found.log_prob / found.num_tokens > other.log_prob / other.num_tokens


def test_answers_end_before_the_first_stop_sequence(tiny) -> None:
    asked = prompts()
    plain_engine, engine = local(tiny), local(tiny)
    plain = generated(plain_engine, [Generation(prompt, 24) for prompt in asked])
    stops = ("e ", "storm", "\n")
    expected = [min((text.split(stop)[0] for stop in stops), key=len) for text in plain]
    assert generated(engine, [Generation(prompt, 24, stops) for prompt in asked]) == expected
    assert sum(text != cut for text, cut in zip(plain, expected, strict=True)) >= 20
    assert engine.usage.num_generated_tokens < plain_engine.usage.num_generated_tokens


def test_requests_of_different_settings_are_answered_each_by_its_own(tiny) -> None:
    asked = [Generation(sentence(n), 1 + n % 3 * 4, ("e ",) if n % 2 else ()) for n in range(30)]
    assert generated(local(tiny), asked) == [generated(local(tiny), [request])[0] for request in asked]


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted(tiny) -> None:
    model, tokenizer = tiny
    text = " ".join(WORDS * 100)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 2 * CONTEXT
    engine = local(tiny)
    asked = [Generation(text, 10), Generation(sentence(3), 10), Generation((Turn("user", text),), 10)]
    answers = generated(engine, asked)
    kept = ids[-(CONTEXT - 10) :]
    rest = model.generate(torch.tensor([kept]), max_new_tokens=10, do_sample=False)[0, len(kept) :]
    assert answers[0] == tokenizer.decode(rest, skip_special_tokens=True)
    assert engine.usage.num_truncated == 2
    (found,) = scored(engine, [Likelihood(text, " the storm")])
    whole = tokenizer(text + " the storm")["input_ids"]
    assert same(found, full_logits(model, whole[-CONTEXT - 1 :], len(whole) - len(ids)))
    assert engine.usage.num_truncated == 3


def test_a_continuation_that_is_longer_than_the_context_is_scored_as_far_as_it_goes(tiny) -> None:
    model, tokenizer = tiny
    text = " ".join(WORDS * 100)
    (found,) = scored(local(tiny), [Likelihood("What?", f" {text}")])
    assert same(found, full_logits(model, tokenizer(f"What? {text}")["input_ids"][-CONTEXT - 1 :], CONTEXT))


def test_an_answer_gets_at_most_half_of_the_context(tiny) -> None:
    engine = local(tiny)
    generated(engine, [Generation(" ".join(WORDS * 100), 10**6)])
    assert 0 < engine.usage.num_generated_tokens <= CONTEXT // 2
    assert engine.usage.num_truncated == 1


def test_an_empty_prompt_is_the_start_of_a_text(tiny) -> None:
    model, tokenizer = tiny
    start = tokenizer.bos_token_id
    rest = model.generate(torch.tensor([[start]]), max_new_tokens=8, do_sample=False)[0, 1:]
    long = sentence(50)
    texts = generated(local(tiny), [Generation("", 8), Generation(long, 8)])
    assert texts == [tokenizer.decode(rest, skip_special_tokens=True), *generated(local(tiny), [Generation(long, 8)])]
    ids = tokenizer("the storm", add_special_tokens=False)["input_ids"]
    (found,) = scored(local(tiny), [Likelihood("", "the storm")])
    assert same(found, full_logits(model, [start, *ids], len(ids)))


def samples(tiny, batch_size: int | None, num_samples: int, prompt: Any = None) -> list[str]:
    asked = prompt if prompt is not None else sentence(12)
    requests = [Generation(asked, 16, temperature=1.0, top_p=0.95, sample=number) for number in range(num_samples)]
    return generated(local(tiny, batch_size), requests)


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_samples_of_one_prompt_differ_and_the_same_batch_gives_the_same(tiny, batch_size) -> None:
    first = samples(tiny, batch_size, 8)
    assert len(set(first)) == 8
    torch.manual_seed(5)  # what happened before does not matter
    assert samples(tiny, batch_size, 8) == first


@pytest.fixture(scope="module")
def chat(tiny) -> tuple[Any, Any]:
    """The built-in model with a byte-level tokenizer that has ChatML's template; its answers mean nothing."""
    tokenizer = byte_level([TEXT, "system user assistant You are helpful."])
    tokenizer.chat_template = CHATML
    return tiny[0], tokenizer


def test_a_tokenizers_own_chat_template_asks_and_ends_the_answer(chat) -> None:
    model, tokenizer = chat
    turns = (Turn("user", sentence(5)), Turn("assistant", "Rain."), Turn("user", "Why?"))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rest = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=0)
    found = generated(local(chat, template="chat"), [Generation(turns, 20), Generation((Turn("user", "Hi"),), 20)])
    assert found[0] == tokenizer.decode(rest[0, len(ids) :], skip_special_tokens=True)
    (answer,) = scored(local(chat, template="chat"), [Likelihood(turns, "the storm")])
    whole = [*ids, *tokenizer("the storm<|im_end|>", add_special_tokens=False)["input_ids"]]
    assert whole[-1] == end
    assert same(answer, full_logits(model, whole, len(whole) - len(ids)))


def test_a_tokenizer_without_a_padding_token_gives_the_same_answers(tiny) -> None:
    model, _ = tiny
    _, tokenizer = load_base(find_base("builtin:tiny", revision=None, root=Path()), trust_remote_code=False)
    tokenizer.pad_token = None
    requests = [Generation(prompt, 12, ("e ",)) for prompt in prompts()[::5]]
    assert generated(local((model, tokenizer)), requests) == generated(local(tiny), requests)


class Scripted:
    """A model that generates what it was given, after whatever prompt; `fits` rows at once."""

    def __init__(self, ids: list[int], fits: int = 10**6) -> None:
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.device = torch.device("cpu")
        self.sizes: list[int] = []
        self._ids = ids
        self._fits = fits

    def eval(self) -> None:
        pass

    def generate(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        if len(input_ids) > self._fits:
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.append(len(input_ids))
        return torch.cat([input_ids, torch.tensor([self._ids]).expand(len(input_ids), -1)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_white_space_that_an_answer_begins_with_is_kept(kind) -> None:
    """The body of a Python function, behind its docstring: one space less is another program."""
    signature, body = 'def first(rows):\n    """Return the first."""\n', "    return rows[0]\n"
    tokenizer = KINDS[kind]([signature + body] * 20)
    if not is_lossless(tokenizer):
        pytest.skip("a tokenizer that keeps no white space")
    encoder = Encoder(tokenizer, CustomTemplate(user="{instruction}", assistant="", separator=""))
    (example,) = encoder.responses([(Turn("user", signature),)], [body])
    ids = example.ids[example.supervised].tolist()  # as the model has learnt it, with the end behind
    engine = LocalModel(Scripted(ids), tokenizer, encoder)
    assert generated(engine, [Generation((Turn("user", signature),), 32)]) == [body]


def test_a_batch_that_does_not_fit_into_the_gpu_is_halved_until_it_does(tiny) -> None:
    _, tokenizer = tiny
    ids = tokenizer(" storm", add_special_tokens=False)["input_ids"]
    model = Scripted(ids, fits=3)
    engine = LocalModel(model, tokenizer, Encoder(tokenizer), batch_size=10)
    assert set(generated(engine, [Generation(sentence(n), 4) for n in range(20)])) == {tokenizer.decode(ids)}
    assert model.sizes == [2, 3, 2, 3] * 2
    assert engine.usage.num_requests == 20
    with pytest.raises(RequirementError, match="memory is too small for a single prompt"):
        generated(LocalModel(Scripted(ids, fits=0), tokenizer, Encoder(tokenizer)), [Generation("a", 4)])
