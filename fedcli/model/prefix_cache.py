"""Keys and values of tokens that several sequences begin with, computed once and given to each of them.

Every row of a batch is its own sequence without a gap: padding stands left of what is kept and right of what is new
(or, to generate, left alone), so that attention masks, positions and sliding windows are those of the row alone. Rows
that have as much to compute are computed together, so that little is padded.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from fedcli.model.output_head import logits_at
from fedcli.model.padding import cheapest_parts

OVERHEAD = {"cpu": 32}
"""What a further pass costs, in tokens, by the kind of device; measured on a CPU, of others OTHER_OVERHEAD."""
OTHER_OVERHEAD = 512
LARGEST_PASS = 2**16
"""Padded tokens of a pass."""

_BYTES_PER_TOKEN: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
"""Of the models that were probed: how much is kept of a token; 0 where nothing may be."""
_LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""Rotary embeddings that turn a token's key by an angle that depends on how long the whole sequence is."""


@dataclass(frozen=True)
class Kept:
    """The first `length` tokens of some sequences: what `before` has, and the layers' keys and values of the rest."""

    length: int
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Of each layer, (heads, new tokens, size)."""
    before: "Kept | None" = None

    def states(self, layer: int, which: int, num_tokens: int) -> torch.Tensor:
        """Return the keys (0) or values (1) of the first so many tokens, (heads, tokens, size)."""
        own = self.layers[layer][which]
        if self.before is None:
            return own[:, :num_tokens]
        return torch.cat([self.before.states(layer, which, num_tokens), own], dim=1)[:, :num_tokens]


@dataclass(frozen=True)
class Row:
    """A sequence's token ids, and what is kept of its first ones."""

    ids: Sequence[int]
    kept: Kept | None = None

    @property
    def num_kept(self) -> int:
        """How many of the tokens are computed."""
        return self.kept.length if self.kept else 0

    @property
    def num_new(self) -> int:
        """How many are still to be computed."""
        return len(self.ids) - self.num_kept


