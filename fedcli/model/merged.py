"""An adapter merged into its base: a full model in transformers' layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcli.algos import Arrays
from fedcli.config import TemplateChoice
from fedcli.data.templates import TURN_TEMPLATES, as_chat_template
from fedcli.errors import UsageError, WorkspaceError
from fedcli.model.bitsandbytes import without_bitsandbytes
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import comes_quantized, load_tokenizer, load_whole, loading
from fedcli.model.lora import with_lora

if TYPE_CHECKING:
    import torch

_WITHOUT = "Export the adapter alone, without --merge."


def check_mergeable(base: Path) -> None:
    """Raise UsageError for a base model whose weights are stored quantised: nothing can be added to them."""
    if comes_quantized(base):
        raise UsageError("--merge: the base model's weights are stored quantised", hint=_WITHOUT)


def write_merged(
    base: Path,
    config: Mapping[str, Any],
    arrays: Arrays,
    folder: Path,
    *,
    dtype: str | None,
    max_shard_size: str,
    template: TemplateChoice,
    trust_remote_code: bool,
) -> str:
    """Write base + adapter and the tokenizer into a folder, as safetensors of at most `max_shard_size`.

    The tokenizer's chat template is the one that the adapter was trained with: its own, or `template` in its place.

    The base is loaded in `dtype` (None: as its config.json says), on the CPU, and W + (alpha / r) B A is rounded to it:
    the product is computed in float32. So the most memory is one base model's in that type. Returns the type.

    Raises UsageError where the adapter cannot be merged, RequirementError where the base cannot be loaded,
    WorkspaceError where the disk is full.
    """
    import torch
    from safetensors import SafetensorError

    with without_bitsandbytes(), quiet_libraries():
        with loading(base):
            model = load_whole(base, dtype=dtype or "auto", device_map="cpu", trust_remote_code=trust_remote_code)
        _check_tied(model, arrays)
        adapted = with_lora(model, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.tensor(arrays[name.replace(".default.", ".")]))
        merged = adapted.merge_and_unload()
        try:
            merged.save_pretrained(folder, max_shard_size=max_shard_size)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise WorkspaceError(
                f"cannot write the merged model: {error}", hint="Free some space there, and run the command again."
            ) from error
        tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
        if template != "chat":
            form = TURN_TEMPLATES[template] if isinstance(template, str) else template
            has_start = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
            tokenizer.chat_template = as_chat_template(form, start=str(tokenizer.bos_token) if has_start else "")
        tokenizer.save_pretrained(folder)
    return str(merged.dtype).removeprefix("torch.")


def _check_tied(model: "torch.nn.Module", arrays: Arrays) -> None:
    """Raise UsageError for an adapter of an output layer whose weights are the input embeddings, too."""
    from fedcli.model.output_head import output_head

    output: Any = output_head(model)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # so is this
    if output in (None, embeddings) or output.weight is not embeddings.weight:
        return
    (name,) = (name for name, module in model.named_modules() if module is output)
    if any(f".{name}.lora_" in array for array in arrays):
        raise UsageError(f"--merge: the base ties {name}, which the adapter changes, to its embeddings", hint=_WITHOUT)
