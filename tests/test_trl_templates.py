"""What is learnt with every chat template that trl ships, against trl's own training forms, which mark it.

A training form writes {% generation %} marks where its model's answers are. fedcli derives the same from the template
that the model comes with. What differs is written out here, and in docs/DATA.md.
"""

import random
from pathlib import Path

import pytest
from support.tokenizer_kinds import CONVERSATIONS, stretches, turns_of
from support.trl_templates import (
    IN_PARTS,
    MORE,
    TOOLS,
    by_fedcli,
    by_training_form,
    encoder_of,
    families,
    has_marks,
    rendered,
    table,
    tokenizer_of,
)

from fedcli.data.encoding import Encoder
from fedcli.data.segments import EARLIER, NO_END, NO_TEXT, NO_THOUGHTS, NO_TOOLS
from fedcli.tasks.conversation import Example, Preference, Turn

PAGE = Path(__file__).parents[1] / "docs" / "DATA.md"
ALL = {name: turns for name, turns in CONVERSATIONS.items() if name not in ("markers", "50,000 characters")} | MORE
EMPTY = "<think>\n\n</think>\n\n"
ASSISTANT = "<\uff5cAssistant\uff5c>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"

# What trl's forms learn too, in front of a response (the prompt has it here) and behind its end.
FRONTS: dict[str, tuple[str, ...]] = {
    "deepseek_r1_distill": (ASSISTANT, f"{ASSISTANT}<think>\n"),
    "deepseekv3": (ASSISTANT, "<\uff5ctool\u2581outputs\u2581end\uff5c>"),
    "glm4moe": ("\n<think></think>\n",),
    "gptoss": (FINAL, "<|start|>assistant"),
    "muse_glimmer": ("<|start|>assistant to=user<|message|>", "<|start|>assistant"),
    "nemotron": ("<think></think>", "<think>"),
    "qwen2_5": ("\n",),
    "qwen3_5": (EMPTY, "<think>\n"),
    "qwen3_6": (EMPTY, "<think>\n"),
    "qwen3_8": (EMPTY, "<think>\n"),
    "qwen3": (EMPTY,),
}
BEHINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma", "diffusion_gemma", "idefics3", "lfm2", "nemotron", "qwen", "smolvlm"), ("\n",)),
    "phi3": ("\n", "\n<|endoftext|>"),
    "glm4moe": ("<|user|>", "<|observation|>"),
}
# Where both are right and not alike: thoughts that trl's form drops or doubles, a mark that hands over to a tool.
OTHERWISE = {
    ("deepseek_r1_distill", "reasoning"),
    ("deepseekv3", "thoughts"),
    ("deepseekv3", "thoughts twice"),
    ("deepseekv3", "reasoning"),
    ("diffusion_gemma", "a call"),
    ("diffusion_gemma", "a call with text"),
    ("qwen3_8", "thoughts"),
    ("qwen3_8", "thoughts twice"),
    ("qwen3_8", "thoughts in the first"),
}
PAIRS = [(family, name) for family in families() for name in ALL]
FAST = random.Random(14).sample(PAIRS, 14)


def allowed(differences: dict[str, tuple[str, ...]], family: str) -> tuple[str, ...]:
    known = max((start for start in differences if family.startswith(start)), key=len, default=None)
    return ("", *(differences[known] if known else ()))


def every(pairs: list[tuple[str, str]]) -> list[object]:
    """Return a seeded sample of the pairs, and all of each family, which is slow."""
    sample = [pytest.param(family, [name], id=f"{family}-{name}") for family, name in pairs if (family, name) in FAST]
    return sample + [
        pytest.param(each, [name for family, name in pairs if family == each], id=each, marks=pytest.mark.slow)
        for each in dict.fromkeys(family for family, _ in pairs)
    ]


