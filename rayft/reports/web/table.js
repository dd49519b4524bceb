// A table that can be sorted by its columns and filtered, and that keeps both while its rows change.
"use strict";

// An element with attributes and children; text goes in as text, never as HTML.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) if (value !== null) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Column: {name, label, value(row), cell(row) -> {text, title, href, status}, number: aligned and sorted as such}.
class Table {
  constructor(key, noun, { sort = null, small = false } = {}) {
    this.key = key; // row -> what identifies it
    this.noun = noun; // of one row
    this.sort = sort; // {name, down}
    this.small = small; // nothing to filter while there are few rows
    this.rows = [];
    this.columns = [];
    this.made = new Map(); // key -> {tr, shown}
    this.head = el("tr");
    this.body = el("tbody");
    this.filter = el("input", { type: "search", placeholder: `filter ${noun}s`, "aria-label": `filter ${noun}s` });
    this.count = el("span", { class: "count" });
    this.filter.addEventListener("input", () => this.arrange());
    const table = el("table", null, el("thead", null, this.head), this.body);
    this.tools = el("div", { class: "tools" }, this.filter, this.count);
    this.node = el("div", null, this.tools, el("div", { class: "scroll" }, table));
  }

  update(columns, rows) {
    if (JSON.stringify(columns.map((one) => one.label)) !== JSON.stringify(this.columns.map((one) => one.label))) {
      this.made.clear();
    }
    this.columns = columns;
    this.rows = rows;
    this.tools.hidden = this.small && rows.length <= 20;
    const keys = new Set(rows.map(this.key));
    for (const key of this.made.keys()) if (!keys.has(key)) this.made.delete(key);
    for (const row of rows) this.fill(row);
    this.heads();
    this.arrange();
  }

  heads() {
    const direction = (one) => (this.sort && this.sort.name === one.name ? (this.sort.down ? "descending" : "ascending") : null);
    this.head.replaceChildren(...this.columns.map((one) => {
      const button = el("button", { type: "button", title: `sort by ${one.label}` }, one.label);
      button.addEventListener("click", () => {
        const again = this.sort && this.sort.name === one.name;
        this.sort = { name: one.name, down: again ? !this.sort.down : false };
        this.heads();
        this.arrange();
      });
      return el("th", { class: one.number ? "number" : null, "aria-sort": direction(one), scope: "col" }, button);
    }));
  }

  fill(row) {
    const cells = this.columns.map((one) => one.cell(row));
    const shown = JSON.stringify([cells, row.best]);
    const kept = this.made.get(this.key(row));
    if (kept && kept.shown === shown) return;
    const nodes = this.columns.map((one, at) => {
      const { text, title, href, status } = cells[at];
      const inner = href ? el("a", { href }, text) : status ? el("span", { class: `status ${status}` }, text) : text;
      return el("td", { class: one.number ? "number" : one.kind || null, title: title === undefined ? null : title }, inner);
    });
    const tr = kept ? kept.tr : el("tr", { "data-key": String(this.key(row)) });
    tr.className = row.best ? "best" : "";
    tr.replaceChildren(...nodes);
    this.made.set(this.key(row), { tr, shown, words: cells.map((cell) => `${cell.text} ${cell.title || ""}`).join(" ").toLowerCase() });
  }

  arrange() {
    const wanted = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row) => wanted.every((word) => this.made.get(this.key(row)).words.includes(word));
    const rows = this.sorted(this.rows.filter(fits)).map((row) => this.made.get(this.key(row)).tr);
    const there = this.body.children;
    if (rows.length !== there.length || rows.some((row, at) => row !== there[at])) this.body.replaceChildren(...rows);
    const all = `${this.rows.length.toLocaleString("en")} ${this.noun}${this.rows.length === 1 ? "" : "s"}`;
    this.count.textContent = wanted.length ? `${rows.length.toLocaleString("en")} of ${all}` : all;
  }

  // What has no value is last, in either direction; equal ones stay in their order.
  sorted(rows) {
    const column = this.sort && this.columns.find((one) => one.name === this.sort.name);
    if (!column) return rows;
    const sign = this.sort.down ? -1 : 1;
    const missing = (value) => value === null || value === undefined;
    return rows.map((row) => [column.value(row), row]).sort(([a], [b]) => {
      if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      return sign * String(a).localeCompare(String(b), "en", { numeric: true });
    }).map(([, row]) => row);
  }
}
