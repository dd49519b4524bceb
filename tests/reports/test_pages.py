"""Reports as a reader meets them: opened from disk in a browser, with no network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import folders
from browser import chromium, watched
from rayft import storage
from rayft.errors import StorageMissing
from rayft.reports import pages
from rayft.reports.overview import page as data_of
from rayft.reports.snapshots import Files

pytestmark = pytest.mark.slow  # they drive a browser

NASTY = "</script><script>alert(1)</script>&amp; \u2028 <!-- 'x' \"y\""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def where(tmp_path: Path) -> str:
    return str(tmp_path / "runs")


def opened(page: Any, folder: str, tmp_path: Path) -> dict[str, Any]:
    """Writes the report of a folder and opens it; gives the data it was made from."""
    target = tmp_path / "report.html"
    done = pages.write_report(folder, str(target))
    assert done["bytes"] == target.stat().st_size
    page.goto(target.as_uri())
    page.wait_for_selector("body[data-shown]")
    return data_of(Files(), folder)


def cells(page: Any, card: str, column: int) -> list[str]:
    """The full values, which titles hold, of a column of a card's table; else what is shown."""
    script = "(all) => all.map((cell) => cell.title || cell.innerText)"
    found: list[str] = page.eval_on_selector_all(f"#{card} tbody td:nth-child({column + 1})", script)
    return found


def column(page: Any, card: str, label: str) -> int:
    heads: list[str] = page.eval_on_selector_all(f"#{card} th", "(all) => all.map((head) => head.innerText)")
    return heads.index(label)


def tile(page: Any, label: str) -> str:
    found: str = page.locator(f'[data-tile="{label}"] .value span').first.get_attribute("title")
    return found


def test_report_of_a_run_shows_its_numbers(browser: Any, where: str, tmp_path: Path) -> None:
    folders.write_manifest(where)
    folder = folders.write_run(where, "team/one", attempts=3)
    with watched(browser, offline=True) as page:
        data = opened(page, folder, tmp_path)
        assert page.title() == "team/one - rayft"
        assert page.locator("h1").inner_text() == "team/one"
        assert float(tile(page, "eval_accuracy")) == data["best"]["value"]
        assert page.locator('[data-tile="eval_accuracy"] .value').inner_text() == f"{data['best']['value']:.4g}"
        assert [float(value) for value in cells(page, "evaluations", column(page, "evaluations", "eval_loss"))] == [
            row["eval_loss"] for row in data["evaluations"]
        ]
        drawn = page.evaluate("document.querySelector('#loss .chart').data[0].y")
        assert drawn == data["curves"]["loss"]["y"]
        final = dict(zip(texts(page, "#final dt"), page.eval_on_selector_all("#final dd", TITLES), strict=True))
        assert {name: float(value) for name, value in final.items()} == data["metrics"]
        assert cells(page, "data", column(page, "data", "tokens")) == ["23456"]
        assert "2 dropped: no label" in page.locator("#data .note").inner_text()
        assert "2 times a new one went on" in page.locator("#attempts .note").inner_text()
        assert page.locator("#recipe pre").text_content() == data["recipe"]


TITLES = "(all) => all.map((one) => one.title)"


def texts(page: Any, selector: str) -> list[str]:
    found: list[str] = page.eval_on_selector_all(selector, "(all) => all.map((one) => one.innerText)")
    return found


def test_report_of_a_sweep_shows_its_numbers(browser: Any, where: str, tmp_path: Path) -> None:
    folder = folders.write_sweep(where, "rates", 40)
    with watched(browser, offline=True) as page:
        data = opened(page, folder, tmp_path)
        best = data["best"]
        assert float(tile(page, "eval_accuracy")) == best["value"]
        assert float(tile(page, "train.learning_rate")) == best["fields"]["train.learning_rate"]
        trials = [int(value) for value in cells(page, "trials", 0)]
        assert len(trials) == 40
        assert trials[0] == best["trial"]
        by_number = {trial["trial"]: trial for trial in data["trials"]}
        for name, label in (("score", "eval_accuracy"), ("rows", "rows"), ("seconds", "seconds")):
            shown = cells(page, "trials", column(page, "trials", label))
            assert [None if value in ("–", "") else float(value) for value in shown] == [  # noqa: RUF001
                by_number[number][name] for number in trials
            ]
        rates = cells(page, "trials", column(page, "trials", "train.learning_rate"))
        assert [float(value) for value in rates] == [by_number[n]["fields"]["train.learning_rate"] for n in trials]
        bars = page.evaluate("(({x, y}) => [x, y])(document.querySelector('#importance .chart').data[0])")
        assert dict(zip(bars[1], bars[0], strict=True)) == data["importance"]["values"]
        assert page.evaluate("document.querySelector('#over .chart').layout.xaxis.type") == "log"
        page.locator("#parallel").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('#parallel .chart').data?.[0].dimensions.length === 4")
        assert "25 % of the rows were not trained on" in page.locator("#saved").inner_text()


