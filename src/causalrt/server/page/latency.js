// Latency of each chunk by stage: stacked bars with the real-time line, a legend with the latest figures, and a table.

const STAGES = [ // in the order of the work; what the parts leave of the whole is "other"
  ["queue", "queue"],
  ["text", "text encoder"],
  ["denoise", "denoising"],
  ["exchange", "exchange"],
  ["gather", "gather"],
  ["decode", "VAE decoder"],
  ["hand_over", "hand-over"],
  ["encode", "H.264"],
  ["other", "other"],
];
const LABEL = Object.fromEntries(STAGES);
const HEIGHT = 220;
const EDGE = { left: 58, right: 14, top: 16, bottom: 24 };
const SLOT = { least: 20, most: 36 }; // pixels a chunk
const TABLE_ROWS = 300;

export const ms = (value) => (value >= 9_995 ? `${(value / 1000).toFixed(1)} s` : value >= 999.5 ? `${(value / 1000).toFixed(2)} s` : `${Math.round(value)} ms`);

/**
 * The chunk's milliseconds by stage, parts that do not overlap. Exchange is inside denoising, so it is taken out of it;
 * `latency_ms` ends when the frames are there, so the prompt's text before and H.264 after are not in it. Where chunks are
 * made ahead, stages ran before the request: time that nobody waited for is excluded.
 */
export function partsOf(chunk) {
  const parts = Object.fromEntries(STAGES.map(([stage]) => [stage, chunk.stages[stage] ?? 0]));
  parts.denoise = Math.max(0, parts.denoise - parts.exchange);
  const whole = chunk.latency_ms + parts.text + parts.encode;
  let ahead = sum(parts) - whole;
  for (const stage of ["queue", "denoise", "exchange", "gather"]) {
    const left = Math.max(0, parts[stage] - Math.max(0, ahead));
    ahead -= parts[stage] - left;
    parts[stage] = left;
  }
  parts.other = Math.max(0, whole - sum(parts));
  return parts;
}

const sum = (parts) => Object.values(parts).reduce((a, b) => a + b, 0);

