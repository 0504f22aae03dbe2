// The view that explains every answer of the open conversation token by token. Scores are requested once per turn and
// shared with the chat view.

import { post } from "./api.js";
import { $, h, short, visible } from "./dom.js";
import { SIDES, messages, state } from "./store.js";
import { explain, legend } from "./tokens.js";

const scores = new WeakMap(); // turn -> { key, promise of { beta, policy, reference } }

/** Return the scores of both answers of a turn; an empty answer has none. */
export function score(turns, index) {
  const turn = turns[index];
  const history = messages(turns, index);
  const sides = SIDES.filter((side) => turn.answers[side].text.trim());
  const answers = sides.map((side) => turn.answers[side].text);
  // An answer that was cut or stopped never said its end, so no end is scored.
  const ended = ({ state, reason }) => state === "done" && reason !== "length";
  const finish_reasons = sides.map((side) => (ended(turn.answers[side]) ? "stop" : "length"));
  const body = { messages: history, answers, finish_reasons, tokens: true };
  const key = JSON.stringify(body);
  if (scores.get(turn)?.key !== key) {
    const response = sides.length ? post("/v1/score", body) : { answers: [] };
    const promise = Promise.resolve(response).then((got) => ({
      beta: got.beta,
      ...Object.fromEntries(sides.map((side, at) => [side, got.answers[at]])),
    }));
    promise.catch(() => scores.delete(turn)); // request them again next time
    scores.set(turn, { key, promise });
  }
  return scores.get(turn).promise;
}

const titles = { policy: "Policy", reference: "Reference" };

function column(side, turn, scored) {
  const body = scored?.[side]
    ? explain(scored[side], scored.beta, `the ${side}'s answer`)
    : h("p", { class: "quiet" }, turn.answers[side].text.trim() ? "Scoring …" : "This answer is empty.");
  return h("article", { class: `answer ${side}` }, h("header", {}, h("h4", {}, titles[side])), body);
}

function block(turns, index) {
  const turn = turns[index];
  const columns = h("div", { class: "columns" });
  const fill = (scored) => columns.replaceChildren(...SIDES.map((side) => column(side, turn, scored)));
  const fail = (error) =>
    columns.replaceChildren(
      h("p", { class: "problem" }, error.message, " ", h("button", { class: "plain", click: ask }, "Try again")),
    );
  const ask = () => {
    fill(null);
    score(turns, index).then(fill, fail);
  };
  if (SIDES.some((side) => turn.answers[side].state === "streaming"))
    columns.replaceChildren(h("p", { class: "quiet" }, "Still being generated …"));
  else ask();
  return h("section", { class: "turn", "aria-label": short(turn.prompt) },
    h("h3", { class: "said", dir: "auto" }, visible(turn.prompt)), columns);
}

/** Draw the open conversation. */
export function showWhy() {
  const { turns } = state.current;
  $("why-empty").hidden = turns.length > 0;
  $("why-turns").replaceChildren(...turns.map((_, index) => block(turns, index)));
}

/** Set up the view; `toChat` opens the chat. */
export function startWhy(toChat) {
  $("legend").replaceChildren(...legend());
  $("why-chat").addEventListener("click", toChat);
}
