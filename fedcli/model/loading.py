"""Loading base models: whole, without their weights, quantised; and what an error of loading tells."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from fedcli.config import Quantization
from fedcli.errors import RequirementError
from fedcli.model.bitsandbytes import keep_layout, require_bitsandbytes, show_bitsandbytes
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.stored_quantization import quantization_of
from fedcli.model.weight_structure import MISMATCH_CURE, mismatch

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

_BROKEN = (MemoryError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError)


def comes_quantized(folder: Path) -> bool:
    """Return whether a base model's weights are stored quantised, as its config.json says."""
    try:
        return quantization_of(json.loads((folder / "config.json").read_bytes())) is not None
    except (OSError, ValueError, AttributeError):
        return False  # loading it will say what is wrong


def load_base(
    folder: Path, *, trust_remote_code: bool, quantization: Quantization = "none"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load model and tokenizer onto the GPU, in bfloat16, where there is one that can; else in float32.

    The linear layers of a quantised model hold bitsandbytes' int8 (Dettmers et al. 2022) or nf4 with double
    quantisation (QLoRA, Dettmers et al. 2023); all else of it is float32, as PEFT prepares it for training. The base's
    own dropout is off. Raises RequirementError for a base that is not whole, or no causal language model.
    """
    import torch

    from fedcli.model.output_head import probe

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    if comes_quantized(folder):
        show_bitsandbytes()
    if quantization != "none":  # while it quantises, transformers takes a linear layer's weights of any shape
        load_shapes(folder, revision=None, trust_remote_code=trust_remote_code)
    with loading(folder):
        options = {"trust_remote_code": trust_remote_code, **_bitsandbytes(quantization, dtype)}
        model = load_whole(folder, dtype=dtype, device_map=device, **options)
        if quantization != "none":
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # training says when
        _still(model)
        probe(model)
    return model, load_tokenizer(folder, trust_remote_code=trust_remote_code)


def _still(model: "PreTrainedModel") -> None:
    """Set every rate of dropout, dropped layers and router noise to zero, in modules and in their configurations.

    And let RWKV's layers be as they are: it divides some of them by powers of two in evaluation, LoRA's share not.
    """
    from torch.nn.modules.dropout import _DropoutNd

    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in [*vars(holder).items()] if holder is not None else ():
                if isinstance(value, float) and re.search("drop|jitter", name):
                    setattr(holder, name, 0.0)
                elif name == "rescale_every":
                    setattr(holder, name, 0)


def _bitsandbytes(quantization: Quantization, dtype: "torch.dtype") -> "dict[str, BitsAndBytesConfig]":
    """Return the option that quantises a base while it is loaded; one that comes quantised gets none but its own."""
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    require_bitsandbytes(quantization)
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    chosen = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True, **nf4}
    return {"quantization_config": BitsAndBytesConfig(**chosen)}


def load_shapes(source: Path | str, *, revision: str | None, trust_remote_code: bool) -> "PreTrainedModel":
    """Return a base model on the meta device, without weights: of a folder, or of a hub id's config.json.

    Raises RequirementError where a folder's config.json and weights do not belong together. Their names and shapes
    are read, not their values. The weights of a base that comes quantised are checked when they are loaded.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_libraries(), loading(source):
        if isinstance(source, Path) and not comes_quantized(source):
            return load_whole(
                source, dtype=torch.float32, device_map="meta", revision=revision, trust_remote_code=trust_remote_code
            )
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def load_whole(folder: Path, **options: Any) -> "PreTrainedModel":
    """Load a model by from_pretrained; raise RequirementError where its config.json and weights do not belong together.

    transformers draws weights at random that it does not find, in each process others.
    """
    from transformers import AutoModelForCausalLM

    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model: PreTrainedModel
    model, report = loaded
    unexpected = report["unexpected_keys"]
    missing = sorted(report["missing_keys"])
    reshaped = [
        f"{name} is {list(found)} instead of {list(wanted)}"
        for name, found, wanted in sorted(report["mismatched_keys"])
    ]
    odd = sorted(unexpected if missing else _of_another_model(model, unexpected))
    if missing or reshaped or odd:
        raise RequirementError(mismatch(folder, missing, reshaped, odd), hint=MISMATCH_CURE)
    keep_layout(model)
    return model


def _of_another_model(model: "PreTrainedModel", names: Iterable[str]) -> list[str]:
    """Return the unexpected weights that tell of another model, of a model that lacks none.

    A head of another task or a vision tower beside a whole language model is left alone, as transformers does, and so
    are the buffers of old checkpoints. A weight in one of the layers, or a bias of a module that has none here, was
    trained with them: without it the model computes something else.
    """
    own = {name for name, _ in model.named_parameters()}
    layers = tuple({name[: match.start()] for name in own if (match := re.search(r"(?<=\.)\d+\.", name))})
    return [
        name
        for name in names
        if (name.startswith(layers) and name.endswith(".weight"))
        or (name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" in own)
    ]


def load_tokenizer(folder: Path, *, trust_remote_code: bool, **options: Any) -> "PreTrainedTokenizerBase":
    """Load a base model's tokenizer by from_pretrained; raise RequirementError where there is none that works."""
    from transformers import AutoTokenizer

    with quiet_libraries(), loading(folder):
        options |= {"trust_remote_code": trust_remote_code}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer


def pad_id_of(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel", default: int = 0) -> int:
    """Return the id that pads; where the tokenizer has none, or one that the embedding has not, the default.

    Any id will do, for no position ever sees what pads.
    """
    pad_id, vocab_size = (
        tokenizer.pad_token_id,
        getattr(getattr(model.config, "text_config", model.config), "vocab_size", None),
    )
    return pad_id if isinstance(pad_id, int) and (vocab_size is None or pad_id < vocab_size) else default


def has_bfloat16() -> bool:
    """Return whether there is a GPU that computes in bfloat16."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def short_memory(error: Exception) -> str | None:
    """Return whose memory an error says is too small, "the GPU's memory" or "this machine's memory"; else None.

    Only a GPU has an error of its own: a CPU's allocator, and a file that cannot be mapped, raise what bugs raise.
    """
    import torch

    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError) or ("cuda" in text and ("out of memory" in text or "alloc" in text)):
        return "the GPU's memory"
    words = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
    return "this machine's memory" if isinstance(error, MemoryError) or any(each in text for each in words) else None


@contextmanager
def loading(folder: Path | str) -> Iterator[None]:
    """Turn what transformers raises for a folder that is no whole model into a RequirementError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except StrictDataclassError as error:  # what transformers finds in a config.json
        raise RequirementError(
            f"the base model {folder} cannot be loaded: its config.json cannot be used: "
            f"{' '.join(str(error.__cause__ or error).split())[:300]}",
            hint="Fetch the model again, or mend its config.json.",
        ) from error
    except ImportError as error:  # transformers says which package the model needs, and how to install it
        raise RequirementError(
            f"the base model {folder} needs a package that is missing: {' '.join(str(error).split())}",
            hint="Install that package, or choose another base model; `fedcli doctor` shows what is there.",
        ) from error
    except (*_BROKEN, SafetensorError, UnpicklingError) as error:
        if is_of_pickle(error):
            raise RequirementError(
                f"the base model {folder} has a .bin file that {NO_PICKLE}",
                hint="Fetch the model again, as safetensors where its publisher has them; .bin files are Python's "
                "pickles, which can run code while they are loaded.",
            ) from error
        if _is_of_torch(error):
            raise RequirementError(
                f"torch fails on this machine while it loads the base model {folder}, whose files are not at fault: "
                f"{str(error).strip().partition(chr(10))[0]}",
                hint="Run it again. A process that was forked from one which had used torch cannot use it safely: use "
                "multiprocessing's spawn. `fedcli doctor` checks the GPU.",
            ) from error
        if where := short_memory(error):
            raise RequirementError(
                f"{where} is too small for the base model {folder}",
                hint="Free some, or start a workspace with model.quantization int8 or nf4; `fedcli doctor` tells more.",
            ) from error
        raise RequirementError(
            f"the base model {folder} cannot be loaded: {str(error).strip().partition(chr(10))[0]}",
            hint="Check that the folder is whole and that the installed transformers knows this architecture.",
        ) from error


NO_PICKLE = "torch refuses: it is damaged, or holds more than tensors, such as code; nothing of it has run"


def is_of_pickle(error: Exception) -> bool:
    """Return whether torch refused a pickle, which fedcli loads as weights alone; torch's advice is to trust it."""
    return isinstance(error, UnpicklingError) or "weights_only" in str(error)


def _is_of_torch(error: Exception) -> bool:
    """Return whether an error tells of torch itself, its threads or its driver, and of no model."""
    words = (
        *("INTERNAL ASSERT FAILED", "report a bug to PyTorch", "start new thread", "re-initialize CUDA in forked"),
        *("CUDA error", "CUDA driver", "No CUDA GPUs"),
    )
    is_told = any(each in str(error) for each in words)
    return isinstance(error, RuntimeError) and is_told and short_memory(error) is None
