"""Data sets of the hub whose format and split are known."""

from dataclasses import dataclass

from fedcli.config import TASK_FORMATS, DataFormat, FormatName, Task
from fedcli.errors import ConfigError


@dataclass(frozen=True)
class HubDataset:
    """What a data set of the hub is known by."""

    format: FormatName
    split: str = "train"


HUB_DATASETS = {
    "tatsu-lab/alpaca": HubDataset("alpaca"),
    "vicgalle/alpaca-gpt4": HubDataset("alpaca"),
    "FinGPT/fingpt-sentiment-train": HubDataset("fingpt"),
    "medalpaca/medical_meadow_medical_flashcards": HubDataset("medalpaca"),
    "lucasmccabe-lmi/CodeAlpaca-20k": HubDataset("codealpaca"),
    "TIGER-Lab/MathInstruct": HubDataset("mathinstruct"),
    "openbmb/UltraFeedback": HubDataset("ultrafeedback"),
    "HuggingFaceH4/ultrafeedback_binarized": HubDataset("ultrafeedback-binarized", "train_prefs"),
    "Anthropic/hh-rlhf": HubDataset("hh-rlhf"),
}
"""The paper's eight data sets (UltraFeedback in two forms) choose their format and split by themselves."""


def choose_format(source: str | None, given: DataFormat | None, task: Task) -> DataFormat:
    """Return a source's format: the one given, else the one that a known data set of the hub has, else the task's.

    Raises ConfigError for a known data set whose rows are for the other task.
    """
    if given is not None:
        return given
    known = HUB_DATASETS.get(source or "")
    if known is None:
        return TASK_FORMATS[task][0]
    if known.format not in TASK_FORMATS[task]:
        raise ConfigError(
            f"{source} has rows of the format {known.format}, which is not for task {task}",
            hint=f"Set task to {'dpo' if task == 'sft' else 'sft'}, or name another source.",
        )
    return known.format


def choose_split(source: str, given: str | None) -> str:
    """Return the split to read: the one given, else the one a known data set has its training rows in."""
    known = HUB_DATASETS.get(source)
    return given or (known.split if known else "train")
