// Conversations, which are kept in the browser's local storage, and their export as preference pairs or JSON.

export const SIDES = ["policy", "reference"];
export const DEFAULTS = { temperature: 0.7, top_p: 0.95, max_tokens: 128, seed: null };

const NAME = "dpo.conversations";
const MAX_CONVERSATIONS = 100; // beyond that, the oldest are dropped
const MARKER = /\n\n(Human|Assistant):/;

const fresh = () => ({ id: crypto.randomUUID?.() ?? String(Math.random()), turns: [] });
const isAnswer = (answer) => typeof answer?.text === "string" && typeof answer.state === "string";
const isTurn = (turn) => typeof turn?.prompt === "string" && SIDES.every((side) => isAnswer(turn.answers?.[side]));
const isConversation = (one) => typeof one?.id === "string" && Array.isArray(one.turns) && one.turns.every(isTurn);

/** Mark answers that were streaming when the page was closed as stopped. */
function stopStreaming(conversation) {
  for (const { answers } of conversation.turns)
    for (const side of SIDES) if (answers[side].state === "streaming") answers[side].state = "stopped";
  return conversation;
}

function load() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME) ?? "null");
    if (!Array.isArray(found?.conversations)) return [];
    return found.conversations.filter(isConversation).map(stopStreaming);
  } catch {
    return [];
  }
}

function loadSettings() {
  let found = null;
  try {
    found = JSON.parse(localStorage.getItem(`${NAME}.settings`));
  } catch {
    // not JSON: use the defaults
  }
  const value = (name) => (Number.isFinite(found?.[name]) ? found[name] : DEFAULTS[name]);
  return Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, value(name)]));
}

export const state = { conversations: load(), current: null, settings: loadSettings() };
state.current = state.conversations[0] ?? fresh();

const removed = new Set(); // ids of conversations removed in this tab

/** Store all conversations, including those of other tabs; false if the browser's storage is full or disabled. */
export function save() {
  const { current } = state;
  const others = state.conversations.filter((one) => one.id !== current.id);
  const known = new Set([current.id, ...others.map(({ id }) => id), ...removed]);
  const foreign = load().filter(({ id }) => !known.has(id));
  state.conversations = [...(current.turns.length ? [current] : []), ...others, ...foreign].slice(0, MAX_CONVERSATIONS);
  try {
    localStorage.setItem(NAME, JSON.stringify({ conversations: state.conversations }));
    localStorage.setItem(`${NAME}.settings`, JSON.stringify(state.settings));
    return true;
  } catch {
    return false;
  }
}

/** Open a conversation, or a new one. */
export function open(conversation = fresh()) {
  state.current = conversation;
}

/** Remove a conversation, and return a function that restores it. */
export function remove(conversation) {
  const index = state.conversations.indexOf(conversation);
  const wasOpen = state.current === conversation;
  state.conversations = state.conversations.filter((one) => one !== conversation);
  removed.add(conversation.id);
  if (wasOpen) open();
  save();
  return () => {
    removed.delete(conversation.id);
    state.conversations.splice(Math.max(index, 0), 0, conversation);
    if (wasOpen) open(conversation);
    save();
  };
}

export const newTurn = (prompt, settings) => ({
  prompt,
  settings,
  preferred: null, // the side marked as better
  kept: null, // the side whose answer the next turn follows
  answers: Object.fromEntries(SIDES.map((side) => [side, { text: "", state: "streaming" }])),
});

/** Return the side whose answer the conversation continues with: the better one, else the policy; null if empty. */
export function keeps(turn) {
  if (turn.kept) return turn.kept;
  const order = turn.preferred ? [turn.preferred, ...SIDES] : SIDES;
  return order.find((side) => turn.answers[side].text.trim()) ?? null;
}

/** Return the messages that both models get for the turn at `index`: the conversation so far, and the prompt. */
export function messages(turns, index) {
  const before = turns.slice(0, index).filter(keeps);
  const history = before.flatMap((turn) => [
    { role: "user", content: turn.prompt },
    { role: "assistant", content: turn.answers[keeps(turn)].text },
  ]);
  return [...history, { role: "user", content: turns[index].prompt }];
}

/** Return why a turn cannot become a preference pair; null if it can. */
export function unfit(turn) {
  const [a, b] = SIDES.map((side) => turn.answers[side]);
  if (a.state === "streaming" || b.state === "streaming") return "The other answer is not finished.";
  if (!a.text.trim() || !b.text.trim()) return "Nothing to compare with.";
  if (a.text === b.text) return "Both answers are the same.";
  return null;
}

const SPEAKERS = { user: "Human", assistant: "Assistant" };
const dialogue = (turns) => turns.map(({ role, content }) => `\n\n${SPEAKERS[role]}: ${content}`).join("");

/** Return all marked turns as rows {chosen, rejected}, and how many cannot be written in that format. */
export function preferences() {
  const rows = [];
  let skipped = 0;
  for (const { turns } of [state.current, ...state.conversations.filter((one) => one !== state.current)])
    for (const [index, turn] of turns.entries()) {
      if (!turn.preferred) continue;
      const prompts = messages(turns, index);
      const side = (name) => turn.answers[name].text;
      const rejected = SIDES.find((name) => name !== turn.preferred);
      const texts = [...prompts.map(({ content }) => content), side("policy"), side("reference")];
      if (unfit(turn) || texts.some((text) => MARKER.test(text))) skipped += 1;
      else {
        const prompt = dialogue(prompts) + "\n\nAssistant: ";
        rows.push({ chosen: prompt + side(turn.preferred), rejected: prompt + side(rejected) });
      }
    }
  return { rows, skipped };
}

/** Return the open conversation as a JSON document. */
export function transcript(run) {
  const turns = state.current.turns.map((turn, index) => ({
    messages: messages(state.current.turns, index),
    answers: turn.answers,
    preferred: turn.preferred,
    continued_with: keeps(turn),
    settings: turn.settings,
  }));
  return JSON.stringify({ run, exported: new Date().toISOString(), turns }, null, 2);
}
