"""The command line: which commands there are, and what each prints.

Everything heavy is imported inside the commands, so that `rayft --help` answers at once. `answer.py` says how they end.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from rayft import __version__
from rayft.answer import FAILED, REFUSED, answering, exit_code, sentence
from rayft.cli_jobs import jobs, submit
from rayft.options import Json, Overrides, RecipeFile

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune pretrained models across many machines, from one recipe.",
)
runs = typer.Typer(no_args_is_help=True, help="Look at runs: list, show, compare.")
app.add_typer(runs, name="runs")
app.add_typer(jobs, name="jobs")

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder: <storage>/<name>.")]
Storage = Annotated[str, typer.Argument(metavar="STORAGE", help="The folder or URL that recipes name as `storage`.")]
Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or an exported model's.")]


INTERRUPTED = "interrupted; started again, the run goes on from its last checkpoint, or begins anew where it has none"


def main() -> None:
    """Runs the command line and exits with its code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # no terminal is too old for a message
    try:
        app(prog_name="rayft")
    except Exception as error:  # noqa: BLE001 # the one place that decides what a user sees of a failure
        if os.environ.get("RAYFT_DEBUG"):
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(exit_code(error))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rayft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


# --- from rows to a model


@app.command()
def init(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Rows: a file, folder, glob, s3://... or hf://owner/name.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The recipe's file; - for stdout.")] = "recipe.yaml",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    json: Json = False,
) -> None:
    """Write a first recipe for a file of rows."""
    with answering(json) as answer:
        from rayft import storage
        from rayft.errors import RunRefused

        if output != "-" and not force and storage.exists(output):
            raise RunRefused(f"{output} exists; name another file with --output, or replace it with --force")
        if output != "-":
            storage.check_writable(output, file=True)
        from rayft.data.pieces import fragments
        from rayft.data.source import distinct
        from rayft.first import first_recipe, look, split_column
        from rayft.recipe import Source
        from rayft.tasks.cells import short

        train = _train_split(data)
        if train != data:
            answer.say(f"note: {data} holds several splits; {train} is trained on")
        pieces = fragments([Source(path=train)])
        columns, sample = look(pieces, train)
        if column := split_column(columns):
            sample[column] = distinct(pieces, column)
        text, unused = first_recipe(columns, sample, train)
        if unused:
            answer.say(f"note: these columns are not used: {', '.join(map(short, unused))}")
        if output == "-":
            answer.give({"output": None, "recipe": text}, text.rstrip("\n"))
            return
        storage.write_text(output, text)
        answer.give({"output": output, "recipe": text}, f"wrote {output}; look through it, then: rayft check {output}")


def _train_split(data: str) -> str:
    """What to train on: of a folder that holds a train split, that; else all of it. Test rows never train a model.

    Of a folder with a metadata file the columns say what rows it has, also which are for what.
    """
    from rayft import storage
    from rayft.data.pieces import METADATA

    inside = [*(entry.path for entry in storage.listing(data, recursive=False)), *storage.folders(data)]
    named = [path for path in inside if path.rpartition("/")[2].partition(".")[0] in ("train", "training")]
    described = any(path.rpartition("/")[2] in METADATA for path in inside)
    return named[0] if len(named) == 1 and len(inside) > 1 and not described else data


@app.command()
def check(recipe: RecipeFile, overrides: Overrides = None, json: Json = False) -> None:
    """Say what a run will do, what it will cost and what is wrong, before anything is started."""
    with answering(json) as answer:
        from rayft.display import Display
        from rayft.recipe import Recipe

        loaded = Recipe.load(recipe, overrides or ())
        from rayft import preflight

        with Display(answer.console, json) as show:
            report = preflight.check(loaded, show=show)
        answer.give(report, preflight.text(report))
    if report.get("faults"):
        raise typer.Exit(REFUSED)


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    restart: Annotated[bool, typer.Option("--restart", help="Delete what the run has so far, and start over.")] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Start although another process writes this run.")
    ] = False,
    json: Json = False,
) -> None:
    """Train what a recipe says, or go on where its run stopped."""
    with answering(json, interrupted=INTERRUPTED) as answer:
        from rayft.display import Display
        from rayft.recipe import Recipe

        loaded = Recipe.load(recipe, overrides or ())
        import psutil

        from rayft.run import run as train

        with Display(answer.console, json) as show:
            given = psutil.Process().create_time()
            result = train(loaded, show=show, restart=restart, take_over=take_over, begun=given)
            if not show.finished:  # it had finished before
                show({"event": "finished", "result": result})
        answer.give(result)
    if result["status"] == "failed":  # what an earlier start of the run ended with
        raise typer.Exit(FAILED)


@app.command()
def tune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what the sweep has so far, and start over.")
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Start although another process writes this sweep.")
    ] = False,
    json: Json = False,
) -> None:
    """Search the fields that a recipe's `tune` section names, or go on with the search."""
    with answering(json, interrupted="interrupted; started again, the sweep goes on with what is left") as answer:
        from rayft.display import Display
        from rayft.recipe import Recipe

        loaded = Recipe.load(recipe, overrides or ())
        from rayft.text import sweep_lines
        from rayft.tune import tune as search

        with Display(answer.console, json) as show:
            result = search(loaded, show=show, restart=restart, take_over=take_over)
        answer.give(result, *sweep_lines(result))


