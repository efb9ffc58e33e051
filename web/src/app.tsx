// The page: conversations at the side, one conversation, what is written next.
import { signal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { Composer } from "./composer";
import { Dialogs, dialog } from "./dialogs";
import { Messages } from "./messages";
import { Sidebar, isSidebarOpen } from "./sidebar";
import * as state from "./state";

export const isNarrow = signal(matchMedia("(max-width: 800px)").matches);

export function App() {
  useEffect(() => {
    void state.start();
    const narrow = matchMedia("(max-width: 800px)");
    narrow.addEventListener("change", () => (isNarrow.value = narrow.matches));
    addEventListener("keydown", shortcut);
    return () => removeEventListener("keydown", shortcut);
  }, []);
  const theme = state.settings.value.theme;
  useEffect(() => {
    if (theme === "auto") delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = theme;
  }, [theme]);
  const title = state.current.value ? state.titleOf(state.current.value) : "New chat";
  useEffect(() => {
    document.title = `${title} · ossia`;
  }, [title]);
  return (
    <div class={isSidebarOpen.value ? "page with-sidebar" : "page"}>
      <a class="skip" href="#compose">
        Skip to the message field
      </a>
      <Sidebar />
      <main>
        <header>
          <button type="button" class="icon" aria-label="Conversations" aria-expanded={isSidebarOpen.value} onClick={() => (isSidebarOpen.value = !isSidebarOpen.value)}>
            ☰
          </button>
          <h1>{title}</h1>
          <ModelName />
          {state.settings.value.developer && state.current.value && (
            <button type="button" class="quiet" onClick={() => (dialog.value = "tokens")}>
              Tokens
            </button>
          )}
          {state.current.value && (
            <button type="button" class="quiet" onClick={() => (dialog.value = "export")}>
              Export
            </button>
          )}
          <button type="button" class="icon" aria-label="Settings" onClick={() => (dialog.value = "settings")}>
            ⚙
          </button>
        </header>
        <Messages />
        {state.fault.value && (
          <p class="fault" role="alert">
            {state.fault.value}
            <button type="button" class="icon" aria-label="Dismiss" onClick={() => (state.fault.value = "")}>
              ✕
            </button>
          </p>
        )}
        <Composer />
        <div class="unseen" aria-live="polite">
          {state.announcement.value}
        </div>
      </main>
      <Dialogs />
    </div>
  );
}

/** The model, or a choice where the server has adapters. */
function ModelName() {
  const served = state.served.value;
  if (!served?.adapters.length) return <span class="model">{served?.model ?? ""}</span>;
  return (
    <select class="model" aria-label="Model" value={state.model.value} onChange={(e) => state.change({ adapter: e.currentTarget.value })}>
      {[served.model, ...served.adapters].map((name) => (
        <option value={name}>{name}</option>
      ))}
    </select>
  );
}

function shortcut(event: KeyboardEvent): void {
  const isCommand = event.ctrlKey || event.metaKey;
  if (event.key === "Escape" && state.isBusy.value && !dialog.value) state.stop();
  else if (isCommand && event.key.toLowerCase() === "k") {
    event.preventDefault();
    isSidebarOpen.value = true;
    requestAnimationFrame(() => document.getElementById("search")?.focus());
  } else if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    state.fresh();
    document.getElementById("compose")?.focus();
  }
}
