// The list of conversations: search, rename, export, delete.

import { conversations, save } from "./archive.js";
import { titleOf, toJson, toMarkdown } from "./conversation.js";

const $ = (id) => document.getElementById(id);
const [sidebar, list, search, menu, toggle] = ["sidebar", "conversations", "search", "menu", "toggle-sidebar"].map($);
const isNarrow = matchMedia("(max-width: 52rem)");

let menuConversation = null; // the conversation whose menu is open
let renaming = null; // the id of the conversation whose title is being edited
let current = null; // the shown conversation

const matchesSearch = (conversation, words) => {
  const text = [titleOf(conversation), ...Object.values(conversation.messages).map(({ content }) => content)];
  const whole = text.join("\n").toLowerCase();
  return words.every((word) => whole.includes(word));
};

export function drawSidebar(shown = current) {
  current = shown;
  if (renaming && list.querySelector("form:not([hidden])")) return; // redrawing would close the title field
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [...conversations.values()].filter((conversation) => matchesSearch(conversation, words));
  found.sort((a, b) => b.updated - a.updated);
  list.replaceChildren(...found.map(listItem));
  $("none").textContent = found.length > 0 ? "" : words.length > 0 ? "Nothing found." : "No conversations yet.";
}

function listItem(conversation) {
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
    event.stopPropagation(); // Escape would also stop the answer
    finish(false);
  });
  return item;
}

// The menu of a conversation

function openMenu(conversation, button) {
  menuConversation = conversation;
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
  setTimeout(() => URL.revokeObjectURL(address), 60_000); // the browser may still be reading it
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

/** Adds the event handlers. `onDelete(conversation)` is called when the user deletes a conversation. */
export function initSidebar(onDelete) {
  menu.addEventListener("click", ({ target }) => {
    const action = target.closest("button")?.dataset.action;
    if (!action) return;
    menu.hidePopover();
    if (action === "delete") onDelete(menuConversation);
    else ACTIONS[action](menuConversation);
  });
  search.addEventListener("input", () => drawSidebar());
  toggle.addEventListener("click", toggleSidebar);
  $("veil").addEventListener("click", () => showSidebar(false));
  showSidebar(!isNarrow.matches && wasOpen(), false);
  isNarrow.addEventListener("change", ({ matches }) => showSidebar(!matches && wasOpen(), false));
}

// Visibility: next to the conversation on a wide screen; on a narrow one over it, until a conversation is chosen.

function wasOpen() {
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
  } catch { /* no storage: the choice lasts until the page is closed */ }
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

/** Closes the sidebar if it covers the conversation. Returns whether it did. */
export function closeOverlay() {
  if (!isNarrow.matches || sidebar.hidden) return false;
  showSidebar(false);
  toggle.focus();
  return true;
}
