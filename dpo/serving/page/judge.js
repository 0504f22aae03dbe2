// The judge view: which of two answers the policy prefers, by /v1/compare. Prompt and answers are typed, or taken from
// the run's held-out pairs.

import { post } from "./api.js";
import { $, h, hiddenNote, number, say, short, write } from "./dom.js";
import { explain } from "./tokens.js";

const TURN = /\n\n(Human|Assistant):/;
const FIELDS = { prompt: "judge-prompt", chosen: "answer-a", rejected: "answer-b" };

let pairs = [];
let shown = null; // the fields as they were filled with a held-out pair, to notice edits
let pending = null; // abort controller of the running comparison

const fields = () => Object.fromEntries(Object.entries(FIELDS).map(([name, id]) => [name, $(id).value]));

function fill(texts) {
  for (const [name, id] of Object.entries(FIELDS)) write($(id), texts[name]);
}

const withoutEnd = (prompt) => prompt.replace(/\n\nAssistant:\s*$/, "").replace(/^\n\n/, "");
const lastQuestion = (prompt) => withoutEnd(prompt).split(TURN).at(-1).replace(/^Human:/, "");

/** Return the selected held-out pair unless the fields were edited; `swapped` if answer A is the rejected one. */
function picked() {
  const now = fields();
  if (!shown || now.prompt !== shown.prompt) return null;
  const swapped = now.chosen === shown.rejected;
  const [a, b] = swapped ? [now.rejected, now.chosen] : [now.chosen, now.rejected];
  return a === shown.chosen && b === shown.rejected ? { pair: pairs[$("held-out").value], swapped } : null;
}

/** Return a typed prompt as messages: a single user message, or a dialogue that begins with "Human:". */
function messages(prompt) {
  if (!/^\s*Human:/.test(prompt)) return [{ role: "user", content: prompt }];
  const parts = `\n\n${withoutEnd(prompt.trim())}`.split(TURN).slice(1);
  const result = [];
  for (let at = 0; at < parts.length; at += 2) {
    const role = parts[at] === "Human" ? "user" : "assistant";
    result.push({ role, content: parts[at + 1].replace(/^ /, "") });
  }
  const wrong = result.some(({ role }, at) => (role === "user") !== (at % 2 === 0)) || result.at(-1).role !== "user";
  if (wrong) throw new Error("Human and Assistant must alternate, beginning and ending with Human.");
  return result;
}

const withoutSpace = (text) => text.replace(/^ /, "");

function request() {
  const now = fields();
  const same = now.chosen.trim() === now.rejected.trim();
  if (same) throw new Error("Both answers are the same, so there is nothing to prefer.");
  const held = picked();
  const prompt = held ? { prompt: held.pair.prompt } : { messages: messages(now.prompt) };
  return { ...prompt, chosen: withoutSpace(now.chosen), rejected: withoutSpace(now.rejected) };
}

function verdict({ margin, probability, chosen, rejected }, beta, held) {
  const a = Math.round(100 * probability);
  const winner = margin >= 0 ? "A" : "B";
  const sure = margin >= 0 ? probability : 1 - probability;
  const words = margin === 0 ? "The policy is undecided" : [`The policy prefers answer ${winner}, `,
    h("strong", {}, `${number(100 * sure, 1)} %`), " sure"];
  const people = held && (held.swapped ? "B" : "A");
  const agreement = people && margin !== 0 &&
    h("p", { class: "quiet" }, `The data prefers ${people}: the policy ${people === winner ? "agrees" : "disagrees"}.`);
  const bar = h("div", {
    class: `split ${margin === 0 ? "" : winner.toLowerCase()}`,
    role: "img",
    "aria-label": `A ${a} percent, B ${100 - a} percent`,
  }, h("span", {}, "A"), h("span", {}, "B"));
  bar.style.setProperty("--a", `${100 * probability}%`);
  const [all, one, other] = [margin, chosen.reward, rejected.reward].map((value) => number(value, 2, true));
  const sum = h("p", { class: "quiet small" }, `margin ${all} = ${one} − (${other})`);
  const column = (name, answer) =>
    h("article", { class: "answer" }, h("header", {}, h("h3", {}, `Answer ${name}`),
      name === winner && margin !== 0 && h("span", { class: "tag" }, "preferred")),
      explain(answer, beta, `answer ${name}`));
  return [
    h("div", { class: "card verdict" }, h("p", { class: "big" }, words), bar, sum, agreement),
    h("div", { class: "columns" }, column("A", chosen), column("B", rejected)),
  ];
}

const problem = ({ message }) => h("p", { class: "problem", role: "alert" }, message);

async function judge(event) {
  event?.preventDefault();
  pending?.abort();
  const controller = (pending = new AbortController());
  const held = picked();
  $("verdict").replaceChildren(h("p", { class: "quiet loading" }, "Judging …"));
  $("judge-go").disabled = true;
  try {
    const got = await post("/v1/compare", { pairs: [request()], tokens: true }, controller.signal);
    $("verdict").replaceChildren(...verdict(got.pairs[0], got.beta, held));
    say($("verdict").querySelector(".big").textContent);
  } catch (error) {
    if (error.name !== "AbortError") $("verdict").replaceChildren(problem(error));
  } finally {
    if (pending === controller) $("judge-go").disabled = false;
  }
}

function forget() {
  pending?.abort();
  $("judge-go").disabled = false;
  $("verdict").replaceChildren();
}

function pick() {
  const pair = pairs[$("held-out").value];
  if (!pair) return;
  fill({ prompt: withoutEnd(pair.prompt), chosen: withoutSpace(pair.chosen), rejected: withoutSpace(pair.rejected) });
  shown = fields();
  judge();
}

/** Show the held-out pairs of the run for selection. */
export function showPairs(held) {
  pairs = held;
  $("pick").hidden = !pairs.length;
  $("no-pairs").hidden = pairs.length > 0;
  const options = pairs.map((pair, index) => h("option", { value: index }, short(lastQuestion(pair.prompt), 80)));
  $("held-out").replaceChildren(h("option", { value: "" }, `Choose one of ${pairs.length} …`), ...options);
}

export function startJudge() {
  for (const id of Object.values(FIELDS)) $(id).after(hiddenNote($(id)));
  $("judge-form").addEventListener("submit", judge);
  $("held-out").addEventListener("change", pick);
  $("another").addEventListener("click", () => {
    $("held-out").value = Math.floor(Math.random() * pairs.length);
    pick();
  });
  $("swap").addEventListener("click", () => {
    const now = fields();
    fill({ ...now, chosen: now.rejected, rejected: now.chosen });
    if ($("verdict").childElementCount && $("judge-form").checkValidity()) judge();
    else forget();
  });
  $("judge-clear").addEventListener("click", () => {
    fill({ prompt: "", chosen: "", rejected: "" });
    $("held-out").value = "";
    forget();
    $("judge-prompt").focus();
  });
  $("judge-form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("judge-form").requestSubmit();
  });
}
