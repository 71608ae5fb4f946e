// Renders Markdown as DOM nodes: headings, lists, quotes, tables, code, emphasis and links.
//
// A model's text never becomes HTML: all nodes are created here, and text goes into text nodes only. Unknown syntax is shown as
// text. The text is untrusted, so the work is bounded: MAX_DEPTH limits nesting, `parseInline` remembers which closing
// delimiters do not exist instead of searching again, and a regular expression has one way to match, so it cannot
// backtrack exponentially.

const MAX_DEPTH = 12;
const SAFE_PROTOCOLS = new Set(["http:", "https:", "mailto:"]);

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: {1,4}(?=\S)|$)/;
const TABLE_DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;
const isBlank = (line) => line.trim() === "";

/** Creates an element with nodes and strings. One call per child: the number of arguments of a call is limited. */
function createElement(name, children = []) {
  const made = document.createElement(name);
  for (const child of children) made.append(child);
  return made;
}

/**
 * Renders text into an element. Unchanged blocks keep their nodes, so a streaming answer renders its last block only, and a text
 * selection in earlier blocks survives.
 */
export function render(target, text) {
  const found = parseBlocks(text.split("\n"));
  found.forEach((block, i) => {
    const key = JSON.stringify(block);
    const old = target.children[i];
    if (old?.markdown === key) return;
    const node = renderBlock(block, 0);
    node.markdown = key;
    if (old) old.replaceWith(node);
    else target.append(node);
  });
  while (target.childNodes.length > found.length) target.lastChild.remove();
}

// Blocks: `{ kind, lines }`, with `language` for code, `first` for lists.

const isStart = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
const isTable = (lines, i) => lines[i].includes("|") && (lines[i + 1] ?? "").includes("|") && TABLE_DELIMITER.test(lines[i + 1].trimEnd());

function parseBlocks(lines) {
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
      i += 1; // the closing fence, which a streaming answer may still lack
    } else if (heading) {
      found.push({ kind: `h${Math.min(heading[1].length + 2, 6)}`, lines: [heading[2].trim()] });
    } else if (RULE.test(line)) {
      found.push({ kind: "hr", lines: [] });
    } else if (QUOTE.test(line)) {
      while (i < lines.length && QUOTE.test(lines[i])) i += 1;
      found.push({ kind: "blockquote", lines: lines.slice(start, i).map((quoted) => quoted.replace(QUOTE, "")) });
    } else if (ITEM.test(line)) {
      const list = parseList(lines, start);
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

/** Parses the list that starts at a line. Lines with at least the indentation of an item's text belong to the item. */
function parseList(lines, start) {
  const isNumber = (mark) => /\d/.test(mark);
  const ordered = isNumber(ITEM.exec(lines[start])[2]);
  const list = { kind: ordered ? "ol" : "ul", first: ordered ? parseInt(lines[start], 10) : 1, lines: [], end: start };
  let contentIndent = 0; // column of the item's text
  for (; list.end < lines.length; list.end += 1) {
    const line = lines[list.end];
    const indent = line.length - line.trimStart().length;
    const item = ITEM.exec(line);
    if (isBlank(line)) {
      const next = lines.slice(list.end, list.end + 3).find((other) => !isBlank(other));
      const goesOn = next !== undefined && (ITEM.test(next) || next.startsWith(" ".repeat(contentIndent)));
      if (!goesOn) break;
      list.lines.at(-1).push("");
    } else if (list.lines.length > 0 && indent >= contentIndent) {
      list.lines.at(-1).push(line.slice(contentIndent));
    } else if (item && isNumber(item[2]) === ordered && !RULE.test(line)) {
      contentIndent = item[0].length;
      list.lines.push([line.slice(contentIndent)]);
    } else if (isStart(line) || isBlank(lines[list.end - 1])) {
      break;
    } else {
      list.lines.at(-1).push(line.trimStart()); // lazy continuation of a paragraph
    }
  }
  return list;
}

function renderBlock({ kind, lines, ...more }, depth) {
  if (depth > MAX_DEPTH) return createElement("p", [lines.flat().join("\n")]);
  const inner = (nested) => parseBlocks(nested).map((block) => renderBlock(block, depth + 1));
  switch (kind) {
    case "code":
      return code(more.language, lines.join("\n"));
    case "blockquote":
      return createElement("blockquote", inner(lines));
    case "ul":
    case "ol": {
      const list = createElement(kind, lines.map((item) => createElement("li", inner(item).flatMap(unwrapFirstParagraph))));
      if (more.first !== 1) list.start = more.first;
      return list;
    }
    case "table":
      return table(lines);
    default:
      return createElement(kind, parseInline(lines.join("\n")));
  }
}

// The text of an item is not wrapped in a paragraph.
const unwrapFirstParagraph = (node, i) => (i === 0 && node.tagName === "P" ? [...node.childNodes] : [node]);

function code(language, text) {
  const copy = createElement("button", ["Copy"]);
  Object.assign(copy, { type: "button", className: "link copy-code", ariaLabel: "Copy the code" });
  const pre = createElement("pre", [createElement("code", [text])]);
  Object.assign(pre, { tabIndex: 0, role: "region", ariaLabel: "Code" }); // scrollable, so the keyboard must reach it
  const figure = createElement("figure", [createElement("figcaption", [createElement("span", [language || "code"]), copy]), pre]);
  figure.className = "code";
  return figure;
}

function table([head, dashes, ...rows]) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  const alignments = cells(dashes).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (line, kind) => createElement("tr", cells(line).slice(0, alignments.length).map((cell, i) =>
    Object.assign(createElement(kind, parseInline(cell)), { className: alignments[i] })));
  const body = createElement("tbody", rows.map((line) => row(line, "td")));
  const box = createElement("div", [createElement("table", [createElement("thead", [row(head, "th")]), body])]);
  return Object.assign(box, { className: "table", tabIndex: 0, role: "region", ariaLabel: "Table" });
}

