"""What other trainers call a field, and what has no field here: README's "Coming from another trainer", for messages.

The names are those of the Hugging Face Trainer, PEFT, DeepSpeed, Axolotl and LLaMA-Factory. A whole dotted name goes
before its last part.
"""

from __future__ import annotations

# What they call a field -> its name here.
FIELDS = {
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "output_dir": "storage",
    "datasets": "data.train",
    "dataset": "data.train",
    "lr": "train.learning_rate",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "scheduler": "train.schedule",
    "warmup_ratio": "train.warmup",
    "warmup_steps": "train.warmup",
    "gradient_clipping": "train.max_grad_norm",
    "eval_steps": "train.evaluate_every",
    "save_steps": "train.save_every",
    "save_total_limit": "checkpoints.keep",
    "metric_for_best_model": "train.metric",
    "early_stopping_patience": "train.early_stopping.patience",
    "fp16": "model.dtype",
    "bf16": "model.dtype",
    "torch_dtype": "model.dtype",
    "torch_compile": "model.compile",
    "flash_attention": "model.attention",
    "flash_attn": "model.attention",
    "attn_implementation": "model.attention",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.targets",
    "lora_target": "model.lora.targets",
    "target_modules": "model.lora.targets",
    "load_in_4bit": "model.quantize",
    "quantization_bit": "model.quantize",
    "freeze_trainable_layers": "model.freeze",
    "sequence_len": "task.max_length",
    "cutoff_len": "task.max_length",
    "sample_packing": "task.pack",
    "packing": "task.pack",
    "train_on_inputs": "task.train_on_prompt",
    "stage": "task.type",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "num_workers": "cluster.workers",
    "deepspeed.stage": "deepspeed.zero_stage",
    "zero_optimization": "deepspeed.zero_stage",
    "fsdp": "deepspeed.zero_stage",
}

_BOUND = "a bound of a forward pass: a step has `train.global_batch_size` rows in any case"
_SHARE = "rows, and no share of them: without it a tenth of `train` is kept apart"

# What has to be said of a name: besides its field, or in place of one.
SENTENCES = {
    "per_device_train_batch_size": _BOUND,
    "micro_batch_size": _BOUND,
    "gradient_accumulation_steps": (
        "there is none: `train.global_batch_size` is their batch per device x accumulation x devices, "
        "and `train.micro_batch_size` cuts it"
    ),
    "output_dir": "a run's folder is <storage>/<name>",
    "freeze_trainable_layers": "`model.freeze` counts what stays, from the input side",
    "val_set_size": _SHARE,
    "val_size": _SHARE,
    "load_best_model_at_end": "always: `train.metric` says which model is best",
    "resume_from_checkpoint": "there is none: the same command resumes, and `--restart` starts over",
    "report_to": (
        "there is none: a run's folder has metrics.jsonl and TensorBoard's files; for sweeps there is `tune.log_to`"
    ),
}


def plain(key: str) -> str:
    """A key as the tables have it: `Lora-Alpha` is `lora_alpha`."""
    return key.lower().replace("-", "_")


def field(name: str) -> str | None:
    """The field here that the dotted `name` stands for elsewhere; None where it stands for none."""
    name = plain(name)
    return FIELDS.get(name) or FIELDS.get(name.rpartition(".")[2])


def sentence(name: str) -> str | None:
    """What has to be said of the dotted `name`; None where its field says enough, or it is not known."""
    return SENTENCES.get(plain(name).rpartition(".")[2])