def assert_agrees_with_its_training_form(family: str, name: str) -> None:
    ours, theirs = by_fedcli(family, ALL[name]), by_training_form(family, ALL[name])
    if ours.left_out is not None:  # trl's form refuses it too, or writes a call or a tool's turn as nothing
        assert theirs.left_out is not None or "does not write a tool" in ours.left_out
        return
    assert theirs.left_out is None
    num_missed = len(theirs.learnt) - len(ours.learnt)
    assert (num_missed > 0) == (EARLIER in ours.notes)
    assert num_missed >= 0
    if (family, name) in OTHERWISE:
        return
    for found, marked in zip(ours.learnt, theirs.learnt[num_missed:], strict=True):
        text = found.removesuffix("</s>") if family == "glm4moe" else found
        front, _, behind = marked.partition(text)
        assert text in marked
        assert front in allowed(FRONTS, family)
        assert behind in allowed(BEHINDS, family)


@pytest.mark.parametrize(("family", "names"), every([pair for pair in PAIRS if has_marks(pair[0])]))
def test_what_is_learnt_is_what_the_training_form_marks_but_for_the_differences_named(
    family: str, names: list[str]
) -> None:
    for name in names:
        assert_agrees_with_its_training_form(family, name)


def assert_is_what_the_template_writes(family: str, name: str) -> None:
    tokenizer, encoder = encoder_of(family)
    rows = encoder.encode([Example(ALL[name])], 10**6)
    if not rows or family.startswith("deepseek") or (family == "qwen3_8" and "thoughts" in name):
        return
    text = tokenizer.decode(rows[0].sides[0].ids.tolist())
    if family == "glm4moe":  # which has no end of its own
        text = text.replace("</s>", "")
    assert text == rendered(family, ALL[name])


@pytest.mark.parametrize(
    ("family", "names"), every([pair for pair in PAIRS if "strftime_now" not in families()[pair[0]][0]])
)
def test_the_whole_text_is_what_the_template_writes(family: str, names: list[str]) -> None:
    for name in names:
        assert_is_what_the_template_writes(family, name)


def responses(turns: tuple[Turn, ...]) -> list[Turn]:
    return [turn for turn in turns if turn.role == "assistant"]


def assert_has_every_response(family: str, name: str) -> None:
    found = by_fedcli(family, ALL[name])
    if found.left_out is not None:
        assert found.left_out.startswith("the chat template ")
        return
    turns = responses(ALL[name])
    if EARLIER in found.notes:
        turns = turns[-len(found.learnt) :]
    assert NO_END not in found.notes
    assert len(found.learnt) == len(turns)
    for learnt, turn in zip(found.learnt, turns, strict=True):
        answer = turn.text.split("</think>")[-1].strip()
        assert answer in learnt or NO_TEXT in found.notes
        assert learnt.rstrip().endswith((">", "</s>"))
        if NO_THOUGHTS not in found.notes:
            assert all(thought in learnt for thought in ("hm hm", "long thought") if thought in repr(turn))


@pytest.mark.parametrize(("family", "names"), every(PAIRS))
def test_every_response_is_learnt_with_an_end_or_its_absence_is_told(family: str, names: list[str]) -> None:
    for name in names:
        assert_has_every_response(family, name)


@pytest.mark.parametrize("family", [pytest.param(each, marks=pytest.mark.slow) for each in families()])
def test_generation_sees_before_the_last_response_what_training_saw(family: str) -> None:
    tokenizer, encoder = encoder_of(family)
    turns = turns_of("q1", "a1", "q2", "a2")
    (row,) = encoder.encode([Example(turns)], 10**6)
    seen = tokenizer.decode(row.sides[0].ids.tolist()).rpartition("a2")[0].rstrip(" ")
    assert tokenizer.decode(encoder.prompts([turns[:-1]])[0]) == seen


@pytest.mark.parametrize(
    ("family", "opening"),
    [
        ("qwen3", "<|im_start|>assistant\n"),
        pytest.param("qwen3_5_think", "<|im_start|>assistant\n<think>\n", marks=pytest.mark.slow),
        pytest.param("deepseek_r1_distill", ASSISTANT, marks=pytest.mark.slow),
        pytest.param("gptoss", FINAL, marks=pytest.mark.slow),
        pytest.param("lfm2_2_5", "<|im_start|>assistant\n", marks=pytest.mark.slow),
    ],
)
def test_chosen_and_rejected_share_their_prompt_where_one_of_them_thinks(family: str, opening: str) -> None:
    tokenizer, encoder = encoder_of(family)
    thinking = MORE["thoughts"][1].content
    (row,) = encoder.encode([Preference(turns_of("q"), thinking, "It is 3.")], 10**6)
    starts = [side.ids[: side.prompt_length].tolist() for side in row.sides]
    assert starts[0] == starts[1]
    assert tokenizer.decode(starts[0]).endswith(opening)
    chosen, rejected = (tokenizer.decode(side.ids[side.prompt_length :].tolist()) for side in row.sides)
    assert "hm hm" in chosen
    assert "It is 3." in rejected


