"""The files of a base model: whether they are whole, and the names and shapes of its weights."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from struct import unpack
from typing import Any
from zipfile import is_zipfile

from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from fedcli.errors import RequirementError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("tekken.json", "*.tiktoken"),
)
LAYER = re.compile(r"(?P<at>.*?)\.(?P<number>\d+)\.(?P<name>.+)")
_AGAIN = "Fetch or copy the model again."
_CHUNK = 2**20
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Fault:
    """Why a base will not do, and what to do about it."""

    message: str
    hint: str


def require_files(folder: Path) -> None:
    """Raise RequirementError where a path is no folder with a config.json, whole weights and nothing in their way."""

    def refuse(problem: str, hint: str) -> RequirementError:
        return RequirementError(f"base model not found: {folder} {problem}", hint=hint)

    layout = "Check model.base in fedcli.yaml: a folder in transformers' layout, a .gguf file, or a hub id."
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    if folder.is_file():
        raise refuse("is a file, and a base model is a folder", layout)
    if not folder.is_dir():
        raise refuse("does not exist", layout)
    has_config, has_adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    if has_adapter and not (has_config and set(weight_files(folder)) - {"adapter_model.safetensors"}):
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        hint = f"Name its base as model.base{f' ({base})' if base else ''}, and start from it with adapter.init."
        raise refuse("is an adapter's folder, and does not hold config.json and weights of a base model", hint)
    if not has_config:
        raise refuse("does not hold config.json and weights", layout)
    if not has_weights:
        others = sorted(
            path.name for end in ("pth", "pt", "h5", "msgpack", "onnx", "ot") for path in folder.glob(f"*.{end}")
        )
        kinds = f"; {others[0]} is of another format" if others else ""
        raise refuse(f"does not hold config.json and weights (no *.safetensors, no *.bin){kinds}", layout)
    tokenizer = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else TOKENIZER_FILES
    for name in ("config.json", *tokenizer, "*.index.json", *weight_files(folder)):
        for path in sorted(folder.glob(name)):
            if path.is_file() and _starts_with(path, _LFS):
                raise RequirementError(
                    f"the base model {folder} is not fetched: {path.name} is a git-lfs pointer",
                    hint=f"Run `git lfs pull` in {folder}, or fetch the model again.",
                )
    if has_adapter:
        raise RequirementError(
            f"the base model {folder} has an adapter_config.json beside its weights: transformers would load both",
            hint="Move adapter_config.json and adapter_model.* to a folder of their own; adapter.init may name that.",
        )
    if not weight_files(folder):
        names = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3])
        raise RequirementError(
            f"the base model {folder} has no model.safetensors and no model.safetensors.index.json; it holds {names}"
            if names
            else f"the base model {folder} has no pytorch_model.bin and no pytorch_model.bin.index.json",
            hint="Fetch or save the model again: transformers reads the weights that these files name.",
        )
    if gone := [name for name in weight_files(folder) if not (folder / name).is_file()]:
        raise RequirementError(
            f"the base model {folder} is not whole: of its index's files {len(gone)} are not there ({some(gone)})",
            hint=_AGAIN,
        )

    for name in weight_files(folder):
        path = folder / name
        if name.endswith(".bin") and _starts_with(path, b"PK") and not is_zipfile(path):
            raise RequirementError(
                f"the base model {folder} is not whole: {name} is cut off", hint="Fetch or copy that file again."
            )


def _starts_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that transformers reads weights from, there or not; in its order."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            mapped = read_object(index).get("weight_map")
            if not isinstance(mapped, dict):
                raise RequirementError(f"{index} holds no weight_map", hint=_AGAIN)
            names = sorted({str(name) for name in mapped.values()})
            if outside := [name for name in names if name.startswith("/") or ".." in Path(name).parts]:
                raise RequirementError(f"{index} names a file outside of its folder: {outside[0]}", hint=_AGAIN)
            return names
    return []


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; raise RequirementError where a file holds none."""
    try:
        document = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RequirementError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    if not isinstance(document, dict):
        raise RequirementError(f"{path} holds no JSON object", hint=_AGAIN)
    return document


@dataclass(frozen=True)
class Weights:
    """Names and shapes of a base's weights: shapes are empty where only an index tells the names, both for one .bin."""

    names: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Types as safetensors names them: F32, BF16, F8_E4M3, I8."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The file that each weight lies in."""

    @classmethod
    def read(cls, folder: Path) -> "Weights":
        """Read safetensors' headers, or the index of .bin files.

        Raises RequirementError for a file that is not whole, or that lacks a tensor which the index places in it.
        """
        files = weight_files(folder)
        shapes: dict[str, tuple[int, ...]] = {}
        kinds: dict[str, str] = {}
        places: dict[str, str] = {}
        for name in files:
            if not name.endswith(".safetensors"):
                index = folder / "pytorch_model.bin.index.json"
                mapped = read_object(index)["weight_map"] if index.is_file() and len(files) > 1 else {}
                return cls(frozenset(mapped), {})
            try:
                with safe_open(folder / name, "np") as file:
                    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
                    shapes |= {key: tuple(each.get_shape()) for key, each in slices.items()}
                    kinds |= {key: str(each.get_dtype()) for key, each in slices.items()}
                    places |= dict.fromkeys(slices, name)
            except (SafetensorError, OSError) as error:
                raise RequirementError(
                    f"the base model {folder} is not whole: {name} is cut off, or no safetensors file ({error})",
                    hint="Fetch or copy that file again.",
                ) from error
        index = folder / "model.safetensors.index.json"
        if files != ["model.safetensors"] and index.is_file():
            gone = sorted(read_object(index)["weight_map"].keys() - shapes.keys())
            if gone:
                raise RequirementError(
                    f"the base model {folder} is not whole: {len(gone)} of its index's weights are missing "
                    f"({some(gone)})",
                    hint=_AGAIN,
                )
        return cls(frozenset(shapes), shapes, kinds, places)

    def differ(self, folder: Path, one: str, other: str) -> bool:
        """Return whether two weights have other types, shapes or bytes; of large ones 16 MiB are compared."""
        if (self.kinds[one], self.shapes[one]) != (self.kinds[other], self.shapes[other]):
            return True
        (first, start), (second, begin) = (_opened(folder / self.files[name], name) for name in (one, other))
        with first, second:
            size = start[1] - start[0]
            for at in range(0, size, max(_CHUNK, size // 16)):
                length = min(_CHUNK, size - at)
                first.seek(start[0] + at)
                second.seek(begin[0] + at)
                if first.read(length) != second.read(length):
                    return True
        return False

    def counts(self) -> tuple[int, int]:
        """Return the numbers of parameters of linear layers and of all else."""
        linear = other = 0
        for name, shape in self.shapes.items():
            size = 1
            for length in shape:
                size *= length
            if len(shape) > 1 and LAYER.match(name):
                linear += size
            else:
                other += size
        return linear, other


def _opened(path: Path, name: str) -> tuple[BufferedReader, tuple[int, int]]:
    """Open a safetensors file; return it and where a tensor's bytes start and end."""
    file = path.open("rb")
    (length,) = unpack("<Q", file.read(8))
    start, end = from_json(file.read(length))[name]["data_offsets"]
    return file, (8 + length + start, 8 + length + end)


def some(names: Sequence[str]) -> str:
    """Return the first three names, and dots for more."""
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])
