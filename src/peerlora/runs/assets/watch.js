"use strict";
// The page of one federation or of a comparison. It asks its own server only: one stream of events, and one client's
// curves when they are wanted.
const PALETTE = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44aa99", "#999933", "#882255"];
const FEW = 60;
const $ = (id) => document.getElementById(id);
const cell = new URLSearchParams(location.search).get("cell");
const query = cell === null ? "" : "?cell=" + encodeURIComponent(cell);
const state = { meta: {}, rounds: new Map(), loss: new Map(), score: new Map(), links: {}, notices: [], clients: {}, final: null };
let standing = {}, chosen = "", one = null, plots = {}, due = false, began = null;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const known = (v) => v !== null && v !== undefined && Number.isFinite(v);
const fixed = (v, d = 3) => (known(v) ? v.toFixed(d) : "–");
const small = (v) => (!known(v) ? "–" : v === 0 ? "0" : Math.abs(v) < 0.001 ? v.toExponential(1) : v.toPrecision(3));
function bytes(v) {
  if (!known(v)) return "–";
  for (const [size, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) if (v >= size) return (v / size).toPrecision(3) + " " + unit;
  return v + " B";
}
function span(seconds) {
  if (!known(seconds)) return "–";
  if (seconds < 90) return Math.round(seconds) + " s";
  return seconds < 5400 ? Math.round(seconds / 60) + " min" : (seconds / 3600).toFixed(1) + " h";
}
const nameOf = (client) => (state.meta.names || {})[client] || "client " + client;
function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// What fails is shown, and the page goes on with the next message.
function guarded(where, act) {
  return (...given) => { try { act(...given); trouble(where, ""); } catch (error) { trouble(where, String(error)); } };
}
const troubles = {};
function trouble(where, text) {
  if ((troubles[where] || "") === text) return;
  troubles[where] = text;
  const all = Object.values(troubles).filter(Boolean);
  $("trouble").hidden = !all.length;
  $("trouble").textContent = all.length ? `Not all is shown: ${all.join("; ")}` : "";
}
const largest = (values, least) => { for (const value of values) if (value > least) least = value; return least; };
const smallest = (values, most) => { for (const value of values) if (value < most) most = value; return most; };

function merge(data, anew) {
  if (anew) { for (const name of ["rounds", "loss", "score"]) state[name] = new Map(); state.links = {}; state.notices = []; began = null; }
  if (data.meta) state.meta = data.meta;
  for (const name of ["rounds", "loss", "score"]) for (const entry of data[name] || []) state[name].set(entry.x, entry);
  Object.assign(state.links, data.links || {});
  const latest = Object.keys(state.links).map(Number).sort((a, b) => a - b);
  for (const old of latest.slice(0, -8)) delete state.links[old];
  const last = state.notices.length ? state.notices[state.notices.length - 1].n : -1;
  state.notices.push(...(data.notices || []).filter((each) => each.n > last));
  const kept = (warnings) => state.notices.filter((each) => (each.level === "warning") === warnings).slice(-500);
  state.notices = [...kept(true), ...kept(false)].sort((a, b) => a.n - b.n);
  state.clients = data.clients || state.clients;
  state.final = data.final || null;
  if (began === null && state.rounds.size) began = { at: performance.now(), done: state.rounds.size };
  later();
}

function later() {  // one drawing per frame, however many messages come
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; const at = performance.now(); guarded("drawing", draw)(); queueMicrotask(() => { window.lastDrawing = performance.now() - at; }); });  // uPlot draws in microtasks, too
}

function sorted(map) { return [...map.values()].sort((a, b) => a.x - b.x); }

function draw() {
  const meta = state.meta;
  if (!meta.method) { $("lead").textContent = standing.state === "waiting" ? "Waiting for the run to begin …" : "The run has written nothing yet."; return; }
  document.title = `${meta.method}: ${done()} of ${meta.rounds}`;
  $("title").textContent = `${cell ? cell + ": " : ""}${meta.method}, ${meta.clients} clients, ${meta.topology || "?"} graph`;
  drawLead(); drawTiles(); drawPlots(); drawGraph(); drawPick(); drawTable(); drawNotices();
}

function done() {
  const each = Object.values(state.clients.done || {});
  return each.length ? smallest(each, Infinity) : largest(state.rounds.keys(), 0);
}

