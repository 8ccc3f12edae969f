"""What `fedcli verify` finds."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Violation:
    """Something that is not as the protocol wants it."""

    path: Path
    problem: str


@dataclass
class Verification:
    """What was checked, and every violation that was found."""

    num_rounds: int = 0
    num_files: int = 0
    num_updates: int = 0
    num_recomputed: int = 0
    num_hidden: int = 0
    """Counted updates that this user may not read; the rounds made of them were not computed again."""
    num_pruned: int = 0
    """Rounds that were not computed again, because `gc` has removed what they were made of."""
    num_gone: int = 0
    """Counted updates that are gone, whose hashes are recorded; the rounds made of them were not computed again."""
    noisy_rounds: list[int] = field(default_factory=list)
    """Rounds whose adapter was not computed again, because the key of the noise in it was not given."""
    num_baselines: int = 0
    num_relayed: int = 0
    """Rounds of a region that were compared with those of its parent that they begin from."""
    num_signatures: int = 0
    """Of the enrolment, rounds, updates and countersignatures, those that are right."""
    violations: list[Violation] = field(default_factory=list)
    remarks: list[Violation] = field(default_factory=list)
    """What a client can bring about by itself, and nobody can prove: no violation."""

    def report(self, path: Path, problem: str) -> None:
        """Note a violation."""
        self.violations.append(Violation(path, problem))

    def remark(self, path: Path, what: str) -> None:
        """Note what is no violation."""
        self.remarks.append(Violation(path, what))
