// What the page knows, and what can be done: signals, and the actions that change them.
import { computed, signal } from "@preact/signals";
import { ApiError, call, savedKey, saveKey, stream } from "./api";
import { applied, textOf } from "./items";
import type { Conversation, Effort, Item, ResponseBody, Served, Token, Usage } from "./types";

export interface Settings {
  /** The adapter that is asked; "" for the model itself. */
  adapter: string;
  effort: Effort;
  python: boolean;
  browser: boolean;
  instructions: string;
  developer: boolean;
  theme: "auto" | "light" | "dark";
}

const SETTINGS = "ossia.settings";
const FIRST: Settings = { adapter: "", effort: "medium", python: true, browser: true, instructions: "", developer: false, theme: "auto" };
const INCLUDE = ["code_interpreter_call.outputs", "reasoning.usage", "web_search_call.action.sources"];

export const settings = signal<Settings>({ ...FIRST, ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") });
export const served = signal<Served | null>(null);
export const needsKey = signal(false);
export const fault = signal("");
export const conversations = signal<Conversation[]>([]);
export const hasMore = signal(false);
export const search = signal("");
export const current = signal<Conversation | null>(null);
export const items = signal<Item[]>([]);
/** Items of the answer under way, after `items`. */
export const answer = signal<Item[]>([]);
export const isBusy = signal(false);
export const lastUsage = signal<(Usage & { seconds: number; first: number }) | null>(null);
export const announcement = signal("");
export const files = signal<{ name: string; path: string }[]>([]);
const uploads = signal(0);
export const isUploading = computed(() => uploads.value > 0);
/** The name that requests give: an adapter's, if the server still has it, or the model's. */
export const model = computed(() => {
  const { adapter } = settings.value;
  return served.value?.adapters.includes(adapter) ? adapter : served.value?.model;
});
export const shown = computed(() => [...items.value, ...answer.value]);

let abort: AbortController | null = null;
/** Conversations that "More" adds. */
const PAGE = 30;
let requests = 0;
/** What the list was last searched for. */
let listed = "";
/** Counts what puts a conversation in view: whoever asked last has it. */
let visits = 0;
/** Ends when the server has the last turn and the page its ids; what follows in a conversation waits for it. */
let settling: Promise<void> = Promise.resolve();
/** The conversation that is being made of the new chat in view. */
let making: Promise<Conversation> | null = null;
/** Ends when the files that were given so far are there. */
let uploading: Promise<void> = Promise.resolve();

export function change(by: Partial<Settings>): void {
  settings.value = { ...settings.value, ...by };
  localStorage.setItem(SETTINGS, JSON.stringify(settings.value));
}

/** Run an action; what goes wrong is shown. */
export async function attempt<T>(action: () => Promise<T>): Promise<T | undefined> {
  try {
    fault.value = "";
    return await action();
  } catch (error) {
    tell(error);
    return undefined;
  }
}

function tell(error: unknown): void {
  if (error instanceof ApiError && error.status === 401) needsKey.value = true;
  else fault.value = error instanceof Error ? error.message : String(error);
}

export async function start(): Promise<void> {
  await attempt(async () => {
    // Somebody may ask before the server has told what it has; then that conversation stays in view.
    const visit = visits;
    const id = location.hash.slice(1);
    served.value = await call<Served>("GET", "/v1/served");
    needsKey.value = false;
    await list();
    if (id.startsWith("conv_") && visit === visits) await open(id);
  });
}

export async function useKey(key: string): Promise<void> {
  saveKey(key.trim());
  await start();
  if (needsKey.value) fault.value = savedKey() ? "The server does not know this key." : "";
}

export async function list(more = false): Promise<void> {
  const number = ++requests;
  const query = search.value;
  // What was shown stays shown: an answer moves its conversation to the top of all.
  const shown = query === listed ? conversations.value.length : 0;
  const wanted = Math.max(PAGE, more ? shown + PAGE : shown);
  const found: Conversation[] = [];
  let goesOn = true;
  while (goesOn && found.length < wanted) {
    const asked = new URLSearchParams({ limit: `${Math.min(100, wanted - found.length)}`, query });
    const last = found.at(-1);
    if (last) asked.set("after", last.id);
    const page = await call<{ data: Conversation[]; has_more: boolean }>("GET", `/v1/conversations?${asked}`);
    // Answers may overtake each other while somebody types.
    if (number !== requests) return;
    found.push(...page.data);
    goesOn = page.has_more;
  }
  listed = query;
  conversations.value = found;
  hasMore.value = goesOn;
}

export function fresh(): void {
  if (isBusy.value) return;
  visits++;
  making = null;
  current.value = null;
  items.value = [];
  answer.value = [];
  lastUsage.value = null;
  files.value = [];
  history.replaceState(null, "", location.pathname);
}

export async function open(id: string): Promise<void> {
  if (isBusy.value) return;
  const visit = ++visits;
  making = null;
  const found = await call<Conversation>("GET", `/v1/conversations/${id}`);
  const all: Item[] = [];
  for (let after = ""; ; ) {
    const query = new URLSearchParams({ order: "asc", limit: "100" });
    for (const one of INCLUDE) query.append("include[]", one);
    if (after) query.set("after", after);
    const page = await call<{ data: Item[]; has_more: boolean; last_id: string }>(
      "GET",
      `/v1/conversations/${id}/items?${query}`,
    );
    all.push(...page.data);
    if (!page.has_more) break;
    after = page.last_id;
  }
  if (visit !== visits) return;
  current.value = found;
  items.value = all;
  answer.value = [];
  lastUsage.value = null;
  files.value = [];
  history.replaceState(null, "", `#${id}`);
}

export async function rename(conversation: Conversation, title: string): Promise<void> {
  const metadata = { ...conversation.metadata, title: title.slice(0, 200) };
  replaced(await call<Conversation>("POST", `/v1/conversations/${conversation.id}`, { metadata }));
}

export async function remove(conversation: Conversation): Promise<void> {
  await settling;
  await call("DELETE", `/v1/conversations/${conversation.id}`);
  conversations.value = conversations.value.filter((one) => one.id !== conversation.id);
  if (current.value?.id === conversation.id) fresh();
}

/** A copy of the conversation up to an item, opened; of nothing, where there is no such item. */
export async function fork(itemId: string | null): Promise<void> {
  const from = current.value;
  if (!from || isBusy.value) return;
  if (itemId === null) return fresh();
  await settling;
  const metadata: Record<string, string> = { ...from.metadata, title: `${titleOf(from)} (copy)`.slice(0, 200) };
  const copy = await call<Conversation>("POST", `/v1/conversations/${from.id}/fork`, { item_id: itemId, metadata });
  await open(copy.id);
  await list();
}

export const titleOf = (conversation: Conversation): string => conversation.metadata["title"] || "Untitled";

function replaced(conversation: Conversation): void {
  conversations.value = conversations.value.map((one) => (one.id === conversation.id ? conversation : one));
  if (current.value?.id === conversation.id) current.value = conversation;
}

/** The conversation in view; of a new chat one is made, once. */
function ensureConversation(text: string): Promise<Conversation> {
  if (current.value) return Promise.resolve(current.value);
  if (making) return making;
  const made = make(text.trim().split("\n")[0]!.slice(0, 80) || "Files").finally(() => {
    if (making === made) making = null;
  });
  making = made;
  return made;
}

async function make(title: string): Promise<Conversation> {
  const visit = visits;
  const made = await call<Conversation>("POST", "/v1/conversations", { metadata: { title } });
  conversations.value = [made, ...conversations.value];
  // Another may be in view by now.
  if (visit !== visits) return made;
  current.value = made;
  history.replaceState(null, "", `#${made.id}`);
  return made;
}

/** Put files where the python tool finds them, of the conversation that is in view now, one after the other. */
export async function upload(given: File[]): Promise<void> {
  uploads.value++;
  const earlier = uploading;
  const conversation = ensureConversation("Files");
  const done = Promise.all([conversation, earlier]).then(([conversation]) => putFiles(conversation, given));
  uploading = done.catch(() => undefined);
  try {
    await done;
  } finally {
    uploads.value--;
  }
}

async function putFiles(conversation: Conversation, given: File[]): Promise<void> {
  for (const file of given) {
    const send = (container: string): Promise<{ path: string }> => {
      const form = new FormData();
      form.append("file", file, file.name);
      return call("POST", `/v1/containers/${container}/files`, form);
    };
    let container = conversation.metadata["container"] ?? "";
    let put: { path: string };
    try {
      if (!container) throw new ApiError("no container yet", 404);
      put = await send(container);
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) throw error;
      container = (await call<{ id: string }>("POST", "/v1/containers", { name: "chat" })).id;
      conversation.metadata = { ...conversation.metadata, container };
      replaced(await call("POST", `/v1/conversations/${conversation.id}`, { metadata: conversation.metadata }));
      put = await send(container);
    }
    if (current.value?.id === conversation.id) files.value = [...files.value, { name: file.name, path: put.path }];
  }
}

/** Where the files of a conversation are. They end with the server, and when nobody used them for a while. */
async function containerOf(conversation: Conversation | null): Promise<string | undefined> {
  const container = conversation?.metadata["container"];
  if (!conversation || !container) return undefined;
  try {
    await call("GET", `/v1/containers/${container}`);
    return container;
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 404)) throw error;
  }
  const { container: _, ...metadata } = conversation.metadata;
  replaced(await call("POST", `/v1/conversations/${conversation.id}`, { metadata }));
  fault.value = "The files of this conversation are gone, since they were not used for a while. Add them again.";
  return undefined;
}

