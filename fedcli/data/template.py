"""Prompt templates: how an instruction becomes the text that a model completes."""

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""The alpaca template of the OpenFedLLM paper (KDD 2024, appendix on prompts)."""


def alpaca(instruction: str) -> str:
    """Return the prompt for an instruction; the response follows it after one space.

    The prompt ends in a colon and the response starts with a space, so that no tokenizer merges the two.
    """
    return ALPACA_PROMPT.replace("{instruction}", instruction)