function drawLead() {
  const at = done(), rounds = state.meta.rounds, words = { running: "running", stopped: "stopped", finished: "finished", waiting: "waiting" };
  let text = `${words[standing.state] || "…"}: ${at} of ${rounds} rounds`;
  const entries = sorted(state.rounds).slice(-20);
  const pace = entries.reduce((sum, e) => sum + (e.seconds_train || 0) + (e.seconds_mix || 0), 0) / Math.max(1, entries.length);
  let left = pace * (rounds - at);
  if (began && state.rounds.size > began.done + 2) left = (performance.now() - began.at) / 1000 / (state.rounds.size - began.done) * (rounds - at);
  if (standing.state === "running" && at && at < rounds) text += `, about ${span(left)} left`;
  if ($("lead").textContent !== text) $("lead").textContent = text;
  const share = Math.round(100 * at / rounds);
  $("bar").firstElementChild.style.width = share + "%";
  $("bar").setAttribute("aria-valuenow", share);
}

function drawTiles() {
  const last = sorted(state.rounds).at(-1) || {}, score = sorted(state.score).at(-1) || {}, loss = sorted(state.loss).at(-1) || {};
  const total = sorted(state.rounds).reduce((sum, e) => sum + (e.bytes_sent || 0), 0);
  const tiles = [[`${state.meta.metric}, mean client`, fixed(score.mean)], [`worst: ${score.who === null || score.who === undefined ? "–" : nameOf(score.who)}`, fixed(score.worst)],
    ["training loss", fixed(loss.mean)], ["consensus distance", small(last.consensus_product)], ["cross-term", small(last.cross_term)],
    ["links in the last round", known(last.contacts) ? String(last.contacts) : "–"], ["sent", bytes(total)]];
  if (state.final) tiles.splice(2, 0, [`at the end, on ${state.final.rows} rows`, `${fixed(state.final.mean)} (worst ${fixed(state.final.worst)})`]);
  if (known(last.virtual_seconds)) tiles.push(["virtual time", span(last.virtual_seconds)]);
  if (standing.processes) tiles.push(["memory", bytes(standing.memory)], ["processor time", span(standing.cpu)]);
  const box = $("tiles");
  if (box.children.length !== tiles.length) box.replaceChildren(...tiles.map(() => { const d = element("div", null); d.append(element("dt", ""), element("dd", "")); return d; }));
  tiles.forEach(([name, value], i) => { box.children[i].firstChild.textContent = name; box.children[i].lastChild.textContent = value; });
}

function clientSeries(entries) {
  const few = entries.length && entries[0].all, xs = entries.map((e) => e.x);
  const series = [], data = [xs];
  const add = (label, values, look) => { series.push({ label, value: (_, v) => small(v), ...look }); data.push(values); };
  if (few) entries[0].all.forEach((_, client) => add(nameOf(client), entries.map((e) => e.all[client]), { thin: true, client }));
  else if (entries.some((e) => e.band)) {
    const names = entries.some((e) => e.whole) ? ["highest client", "lowest client"] : ["95 % of clients", "5 % of clients"];
    [4, 0].forEach((at, i) => add(names[i], entries.map((e) => e.band && e.band[at]), { edge: true }));
  }
  add("mean", entries.map((e) => e.mean), { line: "--mean", width: 2.5 });
  add("worst", entries.map((e) => e.worst), { line: "--worst", width: 1.8, dash: [6, 4] });
  return { series, data, banded: !few && data.length > 3 };
}

function options(width, height, series, extra = {}) {
  const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
  const looks = series.map((s) => ({ label: s.label, value: s.value, scale: "y", spanGaps: true, width: s.thin ? (String(s.client) === chosen ? 2 : 1) : s.edge ? 0 : s.width || 2, dash: s.dash, show: true,
    stroke: s.thin ? (String(s.client) === chosen ? css("--third") : css("--thin")) : s.edge ? css("--thin") : css(s.line), points: { show: (u) => u.data[0].length < 26 && !s.thin && !s.edge } }));
  return { width, height, scales: { x: { time: false }, y: extra.log ? { distr: 3 } : { range: extra.zero ? (u, min, max) => [0, (max || 1) * 1.05] : undefined } },
    axes: [axis, { ...axis, size: 62, values: (u, splits) => splits.map((v) => (v === null ? "" : extra.format ? extra.format(v) : small(v))) }],
    series: [{ label: "round", value: (_, v) => (v === null ? "–" : String(v)) }, ...looks], bands: extra.bands, hooks: { setSeries: [showRows] }, cursor: { focus: { prox: 24 }, drag: { x: true, y: false } }, focus: { alpha: 0.35 }, legend: { live: true } };
}

