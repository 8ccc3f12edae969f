"""A program that a model wrote is judged from another sandbox: it can neither see its tests nor say that it passed."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcli.eval.sandbox import Checks, Program, Run, Sandbox
from fedcli.eval.sandbox_runner import decode, encode

EXPECTED = "a text that only the tests know"
TESTS = Checks(
    "import math\n"
    f"assert answer(6) == {EXPECTED!r}\n"
    f"assert answer(7) != {EXPECTED!r} and not number(1) and abs(number(2) - 2.5) < 1e-6\n"
    "assert math.isclose(number(2), 2.5) and sorted(many([3, 1])) == [1, 3] and all(each > 0 for each in many([1]))\n",
    ("answer", "number", "many"),
)
HONEST = f"""
def answer(n): return {EXPECTED!r} if n == 6 else str(n)
def number(n): return 2.5 if n == 2 else 0
def many(numbers): return set(numbers)
"""
ALWAYS = """
class Always:
    def __getattr__(self, name): return Always()
    def __call__(self, *_, **__): return Always()
for name in "eq ne lt le gt ge sub rsub add abs neg float int bool contains".split():
    setattr(Always, f"__{name}__", lambda *_: {"float": 2.5, "int": 2, "bool": True}.get(name, True))
"""
REST = "number = many = answer\n"


def judged(sandbox: Sandbox, source: str, tests: Checks = TESTS, seconds: float = 60) -> Run:
    return sandbox.run_all([Program(source, seconds, tests)])[0]


def test_a_right_program_passes_and_a_wrong_one_shows_the_test_that_it_fails(sandbox: Sandbox) -> None:
    assert judged(sandbox, HONEST).outcome == "passed"
    wrong = judged(sandbox, HONEST.replace("set(numbers)", "numbers[:1]"))
    assert (wrong.outcome, 'File "tests.py", line 4' in wrong.output) == ("failed", True)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(ALWAYS + "answer = lambda n: Always()\n" + REST, id="an object that equals everything"),
        pytest.param(
            "class Text(str):\n    __hash__ = str.__hash__\n    def __eq__(self, other): return True\n"
            "answer = lambda n: Text()\n" + REST,
            id="a text that equals everything",
        ),
        pytest.param(
            "class Number(float):\n    def __sub__(self, other): return 0.0\n    def __eq__(self, other): return True\n"
            "answer = lambda n: Number()\n" + REST,
            id="a number that equals everything",
        ),
        pytest.param(
            "import builtins, math\nfor name in 'abs all sorted'.split(): setattr(builtins, name, lambda *_: True)\n"
            "math.isclose = lambda *_: True\nanswer = lambda n: True\n" + REST,
            id="other built-in functions",
        ),
        pytest.param("abs = all = sorted = math = lambda *_: True\nanswer = lambda n: True\n" + REST, id="other names"),
        pytest.param(
            "import sys\ndef answer(n):\n    frame = sys._getframe()\n    while frame:\n"
            "        for value in list(frame.f_locals.values()):\n"
            "            if isinstance(value, bytes): sys.stdout.buffer.write(value); sys.stdout.flush()\n"
            "            if isinstance(value, str): print(end=value, flush=True)\n"
            "        frame = frame.f_back\n    import os; os._exit(0)\n" + REST,
            id="everything in the frames as a token",
        ),
        pytest.param(
            "import gc, os\ndef answer(n):\n    for value in gc.get_objects():\n"
            "        parts = value.values() if type(value) is dict else value if type(value) is tuple else ()\n"
            "        for part in list(parts):\n"
            "            if type(part) is bytes: os.write(1, part)\n"
            "            if type(part) is str: os.write(1, os.fsencode(part))\n"
            "    os._exit(0)\n" + REST,
            id="everything in the memory as a token",
        ),
        pytest.param(
            "import os\nfor descriptor in range(3, 128):\n    try: os.write(descriptor, b'[\"value\", true]\\n' * 99)\n"
            "    except OSError: pass\n",
            id="answers before the questions",
        ),
        pytest.param(
            "import os\nfor descriptor in range(3, 128):\n    try: os.write(descriptor, b'[' * 10**6 + b'\\n')\n"
            "    except OSError: pass\n",
            id="an answer that is deep",
        ),
        pytest.param("answer = lambda n: 'x' * 10**7\n" + REST, id="an answer that is long"),
        pytest.param("answer = number = many = [print]", id="functions in a list"),
        pytest.param("import os\nos._exit(0)\n" + HONEST, id="the end before it begins"),
        pytest.param("import os\nanswer = lambda n: os._exit(0)\n" + REST, id="the end while it is asked"),
        pytest.param("import os; os._exit(0)", id="the end before it is asked"),
        pytest.param("def answer(n): raise SystemExit(0)\n" + REST, id="an exit"),
        pytest.param("import os; os.closerange(3, 128)\nanswer = lambda n: n\n" + REST, id="closed pipes"),
        pytest.param("def answer(n): raise AssertionError\n" + REST, id="an exception"),
        pytest.param("answer = number = many = 5", id="no functions"),
        pytest.param("", id="nothing"),
        pytest.param("def answer(n:", id="no program"),
        pytest.param(
            "answer = []\nanswer.append(answer)\nnumber = many = lambda n: answer\n", id="a list that holds itself"
        ),
        pytest.param(
            "import sys\nsys.modules['__main__'].check = print\ncheck = assert_ = print\nanswer = lambda n: None\n"
            + REST,
            id="the tests' own names",
        ),
    ],
)
def test_nothing_but_the_right_values_passes(sandbox: Sandbox, source: str) -> None:
    assert judged(sandbox, source).outcome == "failed"


OWN_ANSWERS = """
import json, os, sys
incoming, outgoing = map(int, sys.argv[-2:])
for line in os.fdopen(incoming, "rb"):
    act, *asked = json.loads(line)
    answer = {named} if act == "name" else {called}
    reply = ["value", answer, None if act == "name" else asked[1]]
    os.write(outgoing, json.dumps(reply).encode() + b"\\n")
