"""The name under eval/ of a model that is scored: what kind of model it is, and which one."""

from dataclasses import dataclass

from fedcli.workspace.layout import update_name

KINDS = ("base", "alone", "pooled", "client", "own", "cluster", "round", "adapter", "model", "api")
"""In the order of a table."""


@dataclass(frozen=True)
class TargetName:
    """A kind, and which one of it.

    base, alone-3, pooled, client-3-round-00010, own-3-round-00010, cluster-1-round-00010, round-00010,
    adapter-NAME-HASH, ...
    """

    kind: str
    which: str = ""

    @classmethod
    def parse(cls, text: str) -> "TargetName":
        """Return the name that a text stands for."""
        kind, _, which = text.partition("-")
        return cls(kind, which)

    @classmethod
    def of_round(cls, number: int) -> "TargetName":
        """Return a round's name."""
        return cls.parse(update_name(number))

    @classmethod
    def of_update(cls, client: int, round_number: int) -> "TargetName":
        """Return the name of a client's update of a round."""
        return cls("client", f"{client}-{update_name(round_number)}")

    @classmethod
    def of_cluster(cls, cluster: int, round_number: int) -> "TargetName":
        """Return the name of a cluster's adapter of a round."""
        return cls("cluster", f"{cluster}-{update_name(round_number)}")

    @classmethod
    def of_own(cls, client: int, round_number: int) -> "TargetName":
        """Return the name of a client's own adapter, as it stood with a round."""
        return cls("own", f"{client}-{update_name(round_number)}")

    @property
    def client(self) -> int | None:
        """The client that a model is of: one alone, an update or an own adapter; None for the other kinds."""
        client = self.which.partition("-")[0]
        return int(client) if self.kind in ("alone", "client", "own") and client.isdecimal() else None

    @property
    def round(self) -> int | None:
        """The round that a model stands with; None for the kinds that stand with none."""
        number = self.which.rpartition("-")[2] if self.kind in ("client", "own", "cluster", "round") else ""
        return int(number) if number.isdecimal() else None

    @property
    def number(self) -> int | None:
        """A round's number, or the client that trained alone; None for the other kinds."""
        return int(self.which) if self.kind in ("round", "alone") and self.which.isdecimal() else None

    @property
    def order(self) -> tuple[int, str]:
        """Where it stands in a table: by kind, then by number or name."""
        kind = KINDS.index(self.kind) if self.kind in KINDS else len(KINDS)
        return kind, self.which.zfill(12) if self.which.isdecimal() else self.which

    def __str__(self) -> str:
        return f"{self.kind}-{self.which}" if self.which else self.kind
