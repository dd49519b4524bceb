"""Language modelling: what the loss is taken over, and that packing changes nothing but the speed."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayft.data.pack import pack, packed_table
from rayft.errors import DataError, ModelError
from rayft.sweeps import warm
from rayft.tasks import causal_lm
from rayft.tasks.causal_lm import CausalLM, each, likelihood
from rayft.tasks.causal_lm.answers import answer, chosen
from rayft.tasks.causal_lm.apart import keeps_apart
from rayft.tasks.causal_lm.direction import reads_both_ways
from rayft.tasks.causal_lm.each import attend_each
from rayft.tasks.task import Pretrained
from small import switching_often

SENTENCES = [
    "What are the symptoms of flu ?",
    "Fever, a cough and aching muscles; most people feel better after a week.",
    "How to diagnose it ?",
    "A swab of the nose or the throat is examined.",
    "Who is at risk ?",
    "Anyone may fall ill, but mostly the very young and the old.",
]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<bot>"]
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<bot>' if m.role == 'assistant' else '<user>' }}{{ m.content }}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<bot>{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{% else %}<user>{{ m.content }}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
CHAT = [
    {"role": "user", "content": SENTENCES[0]},
    {"role": "assistant", "content": SENTENCES[1]},
    {"role": "user", "content": SENTENCES[2]},
    {"role": "assistant", "content": SENTENCES[3]},
]


def trained_tokenizer(around: str = "", **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; `around` ("<bos> $A") is what it puts around a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        SENTENCES * 4, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    if around:
        ids = [(token, inner.token_to_id(token)) for token in ("<bos>", "<eos>")]
        inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<user>", "<bot>"],
        **options,
    )


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"alibi": True},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


def tiny(kind: str, attention: str = "eager", **fields: Any) -> Any:
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 320}
    config = AutoConfig.for_model(kind, **{**SIZES, **ends, **KINDS[kind], **fields})
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`folder("llama")` gives the path of a small model with a tokenizer; made once for equal arguments."""
    made: dict[str, str] = {}

    def find(kind: str, around: str = "<bos> $A", template: str | None = None, **options: Any) -> str:
        name = repr((kind, around, template, options))
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(kind))
            tiny(kind).save_pretrained(made[name])
            tokenizer = trained_tokenizer(around, **options)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(made[name])
        return made[name]

    return find


