"""Exact match: the share of prompts whose greedy answer is the expected one, word for word."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcli.data.conversation import Example, shown

if TYPE_CHECKING:
    from fedcli.data.encoding import Encoder
    from fedcli.model.lora import AdaptedModel

BATCH_SIZE = 64


@dataclass(frozen=True)
class Answer:
    """What the model said to one instruction."""

    instruction: str
    expected: str
    answer: str

    @property
    def is_correct(self) -> bool:
        """Whether answer and expectation are equal, white space at the ends aside."""
        return self.answer.strip() == self.expected.strip()


def answer_examples(
    adapted: "AdaptedModel", encoder: "Encoder", examples: Sequence[Example], on_batch: Callable[[int], None]
) -> list[Answer]:
    """Answer every example greedily, with at most four tokens more than the longest expected answer has."""
    import torch

    from fedcli.model.quiet import quiet_libraries

    tokenizer, model = adapted.tokenizer, adapted.model
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else encoder.end_id
    longest = max(len(tokenizer(" " + example.response)["input_ids"]) for example in examples)
    answers = []
    model.eval()
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        prompts = [encoder.prompt(example.prompt) for example in batch]
        width = max(map(len, prompts))
        padded = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
        with torch.inference_mode(), quiet_libraries():
            generated = model.generate(
                input_ids=padded,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=longest + 4,
                pad_token_id=pad_id,
                eos_token_id=encoder.end_id,
            )
        texts = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        answers += [
            Answer(shown(example.prompt), example.response, text) for example, text in zip(batch, texts, strict=True)
        ]
        on_batch(len(answers))
    return answers
