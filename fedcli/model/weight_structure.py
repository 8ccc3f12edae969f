"""Whether weights belong to their config.json, as far as their names and shapes alone make that certain."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcli.model.architectures import Architecture
from fedcli.model.base_files import LAYER, Fault, Weights, some
from fedcli.model.stored_quantization import quantization_of

MISMATCH_CURE = "Fetch or save the model again: its weights need the names, layers and sizes that config.json gives."
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|head|output_projection)\.weight$")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|embeddings|tokens_embed)\.weight$")


@dataclass
class Structure:
    """What is certain about weights of an architecture whose layers are all alike."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    uneven: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    embedding_rows: int | None = None
    has_two_heads: bool = False
    """Whether an output head stands beside the embedding and differs from it, whatever config.json says."""

    @classmethod
    def of(cls, folder: Path, weights: Weights, known: Architecture | None, config: Mapping[str, Any]) -> "Structure":
        """Compare weights with a config.json; of an architecture whose layers differ (None) little is certain."""
        found = cls()
        at = known.layers_at if known else None
        hint = MISMATCH_CURE
        names = {name for name in weights.names if name.endswith((".weight", ".bias"))}
        embeddings = sorted((name for name in names if _EMBEDDINGS.search(name)), key=lambda name: (len(name), name))
        if embeddings and weights.shapes:
            found.embedding_rows = weights.shapes[embeddings[0]][0]
            heads = [name for name in names if re.search(r"(^|\.)(lm_head|embed_out)\.weight$", name)]
            found.has_two_heads = len(heads) == 1 and weights.differ(folder, heads[0], embeddings[0])
        if known is not None and at is not None and names:
            container, layers = _layers(names)
            if container is not None and container != at and container.endswith(f".{at}"):
                prefix = container.removesuffix(at)
                found.missing = [name.removeprefix(prefix) for name in sorted(names)]
                found.unexpected = sorted(names)
                hint = f"Save it again without its wrapper: the names of its weights begin with {prefix!r}."
            elif container in (at, at.partition(".")[2]):
                found._compare_layers(f"{container}.", layers, known, config, weights.shapes)
                found._check_head(names, known, config)
            heads = sorted(name for name in names if re.search(r"(^|\.)(lm_head|embed_out)\.weight$", name))
            found._check_sizes([*embeddings[:1], *heads], known, config, weights.shapes)
        if found.missing or found.unexpected or found.reshaped or found.uneven:
            told = mismatch(folder, found.missing, found.reshaped, found.unexpected, found.uneven)
            found.faults.append(Fault(told, hint))
        return found

    def _compare_layers(
        self,
        prefix: str,
        layers: Mapping[int, frozenset[str]],
        known: Architecture,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Compare the layers with each other, and their number with config.json's."""
        number = whole_number(known.setting(config, "num_hidden_layers"))
        if number is None:
            return
        is_quantized = quantization_of(config) is not None  # layers that are not hold other tensors
        inner = Counter(name for names in layers.values() for name in names)
        usual = {name for name, count in inner.items() if 2 * count > len(layers)}
        rare = {name for name, count in inner.items() if 2 * count < len(layers)}
        for layer in range(number):
            lacking = usual - layers.get(layer, frozenset())
            self.missing += sorted(
                f"{prefix}{layer}.{name}" for name in lacking if layer not in layers or not is_quantized
            )
        for layer, names in sorted(layers.items()):
            odd = names if layer >= number else rare & names if not is_quantized else frozenset()
            modules = {name.rpartition(".")[0] for name in usual | names if name.endswith(".weight")}
            self.unexpected += sorted(
                f"{prefix}{layer}.{name}"
                for name in odd
                if name.endswith(".weight") or name.rpartition(".")[0] in modules
            )
        half = {name for name, count in inner.items() if 2 * count == len(layers)}
        if not is_quantized:
            here = sorted((layer, name) for layer, names in layers.items() for name in names & half)
            modules = {name.rpartition(".")[0] for name in inner if name.endswith(".weight")}
            self.uneven += [
                f"{prefix}{layer}.{name}"
                for layer, name in here
                if name.endswith(".weight") or name.rpartition(".")[0] in modules
            ]
        if shapes and not is_quantized:
            for name in sorted(usual):
                found = {layer: shapes[f"{prefix}{layer}.{name}"] for layer in sorted(layers) if name in layers[layer]}
                (shape, count), *_ = Counter(found.values()).most_common(1)
                if 2 * count > len(found):
                    self.reshaped += [
                        f"{prefix}{layer}.{name} is {list(other)} instead of {list(shape)}"
                        for layer, other in found.items()
                        if other != shape
                    ]

    def _check_head(self, names: set[str], known: Architecture, config: Mapping[str, Any]) -> None:
        """Look for the output head of its own that config.json promises."""
        is_tied = known.setting(config, "tie_word_embeddings")
        if is_tied is False and not any(_HEADS.search(name) for name in names) and quantization_of(config) is None:
            self.missing.append("embed_out.weight" if known.name == "gpt_neox" else "lm_head.weight")

    def _check_sizes(
        self,
        names: Sequence[str],
        known: Architecture,
        config: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Compare the rows of embedding and output head with config.json's vocab_size."""
        vocab_size = whole_number(known.setting(config, "vocab_size"))
        if vocab_size is None or quantization_of(config) is not None:
            return
        self.reshaped += [
            f"{name} has {shapes[name][0]} rows, vocab_size is {vocab_size}"
            for name in names
            if name in shapes and shapes[name][0] != vocab_size
        ]


def mismatch(
    folder: Path,
    missing: Sequence[str],
    reshaped: Sequence[str],
    unexpected: Sequence[str],
    uneven: Sequence[str] = (),
) -> str:
    """Return the sentence about weights that do not belong to their config.json."""
    faults = {
        "missing": missing,
        "of another shape": reshaped,
        "unexpected": unexpected,
        "in half of the layers": uneven,
    }
    found = "; ".join(f"{len(names)} {fault} ({some(names)})" for fault, names in faults.items() if names)
    return f"config.json and weights of the base model {folder} do not belong together: {found}"


def _layers(names: Iterable[str]) -> tuple[str | None, dict[int, frozenset[str]]]:
    """Return where the layers lie, of several places the one with most of them, and each layer's names."""
    found: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := LAYER.fullmatch(name):
            found[match["at"]][int(match["number"])].add(match["name"])
    if not found:
        return None, {}
    at = max(sorted(found), key=lambda each: len(found[each]))
    return at, {number: frozenset(inner) for number, inner in found[at].items()}


def whole_number(value: Any) -> int | None:
    """Return a setting that is a whole number; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
