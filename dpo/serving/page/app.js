// Starts the page: tabs, menus, the key dialog, the offline banner, and loading the run.

import { connect, get } from "./api.js";
import { showExamples, startChat } from "./chat.js";
import { $, h, harmless } from "./dom.js";
import { showPairs, startJudge } from "./judge.js";
import { showRun, showRunProblem } from "./run.js";
import { showWhy, startWhy } from "./why.js";

const VIEWS = ["chat", "why", "judge", "run"];
const EXAMPLES = [
  "What is the capital of Italy?",
  "I would like to make tea. What do I do?",
  "What is five plus three?",
];
const MAX_EXAMPLES = 4;

let run = null;
let current = "chat";

function show(view) {
  current = view;
  for (const name of VIEWS) {
    const selected = name === view;
    $(name).hidden = !selected;
    $(`tab-${name}`).setAttribute("aria-selected", String(selected));
    $(`tab-${name}`).tabIndex = selected ? 0 : -1;
  }
  if (view === "why") showWhy();
}

/** The view named by the URL fragment; the current one if it names none. */
const viewFromUrl = () => VIEWS.find((name) => location.hash === `#${name}`) ?? current;

function startTabs() {
  for (const name of VIEWS) $(`tab-${name}`).addEventListener("click", () => (location.hash = name));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const at = VIEWS.indexOf(current);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const view = VIEWS.at(to % VIEWS.length);
    location.hash = view;
    $(`tab-${view}`).focus();
  });
  window.addEventListener("hashchange", () => (show(viewFromUrl()), window.scrollTo(0, 0)));
  show(viewFromUrl());
}

/** Close menus on a click elsewhere and on Escape. */
function startMenus() {
  const menus = [...document.querySelectorAll(".menu")];
  document.addEventListener("click", (event) => {
    for (const menu of menus) if (!menu.contains(event.target) || event.target.closest(".row")) menu.open = false;
  });
  for (const menu of menus)
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      menu.open = false;
      menu.querySelector("summary").focus();
    });
}

function askKey(wrong) {
  const dialog = $("key");
  $("key-wrong").hidden = !wrong;
  $("key-value").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue && $("key-value").value.trim()), { once: true }));
}

function showReachable(reachable) {
  $("offline").hidden = reachable;
  if (!reachable) {
    const again = h("button", { class: "plain", click: loadRun }, "Try again");
    $("offline").replaceChildren("The server is not responding. Is it still running? ", again);
  }
}

/** Example prompts: the first human turns of held-out dialogues without repeats, then the default ones. */
function openings(pairs) {
  const human = pairs.map(({ prompt }) => prompt.split(/\n\n(?:Human|Assistant):/)[1]?.trim()).filter(Boolean);
  const shortOnes = [...new Set(human)].filter((text) => text.length <= 160);
  return [...shortOnes, ...EXAMPLES].slice(0, MAX_EXAMPLES);
}

async function loadRun() {
  try {
    run = await get("/v1/run");
  } catch (error) {
    run = null;
    if (error.status !== 404) {
      showExamples(EXAMPLES);
      return showRunProblem(error.message, loadRun);
    }
  }
  $("note").textContent = harmless(run?.note ?? "");
  $("note").hidden = !run?.note;
  const pairs = run?.held_out ?? [];
  showRun(run);
  showPairs(pairs);
  showExamples(openings(pairs));
}

connect(askKey, showReachable);
startChat(
  () => run?.name ?? null,
  (index) => {
    location.hash = "why";
    show("why");
    requestAnimationFrame(() => $("why-turns").children[index]?.scrollIntoView({ block: "start" }));
  },
);
startWhy(() => (location.hash = "chat"));
startJudge();
startTabs();
startMenus();
loadRun();
