// The page: the conversation that is shown, the composer, and the answers in the making.

import * as archive from "./archive.js";
import { add, newConversation, newMessage, path, showBranch, titleOf } from "./conversation.js";
import { askForKey, authorization, sampling, systemMessage, whenKeyChanges } from "./settings.js";
import { drawSidebar, focusSearch, toggleSidebar, uncover, watchSidebar } from "./sidebar.js";
import { ask } from "./stream.js";
import { drawText, drawThread, edit, watchThread } from "./thread.js";

const $ = (id) => document.getElementById(id);
const [input, status, model, scroll, undo] = ["input", "status", "model", "scroll", "undo"].map($);

const SAVED_EVERY = 1000; // ms, while an answer comes
const TEXT_TOKENS = 128; // of a continuation, if the settings do not say

let current = newConversation(); // stored once it has a message
let models = [];
let deleted = null; // what "Undo" brings back
const answers = new Map(); // by conversation: the answer in the making, or the last one if it failed or never began

const answerOf = (conversation) => answers.get(conversation.id) ?? {};
const isBusy = (conversation = current) => Boolean(answerOf(conversation).controller);
const continuesText = () => models.find(({ id }) => id === model.value)?.chat_template === false;

function say(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
const toEnd = () => { scroll.scrollTop = scroll.scrollHeight; };

// The conversation

function draw() {
  const { controller, message, failed } = answerOf(current);
  const messages = path(current);
  if (message && !(message.id in current.messages)) messages.push(message);
  drawThread(current, messages, {
    live: controller && message,
    failed: failed && message,
    continues: continuesText(),
  });
  const isEmpty = messages.length === 0;
  $("welcome").hidden = !isEmpty;
  document.title = isEmpty ? "Duck" : `${titleOf(current)} · Duck`;
  $("send").hidden = isBusy();
  $("stop").hidden = !isBusy();
  $("rate").textContent = "";
  const continues = continuesText();
  $("invitation").textContent = continues ? "Begin a text." : "Say something.";
  $("continues").hidden = !continues;
  const wanted = isEmpty ? "Write how the text begins" : "Add to the text, or leave this empty";
  input.placeholder = continues ? wanted : "Write a message";
  $("send").textContent = continues ? "Continue" : "Send";
  drawSidebar(current);
}

function show(conversation) {
  current = conversation;
  say(isBusy() && !answerOf(current).message.content ? "Reading…" : "");
  draw();
  toEnd();
}

/** Shows the conversation that the address names, or a new one. */
function showAddressed() {
  show(archive.conversations.get(location.hash.slice(1)) ?? newConversation());
}

/** Stores the conversation on the screen, and gives it an address. */
function keep(conversation) {
  archive.save(conversation);
  if (conversation === current && location.hash.slice(1) !== current.id) history.replaceState(null, "", `#${current.id}`);
}

function begin() {
  if (location.hash) history.pushState(null, "", location.pathname);
  if (path(current).length > 0) show(newConversation());
  uncover();
  input.focus();
}

function remove(conversation) {
  answerOf(conversation).controller?.abort();
  deleted = conversation;
  archive.remove(conversation);
  if (conversation === current) begin();
  drawSidebar();
  say(`Deleted “${titleOf(conversation)}”.`);
  undo.hidden = false;
  undo.focus();
}

undo.addEventListener("click", () => {
  undo.hidden = true;
  archive.save(deleted);
  history.pushState(null, "", `#${deleted.id}`);
  show(deleted);
  input.focus();
});

function send() {
  const text = continuesText() ? input.value : input.value.trim();
  if (isBusy() || (!text.trim() && !(continuesText() && path(current).length > 0))) return;
  if (!model.value) return loadModels(); // the server may be there by now
  input.value = "";
  input.dispatchEvent(new Event("input"));
  if (text.trim()) add(current, newMessage(current.head, "user", text));
  undo.hidden = true;
  answer();
}

watchThread({
  copy,
  /** Another branch for an answer of the model, or an answer to a message without one. */
  again(message) {
    if (isBusy()) return;
    const before = current.head;
    if (message.role === "assistant" && message.id in current.messages) current.head = message.parent;
    answer(before);
  },
  proceed: () => !isBusy() && answer(),
  /** Another branch for the message that is edited. Returns whether it was sent. */
  edit(message, text) {
    if (isBusy()) return false;
    add(current, newMessage(message.parent, "user", message.text || continuesText() ? text : text.trim()));
    answer();
    return true;
  },
  turn(message) {
    if (isBusy()) return;
    answers.delete(current.id);
    showBranch(current, message);
    keep(current);
    draw();
  },
});

$("log").addEventListener("click", ({ target }) => {
  const button = target.closest(".copy-code");
  if (button) copy(button.closest("figure").querySelector("code").textContent);
});

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    say("The browser does not let this page copy.", true);
  }
}

