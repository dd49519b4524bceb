"""The command line as its users meet it: real processes, their exit codes, stdout and stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rayft import storage

HEAVY = ("ray", "torch", "transformers", "pyarrow", "pydantic", "deepspeed", "datasets", "fsspec", "yaml", "numpy")

# A process whose rayft.run and Recipe are replaced, so that how a command ends is seen without the seconds of training.
STUB = """
import os, sys, time, types
recipe, run = types.ModuleType("rayft.recipe"), types.ModuleType("rayft.run")
class Recipe:
    @staticmethod
    def load(path, overrides=()):
        return [path, *overrides]
def train(recipe, *, show, restart=False, take_over=False, begun=None):
    from rayft import errors
    show({"event": "note", "text": "training begins"})
    print("a library prints this"); os.system("echo a child prints this")
    {body}
    metrics = {"test_accuracy": 0.5, "test_nan": float("nan")}
    asked = [*recipe, restart, take_over]
    return {"run": "runs/x", "status": "finished", "steps": 3, "metrics": metrics, "asked": asked}
recipe.Recipe, run.run = Recipe, train
run.export = lambda run, folder: folder
sys.modules |= {"rayft.recipe": recipe, "rayft.run": run}
from rayft.cli import main
main()
"""


def environment(**more: str) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != "RAYFT_DEBUG"}, **more}


def rayft(*arguments: str, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rayft", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=stdin, env=environment(), check=False)


def stubbed(body: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STUB.replace("{body}", body), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), check=False)


def write_run(where: str, name: str, **fields: Any) -> str:
    run, now = storage.join(where, name), time.time()
    state = {"status": "finished", "attempt": 1, "started": now - 90, "heartbeat": now, "prepared": {}, **fields}
    storage.write_json(storage.join(run, "run.json"), state)
    storage.write_text(storage.join(run, "recipe.yaml"), f"name: {name}\ntrain: {{learning_rate: 5e-05, epochs: 1}}\n")
    result = {"run": run, "status": state["status"], "error": None, "steps": 120, "epochs": 1.0}
    scores = {"metrics": {"eval_accuracy": 0.97, "test_accuracy": 0.98}, "export": storage.join(run, "export")}
    best = {"best": {"step": 100, "metric": "eval_accuracy", "value": 0.97}, "timing": {"train_s": 60.5}}
    storage.write_json(storage.join(run, "result.json"), {**result, **scores, **best})
    rows = [{"step": 100, "epoch": 0.9, "eval_accuracy": 0.97}, {"step": 120, "epoch": 1.0, "loss": 0.5}]
    storage.write_text(storage.join(run, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    return run


# --- help


def test_help_imports_nothing_heavy() -> None:
    code = f"""
        import sys
        from rayft.cli import main
        sys.argv = ["rayft", *sys.argv[1:]]
        try:
            main()
        except SystemExit as end:
            assert end.code == 0, end.code
        print(sorted(set({HEAVY}) & set(sys.modules)), sorted(name for name in sys.modules if name.startswith("rayft")))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == (
        "[] ['rayft', 'rayft.answer', 'rayft.cli', 'rayft.cli_jobs', 'rayft.errors', 'rayft.finite', 'rayft.options']"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "init"),
        (["run", "-h"], 0, "FIELD=VALUE"),
        (["--version"], 0, "rayft 0."),
        ([], 2, "Usage"),
        (["runn"], 2, "No such command"),
        (["runs"], 2, "compare"),
        (["run"], 2, "Missing argument 'RECIPE'"),
        (["predict", "run", "--data", "x.csv"], 2, "Missing option '--output'"),
    ],
)
def test_usage(arguments: list[str], code: int, says: str) -> None:
    done = rayft(*arguments)
    assert done.returncode == code
    assert says in done.stdout + done.stderr


# --- refusals