class _Layer(DynamicLayer):
    """A layer whose rows have the first tokens of what is kept; others are written behind them, without a copy."""

    def __init__(self, rows: Sequence[Row], taken: Sequence[int], layer: int, growth: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' annotations
        self._rows, self._taken, self._layer, self._growth = rows, taken, layer, growth
        self.length = self.kept_length = max(taken)
        self._stores: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write new states behind the old; return all of them, (batch, heads, tokens, size)."""
        if not self._stores:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._stores = [self._begun(which, new) for which, new in enumerate((key_states, value_states))]
            self._rows = ()  # what was kept is copied, and may go
        end = self.length + key_states.shape[-2]
        if end > self._stores[0].shape[-2]:
            more = max(end - self._stores[0].shape[-2], self._growth)
            self._stores = [nn.functional.pad(store, (0, 0, 0, more)) for store in self._stores]
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, self.length : end] = new
        self.length = end
        self.keys, self.values = (store[:, :, :end] for store in self._stores)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens of a row, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the tokens that a mask has to cover, and where they begin."""
        return self.length + query_length, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch; only those whose place changes are copied."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        for store in self._stores:
            store[moved] = store[indices[moved]]
        self._stores = [store[: len(indices)] for store in self._stores]
        self.keys, self.values = (store[:, :, : self.length] for store in self._stores)

    def _begun(self, which: int, new: torch.Tensor) -> torch.Tensor:
        batch, heads, num_new, size = new.shape
        store = new.new_zeros(batch, heads, self.kept_length + num_new + self._growth, size)
        first = self._rows[0].kept
        if first is not None and all(row.kept is first for row in self._rows) and len({*self._taken}) == 1:
            store[:, :, : self.kept_length] = first.states(self._layer, which, self.kept_length)
            return store
        for number, (row, taken) in enumerate(zip(self._rows, self._taken, strict=True)):
            if row.kept is not None and taken:
                store[number, :, self.kept_length - taken : self.kept_length] = row.kept.states(
                    self._layer, which, taken
                )
        return store


class _PassingLayer(_Layer):
    """The same for a single pass; only what is new stays."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Return all states, and forget what was kept."""
        found = super().update(key_states, value_states)
        self._stores = []
        self.keys, self.values = key_states, value_states
        return found


def _cache(layer_type: type[_Layer], rows: Sequence[Row], taken: Sequence[int], growth: int = 0) -> DynamicCache:
    cache = DynamicCache()
    kept = next(row.kept for row in rows if row.kept is not None)
    cache.layers = [layer_type(rows, taken, layer, growth) for layer in range(len(kept.layers))]
    return cache


def _inputs(model: nn.Module, rows: Sequence[Row], pad_id: int) -> dict[str, Any]:
    """Return what a model is given of the new tokens, padded on the right; a cache where anything is kept."""
    before = [row.num_kept for row in rows]
    most, width = max(before), max(row.num_new for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), most + width), dtype=torch.long)
    for number, (row, start) in enumerate(zip(rows, before, strict=True)):
        input_ids[number, : row.num_new] = torch.tensor(row.ids[start:])
        mask[number, most - start : most + row.num_new] = 1
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}
    if not most:
        return inputs
    inputs |= {"use_cache": True, "past_key_values": _cache(_PassingLayer, rows, before)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = torch.tensor(before)[:, None] + torch.arange(width)
        inputs["position_ids"] = positions.to(device)
    return inputs


def _passes(model: nn.Module, rows: Sequence[Row]) -> list[list[int]]:
    """Return the rows' numbers in the passes that compute them in the least time."""
    order = sorted(range(len(rows)), key=lambda number: rows[number].num_new)
    overhead = OVERHEAD.get(next(model.parameters()).device.type, OTHER_OVERHEAD)
    parts = cheapest_parts([rows[number].num_new for number in order], overhead=overhead, largest=LARGEST_PASS)
    return [[order[place] for place in part] for part in parts]


def logits_of(rows: Sequence[Row], lengths: Sequence[int], model: nn.Module, pad_id: int) -> torch.Tensor:
    """Return the logits of each row's last tokens, so many of each row and none kept: (sum of lengths, words)."""
    found: dict[int, torch.Tensor] = {}
    for numbers in _passes(model, rows):
        inputs = _inputs(model, [rows[number] for number in numbers], pad_id)
        positions = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
        for place, number in enumerate(numbers):
            positions[place, rows[number].num_new - lengths[number] : rows[number].num_new] = True
        logits = logits_at(model, positions.to(inputs["input_ids"].device), **inputs)
        found |= zip(numbers, torch.split(logits, [lengths[number] for number in numbers]), strict=True)
    return torch.cat([found[number] for number in range(len(rows))])


def keep(model: nn.Module, rows: Sequence[Row], pad_id: int) -> list[Kept]:
    """Compute the rows' new tokens, at least one of each; return what is to be kept of each row."""
    found: dict[int, Kept] = {}
    for numbers in _passes(model, rows):
        inputs = _inputs(model, [rows[number] for number in numbers], pad_id)
        inputs = {"use_cache": True, "past_key_values": DynamicCache(), **inputs}
        positions = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        positions[0, 0] = True  # logits of one token: a head may not take none
        logits_at(model, positions, **inputs)
        layers = inputs["past_key_values"].layers
        for place, number in enumerate(numbers):
            row = rows[number]
            states = tuple(
                (layer.keys[place, :, : row.num_new].clone(), layer.values[place, :, : row.num_new].clone())
                for layer in layers
            )
            found[number] = Kept(len(row.ids), states, row.kept)
    return [found[number] for number in range(len(rows))]


def begin(
    model: nn.Module, rows: Sequence[Row], pad_id: int, growth: int
) -> tuple[torch.Tensor, torch.Tensor, DynamicCache]:
    """Compute all but the rows' last tokens; return ids and mask, padded on the left, and the cache, to generate with.

    The cache grows by so many tokens at a time.
    """
    open_rows = [Row(row.ids[:-1], row.kept) for row in rows if row.num_new > 1]
    begun = iter(keep(model, open_rows, pad_id) if open_rows else ())
    rows = [Row(row.ids, next(begun)) if row.num_new > 1 else row for row in rows]
    return *padded_left(rows, pad_id), _cache(_Layer, rows, [row.num_kept for row in rows], growth)


def bytes_per_token(model: nn.Module) -> int:
    """Return how much is kept of a token, found out once a model; 0 where its prompts must be computed whole.

    So it is where layers keep a state in the place of keys and values (Mamba, RWKV), where a token's rotation depends
    on the sequence's length, and where a few tokens' logits are not those of the model without a cache.
    """
    if model not in _BYTES_PER_TOKEN:
        _BYTES_PER_TOKEN[model] = _probed(model)
    return _BYTES_PER_TOKEN[model]


@torch.no_grad()
def _probed(model: nn.Module) -> int:
    try:
        config: Any = model.config
        text = config.get_text_config()
        if any(kind in _LENGTH_DEPENDENT for kind in _rope_types(text)):
            return 0
        ids = [(number * 7 + 3) % text.vocab_size for number in range(24)]
        (kept,) = keep(model, [Row(ids[:9])], 0)
        if not kept.layers or any(states.shape[1] != kept.length for layer in kept.layers for states in layer):
            return 0
        (longer,) = keep(model, [Row(ids[:15], kept)], 0)
        rows = [Row(ids[:20], longer), Row(ids[:9] + ids[12:16], kept), Row(ids[:18], longer)]
        generated, first, second = _generated(model, rows)
        behind = [[*row.ids, token] for row, token in zip(rows, generated, strict=True)]
        alone = torch.stack([logits_of([Row(ids)], [2], model, 0) for ids in behind]).float()
        wanted = torch.cat([alone[:, 0], alone[:, 0], alone[:, 1]])
        found = torch.cat([logits_of(rows, [1] * len(rows), model, 0), first, second]).float()
    except Exception:  # a model's own code raises whatever it raises
        return 0
    is_exact = kept.layers[0][0].dtype == torch.float32 and not hasattr(model, "quantization_method")
    tolerance = (2e-5 if is_exact else 0.1) * max(float(wanted.abs().max()), 1.0)
    differ = float((found.log_softmax(-1) - wanted.log_softmax(-1)).abs().max())
    if not differ <= tolerance:
        return 0
    return sum(states.numel() * states.element_size() for layer in kept.layers for states in layer) // kept.length


def _rope_types(config: Any) -> list[str]:
    """Return the kinds of rotary embeddings that a configuration names, of all its layers' types."""
    named = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [each.get("rope_type", "default") for each in (named, *named.values()) if isinstance(each, dict)]


def _generated(model: Any, rows: Sequence[Row]) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Return the tokens that `generate` begins with, their logits, and those of the tokens behind them."""
    input_ids, mask, cache = begin(model, rows, 0, 1)
    device = next(model.parameters()).device
    made = model.generate(
        input_ids=input_ids.to(device), attention_mask=mask.to(device), past_key_values=cache,
        use_cache=True, max_new_tokens=2, min_new_tokens=2, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    return made.sequences[:, -2].tolist(), *made.logits


def padded_left(rows: Sequence[Row], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask of whole rows, (rows, the longest)."""
    width = max(len(row.ids) for row in rows)
    padded = [[pad_id] * (width - len(row.ids)) + [*row.ids] for row in rows]
    mask = [[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows]
    return torch.tensor(padded), torch.tensor(mask)
