from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Wav2Vec2CTCTokenizer

from rayft.errors import DataError, ModelError
from rayft.tasks.speech_recognition import IGNORED, SpeechRecognition
from rayft.tasks.speech_recognition.letters import ctc_loss, frames_needed, read_off, spelled
from rayft.tasks.speech_recognition.processor import made_tokenizer
from rayft.tasks.task import Pretrained
from speech_models import DIGITS, make_letters, make_listener, make_writer

FACTS = {"letters": sorted(set("zerothreesix"))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for name, make in (("listener", make_listener), ("letters", make_letters), ("writer", make_writer)):
        made[name] = str(tmp_path_factory.mktemp(name))
        make(made[name], 1)
    return made


def test_loss_is_the_likelihood_of_all_ways_to_spell_a_row() -> None:
    """Two frames, letter 1: it may stand in the first, the second, or both."""
    logits = torch.tensor([[[0.3, 0.9], [1.1, -0.4], [5.0, 5.0]]])
    p = logits[0].softmax(dim=-1)
    expected = -torch.log(p[0, 1] * p[1, 0] + p[0, 0] * p[1, 1] + p[0, 1] * p[1, 1])
    labels = torch.tensor([[1, IGNORED]])
    torch.testing.assert_close(ctc_loss(logits, torch.tensor([2]), labels, 0, 0.0), expected)
    even = -p[:2].log().mean(dim=-1).sum()
    smooth = ctc_loss(logits, torch.tensor([2]), labels, 0, 0.25)
    torch.testing.assert_close(smooth, 0.75 * expected + 0.25 * even)
    assert ctc_loss(logits, torch.tensor([2]), torch.tensor([[1, 1]]), 0, 0.0) == 0  # needs three frames


def test_frames_needed_count_a_blank_between_equal_letters() -> None:
    assert [frames_needed(ids) for ids in ([], [1], [1, 2], [1, 1, 2], [1, 1, 1])] == [0, 1, 2, 4, 5]


def test_letters_are_read_off_the_frames_of_a_row_alone() -> None:
    tokenizer = made_tokenizer(("a", "b"))
    blank, between, a, b = (tokenizer.convert_tokens_to_ids(token) for token in ("<pad>", "|", "a", "b"))
    frames = [a, a, blank, a, between, b, b, blank, b]
    logits = torch.nn.functional.one_hot(torch.tensor([frames]), len(tokenizer)).float()
    assert read_off(tokenizer, logits, torch.tensor([len(frames)])) == ["aa bb"]
    assert read_off(tokenizer, logits, torch.tensor([4])) == ["aa"]


def test_a_letter_that_the_model_lacks_is_named_with_what_fits() -> None:
    tokenizer = made_tokenizer(("A", "B"))
    assert tokenizer.decode(spelled(tokenizer, "AB A"), group_tokens=False) == "AB A"
    with pytest.raises(ValueError, match=r"'b' is not among the letters .*; task.case=upper fits"):
        spelled(tokenizer, "Ab")
    with pytest.raises(ValueError, match=r"'é' is not among the letters that the model writes; these fit: AB"):
        spelled(tokenizer, "AéA")


@pytest.mark.parametrize("model", ["listener", "letters"])
def test_a_letter_that_only_evaluated_texts_have_is_scored_and_never_written(
    folders: dict[str, str], model: str
) -> None:
    task, source = SpeechRecognition(case="upper" if model == "letters" else "keep"), Pretrained(folders[model])
    processor = task.processor(source)
    rows = {**DIGITS, "text": ["zerö", "three", "6"]}
    training, made = (task.encode(rows, processor, FACTS, evaluation=evaluation) for evaluation in (False, True))
    assert (training.rows, sorted(training.bad)) == ([1], [0, 2])
    assert (made.rows, made.bad) == ([0, 1, 2], {})
    assert made.references == [text.upper() if model == "letters" else text for text in rows["text"]]
    unknown = processor.tokenizer(FACTS).unk_token_id
    assert [labels.count(unknown) for labels in made.features["labels"]] == [1, 0, 1]
    network = task.load(source, FACTS, processor).eval()
    batch = task.collate(made.features, processor, FACTS)
    with torch.no_grad():
        outputs = task.forward(network, batch)
    assert torch.isfinite(task.loss(outputs, batch))
    scores = task.score(task.predict(outputs, batch, made.features, processor, FACTS), made.references)
    assert scores["wer"] >= 2 / 3


def test_a_letter_without_a_sign_for_the_unknown_is_none_where_texts_are_evaluated(tmp_path: Path) -> None:
    tokenizer, vocabulary = made_tokenizer(("A", "B")), tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps(tokenizer.get_vocab()))
    for sign in ("<none>", "<pad>"):  # the blank is no letter
        bare = Wav2Vec2CTCTokenizer(str(vocabulary), unk_token=sign, pad_token="<pad>")
        assert spelled(bare, "AéB", evaluation=True) == spelled(bare, "AB")
        assert spelled(bare, "éAB", evaluation=True) == spelled(bare, "AB")
        with pytest.raises(ValueError, match="'é' is not among the letters"):
            spelled(bare, "AéB")


