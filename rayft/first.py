"""A first recipe from the columns of a data set: which task they call for, and a commented YAML text to go on from."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from rayft import document, tasks
from rayft.data.classes import PICTURES, SOUNDS
from rayft.data.pieces import Fragment
from rayft.data.source import peek
from rayft.errors import DataError
from rayft.layout import taken
from rayft.tasks.cells import in_brackets, list_in, short
from rayft.tasks.task import Task

# What a column is for -> names that it goes by, the likelier first. A task's field for such a column has the same name.
_NAMES = {
    "text": ("text", "sentence", "content", "review", "message", "sms", "tweet", "document", "body", "utterance"),
    "label": ("label", "labels", "category", "class", "intent", "sentiment", "topic", "target", "rating", "stars"),
    "target": ("score", "similarity_score", "similarity", "label", "labels", "target", "rating", "stars"),
    "anchor": ("anchor",),
    "positive": ("positive",),
    "negative": ("negative",),
    "question": ("question",),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers",),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "ner", "pos"),
    "messages": ("messages", "conversation", "conversations", "chat", "dialog", "dialogue"),
    "tools": ("tools",),
    "prompt": ("prompt", "instruction", "question", "query", "source", "input"),
    "completion": ("completion", "output", "response", "answer", "reply", "target"),
}
_SPLIT = ("split", "subset", "partition")  # a column that says which rows are for what
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_BESIDE = ("input", *_NAMES["context"])  # what a prompt is about
_PEOPLE = ("identity", "person", "person_id", "identity_id")  # of whom a picture is
_CAPTIONS = ("caption", "prompt", "description")  # of a picture
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text", "text_pair"))
# What columns are together for, the most telling first.
_FORMS = (
    ("question", "context", "answers"),
    ("tokens", "tags"),
    ("messages", "tools"),
    ("messages",),
    ("anchor", "positive", "negative"),
    ("anchor", "positive"),
    ("prompt", "completion"),
    ("text", "label"),
    ("text", "target"),
    ("text",),
)

_ENCODER = "distilbert/distilbert-base-cased"
_PICTURES = "microsoft/resnet-18"
_DECODER = "HuggingFaceTB/SmolLM2-135M"
_CHAT = "HuggingFaceTB/SmolLM2-135M-Instruct"
_LISTENER = "facebook/wav2vec2-base"
_PAINTER = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def look(pieces: Sequence[Fragment], path: str) -> tuple[list[str], dict[str, list[Any]]]:
    """The columns of the data at `path`, and values by column, from the first of its pieces that has rows.

    DataError where none has.
    """
    for piece in pieces:
        columns, sample = peek(piece)
        if any(sample.values()):
            return columns, sample
    raise DataError(f"{path} has no rows; a first recipe needs some to look at")


class First(NamedTuple):
    """A first recipe's commented text, and the columns of the data, but for nameless ones, that it makes no use of."""

    text: str
    unused: list[str]


def first_recipe(columns: Sequence[str], sample: Mapping[str, Sequence[Any]], path: str) -> First:
    """A recipe that trains on the data at `path`, which has `columns`.

    `sample` holds the first rows of each column; it tells list-valued labels, empty answers and lengths. Of the
    `split_column` it holds all values.
    DataError, with the columns found and those that would do, where no task fits.
    """
    for fields in (*_files(columns, sample), *_readings(columns, sample)):
        for name in tasks.names():
            if task := _fitting(tasks.find(name), fields, columns):
                return _first(task, fields, columns, sample, path)
    for name in tasks.names():  # a task whose own names for its columns are those of the data; sounds were looked for
        kind = tasks.find(name)
        if "audio" not in kind.model_fields and (task := _fitting(kind, {}, columns)):
            return _first(task, {}, columns, sample, path)
    known = "; ".join(" + ".join(form) for form in _FORMS)
    raise DataError(
        f"{path}: no task fits the columns {', '.join(map(short, columns)) or '(none)'}; these would do: {known}. "
        "Rename them in `data.columns` of a recipe written by hand"
    )


def _first(
    task: Task, fields: Mapping[str, str], columns: Sequence[str], sample: Mapping[str, Sequence[Any]], path: str
) -> First:
    used = {*task.columns(), split_column(columns)}
    unused = [column for column in columns if column and column not in used]
    return First("\n".join(_lines(task, fields, unused, sample, path)) + "\n", unused)


