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
    const head = [data.xlabel, ...data.series.map((s) => s.label)];
    return [head, ...data.x.map((x, i) => [x, ...data.series.map((s) => s.y[i])])].map((row) => row.map(cell).join(",")).join("\n") + "\n";
  }

  function build(figure, data, box) {
    const axis = { stroke: css("--soft"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const dots = data.x.length < 26;
    const bands = [];
    const series = data.series.map((s, i) => {
      if (s.style === "edge" && i && data.series[i - 1].style === "edge") bands.push({ series: [i, i + 1], fill: css("--client") + "44" });
      return { label: s.label, stroke: colour(s.colour), width: s.style === "thin" ? 1 : s.style === "edge" || s.style === "points" ? 0 : 2.2, dash: s.style === "dashed" ? [7, 4] : undefined, spanGaps: s.style !== "points",
        points: { show: s.style === "points" || (dots && s.style !== "thin" && s.style !== "edge"), size: s.style === "points" ? 9 : 6, fill: s.style === "points" ? colour(s.colour) : css("--paper") }, value: (_, v) => shown(v) };
    });
    const y = data.log ? { distr: 3 } : data.zero ? { range: (u, low, high) => [0, (high || 1) * 1.05] } : {};
    const chart = new uPlot({ width: Math.max(240, figure.clientWidth), height: innerWidth < 600 ? 220 : 300, scales: { x: { time: false }, y }, bands,
      axes: [{ ...axis, label: data.xlabel, labelSize: 18, labelFont: "12px system-ui, sans-serif" }, { ...axis, size: 62, label: data.ylabel || undefined, labelSize: 18, labelFont: "12px system-ui, sans-serif", values: (u, all) => all.map((v) => (v === null ? "" : shown(v))) }],
      series: [{ label: data.xlabel, value: (_, v) => (v === null ? "–" : shown(v)) }, ...series], cursor: { focus: { prox: 24 }, drag: { x: true, y: false } }, focus: { alpha: 0.3 } }, [data.x, ...data.series.map((s) => s.y)], box);
    const rows = chart.root.querySelectorAll(".u-legend .u-series"), thin = data.series.filter((s) => s.style === "thin").length;
    data.series.forEach((s, i) => { rows[i + 1].hidden = s.style === "edge" || (s.style === "thin" && thin > (innerWidth < 600 ? 0 : 12)); });
    return chart;
  }

  function draw(figure) {
    const data = JSON.parse(figure.querySelector("script.data").textContent), title = figure.querySelector("figcaption").textContent;
    const box = document.createElement("div"), tools = document.createElement("p");
    box.className = "chart"; box.setAttribute("role", "img"); box.setAttribute("aria-label", title + "; the numbers are in the CSV below");
    tools.className = "tools";
    const button = (text, act) => { const b = document.createElement("button"); b.type = "button"; b.textContent = text; b.addEventListener("click", act); tools.append(b); };
    const entry = { figure, data, box, chart: null };
    button("CSV", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([csv(data)], { type: "text/csv" }));
      link.download = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") + ".csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
    button("Whole range", () => entry.chart.setData(entry.chart.data));
    tools.append("Drag to zoom; click a name to hide or show its line.");
    figure.querySelector(".scroll").hidden = true;
    const legend = figure.querySelector(".legend");
    if (legend) legend.hidden = true;
    figure.querySelector(".scroll").after(box, tools);
    entry.chart = build(figure, data, box);
    charts.push(entry);
  }

  function again() { for (const each of charts) { each.chart.destroy(); each.chart = build(each.figure, each.data, each.box); } }
  for (const data of document.querySelectorAll("figure script.data")) draw(data.parentElement);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; again(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
})();