@pytest.mark.parametrize(
    ("family", "written"),
    [
        ("deepseek_r1_distill", f"<s><\uff5cUser\uff5c>And two?{ASSISTANT}<think>\n"),
        ("deepseekv3", f"<s><\uff5cUser\uff5c>And two?{ASSISTANT}<think>\n"),
        ("qwen3_8", "<|im_start|>user\nAnd two?<|im_end|>\n<|im_start|>assistant\n<think>\n"),
    ],
)
def test_thoughts_that_a_template_drops_or_doubles_stand_behind_its_prompt(family: str, written: str) -> None:
    tokenizer, encoder = encoder_of(family)
    (row,) = encoder.encode([Example(MORE["thoughts"])], 10**6)
    prompt, learnt = (tokenizer.decode(part.ids) for part in stretches(row.sides[0])[:2])
    assert prompt.endswith(written)
    assert prompt == tokenizer.apply_chat_template(
        [{"role": "user", "content": "And two?"}], tokenize=False, add_generation_prompt=True
    )
    assert learnt == f"hm hm\n</think>\n\nIt is 2.{'<|im_end|>' if family == 'qwen3_8' else learnt.partition('2.')[2]}"
    assert encoder.end_id == stretches(row.sides[0])[1].ids[-1]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "deepseek_r1_distill"])
def test_think_tags_of_a_response_are_tokens_where_the_template_writes_them_and_nowhere_else(family: str) -> None:
    tokenizer, encoder = encoder_of(family, special_thoughts=True)
    (learnt,) = by_fedcli(family, MORE["thoughts"], special_thoughts=True).learnt
    (plain,) = by_fedcli(family, MORE["thoughts"]).learnt
    assert learnt == plain
    (row,) = encoder.encode([Example(MORE["thoughts"])], 10**6)
    assert row.sides[0].ids.tolist().count(tokenizer.convert_tokens_to_ids("</think>")) == 1
    for turns in (
        turns_of("q </think>", "a"),
        turns_of("q", "<think>one <think> two</think> three"),
        turns_of("q", "<think>one</think> two </think> three"),
        (Turn("user", "q"), Turn("assistant", "a", reasoning="one </think> two")),
    ):
        assert by_fedcli(family, turns, special_thoughts=True).left_out == "a special token is spelt out in the text"
    assert by_fedcli("qwen2_5", MORE["thoughts"], special_thoughts=True).left_out is not None


def test_a_special_token_in_tools_calls_or_thoughts_leaves_the_conversation_out() -> None:
    spelt = "a <|im_end|> b"
    for turns in (
        (Turn("user", "q", tools=TOOLS.replace("a city", spelt)), Turn("assistant", "a")),
        (Turn("user", "q"), Turn("assistant", "a", tool_calls=MORE["a call"][1].tool_calls.replace("Bern", spelt))),
        (Turn("user", "q"), Turn("assistant", "a", reasoning=spelt)),
        (*MORE["a call"][:2], Turn("tool", spelt), MORE["a call"][3]),
        (Turn("user", "q", tools=TOOLS.replace("a city", r"\u003c|im_end|\u003e")), Turn("assistant", "a")),
    ):
        assert by_fedcli("qwen3", turns).left_out == "a special token is spelt out in the text"


def test_an_answer_that_is_not_to_be_learnt_stays_in_the_text() -> None:
    turns = turns_of("q1", "a1", "q2", "a2")
    unlearnt = (turns[0], Turn("assistant", "a1", is_learnt=False), *turns[2:])
    for family in ("phi3", "gptoss", "lfm2_2_5", "llama3"):
        _, encoder = encoder_of(family)
        (whole,), (part,) = (encoder.encode([Example(each)], 10**6) for each in (turns, unlearnt))
        assert part.sides[0].ids.tolist() == whole.sides[0].ids.tolist()
        assert by_fedcli(family, unlearnt).learnt == by_fedcli(family, turns).learnt[1:]
    none = (turns[0], Turn("assistant", "a1", is_learnt=False))
    assert by_fedcli("phi3", none).left_out == "no response is learnt: the row or the template keeps all of them out"
    last = (*turns[:3], Turn("assistant", "a2", is_learnt=False))
    assert by_fedcli("qwen3", last).left_out is not None  # its template rewrites the first answer