@pytest.mark.parametrize("text", ["ab", "Ab", "Ab.", "éb"])
def test_evaluated_texts_in_another_case_than_the_models_are_refused_and_not_scored_as_errors(text: str) -> None:
    tokenizer = made_tokenizer(("A", "B"))
    for evaluation in (True, False):
        with pytest.raises(ValueError, match=r"'[ab]' is not among the letters .*; task\.case=upper fits"):
            spelled(tokenizer, text, evaluation)
    both = made_tokenizer(("A", "B", "c"))
    assert spelled(both, "Ac", evaluation=True) == both("Ac")["input_ids"]
    assert tokenizer.unk_token_id in spelled(both, text, evaluation=True)


def test_the_letters_that_a_tokenizer_lacks_are_those_that_it_takes_for_unknown(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps(made_tokenizer(("A", "B")).get_vocab()))
    folding = Wav2Vec2CTCTokenizer(
        str(vocabulary), bos_token=None, eos_token=None, unk_token="<unk>", pad_token="<pad>", do_lower_case=True
    )
    assert spelled(folding, "ab") == spelled(folding, "AB")
    assert spelled(folding, "aöb", evaluation=True) == [*spelled(folding, "a"), 1, *spelled(folding, "b")]
    with pytest.raises(ValueError, match="'ö' is not among the letters that the model writes; these fit: AB"):
        spelled(folding, "aöb")


def test_a_text_that_writes_out_the_sign_for_the_unknown_is_refused_where_it_would_be_learnt() -> None:
    tokenizer = made_tokenizer(("<", ">", "k", "n", "u"))
    assert spelled(tokenizer, "<unk>", evaluation=True) == [tokenizer.unk_token_id]
    with pytest.raises(ValueError, match="'<unk>' is not among the letters"):
        spelled(tokenizer, "<unk>")


def test_rows_that_can_not_be_learnt_are_left_out_or_refused(folders: dict[str, str]) -> None:
    task = SpeechRecognition(max_seconds=0.6)
    processor = task.processor(Pretrained(folders["listener"]))
    rows = {
        "file_name": [*DIGITS["file_name"], DIGITS["file_name"][1], DIGITS["file_name"][1], "/no/such.wav"],
        "text": ["zero", "three", "six", " ", "three" * 5, "zero"],
    }
    made = task.encode(rows, processor, FACTS, evaluation=True)
    assert made.rows == [1, 2]
    assert made.references == ["three", "six"]
    assert made.dropped == {
        0: "longer than task.max_seconds",
        4: "its text has more letters than its sound has frames",
    }
    assert sorted(made.bad) == [3, 5]
    assert made.bad[3] == "`text` is ' '; it needs text"
    unknown = task.encode({**DIGITS, "text": ["zero", "Three", "tree!"]}, processor, FACTS, evaluation=False)
    assert unknown.bad[1] == "`text`: 'T' is not among the letters that the model writes; task.case=lower fits"
    assert "'!' is not among the letters" in unknown.bad[2]