// Inline text

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const LINK = /!?\[((?:\\.|[^[\]\\])*)\]\([ \t]{0,8}((?:\\.|[^\s()<>\\]|\([^\s()]*\))*)(?:[ \t]{1,8}"[^"]*")?[ \t]{0,8}\)/y;
const AUTOLINK = /<((?:https?|mailto):[^\s<>]*)>/y;
const BARE_URL = /https?:\/\/[^\s<>"`]+/y;
const DELIMITER_RUN = { "*": /\*+/g, _: /_+/g, "~": /~+/g, "`": /`+/g };
const EMPHASIS = { "*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["strong", "em"], ___: ["strong", "em"], "~~": ["del"] };
const isWord = (character) => /[\p{L}\p{N}]/u.test(character ?? "");
const isSpace = (character) => /^\s?$/.test(character ?? "");

/** Parses inline text into nodes and strings. `links` is false inside of a link. */
function parseInline(text, depth = 0, links = true) {
  const nodes = [];
  let plain = "";
  const pushNode = (node, end) => {
    nodes.push(plain, node);
    plain = "";
    i = end;
  };
  const missing = new Set(); // delimiter runs without a closing one in the rest of the text
  let i = 0;
  while (i < text.length) {
    const c = text[i];
    if (c === "\\" && ESCAPABLE.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
      continue;
    }
    if (c in DELIMITER_RUN) {
      const run = matchAt(DELIMITER_RUN[c], text, i)[0];
      const end = missing.has(run) ? -1 : c === "`" ? closingBackticks(text, i, run) : closingDelimiter(text, i, run);
      if (end < 0) missing.add(run);
      if (end > 0 && c === "`") {
        const within = text.slice(i + run.length, end);
        const padded = /^ .* $/s.test(within) && !isBlank(within);
        pushNode(createElement("code", [padded ? within.slice(1, -1) : within]), end + run.length);
        continue;
      }
      if (end > 0 && depth < MAX_DEPTH) {
        const within = parseInline(text.slice(i + run.length, end), depth + 1, links);
        pushNode(EMPHASIS[run].reduceRight((children, name) => [createElement(name, children)], within)[0], end + run.length);
        continue;
      }
      plain += run;
      i += run.length;
      continue;
    }
    const named = c === "[" || c === "!" ? matchAt(LINK, text, i) : null;
    const bare = c === "<" ? matchAt(AUTOLINK, text, i) : c === "h" && !isWord(text[i - 1]) ? matchAt(BARE_URL, text, i) : null;
    const address = named ? named[2].replace(/\\(.)/g, "$1") : bare ? (bare[1] ?? withoutPunctuation(bare[0])) : "";
    const target = links && address && safeUrl(address);
    if (target) {
      const label = named ? parseInline(named[1], depth + 1, false) : [address];
      pushNode(link(target, label.length > 0 ? label : [address]), i + (named?.[0] ?? (bare[1] ? bare[0] : address)).length);
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

/** Index of the closing run of backticks, which has the same length; -1 if there is none. */
function closingBackticks(text, at, run) {
  DELIMITER_RUN["`"].lastIndex = at + run.length;
  for (let found; (found = DELIMITER_RUN["`"].exec(text));) if (found[0] === run) return found.index;
  return -1;
}

/** Index of the run that closes an emphasis; -1 if there is none, 0 if `run` cannot open one. */
function closingDelimiter(text, at, run) {
  const [c, from] = [run[0], at + run.length];
  if (!(run in EMPHASIS) || isSpace(text[from]) || (c === "_" && isWord(text[at - 1]))) return 0;
  DELIMITER_RUN[c].lastIndex = from;
  for (let found; (found = DELIMITER_RUN[c].exec(text));) {
    const end = found.index + found[0].length;
    const ends = !isSpace(text[found.index - 1]) && text[found.index - 1] !== "\\" && !(c === "_" && isWord(text[end]));
    // In `**a *b***` the last two asterisks close the first two.
    const fits = found[0].length === run.length || found[0].length === 3 || (run.length > 1 && found[0].length > run.length);
    if (ends && fits && found[0].length >= run.length) return end - run.length;
  }
  return -1;
}

/** A bare URL without the punctuation of the sentence around it. */
function withoutPunctuation(address) {
  let end = address.length;
  while (end > 0 && ".,;:!?*_~'\"".includes(address[end - 1])) end -= 1;
  if (address[end - 1] === ")" && !address.includes("(")) end -= 1;
  return address.slice(0, end);
}

/** The normalized URL if its protocol cannot execute code, else an empty string. */
function safeUrl(address) {
  try {
    const url = new URL(address); // throws for relative URLs, which would point to this server
    return SAFE_PROTOCOLS.has(url.protocol) ? url.href : "";
  } catch {
    return "";
  }
}

const link = (href, children) =>
  Object.assign(createElement("a", children), { href, target: "_blank", rel: "noopener noreferrer" });
