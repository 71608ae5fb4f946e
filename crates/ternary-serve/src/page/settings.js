// The settings dialog: how answers are drawn, the theme, and the API key.

import { read, write } from "./archive.js";

const DEFAULTS = { system: "", temperature: "0.8", top_p: "0.95", top_k: "0", min_p: "0.05", max_tokens: "", seed: "" };

const dialog = document.getElementById("settings");
const form = dialog.querySelector("form");
const why = document.getElementById("why");

const settings = {};
let key = "";
let onKey = () => {};
try {
  key = sessionStorage.getItem("duck.key") ?? "";
} catch { /* no storage */ }

function load() {
  Object.assign(settings, DEFAULTS);
  for (const [name, value] of Object.entries(read("duck.settings", {}) ?? {}))
    if (name in DEFAULTS && typeof value === "string") settings[name] = value;
}
load();
addEventListener("storage", (event) => {
  if (event.key === "duck.settings") load();
});

export const systemMessage = () => settings.system.trim();

/** How answers are drawn, as fields of a request. */
export function sampling() {
  const names = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"].filter((name) => settings[name] !== "");
  return Object.fromEntries(names.map((name) => [name, Number(settings[name])]));
}

export const authorization = () => (key ? { Authorization: `Bearer ${key}` } : {});

/** `listener` is called when there is another key. */
export const whenKeyChanges = (listener) => { onKey = listener; };

export function openSettings(field, message = "") {
  why.textContent = message;
  for (const element of form.elements) if (element.name in settings) element.value = settings[element.name];
  form.elements.key.value = key;
  form.elements.theme.value = document.documentElement.dataset.theme;
  if (!dialog.open) dialog.showModal();
  if (field) form.elements[field].focus();
}

export const askForKey = () => openSettings("key", key ? "The API key is wrong." : "The server asks for an API key.");

document.getElementById("open-settings").addEventListener("click", () => openSettings());
document.getElementById("reset").addEventListener("click", () => {
  for (const [name, value] of Object.entries(DEFAULTS)) form.elements[name].value = value;
});
form.elements.theme.addEventListener("change", ({ target }) => {
  document.documentElement.dataset.theme = target.value; // theme.js reads it the next time
  try {
    localStorage.setItem("duck.theme", target.value);
  } catch { /* then for this page only */ }
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
dialog.addEventListener("close", () => {
  for (const name of Object.keys(DEFAULTS)) {
    const element = form.elements[name];
    if (element.checkValidity()) settings[name] = element.value;
  }
  write("duck.settings", settings);
  const shown = form.elements.key.value.trim();
  if (shown === key) return;
  key = shown;
  try {
    sessionStorage.setItem("duck.key", key);
  } catch { /* then for this page only */ }
  onKey();
});
