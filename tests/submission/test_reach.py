"""What a cluster can reach of a recipe: absolute paths, uploads that are found again, refusals that name each path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

import small
from rayft import storage
from rayft.data.pieces import fragments
from rayft.data.source import read
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


def test_a_file_that_several_splits_read_counts_once_against_the_limit(
    plain: dict[str, Any], tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = plain["data"]["train"]
    recipe = Recipe.parse({**plain, "data": {"train": table, "test": table}, "storage": storage.join(s3, "once")})
    monkeypatch.setattr(reach, "LIMIT_BYTES", Path(table).stat().st_size + len("{}"))
    reach.carried(recipe, AWAY, True, silent)


def test_what_lies_beside_a_table_of_texts_stays_where_it_is(plain: dict[str, Any], tmp_path: Path, s3: str) -> None:
    table = tmp_path / "metadata.csv"  # the name says something to tasks on pictures and sounds alone
    Path(plain["data"]["train"]).rename(table)
    home = storage.join(s3, "alone")
    recipe = Recipe.parse({**plain, "model": {"path": "org/name"}, "data": {"train": str(table)}, "storage": home})
    reach.carried(recipe, AWAY, True, silent)
    sent = [entry.path.rpartition("/")[2] for entry in storage.listing(home)]
    assert sorted(sent) == [storage.MARKER, "metadata.csv"]


def pictures(plain: dict[str, Any], table: Path | str, home: str) -> Recipe:
    """A recipe over the pictures that a table names, in a column that it calls `photo`, or those of a metadata file."""
    columns = {"photo": "file_name"} if "rows" in str(table) else {}
    made = {**plain, "task": {"type": "image-classification"}, "storage": home}
    return Recipe.parse({**made, "data": {"train": str(table), "columns": columns}})


def picture(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.png"
    path.write_bytes(b"a picture")
    return path


@pytest.mark.parametrize("written", ["{}", "file://{}"])
def test_pictures_of_this_machine_that_a_table_names_are_refused_before_it_is_uploaded(
    plain: dict[str, Any], tmp_path: Path, s3: str, written: str
) -> None:
    home, there = storage.join(s3, "named", tmp_path.name), picture(tmp_path / "pictures")
    table = tmp_path / "rows.csv"
    table.write_text(f"photo,label\ns3://bucket/b.png,x\n{written.format(there)},x\n")
    with pytest.raises(RunRefused) as raised:
        reach.carried(pictures(plain, table, home), AWAY, True, silent)
    assert str(raised.value).splitlines()[1:-1] == [f"  data.train: {table} names {there}"]
    assert "a metadata.csv in it" in str(raised.value)
    assert not storage.listing(home)
    url = storage.join(s3, "elsewhere", "rows.csv")
    storage.write_text(url, table.read_text())
    with pytest.raises(RunRefused, match="names /"):
        reach.carried(pictures(plain, url, home), AWAY, True, silent)
    reach.carried(pictures(plain, table, str(tmp_path)), "http://localhost:8265", False, silent)
    table.write_text("photo,label\ns3://bucket/b.png,x\n/only/there/c.png,x\n")  # a folder that the cluster may have
    reach.carried(pictures(plain, table, home), AWAY, True, silent)


@pytest.mark.parametrize("named", ["pictures/metadata.csv", "pictures"])
def test_what_a_metadata_file_describes_is_uploaded_with_it(
    plain: dict[str, Any], tmp_path: Path, s3: str, named: str
) -> None:
    picture(tmp_path / "pictures")
    (tmp_path / "pictures" / "metadata.csv").write_text("file_name,label\na.png,x\n")
    recipe = pictures(plain, tmp_path / named, storage.join(s3, "described"))
    (train,) = reach.carried(recipe, AWAY, True, silent).data.train
    rows = next(read(fragments([train])[0], train, {}, ("file_name",)))
    assert [storage.read_bytes(one) for one in rows.columns["file_name"]] == [b"a picture"]


@pytest.mark.parametrize(("named", "cell"), [("pictures/*.csv", "a.png"), ("pictures", "../other/a.png")])
def test_what_a_metadata_file_describes_and_an_upload_leaves_out_is_refused(
    plain: dict[str, Any], tmp_path: Path, s3: str, named: str, cell: str
) -> None:
    picture(tmp_path / "pictures")
    picture(tmp_path / "other")
    (tmp_path / "pictures" / "metadata.csv").write_text(f"file_name,label\n{cell},x\n")
    home = storage.join(s3, "left-out")
    with pytest.raises(RunRefused, match=rf"names {tmp_path}/pictures/{cell}"):
        reach.carried(pictures(plain, tmp_path / named, home), AWAY, True, silent)
    assert not storage.listing(home)
