"""fedcli.yaml: typed, closed and validated whole before any work."""

from fedcli.config.data import By as By
from fedcli.config.data import Columns as Columns
from fedcli.config.data import ColumnsFormat as ColumnsFormat
from fedcli.config.data import CustomTemplate as CustomTemplate
from fedcli.config.data import DataFormat as DataFormat
from fedcli.config.data import Dirichlet as Dirichlet
from fedcli.config.data import MessagesFormat as MessagesFormat
from fedcli.config.data import Partition as Partition
from fedcli.config.data import ShardsBy as ShardsBy
from fedcli.config.data import Sizes as Sizes
from fedcli.config.data import SourceEntry as SourceEntry
from fedcli.config.data import TaskName as TaskName
from fedcli.config.data import TemplateChoice as TemplateChoice
from fedcli.config.data import TemplateName as TemplateName
from fedcli.config.parsing import algorithm_from as algorithm_from
from fedcli.config.parsing import apply_overrides as apply_overrides
from fedcli.config.parsing import parse_config as parse_config
from fedcli.config.parsing import parse_format as parse_format
from fedcli.config.parsing import read_document as read_document
from fedcli.config.parsing import read_format as read_format
from fedcli.config.sections import Config as Config
from fedcli.config.sections import FederationConfig as FederationConfig
from fedcli.config.sections import Quantization as Quantization
from fedcli.config.sections import TrainConfig as TrainConfig
from fedcli.config.slurm import JobConfig as JobConfig
from fedcli.config.slurm import SlurmConfig as SlurmConfig
