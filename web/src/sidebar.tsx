// The conversations of this server: search, open, rename, delete.
import { signal } from "@preact/signals";
import { useRef } from "preact/hooks";
import { Icon } from "./icon";
import * as state from "./state";
import type { Conversation } from "./types";

export const isNarrow = (): boolean => matchMedia("(max-width: 800px)").matches;
export const isSidebarOpen = signal(!isNarrow());
const renamed = signal("");
const doomed = signal("");

export function Sidebar() {
  const timer = useRef(0);
  if (!isSidebarOpen.value) return null;
  const found = (text: string) => {
    state.search.value = text;
    clearTimeout(timer.current);
    timer.current = window.setTimeout(() => void state.attempt(() => state.list()), 200);
  };
  return (
    <nav class="sidebar" aria-label="Conversations">
      <div class="brand">
        <img src="/web/icon.svg" alt="" width="24" height="24" /> ossia
        <button type="button" class="icon only-narrow" aria-label="Close" onClick={() => (isSidebarOpen.value = false)}>
          <Icon name="close" />
        </button>
      </div>
      <button type="button" class="new" disabled={state.isBusy.value} onClick={() => leave(state.fresh)}>
        New chat
      </button>
      <input id="search" type="search" placeholder="Search" aria-label="Search conversations" value={state.search.value} onInput={(e) => found(e.currentTarget.value)} />
      <ul>
        {state.conversations.value.map((one) => (
          <Row key={one.id} conversation={one} />
        ))}
      </ul>
      {!state.conversations.value.length && <p class="hint">{state.search.value ? "Nothing found." : "Nothing here yet."}</p>}
      {state.hasMore.value && (
        <button type="button" class="quiet" onClick={() => void state.attempt(() => state.list(true))}>
          More
        </button>
      )}
    </nav>
  );
}

function Row({ conversation }: { conversation: Conversation }) {
  const title = state.titleOf(conversation);
  if (renamed.value === conversation.id) {
    const done = (text: string) => {
      renamed.value = "";
      if (text.trim() && text !== title) void state.attempt(() => state.rename(conversation, text.trim()));
    };
    return (
      <li>
        <input
          aria-label="Title"
          value={title}
          ref={(field) => field?.focus()}
          onKeyDown={(e) => {
            if (e.key === "Enter") done(e.currentTarget.value);
            if (e.key === "Escape") renamed.value = "";
          }}
          onBlur={(e) => done(e.currentTarget.value)}
        />
      </li>
    );
  }
  if (doomed.value === conversation.id) {
    return (
      <li class="doomed">
        <span>Delete for good?</span>
        <button type="button" class="danger" ref={(button) => button?.focus()} onClick={() => void state.attempt(() => state.remove(conversation))}>
          Delete
        </button>
        <button type="button" class="quiet" onClick={() => (doomed.value = "")}>
          Keep
        </button>
      </li>
    );
  }
  const isCurrent = state.current.value?.id === conversation.id;
  return (
    <li class={isCurrent ? "current" : ""}>
      <button type="button" class="title" aria-current={isCurrent ? "page" : undefined} disabled={state.isBusy.value && !isCurrent} onClick={() => leave(() => void state.attempt(() => state.open(conversation.id)))}>
        {title}
      </button>
      <button type="button" class="icon" aria-label={`Rename ${title}`} onClick={() => (renamed.value = conversation.id)}>
        <Icon name="rename" />
      </button>
      <button type="button" class="icon" aria-label={`Delete ${title}`} disabled={state.isBusy.value && isCurrent} onClick={() => (doomed.value = conversation.id)}>
        <Icon name="delete" />
      </button>
    </li>
  );
}

function leave(action: () => void): void {
  if (isNarrow()) isSidebarOpen.value = false;
  action();
}
