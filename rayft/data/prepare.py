"""Rows to prepared shards, once: the key of what they depend on, the preparation under it, and its commit.

`<storage>/prepared/<key>/manifest.json` is written last, and what has none does not exist. Shards lie in a folder of
their attempt, so that processes which prepare the same key at once can't meet; the first to commit wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from rayft import storage
from rayft.data.pieces import work
from rayft.data.prepared import Manifest, Prepared
from rayft.data.read import columns
from rayft.data.scan import Scan, scan
from rayft.data.shards import Counts, Encoder, Plan, Shard, Written, encode_rows, read_rows, write_shard
from rayft.data.source import absent, unmatched
from rayft.data.splits import (
    BLOB_BYTES,
    OWN_BLOB_BYTES,
    Split,
    blob_of,
    facts_key,
    groups_of,
    passed_over,
    processor_hash,
    rows_of,
    shards_of,
    split_key,
    splits_of,
    units_of,
)
from rayft.data.spread import ENCODE_BYTES, READ_BYTES, THREADS, WORTH, processors, sooner_here, spread
from rayft.errors import DataError, StorageError
from rayft.recipe import Recipe
from rayft.tasks.task import Pretrained

MOST_BAD = 0.1  # the share of bad rows beyond which skipping them is refused
ENOUGH_BAD = 1000  # bad rows after which the rest is not looked at
USED = "used"  # rewritten by whoever finds shards: a run's folder refers to them only once its workers are there
USED_S = 3600.0  # so long a mark serves all who find them

Progress = Callable[[str, int, int | None], None]


class Preparation:
    """The recipe's splits "train", "validation" and, where given, "test": to be found prepared, or prepared now.

    `model_path` is what `fetch_model` gave. `splits` asks for some of them only. `facts` are those of an earlier
    preparation, where other rows are prepared for a model that has been trained; else they come from train. Raises
    DataError where there are no such files. `damaged` are files of an earlier preparation that can't be read, and so
    were made anew.
    """

    def __init__(
        self,
        recipe: Recipe,
        model_path: str,
        *,
        splits: Sequence[str] | None = None,
        facts: dict[str, Any] | None = None,
    ):
        self._recipe, self._facts = recipe, facts
        self._wanted = [name for name in ("train", "validation", "test") if splits is None or name in splits]
        self._cuts = recipe.data.validation is None and any(name in self._wanted for name in ("train", "validation"))
        self._parts = splits_of(recipe, self._wanted, with_train=facts is None or self._cuts)
        self._model = Pretrained(model_path, recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
        self._home = _home(recipe)
        self.damaged: list[str] = []

    def found(self) -> dict[str, Prepared] | None:
        """Every split, where all are prepared: reads no row, and needs neither Ray nor torch."""
        known = self._known(self._scanned_before)
        if known is None:
            return None
        there = {name: self._find(folder) for name, folder in self._folders(known).items()}
        found = {name: one for name, one in there.items() if one is not None}
        _mark(found.values())
        return found if len(found) == len(there) else None

    def made(self, progress: Progress | None = None) -> dict[str, Prepared]:
        """Every split, prepared now where it was not.

        `progress(stage, done, total)` is called on the way; Ray has to be initialised unless all is prepared already.
        DataError names files and rows that can't be used.
        """
        show = progress or (lambda stage, done, total: None)
        known = self._known(
            lambda train: self._scanned_before(train) or _scanned(self._recipe, train, self._cuts, self._home, show)
        )
        assert known is not None  # what scans, knows
        folders = self._folders(known)
        there = {name: self._find(folder) for name, folder in folders.items()}
        _mark(one for one in there.values() if one is not None)
        missing = [self._parts[name] for name, one in there.items() if one is None]
        encoder = Encoder(self._recipe.task, self._model, self._recipe.model.path, self._processor, known.facts)
        made = _make(self._recipe, missing, folders, known, encoder, show)
        return {name: one or made[name] for name, one in there.items()}

    def _find(self, folder: str) -> Prepared | None:
        """What was prepared there, if it is whole."""
        found = Prepared.find(folder)
        if found is None:
            self._note_damage(storage.join(folder, "manifest.json"))
        return found

    def _scanned_before(self, train: Split) -> Scan | None:
        found = _scanned_before(self._recipe, train, self._cuts, self._home)
        if found is None:
            self._note_damage(_scan_path(self._recipe, train, self._cuts, self._home))
        return found

    def _note_damage(self, path: str) -> None:
        """A file that says nothing usable and is there all the same is damaged."""
        if path not in self.damaged and storage.exists(path):
            self.damaged.append(path)

    def _known(self, scanned: Callable[[Split], Scan | None]) -> Scan | None:
        """What is known of the training rows, as far as `scanned` knows it."""
        if self._facts is not None and not self._cuts:
            return Scan(facts=self._facts)
        known = scanned(self._parts["train"])
        return known if known is None or self._facts is None else known.model_copy(update={"facts": self._facts})

    def _folders(self, known: Scan) -> dict[str, str]:
        named = {name: self._parts[name] for name in self._wanted if name in self._parts}
        keys = {name: split_key(self._recipe, split, known, self._processor) for name, split in named.items()}
        return {name: storage.join(self._home, key) for name, key in keys.items()}

    @cached_property
    def _processor(self) -> str:
        return processor_hash(self._recipe.task, self._model)


def prepare(
    recipe: Recipe,
    model_path: str,
    *,
    progress: Progress | None = None,
    splits: Sequence[str] | None = None,
    facts: dict[str, Any] | None = None,
) -> dict[str, Prepared]:
    """The recipe's splits, found prepared or prepared now; see Preparation."""
    return Preparation(recipe, model_path, splits=splits, facts=facts).made(progress)


