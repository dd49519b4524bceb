// One page of a run, a sweep or an index: built once from the data in the page, then kept up to date in place.
"use strict";

// --- how values read

// Whole numbers are told in full, others to four digits; the title of `valued` holds the rest.
function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e6) return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 10 });
  return Number(value.toPrecision(4)).toExponential();
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${Number(seconds.toPrecision(4)) < 10 ? number(Number(seconds.toFixed(2))) : seconds.toFixed(0)} s`;
  const whole = Math.round(seconds);
  const two = (part) => String(part).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor((whole % 3600) / 60))}:${two(whole % 60)}`;
}

function moment(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const at = new Date(seconds * 1000);
  const two = (part) => String(part).padStart(2, "0");
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(Math.max(count, 1)) / 3)));
  return `${number(count / 1000 ** power)} ${units[power]}`;
}

const share = (value) => `${number(value * 100)} %`;
const counted = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;
const words = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const valued = (value, text) => ({ text: text === undefined ? number(value) : text, title: value === null || value === undefined ? undefined : String(value) });
const field = (value) => (typeof value === "number" ? valued(value) : { text: value === undefined || value === null ? "–" : words(value) });

// --- what pages are made of

const dark = matchMedia("(prefers-color-scheme: dark)");
const live = document.body.dataset.live || null; // where fresh data come from; none in a report
const link = (name) => (live ? "/run/" + name.split("/").map(encodeURIComponent).join("/") : null);
const statused = (status) => el("span", { class: `status ${status}` }, status);

function tile(label, shown, more) {
  const value = shown instanceof Node ? shown : el("span", { title: shown.title === undefined ? null : shown.title }, shown.text);
  return el("div", { class: "tile", "data-tile": label }, el("div", { class: "label" }, label),
    el("div", { class: "value" }, value), more ? el("div", { class: "more" }, more) : null);
}

function facts(pairs) {
  const node = el("dl", { class: "facts" });
  for (const [name, shown] of pairs) {
    const value = typeof shown === "string" ? { text: shown } : shown;
    node.append(el("dt", null, name), el("dd", { title: value.title === undefined ? null : value.title }, value.text));
  }
  return node;
}

// A part of the page with a heading; `show` hides it where it has nothing to say.
class Card {
  constructor(id, heading, wide, ...children) {
    this.note = el("p", { class: "note" });
    this.inner = el("div", null, ...children);
    this.node = el("section", { class: wide ? "card wide" : "card", id }, el("h2", null, heading), this.note, this.inner);
  }

  show(there, note) {
    this.node.hidden = !there;
    this.note.hidden = !note;
    this.note.textContent = note || "";
    return there;
  }
}

// One that lies `across` takes long to draw, and is drawn while it is on the screen or near it.
class Chart extends Card {
  constructor(id, heading, wide, across) {
    super(id, heading, wide);
    this.plot = el("div", { class: "chart" });
    this.inner.className = across ? "across" : "";
    this.inner.append(this.plot);
    this.figure = null;
    this.near = !across;
    const watch = (entries) => {
      this.near = entries[entries.length - 1].isIntersecting;
      this.paint();
    };
    if (across) new IntersectionObserver(watch, { rootMargin: "200px" }).observe(this.plot);
  }

  draw(figure, note) {
    this.inner.hidden = !figure;
    this.figure = figure;
    if (this.show(Boolean(figure || note), note)) this.paint();
  }

  paint() {
    if (!this.near || !this.figure) return;
    const looks = JSON.stringify([this.figure, dark.matches]);
    if (looks === this.looks) return; // of many trials, drawing takes far longer than comparing
    this.looks = looks;
    charts.draw(this.plot, this.figure);
  }
}

class Text extends Card {
  constructor(id, heading, summary) {
    const pre = el("pre");
    super(id, heading, true, el("details", null, el("summary", null, summary), pre));
    this.pre = pre;
  }

  say(text) {
    if (this.show(Boolean(text)) && this.pre.textContent !== text) this.pre.textContent = text;
  }
}

class Page {
  constructor(root, kind) {
    this.header = el("header");
    this.tiles = el("div", { class: "tiles" });
    this.cards = el("div", { class: "cards" });
    root.append(this.header, this.tiles, this.cards);
    Object.assign(this, kind);
    this.build();
  }

