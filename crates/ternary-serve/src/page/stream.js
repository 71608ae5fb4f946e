// Streaming completions of the server.

/** Yields the JSON of each server-sent event. */
async function* serverSentEvents(body) {
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
 * Streams a chat completion of `body.messages`, or else a text completion of `body.prompt`. Yields `{ dropped }`, the number of
 * messages that the server dropped from the prompt; `{ text }`, the next piece of text; `{ finish }`, the finish reason; and
 * `{ tokens }`, the number of generated tokens.
 *
 * Throws an error with the server's message, `status` and `code`.
 */
export async function* streamCompletion(body, headers, signal) {
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
  for await (const event of serverSentEvents(response.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.usage) yield { tokens: event.usage.completion_tokens };
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) yield { text };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
  }
}
