"""Pre-train the built-in model, a small Llama, on documents like the demo's: `python benchmarks/pretrain.py OUT_DIR`.

The same seed gives the same files, bit for bit, on one machine with one set of packages: one thread, one random stream.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedcli.data.demo import LABELS, LEVEL_QUESTIONS, TOPICS, VERBS, headline
from fedcli.data.templates import alpaca

NUM_DOCUMENTS = 30_000
VOCABULARY_SIZE = 900
CONTEXT_LENGTH = 1024
NUM_STEPS = 1200
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 6e-3
NUM_WARMUP_STEPS = 50
WEIGHT_DECAY = 0.05
MINIMUM_SKILL = 0.9
ABOUT_SECONDS = 75
"""Measured on one core of the machine that wrote the shipped files."""

SECTION_QUESTIONS = ("Which desk takes this headline?", "Name the section.")
VERB_QUESTIONS = ("What does the headline say happens?", "Give the verb of this headline.")

COLOURS = (*LABELS, "blue", "white")
COLOUR_SENTENCES = (
    "The editor likes a {0} pen and a {1} lamp.",
    "Is the coffee {0} or {1}?",
    "She wears {0} today and {1} on Friday.",
    "Some say {0}, some say {1}.",
    "A {0} door, a {1} window and a {2} chair.",
)


def pretraining_documents(seed: int, count: int) -> list[str]:
    """Return `count` texts for the base model: of 100, about 50 of headlines, 10 of colours, 40 questions and answers.

    Of the 40, about 12 ask for the section, 24 for the verb, and 4 for the alert level with an answer drawn at random:
    the model learns what an answer looks like and nothing about which is right.
    """
    generator = random.Random(f"demo pre-training {seed}")
    return [_document(generator) for _ in range(count)]


def verb_questions(seed: int, count: int) -> list[tuple[str, str]]:
    """Return `count` pairs (prompt, response) that ask for the verb of a headline, to test the base model's skill."""
    generator = random.Random(f"demo verb questions {seed}")
    pairs = []
    for _ in range(count):
        topic, verb = _topic_and_verb(generator)
        instruction = generator.choice(VERB_QUESTIONS) + " " + headline(generator, topic, verb)
        pairs.append((alpaca(instruction), " " + verb))
    return pairs


def _document(generator: random.Random) -> str:
    """Return one pre-training text."""
    kind = generator.random()
    if kind < 0.5:
        count = generator.choice((1, 2))
        return " ".join(headline(generator, *_topic_and_verb(generator)) + "." for _ in range(count))
    if kind < 0.6:
        return generator.choice(COLOUR_SENTENCES).format(*generator.sample(COLOURS, 3))
    topic, verb = _topic_and_verb(generator)
    questions: tuple[str, ...]
    if kind < 0.72:
        questions, answer = SECTION_QUESTIONS, topic
    elif kind < 0.96:
        questions, answer = VERB_QUESTIONS, verb
    else:
        questions, answer = LEVEL_QUESTIONS, generator.choice(LABELS)
    return alpaca(generator.choice(questions) + " " + headline(generator, topic, verb)) + " " + answer


def _topic_and_verb(generator: random.Random) -> tuple[str, str]:
    """Draw a topic, then one of its 24 verbs."""
    topic = generator.choice(TOPICS)
    return topic, generator.choice(" ".join(VERBS[topic].values()).split())


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts <s> in front; each constant part of the prompt is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template_parts = alpaca("{instruction}").split("{instruction}")
    pad, bos, eos = special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(template_parts),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in template_parts])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    inputs = {"model_max_length": CONTEXT_LENGTH, "model_input_names": ["input_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, **inputs)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, its weights drawn from torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> None:
    """Train the model in place on every token of the documents; one row of a batch is one document, <s> to </s>."""
    rows = [tokenizer(document + tokenizer.eos_token)["input_ids"] for document in documents]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    generator = random.Random(f"pre-training batches {seed}")
    started = time.monotonic()
    for step in range(NUM_STEPS):
        batch = tokenizer.pad({"input_ids": generator.sample(rows, BATCH_SIZE)}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        decay = 0.02 + 0.98 * (1 + math.cos(math.pi * step / NUM_STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * min(1.0, (step + 1) / NUM_WARMUP_STEPS) * decay
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1} of {NUM_STEPS}, loss {loss.item():.3f}, {seconds:.0f} s", file=sys.stderr)


@torch.no_grad()
def verb_skill(directory: Path, seed: int, num_questions: int = 300) -> float:
    """Return the share of verb questions that the saved model answers, greedily, with the right verb and then </s>."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    num_right = 0
    for prompt, response in verb_questions(seed, num_questions):
        prompt_length = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + response + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        predicted = model(input_ids=ids).logits[0, prompt_length - 1 : -1].argmax(dim=-1)
        num_right += int(torch.equal(predicted, ids[0, prompt_length:]))
    return num_right / num_questions


def main() -> int:
    """Write tokenizer and model into OUT_DIR; return 1 if the model cannot do what the demo builds on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a new directory for the tokenizer and the model")
    parser.add_argument("--seed", type=int, default=7, help="of the documents and the weights (default: 7)")
    arguments = parser.parse_args()
    if arguments.out_dir.exists():
        parser.error(f"{arguments.out_dir} exists; give the name of a new directory")
    print(f"pre-training the built-in model; this takes about {ABOUT_SECONDS} s on one core", file=sys.stderr)
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(True)
    documents = pretraining_documents(arguments.seed, NUM_DOCUMENTS)
    tokenizer = train_tokenizer(documents)
    model = build_model(tokenizer)
    train(model, tokenizer, documents, arguments.seed)
    model.bfloat16().save_pretrained(arguments.out_dir)
    tokenizer.save_pretrained(arguments.out_dir)
    skill = verb_skill(arguments.out_dir, arguments.seed)
    print(f"verb questions answered right: {skill:.3f} (at least {MINIMUM_SKILL} wanted)", file=sys.stderr)
    return 0 if skill > MINIMUM_SKILL else 1


if __name__ == "__main__":
    sys.exit(main())
