// A line chart with axes and a legend, drawn as SVG at the available width. The pointer or the arrow keys select a step
// whose values are read out.

import { h, svg } from "./dom.js";

const HEIGHT = 190;
const MARGIN = { top: 8, right: 12, bottom: 26 };

/** A number in short form: 0.0005, 1.25, 12,300. */
export function brief(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text =
    size !== 0 && size < 1e-3 ? value.toExponential(1).replace("e-", " × 10^-") :
    size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  return text.replace("-", "−").replace("^-", "^−");
}

/** About `count` round numbers that cover low to high. */
function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const first = Math.floor(low / step);
  const last = Math.ceil(high / step);
  return Array.from({ length: last - first + 1 }, (_, at) => (first + at) * step);
}

function range(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = high > low ? 0 : Math.abs(low) * 0.1 || 1;
  return [low - pad, high + pad];
}

const scale = (from, to, start, end) => (value) => start + ((value - from) / (to - from)) * (end - start);

const path = (points, x, y) =>
  points.map(([at, value], index) => `${index ? "L" : "M"}${x(at).toFixed(1)},${y(value).toFixed(1)}`).join("");

function swatch({ colour, stage }) {
  return svg("svg", { width: 22, height: 10, "aria-hidden": "true", class: `line ${colour} ${stage}` },
    svg("path", { d: "M1,5H21" }), stage === "val" && svg("circle", { cx: 11, cy: 5, r: 3 }));
}

class Chart {
  constructor(title, series) {
    this.series = series.map((one) => ({ ...one, at: new Map(one.points) }));
    this.steps = [...new Set(series.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
    this.readout = h("p", { class: "readout small", "aria-live": "polite" });
    this.plot = h("div", {
      class: "plot", tabindex: 0, role: "img", "aria-label": `${title}. ${this.summary()} Arrow keys read the values.`,
      pointermove: (event) => this.point(event), pointerleave: () => this.select(null),
      keydown: (event) => this.key(event), blur: () => this.select(null),
    });
    const legend = h("div", { class: "chart-legend small" },
      series.map((one) => h("span", {}, swatch(one), one.name)));
    const caption = h("figcaption", {}, h("h4", {}, title));
    this.node = h("figure", { class: "card chart" }, caption, legend, this.plot, this.readout);
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.select(null);
  }

  summary() {
    return this.series
      .map(({ name, points }) => `${name} from ${brief(points[0][1])} to ${brief(points.at(-1)[1])}.`)
      .join(" ");
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const values = this.series.flatMap(({ points }) => points.map(([, value]) => value));
    const marks = ticks(...range(values), 4);
    const left = 12 + 6.6 * Math.max(4, ...marks.map((mark) => brief(mark).length));
    const [from, to] = range(this.steps);
    const x = (this.x = scale(from, to, left, width - MARGIN.right));
    const y = (this.y = scale(marks[0], marks.at(-1), HEIGHT - MARGIN.bottom, MARGIN.top));
    const rows = marks.map((mark) => [
      svg("path", { class: "grid", d: `M${left},${y(mark)}H${width - MARGIN.right}` }),
      svg("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, brief(mark)),
    ]);
    const fits = (step) => step >= from && step <= to && x(step) > left + 12;
    const columns = ticks(from, to, Math.max(2, Math.min(6, width / 90))).filter(fits);
    const foot = columns.map((step) =>
      svg("text", { x: x(step), y: HEIGHT - 8, "text-anchor": x(step) > width - 30 ? "end" : "middle" }, brief(step)));
    foot.push(svg("text", { x: left - 6, y: HEIGHT - 8, "text-anchor": "end" }, "step"));
    this.cursor = svg("g", { class: "cursor" });
    const lines = this.series.map(({ points, colour, stage }) =>
      svg("g", { class: `line ${colour} ${stage}` },
        svg("path", { d: path(points, x, y) }),
        (stage === "val" || points.length === 1) &&
          points.map(([step, value]) => svg("circle", { cx: x(step), cy: y(value), r: 3 }))));
    this.plot.replaceChildren(
      svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" },
        rows.flat(), foot, lines, this.cursor));
  }

  point(event) {
    const at = event.clientX - this.plot.getBoundingClientRect().left;
    const distance = (step) => Math.abs(this.x(step) - at);
    this.select(this.steps.reduce((best, step) => (distance(step) < distance(best) ? step : best)));
  }

  key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const at = this.step === null ? (move > 0 ? -1 : this.steps.length) : this.steps.indexOf(this.step);
    this.select(this.steps[Math.min(Math.max(at + move, 0), this.steps.length - 1)]);
  }

  select(step) {
    this.step = step;
    const here = this.series.filter(({ at }) => at.has(step));
    const values = here.map(({ name, at }) => `${name} ${brief(at.get(step))}`);
    this.readout.textContent = step === null ? " " : `step ${step}: ${values.join(" · ")}`;
    const line = () => svg("path", { d: `M${this.x(step)},${MARGIN.top}V${HEIGHT - MARGIN.bottom}` });
    const dot = ({ at, colour }) => svg("circle", { class: colour, cx: this.x(step), cy: this.y(at.get(step)), r: 4 });
    this.cursor?.replaceChildren(...(step === null ? [] : [line()]), ...here.map(dot));
  }
}

/** Return a chart; each series is { name, points: [[step, value], ...], colour, stage }, and none may be empty. */
export const chart = (title, series) => new Chart(title, series).node;