  add(card) {
    this.cards.append(card.node);
    return card;
  }

  head(data, kind) {
    document.title = `${data.name} - rayft`;
    const home = live ? el("a", { href: "/" }, "all runs") : null;
    const above = [home, home ? " · " : null, `${kind} in ${data.folder}`];
    const sentences = [...(data.error ? [data.error] : []), ...(data.warnings || [])].map((said) => el("p", { class: "sentence" }, said));
    const inner = [el("div", { class: "above" }, ...above.filter(Boolean)), el("h1", null, data.name), ...sentences];
    this.header.replaceChildren(...inner.filter(Boolean));
  }
}

// --- the index

const indexPage = {
  build() {
    this.table = new Table((row) => row.name, "run");
    this.card = this.add(new Card("runs", "Runs and sweeps", true, this.table.node));
  },
  update(data) {
    document.title = `${data.folder} - rayft`;
    this.header.replaceChildren(el("div", { class: "above" }, "storage"), el("h1", null, data.folder));
    this.tiles.hidden = true;
    this.card.show(true, data.runs.length ? "" : "there is no run yet; one that starts appears here");
    this.table.update([
      { name: "name", label: "run", kind: "text", value: (row) => row.name, cell: (row) => ({ text: row.name, href: link(row.name) }) },
      { name: "kind", label: "kind", value: (row) => row.kind, cell: (row) => ({ text: row.kind }) },
      { name: "status", label: "status", value: (row) => row.status, cell: (row) => ({ text: row.status, status: row.status }) },
      { name: "metric", label: "metric", value: (row) => row.metric, cell: (row) => ({ text: row.metric || "–" }) },
      { name: "value", label: "value", number: true, value: (row) => row.value, cell: (row) => valued(row.value) },
      { name: "steps", label: "steps", number: true, value: (row) => row.steps, cell: (row) => valued(row.steps) },
      { name: "trials", label: "trials", number: true, value: (row) => row.trials, cell: (row) => valued(row.trials) },
      { name: "seconds", label: "time", number: true, value: (row) => row.seconds, cell: (row) => valued(row.seconds, duration(row.seconds)) },
      { name: "started", label: "started", number: true, value: (row) => row.started, cell: (row) => valued(row.started, moment(row.started)) },
    ], data.runs);
  },
};

// --- a run

