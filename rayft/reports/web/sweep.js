// The page of a sweep, and what starts the page and keeps it fresh.
"use strict";

const sweepPage = {
  build() {
    this.curves = this.add(new Chart("curves", "Learning curves", true));
    this.chosen = ["x", "y"].map((name) => el("select", { "aria-label": `field along ${name}` }));
    this.picked = null; // the fields that the reader chose; until then the two that matter most
    for (const select of this.chosen) {
      select.addEventListener("change", () => {
        this.picked = this.chosen.map((one) => one.value);
        this.drawOver();
      });
    }
    this.over = this.add(new Chart("over", "Score over two fields"));
    this.tools = el("div", { class: "tools" }, this.chosen[0], "by", this.chosen[1]);
    this.over.inner.before(this.tools);
    this.importance = this.add(new Chart("importance", "What each field matters"));
    this.parallel = this.add(new Chart("parallel", "All fields and the score", true, true));
    this.table = new Table((row) => row.trial, "trial", { sort: { name: "score", down: true } });
    this.trials = this.add(new Card("trials", "Trials", true, this.table.node));
    this.saved = this.add(new Card("saved", "Cost saved", true));
    this.best = this.add(new Text("best-recipe", "Best recipe", "best.yaml, the recipe of the best trial"));
    this.recipe = this.add(new Text("recipe", "Recipe", "recipe.yaml of the sweep"));
  },
  update(data) {
    const first = this.data === undefined;
    this.data = data;
    if (first) this.table.sort.down = data.mode !== "min";
    this.head(data, "sweep");
    this.fillTiles(data);
    const { of, shown } = data.curves;
    this.curves.draw(charts.learning(data), shown.length < of ? `the best ${shown.length} of ${number(of)} trials; the stronger the colour, the better the score` : of ? "the stronger the colour, the better the score" : "no trial has been evaluated yet");
    this.fillChoices(data);
    this.drawOver();
    const { values, why, trials } = data.importance;
    this.importance.draw(charts.importance(data), values ? `from ${counted(trials, "finished trial")}` : why);
    const parallel = charts.parallel(data);
    this.parallel.draw(parallel, parallel && "one line is one trial that has ended; drag along an axis to keep only those that pass there");
    this.fillTable(data);
    this.fillSaved(data);
    this.best.say(data.best_recipe);
    this.recipe.say(data.recipe);
  },
  fillTiles(data) {
    const best = data.best;
    const { running, waiting, interrupted, finished, stopped, failed } = data.counts;
    const rest = [[running, "running"], [waiting, "waiting"], [interrupted, "interrupted"]].filter(([count]) => count);
    const ended = [[stopped, "stopped early"], [failed, "failed"]].map(([count, what]) => `${number(count)} ${what}`);
    this.tiles.replaceChildren(...[
      tile("status", statused(data.status), data.started ? `started ${moment(data.started)}` : null),
      best ? tile(best.metric, valued(best.value), `trial ${best.trial}, the best`) : tile("best score", valued(null)),
      ...Object.entries((best || {}).fields || {}).map(([name, value]) => tile(name, field(value), "of the best trial")),
      tile("finished trials", valued(finished), data.planned ? `of ${number(data.planned)}; ${ended.join(", ")}` : ended.join(", ")),
      data.why ? tile("ended early", data.why.split(":")[0]) : null,
      rest.length ? tile("still to end", valued(rest.reduce((sum, [count]) => sum + count, 0)), rest.map(([count, what]) => `${number(count)} ${what}`).join(", ")) : null,
      tile("time", valued(data.seconds, duration(data.seconds)), [data.sampler, data.scheduler].filter(Boolean).join(", ")),
    ].filter(Boolean));
  },
  fillChoices(data) {
    const names = data.axes.map((axis) => axis.name);
    const shares = data.importance.values;
    const telling = shares ? [...names].sort((a, b) => shares[b] - shares[a]).slice(0, 2) : names.slice(0, 2);
    const kept = this.picked && this.picked.every((name) => names.includes(name)) ? this.picked : telling;
    this.tools.hidden = names.length < 2;
    this.chosen.forEach((select, at) => {
      if ([...select.options].map((one) => one.value).join("\n") !== names.join("\n")) {
        select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
      }
      if (kept[at]) select.value = kept[at];
    });
  },
  drawOver() {
    const [first, second] = this.chosen.map((select) => this.data.axes.find((axis) => axis.name === select.value));
    this.over.draw(first ? charts.over(this.data, first, second === first ? null : second) : null);
  },
  fillTable(data) {
    const plainly = (name, label) => ({ name, label: label || name, number: true, value: (row) => row[name], cell: (row) => valued(row[name]) });
    const fields = data.axes.map(({ name, choices }) => {
      const numeric = !choices || choices.every((value) => typeof value === "number");
      const value = (row) => (typeof row.fields[name] === "object" ? words(row.fields[name]) : row.fields[name]);
      return { name: `field ${name}`, label: name, number: numeric, kind: "text", value, cell: (row) => field(row.fields[name]) };
    });
    const failed = data.trials.some((row) => row.error);
    this.table.update([
      { name: "trial", label: "trial", number: true, value: (row) => row.trial, cell: (row) => ({ text: String(row.trial), href: link(`${data.name}/trials/${row.folder}`) }) },
      { name: "status", label: "status", kind: "name", value: (row) => row.status, cell: (row) => ({ text: row.status, status: row.status }) },
      ...fields,
      plainly("score", data.metric || "score"), plainly("epoch", "epochs"), plainly("rows"),
      { name: "seconds", label: "seconds", number: true, value: (row) => row.seconds, cell: (row) => valued(row.seconds) },
      ...(failed ? [{ name: "error", label: "error", kind: "text", value: (row) => row.error, cell: (row) => ({ text: row.error || "" }) }] : []),
    ], data.trials.map((row) => ({ ...row, best: Boolean(data.best) && row.trial === data.best.trial })));
  },
  fillSaved(data) {
    const { stopping, cache } = data;
    const pairs = [];
    if (stopping) {
      pairs.push(["early stopping", valued(stopping.share, `${share(stopping.share)} of the rows were not trained on`)]);
      const trained = `${number(stopping.rows)} rows instead of about ${number(Math.round(stopping.full))}; ${counted(stopping.stopped, "trial")} ended early`;
      pairs.push(["", { text: trained, title: `${stopping.rows} / ${stopping.full}` }]);
    }
    if (cache && cache.saved_s !== undefined) pairs.push(["cache of frozen blocks", valued(cache.saved_s, `${duration(cache.saved_s)} of computing saved`)]);
    if (cache && cache.seconds !== undefined) {
      const made = `${duration(cache.seconds)} to make, ${bytes(cache.bytes)}, below ${cache.depths.length === 1 ? "depth" : "depths"} ${cache.depths.join(", ")}`;
      pairs.push(["", { text: made, title: `${cache.seconds} s, ${cache.bytes} bytes` }]);
    }
    if (this.saved.show(pairs.length > 0)) this.saved.inner.replaceChildren(facts(pairs));
  },
};

// --- from the data in the page, or from the server that serves it

const root = document.getElementById("page");
const alarm = document.getElementById("alarm");
const POLL_MS = 2000;
let page = null;
let data = JSON.parse(document.getElementById("data").textContent);
let version = document.body.dataset.version || null;

function show() {
  if (page === null || page.kind !== data.kind) {
    root.replaceChildren();
    page = new Page(root, { index: indexPage, run: runPage, sweep: sweepPage }[data.kind]);
    page.kind = data.kind;
  }
  page.update(data);
  document.body.dataset.shown = version || "report";
}

async function refresh() {
  try {
    const answer = await fetch(live, { headers: version ? { "If-None-Match": version } : {}, cache: "no-store" });
    if (answer.status === 200) {
      data = await answer.json();
      version = answer.headers.get("ETag");
      show();
    }
    const calm = answer.status === 200 || answer.status === 304;
    if (!calm) alarm.textContent = (await answer.text()).trim();
    alarm.hidden = calm;
  } catch (error) {
    alarm.textContent = "the dashboard does not answer; what is shown here is the last that it said";
    alarm.hidden = false;
  }
  setTimeout(refresh, POLL_MS);
}

show();
dark.addEventListener("change", show);
if (live) setTimeout(refresh, POLL_MS);
