// Talks to a server with OpenAI's own client for JavaScript. In a folder with `npm install openai`:
//
//     duck serve MODEL --port 8080 [--api-key KEY]
//     node .../openai.mjs http://127.0.0.1:8080/v1 [KEY]

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.cwd(), "here.js"));
const { OpenAI } = require("openai");

const [baseURL, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: key ?? "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Who are you?" }];
const chat = (more) => client.chat.completions.create({ model, messages, max_tokens: 32, seed: 1, ...more });
const text = (more) => client.completions.create({ model, prompt: "One day", max_tokens: 32, seed: 1, ...more });

async function fails(status, code, call) {
  await assert.rejects(call, (error) => {
    assert.deepEqual([error.status, error.code], [status, code]);
    return true;
  });
}

const checks = {
  async answers() {
    const { choices, usage } = await chat();
    assert.ok(["stop", "length"].includes(choices[0].finish_reason));
    assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
  },
  async "a stream is the whole"() {
    const whole = await chat({ n: 2 });
    const texts = ["", ""];
    let usage;
    for await (const part of await chat({ n: 2, stream: true, stream_options: { include_usage: true } })) {
      usage = part.usage ?? usage;
      for (const { index, delta } of part.choices) texts[index] += delta.content ?? "";
    }
    assert.deepEqual(texts, whole.choices.map((choice) => choice.message.content));
    assert.deepEqual(usage, whole.usage);
  },
  async "the helper for streams"() {
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 32, seed: 1 });
    // The client makes null of an empty text.
    assert.equal((await stream.finalContent()) ?? "", (await chat()).choices[0].message.content);
  },
  async "a seed repeats"() {
    const [one, two] = await Promise.all([text({ seed: 9 }), text({ seed: 9 })]);
    assert.equal(one.choices[0].text, two.choices[0].text);
  },
  async "stop strings"() {
    const whole = (await text({ temperature: 0, max_tokens: 64 })).choices[0].text;
    const stop = whole.slice(5, 8);
    const cut = await text({ temperature: 0, max_tokens: 64, stop });
    assert.equal(cut.choices[0].text, whole.slice(0, whole.indexOf(stop)));
  },
  async logprobs() {
    const { choices, usage } = await chat({ logprobs: true, top_logprobs: 3 });
    assert.equal(choices[0].logprobs.content.length, usage.completion_tokens);
    assert.ok(choices[0].logprobs.content.every(({ top_logprobs }) => top_logprobs.length === 3));
  },
  async "thirty questions in a row"() {
    const said = [];
    const questions = readFileSync(new URL("questions.txt", import.meta.url), "utf8").trim().split("\n");
    for (const content of questions) {
      said.push({ role: "user", content });
      const stream = client.chat.completions.stream({ model, messages: said, seed: said.length, truncation: "auto" });
      const { choices: [{ finish_reason, message }] } = await stream.finalChatCompletion();
      assert.equal(finish_reason, "stop", `${content} ${message.content}`);
      said.push({ role: "assistant", content: message.content });
    }
    assert.equal(said.length, 60);
  },
  async "leaving early"() {
    const stream = await chat({ stream: true, max_tokens: 1000 });
    for await (const _ of stream) break;
    assert.ok(stream.controller.signal.aborted);
  },
  async errors() {
    await fails(404, "model_not_found", () => chat({ model: "goose" }));
    await fails(400, "invalid_value", () => chat({ temperature: -1 }));
    await fails(400, "unsupported_parameter", () => chat({ tools: [{ type: "function", function: { name: "f" } }] }));
    await fails(400, "unknown_parameter", () => chat({ quack: 1 }));
    await fails(400, "context_length_exceeded", () => text({ prompt: "duck pond ".repeat(20000) }));
    await fails(413, "body_too_large", () => text({ prompt: "x".repeat(2 << 20) }));
    if (key) {
      const other = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
      await fails(401, "invalid_api_key", () => other.models.list());
    }
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log("ok", name);
}
console.log(`${Object.keys(checks).length} passed, 0 failed`);
