// The list of conversations: search, rename, export, delete.

import { conversations, save } from "./archive.js";
import { titleOf, toJson, toMarkdown } from "./conversation.js";

const $ = (id) => document.getElementById(id);
const [sidebar, list, search, menu, toggle] = ["sidebar", "conversations", "search", "menu", "toggle-sidebar"].map($);
const isNarrow = matchMedia("(max-width: 52rem)");

let chosen = null; // the conversation that the menu is for
let renaming = null; // the one whose title is being written
let current = null; // the one that is shown

const finds = (conversation, words) => {
  const text = [titleOf(conversation), ...Object.values(conversation.messages).map(({ content }) => content)];
  const whole = text.join("\n").toLowerCase();
  return words.every((word) => whole.includes(word));
};

export function drawSidebar(shown = current) {
  current = shown;
  if (renaming && list.querySelector("form:not([hidden])")) return; // a name is being written
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [...conversations.values()].filter((conversation) => finds(conversation, words));
  found.sort((a, b) => b.updated - a.updated);
  list.replaceChildren(...found.map(entry));
  $("none").textContent = found.length > 0 ? "" : words.length > 0 ? "Nothing found." : "No conversations yet.";
}

function entry(conversation) {
  const item = $("entry").content.firstElementChild.cloneNode(true);
  const [open, more, form] = ["a", ".more", "form"].map((selector) => item.querySelector(selector));
  const title = titleOf(conversation);
  open.textContent = title;
  open.href = `#${conversation.id}`;
  if (conversation === current) open.setAttribute("aria-current", "page");
  open.addEventListener("click", () => isNarrow.matches && showSidebar(false));
  more.ariaLabel = `Actions for ${title}`;
  more.addEventListener("click", () => openMenu(conversation, more));
  if (conversation.id !== renaming) return item;
  const field = form.elements.title;
  [open.hidden, more.hidden, form.hidden, field.value] = [true, true, false, title];
  const finish = (keep) => {
    if (renaming !== conversation.id) return;
    renaming = null;
    const name = field.value.trim();
    if (keep && name && name !== title) {
      Object.assign(conversation, { title: name, renamed: Date.now() });
      save(conversation);
    }
    drawSidebar();
    [...list.querySelectorAll("a")].find((link) => link.hash === `#${conversation.id}`)?.focus();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    finish(true);
  });
  field.addEventListener("blur", () => finish(true));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation(); // it stops no answer
    finish(false);
  });
  return item;
}

// The menu of a conversation

function openMenu(conversation, button) {
  chosen = conversation;
  const { left, bottom } = button.getBoundingClientRect();
  menu.showPopover();
  const room = (space, size) => Math.max(8, Math.min(space, size));
  menu.style.left = `${room(left, innerWidth - menu.offsetWidth - 8)}px`;
  menu.style.top = `${room(bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  menu.querySelector("button").focus();
}

function download(name, kind, text) {
  const address = URL.createObjectURL(new Blob([text], { type: kind }));
  Object.assign(document.createElement("a"), { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000); // not sooner than the browser has read it
}

const fileName = (conversation, extension) => {
  const words = titleOf(conversation).toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["conversation"];
  return `${words.slice(0, 8).join("-")}.${extension}`;
};

const ACTIONS = {
  rename: (conversation) => {
    renaming = conversation.id;
    drawSidebar();
    list.querySelector("form:not([hidden]) input").select();
  },
  markdown: (conversation) => download(fileName(conversation, "md"), "text/markdown", toMarkdown(conversation)),
  json: (conversation) => download(fileName(conversation, "json"), "application/json", toJson(conversation)),
};

/** `onDelete(conversation)`: the user deletes it. */
export function watchSidebar(onDelete) {
  menu.addEventListener("click", ({ target }) => {
    const action = target.closest("button")?.dataset.action;
    if (!action) return;
    menu.hidePopover();
    if (action === "delete") onDelete(chosen);
    else ACTIONS[action](chosen);
  });
  search.addEventListener("input", () => drawSidebar());
  toggle.addEventListener("click", toggleSidebar);
  $("veil").addEventListener("click", () => showSidebar(false));
  showSidebar(!isNarrow.matches && wanted(), false);
  isNarrow.addEventListener("change", ({ matches }) => showSidebar(!matches && wanted(), false));
}

// Whether it is shown: next to the conversation if there is room, else over it until one is chosen.

function wanted() {
  try {
    return localStorage.getItem("duck.sidebar") !== "closed";
  } catch {
    return true;
  }
}

function showSidebar(open, keep = !isNarrow.matches) {
  sidebar.hidden = !open;
  $("veil").hidden = !open || !isNarrow.matches;
  toggle.ariaExpanded = String(open);
  if (!keep) return;
  try {
    localStorage.setItem("duck.sidebar", open ? "open" : "closed");
  } catch { /* then for this page only */ }
}

export function toggleSidebar() {
  showSidebar(sidebar.hidden);
  if (sidebar.hidden) toggle.focus();
  else if (isNarrow.matches) search.focus();
}

export function focusSearch() {
  showSidebar(true, false);
  search.focus();
  search.select();
}

/** Closes it where it covers the conversation; whether it did. */
export function uncover() {
  if (!isNarrow.matches || sidebar.hidden) return false;
  showSidebar(false);
  toggle.focus();
  return true;
}
