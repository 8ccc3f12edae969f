"""LoRA adapters (Hu et al. 2021) as named float32 arrays, in PEFT's names, and the model that carries one."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

from fedcli.algos import Array, Arrays
from fedcli.algos.lora import is_first_factor, of_rank
from fedcli.config import Quantization
from fedcli.config.adapter_config import AdapterConfig, parse_outside_config
from fedcli.errors import ConfigError
from fedcli.model.library_logging import quiet_libraries
from fedcli.model.loading import NO_PICKLE, is_of_pickle, load_base, load_shapes, pad_id_of
from fedcli.model.targets import check_targets
from fedcli.randomness import stream

_BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UnpicklingError)
"""What PEFT raises for a folder that holds no whole adapter."""
_OUTSIDE = "outside"
"""PEFT's name for an adapter that came from a folder."""

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lora_config(
    *, rank: int, alpha: float, dropout: float, target_modules: Iterable[str], base: str | None
) -> dict[str, Any]:
    """Return the contents of PEFT's adapter_config.json; `base` is a hub id or None, never a path."""
    changed: dict[str, Any] = {"base_model_name_or_path": base, "r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    return AdapterConfig.model_construct(**changed, target_modules=sorted(target_modules)).model_dump()


def start_adapter(
    folder: Path, config: dict[str, Any], *, seed: int, trust_remote_code: bool
) -> tuple[dict[str, Array], int]:
    """Return the arrays that LoRA starts from, and the number of the base model's parameters.

    A is uniform in +-1/sqrt(fan in), as in PEFT, and B zero.
    The base model's weights are checked by their names and shapes; no value is read. A's values come from the stream
    (seed, "lora", name). Raises ConfigError where a target module does not exist.
    """
    import torch
    from peft import get_peft_model_state_dict

    with quiet_libraries():
        model = load_shapes(folder, revision=None, trust_remote_code=trust_remote_code)
        check_targets(model, config["target_modules"])
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        try:
            with torch.device("meta"):
                peft_model = with_lora(model, config)
        except ValueError as error:  # a layer of a kind, or of an architecture, that PEFT does not adapt
            problem = " ".join(str(error).split())
            raise ConfigError(
                f"adapter.target_modules: PEFT cannot adapt these layers of the base model: {problem}",
                hint="Name other linear layers, or leave adapter.target_modules out.",
            ) from error
    arrays: dict[str, Array] = {}
    for name, tensor in sorted(get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()):
        shape = tuple(tensor.shape)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shape[1])
            arrays[name] = stream(seed, "lora", part=name).uniform(-bound, bound, shape).astype(np.float32)
        else:
            arrays[name] = np.zeros(shape, np.float32)
    return arrays, num_parameters