def words(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def learnt(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    """The text that the loss is taken over; checks that each label is its token."""
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    return words(tokenizer, [label for label in labels if label != -100])


def encode(task: CausalLM, tokenizer: Any, rows: dict[str, list[Any]], **options: Any) -> Any:
    made = task.encode(rows, tokenizer, {}, **{"evaluation": False, **options})
    assert pa.table(made.features, schema=task.arrow_schema(False)).num_rows == len(made.rows) == len(made.lengths)
    assert made.lengths == [len(ids) for ids in made.features["input_ids"]]
    assert all(length <= task.max_length for length in made.lengths)
    return made


def only(made: Any) -> tuple[list[int], list[int]]:
    assert len(made.rows) == 1, (made.dropped, made.bad)
    return made.features["input_ids"][0], made.features["labels"][0]


# The recipe's section


def test_the_text_column_is_the_default() -> None:
    assert CausalLM().text == "text"
    assert CausalLM(prompt="q", completion="a").text is None
    assert CausalLM.model_validate(CausalLM(messages="chat").model_dump()) == CausalLM(messages="chat")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "q"}, "go together"),
        ({"completion": "a"}, "go together"),
        ({"text": "t", "messages": "m"}, "text and messages exclude each other"),
        ({"text": "t", "prompt": "q", "completion": "a"}, "text and prompt exclude"),
        ({"chat_template": "{{ messages }}"}, "chat_template is for conversations"),
        ({"messages": "m", "chat_template": "nowhere.jinja"}, "neither a Jinja template nor a file"),
        ({"prompt": "Say: {{}}", "completion": "a"}, "names no column"),
        ({"prompt": "{}", "completion": "a"}, "columns' names in braces"),
        ({"prompt": "{q!r}", "completion": "a"}, "columns' names in braces"),
        ({"prompt": "{q", "completion": "a"}, "expected '}'"),
        ({"text": "t", "answer_after": "####"}, "a text has none"),
        ({"prompt": "q", "completion": "a", "answer_share": 0.5}, "answer_share is for answers that are counted"),
        ({"prompt": "q", "completion": "a", "chat": True, "tools": "t"}, "tools are for conversations"),
        ({"messages": "m", "chat": True}, "chat makes turns of prompt and completion"),
        ({"max_length": 1}, "greater than or equal to 2"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CausalLM(**fields)


def test_a_template_in_a_file_becomes_part_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(PLAIN_TEMPLATE)
    assert CausalLM(messages="m", chat_template=str(path)).chat_template == PLAIN_TEMPLATE


def test_columns_are_those_of_all_format_strings() -> None:
    task = CausalLM(prompt="{a b} and {c}\n{a b}", completion="{{{d}}}")
    assert task.columns() == ("a b", "c", "d")
    assert task.columns(labelled=False) == ("a b", "c")
    assert CausalLM(messages="m").columns(labelled=False) == ("m",)


def test_only_packed_features_have_a_capacity() -> None:
    assert CausalLM(max_length=64).packs() == 64
    assert CausalLM(pack=False).packs() is None


# Text


@pytest.mark.parametrize("around", ["", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_special_tokens_are_neither_missing_nor_doubled(around: str) -> None:
    tokenizer = trained_tokenizer(around)
    begin = "<bos>" if "<bos>" in around else ""
    for given in (SENTENCES[0], f"{begin}{SENTENCES[0]}", f"{SENTENCES[0]}<eos>", f"{begin}{SENTENCES[0]}<eos>"):
        ids, labels = only(encode(CausalLM(), tokenizer, {"text": [given]}))
        assert words(tokenizer, ids) == f"{begin}{SENTENCES[0]}<eos>"
        assert labels == ids
    rows = {"q": [SENTENCES[0]], "a": [" yes"]}
    ids, labels = only(encode(CausalLM(prompt="q", completion="a"), tokenizer, rows))
    assert words(tokenizer, ids) == f"{begin}{SENTENCES[0]} yes<eos>"
    assert learnt(tokenizer, ids, labels) == " yes<eos>"


def test_a_long_text_is_cut_so_that_every_token_is_predicted_once() -> None:
    tokenizer, task = trained_tokenizer("<bos> $A"), CausalLM(max_length=9)
    text = " ".join(SENTENCES)
    whole, _ = only(encode(CausalLM(), tokenizer, {"text": [text]}))
    made = encode(task, tokenizer, {"text": [SENTENCES[4], text]})
    windows = [ids for ids, row in zip(made.features["input_ids"], made.rows, strict=True) if row == 1]
    assert made.rows == sorted(made.rows)
    assert [token for ids in windows for token in ids[1:]] == whole[1:]
    assert all(before[-1] == after[0] for before, after in pairwise(windows))
    assert made.truncated == []


@pytest.mark.parametrize("length", range(2, 12))
def test_windows_of_every_length_end_well(length: int) -> None:
    tokenizer = trained_tokenizer()
    whole, _ = only(encode(CausalLM(), tokenizer, {"text": [SENTENCES[0]]}))
    made = encode(CausalLM(max_length=length), tokenizer, {"text": [SENTENCES[0]]})
    assert [token for ids in made.features["input_ids"] for token in ids[1:]] == whole[1:]
    assert min(made.lengths) >= 2


def test_texts_without_content_are_dropped_and_other_types_are_bad() -> None:
    made = encode(CausalLM(), trained_tokenizer("<bos> $A"), {"text": ["", " \n", "fine", None, ["a"], 7]})
    assert made.rows == [2, 5]
    assert made.dropped == dict.fromkeys((0, 1), "empty, or a single token")
    assert made.bad == {3: "`text` is null; text is needed", 4: "`text` is a list; text is needed"}


def test_evaluation_has_the_same_features_and_no_references() -> None:
    made = encode(CausalLM(max_length=8), trained_tokenizer(), {"text": SENTENCES}, evaluation=True)
    assert made.references == [None] * len(made.rows)
    assert made.features == encode(CausalLM(max_length=8), trained_tokenizer(), {"text": SENTENCES}).features


# Prompts and completions


def test_the_loss_is_taken_over_the_completion_and_its_end() -> None:
    tokenizer = trained_tokenizer("<bos> $A")
    task = CausalLM(prompt="Q: {q}\n{hint}\nA:", completion=" {a}")
    rows = {"q": SENTENCES[::2], "hint": ["x", None, 3], "a": SENTENCES[1::2]}
    made = encode(task, tokenizer, rows)
    assert made.rows == [0, 1, 2]
    for row, hint in enumerate(("x", "", "3")):
        ids, labels = made.features["input_ids"][row], made.features["labels"][row]
        prompt = f"Q: {rows['q'][row]}\n{hint}\nA:"
        assert words(tokenizer, ids) == f"<bos>{prompt} {rows['a'][row]}<eos>"
        assert learnt(tokenizer, ids, labels) == f" {rows['a'][row]}<eos>"
    ids, labels = only(
        encode(task.model_copy(update={"train_on_prompt": True}), tokenizer, {k: v[:1] for k, v in rows.items()})
    )
    assert labels == ids


def test_prompt_tokens_are_those_that_generation_will_see() -> None:
    tokenizer = trained_tokenizer("<bos> $A")
    task = CausalLM(prompt="q", completion="a")
    text = SENTENCES[1]
    rows = {"q": [text[:cut] for cut in range(1, len(text))], "a": [text[cut:] for cut in range(1, len(text))]}
    made, asked = encode(task, tokenizer, rows), encode(task, tokenizer, rows, labelled=False)
    joined = tokenizer(text)["input_ids"]
    assert sum(joined[: len(prompt)] != prompt for prompt in asked.features["input_ids"]) > 0  # a token would span both
    for row, prompt in enumerate(asked.features["input_ids"]):
        ids, labels = made.features["input_ids"][row], made.features["labels"][row]
        assert ids[: len(prompt)] == prompt
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]
        assert learnt(tokenizer, ids, labels) == rows["a"][row] + "<eos>"


def test_rows_with_nothing_to_learn_are_dropped_and_cut_ones_counted() -> None:
    tokenizer = trained_tokenizer()
    task = CausalLM(prompt="q", completion="a", max_length=12)
    rows = {"q": ["cough", "cough", SENTENCES[1], "cough"], "a": ["", " fever", " fever", SENTENCES[1]]}
    made = encode(task, tokenizer, rows)
    assert made.rows == [1, 3]
    assert made.dropped == {0: "empty completion", 2: "nothing to learn from within the first 12 tokens"}
    assert made.truncated == [3]
    assert made.lengths[1] == 12


def test_null_columns_are_bad() -> None:
    made = encode(
        CausalLM(prompt="{q} {h}", completion="a"), trained_tokenizer(), {"q": [None], "h": [None], "a": ["x"]}
    )
    assert made.bad == {0: "`q` and `h` are null; text is needed"}


def test_messages_in_prompt_and_completion_are_bad() -> None:
    rows = {"q": [CHAT[:1]], "a": [CHAT[1:2]]}
    for chat in (False, True):
        made = encode(CausalLM(prompt="q", completion="a", chat=chat), trained_tokenizer(), rows)
        says = "`q` holds messages; text is needed, or one column with the whole conversation (task.messages)"
        assert made.bad[0].removeprefix("`q`: ") == says


def test_prompts_for_prediction_keep_their_end() -> None:
    tokenizer = trained_tokenizer("<bos> $A <eos>")
    task = CausalLM(prompt="q", completion="a", max_length=6)
    made = encode(task, tokenizer, {"q": [SENTENCES[1], "cough"]}, labelled=False)
    whole = tokenizer(SENTENCES[1])["input_ids"][:-1]
    assert made.features["input_ids"][0] == whole[-6:]
    assert words(tokenizer, made.features["input_ids"][1]) == "<bos>cough"
    assert made.truncated == [0]
    assert made.features["labels"][0] == [-100] * 6
    made = encode(CausalLM(max_length=6), trained_tokenizer(), {"text": [SENTENCES[1], ""]}, labelled=False)
    assert made.rows == [0]
    assert made.dropped == {1: "a prompt without tokens"}


# Conversations


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
@pytest.mark.parametrize("around", ["", "<bos> $A <eos>"])
def test_the_loss_is_taken_over_the_assistants_turns(template: str, around: str) -> None:
    tokenizer = trained_tokenizer(around)
    tokenizer.chat_template = template
    ids, labels = only(encode(CausalLM(messages="chat"), tokenizer, {"chat": [CHAT]}))
    assert words(tokenizer, ids) == (
        f"<bos><user>{SENTENCES[0]}<eos>\n<bot>{SENTENCES[1]}<eos>\n<user>{SENTENCES[2]}<eos>\n<bot>{SENTENCES[3]}<eos>\n"
    )
    between = "\n" if template == PLAIN_TEMPLATE else ""
    assert learnt(tokenizer, ids, labels).replace("\n", between) == f"{SENTENCES[1]}<eos>{SENTENCES[3]}<eos>"
    ids, labels = only(encode(CausalLM(messages="chat", train_on_prompt=True), tokenizer, {"chat": [CHAT]}))
    assert labels == ids


@pytest.mark.parametrize("content", [" blank first", "blank last ", "  ", "émoji 🦠 ok", "<odd> [text]"])
@pytest.mark.parametrize("trim", [False, True])
def test_marked_and_plain_templates_agree_on_every_kind_of_text(content: str, trim: bool) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    chat = [CHAT[0], {"role": "assistant", "content": content}, CHAT[2], CHAT[3]]
    found = []
    for template in (PLAIN_TEMPLATE, MARKED_TEMPLATE):
        tokenizer.chat_template = template
        ids, labels = only(encode(CausalLM(messages="m"), tokenizer, {"m": [chat]}))
        found.append(labels)
        assert learnt(tokenizer, ids, labels) == f"{content}<eos>{SENTENCES[3]}<eos>"
    assert found[0] == found[1]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def test_threads_do_not_meet_in_a_template(template: str) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = template
    rows = {"m": [CHAT[: 2 + 2 * (row % 2)] for row in range(20)]}
    expected = vars(encode(CausalLM(messages="m"), tokenizer, rows))
    assert not expected["bad"]

    def again(_: int) -> dict[str, Any]:
        own = trained_tokenizer()
        own.chat_template = template
        return vars(encode(CausalLM(messages="m"), own, rows))

    with switching_often(), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(again, range(8))) == [expected] * 8


def test_conversations_may_be_json_and_hold_nulls() -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    task = CausalLM(messages="m")
    plain = only(encode(task, tokenizer, {"m": [CHAT[:2]]}))
    as_json = '[{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]' % tuple(SENTENCES[:2])  # noqa: UP031
    assert only(encode(task, tokenizer, {"m": [as_json]})) == plain
    assert only(encode(task, tokenizer, {"m": [[{**m, "name": None} for m in CHAT[:2]]]})) == plain
    assert only(encode(task, tokenizer, {"m": [np.array(CHAT[:2], dtype=object)]})) == plain


def test_a_tool_call_from_arrow_teaches_no_arguments_of_other_tools() -> None:
    tokenizer, task = trained_tokenizer(), CausalLM(messages="m")
    tokenizer.chat_template = PLAIN_TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    )
    given: list[Any] = [{"city": "Paris", "days": [1, None]}, {"sum": {"left": 1}}, {"sum": {"right": 2}}, {}]
    calls = [[{"type": "function", "function": {"name": "look", "arguments": arguments}}] for arguments in given]
    chats = [[CHAT[0], {"role": "assistant", "content": "x", "tool_calls": call}] for call in calls]
    plain = encode(task, tokenizer, {"m": chats})
    arrow = pa.array(chats).to_pylist()
    assert vars(encode(task, tokenizer, {"m": arrow})) == vars(plain)
    assert vars(encode(task, tokenizer, {"m": [json.dumps(chat) for chat in arrow]})) == vars(plain)
    pairs = zip(plain.features["input_ids"], plain.features["labels"], strict=True)
    learned = [learnt(tokenizer, ids, labels) for ids, labels in pairs]
    assert learned == [f"x{json.dumps(call)}<eos>" for call in calls]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def test_a_rows_tools_are_shown_as_inference_shows_them(template: str) -> None:
    tokenizer, task = trained_tokenizer(), CausalLM(messages="m", tools="t")
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + template
    assert task.columns() == task.columns(labelled=False) == ("m", "t")
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}},
    }
    other = {
        "type": "function",
        "function": {"name": "add", "parameters": {"properties": {"left": {"type": "number"}}}},
    }
    given: list[Any] = [[tool], json.dumps([other, tool]), [other], None, "", []]
    rows = {"m": [CHAT] * 6, "t": given}
    told = [[tool], [other, tool], [other], None, None, None]
    shown = [tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False) for tools in told]
    made, asked = encode(task, tokenizer, rows), encode(task, tokenizer, rows, labelled=False)
    assert [words(tokenizer, ids) for ids in made.features["input_ids"]] == shown
    prompts = [tokenizer.apply_chat_template(CHAT[:3], tools=tools, tokenize=False) + "<bot>" for tools in told]
    assert [words(tokenizer, ids) for ids in asked.features["input_ids"]] == prompts
    for ids, labels in zip(made.features["input_ids"], made.features["labels"], strict=True):
        assert learnt(tokenizer, ids, labels).replace("\n", "") == f"{SENTENCES[1]}<eos>{SENTENCES[3]}<eos>"
    arrow = pa.array([[tool], [other]]).to_pylist()  # each with the other's properties, null
    assert arrow != [[tool], [other]]
    mixed = encode(task, tokenizer, {"m": [CHAT] * 2, "t": arrow})
    assert mixed.features["input_ids"] == [made.features["input_ids"][row] for row in (0, 2)]
    bad = encode(task, tokenizer, {"m": [CHAT] * 3, "t": ["look", ["look"], tool]}).bad
    assert bad[0].startswith("`t`: the text is not JSON")
    assert bad[1] == "`t`: ['look'] is no list of tools; their definitions are needed"
    assert bad[2].endswith("is no list of tools; their definitions are needed")


