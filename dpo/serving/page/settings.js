// How answers are drawn: the four fields below the message, what they say in a line, and their values for a request.

import { $ } from "./dom.js";
import { DEFAULTS, state } from "./store.js";

const FIELDS = ["temperature", "top_p", "max_tokens", "seed"];

function describe() {
  const { temperature, top_p, max_tokens, seed } = state.settings;
  const seeded = seed === null ? "new seed" : `seed ${seed}`;
  $("settings-text").textContent = `temperature ${temperature} · top-p ${top_p} · ${max_tokens} tokens · ${seeded}`;
}

/** Whether every field holds a number that can be used; if not, the browser says at the field what is wrong. */
export function settingsHold() {
  const wrong = FIELDS.find((name) => !$(name).checkValidity());
  if (!wrong) return true;
  $("settings").open = true;
  $(wrong).reportValidity();
  return false;
}

/** The values for one turn, the same for both models; without a seed one is drawn. */
export function drawn() {
  const given = { ...state.settings };
  given.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return given;
}

/** Fill the fields; `changed` is called when a value was. */
export function startSettings(changed) {
  for (const name of FIELDS) {
    $(name).value = state.settings[name] ?? "";
    $(name).addEventListener("change", () => {
      if (!$(name).reportValidity()) return;
      state.settings[name] = $(name).value === "" ? DEFAULTS[name] : $(name).valueAsNumber;
      describe();
      changed();
    });
  }
  describe();
}