def test_letters_come_from_the_training_texts_in_their_case() -> None:
    rows = [{"text": ["Zoë  B", None]}, {"text": ["a b"]}]
    assert SpeechRecognition().facts(rows) == {"letters": ["B", "Z", "a", "b", "o", "ë"]}
    assert SpeechRecognition(case="upper").facts(rows) == {"letters": ["A", "B", "O", "Z", "Ë"]}
    with pytest.raises(DataError, match="holds no text"):
        SpeechRecognition().facts([{"text": [" ", None]}])


def test_the_sign_between_words_is_a_blank_and_no_letter(folders: dict[str, str]) -> None:
    """As a letter it would take the sign's place, and the ids would run beyond the head."""
    task, source = SpeechRecognition(), Pretrained(folders["listener"])
    processor = task.processor(source)
    facts = task.facts([{"text": ["ze|ro", "zero"]}])
    assert facts == {"letters": ["e", "o", "r", "z"]}
    rows = {"file_name": DIGITS["file_name"][:2], "text": ["ze|ro", "ze ro"]}
    made = task.encode(rows, processor, facts, evaluation=False)
    assert made.features["labels"][0] == made.features["labels"][1]
    network: Any = task.load(source, facts, processor)
    assert sorted(made_tokenizer(tuple(facts["letters"])).get_vocab().values()) == list(
        range(network.config.vocab_size)
    )
    batch = task.collate(made.features, processor, facts)
    assert torch.isfinite(task.loss(task.forward(network, batch), batch))


def test_made_letters_go_with_the_model_and_are_kept_from_then_on(folders: dict[str, str], tmp_path: Path) -> None:
    task = SpeechRecognition()
    source = Pretrained(folders["listener"])
    processor = task.processor(source)
    assert processor.own is None
    network: Any = task.load(source, FACTS, processor)
    assert network.lm_head.out_features == len(FACTS["letters"]) + 3
    assert "lm_head.weight" in network.rayft_drawn
    network.save_pretrained(tmp_path)
    processor.save_pretrained(str(tmp_path))
    task.export(str(tmp_path), network, processor, FACTS)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == made_tokenizer(tuple(FACTS["letters"])).get_vocab()
    adapted = {"letters": ["e", "o", "r", "z"]}  # of the rows that it goes on with
    again = task.processor(Pretrained(str(tmp_path)))
    kept: Any = task.load(Pretrained(str(tmp_path), seed=9), adapted, again)
    assert torch.equal(kept.lm_head.weight, network.lm_head.weight)
    made = task.encode({"file_name": DIGITS["file_name"][:1], "text": ["six"]}, again, adapted, evaluation=True)
    assert not made.bad


def test_a_writer_is_given_its_prompt_and_learns_the_rest(folders: dict[str, str]) -> None:
    task = SpeechRecognition(language="en", max_seconds=1, max_new_tokens=8)
    processor = task.processor(Pretrained(folders["writer"]))
    tokenizer = processor.tokenizer({})
    made = task.encode(DIGITS, processor, FACTS, evaluation=True)
    batch = task.collate(made.features, processor, FACTS)
    prompt = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    assert tokenizer.convert_ids_to_tokens(batch["decoder_input_ids"][2][:7].tolist()) == [*prompt, "s", "i", "x"]
    labels = batch["labels"][2]
    assert labels[:3].tolist() == [IGNORED] * 3
    assert tokenizer.convert_ids_to_tokens(labels[3:7].tolist()) == ["s", "i", "x", "<|endoftext|>"]
    assert (labels[7:] == IGNORED).all()
    assert task.items(batch) == len("zero") + len("three") + len("six") + 3
    places, asked = task.asked(made.features)
    assert places == [0, 1, 2]
    assert "labels" not in task.collate(asked, processor, FACTS)
    short = SpeechRecognition(max_seconds=1, max_new_tokens=4).encode(DIGITS, processor, FACTS, evaluation=False)
    assert short.dropped == {
        0: "its text has more tokens than task.max_new_tokens",
        1: "its text has more tokens than task.max_new_tokens",
    }