def test_conversations_may_have_the_form_of_sharegpt() -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    speakers = {"user": "human", "assistant": "gpt"}
    told = [{"from": speakers[turn["role"]], "value": turn["content"], "weight": None} for turn in CHAT]
    plain = only(encode(CausalLM(messages="m"), tokenizer, {"m": [CHAT]}))
    assert only(encode(CausalLM(messages="m"), tokenizer, {"m": [told]})) == plain
    loud = [{**turn, "from": turn["from"].capitalize()} for turn in told]
    assert only(encode(CausalLM(messages="m"), tokenizer, {"m": [loud]})) == plain
    loud = [{**turn, "role": turn["role"].capitalize()} for turn in CHAT]
    assert only(encode(CausalLM(messages="m"), tokenizer, {"m": [loud]})) == plain


# What templates of today do with content: some ask whether it is text, some write tool calls, some strip it.
TESTING_TEMPLATE = PLAIN_TEMPLATE.replace("{{ m.content }}", "{% if m.content is string %}{{ m.content }}{% endif %}")
CALLING_TEMPLATE = PLAIN_TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
TRIMMING_TEMPLATE = MARKED_TEMPLATE.replace("m.content }}<eos>{% end", "m.content | trim }}<eos>{% end")
# Those that know nothing of tools join content to other text; some look whether there is any.
JOINING_TEMPLATE = PLAIN_TEMPLATE.replace("{{ m.content }}<eos>", "{{ m.content + '<eos>' }}")
MARKED_JOINING_TEMPLATE = MARKED_TEMPLATE.replace("{{ m.content }}<eos>", "{{ m.content + '<eos>' }}")
LOOKING_TEMPLATE = CALLING_TEMPLATE.replace(
    "{{ m.content }}", "{% if m.content is defined %}[{{ m.content }}]{% endif %}"
)
CALLS = [{"type": "function", "function": {"name": "look", "arguments": {}}}]