"""
WRITE_TOKEN = (
    'exec(\'import sys, os\\nx = sys._getframe()\\nwhile x:\\n if "token" in x.f_locals: '
    'os.write(x.f_locals["output"], x.f_locals["token"]); os._exit(0)\\n x = x.f_back\')'
)


@pytest.mark.parametrize(
    "named", [["type", name] for name in ("eval", "exec", "print", "getattr", "__import__", "type", "object")]
)
def test_no_function_of_python_is_an_answer(sandbox: Sandbox, named: list[str]) -> None:
    source = OWN_ANSWERS.format(named=f'{named!r} if asked[0] == "f" else ["object", 7]', called=repr(WRITE_TOKEN))
    tests = Checks("try: assert f(g(1)) == 'nothing that is answered'\nexcept NameError: assert False", ("f", "g"))
    assert judged(sandbox, source, tests, seconds=20).outcome == "failed"


@pytest.mark.parametrize(
    "called",
    ['["object", "x"]', '["object"]', '["dict", [[], 1]]', '["list"] * 3', '["bytes", 5]', '["complex"]', '["x", []]'],
)
def test_what_is_no_answer_fails_the_tests(sandbox: Sandbox, called: str) -> None:
    source = OWN_ANSWERS.format(named='["object", 7]', called=called)
    assert judged(sandbox, source, Checks("assert f(1) == 1", ("f",)), seconds=20).outcome == "failed"


def test_what_a_program_changes_in_place_is_changed_in_its_tests(sandbox: Sandbox) -> None:
    source = "def sort(l, d, s): l.sort(); d['b'] = [2]; s.discard(1); l.append(l[0])"
    tests = "l, d, s = [2, 1], {'a': [1]}, {1, 2}\nsort(l, d, s)\nassert (l, s) == ([1, 2, 1], {2}) and d['b'] == [2]"
    assert judged(sandbox, source, Checks(tests, ("sort",))).outcome == "passed"


def test_of_a_subclass_the_plain_value_counts(sandbox: Sandbox) -> None:
    source = """
from collections import Counter, OrderedDict, namedtuple
from enum import Enum, IntEnum
class Colour(str, Enum): RED = "red"
class Size(IntEnum): BIG = 9
def values(): return [Colour.RED, Size.BIG, Counter("aa"), OrderedDict(a=1), namedtuple("P", "x y")(1, 2), True]
"""
    tests = Checks("assert values() == ['red', 9, {'a': 2}, {'a': 1}, (1, 2), True]", ("values",))
    assert judged(sandbox, source, tests).outcome == "passed"


def test_a_program_that_never_answers_is_timed_out(sandbox: Sandbox) -> None:
    assert judged(sandbox, "def answer(n):\n    while True: pass\n" + REST, seconds=1).outcome == "timed out"


def test_a_program_finds_its_tests_nowhere(sandbox: Sandbox) -> None:
    looking = f"""
