"""What transformers knows of architectures, read out of its installed sources: importing it loads torch.

Only literals are read (an architecture's classes, the defaults of its configuration), and no code runs. What cannot be
read so is unknown here, and left to whoever loads the model.
"""

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

UNIFORM: dict[str, tuple[str, ...]] = {
    "model.layers": (
        *("apertus", "arcee", "bitnet", "cohere", "cohere2", "cwm", "diffllama", "ernie4_5", "exaone4", "gemma"),
        *("gemma2", "gemma3_text", "glm", "glm4", "gpt_oss", "granite", "granitemoe", "helium", "internlm3", "jais2"),
        *("llama", "minicpm3", "minimax_m2", "ministral3", "mistral", "mixtral", "nanochat", "olmo", "olmo2", "olmo3"),
        *("olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm"),
        *("starcoder2", "xglm"),
    ),
    "transformer.h": ("bloom", "codegen", "ctrl", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt"),
    "gpt_neox.layers": ("gpt_neox",),
    "model.decoder.layers": ("opt",),
    "backbone.layers": ("falcon_mamba", "mamba", "mamba2"),
    "transformer.blocks": ("mpt",),
    "biogpt.layers": ("biogpt",),
}
"""Architectures whose layers have the same names and shapes, all of them, by where the layers lie in a checkpoint."""

_CONTAINERS = {kind: container for container, kinds in UNIFORM.items() for kind in kinds}


@dataclass(frozen=True)
class Architecture:
    """An architecture that the installed transformers has."""

    name: str
    """Its model_type."""
    causal_class: str | None
    """The class that AutoModelForCausalLM takes for it; BERT and BART have one, too."""
    defaults: Mapping[str, Any]
    """Of its configuration, as far as they are literals."""
    own_names: Mapping[str, str]
    """Its configuration's own names of what others call by the usual ones: num_hidden_layers -> n_layer."""

    @property
    def layers_at(self) -> str | None:
        """Where its layers lie in a checkpoint, if all of them have the same names and shapes; else None."""
        return _CONTAINERS.get(self.name)

    def setting(self, config: Mapping[str, Any], name: str) -> Any:
        """Return a setting of a config.json by its usual name, or its default; None where neither is known."""
        own = self.own_names.get(name, name)
        for key in (own, name):
            if key in config:
                return config[key]
        return self.defaults.get(own, self.defaults.get(name))


@cache
def find_architecture(name: str) -> Architecture | None:
    """Return an architecture by its model_type; None where the installed transformers does not have it."""
    config_class = _table("models/auto/auto_mappings.py", "CONFIG_MAPPING_NAMES").get(name)
    causal = _table("models/auto/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES").get(name)
    if config_class is None and causal is None:
        return None
    modules = _table("models/auto/auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
    module = modules.get(name, name.replace("-", "_"))
    defaults, own_names = _config_class(f"models/{module}/configuration_{module}.py", str(config_class))
    return Architecture(name, causal, defaults, own_names)


def is_encoder(name: str) -> bool:
    """Return whether an architecture reads texts in both directions unless its configuration says otherwise."""
    masked = _table("models/auto/modeling_auto.py", "MODEL_FOR_MASKED_LM_MAPPING_NAMES")
    return name in masked or name in ("bert-generation", "xlnet")


def version_of_transformers() -> str:
    """Return the installed transformers' version."""
    from importlib.metadata import version

    return version("transformers")


@cache
def _parse(package: str, file: str) -> ast.Module:
    spec = find_spec(package)
    try:
        assert spec is not None
        assert spec.origin is not None
        return ast.parse((Path(spec.origin).parent / file).read_bytes())
    except (AssertionError, OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def _table(file: str, name: str) -> dict[str, Any]:
    return dict(_literal(_parse("transformers", file), name) or {})


def _literal(tree: ast.Module | ast.ClassDef, name: str) -> Any:
    """Return the literal that a module or a class gives a name; None where it is no literal."""
    for target, value in _assigned(tree):
        if target == name:
            is_call = isinstance(value, ast.Call) and value.args  # OrderedDict([...])
            with suppress(ValueError):
                return ast.literal_eval(value.args[0] if is_call else value)
    return None


def _assigned(tree: ast.Module | ast.ClassDef) -> Iterator[tuple[str, Any]]:
    """Yield what a module or a class assigns, by name."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield target.id, node.value


def _config_class(file: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the defaults of a configuration's fields, and its attribute_map."""
    for node in _parse("transformers", file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = {field: _literal(node, field) for field, _ in _assigned(node)}
            return {key: value for key, value in fields.items() if value is not None}, fields.get("attribute_map") or {}
    return {}, {}