@pytest.mark.parametrize(
    "template", [PLAIN_TEMPLATE, MARKED_TEMPLATE, TESTING_TEMPLATE], ids=["plain", "marked", "asks"]
)
def test_content_in_parts_is_learned_as_its_text(template: str) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = template
    task = CausalLM(messages="m")
    parts = [
        {
            **turn,
            "content": [{"type": "text", "text": turn["content"][:5]}, {"type": "text", "text": turn["content"][5:]}],
        }
        for turn in CHAT
    ]
    plain = only(encode(task, tokenizer, {"m": [CHAT]}))
    assert only(encode(task, tokenizer, {"m": [parts]})) == plain
    assert only(encode(task, tokenizer, {"m": [json.dumps(parts)]})) == plain
    assert only(encode(task, tokenizer, {"m": [[{**turn, "content": [turn["content"]]} for turn in CHAT]]})) == plain
    asked = [encode(task, tokenizer, {"m": [chat]}, labelled=False).features for chat in (CHAT, parts)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("template", "turn", "learned"),
    [
        (PLAIN_TEMPLATE, {"content": ""}, ""),
        (MARKED_TEMPLATE, {"content": ""}, ""),
        (PLAIN_TEMPLATE, {"content": []}, ""),
        (TRIMMING_TEMPLATE, {"content": " \n"}, ""),
        (PLAIN_TEMPLATE, {"tool_calls": CALLS}, ""),
        (MARKED_TEMPLATE, {"tool_calls": CALLS, "content": ""}, ""),
        (CALLING_TEMPLATE, {"tool_calls": CALLS}, f"{CALLS}<eos>"),
        (JOINING_TEMPLATE, {"tool_calls": CALLS, "content": None}, ""),
        (JOINING_TEMPLATE, {"tool_calls": CALLS}, ""),
        (MARKED_JOINING_TEMPLATE, {"tool_calls": CALLS}, ""),
    ],
)
@pytest.mark.parametrize("place", [1, 3])
def test_a_turn_of_which_the_template_writes_nothing_does_not_teach_to_end_at_once(
    template: str, turn: dict[str, Any], learned: str, place: int
) -> None:
    tokenizer, task = trained_tokenizer(), CausalLM(messages="m")
    tokenizer.chat_template = template
    quiet = {"role": "assistant", **turn}
    chat = [quiet if number == place else other for number, other in enumerate(CHAT)]
    made = encode(task, tokenizer, {"m": [chat, [CHAT[0], quiet]]})
    said = [f"{SENTENCES[1]}<eos>", f"{SENTENCES[3]}<eos>"]
    said[place // 2] = learned
    if made.rows != [0]:  # the one that calls
        assert (made.rows, learned) == ([0, 1], f"{CALLS}<eos>")
        assert learnt(tokenizer, made.features["input_ids"][1], made.features["labels"][1]) == learned
    else:
        assert made.dropped == {1: "no words in the assistant's turns, as the chat template writes them"}
    assert learnt(tokenizer, made.features["input_ids"][0], made.features["labels"][0]) == "".join(said)


def test_a_template_that_looks_whether_there_is_content_finds_none_in_a_tool_call() -> None:
    tokenizer, task = trained_tokenizer(), CausalLM(messages="m")
    tokenizer.chat_template = LOOKING_TEMPLATE
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    assert learnt(tokenizer, *only(encode(task, tokenizer, {"m": [[CHAT[0], call]]}))) == f"{CALLS}<eos>"


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def test_turns_of_weight_0_are_read_and_not_learned(template: str) -> None:
    tokenizer, task = trained_tokenizer(), CausalLM(messages="m")
    tokenizer.chat_template = template
    plain, _ = only(encode(task, tokenizer, {"m": [CHAT]}))
    for weights, places in (([0, 0, 0, 1], [3]), ([None, 1.0, 0, 0.0], [1]), ([1, None, None, None], [1, 3])):
        chat = [{**turn, "weight": weight} for turn, weight in zip(CHAT, weights, strict=True)]
        ids, labels = only(encode(task, tokenizer, {"m": [chat]}))
        assert ids == plain
        assert learnt(tokenizer, ids, labels) == "".join(f"{SENTENCES[place]}<eos>" for place in places)
    opening = [{**CHAT[1], "weight": 0}, *CHAT[2:]]
    assert learnt(tokenizer, *only(encode(task, tokenizer, {"m": [opening]}))) == f"{SENTENCES[3]}<eos>"
    unheard = [{**turn, "weight": 0} for turn in CHAT]
    assert encode(task, tokenizer, {"m": [unheard]}).dropped == {0: "weight 0 for every turn of the assistant's"}
    made = encode(CausalLM(messages="m", train_on_prompt=True), tokenizer, {"m": [unheard, CHAT]})
    assert made.bad == {0: "`m`: a turn has `weight` 0, but task.train_on_prompt learns all; leave one of them out"}


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def test_conversations_without_an_assistant_say_in_few_words_who_speaks(template: str) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = template
    chats = [[{"role": role, "content": "x"} for role in roles] for roles in ("bh", "hbh", "u", "abcd", "efgh")]
    chats[2] = [CHAT[0], {"role": "System", "content": "x"}]
    made = encode(CausalLM(messages="m"), tokenizer, {"m": chats})
    named, many = "no assistant turn; roles are b, h", "no assistant turn; many other roles"
    assert made.dropped == {0: named, 1: named, 2: "no assistant turn", 3: many, 4: many}


def test_a_template_that_forgets_past_reasoning_gives_a_sample_per_turn() -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{{ 'think ' if loop.last }}{{ m.content }}<eos>"
        "{% else %}<user>{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    made = encode(CausalLM(messages="m"), tokenizer, {"m": [CHAT[:2], CHAT]})
    assert made.rows == [0, 1, 1]
    texts = [words(tokenizer, ids) for ids in made.features["input_ids"]]
    assert texts[1] == f"<user>{SENTENCES[0]}<eos><bot>think {SENTENCES[1]}<eos>"
    assert (
        texts[2]
        == f"<user>{SENTENCES[0]}<eos><bot>{SENTENCES[1]}<eos><user>{SENTENCES[2]}<eos><bot>think {SENTENCES[3]}<eos>"
    )
    assert learnt(tokenizer, made.features["input_ids"][2], made.features["labels"][2]) == f"think {SENTENCES[3]}<eos>"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "`m`: a NoneType is no conversation"),
        ([], "`m`: an empty list is no conversation"),
        ("{broken", "`m`: the text is not JSON"),
        (r'[{"role": "user", "content": "\ud83d"}]', r"`m`: the JSON holds \ud83d, which is half a character"),
        ('{"role": "user"}', "`m`: a dict is no conversation"),
        (
            [{"from": "narrator", "value": "x"}],
            "`m`: message 1 is from 'narrator'; human, gpt, user, assistant, system, tool fit, or `role` and `content`",
        ),
        ([{"from": "human"}], "`m`: message 1 needs `role` and `content`; its fields are `from`"),
        ([CHAT[0], {"role": "assistant"}], "`m`: message 2 needs `role` and `content`"),
        ([CHAT[0], "text"], "`m`: message 2 needs `role` and `content`; its fields are none"),
        ([CHAT[1]], "`m`: it begins with the assistant"),
        (
            [CHAT[0], {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "`m`: message 2 holds a part of type image_url; causal-lm reads text",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "`m`: message 1 holds a part of type text;"),
        ([{"role": "user", "content": [3]}], "`m`: message 1 holds a part of type int; causal-lm reads text"),
        ([CHAT[0], {**CHAT[1], "weight": 0.5}], "`m`: message 2 has `weight` 0.5; 0 (not learned) and 1 fit"),
        ([{"role": "user", "content": 5}], "`m`: message 1 has `content` of type int; causal-lm reads text"),
        ([{"from": "gpt", "value": {"a": 1}}], "`m`: message 1 has `content` of type dict; causal-lm reads text"),
        ([CHAT[0], {"role": "critic", "content": "x"}], "`m`: the chat template refuses it: who is critic?"),
    ],
)
def test_conversations_that_break_the_contract_are_bad(value: Any, says: str) -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE + (
        "{% for m in messages if m.role == 'critic' %}{{ raise_exception('who is critic?') }}{% endfor %}"
    )
    made = encode(CausalLM(messages="m"), tokenizer, {"m": [value, CHAT]})
    assert made.bad[0].startswith(says)
    assert made.rows == [1]


