// What opens over the page: settings, the key, export, a cited source, exact tokens.
import { signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { savedKey } from "./api";
import { Icon } from "./icon";
import { markdownOf, partsOf } from "./items";
import { Url } from "./messages";
import * as state from "./state";
import type { Citation, Logprob, Token } from "./types";

export const dialog = signal<"" | "settings" | "export" | "tokens">("");
export const cited = signal<Citation | null>(null);

export function Dialogs() {
  if (state.needsKey.value) return <KeyDialog />;
  if (cited.value) return <Source citation={cited.value} />;
  if (dialog.value === "settings") return <SettingsDialog />;
  if (dialog.value === "export") return <ExportDialog />;
  if (dialog.value === "tokens") return <TokensDialog />;
  return null;
}

function Dialog({ title, wide, onClose, children }: { title: string; wide?: boolean; onClose: () => void; children: ComponentChildren }) {
  const box = useRef<HTMLDialogElement>(null);
  // Before it is painted: Esc must close what is seen.
  useLayoutEffect(() => {
    const before = document.activeElement as HTMLElement | null;
    box.current!.showModal();
    return () => before?.focus();
  }, []);
  return (
    <dialog ref={box} class={wide ? "wide" : ""} aria-labelledby="dialog-title" onClose={onClose} onClick={(e) => e.target === box.current && onClose()}>
      <header>
        <h2 id="dialog-title">{title}</h2>
        <button type="button" class="icon" aria-label="Close" onClick={onClose}>
          <Icon name="close" />
        </button>
      </header>
      {children}
    </dialog>
  );
}

function KeyDialog() {
  const [key, setKey] = useState(savedKey());
  return (
    <Dialog title="This server asks for a key" onClose={() => (state.needsKey.value = false)}>
      <form
        onSubmit={(e) => {
          e.preventDefault();
          void state.useKey(key);
        }}
      >
        <label>
          API key
          <input type="password" autocomplete="current-password" value={key} onInput={(e) => setKey(e.currentTarget.value)} />
        </label>
        <p class="hint">It stays in this browser.</p>
        <button type="submit" class="send">
          Use it
        </button>
      </form>
    </Dialog>
  );
}

function SettingsDialog() {
  const { theme, developer, instructions } = state.settings.value;
  const [key, setKey] = useState(savedKey());
  return (
    <Dialog title="Settings" onClose={() => (dialog.value = "")}>
      <label>
        Instructions to the model
        <textarea rows={4} value={instructions} onInput={(e) => state.change({ instructions: e.currentTarget.value })} />
      </label>
      <label>
        Colours
        <select value={theme} onChange={(e) => state.change({ theme: e.currentTarget.value as typeof theme })}>
          <option value="auto">as the system</option>
          <option value="light">light</option>
          <option value="dark">dark</option>
        </select>
      </label>
      <label class="check">
        <input type="checkbox" checked={developer} onChange={(e) => state.change({ developer: e.currentTarget.checked })} />
        Show tokens and probabilities (for developers)
      </label>
      <form
        onSubmit={(e) => {
          e.preventDefault();
          void state.useKey(key);
        }}
      >
        <label>
          API key
          <input type="password" autocomplete="current-password" value={key} onInput={(e) => setKey(e.currentTarget.value)} />
        </label>
        <button type="submit">Save the key</button>
      </form>
      <p class="hint">
        ossia {state.served.value?.version} · Enter sends, Shift+Enter breaks the line, Esc stops, Ctrl+K searches, Ctrl+Shift+O begins anew ·{" "}
        <a href="/web/LICENSES.txt">licences</a> · <a href="/docs">API</a>
      </p>
    </Dialog>
  );
}

function ExportDialog() {
  const conversation = state.current.value!;
  const title = state.titleOf(conversation);
  const save = (text: string, kind: string, ending: string) => {
    const url = URL.createObjectURL(new Blob([text], { type: kind }));
    const link = document.createElement("a");
    link.href = url;
    link.download = `${title.replace(/[^\p{L}\p{N} _-]/gu, "").trim() || "conversation"}.${ending}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    dialog.value = "";
  };
  return (
    <Dialog title="Export" onClose={() => (dialog.value = "")}>
      <p>
        <button type="button" onClick={() => save(markdownOf(title, state.items.value), "text/markdown", "md")}>
          Markdown, for people
        </button>{" "}
        <button type="button" onClick={() => save(JSON.stringify({ conversation, items: state.items.value }, null, 1), "application/json", "json")}>
          JSON, for programs
        </button>
      </p>
    </Dialog>
  );
}

function Source({ citation }: { citation: Citation }) {
  const lines = citation.lines;
  return (
    <Dialog title={citation.title || citation.url} onClose={() => (cited.value = null)}>
      <p>
        <Url url={citation.url} />
        {lines && <span class="hint"> {lines[0] === lines[1] ? `line ${lines[0]}` : `lines ${lines[0]} to ${lines[1]}`}</span>}
      </p>
      {citation.quote ? <blockquote>{citation.quote}</blockquote> : <p class="hint">The page as a whole was cited.</p>}
    </Dialog>
  );
}

interface Colored extends Token {
  kind: string;
  logprob?: Logprob;
  /** Of an answer's tokens: whether probabilities were kept of it. */
  isKept?: boolean;
}

/** Each token with the part of the format that it stands in, and its probability where that was kept. */
function colored(tokens: Token[]): Colored[] {
  const out: Colored[] = [];
  const kept = state.items.value.flatMap((item) =>
    item.type === "message" && item.role === "assistant" ? [partsOf(item).flatMap((part) => part.logprobs ?? [])] : [],
  );
  let header = "";
  let isHeader = false;
  let kind = "frame";
  // Of an answer alone.
  let told: Logprob[] | null = null;
  let at = 0;
  for (const token of tokens) {
    if (token.text === "<|start|>" && token.is_special) {
      [header, isHeader] = ["", true];
      out.push({ ...token, kind: "frame" });
    } else if (token.text === "<|message|>" && token.is_special) {
      isHeader = false;
      const isAssistant = header.startsWith("assistant");
      const channel = /<\|channel\|>(\w+)/.exec(header)?.[1] ?? "";
      const isCall = isAssistant && /to=/.test(header);
      kind = isAssistant ? (isCall ? "call" : channel || "final") : (/^(system|developer|user)/.exec(header)?.[0] ?? "tool");
      if (kind === "final" || (kind === "commentary" && isAssistant)) [told, at] = [kept.shift() ?? [], 0];
      else told = null;
      out.push({ ...token, kind: "frame" });
    } else if (isHeader || token.is_special) {
      header += token.text;
      out.push({ ...token, kind: "frame" });
    } else {
      const one = told?.[at];
      out.push({ ...token, kind, isKept: told ? told.length > 0 : undefined, logprob: one?.token === token.text ? one : undefined });
      at += 1;
    }
  }
  return out;
}

function hover(token: Colored): string {
  const told = [`id ${token.id}`, token.kind];
  if (token.logprob) {
    told.push(`probability ${(100 * Math.exp(token.logprob.logprob)).toFixed(1)} %`);
    for (const one of token.logprob.top_logprobs) told.push(`  ${JSON.stringify(one.token)} ${(100 * Math.exp(one.logprob)).toFixed(1)} %`);
  } else told.push(token.isKept === undefined ? "not of an answer, so without a probability" : "its probability was not kept");
  return told.join("\n");
}

function TokensDialog() {
  const [tokens, setTokens] = useState<Token[] | null>(null);
  useEffect(() => void state.attempt(async () => setTokens(await state.tokens())), []);
  const all = tokens ? colored(tokens) : [];
  const kinds = [...new Set(all.map((token) => token.kind))];
  const isKept = new Set(all.map((token) => token.isKept));
  return (
    <Dialog title="As the model reads it" wide onClose={() => (dialog.value = "")}>
      <p class="legend">
        {tokens ? `${tokens.length.toLocaleString("en")} tokens` : "loading …"}{" "}
        {kinds.map((kind) => (
          <span class={`token ${kind}`}>{kind}</span>
        ))}
      </p>
      {isKept.has(false) && (
        <p class="hint">
          {isKept.has(true) ? "Some answers" : "The answers"} here have no probabilities. They are kept of an answer that was made to its end
          while “Show tokens and probabilities” was on in the settings.
        </p>
      )}
      <pre class="tokens" tabIndex={0}>
        {all.map((token) => (
          <span class={`token ${token.kind}`} title={hover(token)}>
            {token.text.replace(/\n/g, "¶\n")}
          </span>
        ))}
      </pre>
    </Dialog>
  );
}
