"""A first recipe from the columns of a data set: which task they call for, and a commented YAML text to go on from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from rayft import document, tasks
from rayft.data.classes import PICTURES, SOUNDS
from rayft.data.formats import divided
from rayft.data.source import Fragment, peek
from rayft.errors import DataError
from rayft.layout import taken
from rayft.tasks.cells import in_brackets, list_in, short
from rayft.tasks.task import Task

# What a column is for -> names that it goes by, the likelier first. A task's field for such a column has the same name.
_NAMES = {
    "text": ("text", "sentence", "content", "review", "message", "sms", "tweet", "document", "body", "utterance"),
    "label": ("label", "labels", "category", "class", "intent", "sentiment", "topic", "target"),
    "target": ("score", "similarity_score", "similarity"),
    "anchor": ("anchor",),
    "positive": ("positive",),
    "negative": ("negative",),
    "question": ("question",),
    "context": ("context", "passage", "paragraph"),
    "answers": ("answers",),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "chunk_tags", "ner", "pos"),
    "messages": ("messages", "conversation", "conversations", "chat", "dialog", "dialogue"),
    "prompt": ("prompt", "instruction", "question", "query", "source"),
    "completion": ("completion", "output", "response", "answer", "reply", "target"),
}
_SPLIT = ("split", "subset", "partition")  # a column that says which rows are for what
_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
_CAPTIONS = ("caption", "prompt", "description")  # of a picture
_PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text", "text_pair"))
# What columns are together for, the most telling first.
_FORMS = (
    ("question", "context", "answers"),
    ("tokens", "tags"),
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

    DataError where none has, or where a header is divided by another sign than its format's.
    """
    for piece in pieces:
        columns, sample = peek(piece)
        if told := divided(piece.path, columns):
            raise DataError(told)
        if any(sample.values()):
            return columns, sample
    raise DataError(f"{path} has no rows; a first recipe needs some to look at")


def first_recipe(columns: Sequence[str], sample: Mapping[str, Sequence[Any]], path: str) -> str:
    """The commented text of a recipe that trains on the data at `path`, which has `columns`.

    `sample` holds the first rows of each column; it tells list-valued labels, empty answers and lengths. Of the
    `split_column` it holds all values.
    DataError, with the columns found and those that would do, where no task fits.
    """
    for fields in (*_files(columns, sample), *_readings(columns)):
        for name in tasks.names():
            if task := _fitting(tasks.find(name), fields, columns):
                return "\n".join(_lines(task, fields, sample, path)) + "\n"
    for name in tasks.names():  # a task whose own names for its columns are those of the data; sounds were looked for
        kind = tasks.find(name)
        if "audio" not in kind.model_fields and (task := _fitting(kind, {}, columns)):
            return "\n".join(_lines(task, {}, sample, path)) + "\n"
    known = "; ".join(" + ".join(form) for form in _FORMS)
    raise DataError(
        f"{path}: no task fits the columns {', '.join(map(short, columns)) or '(none)'}; these would do: {known}. "
        "Rename them in `data.columns` of a recipe written by hand"
    )


def _files(columns: Sequence[str], sample: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, str]]:
    """What the columns are for where one holds sounds or pictures: their texts, or their labels."""
    lower = {column.lower(): column for column in reversed(columns)}
    for column in columns:
        values = [str(value).lower() for value in sample.get(column, ())]
        for field, endings in (("audio", SOUNDS), ("image", PICTURES)):
            if values and all(value.endswith(endings) for value in values):
                for role, names in (("text", (*_NAMES["text"], *_CAPTIONS)), ("label", _NAMES["label"])):
                    found = next((lower[name] for name in names if name in lower), None)
                    if found is not None:
                        yield {field: column, role: found}


def _readings(columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """What the columns may be for, field of a task -> column, the most telling reading first."""
    lower = {column.lower(): column for column in reversed(columns)}
    for first, second in _PAIRS:
        for role in ("label", "target"):
            truth = next((lower[name] for name in _NAMES[role] if name in lower), None)
            if first in lower and second in lower and truth:
                yield {"text": lower[first], "text_pair": lower[second], role: truth}
    for form in _FORMS:
        found = {role: next((lower[name] for name in _NAMES[role] if name in lower), None) for role in form}
        fields = {role: column for role, column in found.items() if column is not None}
        if len(set(fields.values())) < len(form):
            continue
        if fields.get("prompt") == lower.get("instruction") and "input" in lower:
            yield {**fields, "prompt": f"{{{fields['prompt']}}}\n\n{{{lower['input']}}}"}
        yield fields


def _fitting(kind: type[Task], fields: Mapping[str, str], columns: Sequence[str]) -> Task | None:
    """The task with these column names in its fields, if it needs just these columns and the data has them."""
    try:
        task = kind.model_validate(dict(fields))
        needed = set(task.columns())
    except (ValidationError, NotImplementedError):  # fields that it lacks or that exclude each other
        return None
    named = {name for value in fields.values() for name in (re.findall(r"\{(.+?)\}", value) or [value])}
    return task if needed and needed <= set(columns) and (not named or needed == named) else None


def _lines(task: Task, fields: Mapping[str, str], sample: Mapping[str, Sequence[Any]], path: str) -> Iterator[str]:
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
