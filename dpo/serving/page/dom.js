// Helpers that create elements. Text always becomes a text node, never markup, and characters that could reorder or
// hide text are shown as code points.

const SVG = "http://www.w3.org/2000/svg"; // an XML namespace, nothing is fetched

// Control characters, direction marks, invisible fillers and tags, but not the joiners that emoji and Persian need.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180e" +
    "\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb" +
    "\\u{e0000}-\\u{e007f}]|\\p{Surrogate}",
  "gu",
);

export const $ = (id) => document.getElementById(id);

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null && child !== false));
  return node;
}

/** Create an element. Attributes whose value is a function are event listeners; children are strings or nodes. */
export const h = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);

/** Create an SVG element in the same way. */
export const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS(SVG, tag), attributes, children);

const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Return a string as nodes in which every hidden character is shown as its code point. */
export function visible(text) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    nodes.push(text.slice(from, match.index));
    nodes.push(h("span", { class: "hidden-character", title: "an invisible character" }, codePoint(match[0])));
    from = match.index + match[0].length;
  }
  return [...nodes, text.slice(from)];
}

/** Return a string with every hidden character replaced by its code point, for labels and options. */
export const harmless = (text) => text.replace(HIDDEN, (character) => `[${codePoint(character)}]`);

/** Return a line below a text field that lists its hidden characters, which the field itself cannot show. */
export function hiddenNote(field) {
  const note = h("p", { class: "quiet small", hidden: true });
  const update = () => {
    const hidden = [...new Set(field.value.match(HIDDEN)?.map(codePoint))];
    note.hidden = !hidden.length;
    note.textContent = `Contains invisible characters: ${hidden.join(", ")}`;
  };
  field.addEventListener("input", update);
  update();
  return note;
}

/** Set the value of a field as if the user had typed it. */
export function write(field, text) {
  field.value = text;
  field.dispatchEvent(new Event("input"));
}

/** Return `text` on one line, shortened to `length` characters. */
export function short(text, length = 60) {
  const line = [...harmless(text.trim().replace(/\s+/g, " "))];
  return line.length > length ? `${line.slice(0, length - 1).join("")}…` : line.join("");
}

/** Format a number with fixed decimals, a true minus sign and, if `plus`, a plus sign. */
export function number(value, decimals = 2, plus = false) {
  if (value == null || !Number.isFinite(value)) return "–";
  const digits = Math.abs(value).toFixed(decimals);
  const sign = Number(digits) === 0 ? "" : value < 0 ? "−" : plus ? "+" : "";
  return sign + digits;
}

/** Announce something to screen readers only. */
export function say(text) {
  $("spoken").textContent = text;
}

let timer;

/** Show a short message at the bottom for some seconds, with an optional action button. */
export function notice(text, action, act) {
  clearTimeout(timer);
  const close = () => $("notice").replaceChildren();
  const button = action && h("button", { class: "plain", click: () => (close(), act()) }, action);
  $("notice").replaceChildren(h("div", { class: "toast" }, h("span", {}, text), button));
  timer = setTimeout(close, action ? 10000 : 4000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    notice("Copied.");
  } catch {
    notice("The browser does not allow this page to copy. Select the text and copy it by hand.");
  }
}

/** Offer a text as a file download. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
