// Where the next message is written: text, files, effort, tools.
import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { Icon } from "./icon";
import * as state from "./state";
import type { Effort } from "./types";

export const draft = signal("");
/** Whether files are held over the page. */
export const isOver = signal(false);
const EFFORTS: Effort[] = ["low", "medium", "high"];

export function Composer() {
  const field = useRef<HTMLTextAreaElement>(null);
  const picker = useRef<HTMLInputElement>(null);
  const tools = state.served.value?.tools ?? {};
  const { effort, python, browser } = state.settings.value;
  useEffect(() => {
    const area = field.current!;
    area.style.height = "auto";
    area.style.height = `${Math.min(area.scrollHeight, 240)}px`;
  }, [draft.value]);
  const send = () => {
    const text = draft.value.trim();
    if ((!text && !state.files.value.length) || state.isBusy.value || state.isUploading.value) return;
    draft.value = "";
    void state.send(text).then((isSaid) => {
      if (!isSaid && !draft.value) draft.value = text;
    });
  };
  return (
    <form
      class={isOver.value ? "composer over" : "composer"}
      onSubmit={(e) => {
        e.preventDefault();
        send();
      }}
    >
      {(state.files.value.length > 0 || state.isUploading.value) && (
        <p class="files" aria-label="Files">
          {state.files.value.map((file) => (
            <span class="file">{file.name}</span>
          ))}
          {state.isUploading.value && "uploading …"}
        </p>
      )}
      <textarea
        id="compose"
        ref={field}
        rows={1}
        aria-label="Message"
        placeholder={state.served.value ? `Ask ${state.model.value}` : "Connecting …"}
        value={draft.value}
        onInput={(e) => (draft.value = e.currentTarget.value)}
        onKeyDown={(e) => {
          // Safari tells of the Enter that ends a composition by its old number alone.
          if (e.key !== "Enter" || e.shiftKey || e.isComposing || e.keyCode === 229) return;
          e.preventDefault();
          send();
        }}
      />
      <div class="controls">
        <fieldset class="effort">
          <legend class="unseen">Reasoning effort</legend>
          {EFFORTS.map((one) => (
            <label class={one === effort ? "chosen" : ""}>
              <input type="radio" name="effort" checked={one === effort} onChange={() => state.change({ effort: one })} />
              {one}
            </label>
          ))}
        </fieldset>
        {"python" in tools && (
          <button type="button" class="toggle" aria-pressed={python} onClick={() => state.change({ python: !python })}>
            python
          </button>
        )}
        {"browser" in tools && (
          <button type="button" class="toggle" aria-pressed={browser} onClick={() => state.change({ browser: !browser })}>
            browser
          </button>
        )}
        {"python" in tools && (
          <>
            <button type="button" class="icon" aria-label="Add files" onClick={() => picker.current?.click()}>
              <Icon name="attach" />
            </button>
            <input ref={picker} type="file" multiple hidden onChange={(e) => upload(e.currentTarget.files)} />
          </>
        )}
        <span class="space" />
        {state.isBusy.value ? (
          <button type="button" class="send" onClick={() => state.stop()}>
            Stop
          </button>
        ) : (
          <button type="submit" class="send" disabled={!draft.value.trim() && !state.files.value.length}>
            Send
          </button>
        )}
      </div>
    </form>
  );
}

const takesFiles = (): boolean => "python" in (state.served.value?.tools ?? {});

function upload(given: FileList | null | undefined): void {
  if (given?.length && takesFiles()) void state.attempt(() => state.upload([...given]));
}

/** Files over the page, or let go there. Where none are taken, the browser must still not leave the page to show them. */
export function dragged(event: DragEvent): void {
  const data = event.dataTransfer;
  if (!data?.types.includes("Files")) return;
  event.preventDefault();
  isOver.value = event.type === "dragover" && takesFiles();
  if (event.type === "drop") upload(data.files);
  else data.dropEffect = takesFiles() ? "copy" : "none";
}
