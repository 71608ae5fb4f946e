// Answers of the server, as they come.

/** The JSON of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/**
 * Asks for an answer, a chat's for `messages`, else the continuation of `prompt`. Yields `{ dropped }`, the messages that
 * the server left out; `{ text }`, a piece; `{ finish }`; `{ tokens }`, how many there were.
 *
 * Throws errors with the server's message, and its `status` and `code`.
 */
export async function* ask(body, headers, signal) {
  const path = body.messages ? "/v1/chat/completions" : "/v1/completions";
  const response = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers },
    body: JSON.stringify({ ...body, truncation: "auto", stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) {
    const error = (await response.json().catch(() => ({}))).error ?? {};
    const { status } = response;
    throw Object.assign(new Error(error.message ?? `status ${status}`), { status, code: error.code });
  }
  yield { dropped: Number(response.headers.get("x-dropped-messages") ?? 0) };
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) yield { tokens: event.usage.completion_tokens };
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) yield { text };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
  }
}
