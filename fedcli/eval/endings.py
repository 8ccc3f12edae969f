"""When answers end while they are generated: what `generate` of transformers asks after each token."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

Criterion: TypeAlias = Callable[..., torch.Tensor]
"""Given ids and scores, tells of each row whether it has ended."""


def stops(stop: Sequence[str], width: int, decoded: Callable[[list[list[int]]], list[str]]) -> Criterion:
    """Return what tells whether rows have come to a stop sequence; it looks only behind the prompts' `width`."""
    num_tokens = max(len(mark.encode()) for mark in stop) + 1

    def has_stopped(input_ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
        ends = decoded(input_ids[:, max(width, input_ids.shape[1] - num_tokens) :].tolist())
        return torch.tensor([any(mark in end for mark in stop) for end in ends], device=input_ids.device)

    return has_stopped


def leaving(criteria: Sequence[Criterion], end_id: int, num_rows: int) -> Criterion:
    """Return what tells which rows have ended; once so many have, all of them: the others are asked for again."""
    ended: torch.Tensor | None = None

    def has_ended(input_ids: torch.Tensor, scores: torch.Tensor, **settings: Any) -> torch.Tensor:
        nonlocal ended
        now = input_ids[:, -1] == end_id
        for criterion in criteria:
            now |= criterion(input_ids, scores, **settings)
        ended = now if ended is None else ended | now
        return now if int(ended.sum()) < num_rows else torch.ones_like(now)

    return has_ended


def closed_up(is_open: Sequence[bool]) -> list[int]:
    """Return the open places, the last ones moved to where one is not: few rows have to be copied."""
    places = [place for place, is_it in enumerate(is_open) if is_it]
    late = iter(places[sum(is_open[: len(places)]) :])
    return [place if is_open[place] else next(late) for place in range(len(places))]
