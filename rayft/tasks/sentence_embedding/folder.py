"""What makes a model folder one of sentence-transformers: https://sbert.net/docs/sentence_transformer/usage/custom_models.html"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))


def write_modules(folder: str, width: int, max_length: int) -> None:
    """The list of modules and the settings of each: an encoder, the mean of its tokens (`width` numbers), length 1."""
    home = Path(folder)
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
        for place, (path, name) in enumerate(MODULES)
    ]
    _write(home / "modules.json", modules)
    _write(home / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write(home / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "cosine"})
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    _write(home / "1_Pooling" / "config.json", {**pooling, "pooling_mode_cls_token": False})


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
