"""What runs a program inside a sandbox, and what judges it from another one.

`sandbox_child` starts it as `python -c SOURCE ROLE [FD FD]`; it imports nothing of fedcli. There are three roles:

* `whole` runs a program that carries its own tests.
* `serve` runs a program and then does what the judge asks: it calls a function of the program, or reads an attribute.
* `judge` runs the tests. The program's functions and classes stand there as `Remote`.

Between the last two only plain values travel, one JSON text a line, so what compares them is none of the program's. No
answer of a program is trusted: whatever it says becomes a plain value, one of `_TYPES`, or a `Remote`.
"""

import builtins
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

GONE = 6
"""A judge's exit status where the program has ended before its tests."""
MESSAGE_BYTES = 8 * 2**20
MOST_ITEMS = 10**6
"""Of what the tests iterate over."""
_SHOWN = 500
"""Characters of an exception's text."""
_TYPES = {kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)}
"""The only types that are values: of what the other side names, nothing else of Python's is ever looked up."""
_MANY: dict[str, type[list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any]]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


def main() -> None:
    """Play a role with what stdin holds: a token's line, for a judge three texts as JSON, for others a program."""
    role, *descriptors = sys.argv[1:]
    token, _, contents = sys.stdin.buffer.read().partition(b"\n")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    sys.set_int_max_str_digits(0)
    output = os.dup(1)
    if role == "judge":
        setup, names, tests = json.loads(contents)
        _judge(setup, names, tests, _Line(*map(int, descriptors)))
    elif role == "serve":
        _serve(contents, _Line(*map(int, descriptors)))
    else:
        _execute(contents, "program.py", _as_main())
    sys.stdout.flush()
    if role != "serve":
        os.write(output, token)
    os._exit(0)  # threads and exit handlers that the program leaves behind are not waited for


def _as_main() -> dict[str, Any]:
    """Return the namespace of a new __main__."""
    sys.modules["__main__"] = module = ModuleType("__main__")
    return vars(module)


def _execute(source: bytes, name: str, namespace: dict[str, Any]) -> None:
    """Run a source that stands in a file, too, so that a traceback shows its lines."""
    with open(name, "wb") as file:
        file.write(source)
    exec(compile(source, name, "exec"), namespace)


class _Line:
    """Messages from and to the other side."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._incoming: BinaryIO = os.fdopen(incoming, "rb")
        self._outgoing: BinaryIO = os.fdopen(outgoing, "wb")

    def send(self, message: Any) -> None:
        """Send a message; raise ValueError for one that is too long."""
        text = json.dumps(message).encode()
        if len(text) >= MESSAGE_BYTES:
            raise ValueError("the value is too large")
        self._outgoing.write(text + b"\n")
        self._outgoing.flush()

    def receive(self) -> Any:
        """Return the next message; raise EOFError where none comes any more, ValueError for one that is too long."""
        text = self._incoming.readline(MESSAGE_BYTES + 1)
        if not text:
            raise EOFError
        if len(text) > MESSAGE_BYTES:
            raise ValueError("the program's value is too large")
        return json.loads(text)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """Return a value as JSON holds it: None, numbers and texts as they are, others as a list that begins with its kind.

    Of a subclass only the plain value is kept. `refer` gives the number of an object that is no plain value.
    """
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, type):
        name = str(value.__name__)
        return ["type", name] if _TYPES.get(name) is value else ["object", refer(value)]
    if isinstance(value, dict):
        return ["dict", *([encode(key, refer), encode(item, refer)] for key, item in value.items())]
    for kind, many in _MANY.items():
        if isinstance(value, many):
            return [kind, *(encode(item, refer) for item in value)]
    return ["object", refer(value)]


def decode(value: Any, found: Callable[[int], Any]) -> Any:
    """Return what `encode` was given; `found` gives the object of a number."""
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind in _MANY:
        return _MANY[kind](decode(item, found) for item in items)
    if kind == "dict":
        return {decode(key, found): decode(item, found) for key, item in items}
    if kind == "complex":
        return complex(*items)
    if kind == "bytes":
        return bytes.fromhex(*items)
    if kind == "type":
        return _TYPES[items[0]]
    return found(int(items[0]))


def _serve(source: bytes, line: _Line) -> None:
    """Run a program; then do what the judge asks until it has ended."""
    namespace = _as_main()
    _execute(source, "program.py", namespace)
    held: list[Any] = []
    numbers: dict[int, int] = {}

    def refer(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(held)
            held.append(value)
        return numbers[id(value)]

    def named(name: str) -> Any:
        if name not in namespace:
            raise NameError(f"name {name!r} is not defined")
        return namespace[name]

    acts: dict[str, Callable[..., Any]] = {
        "name": named,
        "get": getattr,
        "set": setattr,
        "call": lambda function, positional, by_name: function(*positional, **by_name),
        "iterate": lambda values: list(itertools.islice(values, MOST_ITEMS)),
        "length": len,
        "item": lambda values, key: values[key],
        "text": str,
    }
    while True:
        try:
            act, *arguments = line.receive()
        except EOFError:
            return
        try:
            given = [decode(argument, held.__getitem__) for argument in arguments]
            result = encode(acts[act](*given), refer)
            line.send(["value", result, encode(given[1], refer) if act == "call" else None])
        except Exception as error:
            traceback.print_exc()
            line.send(["raise", type(error).__name__, str(error)[:_SHOWN]])


class Remote:
    """An object of the program, in the tests; it equals nothing but itself."""

    def __init__(self, number: int, ask: Callable[..., Any]) -> None:
        vars(self).update(_number=number, _ask=ask)

    def __getattr__(self, name: str) -> Any:
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)

    def __call__(self, *positional: Any, **by_name: Any) -> Any:
        return self._ask("call", self, positional, by_name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("iterate", self))

    def __len__(self) -> int:
        return int(self._ask("length", self))

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self, key)

    def __str__(self) -> str:
        return str(self._ask("text", self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(vars(self)["_number"] == vars(other)["_number"])

    def __hash__(self) -> int:
        return hash(vars(self)["_number"])


def _judge(setup: str, names: list[str], tests: str, line: _Line) -> None:
    """Run tests of a program that another sandbox runs; exit with GONE where it has ended."""

    def refer(value: Any) -> int:
        if not isinstance(value, Remote):
            raise TypeError(f"the tests hand over a {type(value).__name__}, which is no plain value")
        return int(vars(value)["_number"])

    def ask(*message: Any) -> Any:
        contents = [encode(part, refer) for part in message]
        try:
            line.send(contents)
            kind, *reply = line.receive()
        except (EOFError, BrokenPipeError):
            _end(GONE)
        if kind != "value":
            raise _exception(*reply)
        result, changed = (decode(part, lambda number: Remote(number, ask)) for part in reply)
        if message[0] == "call":
            for before, after in zip(message[2], changed, strict=True):
                _take_over(before, after)
        return result

    namespace = _as_main()
    _execute(setup.encode(errors="replace"), "setup.py", namespace)
    for name in names:
        try:
            namespace[name] = ask("name", name)
        except NameError:
            namespace.pop(name, None)
    _execute(tests.encode(errors="replace"), "tests.py", namespace)


def _take_over(before: Any, after: Any) -> None:
    """Let an argument be what the program has made of it in place."""
    if isinstance(before, list) and isinstance(after, list):
        before[:] = after
    elif isinstance(before, set | dict) and type(before) is type(after):
        before.clear()
        before.update(after)


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        kind = RuntimeError
    try:
        return kind(text)
    except TypeError:  # one that takes more than a text
        return RuntimeError(f"{name}: {text}")


def _end(status: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
