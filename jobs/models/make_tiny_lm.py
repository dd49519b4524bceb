"""How the small language model of these recipes began: a tokenizer trained on their texts, and random weights.

    python jobs/models/make_tiny_lm.py FOLDER --rows medquad/train.parquet --text tiny_shakespeare/train.txt

FOLDER then loads with `AutoModelForCausalLM` and `AutoTokenizer`. It knows nothing yet: pretrain it with a recipe of
type causal-lm on the same texts. Texts it was made from: MedQuAD (Ben Abacha and Demner-Fushman, CC BY 4.0), questions
and answers of the training split, and the plays of Shakespeare (public domain). The same inputs give the same folder.

The tokenizer is a byte-level BPE of 2,048 tokens, so that it writes any text: 3.7 characters per token of MedQuAD. The
model is a Llama of 1,049,728 parameters that reads 1,024 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
POSITIONS = 1024
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>")
LINES = 64  # of a plain text are one piece for the tokenizer's training

# A turn ends with <|eos|>, which the assistant's turn is to learn: it lies between the generation markers.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('the role ' + message.role + ' is not one of system, user, assistant') -}}
    {%- endif -%}
    {{- '<|' + message.role + '|>' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def texts(rows: list[Path], columns: list[str], plain: list[Path]) -> Iterator[str]:
    """The cells of `columns` in Parquet files, and plain files in pieces of `LINES` lines."""
    for path in rows:
        table = pq.read_table(path, columns=columns)
        for column in columns:
            yield from (text for text in table.column(column).to_pylist() if text)
    for path in plain:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        yield from ("".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES))


def tokenizer(corpus: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that begins every text with <|bos|>; the end of a text is for whoever trains on it."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    bos = inner.token_to_id("<|bos|>")
    inner.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B:1", special_tokens=[("<|bos|>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        extra_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def model(of: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 4 blocks, drawn from `seed`; input and output embeddings are one tensor."""
    config = LlamaConfig(
        vocab_size=len(of),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=of.pad_token_id,
        bos_token_id=of.bos_token_id,
        eos_token_id=of.eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--rows", type=Path, nargs="*", default=[], help="Parquet files")
    parser.add_argument("--columns", nargs="*", default=["question", "answer"], help="their columns that hold text")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="plain text files")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    given = parser.parse_args()
    if not given.rows and not given.text:
        parser.error("give files to learn the tokenizer from: --rows, --text, or both")
    made = tokenizer(texts(given.rows, given.columns, given.text))
    network = model(made, given.seed)
    network.save_pretrained(given.folder)
    made.save_pretrained(given.folder)
    print(f"{given.folder}: {len(made)} tokens, {network.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
