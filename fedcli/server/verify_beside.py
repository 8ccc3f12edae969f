"""What `fedcli verify` checks beside rounds and updates: baselines, scores, and what simulated clients keep."""

from contextlib import suppress

from fedcli.config import algorithm_from
from fedcli.errors import IntegrityError
from fedcli.server.verification import Verification
from fedcli.workspace.baselines import published_baselines, read_baseline
from fedcli.workspace.client_state import damaged_candidates, read_state
from fedcli.workspace.history import Round, read_record
from fedcli.workspace.layout import Workspace
from fedcli.workspace.scores import ScoreRecord, check_items, score_files


def check_baselines(start: Round, result: Verification) -> None:
    """Every file of a baseline has its hash, and its adapter has the federation's tensors."""
    workspace = start.workspace
    for name in published_baselines(workspace):
        try:
            read_baseline(workspace, name, start.manifest.tensors)
            result.num_baselines += 1
        except IntegrityError as error:
            result.report(workspace.baseline(name), error.message)


def check_scores(workspace: Workspace, result: Verification) -> None:
    """Every record of scores is as it was written, and so are the items that it was made of."""
    for path in score_files(workspace):
        try:
            record = read_record(workspace, ScoreRecord, path)
            if record is not None:
                check_items(workspace, record)
        except IntegrityError as error:
            result.report(path, error.message)


def check_private(rounds: list[Round], result: Verification) -> None:
    """What simulated clients keep for the latest algorithm is as they wrote it, and there where they need it."""
    workspace, head = rounds[-1].workspace, rounds[-1]
    with suppress(IntegrityError):  # an algorithm that is not known is told once
        algorithm = algorithm_from(head.manifest.algorithm)
        for client in sorted(int(name) for name in workspace.store.names("private") if name.isdecimal()):
            if workspace.store.is_hidden(f"private/{client}"):
                continue
            damaged = dict(damaged_candidates(workspace.private(client), algorithm))
            for path, problem in damaged.items():
                result.report(path, problem)
            is_kept = workspace.store.names(f"private/{client}/{algorithm.private_state}")
            if is_kept and not damaged and len(rounds) == head.number + 1:
                try:
                    read_state(workspace.private(client), rounds, algorithm, client)
                except IntegrityError as error:
                    result.report(workspace.private(client).folder, error.message)