/** The part of a request that the prompt depends on. */
async function asked(conversation: Conversation | null): Promise<Record<string, unknown>> {
  const { effort, python, browser, instructions } = settings.value;
  const tools: Record<string, unknown>[] = [];
  const has = served.value?.tools ?? {};
  if (python && "python" in has) {
    tools.push({ type: "code_interpreter", container: (await containerOf(conversation)) ?? { type: "auto" } });
  }
  if (browser && "browser" in has) tools.push({ type: "web_search" });
  return {
    model: model.value,
    conversation: conversation?.id,
    instructions: instructions || undefined,
    reasoning: { effort },
    tools,
  };
}

/** Ask; false where the question did not come into view, so that whoever wrote it keeps it. */
export async function send(text: string): Promise<boolean> {
  if (isBusy.value) return false;
  const names = files.value.map((file) => file.path);
  const input = names.length ? `${text}\n\nFiles: ${names.join(", ")}`.trim() : text;
  isBusy.value = true;
  visits++;
  abort = new AbortController();
  lastUsage.value = null;
  const began = performance.now();
  let first = 0;
  let response: ResponseBody | null = null;
  let underWay: Item[] = [];
  let isSaid = false;
  try {
    await settling;
    const conversation = await ensureConversation(text);
    const said: Item = { id: `local_${began}`, type: "message", role: "user", content: [{ type: "input_text", text: input }] };
    items.value = [...items.value, said];
    isSaid = true;
    files.value = [];
    const include = settings.value.developer ? [...INCLUDE, "message.output_text.logprobs"] : INCLUDE;
    const top = settings.value.developer ? { top_logprobs: 5 } : {};
    const body = { ...(await asked(conversation)), ...top, input, include, stream: true };
    // Faster than the eye, drawing would only take time from the model.
    let drawn = 0;
    try {
      for await (const event of stream("/v1/responses", body, abort.signal)) {
        const now = performance.now();
        if (event.response) response = event.response;
        if (event.type === "error") throw new Error(event.message ?? "The server met an error.");
        if (!first && event.type.endsWith(".delta")) first = now;
        underWay = applied(underWay, event, now);
        if (now - drawn > 40 || !event.type.endsWith(".delta")) [answer.value, drawn] = [underWay, now];
      }
    } finally {
      answer.value = underWay;
    }
    if (response?.status === "failed") throw new Error(response.error?.message ?? "The response failed.");
    if (response?.status === "incomplete") fault.value = `The answer is not complete: ${response.incomplete_details?.reason}.`;
    const end = performance.now();
    if (response?.usage) lastUsage.value = { ...response.usage, seconds: (end - began) / 1000, first: (first - began) / 1000 };
    items.value = [...items.value, ...answer.value];
    answer.value = [];
    announcement.value = "The answer is complete.";
    settling = settle(conversation).catch(tell);
  } catch (error) {
    if (isSaid) settling = interrupted(input, error).catch(tell);
    else tell(error);
  } finally {
    isBusy.value = false;
    abort = null;
  }
  return isSaid;
}

