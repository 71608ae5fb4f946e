"use strict";

const $ = (id) => document.getElementById(id);
const [log, input, status, model, dialog] = ["log", "input", "status", "model", "settings"].map($);
const form = dialog.querySelector("form");

const DEFAULTS = { system: "", temperature: "0.8", top_p: "0.95", top_k: "0", min_p: "0.05", max_tokens: "", seed: "" };

// What survives a reload. Private windows may have no storage: then nothing does.
const store = {
  read(key, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(key)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  write(key, value) {
    try {
      localStorage.setItem(key, JSON.stringify(value));
    } catch { /* as if there were none */ }
  },
};

const isTurn = (turn) =>
  (turn?.role === "user" || turn?.role === "assistant") && typeof turn.content === "string";

let turns = store.read("duck.turns", []);
turns = Array.isArray(turns) ? turns.filter(isTurn) : [];
const settings = { ...DEFAULTS };
for (const [key, value] of Object.entries(store.read("duck.settings", {}) ?? {}))
  if (key in DEFAULTS && typeof value === "string") settings[key] = value;
let key = "";
try {
  key = sessionStorage.getItem("duck.key") ?? "";
} catch { /* as above */ }
let running = null; // the AbortController of the answer in the making
let cleared = null; // the conversation that "New" has put away

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

// The conversation

function show(turn) {
  const item = $("turn").content.firstElementChild.cloneNode(true);
  item.classList.add(turn.role);
  item.querySelector(".who").textContent = turn.role === "user" ? "You said:" : "The model said:";
  item.querySelector(".text").textContent = turn.content;
  item.querySelector(".note").textContent = turn.note ?? "";
  item.querySelector(".copy").addEventListener("click", () => copy(turn.content));
  item.querySelector(".again").addEventListener("click", again);
  log.append(item);
  return item;
}

function showAll() {
  log.replaceChildren();
  turns.forEach(show);
  $("welcome").hidden = turns.length > 0;
  toEnd();
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not let this page copy.", true);
  }
}

const scroll = $("scroll");
const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
const toEnd = () => { scroll.scrollTop = scroll.scrollHeight; };

const save = () => store.write("duck.turns", turns);

function send() {
  const text = input.value.trim();
  if (!text || running) return;
  if (!model.value) return loadModels(); // the server may be there by now
  input.value = "";
  cleared = null;
  $("undo").hidden = true;
  fit();
  turns.push({ role: "user", content: text });
  save();
  $("welcome").hidden = true;
  show(turns.at(-1));
  answer();
}

function again() {
  if (running) return;
  if (turns.at(-1)?.role === "assistant") turns.pop();
  if (turns.at(-1)?.role !== "user") return;
  save();
  showAll();
  answer();
}

// One answer

