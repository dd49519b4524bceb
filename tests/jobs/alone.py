"""What exported models predict for a few rows by transformers and diffusers alone: run as a script, which has no rayft.

    python tests/jobs/alone.py ASKED.json ANSWERS.json

ASKED is a list of {"folder", "task" (the recipe's section), "rows" (column -> values)}. ANSWERS is a list of lists of
predictions, one for each row, of the form that `rayft predict` gives; spans and scores that it adds are left out.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image
from scipy.signal import resample_poly

sys.modules["rayft"] = None  # type: ignore[assignment] # whoever imports it fails
Rows = dict[str, list[Any]]
Answers = list[dict[str, Any]]


def loaded(folder: str, kind: str) -> Any:
    return getattr(transformers, f"AutoModel{kind}").from_pretrained(folder).eval()


def most_probable(model: Any, logits: torch.Tensor) -> Answers:
    scores, places = logits.softmax(dim=-1).max(dim=-1)
    names = [model.config.id2label[place] for place in places.tolist()]
    return [{"label": name, "score": score} for name, score in zip(names, scores.tolist(), strict=True)]


def tokens_of(folder: str, task: dict[str, Any], texts: list[str]) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(texts, truncation=True, max_length=task["max_length"], padding=True, return_tensors="pt")


def text_classification(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    model = loaded(folder, "ForSequenceClassification")
    return most_probable(model, model(**tokens_of(folder, task, rows[task["text"]])).logits)


def sequence_regression(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    model = loaded(folder, "ForSequenceClassification")
    logits = model(**tokens_of(folder, task, rows[task["text"]])).logits
    return [{"score": score} for score in logits.squeeze(-1).tolist()]


def sentence_embedding(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    batch = tokens_of(folder, task, rows[task["anchor"]])
    shares = batch["attention_mask"].unsqueeze(-1).float()
    pooled = (loaded(folder, "")(**batch).last_hidden_state * shares).sum(dim=1) / shares.sum(dim=1)
    return [{"embedding": row} for row in torch.nn.functional.normalize(pooled).tolist()]


def token_classification(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    model = loaded(folder, "ForTokenClassification")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = []
    for words in rows[task["tokens"]]:
        batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        firsts = [batch.word_ids().index(word) for word in range(len(words))]
        found = most_probable(model, model(**batch).logits[0, firsts])
        answers.append({"tags": [one["label"] for one in found], "scores": [one["score"] for one in found]})
    return answers


def question_answering(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    """The best span of all windows."""
    model = loaded(folder, "ForQuestionAnswering")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = {"max_length": task["max_length"], "stride": task["stride"]}
    answers = []
    for question, context in zip(rows[task["question"]], rows[task["context"]], strict=True):
        made = tokenizer(
            question,
            context,
            truncation="only_second",
            padding=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
            **sizes,
        )
        offsets = made.pop("offset_mapping")
        made.pop("overflow_to_sample_mapping")
        found = model(**made)
        best = (-float("inf"), "")
        for window in range(len(offsets)):
            own = [place for place, part in enumerate(made.sequence_ids(window)) if part == 1]
            for first in own:
                for last in own[first - own[0] :][: task["max_answer_length"]]:
                    score = float(found.start_logits[window, first] + found.end_logits[window, last])
                    best = max(best, (score, context[offsets[window, first, 0] : offsets[window, last, 1]]))
        answers.append({"answer": best[1]})
    return answers


def masked_lm(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokens_of(folder, task, rows[task["text"]])
    best = loaded(folder, "ForMaskedLM")(**batch).logits.argmax(dim=-1)
    asked = batch["input_ids"] == tokenizer.mask_token_id
    return [
        {"tokens": tokenizer.convert_ids_to_tokens(ids[mine].tolist())} for ids, mine in zip(best, asked, strict=True)
    ]


def causal_lm(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    model = loaded(folder, "ForCausalLM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = []
    for place in range(len(next(iter(rows.values())))):
        row = {name: values[place] for name, values in rows.items()}
        asked = row[task["prompt"]] if task["prompt"] in row else task["prompt"].format(**row)
        if task["chat"]:
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
            )
        ids = tokenizer(asked, return_tensors="pt", add_special_tokens=not task["chat"])["input_ids"]
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=task["max_new_tokens"],
            pad_token_id=tokenizer.eos_token_id,
        )
        answers.append({"text": tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)})
    return answers


def pictures(folder: str, paths: list[str]) -> Any:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")


def image_classification(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    model = loaded(folder, "ForImageClassification")
    return most_probable(model, model(**pictures(folder, rows[task["image"]])).logits)


def face_recognition(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    pooled = loaded(folder, "")(**pictures(folder, rows[task["image"]])).pooler_output.flatten(1)
    return [{"embedding": row} for row in torch.nn.functional.normalize(pooled).tolist()]


def heard(folder: str, path: str) -> Any:
    samples, rate = soundfile.read(path, dtype="float32")
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    samples = np.rint(resample_poly(samples, extractor.sampling_rate, rate) * 32768) / 32768  # rayft keeps 16 bits
    return extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")


def audio_classification(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    model = loaded(folder, "ForAudioClassification")
    return [most_probable(model, model(**heard(folder, path)).logits)[0] for path in rows[task["audio"]]]


def speech_recognition(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    model = loaded(folder, "ForCTC")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    best = [model(**heard(folder, path)).logits[0].argmax(dim=-1) for path in rows[task["audio"]]]
    return [{"text": tokenizer.decode(ids)} for ids in best]


def text_to_image(folder: str, task: dict[str, Any], rows: Rows) -> Answers:
    """Each picture from the noise that comes with the row, as PNG in base64."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    answers = []
    for text, noise in zip(rows[task["text"]], rows["noise"], strict=True):
        made = pipeline(
            text,
            latents=torch.tensor(noise)[None],
            num_inference_steps=task["sample_steps"],
            guidance_scale=task["guidance"],
            output_type="np",
        ).images[0]
        file = io.BytesIO()
        Image.fromarray((made * 255).round().astype(np.uint8)).save(file, "PNG")
        answers.append({"picture": base64.b64encode(file.getvalue()).decode()})
    return answers


def main(asked: str, answers: str) -> None:
    torch.manual_seed(0)
    found = []
    with torch.inference_mode():
        for case in json.loads(Path(asked).read_text(encoding="utf-8")):
            predicted = globals()[case["task"]["type"].replace("-", "_")]
            found.append(predicted(case["folder"], case["task"], case["rows"]))
    Path(answers).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
