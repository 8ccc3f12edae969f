"""What `fedcli doctor` says of one thing that it looked at."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; a cure stands where it is not as it should be."""

    name: str
    state: State
    detail: str
    cure: str = ""

    @classmethod
    def of(cls, name: str, is_right: bool, detail: str, cure: str, bad: State = "failed") -> "Finding":
        """Return what was found, with the cure where it is not right."""
        return cls(name, "ok", detail) if is_right else cls(name, bad, detail, cure)