// Of many clients, the legend names the one that is chosen and the one that the pointer is near.
function showRows(chart, focused) {
  const rows = chart.root.querySelectorAll(".u-legend .u-series");
  (chart.lines || []).forEach((s, i) => { rows[i + 1].hidden = s.edge || (s.thin && chart.many && i + 1 !== focused && String(s.client) !== chosen); });
}

function plot(id, label, series, data, extra = {}) {
  const box = $(id), width = Math.max(240, box.clientWidth), height = innerWidth < 600 ? 190 : 230;
  const shape = JSON.stringify([series.map((s) => s.label), width, chosen, extra.look]);
  if (plots[id] && plots[id].shape === shape) { plots[id].chart.setData(data); return; }
  if (plots[id]) plots[id].chart.destroy();
  const chart = new uPlot(options(width, height, series, extra), data, box);
  chart.lines = series; chart.many = series.filter((s) => s.thin).length > (innerWidth < 600 ? 0 : 12);
  showRows(chart, null);
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  plots[id] = { chart, shape };
}

function drawPlots() {
  const scored = sorted(state.score), lost = sorted(state.loss), rounds = sorted(state.rounds);
  $("score-title").textContent = `${state.meta.metric} of the clients' own models, by round`;
  $("score-hint").textContent = `${state.meta.higher ? "Higher" : "Lower"} is better. Drag to zoom, double click to see all.`;
  if (scored.length) withClients("score", `${state.meta.metric} by round; latest mean ${fixed(scored.at(-1).mean)}`, scored);
  if (lost.length) withClients("loss", `training loss by round; latest mean ${fixed(lost.at(-1).mean)}`, lost);
  if (!rounds.length) return;
  const xs = rounds.map((e) => e.x), positive = (name) => rounds.map((e) => (e[name] > 0 ? e[name] : null));
  const apart = [["consensus distance of B·A", "consensus_product", "--mean"], ["cross-term", "cross_term", "--worst", [6, 4]]];
  const some = apart.some(([, name]) => positive(name).some(known));
  if (some) plot("apart", "consensus distance and cross-term by round", apart.map(([l, , line, dash]) => ({ label: l, line, dash, value: (_, v) => small(v) })), [xs, ...apart.map(([, name]) => positive(name))], { log: true });
  let sum = 0;
  plot("bytes", "bytes sent by all clients so far", [{ label: "sent", line: "--mean", value: (_, v) => bytes(v) }], [xs, rounds.map((e) => (sum += e.bytes_sent || 0))], { zero: true, format: bytes });
}

function withClients(id, label, entries) {
  const { series, data, banded } = clientSeries(entries);
  if (one && one[id] && !(entries[0].all)) {
    const own = new Map(one[id].x.map((x, i) => [x, one[id].y[i]]));
    series.push({ label: nameOf(chosen), line: "--third", width: 2, value: (_, v) => small(v) });
    data.push(entries.map((e) => own.get(e.x) ?? null));
  }
  plot(id, label, series, data, banded ? { bands: [{ series: [1, 2], fill: css("--band") }], look: "band" } : {});
}

const SHORT = { absent: "absent", "absent or late": "absent", late: "late", refused: "refused", "catching up": "catching" };
const MARK = { absent: "", "absent or late": "", late: "◐", refused: "✕", "catching up": "▲" };

function drawGraph() {
  const clients = state.meta.clients, rounds = Object.keys(state.links).map(Number).sort((a, b) => a - b), now = rounds.at(-1);
  $("graph-round").textContent = now || 0;
  const status = state.clients.status || {};
  const busy = new Set((state.links[now] || []).flat());
  const key = JSON.stringify([clients, now, status, chosen, standing.state]);
  if ($("graph").dataset.key === key) return;
  $("graph").dataset.key = key;
  $("graph-hint").textContent = clients <= FEW ? "Moving links: the last round; thin ones: the rounds before it." : "One square a client: the stronger its colour, the larger its loss.";
  $("key-absent").textContent = Object.values(status).includes("absent or late") ? "absent or late" : "absent";
  clients <= FEW ? drawCircle(clients, rounds, now, status, busy) : drawField(clients, now, status, busy);
}

