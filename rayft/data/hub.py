"""Data sets of the Hugging Face Hub, or folders laid out like one: hf://owner/name[/config][:split][@revision]."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rayft import storage
from rayft.data import class_labels
from rayft.data.formats import Row, Table
from rayft.errors import DataError
from rayft.models import hub_answers


@dataclass(frozen=True)
class HubData:
    """One split of a data set. `name` is owner/name or a local folder; `commit` pins what is read later."""

    name: str
    config: str | None
    split: str | None
    commit: str | None

    def __str__(self) -> str:
        config, split = (self.config and f"/{self.config}") or "", (self.split and f":{self.split}") or ""
        return f"hf://{self.name}{config}{split}" + (f"@{self.commit}" if self.commit else "")


def parse(path: str) -> HubData:
    """The parts of an hf:// path; a folder that exists is taken as the data set itself."""
    found = re.fullmatch(r"hf://(?P<rest>[^:@]+)(:(?P<split>[^@]+))?(@(?P<commit>[\w.-]+))?", path)
    if not found:
        raise DataError(f"{path} is no Hub data set; hf://owner/name[/config][:split][@revision] fits")
    rest = found["rest"].rstrip("/")
    if os.path.isdir(rest):
        name, config = rest, None
    elif os.path.isdir(os.path.dirname(rest)) and os.path.isabs(rest):
        name, config = os.path.dirname(rest), os.path.basename(rest)
    else:
        owner, _, tail = rest.partition("/")
        name, _, config = tail.partition("/")
        name = f"{owner}/{name}" if name else owner
    return HubData(name, config or None, found["split"], found["commit"])


def look_up(path: str, split: str) -> tuple[HubData, str, int]:
    """What `path` means now: (with split and commit filled in, its identity, the number of its shards).

    `split` is taken where the path names none.
    """
    data = parse(path)
    builder = _builder(data)
    wanted = data.split or split
    files = builder.config.data_files or {}
    splits = [str(name) for name in files] or list(builder.info.splits or ())
    if wanted not in splits:
        only = splits[0] if len(splits) == 1 and not data.split else None
        if only is None:
            raise DataError(
                f"{path} has no split {wanted!r}; it has {', '.join(splits)}: write hf://{data.name}:<split>"
            )
        wanted = only
    commit = builder.hash if re.fullmatch(r"[0-9a-f]{40}", builder.hash or "") else None
    pinned = HubData(data.name, data.config, wanted, None if os.path.isdir(data.name) else commit or data.commit)
    parts = [commit, builder.config.name, wanted]
    for name, listed in files.items():
        if str(name) == wanted and not commit:
            local = [entry for file in listed if os.path.isfile(file) for entry in storage.expand(file)]
            parts += [storage.content_hash(entry) for entry in local] or [str(listed.origin_metadata)]
    identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return pinned, identity, max(1, builder.as_streaming_dataset(split=wanted).num_shards)


def read_hub(path: str, part: tuple[int, int]) -> Table:
    """Shard part[0] of part[1] of a pinned data set; class labels come as their names."""
    data = parse(path)
    stream = _builder(data).as_streaming_dataset(split=data.split)
    features = stream.features
    if part[1] > 1:
        stream = stream.shard(num_shards=part[1], index=part[0])
    return Table(tuple(features) if features else None, _rows(path, stream, features))


def _rows(path: str, stream: Any, features: Any) -> Iterator[Row]:
    known, number = class_labels.names(features.to_dict() if features else None), 0
    try:
        for values in stream:
            row = {name: values.get(name) for name in features} if features else values
            yield Row(number, 0, class_labels.named(row, known))
            number += 1
    except (ValueError, OSError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(f"{path} row {number + 1}: the data set can't be read further: {error}") from None


def _builder(data: HubData) -> Any:
    answers = os.path.isdir(data.name) or hub_answers()  # before `datasets` is there, which asks once whether to ask it
    import datasets

    try:
        return datasets.load_dataset_builder(data.name, data.config, revision=data.commit)
    except (ConnectionError, OSError, ValueError) as error:
        if not answers:
            raise DataError(
                f"{data} can't be loaded: the Hub doesn't answer, and its cache on this machine lacks the data set"
            ) from None
        raise DataError(f"{data} can't be loaded: {error}") from None
