// The settings dialog: system message, sampling, theme and API key.

import { readJson, writeJson } from "./archive.js";

const DEFAULTS = { system: "", temperature: "0.8", top_p: "0.95", top_k: "0", min_p: "0.05", max_tokens: "", seed: "" };

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const explanation = document.getElementById("why");

const settings = {};
let apiKey = "";
let onKeyChange = () => {};
try {
  apiKey = sessionStorage.getItem("duck.key") ?? "";
} catch { /* no storage */ }

function load() {
  Object.assign(settings, DEFAULTS);
  for (const [name, value] of Object.entries(readJson("duck.settings", {}) ?? {}))
    if (name in DEFAULTS && typeof value === "string") settings[name] = value;
}
load();
addEventListener("storage", (event) => {
  if (event.key === "duck.settings") load();
});

export const systemMessage = () => settings.system.trim();

/** The sampling settings as fields of a request. */
export function samplingFields() {
  const names = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"].filter((name) => settings[name] !== "");
  return Object.fromEntries(names.map((name) => [name, Number(settings[name])]));
}

export const authorization = () => (apiKey ? { Authorization: `Bearer ${apiKey}` } : {});

/** `listener` is called when the API key changes. */
export const setKeyListener = (listener) => { onKeyChange = listener; };

export function openSettings(field, message = "") {
  explanation.textContent = message;
  for (const element of form.elements) if (element.name in settings) element.value = settings[element.name];
  form.elements.key.value = apiKey;
  form.elements.theme.value = document.documentElement.dataset.theme;
  if (!dialog.open) dialog.showModal();
  if (field) form.elements[field].focus();
}

export const requestApiKey = () => openSettings("key", apiKey ? "The API key is wrong." : "The server asks for an API key.");

document.getElementById("open-settings").addEventListener("click", () => openSettings());
document.getElementById("reset").addEventListener("click", () => {
  for (const [name, value] of Object.entries(DEFAULTS)) form.elements[name].value = value;
});
form.elements.theme.addEventListener("change", ({ target }) => {
  document.documentElement.dataset.theme = target.value; // theme.js reads the stored value at the next start
  try {
    localStorage.setItem("duck.theme", target.value);
  } catch { /* no storage: the choice lasts until the page is closed */ }
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
dialog.addEventListener("close", () => {
  for (const name of Object.keys(DEFAULTS)) {
    const element = form.elements[name];
    if (element.checkValidity()) settings[name] = element.value;
  }
  writeJson("duck.settings", settings);
  const entered = form.elements.key.value.trim();
  if (entered === apiKey) return;
  apiKey = entered;
  try {
    sessionStorage.setItem("duck.key", apiKey);
  } catch { /* no storage: the key lasts until the page is closed */ }
  onKeyChange();
});