/** The question under the id that the server gave it, so that it can be forked from; what the page measured is kept. */
async function settle(conversation: Conversation): Promise<void> {
  const user = items.value.findLastIndex((item) => item.id.startsWith("local_"));
  const local = items.value[user]?.id;
  if (local) {
    const query = new URLSearchParams({ order: "desc", limit: String(Math.min(100, items.value.length - user)) });
    const page = await call<{ data: Item[] }>("GET", `/v1/conversations/${conversation.id}/items?${query}`);
    const filed = page.data.at(-1);
    // Another conversation may be in view by now, which has no item of this id.
    if (filed?.role === "user") items.value = items.value.map((item) => (item.id === local ? { ...item, id: filed.id } : item));
  }
  await list();
}

/** After a stop or a fault: what was said so far stays, here and on the server, so that the next turn knows it. */
async function interrupted(input: string, error: unknown): Promise<void> {
  const wasStopped = error instanceof DOMException && error.name === "AbortError";
  const said = answer.value.filter((item) => item.type === "message").map(textOf).join("\n");
  const done = answer.value.map((item) => (item.ended ? item : { ...item, ended: performance.now(), status: "incomplete" }));
  items.value = [...items.value, ...done.map((item) => ({ ...item, isUnfiled: true }))];
  answer.value = [];
  if (!wasStopped) tell(error);
  const conversation = current.value;
  if (!conversation || (!wasStopped && !said)) return;
  const kept: Record<string, unknown>[] = [{ type: "message", role: "user", content: input }];
  if (said) kept.push({ type: "message", role: "assistant", content: [{ type: "output_text", text: said }] });
  const filed = await call<{ data: Item[] }>("POST", `/v1/conversations/${conversation.id}/items`, { items: kept });
  announcement.value = "The answer was stopped.";
  // Under the ids that they have there now, if they are still in view.
  const named = (one: Item | undefined, isMeant: (item: Item) => boolean | undefined): void => {
    const at = items.value.findLastIndex(isMeant);
    if (one && at >= 0) items.value = items.value.with(at, { ...items.value[at]!, id: one.id, isUnfiled: false });
  };
  named(filed.data[0], (item) => item.id.startsWith("local_"));
  named(filed.data[1], (item) => item.isUnfiled && item.type === "message");
  await list();
}

/** The id of what stands before an item, as the server has it; null where it has nothing there. */
export function before(item: Item): string | null {
  const earlier = shown.value.slice(0, shown.value.indexOf(item));
  return earlier.findLast((one) => !one.isUnfiled && !one.id.startsWith("local_"))?.id ?? null;
}

export function stop(): void {
  abort?.abort();
}

/** The conversation as the model reads it, every thought included. */
export async function tokens(): Promise<Token[]> {
  const body = { ...(await asked(current.value)), reasoning: { effort: settings.value.effort, context: "all_turns" } };
  return (await call<{ data: Token[] }>("POST", "/v1/responses/tokens", body)).data;
}