def _files(columns: Sequence[str], sample: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, str]]:
    """What the columns are for where one holds sounds or pictures: their texts, or their labels."""
    lower = {column.lower(): column for column in reversed(columns)}
    for column in columns:
        values = [str(value).lower() for value in sample.get(column, ())]
        for field, endings in (("audio", SOUNDS), ("image", PICTURES)):
            if values and all(value.endswith(endings) for value in values):
                roles = {"identity": _PEOPLE, "text": (*_NAMES["text"], *_CAPTIONS), "label": _NAMES["label"]}
                for role, names in roles.items():
                    found = next((lower[name] for name in names if name in lower), None)
                    if found is not None:
                        yield {field: column, role: found}


def _readings(columns: Sequence[str], sample: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, str]]:
    """What the columns may be for, field of a task -> column, the most telling reading first."""
    lower = {column.lower(): column for column in reversed(columns)}

    def column_for(role: str) -> str | None:
        there = (lower[name] for name in _NAMES[role] if name in lower)
        return next((name for name in there if role != "label" or not _measured(sample.get(name, ()))), None)

    for first, second in _PAIRS:
        for role in ("label", "target"):
            if first in lower and second in lower and (truth := column_for(role)):
                yield {"text": lower[first], "text_pair": lower[second], role: truth}
    for form in _FORMS:
        fields = {role: column for role in form if (column := column_for(role)) is not None}
        if len(set(fields.values())) < len(form):
            continue
        asked = fields.get("prompt")
        beside = next((lower[name] for name in _BESIDE if name in lower and lower[name] not in fields.values()), None)
        if asked and beside:
            whole = (asked, beside) if asked == lower.get("instruction") else (beside, asked)
            yield {**fields, "prompt": "\n\n".join(f"{{{name}}}" for name in whole)}
        yield fields


def _measured(values: Sequence[Any]) -> bool:
    """Whether a column's values are numbers, and most of them no whole ones: a measure, not labels."""
    try:
        numbers = [float(value) for value in values if value is not None and value != ""]
    except (TypeError, ValueError):
        return False
    return 2 * sum(math.isfinite(number) and not number.is_integer() for number in numbers) > len(numbers)


def _fitting(kind: type[Task], fields: Mapping[str, str], columns: Sequence[str]) -> Task | None:
    """The task with these column names in its fields, if it needs just these columns and the data has them."""
    try:
        task = kind.model_validate(dict(fields))
        needed = set(task.columns())
    except (ValidationError, NotImplementedError):  # fields that it lacks or that exclude each other
        return None
    named = {name for value in fields.values() for name in (re.findall(r"\{(.+?)\}", value) or [value])}
    return task if needed and needed <= set(columns) and (not named or needed == named) else None


def _lines(
    task: Task, fields: Mapping[str, str], unused: Sequence[str], sample: Mapping[str, Sequence[Any]], path: str
) -> Iterator[str]:
    generates = task.packs() is not None
    model = _model(task, fields)
    yield "# Check it with `rayft check`, start it with `rayft run`; `rayft schema` describes every field."
    yield f"name: {_plain(_run_name(path))}  # with `storage` the run's identity: run it again and it resumes"
    yield "task:"
    yield f"  type: {task.type}"
    for field, column in fields.items():
        yield f"  {field}: {_plain(column)}"
    for field, value in _seen(task, fields, sample).items():
        yield f"  {field}: {_plain(value)}"
    if unused:
        yield f"  # not used of the data: {_plain(', '.join(unused))}"
    yield "model:"
    yield f"  path: {model}  # a Hub id, a folder, s3://..., or pkg:<package>/<folder>"
    yield "  dtype: float32  # bfloat16 on GPUs"
    if generates:
        yield "  lora: {r: 8, alpha: 16}  # trains small adapters; null trains every weight"
    else:
        yield "  freeze: 0  # N: the embeddings and the first N blocks stay as they are; all: only the head learns"
    yield "data:"
    sources = _sources(sample, path)
    for split, missing in (("train", ""), ("validation", "cut from train, 10 %"), ("test", "no test scores")):
        yield f"  {split}: {sources[split]}" if split in sources else f"  {split}: null  # {missing}"
    yield "train:"
    yield "  epochs: 3"
    yield "  global_batch_size: 32  # rows per optimizer step, over all workers"
    yield f"  micro_batch_size: {4 if generates else 16}  # at most so many rows per forward pass on one worker"
    yield f"  learning_rate: {'2.0e-4' if generates else '5.0e-5'}"
    yield "  warmup: 0.1  # share of the steps"
    yield "cluster:"
    yield "  workers: 1"
    yield "  gpus_per_worker: 0  # 1 where there are GPUs"
    yield "storage: runs  # or s3://bucket/prefix"


