"""Federated fine-tuning of language models over a directory or bucket that all share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcli.federation import Federation as Federation
    from fedcli.observer import Observer as Observer

__version__ = "0.1.0"
__all__ = ["Federation", "Observer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `import fedcli` itself costs nothing."""
    if name in ("Federation", "Observer"):
        return getattr(import_module(f"fedcli.{name.lower()}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