def test_a_text_that_is_longer_than_a_writer_s_positions_is_left_out(folders: dict[str, str]) -> None:
    task, source = SpeechRecognition(max_seconds=1, max_new_tokens=600), Pretrained(folders["writer"])
    processor = task.processor(source)
    prompt = len(processor.tokenizer({}).prefix_tokens)
    longest = "z" * (300 - prompt - 1)  # its end is a token too
    rows = {"file_name": DIGITS["file_name"][1:], "text": [longest, longest + "z"]}
    made = task.encode(rows, processor, FACTS, evaluation=False)
    assert made.rows == [0]
    assert made.dropped == {1: "its text has more tokens than the model has positions for"}
    network: Any = task.load(source, FACTS, processor)
    batch = task.collate(made.features, processor, FACTS)
    assert torch.isfinite(task.loss(task.forward(network, batch), batch))


def test_a_writer_writes_what_its_own_generate_does(folders: dict[str, str]) -> None:
    task = SpeechRecognition(language="english", max_seconds=1, max_new_tokens=8)
    source = Pretrained(folders["writer"])
    processor = task.processor(source)
    network: Any = task.load(source, FACTS, processor).eval()
    made = task.encode({"file_name": DIGITS["file_name"]}, processor, FACTS, evaluation=True, labelled=False)
    batch = task.collate(made.features, processor, FACTS)
    given = task.generate(network, batch, made.features, processor, FACTS)
    own = network.generate(
        batch["input_features"], language="english", task="transcribe", max_new_tokens=8, num_beams=1, do_sample=False
    )
    expected = processor.tokenizer(FACTS).batch_decode(own, skip_special_tokens=True)
    assert [row["text"] for row in given] == [text.strip() for text in expected]
    assert len({row["text"] for row in given}) > 1
    network.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert task.generate(network, batch, made.features, processor, FACTS) == given


@pytest.mark.parametrize(
    ("model", "fields", "says"),
    [
        ("letters", {"language": "english"}, "task.language is 'english', but .* writes letters of any; null fits"),
        ("writer", {"language": "klingon", "max_seconds": 1}, "task.language is 'klingon': Unsupported language"),
        ("writer", {}, "task.max_seconds is 20, but .* reads 1 seconds"),
    ],
)
def test_what_the_model_can_not_do_is_refused(
    folders: dict[str, str], model: str, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        SpeechRecognition(**fields).processor(Pretrained(folders[model]))


def test_a_limit_for_texts_that_are_not_written_is_told(folders: dict[str, str]) -> None:
    for model, fields, told in (
        ("letters", {"max_new_tokens": 64}, 1),
        ("letters", {}, 0),
        ("writer", {"max_new_tokens": 64, "max_seconds": 1}, 0),
    ):
        task = SpeechRecognition(**fields)
        assert len(task.notes(task.processor(Pretrained(folders[model])))) == told


def test_scores_are_errors_per_true_word_and_letter() -> None:
    given = [{"text": "nine"}, {"text": "one to"}, {"text": ""}]
    scores = SpeechRecognition().score(given, ["nine", "one two", "six"])
    assert scores == {"wer": pytest.approx(2 / 4), "cer": pytest.approx(4 / 14)}
    assert list(scores) == ["wer", "cer"]
    assert set(scores) <= SpeechRecognition.lower_is_better