def test_trials_sort_by_any_column_and_filter_by_words(browser: Any, where: str, tmp_path: Path) -> None:
    folder = folders.write_sweep(where, "rates", 40)
    with watched(browser, offline=True) as page:
        data = opened(page, folder, tmp_path)
        at = column(page, "trials", "train.learning_rate")
        head = page.locator("#trials th").nth(at)
        rates = sorted(trial["fields"]["train.learning_rate"] for trial in data["trials"])
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert [float(value) for value in cells(page, "trials", at)] == rates
        page.locator("#trials th").nth(at).locator("button").click()
        assert [float(value) for value in cells(page, "trials", at)] == rates[::-1]
        score = column(page, "trials", "eval_accuracy")
        for _ in range(2):  # what has no score stays at the end, in either direction
            page.locator("#trials th").nth(score).locator("button").click()
            assert cells(page, "trials", score)[-2:] == ["–", "–"]  # noqa: RUF001
        page.locator("#trials input").fill("failed memory")
        assert sorted(cells(page, "trials", 0)) == ["16", "33"]
        assert page.locator("#trials .count").inner_text() == "2 of 40 trials"
        page.locator("#trials input").fill("")
        assert len(cells(page, "trials", 0)) == 40


def test_two_discrete_fields_make_a_heat_map_of_the_best_scores(browser: Any, where: str, tmp_path: Path) -> None:
    folder = folders.write_sweep(where, "grid", 0, "running")
    for number in range(12):
        fields = {"train.learning_rate": (1e-5, 1e-4, 1e-3)[number % 3], "model.freeze.layers": (0, 2)[number // 3 % 2]}
        folders.write_trial(folder, number, **fields)
    recipe = storage.read_text(storage.join(folder, "recipe.yaml"))
    discrete = re.sub(r"log_uniform:\s+- 1.0e-05\s+- 0.01", "choice: [1.0e-5, 1.0e-4, 1.0e-3]", recipe)
    storage.write_text(storage.join(folder, "recipe.yaml"), discrete)
    with watched(browser, offline=True) as page:
        data = opened(page, folder, tmp_path)
        page.locator("#over select").nth(0).select_option("train.learning_rate")
        page.locator("#over select").nth(1).select_option("model.freeze.layers")
        drawn = page.evaluate("document.querySelector('#over .chart').data[0]")
        assert (drawn["type"], len(drawn["z"]), len(drawn["z"][0])) == ("heatmap", 3, 3)

        def best(rate: float, depth: int) -> float | None:
            wanted = {"train.learning_rate": rate, "model.freeze.layers": depth}
            scores = [trial["score"] for trial in data["trials"] if wanted.items() <= trial["fields"].items()]
            return max(scores, default=None)

        assert drawn["z"] == [[best(rate, depth) for rate in (1e-5, 1e-4, 1e-3)] for depth in (0, 2, 4)]
        assert drawn["z"][2] == [None, None, None]


def test_one_trial_alone_is_drawn_at_its_value_among_those_that_the_search_lists(
    browser: Any, where: str, tmp_path: Path
) -> None:
    folder = folders.write_sweep(where, "first", 0, "running")
    folders.write_trial(folder, 0, **{"train.learning_rate": 0.001, "model.freeze.layers": 0})
    with watched(browser, offline=True) as page:
        opened(page, folder, tmp_path)
        page.locator("#over select").nth(0).select_option("model.freeze.layers")
        page.locator("#over select").nth(1).select_option("model.freeze.layers")
        axis = page.evaluate("document.querySelector('#over .chart').layout.xaxis")
        assert (axis["tickvals"], axis["range"]) == ([0, 2, 4], [-0.4, 4.4])
        ticks = "#over .xtick text"
        places = page.eval_on_selector_all(ticks, "(all) => all.map((one) => one.getBoundingClientRect().x)")
        assert len(set(places)) == 3
        assert page.locator("#trials .count").inner_text() == "1 trial"


def test_values_that_begin_and_end_alike_are_categories_of_their_own(browser: Any, where: str, tmp_path: Path) -> None:
    paths = [f"/mnt/shared/models/checkpoints/m{number}/weights/of/step-001200/export" for number in range(4)]
    folder = folders.write_sweep(where, "paths", 0, "running")
    for number, path in enumerate(paths):
        folders.write_trial(folder, number, **{"model.path": path, "model.freeze.layers": 2})
    recipe = storage.read_text(storage.join(folder, "recipe.yaml"))
    search = f"  search:\n    model.path: {{choice: [{', '.join(paths)}]}}\n"
    storage.write_text(storage.join(folder, "recipe.yaml"), recipe.replace("  search:\n", search))
    with watched(browser, offline=True) as page:
        opened(page, folder, tmp_path)
        page.locator("#over select").nth(0).select_option("model.path")
        for field, axis in ((0, "x"), (1, "y")):
            page.locator("#over select").nth(field).select_option("model.path")
            page.locator("#over select").nth(1 - field).select_option("model.freeze.layers")
            drawn = page.evaluate("document.querySelector('#over .chart').data[0]")
            assert drawn[axis] == paths
        shown = page.evaluate("document.querySelector('#over .chart').layout.yaxis.ticktext")
        assert shown == ["/mnt/shar…step-001200/export"] * 4


def test_names_and_texts_are_never_taken_for_html(browser: Any, where: str, tmp_path: Path) -> None:
    folder = storage.join(where, "odd")
    folders.write_state(folder, "failed")
    storage.write_json(storage.join(folder, "recipe.yaml"), {"name": "odd", "tune": {"search": {}}, "task": NASTY})
    storage.write_json(storage.join(folder, "result.json"), {"status": "failed", "error": NASTY})
    for number in range(6):
        trial = folders.write_trial(folder, number)
        fields = {f"<b>{NASTY}": NASTY if number % 2 else "\ud800"}
        storage.write_text(storage.join(trial, "trial.json"), json.dumps({"trial": number, "fields": fields}))
    with watched(browser, offline=True) as page:
        scripts = list[str]()
        page.on("dialog", lambda dialog: scripts.append(dialog.message))
        opened(page, folder, tmp_path)
        assert NASTY in page.locator(".sentence").text_content()
        recipe = storage.read_text(storage.join(folder, "recipe.yaml"))
        assert page.locator("#recipe pre").text_content() == recipe
        assert f"<b>{NASTY}" in page.locator("#trials thead").text_content()
        assert scripts == []


def test_json_in_a_page_holds_no_sign_that_html_reads_and_no_number_that_json_lacks() -> None:
    data = {"name": NASTY, "values": [float("nan"), float("inf"), 0.1, (1, 2)]}
    text = pages.to_json(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"name": NASTY, "values": [None, None, 0.1, [1, 2]]}


def test_a_sweep_that_has_only_begun_has_a_page(browser: Any, where: str, tmp_path: Path) -> None:
    folder = folders.write_sweep(where, "young", 0, "running")
    with watched(browser, offline=True) as page:
        for step in range(3):
            if step == 1:
                storage.write_text(storage.join(folder, "trials", "00000", "trial.json"), '{"trial": 0, "fie')
            elif step == 2:
                folders.write_trial(folder, 0, "waiting")
                folders.write_trial(folder, 1, "running", steps=3)
            opened(page, folder, tmp_path)
            assert "too few trials" in page.locator("#importance .note").inner_text()
            assert page.locator("#curves .note").inner_text() == "no trial has been evaluated yet"


def test_pages_fit_the_width_of_their_screen(browser: Any, where: str, tmp_path: Path) -> None:
    folders.write_manifest(where)
    run, sweep = folders.write_run(where, "one"), folders.write_sweep(where, "rates", 6)
    result = storage.read_json(storage.join(run, "result.json"))
    result["metrics"]["test_" + "accuracy_of_the_class_with_a_name_of_its_own_" * 2] = 0.5
    storage.write_json(storage.join(run, "result.json"), result)
    with watched(browser, offline=True, color_scheme="dark") as page:
        for folder in (run, sweep):
            opened(page, folder, tmp_path)
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 800})
                page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")


def test_report_has_a_name_of_its_own_and_refuses_what_is_no_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = pages.write_report(folders.write_run(where, "team/one"))
    assert (done["report"], done["kind"]) == ("team-one.html", "run")
    assert (tmp_path / "team-one.html").exists()
    with pytest.raises(StorageMissing):
        pages.write_report(where)
