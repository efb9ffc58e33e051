// The page: conversations at the side, one conversation, what is written next.
import { useEffect } from "preact/hooks";
import { Composer, dragged, isOver } from "./composer";
import { Dialogs, dialog } from "./dialogs";
import { Icon } from "./icon";
import { Messages } from "./messages";
import { Sidebar, isNarrow, isSidebarOpen } from "./sidebar";
import * as state from "./state";

export function App() {
  useEffect(() => {
    void state.start();
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
    <div
      class={isSidebarOpen.value ? "page with-sidebar" : "page"}
      onDragOver={dragged}
      onDragLeave={() => (isOver.value = false)}
      onDrop={dragged}
    >
      <a class="skip" href="#compose">
        Skip to the message field
      </a>
      <Sidebar />
      <main>
        <header>
          <button type="button" class="icon" aria-label="Conversations" aria-expanded={isSidebarOpen.value} onClick={() => (isSidebarOpen.value = !isSidebarOpen.value)}>
            <Icon name="menu" />
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
            <Icon name="settings" />
          </button>
        </header>
        <Messages />
        {state.fault.value && (
          <p class="fault" role="alert">
            {state.fault.value}
            <button type="button" class="icon" aria-label="Dismiss" onClick={() => (state.fault.value = "")}>
              <Icon name="close" />
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
  if (event.key === "Escape" && !dialog.value) {
    // On a narrow screen the conversations lie over everything.
    if (isNarrow() && isSidebarOpen.value) isSidebarOpen.value = false;
    else if (state.isBusy.value) state.stop();
  } else if (isCommand && event.key.toLowerCase() === "k") {
    event.preventDefault();
    isSidebarOpen.value = true;
    requestAnimationFrame(() => document.getElementById("search")?.focus());
  } else if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    state.fresh();
    document.getElementById("compose")?.focus();
  }
}
