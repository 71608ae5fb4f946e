// The messages of a conversation on the screen.

import { branches } from "./conversation.js";
import { render } from "./markdown.js";

const log = document.getElementById("log");
const items = new WeakMap(); // of messages; what is drawn stays, with what is selected in it
let actions = {};

/** `actions`: `copy`, `again`, `proceed` and `edit(message, text)`, `turn(message)` to another branch. */
export const watchThread = (listeners) => { actions = listeners; };

function itemOf(message) {
  const known = items.get(message);
  if (known) return known;
  const item = document.getElementById("turn").content.firstElementChild.cloneNode(true);
  item.classList.add(message.role);
  item.querySelector(".who").textContent = message.role === "user" ? "You said:" : "The model said:";
  item.querySelector(".copy").addEventListener("click", () => actions.copy(message.content));
  item.querySelector(".edit").addEventListener("click", () => edit(message));
  item.querySelector(".again").addEventListener("click", () => actions.again(message));
  item.querySelector(".proceed").addEventListener("click", () => actions.proceed());
  items.set(message, item);
  return item;
}

/** Draws what a message says: of an answer, as Markdown. */
export function drawText(message) {
  const item = itemOf(message);
  const text = item.querySelector(".text");
  const isPlain = message.role === "user" || message.text === true;
  text.classList.toggle("plain", isPlain);
  if (!isPlain) render(text, message.content);
  else if (text.textContent !== message.content) text.textContent = message.content;
  return item;
}

/**
 * Draws messages. `live` is the answer that is being written, `failed` one that could not be, `continues` whether the model
 * continues texts.
 */
export function drawThread(conversation, messages, { live, failed, continues }) {
  const drawn = messages.map((message, i) => {
    const item = drawText(message);
    const isLast = i === messages.length - 1;
    item.classList.toggle("live", message === live);
    item.classList.toggle("error", message === failed);
    item.querySelector(".note").textContent = message === live ? "" : message.note;
    const part = (selector, shown) => { item.querySelector(selector).hidden = !shown; };
    const isUser = message.role === "user";
    part(".copy", message.content);
    part(".edit", isUser);
    part(".again", isUser ? isLast : !message.text || isLast);
    part(".proceed", !isUser && message.text && isLast && continues);
    drawBranches(conversation, message, item);
    return item;
  });
  // Only what is elsewhere is moved: moving takes the focus away.
  drawn.forEach((item, i) => log.children[i] !== item && log.insertBefore(item, log.children[i] ?? null));
  while (log.children.length > drawn.length) log.lastElementChild.remove();
  log.setAttribute("aria-busy", String(Boolean(live)));
}

function drawBranches(conversation, message, item) {
  const all = message.id in conversation.messages ? branches(conversation, message) : [message];
  const place = all.indexOf(message);
  const box = item.querySelector(".branches");
  box.hidden = all.length < 2;
  box.querySelector(".place").textContent = `${place + 1}/${all.length}`;
  for (const [selector, other] of [[".earlier", all[place - 1]], [".later", all[place + 1]]]) {
    const button = box.querySelector(selector);
    button.disabled = !other;
    button.onclick = () => {
      actions.turn(other);
      // The arrows of the other branch are where those of this one were.
      const arrows = itemOf(other).querySelector(".branches");
      (arrows.querySelector(`${selector}:enabled`) ?? arrows.querySelector("button:enabled"))?.focus();
    };
  }
}

/** Lets a message be written anew, in its place. */
export function edit(message) {
  const item = itemOf(message);
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
      event.stopPropagation(); // it stops no answer
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
