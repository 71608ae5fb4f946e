// All conversations, in memory and in localStorage: one key per conversation, so that tabs do not overwrite each other's.
//
// The map in memory is what the page shows, since storage may be full or forbidden. `save` merges what is stored before it
// writes. If another tab writes between the two, its `storage` event shows that a message of ours is missing, and `open` saves
// the conversation again.

import { fromTurns, isAhead, merge, parseConversation } from "./conversation.js";

const PREFIX = "duck.conversation.";
const LEGACY_KEY = "duck.turns"; // earlier versions of this page stored one conversation here

export const conversations = new Map();

const unsaved = new Set(); // ids of conversations that are in memory only
let onChange = () => {};
let onStorageError = () => {};

/** Returns the JSON value of a key, or `otherwise` if there is none. */
export function readJson(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Writes text. Returns an error message, or an empty string. */
function writeText(key, text) {
  try {
    localStorage.setItem(key, text);
    return "";
  } catch (error) {
    return error.name === "QuotaExceededError"
      ? "The browser's storage is full: new messages are on this screen only. Export them, or delete conversations."
      : "The browser stores nothing for this page: conversations are on this screen only. Export those that you want to keep.";
  }
}

export const writeJson = (key, value) => writeText(key, JSON.stringify(value));

function readStored(id) {
  try {
    return parseConversation(localStorage.getItem(PREFIX + id));
  } catch {
    return null;
  }
}

export function save(conversation) {
  const previous = readStored(conversation.id);
  if (previous) merge(conversation, previous);
  conversations.set(conversation.id, conversation);
  const problem = writeJson(PREFIX + conversation.id, conversation);
  if (problem) unsaved.add(conversation.id);
  else unsaved.delete(conversation.id);
  onStorageError(problem || (unsaved.size > 0 ? retry() : ""));
}

/** Writes the unsaved conversations again: there may be room now. Returns an error message, or an empty string. */
function retry() {
  for (const id of unsaved) {
    const problem = writeJson(PREFIX + id, conversations.get(id));
    if (problem) return problem;
    unsaved.delete(id);
  }
  return "";
}

export function remove(conversation) {
  conversations.delete(conversation.id);
  unsaved.delete(conversation.id);
  try {
    localStorage.removeItem(PREFIX + conversation.id);
  } catch { /* no storage, so nothing to remove */ }
  onStorageError(retry());
}

/**
 * Reads all stored conversations, and listens to the changes of other tabs. `onChange(id)` is called when another tab changed a
 * conversation, `onStorageError(text)` with the reason why conversations cannot be stored, or an empty text when they can.
 * Returns the conversation of an earlier version of this page, if there is one.
 */
export function open(listeners) {
  ({ onChange, onStorageError } = listeners);
  try {
    for (const key of Object.keys(localStorage)) {
      const conversation = key.startsWith(PREFIX) ? parseConversation(localStorage.getItem(key)) : null;
      if (conversation) conversations.set(conversation.id, conversation);
    }
  } catch { /* no storage, so nothing to read */ }
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(PREFIX)) return;
    const id = key.slice(PREFIX.length);
    const theirs = parseConversation(newValue);
    const mine = conversations.get(id);
    if (!theirs) conversations.delete(id);
    else if (!mine) conversations.set(id, theirs);
    else {
      merge(mine, theirs, true);
      if (isAhead(mine, theirs)) save(mine);
    }
    onChange(id);
  });
  addEventListener("beforeunload", (event) => {
    if (unsaved.size > 0) event.preventDefault(); // the browser asks before it leaves the page
  });
  const migrated = fromTurns(readJson(LEGACY_KEY, []));
  if (migrated) save(migrated);
  if (!migrated || !unsaved.has(migrated.id)) {
    try {
      localStorage.removeItem(LEGACY_KEY);
    } catch { /* no storage, so nothing to remove */ }
  }
  return migrated;
}
