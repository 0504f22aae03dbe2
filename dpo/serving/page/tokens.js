// A scored answer: its reward and its tokens coloured by log-ratio, with the numbers on hover, on focus and in a table.
// The input is an answer as returned by /v1/score.

import { $, h, harmless, number, visible } from "./dom.js";

const FULL = 3; // log-ratio in nats at which the colour is strongest
const NEUTRAL = 0.05; // log-ratio in nats below which a token has no colour
const MOVERS = 3; // number of tokens listed as raised or lowered most

const ratio = (token) => token.policy - token.reference;
const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? `${value.toFixed(1)} %` : value > 0 ? "< 0.1 %" : "0 %";
};

function label(token, last) {
  if (token.text === "") return last ? "end" : "·";
  return token.text.replaceAll("\n", "↵");
}

function hideTip() {
  $("tip").hidden = true;
}

function showTip(node, token, last) {
  const tip = $("tip");
  const cells = (...values) => values.map((value) => h("td", {}, value));
  const row = (name, value, side) =>
    h("tr", {}, h("th", { scope: "row", class: side }, name), cells(value, side && percent(token[side])));
  tip.replaceChildren(
    h("table", {},
      row("policy", number(token.policy, 3), "policy"),
      row("reference", number(token.reference, 3), "reference"),
      row("log-ratio", number(ratio(token), 3, true)),
    ),
    token.text === "" && last ? h("p", {}, "the end of the answer") : "",
  );
  tip.hidden = false;
  const at = node.getClientRects()[0];
  const left = Math.min(Math.max(8, at.left), window.innerWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 0 ? above : at.bottom + 6}px`;
}

function colour(node, value) {
  const strength = Math.min(Math.abs(value) / FULL, 1);
  node.style.setProperty("--strength", `${(6 + 64 * strength).toFixed(1)}%`);
  if (Math.abs(value) >= NEUTRAL) node.classList.add(value > 0 ? "up" : "down");
}

/** Group the tokens of a word, so that lines break between words and after line breaks in the text. */
function words(tokens, nodes) {
  const parts = [];
  for (const [index, { text }] of tokens.entries()) {
    const broken = index > 0 && tokens[index - 1].text.includes("\n");
    if (broken) parts.push("\n");
    const begins = index === 0 || broken || text === "" || /^\s/.test(text);
    if (begins) parts.push(h("span", { role: "none", class: "word" }));
    parts.at(-1).append(nodes[index]);
  }
  return parts;
}

/** Return the tokens in reading order: one Tab stop, with the arrow keys moving between tokens. */
function strip(answer, name) {
  const nodes = answer.tokens.map((token, index) => {
    const last = index === answer.tokens.length - 1;
    const show = () => showTip(node, token, last);
    const node = h(
      "span",
      {
        role: "listitem",
        class: token.text === "" ? "token mark" : "token",
        tabindex: index === 0 ? 0 : -1,
        "aria-describedby": "tip",
        mouseenter: show,
        focus: show,
        mouseleave: hideTip,
        blur: hideTip,
      },
      visible(label(token, last)),
      h("span", { class: "sr-only" }, ` log-ratio ${number(ratio(token), 2, true)} `),
    );
    node.dataset.policy = token.policy;
    node.dataset.reference = token.reference;
    colour(node, ratio(token));
    return node;
  });
  const move = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") hideTip();
    const at = nodes.indexOf(document.activeElement);
    if (step === undefined || at < 0) return;
    event.preventDefault();
    const next = nodes[Math.min(Math.max(at + step, 0), nodes.length - 1)];
    nodes[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  };
  return h(
    "div",
    { class: "tokens", role: "list", dir: "auto", "aria-label": `Tokens of ${name}; arrow keys move`, keydown: move },
    words(answer.tokens, nodes),
  );
}

function movers(answer) {
  if (answer.tokens.every((token) => ratio(token) === 0))
    return h("p", { class: "quiet small movers" }, "Both models give every token the same probability.");
  const last = answer.tokens.at(-1);
  const sorted = answer.tokens.filter((token) => Math.abs(ratio(token)) >= NEUTRAL).sort((a, b) => ratio(b) - ratio(a));
  const list = (tokens) =>
    tokens.map((token) => {
      const chip = h("span", { class: "chip" }, harmless(label(token, token === last).trim()) || "␣", " ",
        h("b", {}, number(ratio(token), 2, true)));
      colour(chip, ratio(token));
      return chip;
    });
  const up = sorted.filter((token) => ratio(token) > 0).slice(0, MOVERS);
  const down = sorted.filter((token) => ratio(token) < 0).slice(-MOVERS).reverse();
  const line = (name, tokens) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, tokens.length ? list(tokens) : h("span", { class: "quiet" }, "none")));
  return h("dl", { class: "movers" }, line("Raised most", up), line("Lowered most", down));
}

function numbers(answer) {
  const head = ["token", "policy", "reference", "log-ratio"].map((name) => h("th", { scope: "col" }, name));
  const rows = answer.tokens.map((token, index) =>
    h("tr", {},
      h("th", { scope: "row" }, visible(label(token, index === answer.tokens.length - 1))),
      [number(token.policy, 3), number(token.reference, 3), number(ratio(token), 3, true)].map((v) => h("td", {}, v)),
    ),
  );
  return h("details", {},
    h("summary", {}, "All numbers (nats)"),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Log-probabilities of every token" },
      h("table", { class: "numbers" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, rows))),
  );
}

/** Return the reward with its formula: "reward +0.17 = 0.1 × ...". */
function reward(answer, beta) {
  const { policy, reference } = answer.logprob;
  const sum = `${Number(beta.toPrecision(4))} × (${number(policy)} − (${number(reference)}))`;
  return h("p", { class: "reward" },
    h("span", { class: "quiet" }, "reward "),
    h("strong", {}, number(answer.reward, 2, true)),
    h("span", { class: "quiet small" }, ` = ${sum}, ${answer.length} tokens`),
  );
}

/** Return the whole explanation of an answer; `name` describes it, as in "the policy's answer". */
export function explain(answer, beta, name) {
  return [reward(answer, beta), strip(answer, name), movers(answer), numbers(answer)];
}

/** Return the legend of the colours. */
export function legend() {
  const steps = [-3, -2, -1, 0, 1, 2, 3].map((value) => {
    const step = h("span", { class: "token" }, number(value, 0, true));
    colour(step, value);
    return step;
  });
  return [h("span", { class: "small" }, "less likely than before"), h("span", { class: "scale" }, steps),
    h("span", { class: "small" }, "more likely (nats)")];
}

document.addEventListener("scroll", hideTip, { passive: true });
