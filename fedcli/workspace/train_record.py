"""What clients must obey in a round, as fedcli.yaml has it."""

from fedcli.config import Config
from fedcli.workspace.records import Schedule, TrainRecord


def train_record(config: Config, number: int, rounds: int) -> TrainRecord:
    """Return what a client must obey in a round, as fedcli.yaml has it now."""
    train = config.train
    return TrainRecord(
        steps=train.steps,
        batch_size=train.batch_size,
        micro_batch_size=train.micro_batch_size,
        max_length=train.max_length,
        learning_rate=train.learning_rate_of(number, rounds),
        schedule=Schedule(learning_rate=train.learning_rate, learning_rate_min=train.learning_rate_min, rounds=rounds),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        beta=train.beta if config.task == "dpo" else None,
        gradient_checkpointing=train.gradient_checkpointing,
        template=config.data.template,
        seed=config.federation.seed,
    )