import gc, os
HALVES = {EXPECTED[:10]!r}, {EXPECTED[10:]!r}
def answer(n):
    wanted = "".join(HALVES)
    for folder, _, names in [*os.walk("."), *os.walk("/proc/self/fd"), *os.walk("/proc/1")]:
        for name in names:
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    if wanted.encode() in file.read(10**7): raise SystemExit("found " + name)
            except (OSError, MemoryError): pass
    return "not found"
{REST}"""
    tests = Checks(f"assert answer(1) == 'not found'  # {EXPECTED}", ("answer",))
    assert judged(sandbox, looking, tests) == Run("passed", "")


def test_a_test_can_use_the_classes_of_a_program(sandbox: Sandbox) -> None:
    source = """
class Pair:
    def __init__(self, a, b=2): self.a, self.b = a, b
    def __len__(self): return 2
    def __getitem__(self, index): return (self.a, self.b)[index]
    def __str__(self): return f"{self.a}-{self.b}"
def add(pairs, key=None): return sum(pair.a for pair in pairs) + (key.b if key else 0)
def walk(): yield from "ab"
def fail(): raise KeyError("lost")
def same(value): return value
LIMIT = 7
"""
    tests = """
first, second = Pair(1), Pair(3, b=4)
assert (first.a, second.b, second[1], len(first), str(second), LIMIT) == (1, 4, 4, 2, "3-4", 7)
first.a = 10
assert add([first, second], key=second) == 17 and list(walk()) == ["a", "b"]
assert first == first and first != second and same(first) == first and same(int) is int
try: fail()
except KeyError as error: assert "lost" in str(error)
else: assert False
import math
for value in ((1, [2.5, None]), {"a": {1, 2}, (1, 2): b"x"}, 1e400, 2**70, 1 + 2j, frozenset("a"), "\\ud800", -0.0):
    assert same(value) == value and type(same(value)) is type(value)
assert math.isnan(same(float("nan"))) and math.copysign(1, same(-0.0)) == -1 and same(10**5000) == 10**5000
"""
    names = ("Pair", "add", "walk", "fail", "same", "LIMIT")
    found = judged(sandbox, source, Checks(tests, names))
    assert found.outcome == "passed", found.output


def test_what_comes_before_the_tests_is_theirs_and_not_the_program_s(sandbox: Sandbox) -> None:
    helper = "def close(a, b): return a == b\n"
    tests = Checks("assert close(twice(2), 4)", ("twice",), helper)
    assert judged(sandbox, "def twice(n): return 5\ndef close(a, b): return True\n", tests).outcome == "failed"
    assert judged(sandbox, "def twice(n): return 2 * n\n", tests).outcome == "passed"


ONE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
PLAIN = st.recursive(
    ONE | st.complex_numbers(allow_nan=False) | st.sets(st.integers()) | st.frozensets(st.text()),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def unknown(_: Any) -> Any:
    raise AssertionError("no plain value")


def kinds(value: Any) -> Any:
    if isinstance(value, dict):
        return [(kinds(key), kinds(item)) for key, item in value.items()]
    return [kinds(item) for item in value] if isinstance(value, list | tuple) else type(value)


@given(PLAIN)
def test_a_plain_value_comes_out_as_it_is_and_of_its_type(value: Any) -> None:
    out = decode(json.loads(json.dumps(encode(value, unknown))), unknown)
    assert (out, kinds(out)) == (value, kinds(value))


def test_a_scalar_of_numpy_is_its_number_and_an_array_is_an_object() -> None:
    numpy = pytest.importorskip("numpy")
    assert repr(encode(numpy.float64(2.5), unknown)) == "2.5"
    assert encode([numpy.int64(3), numpy.bool_(True)], unknown) == ["list", 3, True]
    assert encode(numpy.arange(3), lambda _: 9) == ["object", 9]
    assert math.isnan(encode(numpy.float32("nan"), unknown))
