// Plain data to plotly figures. Each maker returns {traces, layout}, or null where there is nothing to draw.
"use strict";

const charts = (() => {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  // Plotly reads a little HTML in its texts; names of fields and trials are no HTML.
  const plain = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const word = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  // Paths of models and data tell themselves apart at their ends.
  const brief = (text) => (text.length > 28 ? text.slice(0, 9) + "…" + text.slice(-18) : text);
  const whole = (value) => plain(word(value));
  const short = (value) => plain(brief(word(value)));

  // The weakest colour is for the worst score, whichever direction is wanted.
  const scale = (mode) => {
    const ends = mode === "min" ? ["accent", "weak"] : ["weak", "accent"];
    return ends.map((name, place) => [place, color(name)]);
  };

  function mixed(share) {
    const hex = (name) => [1, 3, 5].map((at) => parseInt(color(name).slice(at, at + 2), 16));
    const [low, high] = [hex("weak"), hex("accent")];
    return "rgb(" + low.map((from, at) => Math.round(from + share * (high[at] - from))).join(",") + ")";
  }

  function draw(node, figure) {
    const axis = { gridcolor: color("grid"), zerolinecolor: color("line"), linecolor: color("line"), automargin: true };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: "kept",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("ink") },
      margin: { l: 52, r: 16, t: 10, b: 40 }, showlegend: figure.traces.length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { bgcolor: color("card"), bordercolor: color("line"), font: { color: color("ink") } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...figure.layout,
      xaxis: { ...axis, ...(figure.layout.xaxis || {}) }, yaxis: { ...axis, ...(figure.layout.yaxis || {}) },
    };
    Plotly.react(node, figure.traces, layout, { displayModeBar: false, responsive: true });
  }

  function title(text) {
    return { text: plain(text), font: { size: 12, color: color("faint") }, standoff: 8 };
  }

  // --- of a run

  const PALETTE = ["accent", "second", "third", "fourth", "fifth"];

  // lines: {name: {x, y}} over steps.
  function lines(named) {
    const traces = Object.entries(named).filter(([, line]) => line && line.x.length).map(([name, line], at) => ({
      name: plain(name), x: line.x, y: line.y, mode: line.x.length === 1 ? "markers" : "lines",
      line: { color: color(PALETTE[at % PALETTE.length]), width: 1.8 },
      marker: { color: color(PALETTE[at % PALETTE.length]) },
    }));
    if (!traces.length) return null;
    const yaxis = { exponentformat: "e" };
    return { traces, layout: { xaxis: { title: title("step") }, yaxis, hovermode: "x unified" } };
  }

  function lengths(splits) {
    const known = splits.filter((split) => Array.isArray(split.lengths) && split.lengths.length);
    if (!known.length) return null;
    const bounds = [...new Set(known.flatMap((split) => split.lengths.map(([bound]) => bound)))].sort((a, b) => a - b);
    const traces = known.map((split, at) => {
      const total = split.lengths.reduce((sum, [, count]) => sum + count, 0);
      const of = new Map(split.lengths);
      return {
        type: "bar", name: plain(split.split), x: bounds.map(String), y: bounds.map((b) => (of.get(b) || 0) / total),
        marker: { color: color(PALETTE[at % PALETTE.length]) }, hoverinfo: "text",
        hovertext: bounds.map((b) => `${plain(split.split)}: ${of.get(b) || 0} up to ${b}`),
      };
    });
    const xaxis = { type: "category", title: title("length in tokens, up to") };
    return { traces, layout: { xaxis, yaxis: { tickformat: ".0%", title: title("share of the split") } } };
  }

  // --- of a sweep

  const label = (trial) => `trial ${plain(trial.trial)}`;

  function hover(trial, metric) {
    const fields = Object.entries(trial.fields).map(([name, value]) => `${plain(name)}: ${short(value)}`);
    return [`<b>${label(trial)}</b> (${plain(trial.status)})`, `${plain(metric)}: ${trial.score}`, ...fields].join("<br>");
  }

  function learning(page) {
    const shown = page.curves.shown;
    if (!shown.length) return null;
    // The best is drawn last, on top of the others.
    const traces = shown.map((curve, rank) => ({
      name: label(curve), x: curve.x, y: curve.y, mode: curve.x.length === 1 ? "markers" : "lines", showlegend: false,
      line: { color: mixed(1 - rank / shown.length), width: rank ? 1.3 : 2.8 },
      marker: { color: mixed(1 - rank / shown.length) }, hoverinfo: "text",
      hovertext: curve.y.map((y, at) => `${label(curve)}<br>epoch ${curve.x[at]}<br>${plain(page.metric)}: ${y}`),
    })).reverse();
    return { traces, layout: { xaxis: { title: title("epoch") }, yaxis: { title: title(page.metric) } } };
  }

  const scored = (page) => page.trials.filter((trial) => trial.score !== null && trial.status !== "failed");
  const numeric = (values) => values.every((value) => typeof value === "number");

  // A category is known by its whole text, since short ones may be the same.
  function categories(values) {
    const known = [...new Map(values.map((value) => [whole(value), value])).values()];
    const order = known.map(whole);
    return { type: "category", categoryorder: "array", categoryarray: order, tickvals: order, ticktext: known.map(short) };
  }

  // The axis and the values of a field. Values that are no numbers are categories in their order.
  function along(axis, trials) {
    const values = trials.map((trial) => trial.fields[axis.name]);
    const known = [...(axis.choices || []), ...values];
    if (numeric(known)) {
      const span = Math.log10(Math.max(...values) / Math.min(...values));
      if (axis.log) return [{ type: "log", exponentformat: "e", dtick: span >= 2 ? 1 : "D2" }, values];
      if (!axis.choices) return [{ exponentformat: "e" }, values];
      const [low, high] = [Math.min(...known), Math.max(...known)];
      const beside = (high - low || Math.abs(low) || 1) / 10; // with one value so far there is no width to see it by
      return [{ exponentformat: "e", tickvals: axis.choices, range: [low - beside, high + beside] }, values];
    }
    return [categories(known), values.map(whole)];
  }

  function over(page, first, second) {
    const has = (axis) => (trial) => axis.name in trial.fields;
    const trials = scored(page).filter(has(first)).filter(second ? has(second) : () => true);
    if (!trials.length) return null;
    trials.sort((a, b) => (page.mode === "min" ? b.score - a.score : a.score - b.score)); // the best on top
    if (second && first.choices && second.choices) return grid(page, trials, first, second);
    const [xaxis, x] = along(first, trials);
    const [yaxis, y] = second ? along(second, trials) : [{}, trials.map((trial) => trial.score)];
    const bar = { thickness: 10, outlinewidth: 0, title: { text: plain(page.metric), side: "right", font: { size: 12, color: color("faint") } } };
    const trace = {
      x, y, mode: "markers", hoverinfo: "text", hovertext: trials.map((trial) => hover(trial, page.metric)),
      marker: {
        size: trials.length > 200 ? 6 : 10, color: trials.map((trial) => trial.score), colorscale: scale(page.mode),
        showscale: Boolean(second), colorbar: bar, line: { width: 0.6, color: color("faint") },
      },
    };
    xaxis.title = title(first.name);
    yaxis.title = title(second ? second.name : page.metric);
    return { traces: [trace], layout: { xaxis, yaxis } };
  }

  // The best score of the trials in each cell.
  function grid(page, trials, first, second) {
    const better = page.mode === "min" ? (a, b) => a < b : (a, b) => a > b;
    const at = (axis, trial) => axis.choices.findIndex((value) => word(value) === word(trial.fields[axis.name]));
    const cells = second.choices.map(() => first.choices.map(() => ({ best: null, count: 0 })));
    for (const trial of trials) {
      const cell = (cells[at(second, trial)] || [])[at(first, trial)];
      if (!cell) continue;
      cell.count += 1;
      if (cell.best === null || better(trial.score, cell.best.score)) cell.best = trial;
    }
    const each = (make) => cells.map((row) => row.map(make));
    const trace = {
      type: "heatmap", x: first.choices.map(whole), y: second.choices.map(whole), z: each((cell) => (cell.best ? cell.best.score : null)),
      text: each((cell) => (cell.best ? Number(cell.best.score.toPrecision(4)) : "")), texttemplate: "%{text}",
      hovertext: each((cell) => (cell.best ? `best of ${cell.count}: ` + hover(cell.best, page.metric) : "no trial yet")),
      hoverinfo: "text", colorscale: scale(page.mode), xgap: 2, ygap: 2, hoverongaps: false,
      colorbar: { thickness: 10, outlinewidth: 0 },
    };
    const axis = (one) => ({ ...categories(one.choices), title: title(one.name), showgrid: false });
    return { traces: [trace], layout: { xaxis: axis(first), yaxis: axis(second) } };
  }

  function parallel(page) {
    const ended = scored(page).filter((trial) => trial.status !== "running");
    const trials = ended.filter((trial) => page.axes.every((axis) => axis.name in trial.fields));
    if (trials.length < 2 || !page.axes.length) return null;
    const dimensions = page.axes.map((axis) => dimension(axis, trials));
    const scores = trials.map((trial) => trial.score);
    dimensions.push({ label: plain(page.metric), values: scores });
    const trace = {
      type: "parcoords", dimensions, line: { color: scores, colorscale: scale(page.mode) },
      labelfont: { color: color("faint") }, tickfont: { color: color("ink") }, rangefont: { color: "rgba(0,0,0,0)" },
      unselected: { line: { opacity: 0.06 } },
    };
    return { traces: [trace], layout: { margin: { l: 70, r: 60, t: 40, b: 20 } } };
  }

  function dimension(axis, trials) {
    const values = trials.map((trial) => trial.fields[axis.name]);
    const name = plain(brief(axis.name));
    if (axis.choices || !numeric(values)) {
      const known = axis.choices || [...new Map(values.map((value) => [word(value), value])).values()];
      const place = new Map(known.map((value, at) => [word(value), at]));
      const ticktext = known.map(short);
      const range = known.length > 1 ? [0, known.length - 1] : [-1, 1];
      return { label: name, values: values.map((v) => place.get(word(v))), tickvals: known.map((_, at) => at), ticktext, range };
    }
    if (!axis.log) return { label: name, values };
    const logs = values.map(Math.log10);
    const [low, high] = [Math.floor(Math.min(...logs)), Math.ceil(Math.max(...logs))];
    const tickvals = Array.from({ length: high - low + 1 }, (_, at) => low + at);
    const ticktext = tickvals.map((power) => String(Number((10 ** power).toPrecision(1))));
    return { label: name, values: logs, tickvals, ticktext, range: [low, Math.max(high, low + 1)] };
  }

  function importance(page) {
    const shares = page.importance.values;
    if (!shares) return null;
    const pairs = Object.entries(shares).sort((a, b) => a[1] - b[1]);
    const trace = {
      type: "bar", orientation: "h", x: pairs.map(([, share]) => share), y: pairs.map(([name]) => plain(name)),
      marker: { color: color("accent") }, hoverinfo: "text", textposition: "outside", cliponaxis: false,
      hovertext: pairs.map(([name, share]) => `${plain(name)}: ${share}`),
      text: pairs.map(([, share]) => share.toFixed(2)),
    };
    const layout = { xaxis: { range: [0, 1.08], title: title("share of the scores' spread") }, yaxis: { type: "category" } };
    return { traces: [trace], layout };
  }

  return { draw, lines, lengths, learning, over, parallel, importance };
})();