// An answer

/** What a model that continues texts goes on with: what the user wrote begins a line, unless it says otherwise. */
const textOf = (messages) => messages.reduce((text, { role, content }) =>
  text + (role === "user" && text && !/\s$/.test(text) && !/^\s/.test(content) ? "\n" : "") + content, "");

function request(messages) {
  if (continuesText()) return { model: model.value, prompt: textOf(messages), max_tokens: TEXT_TOKENS, ...sampling() };
  const system = systemMessage();
  const said = messages.map(({ role, content }) => ({ role, content }));
  return { model: model.value, messages: [...(system ? [{ role: "system", content: system }] : []), ...said], ...sampling() };
}

// Three digits: no more are measured.
const brief = (number) => String(Number(number.toPrecision(3)));
const duration = (ms) => (ms < 1000 ? `${brief(ms)} ms` : `${brief(ms / 1000)} s`);

/**
 * Has the model answer the conversation that is shown; it goes on when another one is shown meanwhile. `before` is shown
 * again if nothing comes.
 */
async function answer(before = null) {
  const conversation = current;
  const messages = path(conversation);
  const continues = continuesText();
  const message = newMessage(conversation.head, "assistant", "", { model: model.value, ...(continues ? { text: true } : {}) });
  const controller = new AbortController();
  const isShown = () => conversation === current;
  answers.set(conversation.id, { controller, message, before });
  if (!before) keep(conversation);
  // Another tab may have deleted it meanwhile.
  const store = () => archive.conversations.has(conversation.id) && keep(conversation);
  const begun = performance.now();
  let [first, saving, tokens, dropped, why, error] = [0, 0, 0, 0, "", null];
  const seconds = () => (performance.now() - first) / 1000;
  const rate = () => (tokens > 1 && seconds() > 0 ? `${brief((tokens - 1) / seconds())} tokens/s` : "");
  draw();
  say("Reading…");
  toEnd();
  try {
    for await (const part of ask(request(messages), authorization(), controller.signal)) {
      dropped = part.dropped ?? dropped;
      tokens = part.tokens ?? tokens;
      if (part.finish === "length") why = "cut at its longest";
      if (!part.text) continue;
      tokens += 1;
      message.content += part.text;
      if (!first) {
        first = performance.now();
        message.note = "not finished"; // what a reload would find
        add(conversation, message);
        store();
      }
      saving ||= setTimeout(() => {
        saving = 0;
        store();
      }, SAVED_EVERY);
      if (!isShown()) continue;
      const follow = atEnd();
      drawText(message);
      if (follow) toEnd();
      $("rate").textContent = rate(); // not a status: it would be read out all the time
      say("");
    }
  } catch (thrown) {
    error = thrown.name === "AbortError" ? null : thrown;
    why = !error ? "stopped" : error instanceof TypeError ? "the server does not answer" : error.message;
    // Requests of a page that is being left fail too. Such a page is gone before it stores a reason that is none.
    if (error instanceof TypeError) await new Promise((resume) => setTimeout(resume, 250));
  }
  clearTimeout(saving);
  if (!message.content && !why) why = "nothing came";
  const wait = first ? `${duration(first - begun)} to the first` : "";
  const left = dropped ? `without the oldest ${dropped > 1 ? `${dropped} messages` : "message"}` : "";
  const counted = tokens ? `${tokens} tokens` : "";
  Object.assign(message, { done: true, note: [counted, rate(), wait, left, why].filter(Boolean).join(" · ") });
  // An answer that never began is no part of the conversation. Why is shown in its place until something else happens; where
  // an earlier answer comes back instead, in the status line.
  const isNothing = !message.content;
  const comesBack = isNothing && before;
  if (comesBack) conversation.head = before;
  if ((error || isNothing) && !comesBack) answers.set(conversation.id, { message, failed: Boolean(error) });
  else answers.delete(conversation.id);
  store();
  if (isShown()) {
    draw();
    say(comesBack ? why : "", Boolean(error));
    if (matchMedia("(pointer: fine)").matches && !document.querySelector("dialog[open]") && !isElsewhere()) input.focus();
  } else {
    drawSidebar();
  }
  if (error?.status === 401) askForKey();
}