function request(messages) {
  const number = (name) => (settings[name] === "" ? undefined : Number(settings[name]));
  const system = settings.system.trim();
  return {
    model: model.value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    min_p: number("min_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

// The response; turns that do not fit into the model's context are left out, the oldest first.
async function post(signal) {
  const messages = turns.map(({ role, content }) => ({ role, content }));
  for (let dropped = 0; ;) {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(request(messages.slice(dropped))),
      signal,
    });
    if (response.ok) return [response, dropped];
    const error = (await response.json().catch(() => ({}))).error ?? {};
    const next = messages.findIndex(({ role }, i) => i > dropped && role === "user");
    const long = error.code === "context_length_exceeded" && next > 0;
    if (!long) throw Object.assign(new Error(error.message ?? `status ${response.status}`), { status: response.status });
    dropped = next;
  }
}

// The JSON of server-sent events, as they come.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// Three digits: no more are measured.
const brief = (number) => String(Number(number.toPrecision(3)));
const duration = (ms) => (ms < 1000 ? `${brief(ms)} ms` : `${brief(ms / 1000)} s`);

async function answer() {
  running = new AbortController();
  const mine = turns; // "New" may put another list in its place
  const turn = { role: "assistant", content: "", note: "" };
  const item = show(turn);
  const text = item.querySelector(".text");
  const note = item.querySelector(".note");
  const begun = performance.now();
  let [first, tokens, dropped, why] = [0, 0, 0, ""];
  const seconds = () => (performance.now() - first) / 1000;
  const rate = () => (tokens > 1 && seconds() > 0 ? `${brief((tokens - 1) / seconds())} tokens/s` : "");
  busy(true, item);
  say("Reading…");
  toEnd();
  try {
    let response;
    [response, dropped] = await post(running.signal);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices?.[0];
      if (choice?.finish_reason === "length") why = "cut at its longest";
      if (!choice?.delta?.content) continue;
      first ||= performance.now();
      if (!event.usage) tokens += 1;
      const follow = atEnd();
      turn.content += choice.delta.content;
      text.append(choice.delta.content); // a text node
      if (follow) toEnd();
      $("rate").textContent = rate(); // not a status: it would be read out all the time
      say("");
    }
  } catch (error) {
    if (error.name === "AbortError") {
      why = "stopped";
    } else {
      why = error instanceof TypeError ? "the server does not answer" : error.message;
      item.classList.add("error");
      if (error.status === 401) askForKey();
    }
  }
  const wait = first ? `${duration(first - begun)} to the first` : "";
  const left = dropped ? `without the oldest ${dropped > 1 ? `${dropped} messages` : "message"}` : "";
  turn.note = [tokens ? `${tokens} tokens` : "", rate(), wait, left, why].filter(Boolean).join(" · ");
  note.textContent = turn.note;
  $("rate").textContent = "";
  say("");
  running = null;
  busy(false, item);
  // An answer that never began is no part of the conversation.
  if (turn.content) mine.push(turn);
  save();
}

function busy(is, item) {
  item.classList.toggle("live", is);
  log.setAttribute("aria-busy", String(is));
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (!is && matchMedia("(pointer: fine)").matches && !dialog.open) input.focus();
}

const stop = () => running?.abort();

// Composer

function fit() {
  if (CSS.supports("field-sizing", "content")) return;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

input.addEventListener("input", fit);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !dialog.open) stop();
});

$("new").addEventListener("click", () => {
  stop();
  if (turns.length > 0) cleared = turns;
  turns = [];
  save();
  showAll();
  $("undo").hidden = !cleared;
  say("");
  input.focus();
});
$("undo").addEventListener("click", () => {
  if (running) return;
  turns = cleared ?? turns;
  cleared = null;
  $("undo").hidden = true;
  say("");
  save();
  showAll();
});

// Settings

function openSettings(field, why = "") {
  $("why").textContent = why;
  for (const element of form.elements) if (element.name in settings) element.value = settings[element.name];
  form.elements.key.value = key;
  dialog.showModal();
  if (field) form.elements[field].focus();
}

const askForKey = () => openSettings("key", key ? "The API key is wrong." : "The server asks for an API key.");

$("open-settings").addEventListener("click", () => openSettings());
$("reset").addEventListener("click", () => {
  for (const [name, value] of Object.entries(DEFAULTS)) form.elements[name].value = value;
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
dialog.addEventListener("close", () => {
  for (const name of Object.keys(DEFAULTS)) {
    const element = form.elements[name];
    if (element.checkValidity()) settings[name] = element.value;
  }
  store.write("duck.settings", settings);
  const shown = form.elements.key.value.trim();
  if (shown !== key) {
    key = shown;
    try {
      sessionStorage.setItem("duck.key", key);
    } catch { /* then for this page only */ }
    loadModels();
  }
});

// Models

async function loadModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (response.status === 401) return askForKey();
    const { data } = await response.json();
    const before = store.read("duck.model", "");
    model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === before)));
    model.disabled = data.length < 2;
    say("");
  } catch {
    say("The server does not answer.", true);
  }
}

model.addEventListener("change", () => store.write("duck.model", model.value));

showAll();
loadModels();
