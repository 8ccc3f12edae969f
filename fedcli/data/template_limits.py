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


_lock = threading.Lock()
_looks: dict[int, int] = {}
"""How often a thread was seen with its present template."""
_watch: threading.Thread | None = None


def limited(tokenizer: "PreTrainedTokenizerBase", render: Callable[[], T]) -> T:
    """Return what rendering gives; raise ConfigError where it does not end."""
    _bound_jinja()
    own = threading.get_ident()
    try:
        try:
            _begin(own)
            return render()
        finally:
            _end(own)
    except _EndlessError:
        _end(own)  # it may have come while the first call of it was at work
    raise ConfigError(
        f"the chat template of the base model {tokenizer.name_or_path} does not end: it was stopped after "
        f"{LOOKS * PAUSE:g} s",
        hint="Mend the base's chat_template.jinja (or tokenizer_config.json), set data.template to another, or choose "
        "another base. A template that never ends may be meant to harm: ask who made the base.",
    )


def _begin(own: int) -> None:
    global _watch
    with _lock:
        _looks[own] = 0
        if _watch is None or not _watch.is_alive():  # a forked process has none
            _watch = threading.Thread(target=_look, name="fedcli-templates", daemon=True)
            _watch.start()


def _end(own: int) -> None:
    with _lock:
        if _looks.pop(own, 0) > LOOKS:
            _raise_in(own, None)  # where it has not been raised yet it never is


def _look() -> None:
    """Count looks, and raise once in each thread that has had too many; end where nothing renders."""
    global _watch
    while True:
        time.sleep(PAUSE)
        with _lock:
            if not _looks:
                _watch = None
                return
            for own in _looks:
                _looks[own] += 1
                if _looks[own] % LOOKS == 1 and _looks[own] > LOOKS:  # again where something swallowed it
                    _raise_in(own, _EndlessError)


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


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
