"use strict";
// Figures that can be read by hovering, zoomed and taken along as CSV; without this script the drawings stay.
(function () {
  const known = { "#1f4e79": "--mean", "#d1495b": "--averaged", "#7fa3c4": "--client", "#333333": "--ink" };
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (given) => (known[given] ? css(known[given]) : given);
  const shown = (v) => (v === null || v === undefined ? "–" : v === 0 ? "0" : Math.abs(v) < 0.001 ? v.toExponential(2) : Math.abs(v) >= 10000 ? v.toLocaleString("en") : String(+v.toPrecision(4)));
  const charts = [];

  function csv(data) {
    const cell = (v) => { const text = v === null ? "" : String(v); return /[",\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text; };
    const table = data.rows ? [data.head, ...data.rows] : [[data.xlabel, ...data.series.map((s) => s.label)], ...data.x.map((x, i) => [x, ...data.series.map((s) => s.y[i])])];
    return table.map((row) => row.map(cell).join(",")).join("\n") + "\n";
  }

  function build(figure, data, box) {
    const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const dots = data.x.length < 26;
    const bands = [], edges = data.series.flatMap((s, i) => (s.style === "edge" ? [i] : []));
    for (let i = 0; i + 1 < edges.length; i += 2) bands.push({ series: [edges[i + 1] + 1, edges[i] + 1], fill: colour(data.series[edges[i]].colour) + "2b" });
    const series = data.series.map((s) => {
      return { label: s.label, stroke: colour(s.colour), width: s.style === "thin" ? 1 : s.style === "edge" || s.style === "points" ? 0 : 2.2, dash: s.style === "dashed" ? [7, 4] : undefined, spanGaps: s.style !== "points",
        points: { show: s.style === "points" || (dots && s.style !== "thin" && s.style !== "edge"), size: s.style === "points" ? 9 : 6, fill: s.style === "points" ? colour(s.colour) : css("--paper") }, value: (_, v) => shown(v) };
    });
    const y = data.log ? { distr: 3 } : data.zero ? { range: (u, low, high) => [0, (high || 1) * 1.05] } : {};
    const chart = new uPlot({ width: Math.max(240, figure.clientWidth), height: innerWidth < 600 ? 220 : 300, scales: { x: data.logx ? { time: false, distr: 3, range: (u, low, high) => [low / 1.1, high * 1.1] } : { time: false }, y }, bands, hooks: { setSeries: [showRows] },
      axes: [{ ...axis, ...(data.logx ? { splits: () => data.x, filter: (u, all) => all, values: (u, all) => all.map(shown) } : {}), label: data.xlabel, labelSize: 18, labelFont: "12px system-ui, sans-serif" }, { ...axis, size: 62, label: data.ylabel || undefined, labelSize: 18, labelFont: "12px system-ui, sans-serif", values: (u, all) => all.map((v) => (v === null ? "" : shown(v))) }],
      series: [{ label: data.xlabel, value: (_, v) => (v === null ? "–" : shown(v)) }, ...series], cursor: { focus: { prox: 24 }, drag: { x: true, y: false } }, focus: { alpha: 0.3 } }, [data.x, ...data.series.map((s) => s.y)], box);
    chart.lines = data.series; chart.many = data.series.filter((s) => s.style === "thin").length > (innerWidth < 600 ? 0 : 12);
    showRows(chart, null);
    return chart;
  }

  // Of many thin lines, the legend names the one that the pointer is near.
  function showRows(chart, focused) {
    const rows = chart.root.querySelectorAll(".u-legend .u-series");
    (chart.lines || []).forEach((s, i) => { rows[i + 1].hidden = s.style === "edge" || (s.style === "thin" && chart.many && i + 1 !== focused); });
  }

  function download(title, data) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(data)], { type: "text/csv" }));
    link.download = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") + ".csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function draw(figure) {
    const data = JSON.parse(figure.querySelector("script.data").textContent), title = figure.querySelector("figcaption").textContent;
    const tools = document.createElement("p"), drawing = figure.querySelector(".scroll");
    tools.className = "tools";
    const button = (text, act) => { const b = document.createElement("button"); b.type = "button"; b.textContent = text; b.addEventListener("click", act); tools.append(b); };
    button("CSV", () => download(title, data));
    if (data.rows) { drawing.after(tools); return; }
    const box = document.createElement("div"), entry = { figure, data, box, chart: null };
    box.className = "chart"; box.setAttribute("role", "img"); box.setAttribute("aria-label", title + "; the numbers are in the CSV below");
    button("Whole range", () => entry.chart.setData(entry.chart.data));
    tools.append("Drag to zoom; click a name to hide or show its line.");
    drawing.hidden = true;
    for (const key of figure.querySelectorAll(".legend > span:not(.band)")) key.hidden = true;  // the chart has its own; bands have no line to click
    drawing.after(box, tools);
    entry.chart = build(figure, data, box);
    charts.push(entry);
  }

  function again() { for (const each of charts) { each.chart.destroy(); each.chart = build(each.figure, each.data, each.box); } }
  for (const data of document.querySelectorAll("figure script.data")) draw(data.parentElement);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; again(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
})();
