"""What prompts begin with alike is computed once, and the answers are those of transformers on each prompt alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import KINDS, make

from fedcli.data.encoding import Encoder
from fedcli.eval import batches as in_batches
from fedcli.eval.endings import closed_up
from fedcli.eval.local_model import WHOLE, LocalModel
from fedcli.eval.prefix_tree import Prefix, prefix_tree
from fedcli.eval.requests import Generation, Likelihood, LogLikelihood
from fedcli.model.base import find_base
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import load_base
from fedcli.model.prefix_cache import Row, logits_of

EXAMPLES = (
    "the river rises when rain falls on the hills. alert: red. the bank soars, and a clinic heals. alert: green. "
)
QUESTIONS = [
    "a storm near the coast", "the steel maker rallies", "coast floods", "a striker wins the cup, and the crowd sings",
    "rain falls on the clinic", "what is the alert level of a bank", "the river", "hills",
]  # fmt: skip
ANSWERS = (" green", " red, of course", " the storm rises on the hills")
STATES = {"jamba", "lfm2", "mamba", "mamba2", "rwkv"}
"""Their layers keep a state: each prompt is computed whole."""
NUM_NEW = 6


def likelihoods() -> list[Likelihood]:
    """Return answers to questions behind the same examples, and a question that begins otherwise."""
    asked = [f"{EXAMPLES}{question}. alert:" for question in QUESTIONS]
    return [Likelihood(prompt, answer) for prompt in [*asked, "Name it:"] for answer in ANSWERS]


def generations() -> list[Generation]:
    return [Generation(f"{EXAMPLES}{question}. alert:", NUM_NEW) for question in QUESTIONS]


@torch.no_grad()
def alone(model: Any, tokenizer: Any, request: Likelihood) -> LogLikelihood:
    """Return a likelihood from the logits of one sequence, without a cache."""
    ids = tokenizer(request.prompt + request.continuation)["input_ids"]
    num = len(ids) - len(tokenizer(request.prompt)["input_ids"])
    log_probs = model(torch.tensor([ids]), use_cache=False).logits[0, -num - 1 : -1].double().log_softmax(-1)
    targets = torch.tensor(ids[-num:])
    found = log_probs.gather(-1, targets[:, None]).sum()
    return LogLikelihood(float(found), bool((log_probs.argmax(-1) == targets).all()), num)


@torch.no_grad()
def continued(model: Any, tokenizer: Any, request: Generation, end: int) -> str:
    """Return the likeliest tokens one after another, each of a whole sequence's logits, without a cache."""
    ids = tokenizer(request.prompt)["input_ids"]
    made: list[int] = []
    while len(made) < request.max_new_tokens and end not in made:
        made.append(int(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax()))
    before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[-1:], ids[-1:] + made))
    return whole.removeprefix(before)


class Counted:
    """Counts the tokens that a model computes, padding included."""

    def __init__(self, model: Any) -> None:
        self.num_tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        self.num_tokens += inputs[0].numel()


def answers(ask: Any, requests: Sequence[Any]) -> list[Any]:
    found: dict[int, Any] = {}
    ask(requests, found.__setitem__)
    return [found[number] for number in range(len(requests))]