@app.command()
def verify(
    recipe: RecipeFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps before the kill, and after it.")] = 8,
    keep: Annotated[bool, typer.Option("--keep", help="Keep both runs, in <storage>/<name>-verify.")] = False,
    json: Json = False,
) -> None:
    """Train some steps twice, once killed half-way, and say whether this recipe resumes exactly here."""
    with answering(json) as answer:
        from rayft.display import Display
        from rayft.recipe import Recipe

        loaded = Recipe.load(recipe, overrides or ())
        from rayft.text import verified_lines
        from rayft.verify import verify as compare

        with Display(answer.console, json) as show:
            found = compare(loaded, steps, show=show, keep=keep)
        answer.give(found, *verified_lines(found))
    if not found["exact"]:
        raise typer.Exit(FAILED)


@app.command()
def evaluate(
    target: Target,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to score; else the run's own test or validation rows.")
    ] = None,
    json: Json = False,
) -> None:
    """Score a model on rows that have the truth."""
    with answering(json) as answer:
        from rayft.display import Display
        from rayft.predict import evaluate as score
        from rayft.text import scores_lines

        with Display(answer.console, json) as show:
            scores = score(target, data, show=show)
        answer.give(scores, *scores_lines(scores))


@app.command()
def predict(
    target: Target,
    data: Annotated[str, typer.Option("--data", help="Rows to predict: a file, folder, glob or URL.")],
    output: Annotated[str, typer.Option("--output", "-o", help="A .parquet, a .jsonl, or FOLDER/ for pictures.")],
    json: Json = False,
) -> None:
    """Write a model's predictions for rows."""
    with answering(json) as answer:
        from rayft.display import Display
        from rayft.predict import predict as write
        from rayft.text import counted, duration

        with Display(answer.console, json) as show:
            done = write(target, data, output, show=show)
        answer.give(done, f"{counted(done['rows'], 'row')} in {duration(done['seconds'])}: {done['output']}")


@app.command()
def export(
    run: Run,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A new folder or URL for the model.")],
    json: Json = False,
) -> None:
    """Copy a run's best model to a folder that transformers loads."""
    with answering(json) as answer:
        from rayft.run import export as copy

        target = copy(run, folder)
        answer.give({"export": target}, f"model: {target}")


app.command()(submit)


# --- what runs left behind


@runs.command("list")
def runs_list(storage: Storage, json: Json = False) -> None:
    """List the runs in a storage, newest first."""
    with answering(json) as answer:
        from rayft import report
        from rayft.text import list_lines

        found = report.runs(storage)
        answer.give(found, *(list_lines(found) if found else [f"no runs in {storage}"]))


@runs.command("show")
def runs_show(run: Run, json: Json = False) -> None:
    """Show one run: its state, scores, evaluations and checkpoints."""
    with answering(json) as answer:
        from rayft import report
        from rayft.text import run_lines

        found = report.show(run)
        answer.give(found, *run_lines(found))


@runs.command("compare")
def runs_compare(first: Run, second: Run, json: Json = False) -> None:
    """Show what two runs have differently: fields of their recipes, and scores."""
    with answering(json) as answer:
        from rayft import report
        from rayft.text import compare_lines

        found = report.compare(first, second)
        answer.give(found, *compare_lines(found))


@app.command()
def report(
    target: Annotated[str, typer.Argument(metavar="RUN|SWEEP", help="A run's or a sweep's folder: <storage>/<name>.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The HTML file or URL; else <name>.html here.")
    ] = None,
    json: Json = False,
) -> None:
    """Write one HTML page of a run or a sweep, which opens offline."""
    with answering(json) as answer:
        from rayft.reports.pages import write_report
        from rayft.text import size

        done = write_report(target, output)
        answer.give(done, f"wrote {done['report']} ({size(done['bytes'])})")


@app.command()
def dashboard(
    storage: Storage,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 0,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Any but this machine's own needs a token.")
    ] = "127.0.0.1",
) -> None:
    """Serve the pages of all runs and sweeps in a storage, live."""
    with answering(False) as answer:
        from rayft.reports.dashboard import serve

        serve(storage, host, port, answer.say)


@app.command()
def clean(
    storage: Storage,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    json: Json = False,
) -> None:
    """Delete what nothing needs: unused prepared shards, remains of attempts, failed runs without a checkpoint.

    What may belong to something that has only just begun stays until it is a day old.
    """
    with answering(json) as answer:
        from dataclasses import asdict

        from rayft import leftovers
        from rayft.text import aligned, size

        found, young = leftovers.survey(storage, lambda sentence: answer.say(f"warning: {sentence}"))
        total = size(sum(one.bytes for one in found))
        lines = aligned([(size(one.bytes), one.path, one.why) for one in found], right={0})
        if not found:
            some, be, stay = ("things", "are", "stay") if len(young) > 1 else ("thing", "is", "stays")
            much = size(sum(one.bytes for one in young))
            kept = f"; {len(young)} {some} ({much}) {be} younger than a day and {stay} until then" if young else ""
            answer.give({"removed": [], "bytes": 0}, f"nothing to delete{kept}")
            return
        answer.say(*lines)
        if not yes and not _agreed(f"delete {total}?"):
            answer.give({"removed": [], "bytes": 0}, "nothing was deleted")
            return
        gone = leftovers.remove(storage, found)
        freed = sum(one.bytes for one in gone)
        answer.give({"removed": [asdict(one) for one in gone], "bytes": freed}, f"deleted {size(freed)}")


def _agreed(question: str) -> bool:
    """Asks on stderr; no answer is a no."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort:
        print(file=sys.stderr)
        return False


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    with answering(True) as answer:
        from rayft.recipe import json_schema

        answer.give(json_schema())
