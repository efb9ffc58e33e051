// One conversation: what was said, thought and called.
import { signal } from "@preact/signals";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { blob } from "./api";
import { draft } from "./composer";
import { cited } from "./dialogs";
import { Icon } from "./icon";
import { actionOf, partsOf, seconds, textOf } from "./items";
import { highlighted, toHtml } from "./markdown";
import * as state from "./state";
import type { FileCitation, Item, Part } from "./types";

const copied = signal("");

export function Messages() {
  const box = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  const all = state.shown.value;
  const isBusy = state.isBusy.value;
  useEffect(() => {
    // Whoever asks wants to see the answer.
    if (isBusy) follows.current = true;
  }, [isBusy]);
  useEffect(() => {
    if (follows.current) box.current!.scrollTop = box.current!.scrollHeight;
  }, [all]);
  return (
    <div
      class="messages"
      ref={box}
      tabIndex={0}
      role="log"
      aria-label="Conversation"
      aria-live="off"
      onScroll={(e) => {
        const { scrollTop, scrollHeight, clientHeight } = e.currentTarget;
        follows.current = scrollHeight - scrollTop - clientHeight < 60;
      }}
    >
      {!all.length && <Welcome />}
      {all.map((item, i) => (
        <Shown key={item.id} item={item} isLast={i === all.length - 1} />
      ))}
      {state.isBusy.value && !state.answer.value.length && <p class="waiting">reading …</p>}
      <Numbers />
    </div>
  );
}

function Welcome() {
  const served = state.served.value;
  // Those that can be switched on here.
  const tools = ["python", "browser"].filter((name) => name in (served?.tools ?? {}));
  const off = Object.entries(served?.off ?? {});
  return (
    <section class="welcome">
      <img src="/web/icon.svg" alt="" width="56" height="56" />
      <h2>What shall we do?</h2>
      {served && (
        <p>
          {served.model} runs on this machine, with {served.context.toLocaleString("en")} tokens of context
          {tools.length ? ` and the tools ${tools.join(", ")}` : ""}.
        </p>
      )}
      {served?.notice && <p class="hint">{served.notice}</p>}
      {off.map(([name, reason]) => (
        <p class="hint">
          {name} is off: {reason}
        </p>
      ))}
    </section>
  );
}

function Shown({ item, isLast }: { item: Item; isLast: boolean }) {
  switch (item.type) {
    case "message":
      return item.role === "user" ? <Asked item={item} /> : <Answered item={item} isLast={isLast} />;
    case "reasoning":
      return <Reasoning item={item} />;
    case "code_interpreter_call":
      return <Code item={item} />;
    case "web_search_call":
      return <Search item={item} />;
    case "function_call":
    case "mcp_call":
      return <Call item={item} />;
    default:
      return null;
  }
}

function Asked({ item }: { item: Item }) {
  const text = textOf(item);
  const edit = () =>
    void state.attempt(async () => {
      await state.fork(state.before(item));
      draft.value = text;
      document.getElementById("compose")?.focus();
    });
  return (
    <article class="asked" aria-label="You">
      <div class="bubble">{text}</div>
      <div class="actions">
        <CopyButton text={text} id={item.id} />
        <button type="button" class="quiet" disabled={state.isBusy.value || item.id.startsWith("local_")} onClick={edit}>
          Edit
        </button>
      </div>
    </article>
  );
}

function Answered({ item, isLast }: { item: Item; isLast: boolean }) {
  const isUnderWay = state.isBusy.value && isLast && !item.ended;
  const isPreamble = item.phase === "commentary";
  return (
    <article class={isPreamble ? "answered preamble" : "answered"} aria-label="Answer" aria-busy={isUnderWay}>
      {partsOf(item).map((part) => (part.type === "refusal" ? <p class="hint">{part.refusal}</p> : <Prose part={part} />))}
      {!isUnderWay && (
        <div class="actions">
          <CopyButton text={textOf(item)} id={item.id} />
          {!isPreamble && (
            <button type="button" class="quiet" disabled={state.isBusy.value || item.status === "incomplete"} onClick={() => void state.attempt(() => state.fork(item.id))}>
              Fork
            </button>
          )}
          {item.status === "incomplete" && <span class="hint">stopped</span>}
        </div>
      )}
    </article>
  );
}

function Prose({ part }: { part: Part }) {
  const html = useMemo(() => toHtml(part.text ?? "", part.annotations), [part]);
  const files = (part.annotations ?? []).filter((one): one is FileCitation => one.type === "container_file_citation");
  const unique = [...new Map(files.map((one) => [one.file_id, one])).values()];
  return (
    <>
      <div
        class="prose"
        onClick={(e) => {
          const number = (e.target as HTMLElement).closest<HTMLElement>("[data-cite]")?.dataset["cite"];
          const one = number === undefined ? undefined : part.annotations?.[Number(number)];
          if (one?.type === "url_citation") cited.value = one;
        }}
        dangerouslySetInnerHTML={{ __html: html }}
      />
      {unique.map((one) => (
        <FileLink file={one} />
      ))}
    </>
  );
}

