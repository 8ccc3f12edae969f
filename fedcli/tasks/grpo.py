"""Group relative policy optimisation: Shao et al., "DeepSeekMath", 2024 (2402.03300), equations 3 and 4.

The model answers each prompt G times, and a reward function marks the answers (`fedcli.tasks.rewards`). An answer's
advantage is A = (R - mean of its group) / (its group's deviation + 1e-4). The loss is the mean over answers of the mean
over their tokens of -min(rho A, clip(rho, .8, 1.2) A) + kl k3, where rho is 1 in value, for each answer is used once,
k3 = e^(l_ref - l) - (l_ref - l) - 1, and the reference is the adapter that the round began with. trl computes it
(`fedcli.training.grpo`); its deviation is the one of a sample, over G - 1.
"""

from fedcli.tasks.conversation import Question, Turn
from fedcli.tasks.format import MALFORMED, Context, Fields, Format, LeftOut, opened, plain, prompt_of, text
from fedcli.tasks.task import Task

ANSWERS = ("answer", "solution", "ground_truth")
"""Columns that say what an answer is checked against, in the order in which they are looked for."""


def _prompt_answer(fields: Fields, context: Context) -> Question:
    """A prompt, a text or a list of messages, and its answer: a number, a regular expression, a check in Python."""
    prompt = prompt_of(fields, context)
    column = next((name for name in ANSWERS if fields.get(name) is not None), ANSWERS[0])
    return Question(prompt, plain(fields, column))


def _gsm8k(fields: Fields, context: Context) -> Question:
    """GSM8K's rows: a question, and an answer whose last line is #### and the number."""
    prompt = opened((Turn("user", text(fields, "question")),), fields, context)
    _, mark, number = text(fields, "answer").rpartition("####")
    if not mark:
        raise LeftOut(MALFORMED, "column 'answer' has no line that begins with ####")
    return Question(prompt, number.strip())


def _mbpp(fields: Fields, context: Context) -> Question:
    """MBPP's rows: text (or prompt), and test_list, lines of Python that assert what the program must do."""
    tests = fields.get("test_list")
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise LeftOut(MALFORMED, "column 'test_list' is no list of lines of Python")
    asked = text(fields, "text" if fields.get("text") is not None else "prompt")
    told = f"{asked}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    setup = fields.get("test_setup_code")
    return Question((Turn("user", told),), "\n".join(([setup] if isinstance(setup, str) and setup else []) + tests))


QUESTIONS = (
    Format("prompt-answer", Question, _prompt_answer),
    Format("gsm8k", Question, _gsm8k),
    Format("mbpp", Question, _mbpp),
)

GRPO = Task(
    name="grpo",
    description="reinforcement learning from a reward function (GRPO)",
    item=Question,
    formats=QUESTIONS,
    mean_over="rows",
    hyperparameters=("generations", "max_new_tokens", "reward", "kl"),
    trainer="fedcli.training.grpo:train_round",
    packages=("trl",),
)
