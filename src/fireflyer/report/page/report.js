"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// light-dark() is resolved where a property uses it, not in the variable: ask an element that wears it.
function resolved(name) {
  const probe = element("span", { style: `color: var(${name}); display: none` });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function table(rows, head) {
  const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
  const top = head ? [element("tr", {}, ...head.map((cell) => element("th", {}, cell)))] : [];
  return element("table", {}, ...top, ...body);
}

function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e12) return `${+(value / 1e12).toPrecision(3)}T`;
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}B`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}K`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(4));
}

// --- Heads

data.runs.forEach((run, number) => {
  const tiles = run.tiles.map(([figure, what, word]) =>
    element("div", { class: "tile" }, element("b", {}, figure), element("span", {}, what), element("small", {}, word)));
  byId("heads").append(element("div", { class: number ? "head other" : "head" },
    element("h1", {}, run.name), element("p", {}, run.sentence), element("div", { class: "tiles" }, ...tiles)));
});

// --- Curves

function smoothed(values, weight) {
  let mean = 0, share = 0;
  return values.map((value) => {
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return mean / share;
  });
}

function strokes() {
  return [resolved("--first"), resolved("--second")];
}

function series(line, log) {
  const base = { stroke: strokes()[line.run], dash: line.dashed ? [6, 4] : undefined, spanGaps: true };
  const raw = { ...base, label: line.name || "value", width: 1, points: { show: line.marks, size: 5 },
    value: (_, value) => short(value) };
  if (line.marks) return [{ ...raw, width: 2 }];
  return [{ ...raw, alpha: 0.3 }, { ...base, class: "mean", width: 2, points: { show: false } }];
}

const drawn = [];

function draw() {
  for (const plot of drawn.splice(0)) plot.destroy();
  const axis = byId("axis").value, weight = byId("smoothing").value / 100;
  const soft = resolved("--soft"), rule = resolved("--line");
  for (const chart of data.charts) {
    const box = byId(`chart-${chart.key}`);
    const tables = [], all = [{ label: axis, value: (_, value) => short(value) }];
    for (const line of chart.lines) {
      const xs = line[axis];
      tables.push(line.marks ? [xs, line.values] : [xs, line.values, smoothed(line.values, weight)]);
      all.push(...series(line, chart.log));
    }
    const powers = (_, ticks) => ticks.map((tick) => (!chart.log || Number.isInteger(Math.log10(tick)) ? tick : null));
    const edge = { stroke: soft, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule }, font: "11px system-ui" };
    drawn.push(new uPlot({
      width: box.clientWidth, height: 230, series: all,
      scales: { x: { time: false }, y: { distr: chart.log ? 3 : 1 } },
      axes: [{ ...edge, values: (_, ticks) => ticks.map(short), space: 60 },
        { ...edge, filter: powers, grid: { ...edge.grid, filter: powers }, ticks: { ...edge.ticks, filter: powers },
          values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))), size: 56 }],
      cursor: { sync: { key: "steps" } },
    }, uPlot.join(tables), box));
  }
}

