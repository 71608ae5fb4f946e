// Markdown as nodes: headings, lists, quotes, tables, code, emphasis and links.
//
// A model's text never becomes HTML: all nodes are made here, and text goes into text nodes only. What is not understood
// stays as it was written. The text is a stranger's, so all work is bounded: nesting by DEPTH, searches for an end that is
// not there by remembering that (see `inline`), and expressions have one way to match.

const DEPTH = 12;
const SAFE = new Set(["http:", "https:", "mailto:"]);

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: {1,4}(?=\S)|$)/;
const DASHES = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;
const isBlank = (line) => line.trim() === "";

/** An element with nodes and strings in it; one by one, as a call has only so many arguments. */
function element(name, children = []) {
  const made = document.createElement(name);
  for (const child of children) made.append(child);
  return made;
}

/**
 * Draws text into an element. Blocks that are as they were stay: a stream draws its last block again, not all of them, and
 * what somebody has selected stays selected.
 */
export function render(target, text) {
  const found = blocks(text.split("\n"));
  found.forEach((block, i) => {
    const key = JSON.stringify(block);
    const old = target.children[i];
    if (old?.markdown === key) return;
    const node = build(block, 0);
    node.markdown = key;
    if (old) old.replaceWith(node);
    else target.append(node);
  });
  while (target.childNodes.length > found.length) target.lastChild.remove();
}

// Blocks: `{ kind, lines }` with what else a kind needs.

const isStart = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
const isTable = (lines, i) => lines[i].includes("|") && (lines[i + 1] ?? "").includes("|") && DASHES.test(lines[i + 1].trimEnd());

function blocks(lines) {
  const found = [];
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    const [fence, heading] = [FENCE.exec(line), HEADING.exec(line)];
    const start = i;
    i += 1;
    if (isBlank(line)) continue;
    if (fence) {
      const isEnd = (other) => other.trim().startsWith(fence[1]) && FENCE.exec(other)?.[2].trim() === "";
      while (i < lines.length && !isEnd(lines[i])) i += 1;
      found.push({ kind: "code", language: fence[2].trim(), lines: lines.slice(start + 1, i) });
      i += 1; // a stream may not have come to the end yet
    } else if (heading) {
      found.push({ kind: `h${Math.min(heading[1].length + 2, 6)}`, lines: [heading[2].trim()] });
    } else if (RULE.test(line)) {
      found.push({ kind: "hr", lines: [] });
    } else if (QUOTE.test(line)) {
      while (i < lines.length && QUOTE.test(lines[i])) i += 1;
      found.push({ kind: "blockquote", lines: lines.slice(start, i).map((quoted) => quoted.replace(QUOTE, "")) });
    } else if (ITEM.test(line)) {
      const list = items(lines, start);
      found.push(list);
      i = list.end;
      delete list.end;
    } else if (isTable(lines, start)) {
      i += 1;
      while (i < lines.length && lines[i].includes("|")) i += 1;
      found.push({ kind: "table", lines: lines.slice(start, i) });
    } else {
      while (i < lines.length && !isBlank(lines[i]) && !isStart(lines[i]) && !isTable(lines, i)) i += 1;
      found.push({ kind: "p", lines: lines.slice(start, i) });
    }
  }
  return found;
}

/** The list that begins at a line. Lines that are indented as far as the text of their item belong to it. */
function items(lines, start) {
  const isNumber = (mark) => /\d/.test(mark);
  const ordered = isNumber(ITEM.exec(lines[start])[2]);
  const list = { kind: ordered ? "ol" : "ul", first: ordered ? parseInt(lines[start], 10) : 1, lines: [], end: start };
  let inside = 0; // where the text of the item begins
  for (; list.end < lines.length; list.end += 1) {
    const line = lines[list.end];
    const indent = line.length - line.trimStart().length;
    const item = ITEM.exec(line);
    if (isBlank(line)) {
      const next = lines.slice(list.end, list.end + 3).find((other) => !isBlank(other));
      const goesOn = next !== undefined && (ITEM.test(next) || next.startsWith(" ".repeat(inside)));
      if (!goesOn) break;
      list.lines.at(-1).push("");
    } else if (list.lines.length > 0 && indent >= inside) {
      list.lines.at(-1).push(line.slice(inside));
    } else if (item && isNumber(item[2]) === ordered && !RULE.test(line)) {
      inside = item[0].length;
      list.lines.push([line.slice(inside)]);
    } else if (isStart(line) || isBlank(lines[list.end - 1])) {
      break;
    } else {
      list.lines.at(-1).push(line.trimStart()); // a paragraph that goes on
    }
  }
  return list;
}

function build({ kind, lines, ...more }, depth) {
  if (depth > DEPTH) return element("p", [lines.flat().join("\n")]);
  const inner = (nested) => blocks(nested).map((block) => build(block, depth + 1));
  switch (kind) {
    case "code":
      return code(more.language, lines.join("\n"));
    case "blockquote":
      return element("blockquote", inner(lines));
    case "ul":
    case "ol": {
      const list = element(kind, lines.map((item) => element("li", inner(item).flatMap(loosened))));
      if (more.first !== 1) list.start = more.first;
      return list;
    }
    case "table":
      return table(lines);
    default:
      return element(kind, inline(lines.join("\n")));
  }
}

// The first paragraph of an item is its text.
const loosened = (node, i) => (i === 0 && node.tagName === "P" ? [...node.childNodes] : [node]);