class AdaptedModel:
    """A base model that carries one LoRA adapter of any rank, copied in and out in place; others may stand beside it.

    `base` is the transformers model, LoRA's layers in it; `model` is PEFT's wrapper of it.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], *, trust_remote_code: bool, quantization: Quantization = "none"
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase
        with quiet_libraries():
            base, self.tokenizer = load_base(folder, trust_remote_code=trust_remote_code, quantization=quantization)
            self.base: PreTrainedModel = base
            self.model: PeftModel = with_lora(base, config)
        self.pad_id = pad_id_of(self.tokenizer, base)
        self._config = config
        self._beside: list[str] = []
        self._weight = 1.0
        self.parameters: dict[str, torch.nn.Parameter] = {
            name.replace(".default.", "."): parameter.requires_grad_()
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name
        }
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()

    def start_training(self, *, has_dropout: bool, has_checkpointing: bool) -> None:
        """Put the model into training mode, in which LoRA's dropout is on or off, and the base's own always off.

        The base's parts stay in evaluation mode, in which its code drops nothing, by modules or by functions: all but
        linear layers, of which quantised ones compute otherwise in training, and the layers that gradient
        checkpointing looks for, whose rates `load_base` has set to zero.
        """
        import torch
        from peft.tuners.lora import LoraLayer

        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.lora_dropout.train(has_dropout)
            elif isinstance(module, torch.nn.Linear) or (
                has_checkpointing and hasattr(module, "gradient_checkpointing")
            ):
                module.training = True

    def load(self, arrays: Arrays, beside: Mapping[str, Arrays] = MappingProxyType({}), *, weight: float = 1.0) -> None:
        """Put an adapter's values in place; raise KeyError or ValueError where names or shapes are not this model's.

        `beside` are further adapters by name, of the same layers and of any rank, which are frozen, and drop nothing
        in training: the model computes W x + s (weight B A + the sum of their products) x, with the adapter's own s.
        """
        import torch

        self._take_off()
        if arrays.keys() != self.parameters.keys():
            raise KeyError(f"adapter names differ: {sorted(arrays.keys() ^ self.parameters.keys())[:3]}")
        for name, parameter in self.parameters.items():
            if of_rank(name, arrays[name].shape, 0) != of_rank(name, tuple(parameter.shape), 0):
                raise ValueError(f"{name} has shape {arrays[name].shape}, not {tuple(parameter.shape)}")
        if len(ranks := {array.shape[0 if is_first_factor(name) else -1] for name, array in arrays.items()}) > 1:
            raise ValueError(f"its factors have several ranks: {sorted(ranks)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if arrays[name].shape == tuple(parameter.shape):
                    parameter.copy_(torch.tensor(arrays[name]))
                else:  # the scale alpha / r stays: it is that of all ranks of a federation
                    parameter.grad = None
                    parameter.data = torch.tensor(arrays[name], device=parameter.device)
        for name, further in beside.items():
            self._put_beside(name, further)
        if weight != 1.0:
            self._weigh(weight)

    def _put_beside(self, name: str, arrays: Arrays) -> None:
        """Let the model use a further adapter, frozen, until another one is loaded."""
        import torch
        from peft import LoraConfig

        rank = next(array.shape[0] for key, array in arrays.items() if ".lora_A." in key)
        scale = self._config["lora_alpha"] / self._config["r"]
        config = {**self._config, "r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "inference_mode": False}
        self._beside.append(name)
        with quiet_libraries():
            self.model.add_adapter(name, LoraConfig.from_peft_type(**config))
            tuner: Any = self.model.base_model  # PEFT's own wrapper takes one name alone
            tuner.set_adapter(["default", *self._beside])
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if f".{name}." in key and ".lora_" in key:
                    parameter.data = parameter.data.float()
                    parameter.copy_(torch.tensor(arrays[key.replace(f".{name}.", ".")]))
                    parameter.requires_grad_(False)

    def _weigh(self, weight: float) -> None:
        """Multiply the product of the adapter that the model was made with."""
        from peft.tuners.lora import LoraLayer

        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", weight)
        self._weight = weight

    def load_folder(self, folder: Path) -> None:
        """Let the model use the adapter of a folder, of whatever rank and modules, until another one is loaded.

        Raises ConfigError where the folder holds no adapter of this base model.
        """
        from peft import LoraConfig

        self._take_off()
        try:
            with quiet_libraries():
                config = parse_outside_config((folder / "adapter_config.json").read_bytes())
                self.model.add_adapter(_OUTSIDE, LoraConfig.from_peft_type(**config))
                found = self.model.load_adapter(str(folder), _OUTSIDE)  # reads the weights alone, now that it is there
                self.model.set_adapter(_OUTSIDE)
            odd = [*found.unexpected_keys, *(name for name in found.missing_keys if _OUTSIDE in name)]
            if odd:  # PEFT passes over them
                self._take_off()
                raise ValueError(f"it and the base do not both have {odd[0]}")
        except _BROKEN as error:
            told = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{folder} holds no adapter of this base model: "
                + (f"its adapter_model.bin is one that {NO_PICKLE}" if is_of_pickle(error) else told),
                hint="Name a folder in PEFT's layout (adapter_config.json, adapter_model.safetensors).",
            ) from error

    def _take_off(self) -> None:
        """Go back to the adapter that the model was made with, alone."""
        if self._beside:
            self.model.set_adapter("default")
            for name in self._beside:
                self.model.delete_adapter(name)
            self._beside = []
        if self._weight != 1.0:
            self._weigh(1.0)
        if _OUTSIDE in self.model.peft_config:
            self.model.set_adapter("default")
            self.model.delete_adapter(_OUTSIDE)

    def values(self) -> dict[str, Array]:
        """Return a copy of the adapter's values, float32."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.parameters.items()}


def with_lora(model: "PreTrainedModel", config: Mapping[str, Any]) -> Any:
    """Put LoRA into the layers that an adapter_config.json names; return PEFT's wrapper of the base, a PeftModel."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {**config, "inference_mode": False}
    if not hasattr(model, "prepare_inputs_for_generation"):  # which PEFT looks for in a causal language model
        settings["task_type"] = None
    return get_peft_model(model, LoraConfig.from_peft_type(**settings))
