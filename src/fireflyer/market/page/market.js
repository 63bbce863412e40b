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

const short = (value) => (value === null || value === undefined ? "–" : String(+value.toPrecision(4)));

// --- Head

const tiles = data.tiles.map(([figure, what, word]) =>
  element("div", { class: "tile" }, element("b", {}, figure), element("span", {}, what), element("small", {}, word)));
byId("head").append(element("div", { class: data.head.passed ? "head" : "head failed" },
  element("h1", {}, data.head.name), element("p", {}, data.head.sentence),
  element("div", { class: "facts" }, table(data.head.facts)), element("div", { class: "tiles" }, ...tiles)));

// --- Curves

for (const chart of data.charts) {
  byId("charts").append(element("div", { class: "card" },
    element("h3", {}, chart.title, element("span", { class: "unit" }, chart.unit)),
    element("div", { class: "plot", id: `chart-${chart.key}` }), element("p", {}, chart.why)));
}

const drawn = [];

function draw() {
  for (const plot of drawn.splice(0)) plot.destroy();
  const soft = resolved("--soft"), rule = resolved("--line");
  for (const chart of data.charts) {
    const box = byId(`chart-${chart.key}`);
    const edge = { stroke: soft, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule }, font: "11px system-ui" };
    const series = chart.lines.map((line) => ({
      label: line.name, stroke: resolved(line.colour), width: line.dashed ? 1 : 1.6,
      dash: line.dashed ? [6, 4] : undefined, points: { show: line.marks, size: 5 }, value: (_, value) => short(value),
    }));
    const day = (_, value) => (value === null ? "–" : new Date(value * 1000).toISOString().slice(0, 10));
    drawn.push(new uPlot({
      width: box.clientWidth, height: 230, tzDate: (stamp) => uPlot.tzDate(new Date(stamp * 1e3), "Etc/UTC"),
      series: [chart.time ? { label: "session", value: day } : { label: "sessions", value: (_, value) => short(value) },
        ...series],
      scales: { x: { time: chart.time } },
      axes: [{ ...edge, space: 60 }, { ...edge, size: 56, values: (_, ticks) => ticks.map(short) }],
    }, [chart.x, ...chart.lines.map((line) => line.values)], box));
  }
}

let width = 0;
new ResizeObserver(() => {
  if (byId("charts").clientWidth !== width) { width = byId("charts").clientWidth; draw(); }
}).observe(byId("charts"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// --- Experts: a column is a session, a row an expert; 0 dark, an even share orange, three times that light

function heat(value) {
  const share = Math.min(value / 3, 1);
  return [Math.round(30 + 225 * Math.min(1, share * 2)), Math.round(20 + 225 * share), Math.round(60 + 120 * share * share)];
}

for (const map of data.maps) {
  const columns = map.load, experts = columns[0].length;
  const canvas = element("canvas", { width: columns.length, height: experts });
  const brush = canvas.getContext("2d"), image = brush.createImageData(columns.length, experts);
  columns.forEach((column, x) => column.forEach((value, y) => {
    image.data.set([...heat(value), 255], 4 * (y * columns.length + x));
  }));
  brush.putImageData(image, 0, 0);
  const reading = element("div", { class: "reading" }, "\u00a0");
  canvas.addEventListener("mousemove", (event) => {
    const x = Math.min(columns.length - 1, Math.floor(event.offsetX / canvas.clientWidth * columns.length));
    const y = Math.min(experts - 1, Math.floor(event.offsetY / canvas.clientHeight * experts));
    reading.textContent = `${map.dates[x]}, expert ${y}: ${short(columns[x][y])}`;
  });
  canvas.addEventListener("mouseleave", () => { reading.textContent = "\u00a0"; });
  byId("maps").append(element("div", { class: "card map" }, element("h3", {}, `MoE layer ${map.layer}`), canvas, reading));
}
byId("experts").hidden = !data.maps.length;

// --- Tables

for (const part of data.tables) {
  byId("tables").append(element("section", {}, element("h2", {}, part.title),
    element("div", { class: "wide" }, table(part.rows, part.head))));
}
byId("footer").textContent = `Written by fireflyer ${data.version}. A test of the past is no promise.`;
