"""Limits of chat templates, which are programs of a base model's publisher: how long one runs, how its numbers grow.

Jinja's sandbox bounds range() and nothing else: two nested loops never end. A thread looks at those that render now and
then, and raises in one that has not ended. Between two bytecodes only: so what computes in C for hours is bounded, too.
"""

import ctypes
import functools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fedcli.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
PAUSE = 0.5
LOOKS = 20
"""A template may run while this many looks are taken, PAUSE seconds apart; a process that is stopped takes none."""
_MOST_BITS = 10_000
_MOST_ITEMS = 10**8


class _EndlessError(BaseException):
    """Raised in a thread whose template does not end; no `except Exception` of a template's functions catches it."""


class _Rendering:
    """A template that a thread renders now.

    The exception may come between any two bytecodes, so whoever renders holds no lock: a flag of each side tells the
    other what it does, and of two that are set one is seen.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._looks = 0
        self._is_over = self._is_looked_at = self._is_raised = False

    def look(self) -> None:
        """Count a look, by the watching thread; raise in the rendering one, once, after too many."""
        self._is_looked_at = True
        self._looks += 1
        if self._looks > LOOKS and not self._is_raised and not self._is_over:
            self._is_raised = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_EndlessError))
        self._is_looked_at = False

    def close(self) -> None:
        """Let nothing be raised from now on, by the rendering thread."""
        self._is_over = True
        _renderings.pop(id(self), None)
        while self._is_looked_at:
            time.sleep(0)

    def end(self) -> None:
        """Close it where nothing has come; what was raised meanwhile comes here."""
        self.close()
        while self._is_raised:  # to take it back would leave the interpreter looking for it (CPython 3.11)
            time.sleep(0)


_renderings: dict[int, _Rendering] = {}
_start = threading.Lock()
_watch: threading.Thread | None = None


def limited(tokenizer: "PreTrainedTokenizerBase", render: Callable[[], T]) -> T:
    """Return what rendering gives; raise ConfigError where it does not end."""
    _bound_jinja()
    _start_watch()
    rendering = _Rendering()
    try:
        try:
            _renderings[id(rendering)] = rendering
            result = render()
        except _EndlessError:
            raise
        except BaseException:
            rendering.end()
            raise
        rendering.end()
        return result
    except _EndlessError:
        rendering.close()
    raise ConfigError(
        f"the chat template of the base model {tokenizer.name_or_path} does not end: it was stopped after "
        f"{LOOKS * PAUSE:g} s",
        hint="Mend the base's chat_template.jinja (or tokenizer_config.json), set data.template to another, or choose "
        "another base. A template that never ends may be meant to harm: ask who made the base.",
    )


def _start_watch() -> None:
    """Start the thread that looks, once a process; nothing is rendered yet by the thread that calls this."""
    global _watch
    if _watch is None or not _watch.is_alive():  # a forked process has none
        with _start:
            if _watch is None or not _watch.is_alive():
                _watch = threading.Thread(target=_look, name="fedcli-templates", daemon=True)
                _watch.start()


def _look() -> None:
    while True:
        time.sleep(PAUSE)
        for rendering in list(_renderings.values()):
            rendering.look()


@functools.cache
def _bound_jinja() -> None:
    """Let no product, power or rounding of a sandboxed template make a number, or a text, that takes hours."""
    from jinja2.filters import FILTERS, do_round
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def call_binop(self: Any, context: object, operator: str, left: Any, right: Any) -> Any:
        if _is_too_large(operator, left, right):
            raise OverflowError(f"its {operator} makes too large a value")
        return self.binop_table[operator](left, right)

    def bounded_round(value: Any, precision: Any = 0, method: Any = "common") -> Any:
        if isinstance(precision, int) and abs(precision) > _MOST_BITS:
            raise OverflowError("it rounds to too many digits")
        return do_round(value, precision, method)

    sandbox: Any = ImmutableSandboxedEnvironment
    sandbox.intercepted_binops, sandbox.call_binop = frozenset({"*", "**"}), call_binop
    FILTERS["round"] = bounded_round


def _is_too_large(operator: str, left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(0, right)
        return bits > _MOST_BITS
    sized, times = (left, right) if isinstance(right, int) else (right, left)
    return isinstance(times, int) and hasattr(sized, "__len__") and len(sized) * times > _MOST_ITEMS
