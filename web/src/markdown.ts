// Markdown of a model to HTML that may be put into the page.
import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/common";
import katex from "katex";
import MarkdownIt from "markdown-it";
import type { Annotation } from "./types";

const CITE = "ossia-cite:";

const markdown = new MarkdownIt({
  html: false,
  linkify: true,
  highlight: (code: string, language: string): string =>
    language && hljs.getLanguage(language) ? hljs.highlight(code, { language }).value : "",
});
markdown.validateLink = (url: string) => /^(https?:|mailto:|ossia-cite:|file:|#)/i.test(url.trim());
// A picture elsewhere would tell its server that it was looked at: it is shown as a link.
markdown.renderer.rules["image"] = (tokens: any, i: number) => {
  const token = tokens[i];
  const url = markdown.utils.escapeHtml(token.attrGet("src") ?? "");
  return `<a href="${url}">${markdown.utils.escapeHtml(token.content || url)}</a>`;
};

// Formulas: \( \), \[ \], $$ $$. A single dollar is money more often than mathematics.
const FORMULAS: [string, string, boolean][] = [
  ["\\(", "\\)", false],
  ["\\[", "\\]", true],
  ["$$", "$$", true],
];

markdown.inline.ruler.before("escape", "formula", (state: any, silent: boolean) => {
  for (const [open, close, isDisplay] of FORMULAS) {
    if (!state.src.startsWith(open, state.pos)) continue;
    const end = state.src.indexOf(close, state.pos + open.length);
    if (end < 0) return false;
    if (!silent) {
      const token = state.push("formula", "", 0);
      token.content = state.src.slice(state.pos + open.length, end);
      token.meta = isDisplay;
    }
    state.pos = end + close.length;
    return true;
  }
  return false;
});
markdown.block.ruler.before("paragraph", "formula_block", (state: any, line: number, last: number, silent: boolean) => {
  const begin = state.bMarks[line] + state.tShift[line];
  const found = FORMULAS.find(([open, , isDisplay]) => isDisplay && state.src.startsWith(open, begin));
  if (!found) return false;
  const end = state.src.indexOf(found[1], begin + found[0].length);
  if (end < 0 || end >= state.eMarks[last - 1]) return false;
  let next = line;
  while (state.eMarks[next] < end) next += 1;
  if (state.src.slice(end + found[1].length, state.eMarks[next]).trim()) return false;
  if (silent) return true;
  const token = state.push("formula", "", 0);
  token.content = state.src.slice(begin + found[0].length, end);
  token.meta = true;
  state.line = next + 1;
  return true;
}, { alt: ["paragraph"] });
markdown.renderer.rules["formula"] = (tokens: any, i: number) =>
  katex.renderToString(tokens[i].content, {
    displayMode: tokens[i].meta,
    throwOnError: false,
    output: "htmlAndMathml",
    maxExpand: 200,
    maxSize: 50,
  });

DOMPurify.addHook("afterSanitizeAttributes", (node: Element) => {
  if (node.tagName !== "A") return;
  const url = node.getAttribute("href") ?? "";
  if (url.startsWith(CITE)) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "cite";
    button.dataset["cite"] = url.slice(CITE.length);
    button.textContent = node.textContent;
    node.replaceWith(button);
  } else if (/^https?:/i.test(url)) {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

/** HTML of a text; its citations become buttons that carry their number as `data-cite`. */
export function toHtml(text: string, annotations: Annotation[] = []): string {
  const html = markdown.render(withCitations(text, annotations));
  return DOMPurify.sanitize(html, { ADD_ATTR: ["target"], FORBID_TAGS: ["style", "form", "input"], ALLOW_UNKNOWN_PROTOCOLS: false, ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|ossia-cite:|file:|#)/i });
}

/** The spans of citations, which the server wrote as links, as links that name the citation. */
function withCitations(text: string, annotations: Annotation[]): string {
  const cited = annotations.map((one, i) => ({ one, i })).filter(({ one }) => one.type === "url_citation");
  if (!cited.length) return text;
  const points = [...text];
  for (const { one, i } of cited.sort((a, b) => b.one.start_index - a.one.start_index)) {
    points.splice(one.start_index, one.end_index - one.start_index, ` [${i + 1}](${CITE}${i})`);
  }
  return points.join("");
}

export function highlighted(code: string, language: string): string {
  return DOMPurify.sanitize(hljs.highlight(code, { language }).value);
}
