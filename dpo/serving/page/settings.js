// The sampling settings: four fields below the message, and a one-line summary of them.

import { $ } from "./dom.js";
import { DEFAULTS, state } from "./store.js";

const FIELDS = ["temperature", "top_p", "max_tokens", "seed"];

function describe() {
  const { temperature, top_p, max_tokens, seed } = state.settings;
  const seeded = seed === null ? "new seed" : `seed ${seed}`;
  $("settings-text").textContent = `temperature ${temperature} · top-p ${top_p} · ${max_tokens} tokens · ${seeded}`;
}

/** Return whether all fields are valid; if not, the browser marks the first invalid one. */
export function settingsHold() {
  const wrong = FIELDS.find((name) => !$(name).checkValidity());
  if (!wrong) return true;
  $("settings").open = true;
  $(wrong).reportValidity();
  return false;
}

/** Return the settings of one turn, the same for both models; without a seed, a random one is chosen. */
export function drawn() {
  const given = { ...state.settings };
  given.seed ??= crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  return given;
}

/** Fill the fields; `changed` is called after every change. */
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
