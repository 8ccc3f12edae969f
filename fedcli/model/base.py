"""Base models: where one lies, and how two parties know that they have the same."""

import hashlib
import json
import os
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from fedcli.errors import ConfigError, RequirementError, did_you_mean
from fedcli.model.base_files import require_files
from fedcli.model.gguf import PACKAGE_PREFIX, dequantized, find_gguf, fingerprint_of_source, gguf_of_package
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import load_tokenizer, load_whole, loading

BUILTIN_PREFIX = "builtin:"
_BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_WEIGHTS = ("*.safetensors", "*.bin")
"""In the order of preference: a folder's .bin files count only where it has no safetensors."""
_SETTINGS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
)
_LATER_SETTINGS = ("spiece.model", "sentencepiece.bpe.model", "tekken.json", "*.tiktoken")
"""Tokenizers' files that fingerprints came to cover later: a base without them has the fingerprint that it had."""
_OTHER_FORMATS = ["*.pth", "*.onnx", "*.gguf", "*.h5", "*.msgpack", "*.ot", "original/*", "onnx/*"]
_CHUNK = 2**20
_NUM_CHUNKS = 16


def is_path(base: str, root: Path) -> bool:
    """Return whether `base` names a folder or a file rather than a hub id."""
    if base.startswith((BUILTIN_PREFIX, PACKAGE_PREFIX)):
        return False
    return base.startswith(("/", ".", "~")) or base.lower().endswith(".gguf") or (root / base).exists()


def is_hub_id(base: str, root: Path) -> bool:
    """Return whether `base` is neither built in, nor a package's, nor a path."""
    return not (base.startswith((BUILTIN_PREFIX, PACKAGE_PREFIX)) or is_path(base, root))


def find_base(base: str, *, revision: str | None, root: Path, only_cached: bool = False) -> Path:
    """Return the folder of a base model: built in, a path (relative to `root`), a package's, or fetched from the hub.

    A .gguf file, a folder's or a package's, is dequantised into a folder of fedcli's cache, unless it has been. With
    `only_cached` the hub is not asked: what its client has fetched before is all that there is.

    Raises ConfigError for an unknown built-in name, RequirementError where the model is not to be had or its files
    are not whole.
    """
    if base.startswith(BUILTIN_PREFIX):
        known = {BUILTIN_PREFIX + path.parent.name: path.parent for path in _BUILTIN_FOLDER.glob("*/config.json")}
        if base not in known:
            raise ConfigError(f"model.base: unknown built-in model {base!r}", hint=did_you_mean(base, known))
        return known[base]
    if base.startswith(PACKAGE_PREFIX):
        return _dequantized(gguf_of_package(base))
    folder = root / os.path.expanduser(base) if is_path(base, root) else _fetch(base, revision, only_cached)
    if (folder.is_file() or not _weights(folder)) and (file := find_gguf(folder)) is not None:
        return _dequantized(file)
    require_files(folder)
    return folder


def _dequantized(file: Path) -> Path:
    return dequantized(file, digest=files_digest, unpack=_unpack)


def _unpack(file: Path, folder: Path) -> None:
    """Write what a .gguf file holds into a folder, in transformers' layout; raise OSError where the disk refuses."""
    import torch
    import transformers
    from safetensors import SafetensorError

    # Where kernels for GGUF's blocks are installed, transformers would leave the weights in these; older ones never do.
    config = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    with quiet_libraries(), redirect_stderr(StringIO()):  # a progress bar that knows no off
        with loading(file):
            model = load_whole(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
        tokenizer = load_tokenizer(file.parent, trust_remote_code=False, gguf_file=file.name)
        vars(model)["hf_quantizer"] = None  # with one, or with its configuration, nothing is saved
        vars(model.config).pop("quantization_config", None)
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(str(error)) from error
        tokenizer.save_pretrained(folder)
        saved = folder / "tokenizer.json"
        if saved.is_file():  # the class that converts it may add a token that the file does not know
            document = json.loads(saved.read_bytes())
            rows = int(model.config.vocab_size)
            document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < rows]
            saved.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def fingerprint(folder: Path) -> str:
    """Return a hash that tells a base model from others; it costs the same for every size of model.

    It covers names and sizes of weights, configuration and tokenizer files, and of code where config.json names some
    (and nothing else that lies there), and all of their bytes where a file has at most 16 MiB, else 16 MiB spread
    evenly over it. It finds honest mix-ups; it is no defence against a forger. A folder that was made of a .gguf file
    has that file's.
    """
    own = files_digest(folder)
    return fingerprint_of_source(folder, own) or own


def files_digest(folder: Path, *, of_version: int = 2) -> str:
    """Return a hash of a base model's files, as `fingerprint` says; its version 1 covered fewer kinds of them."""
    digest = hashlib.sha256()
    settings = [folder / name for name in _SETTINGS if (folder / name).is_file()]
    configs = [path for name in ("config.json", "tokenizer_config.json") if (path := folder / name).is_file()]
    has_code = any(b'"auto_map"' in path.read_bytes() for path in configs)
    later = [*_LATER_SETTINGS, *(["*.py"] if has_code else [])] if of_version > 1 else []
    for path in [*_weights(folder), *settings, *(path for name in later for path in sorted(folder.glob(name)))]:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _NUM_CHUNKS * _CHUNK:
                digest.update(file.read())
            else:
                for chunk in range(_NUM_CHUNKS):
                    file.seek((size - _CHUNK) * chunk // (_NUM_CHUNKS - 1))
                    digest.update(file.read(_CHUNK))
    return digest.hexdigest()


def _weights(folder: Path) -> list[Path]:
    return next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])


def _fetch(base: str, revision: str | None, only_cached: bool) -> Path:
    """Fetch a model from the hub, or find it in the hub's local cache."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    options: dict[str, Any] = {"revision": revision, "local_files_only": only_cached}
    try:
        folder = Path(snapshot_download(base, ignore_patterns=[*_OTHER_FORMATS, "*.bin"], **options))
        return folder if _weights(folder) else Path(snapshot_download(base, ignore_patterns=_OTHER_FORMATS, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reasons: dict[type[Exception], str] = {
            HFValidationError: "it is no hub id, which is NAME or OWNER/NAME",
            GatedRepoError: "its licence must be accepted on its page, and `hf auth login` must know who did",
            RepositoryNotFoundError: "it has no such model, or a private one, for which `hf auth login` is needed",
        }
        if constants.HF_HUB_OFFLINE or only_cached:
            reasons[LocalEntryNotFoundError] = "its cache does not hold it" + (
                ", and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            )
        told = (reason for kind, reason in reasons.items() if isinstance(error, kind))
        problem = next(told, str(error).partition("\n")[0])
        raise RequirementError(
            f"base model not found: {base!r} is no folder here, and the hub does not give it: {problem}",
            hint="Check model.base in fedcli.yaml and the network, or name a folder that holds the model.",
        ) from error
