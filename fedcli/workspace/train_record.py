"""What clients must obey in a round, as fedcli.yaml has it."""

from typing import get_args

from fedcli.config import Config, TrainConfig
from fedcli.tasks import TASKS
from fedcli.tasks.task import Hyperparameter
from fedcli.workspace.records import Schedule, TrainRecord


def train_record(config: Config, number: int, rounds: int) -> TrainRecord:
    """Return what a client must obey in a round, as fedcli.yaml has it now."""
    train = config.train
    unused = {*get_args(Hyperparameter)} - {*TASKS[config.task].hyperparameters}
    shared = (TrainConfig.model_fields.keys() & TrainRecord.model_fields.keys()) - unused
    own = {
        "learning_rate": train.learning_rate_of(number, rounds),
        "schedule": Schedule(
            learning_rate=train.learning_rate, learning_rate_min=train.learning_rate_min, rounds=rounds
        ),
        "template": config.data.template,
        "seed": config.federation.seed,
    }
    return TrainRecord(**{name: getattr(train, name) for name in shared} | own)
