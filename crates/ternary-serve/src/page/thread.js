// The messages of a conversation on the screen.

import { branches } from "./conversation.js";
import { render } from "./markdown.js";

const log = document.getElementById("log");
const items = new WeakMap(); // message to list item: reusing an item keeps the text selection in it
let actions = {};

/**
 * Sets what the buttons of a message call: `copy(text)`, `regenerate(message)`, `continueText()`, `edit(message, text)` and
 * `switchBranch(message)`.
 */
export const setThreadActions = (listeners) => { actions = listeners; };

function itemFor(message) {
  const known = items.get(message);
  if (known) return known;
  const item = document.getElementById("turn").content.firstElementChild.cloneNode(true);
  item.classList.add(message.role);
  item.querySelector(".who").textContent = message.role === "user" ? "You said:" : "The model said:";
  item.querySelector(".copy").addEventListener("click", () => actions.copy(message.content));
  item.querySelector(".edit").addEventListener("click", () => openEditor(message));
  item.querySelector(".again").addEventListener("click", () => actions.regenerate(message));
  item.querySelector(".proceed").addEventListener("click", () => actions.continueText());
  items.set(message, item);
  return item;
}

/** Draws the text of a message: an answer as Markdown, others as plain text. */
export function drawMessage(message) {
  const item = itemFor(message);
  const text = item.querySelector(".text");
  const isPlainText = message.role === "user" || message.text === true;
  text.classList.toggle("plain", isPlainText);
  if (!isPlainText) render(text, message.content);
  else if (text.textContent !== message.content) text.textContent = message.content;
  return item;
}

/**
 * Draws messages. `live` is the streaming answer, `failed` an answer with an error; `continues` is true if the model has no chat
 * template.
 */
export function drawThread(conversation, messages, { live, failed, continues }) {
  const drawn = messages.map((message, i) => {
    const item = drawMessage(message);
    const isLast = i === messages.length - 1;
    item.classList.toggle("live", message === live);
    item.classList.toggle("error", message === failed);
    item.querySelector(".note").textContent = message === live ? "" : message.note;
    const toggle = (selector, shown) => { item.querySelector(selector).hidden = !shown; };
    const isUser = message.role === "user";
    toggle(".copy", message.content);
    toggle(".edit", isUser);
    toggle(".again", isUser ? isLast : !message.text || isLast);
    toggle(".proceed", !isUser && message.text && isLast && continues);
    drawBranches(conversation, message, item);
    return item;
  });
  // An item that is in its place is not moved, since moving it would lose the focus.
  drawn.forEach((item, i) => log.children[i] !== item && log.insertBefore(item, log.children[i] ?? null));
  while (log.children.length > drawn.length) log.lastElementChild.remove();
  log.setAttribute("aria-busy", String(Boolean(live)));
}

function drawBranches(conversation, message, item) {
  const all = message.id in conversation.messages ? branches(conversation, message) : [message];
  const position = all.indexOf(message);
  const box = item.querySelector(".branches");
  box.hidden = all.length < 2;
  box.querySelector(".place").textContent = `${position + 1}/${all.length}`;
  for (const [selector, other] of [[".earlier", all[position - 1]], [".later", all[position + 1]]]) {
    const button = box.querySelector(selector);
    button.disabled = !other;
    button.onclick = () => {
      actions.switchBranch(other);
      // The focus moves to the same arrow of the other branch.
      const arrows = itemFor(other).querySelector(".branches");
      (arrows.querySelector(`${selector}:enabled`) ?? arrows.querySelector("button:enabled"))?.focus();
    };
  }
}

/** Opens an editor in place of a message's text. */
export function openEditor(message) {
  const item = itemFor(message);
  if (item.querySelector("form")) return item.querySelector("textarea").focus();
  const form = document.getElementById("edit").content.firstElementChild.cloneNode(true);
  const field = form.querySelector("textarea");
  const close = () => {
    form.remove();
    item.classList.remove("editing");
  };
  const send = () => {
    if (field.value.trim() && actions.edit(message, field.value)) close();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  form.querySelector(".cancel").addEventListener("click", () => {
    close();
    item.querySelector(".edit").focus();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation(); // Escape would also stop the answer
      close();
      item.querySelector(".edit").focus();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  field.value = message.content;
  item.classList.add("editing");
  item.querySelector(".text").after(form);
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}
