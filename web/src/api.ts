// Requests to the server that this page came from.
import type { StreamEvent } from "./types";

const KEY = "ossia.key";

export const savedKey = (): string => localStorage.getItem(KEY) ?? "";
export const saveKey = (key: string): void => (key ? localStorage.setItem(KEY, key) : localStorage.removeItem(KEY));

export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

async function request(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = {};
  const key = savedKey();
  if (key) headers["authorization"] = `Bearer ${key}`;
  let payload: BodyInit | undefined;
  if (body instanceof FormData) payload = body;
  else if (body !== undefined) {
    headers["content-type"] = "application/json";
    payload = JSON.stringify(body);
  }
  let answer: Response;
  try {
    answer = await fetch(path, { method, headers, body: payload, signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is `ossia serve` still running?", 0);
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new ApiError(told?.error?.message ?? `The server answered ${answer.status}.`, answer.status);
  }
  return answer;
}

export async function call<T>(method: string, path: string, body?: unknown): Promise<T> {
  return (await request(method, path, body)).json() as Promise<T>;
}

export async function blob(path: string): Promise<Blob> {
  return (await request("GET", path)).blob();
}

/** The events of a streamed response, to its end. */
export async function* stream(path: string, body: unknown, signal: AbortSignal): AsyncGenerator<StreamEvent> {
  const answer = await request("POST", path, body, signal);
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      const block = rest.slice(0, end);
      rest = rest.slice(end + 2);
      const data = block
        .split("\n")
        .filter((line) => line.startsWith("data: "))
        .map((line) => line.slice(6))
        .join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data) as StreamEvent;
    }
  }
}