def test_recipe_that_is_missing_or_no_yaml_is_refused(tmp_path: Path) -> None:
    done = rayft("run", "nowhere.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: nowhere.yaml: 1 fault\n  nowhere.yaml: no such file")
    (tmp_path / "r.yaml").write_text("name: [x\n")
    done = rayft("check", "r.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "not valid YAML" in done.stderr
    assert "Traceback" not in done.stderr


def test_faults_of_file_and_overrides_come_together_and_as_json(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\ntask: {type: nonsense}\nmodle: {path: y}\ndata: {train: a.csv}\n")
    done = rayft("run", "r.yaml", "train.epochs=-1", "data.train=[a.csv,b.csv]", "--json", cwd=tmp_path)
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 2
    assert {"task.type", "modle", "train.epochs"} <= {fault["where"] for fault in answer["faults"]}
    assert done.stderr == f"error: {answer['error']}\n"


# --- how a run ends


def test_run_passes_overrides_and_flags_and_shows_the_result() -> None:
    done = stubbed(
        "pass", "run", "r.yaml", "train.learning_rate=1e-4", "data.train=[a.csv,b.csv]", "--restart", "--take-over"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "note: training begins"
    assert done.stdout.splitlines()[-4:-2] == ["", "finished after 3 steps"]
    done = stubbed("pass", "run", "r.yaml", "a.b=-1", "--take-over", "--json")
    assert json.loads(done.stdout)["asked"] == ["r.yaml", "a.b=-1", False, True]


def test_json_is_alone_on_stdout_whatever_libraries_and_children_print() -> None:
    done = stubbed("pass", "run", "r.yaml", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["metrics"] == {"test_accuracy": 0.5, "test_nan": None}
    assert {"note: training begins", "a library prints this", "a child prints this"} == set(done.stderr.splitlines())


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ('raise errors.RunRefused("another process writes it")', 2, "error: another process writes it"),
        ('raise errors.TrainingError("a worker failed", False)', 1, "error: "),
        ('raise errors.NotFinite(7, "loss")', 1, "error: step 7: the loss is not finite (NaN or infinite)"),
        ('raise errors.StorageDown("s3://b: no answer")', 1, "error: s3://b: no answer"),
        (
            'raise ZeroDivisionError("by zero")',
            1,
            "error: something unforeseen went wrong: ZeroDivisionError: by zero (RAYFT_DEBUG=1",
        ),
        ('return {"status": "failed", "error": "no luck", "steps": 1}', 1, ""),
    ],
)
def test_exit_codes_and_one_sentence_without_a_traceback(body: str, code: int, says: str) -> None:
    done = stubbed(body, "run", "r.yaml")
    assert done.returncode == code
    assert done.stderr.startswith(says)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if says else 0)


def test_debug_shows_the_traceback_and_json_the_error() -> None:
    done = stubbed('raise errors.RunRefused("no")', "run", "r.yaml", "--json", RAYFT_DEBUG="1")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"error": "no", "exit_code": 2}
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("error: no\n")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_interrupted_run_ends_with_130_and_says_what_comes_next(flags: list[str]) -> None:
    body = 'show({"event": "note", "text": "waiting"}); sys.stdout.flush(); time.sleep(60)'
    command = [sys.executable, "-u", "-c", STUB.replace("{body}", body), "run", "r.yaml", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as process:  # type: ignore[call-overload]
        for line in process.stderr if flags else process.stdout:
            if line == "note: waiting\n":
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (
        err
        == "interrupted; started again, the run goes on from its last checkpoint, or begins anew where it has none\n"
    )
    assert json.loads(out) == {"error": "interrupted", "exit_code": 130} if flags else out == ""


def test_output_cut_off_by_its_reader_is_no_error(tmp_path: Path) -> None:
    for number in range(40):
        write_run(str(tmp_path), f"run-{number}")
    command = f"{sys.executable} -m rayft runs list {tmp_path} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment(), check=False)
    assert done.stderr == ""
    assert done.stdout.split() == ["run", "status", "steps", "metric", "value", "time", "started"]


# --- runs, clean, export


def test_runs_list_show_and_compare(tmp_path: Path) -> None:
    first, second = write_run(str(tmp_path), "first"), write_run(str(tmp_path), "second", status="failed")
    done = rayft("runs", "list", str(tmp_path))
    assert done.returncode == 0
    rows = {line.split()[0]: line.split()[1:-2] for line in done.stdout.splitlines()}
    assert rows["first"] == ["finished", "120", "eval_accuracy", "0.9700", "0:01:30"]
    assert json.loads(rayft("runs", "list", str(tmp_path), "--json").stdout)[0]["steps"] == 120
    done = rayft("runs", "show", first)
    assert [line for line in done.stdout.splitlines() if "accuracy" in line] == [
        "  test_accuracy  0.9800",
        "  eval_accuracy  0.9700",
        "  step  epoch  eval_accuracy",
    ]
    done = rayft("runs", "compare", first, second)
    assert "  name  first  second" in done.stdout.splitlines()
    assert rayft("runs", "show", str(tmp_path / "third")).returncode == 2
    done = rayft("runs", "list", str(tmp_path / "nowhere"), "--json")
    assert done.returncode == 2
    assert "does not exist" in json.loads(done.stdout)["error"]


def test_clean_asks_first(tmp_path: Path) -> None:
    run = write_run(str(tmp_path), "one")
    torn = Path(run, "checkpoints", "step-000100-a1")
    storage.write_text(str(torn / "state.json"), "x" * 2000)
    for answer in ("", "n\n"):
        done = rayft("clean", str(tmp_path), stdin=answer)
        assert done.returncode == 0
        assert f"  2.0 kB  {torn}  a checkpoint that was never committed" in done.stdout.splitlines()
        assert done.stdout.endswith("nothing was deleted\n")
        assert torn.exists()
    done = rayft("clean", str(tmp_path), "--yes", "--json")
    assert [gone["path"] for gone in json.loads(done.stdout)["removed"]] == [str(torn)]
    assert not torn.exists()
    assert rayft("clean", str(tmp_path), stdin="y\n").stdout == "nothing to delete\n"
    unused = tmp_path / "prepared" / ("a" * 32)
    storage.write_text(str(unused / "manifest.json"), "x" * 2000)
    young = "nothing to delete; 1 thing (2.0 kB) is younger than a day and stays until then\n"
    assert rayft("clean", str(tmp_path)).stdout == young
    storage.delete(str(unused))
    Path(run, "run.json").write_text("{")
    first, last = rayft("clean", str(tmp_path)).stdout.splitlines()
    assert first.startswith(f"warning: {run}/run.json is damaged")
    assert last == "nothing to delete"


@pytest.mark.parametrize("command", [("init", "rows.csv", "-o"), ("report", "one", "-o"), ("export", "one")])
def test_an_output_that_cannot_be_written_is_refused_by_its_name(tmp_path: Path, command: tuple[str, ...]) -> None:
    storage.write_text(storage.join(write_run(str(tmp_path), "one"), "export", "rayft.json"), "{}")
    (tmp_path / "rows.csv").write_text("text,label\nhello there,ham\n")
    done = rayft(*command, "/proc/nothing/out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: /proc/nothing/out: writing failed")


def test_export_says_where_the_model_is() -> None:
    assert stubbed("pass", "export", "runs/x", "out").stdout == "model: out\n"
    assert json.loads(stubbed("pass", "export", "runs/x", "out", "--json").stdout) == {"export": "out"}


# --- init and schema


@pytest.mark.slow
def test_init_writes_a_recipe_that_check_reads_and_never_overwrites_it(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "hello there,ham\nwin a prize,spam\n" * 10)
    done = rayft("init", "train.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "wrote recipe.yaml; look through it, then: rayft check recipe.yaml\n"
    written = (tmp_path / "recipe.yaml").read_text()
    done = rayft("init", "train.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe.yaml exists;")
    assert rayft("init", "train.csv", "--output", "-", cwd=tmp_path).stdout == written
    assert rayft("init", "train.csv", "--force", "--json", cwd=tmp_path).returncode == 0
    code = "from rayft.recipe import Recipe; print(Recipe.load('recipe.yaml').data.train[0].path)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "train.csv\n"


@pytest.mark.slow
def test_init_of_a_folder_that_lists_its_files_reads_the_list_and_not_its_train_split(tmp_path: Path) -> None:
    """Else the folders of people in it would be classes, of which validation has others."""
    splits = ("train", "validation", "test")
    lines = [f"{split}/{number:03d}/a.jpg,{number:03d},{split}" for number, split in enumerate(splits)]
    storage.write_text(str(tmp_path / "faces/metadata.csv"), "\n".join(["file_name,identity,split", *lines]))
    for number, split in enumerate(splits):
        storage.write_text(str(tmp_path / f"faces/{split}/{number:03d}/a.jpg"), "x")
    done = rayft("init", "faces", "-o", "-", cwd=tmp_path)
    assert "type: face-recognition" in done.stdout
    assert all(f"{split}: {{path: faces, where: {{split: {split}}}}}" in done.stdout for split in splits)


@pytest.mark.slow
def test_init_of_a_folder_of_splits_trains_on_its_train_split_alone(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / f"{split}.csv").write_text("id,text,label\n1,hello there,ham\n2,win a prize,spam\n")
    done = rayft("init", "rows", "--json", cwd=tmp_path)
    lines = json.loads(done.stdout)["recipe"].splitlines()
    assert lines[lines.index("data:") + 1 :][:3] == [
        "  train: rows/train.csv",
        "  validation: rows/validation.csv",
        "  test: rows/test.csv",
    ]
    assert done.stderr == (
        "note: rows holds several splits; rows/train.csv is trained on\nnote: these columns are not used: id\n"
    )


@pytest.mark.slow
def test_schema_is_json() -> None:
    assert json.loads(rayft("schema").stdout)["title"] == "rayft recipe"