def facts_of(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """The facts of the training rows, found or scanned now, where the rows can't be prepared; raises as `prepare`."""
    train = splits_of(recipe, ["train"], with_train=True)["train"]
    show = progress or (lambda stage, done, total: None)
    return _scanned(recipe, train, recipe.data.validation is None, _home(recipe), show).facts


def _mark(found: Iterable[Prepared]) -> None:
    """Keeps `rayft clean` from shards that are about to be used, where their storage can be written."""
    for one in found:
        newest = max((entry.modified for entry in storage.listing(one.folder, recursive=False)), default=0.0)
        if time.time() - newest > USED_S:
            with contextlib.suppress(StorageError):
                storage.write_bytes(storage.join(one.folder, USED), b"")


def _home(recipe: Recipe) -> str:
    return storage.join(storage.absolute(recipe.storage), "prepared")


def _scanned(recipe: Recipe, train: Split, cut: bool, home: str, show: Progress) -> Scan:
    """Facts and cut: a function of the training rows and the task, kept under a key of their own."""
    if before := _scanned_before(recipe, train, cut, home):
        return before
    total = rows_of(train.pieces)
    units = units_of(train.pieces)
    found = scan(
        recipe.task, units, train.sources, recipe.data.columns, cut, lambda done: show("reading rows", done, total)
    )
    storage.write_json(_scan_path(recipe, train, cut, home), found.model_dump(mode="json"))
    return found


def _scanned_before(recipe: Recipe, train: Split, cut: bool, home: str) -> Scan | None:
    return Scan.kept(_scan_path(recipe, train, cut, home))


def _scan_path(recipe: Recipe, train: Split, cut: bool, home: str) -> str:
    return storage.join(home, f"facts-{facts_key(recipe, train, cut)}.json")


def _plan(recipe: Recipe, split: Split, known: Scan, folder: str, here: bool) -> Plan:
    encoders, most = (THREADS, OWN_BLOB_BYTES) if here else (processors(), BLOB_BYTES)
    return Plan(
        folder=storage.join(folder, f"attempt-{uuid.uuid4().hex[:12]}"),
        sources=split.sources,
        names=recipe.data.columns,
        columns=recipe.task.columns(),
        evaluation=split.evaluation,
        in_order=split.in_order,
        capacity=None if split.evaluation else recipe.task.packs(),
        shards=shards_of(split.pieces),
        groups=groups_of(split.pieces),
        blob=blob_of(split.pieces, encoders, most),
        threshold=known.threshold if split.cut or split.name == "train" else None,
        cut=split.cut,
    )


def _make(
    recipe: Recipe, splits: Sequence[Split], folders: dict[str, str], known: Scan, encoder: Encoder, show: Progress
) -> dict[str, Prepared]:
    """Prepares the splits together, and commits each. What a failure leaves behind is deleted."""
    if not splits:
        return {}
    size = work(piece for split in splits for piece in split.pieces)
    here = sooner_here(size, ENCODE_BYTES, processors(), WORTH)
    plans = {split.name: _plan(recipe, split, known, folders[split.name], here) for split in splits}
    attempts = {name: plan.folder for name, plan in plans.items()}
    try:
        tallies = _scatter(recipe, splits, plans, encoder, known, here, show)
        counts = {name: tallies[name].counts for name in plans}
        # Where reading ended early, only splits with bad rows are known to be at fault.
        early = recipe.data.on_bad_row == "error" and any(count.bad >= ENOUGH_BAD for count in counts.values())
        judged = [split for split in splits if counts[split.name].bad or not early]
        refused = [sentence for split in judged for sentence in _faults(recipe, split, counts[split.name])]
        if refused:
            raise DataError("\n".join(refused))
        _gather(plans, tallies, show)
        for split in splits:
            if split.evaluation:
                _check_references(recipe, split.name, folders[split.name], tallies[split.name])
        manifests = {
            split.name: _manifest(split, plans[split.name], folders[split.name], tallies[split.name], known)
            for split in splits
        }
        # From here on an attempt's manifest may be there, even where writing it seemed to fail.
        return {name: _commit(folders[name], attempts.pop(name), manifest) for name, manifest in manifests.items()}
    except BaseException:
        for attempt in attempts.values():
            with contextlib.suppress(StorageError, OSError):  # the error on its way says more
                storage.delete(attempt)
                if storage.is_local(attempt):
                    os.rmdir(os.path.dirname(attempt))  # unless somebody else's are there
        raise


@dataclass
class _Tally:
    """What has been learned of a split so far: counts, the pieces of each shard, and what was written."""

    counts: Counts = field(default_factory=Counts)
    pieces: dict[int, list[tuple[str, int, int]]] = field(default_factory=lambda: defaultdict(list))
    written: list[Written] = field(default_factory=list)


def _scatter(
    recipe: Recipe,
    splits: Sequence[Split],
    plans: dict[str, Plan],
    encoder: Encoder,
    known: Scan,
    here: bool,
    show: Progress,
) -> dict[str, _Tally]:
    """Reads and encodes all rows of all splits in one execution."""
    tallies = {split.name: _Tally() for split in splits}
    units = [(split.name, unit) for split in splits for unit in units_of(split.pieces)]
    totals = [_expected(split, known) for split in splits]
    total = None if None in totals else sum(count or 0 for count in totals)
    done = 0
    stages = (partial(read_rows, plans=plans), partial(encode_rows, plans=plans, encoder=encoder))
    with contextlib.closing(spread(units, *stages, here=here)) as scattered:
        for result in scattered:
            tally = tallies[result.split]
            tally.counts.add(result.counts)
            for shard, offset, length in result.pieces:
                tally.pieces[shard].append((result.path, offset, length))
            done += result.counts.source_rows + result.counts.bad
            show("encoding rows", done, total)
            if recipe.data.on_bad_row == "error" and tally.counts.bad >= ENOUGH_BAD:
                break
    return tallies


def _expected(split: Split, known: Scan) -> int | None:
    """How many rows the split has, where that is known."""
    if split.cut:
        return known.cut
    return known.rows - known.cut if split.name == "train" and known.rows else rows_of(split.pieces)


def _faults(recipe: Recipe, split: Split, counts: Counts) -> list[str]:
    """Why the split can't be used: bad rows (or more of them than may be skipped), or no features."""
    what = _named(recipe, split.name)
    first = "\n".join(f"  {sentence}" for *_, sentence in counts.examples)
    rows = counts.source_rows + counts.bad
    if counts.bad and recipe.data.on_bad_row == "error":
        some = f"at least {counts.bad:,}" if counts.bad >= ENOUGH_BAD else f"{counts.bad:,} of {rows:,}"
        most = f" (data.on_bad_row=skip leaves out at most {MOST_BAD:.0%})"
        mend = most if counts.bad > MOST_BAD * rows else ", or leave them out with data.on_bad_row=skip"
        return [f"{what}: {some} rows are bad; mend them{mend}\n{first}"]
    if counts.bad > MOST_BAD * rows:
        return [f"{what}: {counts.bad:,} of {rows:,} rows are bad, and at most {MOST_BAD:.0%} are skipped\n{first}"]
    if not counts.source_rows:
        asked = unmatched(split.pieces, split.sources)
        return [f"{what} has no rows: its files are empty, or `where` lets none through{asked}"]
    if not counts.lengths:
        reasons = "".join(f"\n  {count:,} rows: {reason}" for reason, count in sorted(counts.dropped.items()))
        use = "train on" if split.name == "train" else "score"
        return [f"{what}: none of its {counts.source_rows:,} rows leaves anything to {use}{reasons}"]
    return []


def _named(recipe: Recipe, split: str) -> str:
    cut = split == "validation" and recipe.data.validation is None
    return "the validation rows of data.train" if cut else f"data.{split}"


def _gather(plans: dict[str, Plan], tallies: dict[str, _Tally], show: Progress) -> None:
    """Writes all shards of all splits in one execution."""
    units = [
        Shard(name, number, sorted(tally.pieces[shard]))
        for name, tally in tallies.items()
        for number, shard in enumerate(sorted(tally.pieces))
    ]
    here = sooner_here(sum(length for unit in units for *_, length in unit.pieces), READ_BYTES, processors())
    for done, written in enumerate(spread(units, partial(write_shard, plans=plans), here=here), 1):
        tallies[written.split].written.append(written)
        show("writing shards", done, len(units))


def _check_references(recipe: Recipe, split: str, folder: str, tally: _Tally) -> None:
    """DataError where the rows of a split can't be scored together; reads them only where the task looks at them."""
    batches = columns(folder, [shard.entry for shard in tally.written], ["reference"])
    references = (json.loads(text) for batch in batches for text in batch["reference"] if text is not None)
    try:
        recipe.task.check_references(references)
    except DataError as fault:
        raise DataError(f"{_named(recipe, split)}: {fault}") from None


def _manifest(split: Split, plan: Plan, folder: str, tally: _Tally, known: Scan) -> Manifest:
    counts, written = tally.counts, sorted(tally.written, key=lambda shard: shard.number)
    return Manifest(
        key=folder.rpartition("/")[2],
        split=split.name,
        order="source" if plan.in_order else "hash",
        rows=sum(shard.entry["rows"] for shard in written),
        source_rows=counts.source_rows,
        tokens=sum(shard.tokens for shard in written),
        longest=max(shard.longest for shard in written),
        lengths=sorted(counts.lengths.items()),
        truncated=counts.truncated,
        dropped=dict(sorted(counts.dropped.items())),
        bad={"count": counts.bad, "examples": [sentence for *_, sentence in counts.examples]},
        facts=known.facts,
        shards=[shard.entry for shard in written],
        cut=known.cut if plan.threshold is not None else 0,
        passed_over={} if split.cut else passed_over(split.pieces),
        absent=[] if split.cut else absent(split.pieces, split.sources, counts.met),
    )


def _commit(folder: str, attempt: str, manifest: Manifest) -> Prepared:
    """Makes the attempt count, unless another was first; its shards, of the same content, are used then.

    Where two write the manifest at the same moment the later one stays. An attempt is deleted only by its own process,
    and only when another's manifest has been seen in place of its own: so no manifest ever names missing shards.
    """
    storage.delete(storage.join(attempt, "scratch"))
    found = Prepared.find(folder)
    if found is None:
        storage.write_json(storage.join(folder, "manifest.json"), manifest.model_dump(mode="json"))
        found = Prepared.open(folder)
    if found.manifest.shards != manifest.shards:
        storage.delete(attempt)
    return found
