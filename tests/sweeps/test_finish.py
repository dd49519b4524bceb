"""What a sweep makes of its best trial."""

from __future__ import annotations

from pathlib import Path

import pytest

import small
from rayft import storage
from rayft.recipe import Recipe
from rayft.run import prepared_for, run
from rayft.sweeps.finish import finish
from rayft.training import checkpoints


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_trial_of_several_workers_is_tested_and_exported_where_it_stands(tmp_path: Path) -> None:
    """One that others have outrun, or that the budget has ended, has steps left: they are not made up for."""
    plain = small.recipe(tmp_path, small.small_bert(tmp_path / "bert"), train__epochs=1)
    stood = run(Recipe.parse(plain), show=lambda event: None, exports=False)
    path = storage.join(stood["run"], "result.json")
    begun = storage.read_json(storage.join(stood["run"], "run.json")) | {"status": "stopped"}
    storage.write_json(storage.join(stood["run"], "run.json"), begun)
    told = {**stood, "status": "stopped", "by_scheduler": True, "seconds": 12.5}
    storage.write_json(path, told)
    longer = Recipe.parse({**plain, "train": {**plain["train"], "epochs": 40}})
    prepared = prepared_for(longer, plain["model"]["path"], lambda event: None)
    scores = finish(longer, prepared, str(tmp_path / "export"))
    assert {name: scores[name] for name in stood["metrics"]} == stood["metrics"]
    assert "test_accuracy" in scores
    assert checkpoints.step_of(str(checkpoints.newest(f"{stood['run']}/checkpoints"))) == stood["steps"]
    assert storage.read_json(path) == told
    assert storage.read_json(storage.join(stood["run"], "run.json")) == begun
    assert (tmp_path / "export/model.safetensors").exists()
    assert not Path(stood["run"], "export").exists()
