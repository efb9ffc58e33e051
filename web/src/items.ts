// Events of a stream to items, and items to texts.
import type { Annotation, Item, Part, StreamEvent } from "./types";

/** What the events so far add up to; a new array for each event that changes it. */
export function applied(items: Item[], event: StreamEvent, now: number): Item[] {
  const at = event.output_index;
  if (at === undefined) return items;
  const change = (by: (item: Item) => Item): Item[] => {
    const item = items[at];
    return item ? items.with(at, by(item)) : items;
  };
  const inPart = (by: (part: Part) => Part): Item[] =>
    change((item) => {
      const content = Array.isArray(item.content) ? [...item.content] : [];
      const index = event.content_index ?? 0;
      content[index] = by(content[index] ?? { type: "output_text", text: "" });
      return { ...item, content, num_deltas: (item.num_deltas ?? 0) + 1 };
    });
  const added = (part: Part): Part => ({ ...part, text: (part.text ?? "") + (event.delta ?? "") });

  switch (event.type) {
    case "response.output_item.added": {
      const next = [...items];
      next[at] = { ...event.item!, began: now };
      return next;
    }
    case "response.output_item.done":
      return change((item) => ({ ...event.item!, began: item.began, ended: now, num_deltas: item.num_deltas }));
    case "response.content_part.added":
      return inPart(() => ({ text: "", ...event.part! }));
    case "response.output_text.delta":
    case "response.reasoning_text.delta":
      return inPart(added);
    case "response.output_text.annotation.added":
      return inPart((part) => ({ ...part, annotations: [...(part.annotations ?? []), event.annotation as Annotation] }));
    case "response.code_interpreter_call_code.delta":
      return change((item) => ({ ...item, code: (item.code ?? "") + event.delta }));
    case "response.function_call_arguments.delta":
    case "response.mcp_call_arguments.delta":
      return change((item) => ({ ...item, arguments: (item.arguments ?? "") + event.delta }));
    default:
      return items;
  }
}

export function textOf(item: Item): string {
  if (typeof item.content === "string") return item.content;
  return (item.content ?? []).map((part) => part.text ?? part.refusal ?? "").join("");
}

export function partsOf(item: Item): Part[] {
  return typeof item.content === "string" ? [{ type: "text", text: item.content }] : (item.content ?? []);
}

export function seconds(item: Item, now: number): number | null {
  return item.began === undefined ? null : ((item.ended ?? now) - item.began) / 1000;
}

/** A conversation as Markdown, for people to keep. */
export function markdownOf(title: string, items: Item[]): string {
  const out = [`# ${title}`];
  for (const item of items) {
    if (item.type === "message") out.push(`## ${item.role === "user" ? "You" : "Model"}\n\n${textOf(item)}`);
    else if (item.type === "reasoning") {
      out.push(`<details><summary>Reasoning</summary>\n\n${textOf(item)}\n\n</details>`);
    } else if (item.type === "code_interpreter_call") {
      const logs = (item.outputs ?? []).map((output) => output.logs ?? "(image)").join("\n");
      out.push(fenced("python", item.code ?? "") + (logs ? `\n\n${fenced("", logs)}` : ""));
    } else if (item.type === "web_search_call") out.push(`*${actionOf(item)}*`);
  }
  return out.join("\n\n") + "\n";
}

function fenced(language: string, text: string): string {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map((run) => run[0].length));
  const fence = "`".repeat(longest + 1);
  return `${fence}${language}\n${text}\n${fence}`;
}

export function actionOf(item: Item): string {
  const action = item.action;
  if (action?.type === "open_page") return `Opened ${action.url || "a page"}`;
  if (action?.type === "find_in_page") return `Looked for “${action.pattern ?? ""}” on ${action.url || "the page"}`;
  return action?.query ? `Searched for “${action.query}”` : "Searching";
}
