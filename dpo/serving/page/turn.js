// Draws one turn: the prompt, and the answers of policy and reference side by side. `on` holds the handlers of its
// buttons.

import { copy, h, hiddenNote, number, visible } from "./dom.js";
import { SIDES, keeps, unfit } from "./store.js";

const HEADER = 96; // maximum height of the page's header, in pixels
const EMPTY = { done: "The model ended at once, with an empty answer.", stopped: "Stopped before the first word." };
const TITLES = { policy: "Policy", reference: "Reference" };

/** Return the length, the time and how the answer ended, in a few words. */
function facts(answer, settings) {
  const some = [];
  if (answer.tokens != null) some.push(`${answer.tokens} tokens`);
  if (answer.seconds != null && answer.state === "done") some.push(`${answer.seconds.toFixed(1)} s`);
  if (answer.reason === "length") some.push(`cut at ${settings.max_tokens} tokens`);
  if (answer.state === "stopped") some.push("stopped");
  return some.join(" · ");
}

class AnswerView {
  constructor(turn, side, index, on) {
    Object.assign(this, { turn, side });
    const title = `answer-${index}-${side}`;
    this.text = h("p", { class: "text", dir: "auto" });
    this.problem = h("p", { class: "problem", hidden: true });
    this.kept = h("span", { class: "tag", hidden: true }, "continues here");
    this.facts = h("span", { class: "quiet small facts" });
    this.rewarded = h("button", { class: "plain reward", click: on.why, hidden: true });
    this.better = h("button", { class: "better", "aria-describedby": title, click: () => on.prefer(side) });
    this.unfit = h("span", { class: "quiet small", hidden: true });
    this.copy = h("button", { class: "plain", click: () => copy(this.answer.text) }, "Copy");
    this.retry = h("button", { class: "plain", hidden: true, click: () => on.retry(side) }, "Try again");
    this.node = h("article", { class: `answer ${side}`, "aria-labelledby": title },
      h("header", {}, h("h3", { id: title }, TITLES[side]), this.kept),
      this.text,
      this.problem,
      h("footer", {},
        h("div", { class: "actions" }, this.better, this.unfit, this.copy, this.retry),
        h("p", { class: "line" }, this.facts, this.rewarded)),
    );
    this.text.append(...visible(this.answer.text));
  }

  get answer() {
    return this.turn.answers[this.side];
  }

  begin() {
    this.text.replaceChildren();
    this.rewarded.hidden = true;
  }

  append(piece) {
    this.text.append(...visible(piece));
  }

  reward(scored, problem) {
    const reward = scored?.[this.side]?.reward;
    this.rewarded.hidden = reward == null && !problem;
    this.rewarded.classList.toggle("quiet", reward == null);
    this.rewarded.title = problem ?? "Why: token by token";
    const value = h("strong", {}, number(reward, 2, true));
    this.rewarded.replaceChildren(...(reward == null ? ["no reward"] : ["reward ", value, " – why?"]));
  }

  refresh({ busy, last }) {
    const { answer } = this;
    const streaming = answer.state === "streaming";
    const failed = answer.state === "failed";
    this.node.setAttribute("aria-busy", String(streaming));
    this.node.classList.toggle("writing", streaming);
    this.facts.textContent = facts(answer, this.turn.settings);
    this.text.hidden = !streaming && !answer.text;
    this.problem.hidden = !failed && (streaming || answer.text.trim() !== "");
    this.problem.textContent = failed ? answer.error : EMPTY[answer.state];
    this.retry.hidden = !failed || !last || busy;
    this.copy.hidden = !answer.text || streaming;
    this.refreshBetter(streaming);
    this.refreshKept(last, busy);
  }

  refreshBetter(streaming) {
    const chosen = this.turn.preferred === this.side;
    const reason = unfit(this.turn);
    this.better.hidden = streaming || reason !== null;
    this.unfit.hidden = streaming || reason === null;
    this.unfit.textContent = reason ?? "";
    this.better.title = chosen ? "Press again to undo" : "Mark as a preference pair for the export";
    this.better.textContent = chosen ? "✓ Better" : "This one is better";
    this.better.setAttribute("aria-pressed", String(chosen));
  }

  refreshKept(last, busy) {
    this.kept.hidden = (busy && last) || keeps(this.turn) !== this.side;
    this.kept.textContent = last ? "continues here" : "continued here";
    this.node.classList.toggle("kept", !this.kept.hidden);
  }
}

export class TurnView {
  constructor(turn, index, on) {
    Object.assign(this, { turn, on });
    this.sides = Object.fromEntries(SIDES.map((side) => [side, new AnswerView(turn, side, index, on)]));
    this.again = h("button", { class: "plain", click: on.again }, "Ask again");
    this.editButton = h("button", { class: "plain", click: () => this.edit() }, "Edit");
    this.said = h("div", { class: "said", dir: "auto" }, visible(turn.prompt));
    this.prompt = h("div", { class: "prompt" }, this.said,
      h("div", { class: "actions" }, this.editButton, this.again,
        h("button", { class: "plain", click: () => copy(turn.prompt) }, "Copy"),
        h("span", { class: "quiet small facts" }, `seed ${turn.settings?.seed ?? "–"}`)));
    const columns = h("div", { class: "columns" }, SIDES.map((side) => this.sides[side].node));
    this.node = h("li", { class: "turn" }, this.prompt, columns);
  }

  begin(side) {
    this.sides[side].begin();
    this.prompt.querySelector(".facts").textContent = `seed ${this.turn.settings.seed}`;
  }

  /** Add text, and scroll along with it; where the answers are in one column, not so far that the prompt is hidden. */
  append(side, piece) {
    const below = () => document.body.scrollHeight - window.innerHeight - window.scrollY;
    const follow = below() < 80;
    this.sides[side].append(piece);
    if (!follow) return;
    const [first, second] = SIDES.map((name) => this.sides[name].node.getBoundingClientRect().top);
    const limit = first === second ? Infinity : this.node.getBoundingClientRect().top - HEADER;
    window.scrollBy(0, Math.max(0, Math.min(below(), limit)));
  }

  reward(scored, problem) {
    const written = (side) => this.turn.answers[side].text.trim() !== "";
    for (const side of SIDES) this.sides[side].reward(scored, written(side) ? problem : undefined);
  }

  refresh(state) {
    this.again.hidden = !state.last || state.busy;
    this.editButton.hidden = state.busy;
    for (const side of SIDES) this.sides[side].refresh(state);
  }

  /** Turn the prompt into a text field; sending it replaces this turn and all later ones. */
  edit() {
    const field = h("textarea", { rows: 2, dir: "auto", "aria-label": "Edit the message" });
    field.value = this.turn.prompt;
    const note = hiddenNote(field);
    const back = () => {
      form.replaceWith(this.prompt);
      this.editButton.focus();
    };
    const send = (event) => {
      event.preventDefault();
      if (field.value.trim()) this.on.edit(field.value);
    };
    const keys = (event) => {
      if (event.key === "Escape") back();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    };
    const form = h("form", { class: "prompt", submit: send }, field, note,
      h("div", { class: "actions" }, h("button", { class: "primary" }, "Ask"),
        h("button", { type: "button", click: back }, "Cancel")));
    field.addEventListener("keydown", keys);
    this.prompt.replaceWith(form);
    field.focus();
  }
}
