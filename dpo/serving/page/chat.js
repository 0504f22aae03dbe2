// The chat view: each prompt goes to both models, which answer side by side. This file handles the view's buttons and
// the streams; `turn.js` draws a turn, `store.js` keeps the conversations.

import { chat } from "./api.js";
import { $, download, h, hiddenNote, notice, say, short, write } from "./dom.js";
import { SIDES, messages, newTurn, open, keeps, preferences, remove, save, state, transcript } from "./store.js";
import { drawn, settingsHold, startSettings } from "./settings.js";
import { TurnView } from "./turn.js";
import { score } from "./why.js";

let views = []; // one for each turn of the open conversation
let running = []; // abort controllers of the streams

function keep() {
  if (!save()) notice("The browser cannot store any more history for this page: export what you need.");
  const { rows, skipped } = preferences();
  const omitted = skipped ? `, ${skipped} cannot be written in this format` : "";
  $("export-count").textContent = `${rows.length} ${rows.length === 1 ? "pair" : "pairs"} marked${omitted}`;
  $("export-pairs").disabled = !rows.length;
  const kept = state.conversations.length;
  $("history-summary").textContent = kept ? `Conversations (${kept})` : "Conversations";
}

function frame() {
  const busy = running.length > 0;
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  $("welcome").hidden = state.current.turns.length > 0;
  $("clear").disabled = $("export-conversation").disabled = !state.current.turns.length;
  for (const [index, view] of views.entries()) view.refresh({ busy, last: index === views.length - 1 });
}

/** Redraw the open conversation. */
function draw() {
  const { turns } = state.current;
  views = turns.map((turn, index) => makeView(turn, index));
  $("turns").replaceChildren(...views.map((view) => view.node));
  keep();
  frame();
  for (const index of turns.keys()) reward(index);
}

function makeView(turn, index) {
  return new TurnView(turn, index, {
    again: () => again(index),
    retry: (side) => stream(index, [side]),
    edit: (prompt) => edit(index, prompt),
    prefer: (side) => {
      turn.preferred = turn.preferred === side ? null : side;
      keep();
      frame();
      if (turn.preferred) say(`The ${side}'s answer is marked as better.`);
    },
    why: () => actions.why(index),
  });
}

const actions = { why: () => {} };

function reward(index) {
  const { turns } = state.current;
  const view = views[index];
  if (SIDES.some((side) => turns[index].answers[side].state === "streaming")) return;
  score(turns, index).then((scored) => view.reward(scored), (error) => view.reward(null, error.message));
}

/** Add a chunk of the stream to an answer, and return the text that it adds. */
function addChunk(answer, chunk) {
  const choice = chunk.choices?.[0];
  const piece = choice?.delta?.content ?? "";
  const added = answer.text ? piece : piece.trimStart();
  answer.text += added;
  answer.reason = choice?.finish_reason ?? answer.reason;
  answer.tokens = chunk.usage?.completion_tokens ?? answer.tokens;
  return added;
}

async function answer(index, side, signal) {
  const { turns } = state.current;
  const turn = turns[index];
  const view = views[index];
  const current = (turn.answers[side] = { text: "", state: "streaming" });
  const began = performance.now();
  view.begin(side);
  try {
    const body = { model: side, messages: messages(turns, index), ...turn.settings };
    for await (const chunk of chat(body, signal)) {
      const added = addChunk(current, chunk);
      if (added) view.append(side, added);
    }
    current.state = "done";
  } catch (error) {
    current.state = error.name === "AbortError" ? "stopped" : "failed";
    if (current.state === "failed") current.error = error.message;
  }
  current.seconds = (performance.now() - began) / 1000;
  keep();
  frame();
}

async function stream(index, sides = SIDES) {
  const controller = new AbortController();
  running.push(controller);
  const conversation = state.current;
  const turn = conversation.turns[index];
  turn.preferred = null;
  const answers = sides.map((side) => answer(index, side, controller.signal));
  frame();
  await Promise.all(answers);
  running = running.filter((one) => one !== controller);
  frame();
  if (state.current !== conversation) return;
  const outcome = { done: "finished", stopped: "stopped", failed: "failed" };
  say(sides.map((side) => `${side} ${outcome[turn.answers[side].state]}`).join(", "));
  reward(index);
}