const runPage = {
  build() {
    this.loss = this.add(new Chart("loss", "Loss", true));
    this.scores = this.add(new Chart("scores", "Evaluation scores"));
    this.rate = this.add(new Chart("learning-rate", "Learning rate"));
    this.rows = this.add(new Chart("rows-per-s", "Rows per second"));
    this.tokens = this.add(new Chart("tokens-per-s", "Tokens per second"));
    this.final = this.add(new Card("final", "Scores of the exported model"));
    this.timing = this.add(new Card("timing", "Timing of the last attempt"));
    this.evaluations = new Table((row) => row.step, "evaluation", { small: true });
    this.evaluated = this.add(new Card("evaluations", "Evaluations", true, this.evaluations.node));
    this.splits = new Table((row) => row.split, "split", { small: true });
    this.data = this.add(new Card("data", "Data", true, this.splits.node));
    this.lengths = this.add(new Chart("lengths", "Lengths"));
    this.claims = new Table((row) => row.number, "attempt", { small: true });
    this.attempts = this.add(new Card("attempts", "Attempts", false, this.claims.node));
    this.recipe = this.add(new Text("recipe", "Recipe", "recipe.yaml, which gives the same run"));
  },
  update(data) {
    this.head(data, "run");
    const best = data.best || {};
    const took = data.timing.train_s;
    this.tiles.replaceChildren(...[
      tile("status", statused(data.status), data.started ? `started ${moment(data.started)}` : null),
      tile(best.metric || "best score", valued(best.value), best.step ? `step ${number(best.step)}` : null),
      tile("steps", valued(data.steps), data.epochs ? `${number(data.epochs)} epochs` : null),
      tile("time", valued(data.seconds, duration(data.seconds)), took ? `${duration(took)} of training` : null),
      data.timing.rows_per_s ? tile("rows/s", valued(data.timing.rows_per_s)) : null,
      tile("attempts", valued(data.attempts.length), data.host ? `on ${data.host}` : null),
      ...(data.trial ? Object.entries(data.trial.fields || {}).map(([name, value]) => tile(name, field(value))) : []),
    ].filter(Boolean));
    this.drawCurves(data);
    if (this.final.show(Object.keys(data.metrics).length > 0, data.export ? `model: ${data.export}` : "")) {
      this.final.inner.replaceChildren(facts(ordered(Object.keys(data.metrics)).map((name) => [name, valued(data.metrics[name])])));
    }
    if (this.timing.show(Object.keys(data.timing).length > 0)) {
      this.timing.inner.replaceChildren(facts(Object.entries(data.timing).map(([name, value]) => [name, field(value)])));
    }
    this.fillTables(data);
    this.recipe.say(data.recipe);
  },
  drawCurves(data) {
    const { loss, learning_rate, rows_per_s, tokens_per_s, ...rest } = data.curves;
    const { eval_loss, ...scores } = Object.fromEntries(Object.entries(rest).filter(([name]) => name.startsWith("eval_")));
    this.loss.draw(charts.lines({ loss, eval_loss }), loss ? "" : "no step yet");
    this.scores.draw(charts.lines(scores));
    this.rate.draw(charts.lines({ learning_rate }));
    this.rows.draw(charts.lines({ rows_per_s }));
    this.tokens.draw(charts.lines({ tokens_per_s }));
  },
  fillTables(data) {
    const value = (name, label) => ({ name, label: label || name, number: true, value: (row) => row[name], cell: (row) => valued(row[name]) });
    const total = (row, name) => (row[name] ? Object.values(row[name]).reduce((sum, one) => sum + one, 0) : 0);
    const names = [...new Set(data.evaluations.flatMap(Object.keys))].filter((name) => name !== "step" && name !== "epoch");
    const last = data.evaluations.length < data.evaluated ? `the last ${data.evaluations.length} of ${number(data.evaluated)}` : "";
    this.evaluated.show(data.evaluations.length > 0, last);
    this.evaluations.update([value("step"), value("epoch"), ...ordered(names).map((name) => value(name))], data.evaluations);
    this.data.show(data.data.length > 0, reasons(data.data));
    this.splits.update([
      { name: "split", label: "split", value: (row) => row.split, cell: (row) => ({ text: row.split }) },
      value("source_rows", "rows of the source"), value("rows", "prepared rows"), value("tokens"), value("longest"), value("truncated"),
      { name: "dropped", label: "dropped", number: true, value: (row) => total(row, "dropped"), cell: (row) => valued(total(row, "dropped")) },
      { name: "bad", label: "bad", number: true, value: (row) => (row.bad || {}).count, cell: (row) => valued((row.bad || {}).count) },
    ], data.data);
    this.lengths.draw(charts.lengths(data.data));
    const again = data.attempts.length - 1;
    const story = again > 0 ? `${counted(data.attempts.length, "worker group")}: ${counted(again, "time")} a new one went on where the one before it had ended` : "one worker group: nothing had to be started again";
    this.attempts.show(data.attempts.length > 0, story);
    this.claims.update([value("number", "attempt"),
      { name: "owner", label: "claimed by", kind: "text", value: (row) => row.host, cell: (row) => ({ text: row.host ? `process ${row.pid} on ${row.host}` : "–" }) },
      { name: "since", label: "claimed at", number: true, value: (row) => row.since, cell: (row) => valued(row.since, moment(row.since)) },
    ], data.attempts);
  },
};

// Test scores first, then validation; the loss last in its group.
function ordered(names) {
  const group = (name) => ({ test: 0, eval: 1 })[name.split("_")[0]] ?? 2;
  return [...names].sort((a, b) => group(a) - group(b) || Number(a.endsWith("loss")) - Number(b.endsWith("loss")));
}

function reasons(splits) {
  const found = [];
  for (const { split, dropped, bad, cut } of splits) {
    for (const [reason, count] of Object.entries(dropped || {})) found.push(`${split}: ${number(count)} dropped: ${reason}`);
    for (const example of ((bad || {}).examples || []).slice(0, 3)) found.push(`${split}: bad: ${example}`);
    if (cut && split === "validation") found.push(`validation: ${number(cut)} rows were cut from train`);
  }
  return found.join("; ");
}