for (const chart of data.charts) {
  byId("charts").append(element("div", { class: "card" },
    element("h3", {}, chart.title, element("span", { class: "unit" }, chart.unit)),
    element("div", { class: "plot", id: `chart-${chart.key}` }), element("p", {}, chart.why)));
}
byId("axis").addEventListener("change", draw);
byId("smoothing").addEventListener("input", draw);
let width = 0;
new ResizeObserver(() => {
  if (byId("charts").clientWidth !== width) { width = byId("charts").clientWidth; draw(); }
}).observe(byId("charts"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { draw(); paint(); });

// --- Experts: a column is a moment, a row an expert

function heat(value, quantity, bound) {
  if (quantity === "load") {  // 0 dark, an even share the page's orange, three times that light
    const share = Math.min(value / 3, 1);
    return [Math.round(30 + 225 * Math.min(1, share * 2)), Math.round(20 + 225 * share), Math.round(60 + 120 * share * share)];
  }
  const share = bound ? value / bound : 0;  // blue below 0, red above
  const fade = Math.round(245 - 200 * Math.abs(share));
  return share < 0 ? [fade, fade, 245] : [245, fade, fade];
}

function paint() {
  const quantity = byId("quantity").value;
  byId("maps").replaceChildren();
  for (const map of data.heat_maps) {
    const columns = map[quantity];
    if (!columns.length) continue;
    const experts = columns[0].length, bound = Math.max(...columns.map((column) => Math.max(...column.map(Math.abs))));
    const canvas = element("canvas", { width: columns.length, height: experts });
    const brush = canvas.getContext("2d"), image = brush.createImageData(columns.length, experts);
    columns.forEach((column, x) => column.forEach((value, y) => {
      image.data.set([...heat(value, quantity, bound), 255], 4 * (y * columns.length + x));
    }));
    brush.putImageData(image, 0, 0);
    const reading = element("div", { class: "reading" }, "\u00a0");
    canvas.addEventListener("mousemove", (event) => {
      const x = Math.min(columns.length - 1, Math.floor(event.offsetX / canvas.clientWidth * columns.length));
      const y = Math.min(experts - 1, Math.floor(event.offsetY / canvas.clientHeight * experts));
      reading.textContent = `step ${map.steps[x].toLocaleString()}, expert ${y}: ${short(columns[x][y])}`;
    });
    canvas.addEventListener("mouseleave", () => { reading.textContent = "\u00a0"; });
    const name = data.runs.length > 1 ? `${data.runs[map.run].name}, layer ${map.layer}` : `layer ${map.layer}`;
    byId("maps").append(element("div", { class: "card map" }, element("h3", {}, name), canvas, reading));
  }
  const words = quantity === "load"
    ? "Tokens that chose each expert, over an even share: dark 0, orange 1, light 3 and more."
    : "What the gate adds to each expert's score when it chooses: blue below 0, white 0, red above, each layer by its own largest.";
  byId("experts-hint").textContent = `${words} Time runs to the right, each row is an expert.`;
}
byId("quantity").addEventListener("change", paint);
if (data.heat_maps.length) { byId("experts").hidden = false; paint(); }

// --- Samples

function samples(run) {
  const prompts = new Map();
  for (const sample of run.samples) {
    if (!prompts.has(sample.prompt)) prompts.set(sample.prompt, []);
    prompts.get(sample.prompt).push(sample);
  }
  for (const [prompt, series] of prompts) {
    const label = element("span", {}), text = element("span", {});
    const slider = element("input", { type: "range", min: 0, max: series.length - 1, value: series.length - 1,
      "aria-label": "step" });
    const show = () => {
      const sample = series[slider.value];
      label.textContent = `${data.runs.length > 1 ? run.name + ", " : ""}step ${sample.step.toLocaleString()}`;
      text.textContent = sample.text;
    };
    slider.addEventListener("input", show);
    show();
    byId("sample-list").append(element("div", { class: "sample" }, element("label", {}, label, slider),
      element("pre", {}, element("span", { class: "given" }, prompt), text)));
  }
}
data.runs.forEach(samples);
byId("samples").hidden = !byId("sample-list").children.length;

// --- Tables

if (data.differences.length) {
  byId("differences").hidden = false;
  byId("difference-table").append(table(data.differences, ["key", ...data.runs.map((run) => run.name)]));
}
for (const run of data.runs) {
  for (const [name, rows] of Object.entries(run.tables)) {
    const title = data.runs.length > 1 ? `${name} of ${run.name}` : name;
    byId("tables").append(element("details", {}, element("summary", {}, title), table(rows)));
  }
}
byId("footer").textContent = `Written by fireflyer ${data.version}; the numbers are those of the run's metrics.jsonl.`;