function stop() {
  for (const controller of running) controller.abort();
}

function ask(prompt) {
  const { turns } = state.current;
  const before = turns.at(-1);
  if (before) before.kept = keeps(before);
  turns.push(newTurn(prompt.toWellFormed?.() ?? prompt, drawn()));
  const index = turns.length - 1;
  views.push(makeView(turns[index], index));
  $("turns").append(views[index].node);
  stream(index);
  views[index].node.scrollIntoView({ block: "start", behavior: "smooth" });
  keep();
}

function again(index) {
  const turn = state.current.turns[index];
  turn.settings = drawn();
  stream(index);
}

/** Replace a turn by an edited prompt. Later turns no longer follow from it and are removed, which can be undone. */
function edit(index, prompt) {
  stop();
  const { turns } = state.current;
  const removed = turns.splice(index);
  const before = turns.at(-1);
  const kept = before?.kept;
  if (before) before.kept = null;
  draw();
  ask(prompt);
  if (removed.length > 1)
    notice(`${removed.length - 1} later ${removed.length === 2 ? "turn" : "turns"} removed.`, "Undo", () => {
      stop();
      turns.splice(index, turns.length, ...removed);
      if (before) before.kept = kept;
      draw();
    });
}

function clear() {
  stop();
  const conversation = state.current;
  const marked = conversation.turns.filter((turn) => turn.preferred).length;
  const undo = remove(conversation);
  draw();
  const pairs = marked ? ` with ${marked} marked ${marked === 1 ? "pair" : "pairs"}` : "";
  notice(`Conversation removed${pairs}.`, "Undo", () => (undo(), draw()));
  $("prompt").focus();
}

function go(conversation) {
  stop();
  save();
  open(conversation);
  draw();
  $("prompt").focus();
}

function drawHistory() {
  const rows = state.conversations.map((one) =>
    h("li", {},
      h("button", { class: "row", "aria-current": one === state.current ? "true" : null,
        click: () => (($("history").parentElement.open = false), go(one)) },
        h("strong", { dir: "auto" }, short(one.turns[0].prompt, 48)),
        h("span", { class: "quiet" }, `${one.turns.length} ${one.turns.length === 1 ? "turn" : "turns"}`)),
    ));
  const empty = h("p", { class: "quiet" }, "Nothing yet. Conversations are kept here, in this browser only.");
  $("history").replaceChildren(rows.length ? h("ul", {}, rows) : empty);
}

function submit(event) {
  event.preventDefault();
  if (!settingsHold()) return;
  const prompt = $("prompt").value;
  if (running.length || !prompt.trim()) return;
  write($("prompt"), "");
  ask(prompt);
}

function keys(event) {
  if (event.key === "Escape" && running.length) stop();
  const typing = event.target === $("prompt");
  if (typing && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
}

/** Show example prompts. */
export function showExamples(prompts) {
  const item = (prompt) => h("li", {}, h("button", { dir: "auto", click: () => ask(prompt) }, short(prompt, 120)));
  $("examples").replaceChildren(...prompts.map(item));
}

/** Set up the view; `run()` returns the name of the run, `why(index)` shows the explanation of a turn. */
export function startChat(run, why) {
  actions.why = why;
  startSettings(keep);
  $("settings").before(hiddenNote($("prompt")));
  $("composer").addEventListener("submit", submit);
  $("chat").addEventListener("keydown", keys);
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => go());
  $("clear").addEventListener("click", clear);
  $("history").parentElement.addEventListener("toggle", drawHistory);
  $("export-pairs").addEventListener("click", () => {
    const lines = preferences().rows.map((row) => `${JSON.stringify(row)}\n`);
    download("preferences.jsonl", "application/jsonl", lines.join(""));
  });
  $("export-conversation").addEventListener("click", () =>
    download("conversation.json", "application/json", transcript(run())));
  draw();
}