function drawCircle(clients, rounds, now, status, busy) {
  const R = 150, at = (c) => { const a = -Math.PI / 2 + 2 * Math.PI * c / clients; return [190 + R * Math.cos(a), 190 + R * Math.sin(a)]; };
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
  const make = (tag, attributes, parent = svg) => { const e = document.createElementNS(ns, tag); for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); parent.append(e); return e; };
  svg.setAttribute("viewBox", "0 0 380 380");
  svg.setAttribute("role", "group");
  svg.setAttribute("aria-label", `${(state.links[now] || []).length} links in round ${now || 0}`);
  svg.classList.toggle("live", standing.state === "running");
  const before = new Map();
  for (const t of rounds.slice(0, -1)) for (const [a, b] of state.links[t]) before.set(a + "-" + b, [a, b]);
  const line = ([a, b], cls) => { const [x1, y1] = at(a), [x2, y2] = at(b); make("line", { x1, y1, x2, y2, class: cls }); };
  for (const pair of before.values()) line(pair, "link");
  for (const pair of state.links[now] || []) line(pair, "link now");
  const r = Math.max(8, Math.min(17, 400 / clients));
  for (let c = 0; c < clients; c++) {
    const [x, y] = at(c), what = status[c], g = make("g", { class: `node s-${SHORT[what] || "ok"}${String(c) === chosen ? " chosen" : ""}`, tabindex: 0, role: "button", "aria-pressed": String(c) === chosen,
      "aria-label": `${nameOf(c)}: ${what || (busy.has(c) ? "exchanged" : "no exchange")}, loss ${fixed((state.clients.loss || [])[c])}, ${state.meta.metric} ${fixed((state.clients.score || [])[c])}` });
    make("circle", { cx: x, cy: y, r }, g);
    make("text", { x, y }, g).textContent = c;
    if (MARK[what]) { const [mx, my] = [190 + (R + 26) * (x - 190) / R, 190 + (R + 26) * (y - 190) / R]; const m = make("text", { x: mx, y: my, class: "mark" }, g); m.textContent = MARK[what]; }
    make("title", {}, g).textContent = g.getAttribute("aria-label");
    g.addEventListener("click", () => choose(c));
    g.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); choose(c); } });
  }
  const focused = document.activeElement && document.activeElement.closest("#graph .node");
  const index = focused ? [...$("graph").querySelectorAll(".node")].indexOf(focused) : -1;
  $("graph").replaceChildren(svg);
  if (index >= 0) $("graph").querySelectorAll(".node")[index].focus();
}

function drawField(clients, now, status, busy) {  // many clients: one square each, the darker the larger its loss
  const box = $("graph"), width = box.clientWidth || 300, columns = Math.ceil(Math.sqrt(clients * 1.4)), size = width / columns;
  let canvas = box.querySelector("canvas");
  if (!canvas) {
    canvas = element("canvas", null, { role: "img" });
    canvas.addEventListener("click", (e) => { const s = canvas.clientWidth / +canvas.dataset.columns; const c = Math.floor(e.offsetY / s) * +canvas.dataset.columns + Math.floor(e.offsetX / s); if (c < state.meta.clients) choose(c); });
    box.replaceChildren(canvas);
  }
  canvas.dataset.columns = columns;
  const scale = devicePixelRatio || 1;
  canvas.width = width * scale; canvas.height = Math.ceil(clients / columns) * size * scale;
  const pen = canvas.getContext("2d"), loss = state.clients.loss || [], values = loss.filter(known), low = smallest(values, Infinity), high = largest(values, -Infinity);
  pen.scale(scale, scale);
  const ok = css("--ok"), colours = { absent: css("--soft"), "absent or late": css("--soft"), late: css("--late"), refused: css("--refused"), "catching up": css("--catching") };
  for (let c = 0; c < clients; c++) {
    const x = (c % columns) * size, y = Math.floor(c / columns) * size, share = known(loss[c]) && high > low ? (loss[c] - low) / (high - low) : 0;
    pen.globalAlpha = status[c] ? 1 : 0.15 + 0.85 * share;
    pen.fillStyle = colours[status[c]] || ok;
    pen.fillRect(x + 0.5, y + 0.5, size - 1, size - 1);
    pen.globalAlpha = 1;
    if (String(c) === chosen || (busy.has(c) && size > 7)) { pen.strokeStyle = String(c) === chosen ? css("--worst") : css("--ink"); pen.lineWidth = String(c) === chosen ? 3 : 0.6; pen.strokeRect(x + 1, y + 1, size - 2, size - 2); }
  }
  canvas.setAttribute("aria-label", `${clients} clients as squares, the darker the larger the loss (${fixed(low)} to ${fixed(high)}); ${(state.links[now] || []).length} links in round ${now || 0}. The table below has the same numbers.`);
}

