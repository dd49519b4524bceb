"""What a cluster can reach of a recipe: absolute paths, uploads that are found again, refusals that name each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

import small
from rayft import storage
from rayft.errors import RunRefused
from rayft.recipe import Recipe
from rayft.submission import reach

AWAY = "http://192.0.2.77:8265"  # a network for documentation: nobody has it


def silent(event: dict[str, Any]) -> None:
    assert event["event"] == "stage"


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return small.recipe(tmp_path, str(model))


def test_this_machine_is_known_by_each_of_its_addresses() -> None:
    own = [one.address for each in psutil.net_if_addrs().values() for one in each if one.family.name == "AF_INET"]
    assert own
    assert all(reach.is_here(f"http://{address}:8265") for address in [*own, "localhost", "127.0.0.1"])
    assert not reach.is_here(AWAY)
    assert not reach.is_here("http://no-such-host.invalid:8265")


def test_paths_become_absolute_where_the_cluster_sees_them(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain |= {"data": {"train": ["train.csv", {"path": "validation.csv", "weight": 2.0}]}, "storage": "runs"}
    plain["model"]["path"] = "model"
    shared = {**plain, "cluster": {"workers": 2, "shared_storage": True}}
    for made, address in ((plain, "http://localhost:8265"), (shared, AWAY)):
        found = reach.carried(Recipe.parse(made), address, False, silent)
        assert [source.path for source in found.data.train] == [
            str(tmp_path / "train.csv"),
            str(tmp_path / "validation.csv"),
        ]
        assert [source.weight for source in found.data.train] == [1.0, 2.0]
        assert (found.storage, found.model.path) == (str(tmp_path / "runs"), str(tmp_path / "model"))


def test_every_path_out_of_reach_is_named_with_what_to_do(plain: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunRefused) as raised:
        reach.carried(Recipe.parse(plain), AWAY, False, silent)
    lines = str(raised.value).splitlines()
    assert lines[1:-1] == [
        f"  storage: {tmp_path}/runs; an URL such as s3://bucket/prefix fits",
        *(
            f"  data.{split}: {tmp_path}/{split}.csv; an URL fits, or --upload puts it beside the run"
            for split in ("train", "validation", "test")
        ),
        f"  model.path: {tmp_path}/model; an URL fits, or --upload puts it beside the run",
    ]
    with pytest.raises(RunRefused, match="storage: ") as raised:
        reach.carried(Recipe.parse(plain), AWAY, True, silent)
    assert "data.train" not in str(raised.value)


def test_the_choices_of_a_sweep_reach_the_cluster_as_the_recipes_own_paths_do(
    plain: dict[str, Any], tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["train.csv", {"path": "validation.csv"}, ["test.csv", {"path": "train.csv", "weight": 2.0}]]
    search = {"data.train": {"choice": rows}, "model.path": {"choice": ["model", "org/name"]}}
    plain |= {"tune": {"search": {**search, "train.seed": {"choice": [1]}}, "trials": 2}}
    with pytest.raises(RunRefused) as raised:
        reach.carried(Recipe.parse(plain), AWAY, False, silent)
    named = [line.split()[0] for line in str(raised.value).splitlines() if "tune" in line]
    assert named == ["tune.search.data.train:"] * 4 + ["tune.search.model.path:"]

    def chosen(recipe: Recipe) -> tuple[list[str], list[str]]:
        assert recipe.tune is not None
        first, second, (third, fourth) = recipe.tune.search["data.train"].choices
        models = recipe.tune.search["model.path"].choices
        assert fourth["weight"] == 2.0
        return [first, second["path"], third, fourth["path"]], list(models)

    here, models = chosen(reach.carried(Recipe.parse(plain), "http://localhost:8265", False, silent))
    assert here == [str(tmp_path / name) for name in ("train.csv", "validation.csv", "test.csv", "train.csv")]
    assert models == [str(tmp_path / "model"), "org/name"]
    home = storage.join(s3, "choices")
    sent, models = chosen(reach.carried(Recipe.parse({**plain, "storage": home}), AWAY, True, silent))
    assert [storage.read_bytes(path) for path in sent] == [Path(path).read_bytes() for path in here]
    assert models[1] == "org/name"
    assert storage.exists(storage.join(models[0], "config.json"))


def test_uploads_lie_under_their_content_and_are_made_once(
    plain: dict[str, Any], tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = storage.join(s3, "reach")
    (tmp_path / "many").mkdir()
    for name in ("a.csv", "b.csv"):
        (tmp_path / "many" / name).write_text((tmp_path / "train.csv").read_text())
    plain["data"] |= {"train": str(tmp_path / "many" / "*.csv")}
    recipe = Recipe.parse({**plain, "storage": home})
    found = reach.carried(recipe, AWAY, True, silent)
    (train,) = found.data.train
    assert train.path.startswith(storage.join(home, "inputs/"))
    assert train.path.endswith("/*.csv")
    assert len(storage.expand(train.path)) == 2
    assert storage.read_text(storage.join(found.model.path, "config.json")) == "{}"
    monkeypatch.setattr(storage, "upload", None)
    assert reach.carried(recipe, AWAY, True, silent) == found
    assert reach.carried(recipe, "http://localhost:8265", True, silent) == found  # a forwarded port


def test_more_than_the_limit_is_refused_with_sizes(
    plain: dict[str, Any], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "LIMIT_BYTES", 10_000)
    home = storage.join(s3, "large")
    with pytest.raises(RunRefused, match=r"(?s)--upload takes 10\.0 kB in all.*data\.train: .*train\.csv \(\d"):
        reach.carried(Recipe.parse({**plain, "storage": home}), AWAY, True, silent)
    assert not storage.listing(home)