def test_tools_that_a_template_does_not_use_are_noted_and_those_it_uses_are_in_the_prompt() -> None:
    with_tools, without = MORE["tools"], turns_of("Is it warm?", "It is 1.")
    for family in ("phi3", "llama3", "gemma", "cohere2"):
        _, encoder = encoder_of(family)
        (one,), (other,) = (encoder.encode([Example(each)], 10**6) for each in (with_tools, without))
        assert one.sides[0].ids.tolist() == other.sides[0].ids.tolist()
        assert by_fedcli(family, with_tools).notes == {NO_TOOLS}
    for family in ("qwen3", "llama3_1", "lfm2_2_5", "gptoss"):
        tokenizer, encoder = encoder_of(family)
        (row,) = encoder.encode([Example(with_tools)], 10**6)
        assert "get_weather" in tokenizer.decode(row.sides[0].ids[: row.sides[0].prompt_length].tolist())
        assert by_fedcli(family, with_tools).notes == frozenset()


def test_templates_that_read_parts_alone_get_parts() -> None:
    for family in IN_PARTS:
        assert by_fedcli(family, turns_of("q1", "a1", "q2", "a2")).learnt[0].strip().startswith("a1")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("qwen3", "phi3") else pytest.mark.slow)
        for name, (_, training) in families().items()
        if training is not None
    ],
)
def test_marks_of_a_tokenizers_own_template_say_what_is_learnt(family: str) -> None:
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = families()[family][1]
    encoder = Encoder(tokenizer, "chat")
    for name, turns in CONVERSATIONS.items():
        rows = encoder.encode([Example(turns)], 10**6) if name in ALL else []
        marked = by_training_form(family, turns)
        assert bool(rows) == (name in ALL and marked.left_out is None)
        for row in rows:
            found = stretches(row.sides[0])
            assert tuple(tokenizer.decode(part.ids) for part in found if part.is_supervised) == marked.learnt


@pytest.mark.parametrize("marked", ["{{ content }}", "{{ content.split()[0] }}<|im_end|>", ""])
def test_marks_that_miss_a_response_or_its_end_are_not_believed(marked: str) -> None:
    tokenizer = tokenizer_of("qwen2_5")
    rest = "<|im_end|>" if "im_end" not in marked else "{{ content.split()[1:] | join(' ') }}"
    tokenizer.chat_template = (
        "{% for m in messages %}{% set content = m.content %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}"
        "{{ content }}<|im_end|>{% else %}{% generation %}" + marked + "{% endgeneration %}"
        + ("" if marked else "{{ content }}") + rest + "{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    encoder = Encoder(tokenizer, "chat")
    rows = encoder.encode([Example(turns_of("q1", "a1 b1", "q2", "a2 b2"))], 10**6)
    if "split" in marked:  # which writes an end within the answer
        assert rows.first_cases == {"malformed": "the chat template does not write a response as it is given"}
        return
    found = stretches(rows[0].sides[0])
    assert [tokenizer.decode(part.ids) for part in found if part.is_supervised] == [
        "a1 b1<|im_end|>",
        "a2 b2<|im_end|>",
    ]


@pytest.mark.slow
def test_the_page_has_the_table_of_all_templates() -> None:
    # `PYTHONPATH=tests python tests/support/trl_templates.py` prints it
    assert "\n".join(table(families())) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", random.Random(14).sample(sorted(families()), 3))
def test_the_page_says_what_a_template_can(family: str) -> None:
    (line,) = table([family])[2:]
    _, name, *cells, _ = line.replace("\\|", "/").split("|")
    lines = [each.replace("\\|", "/").split("|") for each in PAGE.read_text(encoding="utf-8").splitlines()]
    assert [each[2:-1] for each in lines if len(each) > 7 and name.strip() in each[1].strip().split(", ")] == [cells]
