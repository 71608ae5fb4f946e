// A conversation is a tree: a message knows the one before it, its parent, and messages with one parent are branches, of
// which one is shown. Messages are added and never changed, except that an answer grows while it streams. So all that two
// tabs do to the same conversation can be merged without loss.
//
//   { id, title, renamed, created, updated, head, messages: { id: message } }
//   message: { id, parent, role, content, note, at, done, model?, text? }
//
// `head` is the last message that is shown; `text` marks the continuation of a model without a chat template.

// Not `crypto.randomUUID`, which browsers keep from pages that come over plain HTTP from another machine.
export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", renamed: 0, created: now, updated: now, head: null, messages: {} };
}

export const newMessage = (parent, role, content, more = {}) =>
  ({ id: newId(), parent, role, content, note: "", at: Date.now(), done: role === "user", ...more });

/** Adds a message and shows it. */
export function add(conversation, message) {
  conversation.messages[message.id] = message;
  conversation.head = message.id;
  conversation.updated = Date.now();
}

/** The messages from the first to `last`, or to the one that is shown last. */
export function path(conversation, last = conversation.head) {
  const messages = [];
  const seen = new Set();
  for (let id = last; id in conversation.messages && !seen.has(id); id = conversation.messages[id].parent) {
    seen.add(id); // what is stored may be damaged, and run in a circle
    messages.unshift(conversation.messages[id]);
  }
  return messages;
}

const byAge = (a, b) => a.at - b.at || (a.id < b.id ? -1 : 1);

const children = (conversation, parent) =>
  Object.values(conversation.messages).filter((message) => message.parent === parent).sort(byAge);

/** A message and its branches, the oldest first. */
export const branches = (conversation, message) =>
  children(conversation, message.parent).filter(({ role }) => role === message.role);

/** Shows a message, and of what follows it the newest. */
export function showBranch(conversation, message) {
  const shown = new Set();
  for (let last = message; last && !shown.has(last.id); last = children(conversation, last.id).at(-1)) {
    shown.add(last.id);
    conversation.head = last.id;
  }
}

// Of two states of one message: an answer only grows, and then it is done.
const isNewer = (message, other) =>
  message.content.length > other.content.length ||
  (message.content.length === other.content.length && message.done && !other.done);

/** Merges the state of another tab into `mine`. With `follow`, the view follows the other tab's. */
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
export const hasMore = (mine, theirs) =>
  mine.renamed > theirs.renamed ||
  Object.values(mine.messages).some((message) => {
    const other = theirs.messages[message.id];
    return !other || isNewer(message, other);
  });

const isTurn = (turn) =>
  (turn?.role === "user" || turn?.role === "assistant") && typeof turn.content === "string";

/** A stored conversation; null if the text is not one. */
export function revive(text) {
  try {
    const { id, title, renamed, created, updated, head, messages } = JSON.parse(text);
    if (typeof id !== "string" || typeof messages !== "object" || messages === null) return null;
    const sound = Object.values(messages).filter((message) => isTurn(message) && typeof message.id === "string");
    return {
      id,
      title: String(title ?? ""),
      renamed: Number(renamed) || 0,
      created: Number(created) || 0,
      updated: Number(updated) || 0,
      head,
      messages: Object.fromEntries(sound.map((message) => [message.id, { ...message, note: String(message.note ?? "") }])),
    };
  } catch {
    return null;
  }
}

/** The conversation of earlier versions of this page, a list of turns; null if it is empty. */
export function fromTurns(turns) {
  const conversation = newConversation();
  for (const { role, content, note } of Array.isArray(turns) ? turns.filter(isTurn) : [])
    add(conversation, newMessage(conversation.head, role, content, { note: String(note ?? ""), done: true }));
  return conversation.head ? conversation : null;
}

/** Its title, or its first line. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const [first] = path(conversation);
  const line = first?.content.trim().split("\n", 1)[0] ?? "";
  return line.length > 60 ? `${line.slice(0, 59)}…` : line || "New conversation";
}

/** The shown branch. */
export function toMarkdown(conversation) {
  const parts = path(conversation).map(({ role, content, model }) =>
    `**${role === "user" ? "You" : model || "Model"}**\n\n${content}`);
  return [`# ${titleOf(conversation)}`, ...parts].join("\n\n") + "\n";
}

/** The whole conversation with all branches. */
export const toJson = (conversation) =>
  JSON.stringify({ ...conversation, title: titleOf(conversation), messages: Object.values(conversation.messages) }, null, 2) + "\n";