function drawPick() {
  if ($("pick").options.length === state.meta.clients + 1) return;
  $("pick").replaceChildren(new Option("all", ""), ...Array.from({ length: state.meta.clients }, (_, c) => new Option(nameOf(c), c)));
  $("pick").value = chosen;
}

async function choose(client) {
  chosen = String(client) === chosen || client === "" ? "" : String(client);
  $("pick").value = chosen;
  one = null;
  if (chosen !== "") await fetchOne();
  guarded("client", drawOne)(); later();
}

function drawOne() {
  $("one").hidden = !one;
  if (!one) return;
  const last = (curve) => curve.y.filter(known).at(-1);
  $("one-title").textContent = nameOf(chosen);
  $("one-facts").textContent = `${state.meta.metric} ${fixed(last(one.score))}, loss ${fixed(last(one.loss))}` + (one.met === null ? "" : `; exchanged in ${one.met} rounds`) + (one.last === null ? "" : `, last in round ${one.last}`) + (one.bytes.y.length ? `; sent ${bytes(one.bytes.y.at(-1))}` : "") + (one.environment ? `; acts in ${one.environment}` : "") + (one.notices.length ? `; ${one.notices.length} events about it, see below` : "");
  const box = $("one-labels"), total = (one.labels || []).reduce((a, b) => a + b, 0);
  box.replaceChildren();
  if (!total) return;
  const bars = element("div", null, { class: "bars", role: "img", "aria-label": "rows of each label" }), words = [];
  one.labels.forEach((rows, i) => {
    if (!rows) return;
    const part = element("span", null, { title: `${(state.meta.labels || [])[i] ?? i}: ${rows}` });
    part.style.background = PALETTE[i % PALETTE.length]; part.style.width = 100 * rows / total + "%";
    bars.append(part); words.push(`${(state.meta.labels || [])[i] ?? i}: ${rows}`);
  });
  box.append(bars, element("p", "Rows by label: " + words.join(", "), { class: "hint" }));
}

function drawTable() {
  if (!$("table-box").open) return;
  const { loss = [], score = [], status = {}, done = {} } = state.clients, sign = state.meta.higher ? 1 : -1;
  const order = Array.from({ length: state.meta.clients }, (_, c) => c).sort((a, b) => sign * (score[a] ?? sign * 1e300) - sign * (score[b] ?? sign * 1e300)).slice(0, 200);
  const head = element("tr", null); head.append(...["client", state.meta.metric, "loss", "rounds", "state"].map((w) => element("th", w, { scope: "col" })));
  const last = largest(state.rounds.keys(), 0), rows = order.map((c) => {
    const row = element("tr", null), th = element("th", null, { scope: "row" }), b = element("button", nameOf(c));
    b.addEventListener("click", () => choose(c)); th.append(b);
    row.append(th, ...[fixed(score[c]), fixed(loss[c]), String(done[c] ?? last), status[c] || "takes part"].map((t) => element("td", t)));
    return row;
  });
  const thead = element("thead", null), tbody = element("tbody", null); thead.append(head); tbody.append(...rows);
  $("table").replaceChildren(thead, tbody);
}

function drawNotices() {
  const level = $("level").value, word = $("filter").value.toLowerCase(), of = chosen === "" ? state.notices : one ? one.notices : [];
  const kind = (n) => (n.level === "good" ? "info" : n.level);
  const shown = of.filter((n) => (!level || kind(n) === level) && (!word || n.text.toLowerCase().includes(word)));
  const key = JSON.stringify([shown.length, shown.at(-1) && [shown.at(-1).n, shown.at(-1).round], level, word, chosen]);
  if ($("notices").dataset.key === key) return;
  $("notices").dataset.key = key;
  $("notices").replaceChildren(...shown.slice(-200).reverse().map((n) => {
    const item = element("li", null, { class: n.level });
    const who = state.meta.peers && n.clients.length ? nameOf(n.clients[0]) + ", " : "";
    item.append(element("b", `${who}round ${n.round}${n.level === "warning" ? ", warning" : ""}`), n.text);
    return item;
  }));
  if (!shown.length) $("notices").append(element("li", "No events."));
}