def _model(task: Task, fields: Mapping[str, str]) -> str:
    known = type(task).model_fields
    if "image" in known:
        return _PAINTER if "text" in known else _PICTURES
    if "audio" in fields:
        return _LISTENER
    if task.packs() is None:
        return _ENCODER
    return _CHAT if "messages" in fields else _DECODER


def _plain(value: Any) -> str:
    """A value as YAML on one line."""
    text = document.write([value]).removeprefix("- ").rstrip("\n")
    return text if "\n" not in text else json.dumps(value, ensure_ascii=False)


def _seen(task: Task, fields: Mapping[str, str], sample: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Fields of the task that the first rows decide."""
    seen: dict[str, Any] = {}
    known = type(task).model_fields
    labels = sample.get(fields.get("label", ""), ())
    if "multi_label" in known and any(map(_is_list, labels)):
        seen["multi_label"] = True
    if "unanswerable" in known and any(_empty(value) for value in sample.get(fields.get("answers", ""), ())):
        seen["unanswerable"] = True
    if "max_length" in known:
        seen["max_length"] = getattr(task, "max_length")  # noqa: B009 - not every task has it
        texts = [sample[fields[name]] for name in ("text", "text_pair") if fields.get(name) in sample]
        words = [sum(len(str(value).split()) for value in row) for row in zip(*texts, strict=True)]
        if task.packs() is None and words:
            # Three tokens for two words is on the safe side for text in the model's language.
            seen["max_length"] = next((size for size in (64, 128, 256) if 1.5 * max(words) + 3 <= size), 512)
    return seen


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (in_brackets(value) and list_in(value) is not None)


def _empty(answers: Any) -> bool:
    """Whether an `answers` value, {"text": [...]} or a list, holds none."""
    texts = answers.get("text") if isinstance(answers, dict) else answers
    return texts is None or (hasattr(texts, "__len__") and len(texts) == 0)


def _run_name(path: str) -> str:
    """A name from the data's: of its folder where the file is only called after its split."""
    parts = [part for part in re.split(r"[/\\:]+", path) if part not in ("", ".", "..")]
    stems = [re.sub(r"(\.(csv|tsv|jsonl?|parquet|txt|gz))+$", "", part) for part in parts]
    while len(stems) > 1 and (re.fullmatch(r"(train|training|data|metadata)([-_.].*)?", stems[-1]) or "*" in stems[-1]):
        stems.pop()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stems[-1] if stems else "").strip("-.")
    return name if name and not taken(name) else "first-run"


def split_column(columns: Iterable[str]) -> str | None:
    """The column whose values say which rows are for training, validation and test, if there is one."""
    return next((column for column in columns if column.lower() in _SPLIT), None)


def _sources(sample: Mapping[str, Sequence[Any]], path: str) -> dict[str, str]:
    """The data section's entries: rows by a column that names their split, or files that lie beside each other."""
    column = split_column(sample)
    words = {str(value).lower(): value for value in sample[column]} if column else {}
    found = {split: next((words[name] for name in names if name in words), None) for split, names in _SPLITS.items()}
    if found["train"] is not None:
        parts = {split: {"path": path, "where": {column: value}} for split, value in found.items() if value is not None}
        return {split: document.write(part, one_line=True).rstrip() for split, part in parts.items()}
    beside = {"train": path, **{split: _beside(path, split) for split in ("validation", "test")}}
    return {split: _plain(other) for split, other in beside.items() if other is not None}


def _beside(path: str, split: str) -> str | None:
    """The local file or folder of another split, if it lies beside the train split and is named like it."""
    folder, name = os.path.split(path.rstrip("/"))
    for word in _SPLITS[split]:
        other = os.path.join(folder, re.sub(r"\btrain(ing)?\b", word, name))
        if other != path.rstrip("/") and "://" not in path and os.path.exists(other):
            return other
    return None
