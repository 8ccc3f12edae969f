"""What work tells whoever shows it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedcli.client.due import ClientResult
    from fedcli.errors import ClientFailure
    from fedcli.scoring.after_rounds import RoundScores
    from fedcli.server.aggregate import AggregationResult
    from fedcli.training.reports import StepReport
    from fedcli.workspace.history import Round


class Observer:
    """Receives the events of a call. Each method does nothing; a display overrides those that it shows."""

    def rows_read(self, what: str, count: int) -> None:
        """So many rows in all are done of what is being done ("reading rows")."""

    def round_started(self, head: "Round") -> None:
        """A round is open, and its clients are trained now."""

    def client_started(self, client: int) -> None:
        """A client is next."""

    def model_loading(self, head: "Round") -> None:
        """The base model is needed, to train in this round."""

    def step_done(self, client: int | None, report: "StepReport") -> None:
        """A client made an optimiser step; None: the baseline of all rows."""

    def client_done(self, result: "ClientResult") -> None:
        """A client has trained, and dropped its update."""

    def client_failed(self, failure: "ClientFailure") -> None:
        """A client could not be trained; the work goes on with the others."""

    def baseline_round(self, number: int, rounds: int, steps: int) -> None:
        """A baseline begins a round of so many steps, of so many rounds."""

    def worker_died(self, client: int, exit_code: int | None) -> None:
        """The process that trained a client is gone (negative: by that signal); another one tries again."""

    def waiting(self, message: str) -> None:
        """Nothing can be done until somebody else has."""

    def update_read(self, round_number: int, client: int) -> None:
        """A client's update of a round was read."""

    def round_done(self, result: "AggregationResult") -> None:
        """A round's updates were merged."""

    def round_scored(self, scores: "RoundScores") -> None:
        """A new round was scored, as fedcli.yaml asks, or could not be."""

    def checking(self, what: str) -> None:
        """Something is looked at next."""

    def noted(self, text: str) -> None:
        """Something that was asked for holds for a part only."""

    def target_started(self, target: str, benchmark: str) -> None:
        """A model begins a benchmark."""

    def answered(self, num_done: int, num_asked: int) -> None:
        """So many of the questions that were asked together have an answer."""

    def fetched(self, what: str, num_bytes: int, total: int | None) -> None:
        """So many bytes of a file are here, of so many where that is known."""

    def carrying(self, what: str, num_bytes: int) -> None:
        """Something of so many bytes is copied to another place next."""
