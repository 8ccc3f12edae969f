"""The models that answer benchmarks: the workspace's base with one adapter after another, others loaded when needed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcli.client.runtimes import Runtimes
from fedcli.config import CustomTemplate, TemplateChoice
from fedcli.eval.remembered import Engine
from fedcli.scoring.targets import Target
from fedcli.workspace.history import Round

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Models:
    """Gives each target its engine; the base is loaded once, when the first question needs it."""

    head: Round
    endpoint: Callable[[str], Engine]
    """Makes the engine of a model behind one."""
    runtimes: Runtimes
    """Keep the base, for whatever else the process does with it."""
    template: TemplateChoice
    date: str | None = None
    """The federation's, which its base's chat template writes."""
    threads: int | None = None
    batch_size: int | None = None
    _loaded: tuple[Target, Engine] | None = field(default=None, init=False)

    def identity(self, target: Target) -> dict[str, Any]:
        """Return all that tells a target's answers from others'."""
        if target.api is not None:
            return dict(target.identity)
        from fedcli.model.loading import has_bfloat16

        template = self.template
        base = self.head.manifest.model
        of_base = {"base": base.fingerprint, "quantization": base.quantization} if target.model is None else {}
        return {
            **of_base,
            "template": template.model_dump(mode="json") if isinstance(template, CustomTemplate) else template,
            **({"date": self.date} if self.date is not None and template == "chat" else {}),
            "dtype": "bfloat16" if has_bfloat16() else "float32",
            "backend": "transformers",  # as answer logs of the time when there were two have it
            **target.identity,
        }

    def engine(self, target: Target, on_note: Callable[[str], None] = lambda text: None) -> Engine:
        """Return the engine that answers for a target, and tells what a user must know.

        Raises RequirementError where its model cannot be loaded.
        """
        if self._loaded is None or self._loaded[0] != target:
            self._loaded = (target, self._load(target, on_note))
        return self._loaded[1]

    def _load(self, target: Target, on_note: Callable[[str], None]) -> Engine:
        if target.api is not None:
            return self.endpoint(target.api)
        if target.model is not None:
            return load_local(
                target.model,
                self.template,
                date=self.date,
                batch_size=self.batch_size,
                threads=self.threads,
                on_note=on_note,
            )
        runtime = self.runtimes.load()
        if target.folder is not None:
            runtime.adapted.load_folder(target.folder)
        else:
            assert target.arrays is not None
            runtime.adapted.load(target.arrays(), target.beside(), weight=target.weight)
        adapted = runtime.adapted
        return _local(adapted.model, adapted.tokenizer, self.template, self.batch_size, self.date, on_note)


def load_local(
    folder: Path,
    template: TemplateChoice | None = None,
    *,
    date: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Engine:
    """Return a full model's engine; its template is the tokenizer's own where none is named and it has one."""
    import torch

    from fedcli.model.inspection import inspect
    from fedcli.model.library_logging import quiet_libraries
    from fedcli.model.loading import load_base

    if threads is not None:
        torch.set_num_threads(threads)
    inspect(folder).require()
    with quiet_libraries():
        model, tokenizer = load_base(folder, trust_remote_code=False)
    template = template or ("chat" if tokenizer.chat_template else "vicuna")
    return _local(model, tokenizer, template, batch_size, date, on_note)


def _local(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    template: TemplateChoice,
    batch_size: int | None,
    date: str | None,
    on_note: Callable[[str], None],
) -> Engine:
    from fedcli.data.encoding import Encoder
    from fedcli.eval.local_model import LocalModel
    from fedcli.model.finite import check_answers

    check_answers(model)
    encoder = Encoder(tokenizer, template, date=date)
    return LocalModel(model, tokenizer, encoder, batch_size=batch_size, on_note=on_note)
