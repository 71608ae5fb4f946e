// The page: the shown conversation, the composer, and the answers that are being generated.

import * as archive from "./archive.js";
import { appendMessage, newConversation, newMessage, path, showBranch, titleOf } from "./conversation.js";
import { requestApiKey, authorization, samplingFields, systemMessage, setKeyListener } from "./settings.js";
import { drawSidebar, focusSearch, toggleSidebar, closeOverlay, initSidebar } from "./sidebar.js";
import { streamCompletion } from "./stream.js";
import { drawMessage, drawThread, openEditor, setThreadActions } from "./thread.js";

const $ = (id) => document.getElementById(id);
const [input, status, model, scroll, undo] = ["input", "status", "model", "scroll", "undo"].map($);

const SAVE_INTERVAL = 1000; // milliseconds between two saves of a streaming answer
const TEXT_TOKENS = 128; // default `max_tokens` of a text completion

let current = newConversation(); // the shown conversation; stored once it has a message
let models = [];
let deleted = null; // the conversation that "Undo" restores
// By conversation id: the streaming answer, or the last one if it failed or stayed empty.
const answers = new Map();

const answerOf = (conversation) => answers.get(conversation.id) ?? {};
const isBusy = (conversation = current) => Boolean(answerOf(conversation).controller);
const continuesText = () => models.find(({ id }) => id === model.value)?.chat_template === false;

function setStatus(text, isError = false) {
  status.textContent = text;
  status.classList.toggle("error", isError);
}

const isAtEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
const scrollToEnd = () => { scroll.scrollTop = scroll.scrollHeight; };

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
  const placeholder = isEmpty ? "Write how the text begins" : "Add to the text, or leave this empty";
  input.placeholder = continues ? placeholder : "Write a message";
  $("send").textContent = continues ? "Continue" : "Send";
  drawSidebar(current);
}

function show(conversation) {
  current = conversation;
  setStatus(isBusy() && !answerOf(current).message.content ? "Reading…" : "");
  draw();
  scrollToEnd();
}

/** Shows the conversation whose id is the fragment of the URL, or a new one. */
function showAddressed() {
  show(archive.conversations.get(location.hash.slice(1)) ?? newConversation());
}

/** Saves a conversation; the URL of the shown one gets its id. */
function persist(conversation) {
  archive.save(conversation);
  if (conversation === current && location.hash.slice(1) !== current.id) history.replaceState(null, "", `#${current.id}`);
}

function startConversation() {
  if (location.hash) history.pushState(null, "", location.pathname);
  if (path(current).length > 0) show(newConversation());
  closeOverlay();
  input.focus();
}

function remove(conversation) {
  answerOf(conversation).controller?.abort();
  deleted = conversation;
  archive.remove(conversation);
  if (conversation === current) startConversation();
  drawSidebar();
  setStatus(`Deleted “${titleOf(conversation)}”.`);
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
  if (!model.value) return loadModels(); // the server may have started meanwhile
  input.value = "";
  input.dispatchEvent(new Event("input"));
  if (text.trim()) appendMessage(current, newMessage(current.head, "user", text));
  undo.hidden = true;
  generateAnswer();
}