def test_a_turn_that_does_not_continue_its_prompt_is_bad() -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE.replace("%}<bot>{%", "%}<bot>think{%")
    made = encode(CausalLM(messages="m"), tokenizer, {"m": [CHAT]})
    assert "message 2 does not continue the chat template's prompt" in made.bad[0]
    assert "{% generation %}" in made.bad[0]


def test_conversations_with_nothing_to_learn_are_dropped() -> None:
    tokenizer = trained_tokenizer()
    for template in (PLAIN_TEMPLATE, MARKED_TEMPLATE):
        tokenizer.chat_template = template
        made = encode(CausalLM(messages="m", max_length=10), tokenizer, {"m": [CHAT[:1], CHAT]})
        assert made.dropped == {0: "no assistant turn", 1: "nothing to learn from within the first 10 tokens"}
        assert made.truncated == []


def test_a_conversation_is_continued_from_the_assistants_last_turn() -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = PLAIN_TEMPLATE
    task = CausalLM(messages="m")
    made = encode(task, tokenizer, {"m": [CHAT, CHAT[:3], CHAT[1:2]]}, labelled=False)
    assert made.features["input_ids"][0] == made.features["input_ids"][1]
    assert words(tokenizer, made.features["input_ids"][0]).endswith(f"<user>{SENTENCES[2]}<eos>\n<bot>")
    assert made.bad == {2: "`m`: there is no turn to answer"}


def test_a_chat_of_prompt_and_completion_is_that_conversation() -> None:
    rows = {"q": [SENTENCES[0], SENTENCES[2], "cough", None], "a": [SENTENCES[1], SENTENCES[3], " ", "x"]}
    for template in (PLAIN_TEMPLATE, MARKED_TEMPLATE):
        tokenizer = trained_tokenizer()
        tokenizer.chat_template = template
        for fields in ({}, {"train_on_prompt": True}):
            made = encode(CausalLM(prompt="q", completion="a", chat=True, **fields), tokenizer, rows)
            turns = encode(CausalLM(messages="m", **fields), tokenizer, {"m": [CHAT[:2], CHAT[2:]]})
            assert made.features == turns.features
            assert made.dropped == {2: "empty completion"}
            assert made.bad == {3: "`q` is null; text is needed"}
        asked = encode(CausalLM(prompt="q", completion="a", chat=True), tokenizer, {"q": rows["q"][:1]}, labelled=False)
        assert words(tokenizer, asked.features["input_ids"][0]) == f"<bos><user>{SENTENCES[0]}<eos>\n<bot>"


# Answers that are right or wrong


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 1,080.0", "1080"),
        ("#### 0.50\nand more", "0.5"),
        ("#### - 5 .", "-5"),
        ("####-0", "0"),
        ("#### 3 #### 4", "4"),
        ("#### 1e3", "1000"),
        ("#### ten o'clock", "teno'clock"),
        ("#### NaN", "NaN"),
        ("#### 7e1234567", "7e1234567"),
        ("#### -0.70E+999999999", "-7e999999998"),
        ("#### 0e99999999", "0"),
        (f"#### {10**40 + 1}.50", f"{10**40 + 1}.5"),
        ("####", ""),
        ("42", None),
    ],
)
def test_an_answer_stands_behind_the_last_mark(text: str, found: str | None) -> None:
    assert answer(text, "####") == found


def test_the_rows_that_are_asked_are_a_share_of_them_and_always_the_same() -> None:
    rows = {"q": [f"question {number}" for number in range(4000)], "a": ["x"] * 4000}
    few, half = ([row for row in range(4000) if chosen(rows, row, ("q", "a"), share)] for share in (0.1, 0.5))
    assert len(few) == pytest.approx(400, abs=60)
    assert set(few) < set(half)
    turned = {name: values[::-1] for name, values in rows.items()}
    assert few == sorted(3999 - row for row in range(4000) if chosen(turned, row, ("q", "a"), 0.1))


def test_evaluation_asks_with_the_prompts_that_a_user_would_give() -> None:
    tokenizer = trained_tokenizer("<bos> $A")
    task = CausalLM(prompt="Q: {q}", completion=" {a}", answer_after="=", max_length=24)
    rows = {"q": ["cough", "fever", SENTENCES[1]], "a": ["so = 1,000", "none", "= 7"]}
    made = task.encode(rows, tokenizer, {}, evaluation=True)
    assert made.rows == [0]
    assert made.references == ["1000"]
    assert made.bad == {1: "`q` and `a` has no '=', behind which its answer would stand (task.answer_after)"}
    asked = task.encode({"q": ["cough"]}, tokenizer, {}, evaluation=True, labelled=False)
    assert made.features["prompt_ids"] == asked.features["input_ids"]
    assert asked.features["prompt_ids"] == [[]]
    places, prompts = task.asked(made.features)
    assert (places, prompts["input_ids"]) == ([0], asked.features["input_ids"])
    assert task.encode(rows, tokenizer, {}, evaluation=False).rows == [0, 1]
    none = task.model_copy(update={"answer_share": 1e-9}).encode(rows, tokenizer, {}, evaluation=True)
    assert (none.references, none.features["prompt_ids"]) == ([None], [[]])


def test_the_last_turn_of_a_conversation_is_the_one_that_is_asked() -> None:
    tokenizer = trained_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<bot>{{ 'think ' if loop.last }}{{ m.content }}<eos>"
        "{% else %}<user>{{ m.content }}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    made = CausalLM(messages="m", answer_after="is").encode({"m": [CHAT]}, tokenizer, {}, evaluation=True)
    assert made.rows == [0, 0]
    assert made.references == ["examined", "examined"]
    assert made.features["prompt_ids"][0] == []
    assert words(tokenizer, made.features["prompt_ids"][1]).endswith(f"<user>{SENTENCES[2]}<eos><bot>")