// A user who writes elsewhere, or reads the list, is not disturbed.
const isElsewhere = () => document.activeElement.closest?.("#sidebar, .editor, .code, .table");

const stop = () => answerOf(current).controller?.abort();

addEventListener("pagehide", () => {
  for (const [id, { controller, message, before }] of answers) {
    const conversation = archive.conversations.get(id);
    if (!controller || !conversation) continue;
    // Of a new answer nothing has come: a reload shows the earlier one.
    if (before && !message.content) conversation.head = before;
    keep(conversation);
  }
});

// The composer

function fit() {
  if (CSS.supports("field-sizing", "content")) return;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

const draft = (text) => {
  try {
    if (text === undefined) return sessionStorage.getItem("duck.draft") ?? "";
    sessionStorage.setItem("duck.draft", text);
  } catch { /* no storage */ }
  return "";
};

input.addEventListener("input", () => {
  fit();
  draft(input.value);
});
input.addEventListener("keydown", (event) => {
  if (event.key === "ArrowUp" && !input.value && !isBusy()) {
    const last = path(current).findLast(({ role }) => role === "user");
    if (last) edit(last);
    event.preventDefault();
  }
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", begin);

// Shortcuts

const shortcuts = $("shortcuts");
const showShortcuts = () => (shortcuts.open ? shortcuts.close() : shortcuts.showModal());
const SHORTCUTS = { "shift+o": begin, "k": focusSearch, "shift+s": toggleSidebar, "/": showShortcuts };

document.addEventListener("keydown", (event) => {
  const isOpen = document.querySelector("dialog[open]");
  if (event.key === "Escape" && !isOpen && !$("menu").matches(":popover-open") && !uncover()) stop();
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
  const run = SHORTCUTS[(event.shiftKey && event.key !== "/" ? "shift+" : "") + event.key.toLowerCase()];
  if (!run || (isOpen && isOpen !== shortcuts)) return;
  event.preventDefault();
  if (isOpen && run !== showShortcuts) shortcuts.close();
  run();
});
$("open-shortcuts").addEventListener("click", showShortcuts);
shortcuts.addEventListener("click", ({ target }) => target === shortcuts && shortcuts.close());
if (/Mac|iPhone|iPad/.test(navigator.platform))
  for (const name of document.querySelectorAll(".control")) name.textContent = "⌘";

// Models

async function loadModels() {
  try {
    const response = await fetch("/v1/models", { headers: authorization() });
    if (response.status === 401) return askForKey();
    const { data } = await response.json();
    const before = archive.read("duck.model", "");
    models = data;
    model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === before)));
    model.disabled = data.length < 2;
    say("");
    draw();
  } catch {
    say("The server does not answer.", true);
  }
}

model.addEventListener("change", () => {
  archive.write("duck.model", model.value);
  draw();
});
whenKeyChanges(loadModels);

// From here on

const taken = archive.open({
  onChange(id) {
    const theirs = archive.conversations.get(id);
    if (id !== current.id) return drawSidebar();
    if (!theirs) return say("Another tab has deleted this conversation. The next message stores it again.");
    current = theirs;
    const follow = atEnd();
    if (isBusy()) drawSidebar();
    else draw();
    if (follow) toEnd();
  },
  onTrouble(text) {
    $("trouble").textContent = text;
  },
});
watchSidebar(remove);
addEventListener("popstate", showAddressed);
if (taken) history.replaceState(null, "", `#${taken.id}`);
input.value = draft();
fit();
showAddressed();
loadModels();