def check(model: Any, tokenizer: Any, *, keeps_states: bool, batch_size: int | None) -> None:
    notes: list[str] = []
    encoder = Encoder(tokenizer)
    engine = LocalModel(model, tokenizer, encoder, batch_size=batch_size, on_note=notes.append)
    texts = [continued(model, tokenizer, request, encoder.end_id) for request in generations()]
    expected = [alone(model, tokenizer, request) for request in likelihoods()]
    engine.log_likelihoods(likelihoods()[:6], lambda *_: None)  # what a model is, is found out once
    counted = Counted(model)
    found = answers(engine.log_likelihoods, likelihoods())
    whole = sum(len(tokenizer(each.prompt + each.continuation)["input_ids"]) for each in likelihoods())
    assert (counted.num_tokens < whole / 2) == (not keeps_states)
    for one, other in zip(found, expected, strict=True):
        assert (one.is_greedy, one.num_tokens) == (other.is_greedy, other.num_tokens)
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
    if not keeps_states:  # what is padded on the left changes some of these layers' states
        assert answers(engine.generate, generations()) == texts
    assert notes == ([WHOLE] if keeps_states else [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_answers_behind_a_shared_prefix_are_those_of_each_prompt_alone(kind: str, tmp_path: Path) -> None:
    model, tokenizer = load_base(make(tmp_path / "base", kind), trust_remote_code=False)
    check(model.eval(), tokenizer, keeps_states=kind in STATES, batch_size=None)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    model, tokenizer = load_base(find_base("builtin:tiny", revision=None, root=Path()), trust_remote_code=False)
    return model.eval(), tokenizer


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_prefix_changes_no_answer_of_a_trained_model_whatever_the_batch(tiny, batch_size: int) -> None:
    check(*tiny, keeps_states=False, batch_size=batch_size)


def test_prefixes_are_those_that_save_tokens() -> None:
    examples, question = list(range(100)), list(range(200, 240))
    prompts = [
        [*examples, *question, 1], [*examples, *question, 2, 3], [*examples, 7], [*examples, 8, 9], [5, 6],
        [*examples, *question, 2, 3],
    ]  # fmt: skip
    root = prefix_tree(prompts, [len(ids) - 1 for ids in prompts])
    assert (root.length, root.rows) == (0, [4])
    (shots,) = root.longer
    assert (shots.length, sorted(shots.rows)) == (100, [2, 3])
    (asked,) = shots.longer
    assert (asked.length, sorted(asked.rows), asked.longer) == (140, [0, 1, 5], [])


def test_prefixes_of_many_random_prompts_hold_each_prompt_once_and_only_what_it_begins_with() -> None:
    draws = np.random.default_rng(0)
    trunk = draws.integers(0, 3, 300).tolist()
    prompts = [
        trunk[: draws.integers(1, 300)] + draws.integers(0, 3, draws.integers(1, 60)).tolist() for _ in range(500)
    ]
    root = prefix_tree(prompts, [len(ids) - 1 for ids in prompts])
    held: list[int] = []
    waiting: list[tuple[Prefix, int]] = [(root, 0)]
    num_prefixes = 0
    while waiting:
        prefix, above = waiting.pop()
        num_prefixes += 1
        assert prefix is root or prefix.length >= above + 16
        for row in prefix.rows:
            assert prompts[row][: prefix.length] == prompts[prefix.row][: prefix.length]
            assert len(prompts[row]) > prefix.length
        held += prefix.rows
        waiting += [(longer, prefix.length) for longer in prefix.longer]
    assert sorted(held) == list(range(500))
    assert num_prefixes > 3


@pytest.mark.parametrize("num_tokens", [10, 260, 300, 10**6])
def test_what_is_kept_is_bounded_and_dropped_with_its_prompts(num_tokens: int) -> None:
    """Forty subjects of examples (100 tokens), each with three questions (30 more) of four answers."""
    rows = {
        4 * (3 * subject + question) + answer: [
            *(1000 + subject for _ in range(100)), *(2000 + question for _ in range(30)), answer, 1,
        ]
        for subject in range(40) for question in range(3) for answer in range(4)
    }  # fmt: skip
    alive: set[int] = set()
    most_alive = 0

    class Noted:
        def __init__(self, row: Row) -> None:
            nonlocal most_alive
            self.length, self.before, self.own = len(row.ids), row.kept, row.num_new
            alive.add(id(self))
            sizes[id(self)] = row.num_new
            most_alive = max(most_alive, sum(sizes[each] for each in alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    sizes: dict[int, int] = {}
    keeper = in_batches.Keeper(lambda asked: [Noted(row) for row in asked], num_tokens, 1024)  # type: ignore[arg-type,misc]  # all that is asked of Kept is here
    pace = in_batches.Pace(64, is_fixed=True)
    told: list[int] = []
    computed = 0
    for batch in in_batches.batches(rows, dict.fromkeys(rows, 130), 0, pace, lambda: keeper):
        for index, row in batch:
            assert row.ids == rows[index]
            told.append(index)
            computed += row.num_new
        del batch, row
    assert sorted(told) == sorted(rows)
    assert most_alive <= num_tokens
    assert not alive
    assert (computed == 40 * 3 * 4 * 2) == (num_tokens >= 260)
    assert (most_alive > 0) == (num_tokens >= 200)


def test_a_prefix_that_does_not_fit_into_memory_is_computed_with_each_prompt(tiny, monkeypatch) -> None:
    model, tokenizer = tiny
    plain = answers(LocalModel(model, tokenizer, Encoder(tokenizer)).log_likelihoods, likelihoods())

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("fedcli.eval.local_model.keep", refuse)
    found = answers(LocalModel(model, tokenizer, Encoder(tokenizer)).log_likelihoods, likelihoods())
    for one, other in zip(found, plain, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


def test_rotations_that_depend_on_the_whole_length_leave_prompts_whole(tmp_path: Path) -> None:
    changes = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    with quiet_libraries():
        model, tokenizer = load_base(make(tmp_path / "base", "llama", **changes), trust_remote_code=False)
    notes: list[str] = []
    engine = LocalModel(model, tokenizer, Encoder(tokenizer), on_note=notes.append)
    for _ in range(2):
        engine.log_likelihoods(likelihoods(), lambda *_: None)
    assert notes == [WHOLE]


def test_prompts_of_unlike_length_are_computed_apart_and_without_padding(tiny) -> None:
    model, _ = tiny
    rows = [Row([number % 200 + 3 for number in range(length)]) for length in (150, 8, 151, 9)]
    with torch.no_grad():
        wanted = [model(torch.tensor([row.ids])).logits[0, -1] for row in rows]
        counted = Counted(model)
        found = logits_of(rows, [1] * 4, model, 0)
    assert counted.num_tokens == 2 * 151 + 2 * 9
    torch.testing.assert_close(found, torch.stack(wanted), atol=1e-4, rtol=0)


def test_answers_that_have_ended_leave_the_batch_and_the_others_go_on(tiny) -> None:
    model, tokenizer = tiny
    plain = [Generation(each.prompt, 24) for each in generations()]
    whole = answers(LocalModel(model, tokenizer, Encoder(tokenizer)).generate, plain)
    stop = (whole[0][:2],)
    stopped = [Generation(each.prompt, 24, stop=stop) for each in generations()]
    engine = LocalModel(model, tokenizer, Encoder(tokenizer), batch_size=8)
    counted = Counted(model)
    assert answers(engine.generate, stopped) == [text.partition(stop[0])[0] for text in whole]
    num_steps_of_all = 8 * 24
    prompts = sum(len(tokenizer(each.prompt)["input_ids"]) for each in generations())
    assert 0 < counted.num_tokens < prompts / 2 + num_steps_of_all


def test_places_of_ended_answers_are_taken_by_the_last_ones() -> None:
    assert closed_up([True, False, True, False, True, True]) == [0, 4, 2, 5]
    for number in range(2**7):
        is_open = [bool(number >> bit & 1) for bit in range(7)]
        places = closed_up(is_open)
        kept = [place for place in range(7) if is_open[place]]
        assert sorted(places) == kept
        assert all(places[place] == place for place in kept if place < len(kept))


@pytest.mark.parametrize(("num_tokens", "first"), [(10**5, 16), (10 * 170, 10), (400, 4)])
def test_a_batch_of_answers_behind_a_prefix_is_as_large_as_what_is_kept_allows(num_tokens: int, first: int) -> None:
    rows = {number: [*range(100), number, *range(19)] for number in range(40)}  # 120 tokens, with an answer 170

    class Whole:
        def __init__(self, row: Row) -> None:
            self.length = len(row.ids)

    keeper = in_batches.Keeper(lambda asked: [Whole(row) for row in asked], num_tokens, 1024)  # type: ignore[arg-type,misc]  # all that is asked of Kept is here
    pace = in_batches.Pace.of("cpu", None)
    sizes = []
    for batch in in_batches.batches(rows, dict.fromkeys(rows, 119), 50, pace, lambda: keeper):
        sizes.append(len(batch))
        pace.took(len(batch), 1e9)  # the slowest of machines
    assert sizes[0] == first
    assert sum(sizes) == 40
    assert pace.size == pace.least == (num_tokens // 170 if first == 4 else first)