def test_exact_match_counts_the_asked_alone() -> None:
    task = CausalLM(prompt="q", completion="a", answer_after="####", answer_share=0.5)
    seen = {"nll": 2.0, "tokens": 2, "correct": 1}
    texts = ["#### 4", "#### 4.0", "4", None]
    given = [seen if text is None else {**seen, "text": text} for text in texts]
    scores = task.score([task.combine([one]) for one in given], ["4", "4", "4", None])
    assert scores == {"perplexity": math.e, "token_accuracy": 0.5, "exact_match": 2 / 3, "asked": 3.0}
    with pytest.raises(DataError, match=r"answer_share is 0.5, which chose none of the 1 rows"):
        task.score([seen], [None])


# The model


def test_models_that_do_not_fit_are_refused(folder: Callable[..., str], tmp_path: Path) -> None:
    source = Pretrained(folder("llama"))
    with pytest.raises(ModelError, match=r"task.max_length is 129, but .* has only 128 positions"):
        CausalLM(max_length=129).processor(source)
    with pytest.raises(ModelError, match=r"has no chat template; give one as task.chat_template"):
        CausalLM(messages="m", max_length=64).processor(source)
    AutoConfig.for_model("bert").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(bert\) reads both ways"):
        CausalLM(max_length=64).processor(replace(source, path=str(tmp_path)))
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"\(t5\) has no head that tells the next token; .* such as GPT-2 or Llama"):
        CausalLM(max_length=64).processor(replace(source, path=str(tmp_path)))
    task = CausalLM(max_length=64)
    tokenizer = task.processor(source)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"tokenizer of .* has 321 tokens, but the model only 320"):
        task.load(source, {}, tokenizer)


HALVES = {f"{half}_{name}": 2 for half in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")}
BART = {"d_model": 32, **HALVES}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 2}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}


@pytest.mark.parametrize(
    ("kind", "fields", "both"),
    [
        *((kind, fields, False) for kind, fields in KINDS.items()),
        *((kind, {}, True) for kind in ("bert", "roberta", "electra", "bert-generation")),
        *((kind, {"is_decoder": True}, False) for kind in ("bert", "roberta", "electra", "bert-generation")),
        *((kind, BART, False) for kind in ("bart", "mbart", "mvp", "pegasus")),
        ("xlnet", XLNET, True),
        ("xlnet", {**XLNET, "attn_type": "uni"}, False),
        ("xlm", XLM, True),
        ("xlm", {**XLM, "causal": True}, False),
        ("cpmant", {"dim_head": 8, "dim_ff": 48}, True),
    ],
)
def test_models_that_see_what_they_are_to_predict_are_known_by_their_config(
    kind: str, fields: dict[str, Any], both: bool
) -> None:
    sizes = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 320}
    known = vars(AutoConfig.for_model(kind))
    config = AutoConfig.for_model(kind, **{name: size for name, size in sizes.items() if name in known} | fields)
    assert reads_both_ways(config) == both
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(10.0 if parameter.ndim > 1 else 1.0)
        ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
        one, other = network(input_ids=ids).logits[:, :-1]
    assert torch.allclose(one, other, rtol=0, atol=1e-5) != both


@pytest.mark.parametrize("kind", KINDS)
def test_packing_is_refused_for_models_whose_sequences_would_see_each_other(kind: str) -> None:
    network = tiny(kind)
    ids = torch.randint(5, 300, (2, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], [*range(9), 0, 1, 2]])
    changed = ids.clone()
    changed[0, :6] += 1
    try:
        with torch.no_grad():
            one, other = (network(input_ids=i, position_ids=positions, use_cache=False).logits for i in (ids, changed))
        apart = torch.equal(one[0, 6:], other[0, 6:])
    except TypeError:
        apart = False
    assert keeps_apart(network) == apart == (kind in ("llama", "gpt2", "mistral", "gemma2"))


def test_a_model_that_mixes_packed_sequences_is_loaded_only_without_packing(folder: Callable[..., str]) -> None:
    source = Pretrained(folder("opt"))
    for meta in (False, True):
        task = CausalLM(max_length=64)
        with pytest.raises(ModelError, match=r"\(opt\) can't keep packed sequences apart; set task.pack=false"):
            task.load(replace(source, meta=meta), {}, task.processor(source))
    unpacked = CausalLM(max_length=64, pack=False)
    assert unpacked.load(source, {}, unpacked.processor(source)).config.model_type == "opt"


# Packing


@pytest.mark.parametrize(
    ("kind", "fields", "can"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("mistral", {"sliding_window": 7}, True),
        ("mistral", {"sliding_window": 6}, True),  # which cuts the longest sequence: by the mask then
        ("gemma2", {}, False),  # caps what comes out, and so has an attention of its own
    ],
)
def test_attention_of_packed_sequences_is_computed_for_each_where_the_layers_ask_for_nothing_more(
    kind: str, fields: dict[str, Any], can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny(kind, "sdpa" if can else "eager", **fields)
    before = network.config.to_dict()
    assert attend_each(network) is can
    assert network.config.to_dict() == before  # an exported model knows nothing of it
    seen: list[tuple[int, bool]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *more: Any, attn_mask: Any = None, **named: Any) -> torch.Tensor:
        seen.append((query.shape[2], attn_mask is not None))
        return plain(query, *more, attn_mask=attn_mask, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [*range(7), 0]])
    if can:
        network(input_ids=torch.ones_like(positions), position_ids=positions, use_cache=False)
        each = [(8, True)] if fields.get("sliding_window") == 6 else [(size, False) for size in (5, 3, 7, 1)]
        assert seen == each * network.config.num_hidden_layers


