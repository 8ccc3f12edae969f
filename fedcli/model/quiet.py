"""Keeping the model libraries' progress bars, notes and deprecation warnings off a user's terminal."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers, peft and bitsandbytes inside the block; errors still raise."""
    from transformers.utils import logging as transformers_logging

    level, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|torch|bitsandbytes)\b")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def without_bitsandbytes(wanted: bool = True) -> Iterator[None]:
    """Keep peft and transformers from importing bitsandbytes inside the block: a second, and a note on stderr.

    They remember for the rest of the process that there is none. Does nothing where it has been imported already, or
    is not `wanted`.
    """
    if not wanted or "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # what the import system takes for "not there"
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
