"""Answers that are right or wrong: what stands behind a mark, which rows are asked, and when two answers are equal."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from rayft.tasks.causal_lm.samples import Form, samples, truths
from rayft.tasks.task import Columns, Encoded

ZEROS = 100


@dataclass(frozen=True)
class Asking:
    """Which rows of an evaluation a model is asked for an answer, and what is right.

    mark        what stands before an answer
    share       of the rows that are asked
    max_length  tokens that are kept of a prompt, the last ones
    """

    mark: str
    share: float
    max_length: int

    def joined(self, made: Encoded, rows: Columns, form: Form, tokenizer: Any) -> Encoded:
        """`made` with `prompt_ids` at the last feature of each row that is asked, and its right answer as reference.

        A row whose truth has no mark is bad.
        """
        right = {row: answer(truth, self.mark) for row, truth in truths(form, rows).items()}
        bad = {
            row: f"{' and '.join(f'`{name}`' for name in form.columns())} has no {self.mark!r}, behind which its answer"
            " would stand (task.answer_after)"
            for row in made.rows
            if row in right and right[row] is None
        }
        keep = [place for place, row in enumerate(made.rows) if row not in bad]
        owners = [made.rows[place] for place in keep]
        asked = {row for row in set(owners) if row in right and chosen(rows, row, form.columns(), self.share)}
        prompts = {row: ids for row, (ids, _) in samples(form, rows, tokenizer, False, {}) if row in asked}
        last = {row: place for place, row in enumerate(owners)}
        features = {name: [values[place] for place in keep] for name, values in made.features.items()}
        features["prompt_ids"] = [
            prompts[row][-self.max_length :] if row in asked and last[row] == place else []
            for place, row in enumerate(owners)
        ]
        return replace(
            made,
            features=features,
            rows=owners,
            lengths=[made.lengths[place] for place in keep],
            references=[right[row] if row in asked else None for row in owners],
            truncated=[row for row in made.truncated if row not in bad],
            bad=made.bad | bad,
        )


def answer(text: str, mark: str) -> str | None:
    """What stands behind the last `mark`, up to the end of its line; None where there is no mark.

    Blanks, commas and a full stop at its end don't count, and numbers are written in one way: "1,080.0" is "1080".
    """
    _, found, rest = text.rpartition(mark)
    if not found:
        return None
    line = next(iter(rest.lstrip().splitlines()), "")
    plain = re.sub(r"[\s,]", "", line).removesuffix(".")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return plain
    return _written(number) if number.is_finite() else plain


def _written(number: Decimal) -> str:
    """A number in one way, exactly: as digits, or with an exponent where more than `ZEROS` would follow or lead them.

    Decimal's own `normalize` rounds to 28 digits, and fails where an exponent is large.
    """
    sign, digits, exponent = number.as_tuple()
    kept = "".join(map(str, digits)).rstrip("0")
    power = int(exponent) + len(digits) - len(kept)
    if not kept:  # there is one zero, without a sign
        return "0"
    if abs(power) > ZEROS:
        return f"{'-' * sign}{kept.lstrip('0')}e{power}"
    return format(Decimal((sign, digits[: len(kept)], power)), "f")


def chosen(rows: Columns, row: int, columns: tuple[str, ...], share: float) -> bool:
    """Whether a row is one of those that a model is asked: by a hash of what it holds, so the same ones always."""
    if share >= 1.0:
        return True
    content = json.dumps([rows[name][row] for name in columns], ensure_ascii=False, default=_plain)
    drawn = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")
    return drawn < share * 2.0**64


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def exact_match(written: list[tuple[str, str]], mark: str) -> float:
    """The share of the (text that was written, answer as `answer` gives it) whose text gives that answer."""
    return sum(answer(text, mark) == truth for text, truth in written) / len(written)
