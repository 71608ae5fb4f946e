// All conversations, in memory and in localStorage: one key per conversation, so that tabs do not overwrite each other's.
//
// Memory has what is on the screen; storage may be full or forbidden. `save` reads first and merges. Another tab may write
// between that reading and the writing. Its `storage` event then shows that something of ours is missing, and `open` saves it
// again.

import { fromTurns, hasMore, merge, revive } from "./conversation.js";

const PREFIX = "duck.conversation.";
const OLD = "duck.turns"; // the only conversation of earlier versions of this page

export const conversations = new Map();

const unsaved = new Set(); // ids of conversations that are in memory only
let onChange = () => {};
let onTrouble = () => {};

/** Reads a value that is JSON. */
export function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Writes text. Returns why it could not be written, or an empty string. */
function put(key, text) {
  try {
    localStorage.setItem(key, text);
    return "";
  } catch (error) {
    return error.name === "QuotaExceededError"
      ? "The browser's storage is full: new messages are on this screen only. Export them, or delete conversations."
      : "The browser stores nothing for this page: conversations are on this screen only. Export those that you want to keep.";
  }
}

export const write = (key, value) => put(key, JSON.stringify(value));

function stored(id) {
  try {
    return revive(localStorage.getItem(PREFIX + id));
  } catch {
    return null;
  }
}

export function save(conversation) {
  const before = stored(conversation.id);
  if (before) merge(conversation, before);
  conversations.set(conversation.id, conversation);
  const trouble = write(PREFIX + conversation.id, conversation);
  if (trouble) unsaved.add(conversation.id);
  else unsaved.delete(conversation.id);
  onTrouble(trouble || (unsaved.size > 0 ? retry() : ""));
}

/** Writes again what could not be written: there may be room now. */
function retry() {
  for (const id of unsaved) {
    const trouble = write(PREFIX + id, conversations.get(id));
    if (trouble) return trouble;
    unsaved.delete(id);
  }
  return "";
}

export function remove(conversation) {
  conversations.delete(conversation.id);
  unsaved.delete(conversation.id);
  try {
    localStorage.removeItem(PREFIX + conversation.id);
  } catch { /* then it was not stored either */ }
  onTrouble(retry());
}

/**
 * Reads what is stored, and from then on what other tabs store. `onChange(id)`: another tab changed a conversation.
 * `onTrouble(text)`: why conversations cannot be stored; empty if they can. Returns the conversation of an earlier version
 * of this page, if there is one.
 */
export function open(listeners) {
  ({ onChange, onTrouble } = listeners);
  try {
    for (const key of Object.keys(localStorage)) {
      const conversation = key.startsWith(PREFIX) ? revive(localStorage.getItem(key)) : null;
      if (conversation) conversations.set(conversation.id, conversation);
    }
  } catch { /* no storage, so nothing is stored */ }
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(PREFIX)) return;
    const id = key.slice(PREFIX.length);
    const theirs = revive(newValue);
    const mine = conversations.get(id);
    if (!theirs) conversations.delete(id);
    else if (!mine) conversations.set(id, theirs);
    else {
      merge(mine, theirs, true);
      if (hasMore(mine, theirs)) save(mine);
    }
    onChange(id);
  });
  addEventListener("beforeunload", (event) => {
    if (unsaved.size > 0) event.preventDefault(); // the browser asks
  });
  const old = fromTurns(read(OLD, []));
  if (old) save(old);
  if (!old || !unsaved.has(old.id)) {
    try {
      localStorage.removeItem(OLD);
    } catch { /* nothing there */ }
  }
  return old;
}