function drawGrid(data) {
  $("grid").hidden = false; $("run").hidden = true;
  const cells = data.cells, over = cells.filter((c) => c.state === "finished").length;
  $("title").textContent = `${data.folder}: a comparison`; document.title = `${data.folder}: ${over} of ${cells.length}`;
  $("lead").textContent = `${over} of ${cells.length} trials finished, ${cells.filter((c) => c.state === "running").length} running`;
  $("bar").firstElementChild.style.width = 100 * over / Math.max(1, cells.length) + "%"; $("bar").setAttribute("aria-valuenow", Math.round(100 * over / Math.max(1, cells.length)));
  const lines = new Map(), columns = [];
  for (const c of cells) {
    const [, line, seed] = /^(.*?)(__.*)?$/.exec(c.name), column = (seed || "").replace(/__/g, " ").trim() || "run";
    if (!lines.has(line)) lines.set(line, new Map());
    if (!columns.includes(column)) columns.push(column);
    lines.get(line).set(column, c);
  }
  const values = cells.map((c) => c.mean).filter(known), low = smallest(values, Infinity), high = largest(values, -Infinity);
  const head = element("tr", null); head.append(element("th", "setting", { scope: "col" }), ...columns.map((c) => element("th", c, { scope: "col" })));
  const body = [...lines].map(([line, of]) => {
    const row = element("tr", null); row.append(element("th", line.replace(/^cells\//, ""), { scope: "row" }));
    for (const column of columns) {
      const c = of.get(column), td = element("td", null, { class: "cell" });
      if (c) {
        const share = known(c.mean) ? (high > low ? (c.mean - low) / (high - low) : 1) : null, dark = share !== null && share > 0.5;
        const text = c.state === "planned" ? "planned" : `${fixed(c.mean)}${c.state === "finished" ? "" : ` ${c.state} ${c.done}/${c.rounds ?? "?"}`}`;
        const link = element(c.state === "planned" ? "span" : "a", text, c.state === "planned" ? {} : { href: "?cell=" + encodeURIComponent(c.name), "aria-label": `${c.name}: ${text}` });
        td.style.background = share === null ? "transparent" : `hsl(210 55% ${92 - 62 * share}%)`;
        link.style.color = share === null ? "inherit" : dark ? "#fff" : "#10202e";
        td.append(link);
      }
      row.append(td);
    }
    return row;
  });
  const thead = element("thead", null), tbody = element("tbody", null); thead.append(head); tbody.append(...body);
  const held = document.activeElement && document.activeElement.closest("#cells a") && document.activeElement.getAttribute("href");
  $("cells").replaceChildren(thead, tbody);
  if (held) { const again = [...$("cells").querySelectorAll("a")].find((a) => a.getAttribute("href") === held); if (again) again.focus(); }
}

function redraw() { for (const p of Object.values(plots)) p.chart.destroy(); plots = {}; $("graph").dataset.key = ""; later(); }

function start() {
  $("back").hidden = cell === null;
  $("pick").addEventListener("change", (e) => { chosen = ""; choose(e.target.value); });
  $("level").addEventListener("change", later); $("filter").addEventListener("input", later); $("table-box").addEventListener("toggle", later);
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const stream = new EventSource("events" + query);
  const hear = (name, act) => stream.addEventListener(name, guarded(name, (e) => act(JSON.parse(e.data))));
  hear("snapshot", (data) => merge(data, true));
  hear("update", (data) => { merge(data, false); if (one) refreshOne(); });
  hear("standing", (data) => { standing = data; trouble("folder", data.trouble); later(); });
  hear("grid", (data) => { trouble("folder", data.trouble); drawGrid(data); });
  stream.onerror = () => { $("lead").textContent = "The connection to peerlora watch is lost; trying again …"; };
}

let asked = 0;
async function refreshOne() {  // the chosen client's curves, once in two seconds at most
  if (performance.now() - asked < 2000) return;
  asked = performance.now();
  if (await fetchOne()) { guarded("client", drawOne)(); later(); }
}

async function fetchOne() {  // whether the chosen client's curves are here
  const of = chosen;
  try {
    const answer = await fetch(`client/${of}${query}`), found = answer.ok ? await answer.json() : null;
    trouble("fetch", "");
    if (!found || of !== chosen) return false;
    one = found;
    return true;
  } catch (error) { trouble("fetch", String(error)); return false; }
}
start();
