// A conversation is a tree. Each message has a parent, the message before it; messages with the same parent are branches, of
// which one is shown. Messages are added and never changed, except that an answer grows while it streams, so the changes of
// two tabs to one conversation merge without loss.
//
//   { id, title, renamed, created, updated, head, messages: { id: message } }
//   message: { id, parent, role, content, note, at, done, model?, text? }
//
// `head` is the id of the last shown message. `text` marks the output of a model without a chat template.

// `crypto.randomUUID` is not available to pages that come over plain HTTP from another machine.
export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", renamed: 0, created: now, updated: now, head: null, messages: {} };
}

export const newMessage = (parent, role, content, more = {}) =>
  ({ id: newId(), parent, role, content, note: "", at: Date.now(), done: role === "user", ...more });

/** Adds a message and makes it the head. */
export function appendMessage(conversation, message) {
  conversation.messages[message.id] = message;
  conversation.head = message.id;
  conversation.updated = Date.now();
}

/** The messages from the first to `last`, by default to the head. */
export function path(conversation, last = conversation.head) {
  const messages = [];
  const seen = new Set();
  for (let id = last; id in conversation.messages && !seen.has(id); id = conversation.messages[id].parent) {
    seen.add(id); // stored data may be damaged and have a cycle
    messages.unshift(conversation.messages[id]);
  }
  return messages;
}

const byAge = (a, b) => a.at - b.at || (a.id < b.id ? -1 : 1);

const children = (conversation, parent) =>
  Object.values(conversation.messages).filter((message) => message.parent === parent).sort(byAge);

/** A message and the other branches of its parent, the oldest first. */
export const branches = (conversation, message) =>
  children(conversation, message.parent).filter(({ role }) => role === message.role);

/** Moves the head to a message, or to the newest of its descendants: at each message the newest child. */
export function showBranch(conversation, message) {
  const shown = new Set();
  for (let last = message; last && !shown.has(last.id); last = children(conversation, last.id).at(-1)) {
    shown.add(last.id);
    conversation.head = last.id;
  }
}

// Whether `message` is a later state of the same message as `other`: an answer only grows until it is done.
const isNewer = (message, other) =>
  message.content.length > other.content.length ||
  (message.content.length === other.content.length && message.done && !other.done);

/** Merges the state of another tab into `mine`. With `follow`, the head moves along the other tab's branch. */
export function merge(mine, theirs, follow = false) {
  for (const message of Object.values(theirs.messages)) {
    const known = mine.messages[message.id];
    if (!known) mine.messages[message.id] = message;
    else if (isNewer(message, known)) Object.assign(known, message);
  }
  if (theirs.renamed > mine.renamed) Object.assign(mine, { title: theirs.title, renamed: theirs.renamed });
  mine.updated = Math.max(mine.updated, theirs.updated);
  if (follow && path(mine, theirs.head).some(({ id }) => id === mine.head)) mine.head = theirs.head;
}

/** Whether `mine` has a message or a newer title that `theirs` lacks. */
export const isAhead = (mine, theirs) =>
  mine.renamed > theirs.renamed ||
  Object.values(mine.messages).some((message) => {
    const other = theirs.messages[message.id];
    return !other || isNewer(message, other);
  });

const isTurn = (turn) =>
  (turn?.role === "user" || turn?.role === "assistant") && typeof turn.content === "string";

/** Parses a stored conversation, without its invalid messages. Returns null if the text is not a conversation. */
export function parseConversation(text) {
  try {
    const { id, title, renamed, created, updated, head, messages } = JSON.parse(text);
    if (typeof id !== "string" || typeof messages !== "object" || messages === null) return null;
    const valid = Object.values(messages).filter((message) => isTurn(message) && typeof message.id === "string");
    return {
      id,
      title: String(title ?? ""),
      renamed: Number(renamed) || 0,
      created: Number(created) || 0,
      updated: Number(updated) || 0,
      head,
      messages: Object.fromEntries(valid.map((message) => [message.id, { ...message, note: String(message.note ?? "") }])),
    };
  } catch {
    return null;
  }
}

/** Converts the list of turns that earlier versions of this page stored. Returns null if it is empty. */
export function fromTurns(turns) {
  const conversation = newConversation();
  for (const { role, content, note } of Array.isArray(turns) ? turns.filter(isTurn) : [])
    appendMessage(conversation, newMessage(conversation.head, role, content, { note: String(note ?? ""), done: true }));
  return conversation.head ? conversation : null;
}

/** The title, by default the first line. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const [first] = path(conversation);
  const line = first?.content.trim().split("\n", 1)[0] ?? "";
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "New conversation";
}

/** Exports the shown branch as Markdown. */
export function toMarkdown(conversation) {
  const parts = path(conversation).map(({ role, content, model }) =>
    `**${role === "user" ? "You" : model || "Model"}**\n\n${content}`);
  return [`# ${titleOf(conversation)}`, ...parts].join("\n\n") + "\n";
}

/** Exports the whole conversation, with all branches, as JSON. */
export const toJson = (conversation) =>
  JSON.stringify({ ...conversation, title: titleOf(conversation), messages: Object.values(conversation.messages) }, null, 2) + "\n";
