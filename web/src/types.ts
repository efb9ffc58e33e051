// What travels between the page and the server: the part of the Responses API that the page uses.

export type Effort = "low" | "medium" | "high";

export interface Served {
  version: string;
  model: string;
  adapters: string[];
  context: number;
  notice: string;
  tools: Record<string, string>;
  off: Record<string, string>;
}

export interface Conversation {
  id: string;
  created_at: number;
  metadata: Record<string, string>;
}

export interface Citation {
  type: "url_citation";
  start_index: number;
  end_index: number;
  url: string;
  title: string;
  lines?: [number, number] | null;
  quote?: string;
}

export interface FileCitation {
  type: "container_file_citation";
  start_index: number;
  end_index: number;
  container_id: string;
  file_id: string;
  filename: string;
}

export type Annotation = Citation | FileCitation;

export interface Logprob {
  token: string;
  logprob: number;
  top_logprobs: { token: string; logprob: number }[];
}

export interface Part {
  type: string;
  text?: string;
  refusal?: string;
  annotations?: Annotation[];
  logprobs?: Logprob[];
}

export interface Output {
  type: "logs" | "image";
  logs?: string;
  url?: string;
}

export interface Item {
  id: string;
  type: string;
  status?: string;
  role?: string;
  phase?: string | null;
  content?: Part[] | string;
  // Calls.
  name?: string;
  server_label?: string;
  arguments?: string;
  output?: unknown;
  error?: unknown;
  code?: string | null;
  container_id?: string;
  outputs?: Output[] | null;
  // Of a thought, once it has ended.
  usage?: { reasoning_tokens: number; seconds: number };
  action?: { type: string; query?: string; url?: string; pattern?: string; sources?: { url: string }[] };
  // Of the page alone: when it was seen to begin and end, in milliseconds.
  began?: number;
  ended?: number;
  num_deltas?: number;
  /** Shown here, and not kept by the server. */
  isUnfiled?: boolean;
}

export interface Usage {
  input_tokens: number;
  output_tokens: number;
  input_tokens_details: { cached_tokens: number };
  output_tokens_details: { reasoning_tokens: number };
}

export interface ResponseBody {
  id: string;
  status: string;
  error?: { message: string } | null;
  incomplete_details?: { reason: string } | null;
  usage?: Usage | null;
  output: Item[];
}

export interface StreamEvent {
  type: string;
  output_index?: number;
  content_index?: number;
  item?: Item;
  delta?: string;
  text?: string;
  code?: string;
  arguments?: string;
  annotation?: Annotation;
  part?: Part;
  response?: ResponseBody;
  message?: string;
}

export interface Token {
  id: number;
  text: string;
  is_special: boolean;
}