setThreadActions({
  copy,
  /** Generates another branch for an answer, or the answer of a message that has none. */
  regenerate(message) {
    if (isBusy()) return;
    const previousHead = current.head;
    if (message.role === "assistant" && message.id in current.messages) current.head = message.parent;
    generateAnswer(previousHead);
  },
  continueText: () => !isBusy() && generateAnswer(),
  /** Sends the edited text as another branch of the message. Returns whether it was sent. */
  edit(message, text) {
    if (isBusy()) return false;
    appendMessage(current, newMessage(message.parent, "user", message.text || continuesText() ? text : text.trim()));
    generateAnswer();
    return true;
  },
  switchBranch(message) {
    if (isBusy()) return;
    answers.delete(current.id);
    showBranch(current, message);
    persist(current);
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
    setStatus("Copied.");
  } catch {
    setStatus("The browser does not let this page copy.", true);
  }
}

// An answer

/** The prompt of a text completion: all messages, a user's on a new line unless white space separates it already. */
const promptText = (messages) => messages.reduce((text, { role, content }) =>
  text + (role === "user" && text && !/\s$/.test(text) && !/^\s/.test(content) ? "\n" : "") + content, "");

function request(messages) {
  if (continuesText()) return { model: model.value, prompt: promptText(messages), max_tokens: TEXT_TOKENS, ...samplingFields() };
  const system = systemMessage();
  const turns = messages.map(({ role, content }) => ({ role, content }));
  return { model: model.value, messages: [...(system ? [{ role: "system", content: system }] : []), ...turns], ...samplingFields() };
}

// Three significant digits: the measurement has no more.
const threeDigits = (number) => String(Number(number.toPrecision(3)));
const duration = (ms) => (ms < 1000 ? `${threeDigits(ms)} ms` : `${threeDigits(ms / 1000)} s`);

/**
 * Streams the model's answer to the shown conversation. It continues while another conversation is shown. `previousHead`, the
 * answer that is generated again, is restored if the new one stays empty.
 */
async function generateAnswer(previousHead = null) {
  const conversation = current;
  const messages = path(conversation);
  const continues = continuesText();
  const message = newMessage(conversation.head, "assistant", "", { model: model.value, ...(continues ? { text: true } : {}) });
  const controller = new AbortController();
  const isShown = () => conversation === current;
  answers.set(conversation.id, { controller, message, previousHead });
  if (!previousHead) persist(conversation);
  // Another tab may have deleted it meanwhile.
  const store = () => archive.conversations.has(conversation.id) && persist(conversation);
  const startedAt = performance.now();
  let [firstTokenAt, saveTimer, tokens, dropped, reason, error] = [0, 0, 0, 0, "", null];
  const seconds = () => (performance.now() - firstTokenAt) / 1000;
  const rate = () => (tokens > 1 && seconds() > 0 ? `${threeDigits((tokens - 1) / seconds())} tokens/s` : "");
  draw();
  setStatus("Reading…");
  scrollToEnd();
  try {
    for await (const part of streamCompletion(request(messages), authorization(), controller.signal)) {
      dropped = part.dropped ?? dropped;
      tokens = part.tokens ?? tokens;
      if (part.finish === "length") reason = "cut at its longest";
      if (!part.text) continue;
      tokens += 1;
      message.content += part.text;
      if (!firstTokenAt) {
        firstTokenAt = performance.now();
        message.note = "not finished"; // the note after a reload
        appendMessage(conversation, message);
        store();
      }
      saveTimer ||= setTimeout(() => {
        saveTimer = 0;
        store();
      }, SAVE_INTERVAL);
      if (!isShown()) continue;
      const follow = isAtEnd();
      drawMessage(message);
      if (follow) scrollToEnd();
      $("rate").textContent = rate(); // outside of the live region, or screen readers would read every update
      setStatus("");
    }
  } catch (thrown) {
    error = thrown.name === "AbortError" ? null : thrown;
    reason = !error ? "stopped" : error instanceof TypeError ? "the server does not answer" : error.message;
    // Leaving the page fails its requests too. The wait lets it unload before it stores that as an error.
    if (error instanceof TypeError) await new Promise((resume) => setTimeout(resume, 250));
  }
  clearTimeout(saveTimer);
  if (!message.content && !reason) reason = "nothing came";
  const latency = firstTokenAt ? `${duration(firstTokenAt - startedAt)} to the first` : "";
  const droppedNote = dropped ? `without the oldest ${dropped > 1 ? `${dropped} messages` : "message"}` : "";
  const tokenNote = tokens ? `${tokens} tokens` : "";
  Object.assign(message, { done: true, note: [tokenNote, rate(), latency, droppedNote, reason].filter(Boolean).join(" · ") });
  // An empty answer is not part of the conversation. Its error is shown in its place until the next action, or in the status
  // line if the previous answer is restored.
  const isBlank = !message.content;
  const restoresPrevious = isBlank && previousHead;
  if (restoresPrevious) conversation.head = previousHead;
  if ((error || isBlank) && !restoresPrevious) answers.set(conversation.id, { message, failed: Boolean(error) });
  else answers.delete(conversation.id);
  store();
  if (isShown()) {
    draw();
    setStatus(restoresPrevious ? reason : "", Boolean(error));
    if (matchMedia("(pointer: fine)").matches && !document.querySelector("dialog[open]") && !isElsewhere()) input.focus();
  } else {
    drawSidebar();
  }
  if (error?.status === 401) requestApiKey();
}

// Whether the focus must stay where it is: in the list, an editor, or scrollable content.
const isElsewhere = () => document.activeElement.closest?.("#sidebar, .editor, .code, .table");

const stop = () => answerOf(current).controller?.abort();

addEventListener("pagehide", () => {
  for (const [id, { controller, message, previousHead }] of answers) {
    const conversation = archive.conversations.get(id);
    if (!controller || !conversation) continue;
    // The new answer is empty: a reload shows the previous one.
    if (previousHead && !message.content) conversation.head = previousHead;
    persist(conversation);
  }
});

// The composer

function resizeInput() {
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
  resizeInput();
  draft(input.value);
});
input.addEventListener("keydown", (event) => {
  if (event.key === "ArrowUp" && !input.value && !isBusy()) {
    const last = path(current).findLast(({ role }) => role === "user");
    if (last) openEditor(last);
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
$("new").addEventListener("click", startConversation);

// Shortcuts

const shortcuts = $("shortcuts");
const showShortcuts = () => (shortcuts.open ? shortcuts.close() : shortcuts.showModal());
const SHORTCUTS = { "shift+o": startConversation, "k": focusSearch, "shift+s": toggleSidebar, "/": showShortcuts };

document.addEventListener("keydown", (event) => {
  const isOpen = document.querySelector("dialog[open]");
  if (event.key === "Escape" && !isOpen && !$("menu").matches(":popover-open") && !closeOverlay()) stop();
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
    if (response.status === 401) return requestApiKey();
    const { data } = await response.json();
    const previousHead = archive.readJson("duck.model", "");
    models = data;
    model.replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === previousHead)));
    model.disabled = data.length < 2;
    setStatus("");
    draw();
  } catch {
    setStatus("The server does not answer.", true);
  }
}

model.addEventListener("change", () => {
  archive.writeJson("duck.model", model.value);
  draw();
});
setKeyListener(loadModels);

// Start

const migrated = archive.open({
  onChange(id) {
    const theirs = archive.conversations.get(id);
    if (id !== current.id) return drawSidebar();
    if (!theirs) return setStatus("Another tab has deleted this conversation. The next message stores it again.");
    current = theirs;
    const follow = isAtEnd();
    if (isBusy()) drawSidebar();
    else draw();
    if (follow) scrollToEnd();
  },
  onStorageError(text) {
    $("trouble").textContent = text;
  },
});
initSidebar(remove);
addEventListener("popstate", showAddressed);
if (migrated) history.replaceState(null, "", `#${migrated.id}`);
input.value = draft();
resizeInput();
showAddressed();
loadModels();