function element(name, attributes = {}, text = "") {
  const svg = ["svg", "g", "rect", "line", "path", "text", "title"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

export class LatencyView {
  #chart;
  #legend;
  #rows = element("tbody");
  #chunks = [];
  #switches = new Map(); // chunk index -> policy
  #fps = 1;
  #pending = 0;

  constructor({ chart, legend, table }) {
    this.#chart = chart;
    this.#legend = legend;
    const head = element("tr");
    for (const name of ["chunk", "frames", "latency", ...STAGES.map(([, label]) => label)]) {
      head.append(element("th", { scope: "col" }, name));
    }
    const whole = element("table");
    whole.append(element("caption", {}, "Milliseconds; the newest chunk first"), element("thead"), this.#rows);
    whole.tHead.append(head);
    table.append(whole);
    new ResizeObserver(() => this.#redraw()).observe(chart);
  }

  clear(fps) {
    this.#fps = fps;
    this.#chunks = [];
    this.#switches.clear();
    this.#rows.replaceChildren();
    this.#redraw();
  }

  /** Milliseconds from the request for the chunk until it was sent. */
  add(chunk) {
    const parts = partsOf(chunk);
    const whole = sum(parts);
    this.#chunks.push({ ...chunk, parts, whole });
    if (this.#chunks.length > TABLE_ROWS) this.#chunks.shift();
    const row = element("tr");
    row.append(element("th", { scope: "row" }, chunk.index));
    const times = [whole, ...STAGES.map(([stage]) => parts[stage])];
    for (const value of [chunk.frames, ...times.map((time) => time.toFixed(1))]) row.append(element("td", {}, value));
    this.#rows.prepend(row);
    if (this.#rows.rows.length > TABLE_ROWS) this.#rows.lastChild.remove();
    this.#redraw();
    return whole;
  }

  markSwitch(index, policy) {
    this.#switches.set(index, policy);
    this.#redraw();
  }

  #redraw() {
    // Once a frame at most: several chunks may come in one go.
    this.#pending ||= requestAnimationFrame(() => {
      this.#pending = 0;
      this.#drawChart();
      this.#drawLegend();
    });
  }

  #drawLegend() {
    const latest = this.#chunks.at(-1);
    const seen = STAGES.filter(([stage]) => this.#chunks.some(({ parts }) => parts[stage] >= 0.05));
    const items = (seen.length ? seen : STAGES.slice(0, -1)).map(([stage, label]) => {
      const item = element("li", { "data-stage": stage });
      item.append(element("i"), element("span", {}, label), element("b", {}, latest?.parts[stage] ? ms(latest.parts[stage]) : ""));
      return item;
    });
    const line = element("li", { "data-stage": "real-time" });
    const budget = latest ? ms((1000 * latest.frames) / this.#fps) : "";
    line.append(element("i"), element("span", {}, "real time"), element("b", {}, budget));
    this.#legend.replaceChildren(...items, line);
  }

  #drawChart() {
    const width = Math.max(240, this.#chart.clientWidth);
    const inner = { width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom };
    const slot = Math.max(SLOT.least, Math.min(SLOT.most, inner.width / this.#chunks.length));
    const shown = this.#chunks.slice(-Math.floor(inner.width / slot));
    const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": this.#inWords(shown) });
    const budget = ({ frames }) => (1000 * frames) / this.#fps;
    // The first chunk, with its wait and text, may be many times the rest: its bar is cut rather than theirs made flat.
    const rest = shown.filter(({ index }) => index > 0);
    const highest = Math.max(...(rest.length ? rest : shown).map((chunk) => Math.max(chunk.whole, budget(chunk))), 1);
    const step = niceStep(highest / 3);
    const top = step * Math.ceil((highest * 1.08) / step);
    const y = (value) => EDGE.top + inner.height * (1 - Math.min(value, top) / top);

    for (let value = 0; value <= top * 1.001; value += step) {
      svg.append(element("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(value), y2: y(value) }));
      if (shown.length) svg.append(element("text", { x: EDGE.left - 8, y: y(value) + 4, "text-anchor": "end" }, axisLabel(value, top)));
    }
    const line = [];
    shown.forEach((chunk, place) => {
      const x = EDGE.left + place * slot;
      const bar = element("g", { class: "bar" });
      bar.append(element("title", {}, `chunk ${chunk.index}: ${ms(chunk.whole)}`));
      let below = 0;
      for (const [stage] of STAGES) {
        const above = below + chunk.parts[stage];
        const height = y(below) - y(above);
        // A hairline of the background between the stages keeps them apart without telling colours apart.
        if (height > 0) bar.append(element("rect", { "data-stage": stage, x: x + 3, y: y(above), width: slot - 6, height: Math.max(height - (height > 3 ? 1 : 0), 0.5) }));
        below = above;
      }
      if (below > top) bar.append(element("text", { class: "cut", x: x + 2, y: EDGE.top - 5 }, `↑ ${ms(chunk.whole)}`));
      if (this.#switches.has(chunk.index)) {
        bar.append(element("line", { class: "switch", x1: x, x2: x, y1: EDGE.top, y2: EDGE.top + inner.height }));
        bar.append(element("text", { class: "switch", x: x + 3, y: EDGE.top + 9 }, "switch"));
      }
      if (chunk.index % 5 === 0) bar.append(element("text", { x: x + slot / 2, y: HEIGHT - 7, "text-anchor": "middle" }, chunk.index));
      svg.append(bar);
      line.push(`${place ? "L" : "M"}${x} ${y(budget(chunk))}H${x + slot}`);
    });
    if (shown.length) svg.append(element("path", { class: "real-time", d: line.join("") }));
    else svg.append(element("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "Bars appear here, one for each chunk."));
    this.#chart.replaceChildren(svg);
  }

  #inWords(shown) {
    if (!shown.length) return "Latency by stage: no chunk yet.";
    const latest = shown.at(-1);
    const parts = STAGES.filter(([stage]) => latest.parts[stage] >= 0.5).map(([stage]) => `${LABEL[stage]} ${ms(latest.parts[stage])}`);
    const late = shown.filter(({ whole, frames }) => whole > (1000 * frames) / this.#fps).length;
    return `Latency by stage of chunks ${shown[0].index} to ${latest.index}; the latest took ${ms(latest.whole)}: ${parts.join(", ")}. ` +
      `${late} of ${shown.length} took longer than they play. The same figures are in the table below.`;
  }
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((n) => n * power).find((step) => step >= rough);
}

const axisLabel = (value, top) => (top >= 2000 ? `${+(value / 1000).toFixed(2)} s` : `${+value.toFixed(1)} ms`);