function code(language, text) {
  const copy = element("button", ["Copy"]);
  Object.assign(copy, { type: "button", className: "link copy-code", ariaLabel: "Copy the code" });
  const pre = element("pre", [element("code", [text])]);
  Object.assign(pre, { tabIndex: 0, role: "region", ariaLabel: "Code" }); // it scrolls, so the keyboard must reach it
  const figure = element("figure", [element("figcaption", [element("span", [language || "code"]), copy]), pre]);
  figure.className = "code";
  return figure;
}

function table([head, dashes, ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  const sides = cells(dashes).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (line, kind) => element("tr", cells(line).slice(0, sides.length).map((cell, i) =>
    Object.assign(element(kind, inline(cell)), { className: sides[i] })));
  const body = element("tbody", rows.map((line) => row(line, "td")));
  const box = element("div", [element("table", [element("thead", [row(head, "th")]), body])]);
  return Object.assign(box, { className: "table", tabIndex: 0, role: "region", ariaLabel: "Table" });
}

// Text within a block

const ESCAPED = /[!-/:-@[-`{-~]/;
const LINK = /!?\[((?:\\.|[^[\]\\])*)\]\([ \t]{0,8}((?:\\.|[^\s()<>\\]|\([^\s()]*\))*)(?:[ \t]{1,8}"[^"]*")?[ \t]{0,8}\)/y;
const ANGLED = /<((?:https?|mailto):[^\s<>]*)>/y;
const BARE = /https?:\/\/[^\s<>"`]+/y;
const RUN = { "*": /\*+/g, _: /_+/g, "~": /~+/g, "`": /`+/g };
const MARKS = { "*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["strong", "em"], ___: ["strong", "em"], "~~": ["del"] };
const isWord = (character) => /[\p{L}\p{N}]/u.test(character ?? "");
const isSpace = (character) => /^\s?$/.test(character ?? "");

/** Nodes and strings; a link has none in it. */
function inline(text, depth = 0, links = true) {
  const nodes = [];
  let plain = "";
  const put = (node, end) => {
    nodes.push(plain, node);
    plain = "";
    i = end;
  };
  const missing = new Set(); // marks that do not end in what is left: looked for once, not from each place
  let i = 0;
  while (i < text.length) {
    const c = text[i];
    if (c === "\\" && ESCAPED.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
      continue;
    }
    if (c in RUN) {
      const run = matchAt(RUN[c], text, i)[0];
      const end = missing.has(run) ? -1 : c === "`" ? codeEnd(text, i, run) : markEnd(text, i, run);
      if (end < 0) missing.add(run);
      if (end > 0 && c === "`") {
        const within = text.slice(i + run.length, end);
        const padded = /^ .* $/s.test(within) && !isBlank(within);
        put(element("code", [padded ? within.slice(1, -1) : within]), end + run.length);
        continue;
      }
      if (end > 0 && depth < DEPTH) {
        const within = inline(text.slice(i + run.length, end), depth + 1, links);
        put(MARKS[run].reduceRight((children, name) => [element(name, children)], within)[0], end + run.length);
        continue;
      }
      plain += run;
      i += run.length;
      continue;
    }
    const named = c === "[" || c === "!" ? matchAt(LINK, text, i) : null;
    const bare = c === "<" ? matchAt(ANGLED, text, i) : c === "h" && !isWord(text[i - 1]) ? matchAt(BARE, text, i) : null;
    const address = named ? named[2].replace(/\\(.)/g, "$1") : bare ? (bare[1] ?? trimmed(bare[0])) : "";
    const target = links && address && safe(address);
    if (target) {
      const label = named ? inline(named[1], depth + 1, false) : [address];
      put(link(target, label.length > 0 ? label : [address]), i + (named?.[0] ?? (bare[1] ? bare[0] : address)).length);
      continue;
    }
    plain += c;
    i += 1;
  }
  return [...nodes, plain].filter((node) => node !== "");
}

function matchAt(expression, text, at) {
  expression.lastIndex = at;
  return expression.exec(text);
}

/** Where a run of as many backticks is; -1 if there is none. */
function codeEnd(text, at, run) {
  RUN["`"].lastIndex = at + run.length;
  for (let found; (found = RUN["`"].exec(text));) if (found[0] === run) return found.index;
  return -1;
}

/** Where the run that ends an emphasis is; -1 if there is none, 0 if this run begins none. */
function markEnd(text, at, run) {
  const [c, from] = [run[0], at + run.length];
  if (!(run in MARKS) || isSpace(text[from]) || (c === "_" && isWord(text[at - 1]))) return 0;
  RUN[c].lastIndex = from;
  for (let found; (found = RUN[c].exec(text));) {
    const end = found.index + found[0].length;
    const ends = !isSpace(text[found.index - 1]) && text[found.index - 1] !== "\\" && !(c === "_" && isWord(text[end]));
    // Of `**a *b***` the last two end the first two.
    const fits = found[0].length === run.length || found[0].length === 3 || (run.length > 1 && found[0].length > run.length);
    if (ends && fits && found[0].length >= run.length) return end - run.length;
  }
  return -1;
}

/** An address that stands in a sentence, without what ends the sentence. */
function trimmed(address) {
  let end = address.length;
  while (end > 0 && ".,;:!?*_~'\"".includes(address[end - 1])) end -= 1;
  if (address[end - 1] === ")" && !address.includes("(")) end -= 1;
  return address.slice(0, end);
}

/** The address, if it is one that cannot run anything. */
function safe(address) {
  try {
    const url = new URL(address); // relative ones are none: they would lead into this server
    return SAFE.has(url.protocol) ? url.href : "";
  } catch {
    return "";
  }
}

const link = (href, children) =>
  Object.assign(element("a", children), { href, target: "_blank", rel: "noopener noreferrer" });