function FileLink({ file }: { file: FileCitation }) {
  const [picture, setPicture] = useState("");
  const isPicture = /\.(png|jpe?g|gif|webp)$/i.test(file.filename);
  const path = `/v1/containers/${file.container_id}/files/${file.file_id}/content`;
  useEffect(() => {
    if (!isPicture) return;
    let url = "";
    void state.attempt(async () => setPicture((url = URL.createObjectURL(await blob(path)))));
    return () => URL.revokeObjectURL(url);
  }, [path]);
  const save = () =>
    state.attempt(async () => {
      const url = URL.createObjectURL(await blob(path));
      const link = document.createElement("a");
      link.href = url;
      link.download = file.filename;
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    });
  return (
    <figure>
      {picture && <img src={picture} alt={file.filename} />}
      <button type="button" class="file" onClick={() => void save()}>
        <Icon name="download" /> {file.filename}
      </button>
    </figure>
  );
}

function useClock(isRunning: boolean): number {
  const [now, setNow] = useState(performance.now());
  useEffect(() => {
    if (!isRunning) return;
    const timer = setInterval(() => setNow(performance.now()), 100);
    return () => clearInterval(timer);
  }, [isRunning]);
  return isRunning ? now : performance.now();
}

function Reasoning({ item }: { item: Item }) {
  const isUnderWay = !item.ended && item.began !== undefined;
  const clock = useClock(isUnderWay);
  // The server counts; until it has, and where a thought was stopped, what was seen here stands for it.
  const spent = item.usage?.seconds ?? seconds(item, clock);
  const counted = item.usage?.reasoning_tokens;
  const text = textOf(item);
  const told = [
    isUnderWay ? "Thinking" : "Thoughts",
    spent !== null ? `${spent.toFixed(1)} s` : "",
    counted ? `${counted.toLocaleString("en")} tokens` : item.num_deltas ? `about ${item.num_deltas} tokens` : "",
  ].filter(Boolean);
  return (
    <details class="reasoning">
      <summary>
        <span class={isUnderWay ? "pulse" : ""}>{told.join(" · ")}</span>
      </summary>
      <div class="thoughts">{text}</div>
    </details>
  );
}

function Code({ item }: { item: Item }) {
  const outputs = item.outputs ?? [];
  const isUnderWay = item.began !== undefined && !item.ended;
  const code = item.code ?? "";
  return (
    <details class="call" open={outputs.some((output) => output.type === "image") || undefined}>
      <summary>
        <span class={isUnderWay ? "pulse" : ""}>{isUnderWay ? "Running python" : "Ran python"}</span>
        <code class="glimpse">{code.split("\n").find((line) => line.trim()) ?? ""}</code>
      </summary>
      <pre tabIndex={0} aria-label="Code">
        <code dangerouslySetInnerHTML={{ __html: highlighted(code, "python") }} />
      </pre>
      {outputs.map((output) =>
        output.type === "image" && output.url?.startsWith("data:image/") ? (
          <img class="figure" src={output.url} alt="Output of the code" />
        ) : (
          <pre class="logs" tabIndex={0} aria-label="Output">
            {output.logs}
          </pre>
        ),
      )}
    </details>
  );
}

function Search({ item }: { item: Item }) {
  const sources = [...new Set((item.action?.sources ?? []).map((one) => one.url))];
  const isUnderWay = item.began !== undefined && !item.ended;
  const told = <span class={isUnderWay ? "pulse" : ""}>{actionOf(item)}</span>;
  if (!sources.length) return <p class="call plain">{told}</p>;
  return (
    <details class="call">
      <summary>{told}</summary>
      <ul>
        {sources.map((url) => (
          <li>
            <Url url={url} />
          </li>
        ))}
      </ul>
    </details>
  );
}

export function Url({ url }: { url: string }) {
  if (!/^https?:/i.test(url)) return <span>{url}</span>;
  return (
    <a href={url} target="_blank" rel="noopener noreferrer nofollow">
      {url}
    </a>
  );
}

function Call({ item }: { item: Item }) {
  const name = item.server_label ? `${item.server_label}.${item.name}` : item.name;
  const result = item.output ?? item.error;
  return (
    <details class="call">
      <summary>Called {name}</summary>
      <pre tabIndex={0} aria-label="Arguments">{item.arguments}</pre>
      {result != null && (
        <pre class="logs" tabIndex={0} aria-label="Result">
          {typeof result === "string" ? result : JSON.stringify(result, null, 1)}
        </pre>
      )}
    </details>
  );
}

function CopyButton({ text, id }: { text: string; id: string }) {
  const copy = async () => {
    await toClipboard(text);
    copied.value = id;
    setTimeout(() => copied.value === id && (copied.value = ""), 1500);
  };
  return (
    <button type="button" class="quiet" onClick={() => void state.attempt(copy)}>
      {copied.value === id ? "Copied" : "Copy"}
    </button>
  );
}

/** Copy a text, also where the page came by plain HTTP from another machine: browsers have no clipboard API there. */
async function toClipboard(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const before = document.activeElement as HTMLElement | null;
  const field = document.createElement("textarea");
  field.className = "unseen";
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  before?.focus();
  if (!isCopied) throw new Error("The browser did not let the text be copied.");
}

function Numbers() {
  const usage = state.lastUsage.value;
  if (!usage) return null;
  const speed = usage.output_tokens / Math.max(usage.seconds - usage.first, 0.001);
  const context = usage.input_tokens + usage.output_tokens;
  return (
    <p class="numbers">
      {usage.output_tokens} tokens, {usage.output_tokens_details.reasoning_tokens} of them thought · {speed.toFixed(1)} tokens/s ·
      first after {usage.first.toFixed(2)} s · {context.toLocaleString("en")} of {state.served.value?.context.toLocaleString("en")} in
      context, {usage.input_tokens_details.cached_tokens.toLocaleString("en")} from the cache
    </p>
  );
}
