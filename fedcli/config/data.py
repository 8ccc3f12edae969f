"""The section data: sources, formats, templates, and how rows are split among simulated clients."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from fedcli.config.section import Count, Section
from fedcli.config.select import SelectConfig
from fedcli.errors import did_you_mean
from fedcli.plugins import Registry
from fedcli.tasks import FORMATS, TASKS, first_task, formats_of
from fedcli.tasks.conversation import Example, Item, Judged, Preference


def _known(registry: Registry[Any], kind: str) -> Callable[[object], object]:
    """Return what refuses a name that no thing of a kind has."""

    def check(value: object) -> object:
        if not isinstance(value, str) or value not in registry:
            raise ValueError(f"unknown {kind} {value!r}. {did_you_mean(str(value), registry)}")
        return value

    return check


TaskName: TypeAlias = Annotated[str, BeforeValidator(_known(TASKS, "task"))]
FormatName: TypeAlias = Annotated[str, BeforeValidator(_known(FORMATS, "format"))]
TemplateName: TypeAlias = Literal["alpaca", "alpaca-input", "vicuna", "chat"]


class Columns(Section):
    """The columns of rows of any other shape.

    They are those of instruction and response (and input, system), of prompt, chosen and rejected, of prompt,
    completion and label, or of a text.
    """

    instruction: str | None = None
    input: str | None = None
    response: str | None = None
    system: str | None = None
    text: str | None = None
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    label: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {name for name, column in self if column is not None}
        is_instruction = given - {"input", "system"} == {"instruction", "response"}
        others = ({"prompt", "chosen", "rejected"}, {"prompt", "completion", "label"}, {"text"})
        if not is_instruction and given not in others:
            raise ValueError(
                "name the columns of instruction and response (and input, system), of prompt, chosen and rejected, "
                "of prompt, completion and label, or of text"
            )
        return self

    @property
    def item(self) -> type[Item]:
        """What such rows teach."""
        if self.completion is not None:
            return Judged
        return Preference if self.chosen is not None else Example


class ColumnsFormat(Section):
    """`format: {columns: {...}}`."""

    columns: Columns


class MessagesFormat(Section):
    """`format: {messages: COLUMN}`: conversations in a column of any name."""

    messages: str


def _name_or(tag: str) -> Discriminator:
    """Return what tells a name from the other kind of value that a key may have."""
    return Discriminator(lambda value: "<name>" if isinstance(value, str) else tag)


def _kind_of_format(value: object) -> str:
    if isinstance(value, str):
        return "<name>"
    is_messages = isinstance(value, MessagesFormat) or (isinstance(value, dict) and list(value) == ["messages"])
    return "<messages>" if is_messages else "<columns>"


DataFormat: TypeAlias = Annotated[
    Annotated[FormatName, Tag("<name>")]
    | Annotated[ColumnsFormat, Tag("<columns>")]
    | Annotated[MessagesFormat, Tag("<messages>")],
    Discriminator(_kind_of_format),
]


class CustomTemplate(Section):
    """How turns become text; the response follows `assistant`, and the model's end token follows the response.

    `system` holds {system}: a row's own, or `default_system`; without either it is left out. `user` holds
    {instruction}, which is instruction and input joined by a space, unless `user_with_input` gives {input} a place.
    """

    system: str = "{system}\n\n"
    default_system: str = ""
    default_system_with_input: str | None = None
    user: str
    user_with_input: str | None = None
    assistant: str
    separator: str = " "

    @model_validator(mode="after")
    def _check(self) -> Self:
        wanted = {"system": ["system"], "user": ["instruction"], "user_with_input": ["instruction", "input"]}
        for key, names in wanted.items():
            form = getattr(self, key)
            if form is not None and any(form.count(f"{{{name}}}") != 1 for name in names):
                raise ValueError(f"{key} must hold {' and '.join(f'{{{name}}}' for name in names)} once")
        return self


def _one_character(value: str) -> str:
    value = {"\\t": "\t", "tab": "\t"}.get(value, value)
    if len(value) != 1 or value in '"\r\n':
        raise ValueError("a delimiter is one character, such as ';', or tab")
    return value


def _text_encoding(value: str) -> str:
    try:
        "".encode(value)
    except LookupError:
        raise ValueError(f"no encoding of text is named {value!r}; latin-1, cp1252 and utf-16 are some") from None
    return value


Delimiter: TypeAlias = Annotated[str, AfterValidator(_one_character)]
Encoding: TypeAlias = Annotated[str, AfterValidator(_text_encoding)]


class SourceEntry(Section):
    """One of several sources, with what else it needs to be read."""

    source: str
    format: DataFormat | None = None
    subset: str | None = None
    split: str | None = None
    delimiter: Delimiter | None = None
    encoding: Encoding | None = None
    keyed_by: str | None = None
    max_rows: Count | None = None


class ShardsBy(Section):
    """Rows sorted by a column and cut into equal shards, one a client (McMahan et al. 2017, section 3)."""

    shards_by: str


class By(Section):
    """Each value of a column is a client: natural users, sources, domains.

    Values with fewer rows than data.min_rows are left out. `keep: largest` makes clients of the values with most rows,
    where there are more than federation.clients; `all` refuses that.
    """

    by: str
    keep: Literal["all", "largest"] = "all"


class DirichletOptions(Section):
    """`by`: a column, `length` (tenths of the rows by length), or `topic` (k-means over TF-IDF, `topics` of them)."""

    by: str
    alpha: Annotated[float, Field(gt=0, le=1e6)]
    topics: Annotated[int, Field(ge=2, le=1000)] = 10


class Dirichlet(Section):
    """Each class is shared out by its own draw of Dirichlet(alpha) (Yurochkin et al. 2019; Li et al. 2022)."""

    dirichlet: DirichletOptions


class SizesOptions(Section):
    """Client k gets a share in proportion to (k + 1) ** -power."""

    power: Annotated[float, Field(ge=0, le=10)] = 1.0


class Sizes(Section):
    """The rows at random, in shares of very different sizes."""

    sizes: SizesOptions


PARTITIONS: dict[str, type[Section]] = {"by": By, "dirichlet": Dirichlet, "sizes": Sizes, "shards_by": ShardsBy}
"""Partitions that are a section of one key."""


def _kind_of_partition(value: object) -> str | None:
    for name, kind in PARTITIONS.items():
        keys = {name, "keep"} if kind is By else {name}
        if isinstance(value, kind) or (isinstance(value, dict) and name in value and keys.issuperset(value)):
            return f"<{name}>"
    return "<name>" if isinstance(value, str) else None


TAGS: dict[str, type[Section]] = {
    "<columns>": ColumnsFormat,
    "<messages>": MessagesFormat,
    "<template>": CustomTemplate,
    "<entry>": SourceEntry,
    **{f"<{name}>": kind for name, kind in PARTITIONS.items()},
}
"""What pydantic puts in the path of a fault inside a union, and the section that it stands for."""

Partition: TypeAlias = Annotated[
    Annotated[Literal["iid", "sources"], Tag("<name>")]
    | Annotated[By, Tag("<by>")]
    | Annotated[Dirichlet, Tag("<dirichlet>")]
    | Annotated[Sizes, Tag("<sizes>")]
    | Annotated[ShardsBy, Tag("<shards_by>")],
    Discriminator(_kind_of_partition),
]
TemplateChoice: TypeAlias = Annotated[
    Annotated[TemplateName, Tag("<name>")] | Annotated[CustomTemplate, Tag("<template>")], _name_or("<template>")
]
_Entry: TypeAlias = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[SourceEntry, Tag("<entry>")], _name_or("<entry>")
]
_Sources: TypeAlias = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[tuple[_Entry, ...], Tag("<list>")], _name_or("<list>")
]


class DataConfig(Section):
    """Where a simulation's rows come from.

    Without a source, parties join with their own, or data/client-N.jsonl are written by hand. With `keyed_by` a source
    is a JSON object of lists of rows, and the key of a list stands in that column of its rows.
    """

    source: _Sources | None = None
    format: DataFormat | None = None
    subset: str | None = None
    split: str | None = None
    delimiter: Delimiter | None = None
    encoding: Encoding | None = None
    keyed_by: str | None = None
    template: TemplateChoice = "alpaca"
    partition: Partition = "iid"
    min_rows: Count = 1
    max_rows: Count | None = None
    select: SelectConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source is not None and not self.source:
            raise ValueError("source names nothing; without rows of its own a workspace has source: null")
        return self

    @property
    def sources(self) -> tuple[SourceEntry, ...]:
        """Each source, with what the section says of formats and reading where it says nothing itself."""
        given = (self.source,) if isinstance(self.source, str) else self.source or ()
        entries = [SourceEntry(source=entry) if isinstance(entry, str) else entry for entry in given]
        keys = ("format", "subset", "split", "delimiter", "encoding", "keyed_by")
        return tuple(
            entry.model_copy(update={key: getattr(entry, key) or getattr(self, key) for key in keys})
            for entry in entries
        )


def check_format(given: DataFormat, task: str) -> None:
    """Raise ValueError for a format whose rows are for another task."""
    item = TASKS[task].item
    if isinstance(given, MessagesFormat):
        if item is not Example:
            raise ValueError(f"data.format.messages names conversations, which are for task {first_task(Example)}")
    elif isinstance(given, ColumnsFormat):
        if given.columns.item is not item:
            other = first_task(given.columns.item)
            raise ValueError(f"data.format.columns names what task {other} needs; this is task {task}")
    elif FORMATS[given].item is not item:
        raise ValueError(f"data.format {given} is not for task {task}, whose formats are {', '.join(formats_of(item))}")