@pytest.mark.parametrize(
    ("sees", "lengths"),
    [
        (lambda token, other: token >= other, [8, 8]),
        (lambda token, other: (token >= other) & (token // 5 == other // 5), [5, 3, 5, 3]),  # packed, or in chunks
        (lambda token, other: (token >= other) & (token - other < 8), [8, 8]),  # a window that cuts nothing
        (lambda token, other: (token >= other) & (token - other < 7), None),
        (lambda token, other: (token >= other) | ((token // 2 == 1) & (other // 2 == 1)), None),  # an image within
        (lambda token, other: token >= 0 * other, None),  # both ways
    ],
)
def test_lengths_say_all_of_a_mask_or_there_are_none(sees: Callable[..., torch.Tensor], lengths: list[int]) -> None:
    found = each._lengths(lambda row, head, token, other: sees(token + 0 * row, other), 2, 8)
    assert (None if found is None else found.tolist()) == lengths


def test_a_process_that_got_its_network_from_another_knows_the_attention(tmp_path: Path) -> None:
    """As trials do, which unpack what the sweep's driver has loaded."""
    network, tokenizer, task = tiny("llama", "sdpa"), trained_tokenizer(pad_token="<pad>"), CausalLM(max_length=40)
    assert attend_each(network)
    packed = packed_table(rows_of_tokens(5), [[0, 1, 2], [3, 4]])
    batch = task.collate({name: packed.column(name).to_pylist() for name in packed.column_names}, tokenizer, {})
    with torch.no_grad():
        logits = task.forward(network, batch)
    (tmp_path / "given").write_bytes(pickle.dumps((warm.packed(network), task.model_dump(), batch, logits)))
    there = (
        "import pickle, sys, torch; from rayft.sweeps import warm; from rayft.tasks.causal_lm import CausalLM\n"
        "given, fields, batch, logits = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert torch.equal(CausalLM(**fields).forward(warm.unpacked(given).eval(), batch), logits)"
    )
    subprocess.run([sys.executable, "-c", there, str(tmp_path / "given")], check=True)


@pytest.mark.parametrize(("device", "attention"), [("cpu", each.NAME), ("meta", "sdpa")])
def test_only_processors_attend_to_each_packed_sequence_by_itself(
    device: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, as on a GPU, it would break the graphs of a compiled model in two at each layer."""
    network, task = tiny("llama", "sdpa"), CausalLM(max_length=40)
    assert attend_each(network)
    seen = []
    monkeypatch.setattr(causal_lm, "logits_of", lambda model, *_, **__: seen.append(model.config._attn_implementation))
    ids = torch.ones(1, 4, dtype=torch.int64, device=device)
    task.forward(network, {"input_ids": ids, "position_ids": ids, "targets": ids})
    assert seen == [attention]


def rows_of_tokens(count: int) -> pa.Table:
    """Sequences of 2 to 23 tokens, some of whose first labels are masked, as prepared rows."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(5, 320, size=size).tolist() for size in rng.integers(2, 24, size=count)]
    labels = [[-100] * (len(row) // 3) + row[len(row) // 3 :] for row in ids]
    kind = pa.list_(pa.int32())
    lengths = pa.array([len(row) for row in ids], type=pa.int32())
    return pa.table({"input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind), "length": lengths})


def measured(
    task: CausalLM, network: Any, table: pa.Table, tokenizer: Any
) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    batch = task.collate({name: table.column(name).to_pylist() for name in table.column_names}, tokenizer, {})
    network.zero_grad()
    loss = task.loss(task.forward(network, batch), batch)
    loss.backward()
    return loss.detach(), task.items(batch), {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_stand_in", "each"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_packed_and_single_sequences_have_the_same_loss_and_gradients(kind: str, attention: str) -> None:
    # A stand-in for flash attention, which needs a GPU: rows have to reach it as a single one, and keep apart even so.
    shapes: list[int] = []

    def stand_in(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(query.shape[0])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("flash_stand_in", stand_in)
    AttentionMaskInterface.register("flash_stand_in", sdpa_mask)
    network, tokenizer, task = tiny(kind), trained_tokenizer(pad_token="<pad>"), CausalLM(max_length=40)
    network.config._attn_implementation = "sdpa" if attention == "each" else attention
    assert attention != "each" or attend_each(network)
    singles = rows_of_tokens(11)
    # Three rows of several sequences each, of 38, 20 and about 70 tokens: two of them are padded.
    lengths = singles.column("length").to_pylist()
    bins = [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10]]
    packed = packed_table(singles, bins)
    assert len({sum(lengths[i] for i in members) for members in bins}) == 3
    loss, items, gradients = measured(task, network, packed, tokenizer)
    parts = [measured(task, network, singles.slice(row, 1), tokenizer) for row in range(singles.num_rows)]
    assert items == sum(part[1] for part in parts)
    torch.testing.assert_close(loss, torch.stack([part[0] for part in parts]).sum(), rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        whole = torch.stack([part[2][name] for part in parts]).sum(dim=0)
        assert (gradient - whole).abs().max() <= 1e-5 * max(1.0, whole.abs().max().item()), name
    assert set(shapes) == ({1} if attention == "flash_stand_in" else set())


def test_bins_of_the_capacity_are_what_a_batch_holds() -> None:
    network, tokenizer, task = tiny("llama", "sdpa"), trained_tokenizer(pad_token="<pad>"), CausalLM(max_length=40)
    singles = rows_of_tokens(40)
    capacity = task.packs()
    assert capacity == 40
    packed = packed_table(singles, pack(singles.column("length").to_pylist(), capacity))
    assert packed.num_rows < 16
    together = measured(task, network, singles, tokenizer)
    loss, items, gradients = measured(task, network, packed, tokenizer)
    assert items == together[1]
    torch.testing.assert_close(loss, together[0], rtol=1e-5, atol=0)
    worst = max((gradients[name] - other).abs().max() / other.abs().max() for name, other in together[2].items())
    assert worst < 1e-5


def test_no_sequence_predicts_the_first_token_of_the_next() -> None:
    features = {
        "input_ids": [[5, 6, 7, 8, 9, 10], [11, 12]],
        "labels": [[5, 6, 7, 8, 9, 10], [11, 12]],
        "sequence_lengths": [[3, 1, 2], [2]],
    }
    batch = CausalLM().collate(features, trained_tokenizer(pad_token="<pad>"), {})
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [11, 12, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[6, 7, -100, -100, 10, -100], [12, -100, -100, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert batch.keys() == {"input_ids", "targets", "position_ids"}
    assert CausalLM().items(batch) == 4


# Loss and scores


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_in_chunks_is_the_loss_at_once(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (21,))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(21, 50).to(dtype).requires_grad_()
        whole = likelihood.summed_loss(logits, targets, smoothing)
        (expected,) = torch.autograd.grad(whole, logits)
        monkeypatch.setattr(likelihood, "CHUNK", 200)
        parts = likelihood.summed_loss(logits, targets, smoothing)
        (gradient,) = torch.autograd.grad(parts, logits)
        monkeypatch.undo()
        assert parts.dtype == torch.float32
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(gradient, expected)
        found.append(whole)
    reference = torch.nn.functional.cross_entropy(
        torch.randn(1, 50), torch.tensor([3]), reduction="sum", label_smoothing=smoothing
    )
    assert reference.shape == found[0].shape == ()


def test_no_logits_are_computed_for_what_predicts_nothing(folder: Callable[..., str]) -> None:
    source, task = Pretrained(folder("llama")), CausalLM(max_length=16, prompt="{text}", completion="{text}")
    tokenizer = task.processor(source)
    network = task.load(source, {}, tokenizer).eval()
    made = encode(task, tokenizer, {"text": SENTENCES[:3]})
    batch = task.collate(made.features, tokenizer, {})
    seen: list[tuple[int, ...]] = []
    network.lm_head.register_forward_hook(lambda module, given, logits: seen.append(tuple(logits.shape)))
    logits = task.forward(network, batch)
    assert seen == [tuple(logits.shape)] == [(task.items(batch), network.config.vocab_size)]
    assert task.items(batch) < batch["input_ids"].numel()
    whole = network(**{name: value for name, value in batch.items() if name != "targets"}, use_cache=False).logits
    torch.testing.assert_close(logits, whole[batch["targets"] != -100])
    network.get_output_embeddings = lambda: None  # a model that does not say where its logits come from
    torch.testing.assert_close(task.forward(network, batch), logits)


def test_a_batch_without_targets_costs_nothing() -> None:
    logits = torch.randn(0, 9, requires_grad=True)
    loss = likelihood.summed_loss(logits, torch.zeros(0, dtype=torch.long), 0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


def test_windows_of_a_text_are_scored_together(folder: Callable[..., str]) -> None:
    source, task = Pretrained(folder("llama")), CausalLM(max_length=8)
    tokenizer = task.processor(source)
    network = task.load(source, {}, tokenizer).eval()
    made = encode(task, tokenizer, {"text": SENTENCES}, evaluation=True)
    batch = task.collate(made.features, tokenizer, {})
    with torch.no_grad():
        outputs = task.forward(network, batch)
        loss = task.loss(outputs, batch).item()
    parts = task.predict(outputs, batch, made.features, tokenizer, {})
    rows = [
        task.combine([p for p, r in zip(parts, made.rows, strict=True) if r == row]) for row in range(len(SENTENCES))
    ]
    scores = task.score(rows, [None] * len(rows))
    assert sum(row["tokens"] for row in rows) == task.items(batch)
    assert sum(row["nll"] for row in rows) == pytest.approx(loss, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(loss / task.items(batch)), rel=1e-5)
    guessed = outputs.argmax(dim=-1) == batch["targets"][batch["targets"] != -100]
    assert scores["token_accuracy"] == guessed.sum().item() / task.items(batch)
    assert next(iter(scores)) == task.first_metric
    assert task.first_metric in task.lower_is_better


def test_an_adapted_model_has_the_same_passes(folder: Callable[..., str]) -> None:
    source, task = Pretrained(folder("llama", template=PLAIN_TEMPLATE)), CausalLM(max_length=32, max_new_tokens=4)
    tokenizer = task.processor(source)
    network = task.load(source, {}, tokenizer).eval()
    made = encode(task, tokenizer, {"text": SENTENCES[:2]})
    batch = task.collate(made.features, tokenizer, {})
    rest = (batch, made.features, tokenizer, {})
    with torch.no_grad():
        plain = task.loss(task.forward(network, batch), batch)
    written = task.generate(network, *rest)
    adapted = get_peft_model(network, LoraConfig(r=2, target_modules="all-linear"))
    loss = task.loss(task.forward(adapted, batch), batch)
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora" in n)
    assert task.generate(adapted.eval(), *rest) == written


# Prediction and the exported folder


def test_prompts_of_different_lengths_are_continued_as_if_alone(folder: Callable[..., str]) -> None:
    for kind in ("llama", "gpt2"):
        source = Pretrained(folder(kind))
        task = CausalLM(prompt="q", completion="a", max_length=64, max_new_tokens=6)
        tokenizer = task.processor(source)
        network = task.load(source, {}, tokenizer).eval()
        made = encode(task, tokenizer, {"q": SENTENCES}, labelled=False)

        def written(
            features: dict[str, Any], task: Any = task, network: Any = network, tokenizer: Any = tokenizer
        ) -> Any:
            return task.generate(network, task.collate(features, tokenizer, {}), features, tokenizer, {})

        together = written(made.features)
        alone = [written({k: v[i : i + 1] for k, v in made.features.items()})[0] for i in range(len(SENTENCES))]
        assert together == alone
        with torch.no_grad():
            ids = torch.tensor(made.features["input_ids"][:1])
            for _ in range(6):
                step = network(ids).logits[0, -1].argmax()
                ids = torch.cat([ids, step[None, None]], dim=1)
                if step == tokenizer.eos_token_id:
                    break
        expected = tokenizer.decode(ids[0, len(made.features["input_ids"][0]) :], skip_special_tokens=True)
        assert alone[0] == {"text": expected}
        assert task.combine(together[:1]) == together[0]


def test_the_models_own_settings_do_not_make_it_write_less_likely_tokens(folder: Callable[..., str]) -> None:
    source = Pretrained(folder("llama"))
    task = CausalLM(prompt="q", completion="a", max_length=64, max_new_tokens=12)
    tokenizer = task.processor(source)
    network: Any = task.load(source, {}, tokenizer).eval()
    made = encode(task, tokenizer, {"q": SENTENCES}, labelled=False)
    batch = task.collate(made.features, tokenizer, {})
    plain = task.generate(network, batch, made.features, tokenizer, {})
    own = network.generation_config
    own.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=12, do_sample=True, temperature=9.0)
    own.bad_words_ids = [[tokenizer(row["text"])["input_ids"][-1]] for row in plain if row["text"]]
    for asked in (network, get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"]))):
        assert task.generate(asked, batch, made.features, tokenizer, {}) == plain
    assert network.generation_config is own


def test_a_prompt_that_fills_the_positions_makes_room_for_the_answer(folder: Callable[..., str]) -> None:
    source = Pretrained(folder("gpt2"))
    task = CausalLM(max_length=128, max_new_tokens=20)
    tokenizer = task.processor(source)
    network = task.load(source, {}, tokenizer).eval()
    made = encode(task, tokenizer, {"text": [" ".join(SENTENCES * 4)]}, labelled=False)
    assert made.lengths == [128]
    batch = task.collate(made.features, tokenizer, {})
    (found,) = task.generate(network, batch, made.features, tokenizer, {})
    assert isinstance(found["text"], str)


def test_the_exported_folder_has_the_template_the_padding_and_the_end(
    folder: Callable[..., str], tmp_path: Path
) -> None:
    source = Pretrained(folder("llama"))
    task = CausalLM(messages="m", chat_template=MARKED_TEMPLATE, max_length=64)
    tokenizer = task.processor(source)
    assert tokenizer.pad_token == "<eos>"
    network: Any = task.load(source, {}, tokenizer)
    network.generation_config.eos_token_id = 7
    network.save_pretrained(tmp_path)
    again: Any = task.load(replace(source, path=str(tmp_path)), {}, tokenizer)
    assert again.generation_config.eos_token_id == [7, tokenizer.eos_token_id]
    again.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task.export(str(tmp_path), network, tokenizer, {})
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.chat_template == MARKED_TEMPLATE
    assert plain.pad_token == "<eos>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [7, tokenizer.eos_token_id]
    assert task.pipeline() == "text-generation"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.0}, {"do_sample": None, "temperature": None}),
        (
            {"early_stopping": True, "max_new_tokens": 9},
            {"do_sample": None, "early_stopping": None, "max_new_tokens": 9},
        ),
        (
            {"do_sample": True, "top_k": 5, "length_penalty": 2.0},
            {"do_sample": True, "top_k": 5, "length_penalty": None},
        ),
    ],
)
def test_settings_of_generation_that_contradict_each_other_do_not_keep_a_model_from_being_saved(
    given: dict[str, Any], kept: dict[str, Any], folder: Callable[..., str], tmp_path: Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(folder("llama"), before)
    (before / "generation_config.json").write_text(json.dumps(given))
    task = CausalLM(max_length=64)
    source = Pretrained(str(before))
    network: Any = task.load(source, {}, task.processor(source))
    network.save_pretrained(after)
    found = AutoModelForCausalLM.from_pretrained(after).generation_config
    assert {name: getattr(found, name) for name in kept} == kept
