"""The optional package bitsandbytes: required by a quantised model, hidden from the libraries for any other."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedcli.config import Quantization
from fedcli.errors import RequirementError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_bitsandbytes(quantization: Quantization) -> None:
    """Raise RequirementError where a quantised model is asked for and bitsandbytes is missing or does not import."""
    if quantization == "none":
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of faster kernels that are not installed
    show_bitsandbytes()
    try:
        import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise RequirementError(
            f"model.quantization {quantization} needs the package bitsandbytes, which does not import: {error}",
            hint="Install it (pip install bitsandbytes); `fedcli doctor` tells more.",
        ) from error


@contextmanager
def without_bitsandbytes(wanted: bool = True) -> Iterator[None]:
    """Keep peft and transformers from importing bitsandbytes inside the block: a second, and a note on stderr.

    They remember that there is none, until `show_bitsandbytes`. Does nothing where it has been imported already, or is
    not `wanted`.
    """
    if not wanted or "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # what the import system takes for "not there"
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]


def keep_layout(model: "PreTrainedModel") -> None:
    """Keep 4-bit weights as they are stored.

    On processors with AVX-512 BF16 bitsandbytes 0.50 repacks them in the first evaluation: no gradient goes through
    them then, and where a layer's outputs are no multiple of 32 it is an AssertionError.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def show_bitsandbytes() -> None:
    """Let peft and transformers look for bitsandbytes anew, where they have been kept from it for an earlier model."""
    asked = {
        "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
        "transformers.utils.import_utils": ("is_bitsandbytes_available",),
    }
    for module in asked.keys() & sys.modules.keys():
        for function in asked[module]:
            getattr(sys.modules[module], function).cache_clear()
