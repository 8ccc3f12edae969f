"""The baseline of round.py: rounds of federated training as the OpenFedLLM paper's code goes about them.

One process holds the model and every client's adapter; each chosen client is trained by transformers' Trainer, its
batch padded to the longest row, with gradient checkpointing, on the model's own loss over full logits; then the
adapters are averaged in memory. Rows are tokenised beforehand. Prints the seconds of each round and its memory as JSON.
"""

import argparse
import copy
import json
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer, TrainingArguments
from workload import MAX_LENGTH, NUM_CLIENTS

from fedcli.data.templates import alpaca


def main() -> None:
    """Run the rounds and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    lora = LoraConfig(
        r=32, lora_alpha=64, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    rows = [encode(tokenizer, json.loads(line)) for line in arguments.rows.read_text().splitlines()]
    shares = [rows[client::NUM_CLIENTS] for client in range(NUM_CLIENTS)]
    everybody = [copy.deepcopy(get_peft_model_state_dict(model)) for _ in shares]
    overall = copy.deepcopy(everybody[0])
    seconds = []
    with TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            max_steps=10,
            per_device_train_batch_size=16,
            learning_rate=5e-5,
            gradient_checkpointing=True,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        for number in range(arguments.rounds):
            started = time.perf_counter()
            cohort = [2 * number % NUM_CLIENTS, (2 * number + 1) % NUM_CLIENTS]
            for client in cohort:
                set_peft_model_state_dict(model, overall)
                trainer = Trainer(
                    model=model,
                    args=settings,
                    train_dataset=shares[client],
                    data_collator=lambda batch: pad(tokenizer, batch),
                )
                trainer.remove_callback(PrinterCallback)
                trainer.train()
                everybody[client] = copy.deepcopy(get_peft_model_state_dict(model))
            total = sum(len(shares[client]) for client in cohort)
            for name in overall:
                overall[name] = sum(everybody[client][name] * len(shares[client]) / total for client in cohort)
            seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def encode(tokenizer, row: dict) -> dict:
    """Return a row's token ids and labels, those of the response."""
    prompt = tokenizer(alpaca(row["instruction"]))["input_ids"]
    response = tokenizer(" " + row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = (prompt + response)[:MAX_LENGTH]
    return {"input_ids": ids, "labels": ([-100] * len(prompt) + response)[:MAX_LENGTH]}


def pad(tokenizer, batch: list[dict]) -> dict[str, torch.Tensor]:
    """Pad a batch to its longest row."""
    length = max(len(row["input_ids"]) for row in batch)
    padded = {"input_ids": tokenizer.pad_token_id, "labels": -100}
    made = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in batch])
        for name, value in padded.items()
    }
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in batch])
    return made | {"attention_mask": mask}


if __name__ == "__main__":
    main()
