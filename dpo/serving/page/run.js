// The run view: table of results, curves, final values and configuration, as returned by /v1/run.

import { brief, chart } from "./chart.js";
import { $, copy, h, harmless, visible } from "./dom.js";

const STAGES = { train: "training", val: "validation" };
const SIDES = { chosen: "up", rejected: "down" };

// Titles of the metrics in display order; other metrics follow under their own names.
const TITLES = {
  loss: "Loss",
  "rewards/accuracies": "Reward accuracy",
  "rewards/margins": "Reward margin",
  rewards: "Rewards",
  logps: "Log-probabilities of the answers (nats)",
  displaced: "Pairs whose chosen answer lost probability",
  entropy: "Entropy (nats per token)",
  token_accuracy: "Token accuracy",
  grad_norm: "Gradient norm",
  learning_rate: "Learning rate",
  tokens_per_second: "Tokens per second",
};
const FIRST = 4; // metrics of TITLES whose charts are always visible

const MEANINGS = {
  loss: "mean loss per pair; DPO starts at log 2 = 0.693",
  "rewards/chosen": "β (log π − log π_ref) of the chosen answers",
  "rewards/rejected": "β (log π − log π_ref) of the rejected answers",
  "rewards/margins": "chosen reward − rejected reward",
  "rewards/accuracies": "share of pairs whose chosen reward is higher",
  "logps/chosen": "log-probability of a chosen answer, nats",
  "logps/rejected": "log-probability of a rejected answer, nats",
  "logits/chosen": "mean logit over the chosen answers",
  "logits/rejected": "mean logit over the rejected answers",
  entropy: "entropy of the next token, nats",
  token_accuracy: "share of chosen tokens that were the most probable",
  "nll/chosen": "−log-probability per token of the chosen answers, nats",
  "length/chosen": "tokens of a chosen answer",
  "length/rejected": "tokens of a rejected answer",
  displaced: "share of pairs whose chosen answer is less likely than under the reference",
};

const scroll = (label, ...children) =>
  h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, ...children);

const section = (title, ...children) => h("section", { class: "part" }, h("h3", {}, title), ...children);
const nothing = (text) => h("p", { class: "quiet" }, text);

function cell(value) {
  const text = String(value);
  const isNumber = text.trim() !== "" && Number.isFinite(Number(text));
  return h("td", {}, isNumber ? brief(Number(text)) : harmless(text));
}

function results({ header, rows }) {
  if (!rows.length) return section("Results", nothing("This run has no table of results."));
  const broken = (name) => harmless(name).split(/(?<=\/)/).flatMap((part) => [part, h("wbr")]);
  const head = header.map((name) => h("th", { scope: "col" }, broken(name)));
  return section("Results", scroll("Table of results", h("table", {}, h("thead", {}, h("tr", {}, head)),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell)))))));
}

/** Group the columns of metrics.csv by chart: "train/rewards/chosen" is the series chosen, training of rewards. */
function groups(metrics) {
  const found = new Map();
  const columns = [...new Set(metrics.flatMap(Object.keys))].filter((name) => name !== "step");
  for (const column of columns) {
    const points = metrics.filter((row) => Number.isFinite(row[column])).map((row) => [row.step, row[column]]);
    if (!points.length) continue;
    const parts = column.split("/");
    const stage = STAGES[parts[0]] ? parts.shift() : "train";
    const side = SIDES[parts.at(-1)] ? parts.pop() : null;
    const measure = parts.join("/");
    const colour = side ? SIDES[side] : stage === "val" ? "up" : "plain";
    const name = side ? `${side}, ${STAGES[stage]}` : STAGES[stage];
    found.set(measure, [...(found.get(measure) ?? []), { name, points, colour, stage }]);
  }
  return found;
}

function curves(metrics) {
  const found = groups(metrics);
  if (!found.size) return section("Curves", nothing("This run has no curves."));
  const known = Object.keys(TITLES).filter((name) => found.has(name));
  const others = [...found.keys()].filter((name) => !TITLES[name]);
  const one = (name) => chart(TITLES[name] ?? harmless(name), found.get(name));
  const draw = (names) => h("div", { class: "charts" }, names.map(one));
  const first = known.filter((name) => Object.keys(TITLES).indexOf(name) < FIRST);
  const rest = [...known.filter((name) => !first.includes(name)), ...others];
  if (!first.length || !rest.length) return section("Curves", draw([...first, ...rest]));
  const more = h("details", {}, h("summary", {}, `${rest.length} more curves`), draw(rest));
  return section("Curves", draw(first), more);
}

function values(all) {
  const rows = Object.entries(all).map(([name, value]) =>
    h("tr", {}, h("th", { scope: "row" }, harmless(name)),
      h("td", {}, typeof value === "number" ? brief(value) : harmless(String(value))),
      h("td", { class: "quiet left" }, MEANINGS[name.replace(/^(train|val|test)\//, "")] ?? "")));
  if (!rows.length) return section("Values", nothing("This run has no final values."));
  return section("Values", scroll("Final values", h("table", { class: "values" }, h("tbody", {}, rows))));
}

function configuration(text) {
  if (!text.trim()) return section("Configuration", nothing("This run has no configuration."));
  return section("Configuration", h("details", {}, h("summary", {}, `${text.trim().split("\n").length} lines of YAML`),
    h("button", { class: "plain", click: () => copy(text) }, "Copy"),
    scroll("Configuration", h("pre", {}, visible(text)))));
}

const NOTHING = { name: "", results: { rows: [] }, metrics: [], values: {}, config: "" };

/** Draw the run; null if the models were served without one. */
export function showRun(run) {
  const { name, results: table, metrics, values: finals, config } = { ...NOTHING, ...run };
  const empty = !table.rows.length && !metrics.length && !Object.keys(finals).length && !config;
  $("run-name").textContent = empty ? "" : harmless(name);
  const intro = h("div", { class: "intro" }, h("h2", {}, empty ? "The run" : harmless(name)));
  const text = "These models are served without the run that trained them, so there are no results to show.";
  const none = () => [h("div", { class: "empty" }, h("h3", {}, "No run"), h("p", {}, text))];
  const all = () => [results(table), curves(metrics), values(finals), configuration(config)];
  $("run").replaceChildren(intro, ...(empty ? none() : all()));
}

/** Show that the run could not be loaded. */
export function showRunProblem(message, again) {
  const button = h("button", { class: "plain", click: again }, "Try again");
  $("run").replaceChildren(h("p", { class: "problem" }, message, " ", button));
}
