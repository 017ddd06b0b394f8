// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the llmserve project
// Everyday operations of OpenAI's client for Node. Run by others.py.
const assert = require("node:assert/strict");
const OpenAI = require("openai");

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "tiny";
const messages = [{ role: "user", content: "Was it the first?" }];

async function refused(kind, fields, code, param) {
  for (const stream of [false, true]) {
    await assert.rejects(
      client.chat.completions.create({ model, messages, stream, ...fields }),
      (error) => {
        assert.ok(error instanceof kind, `${error}`);
        assert.equal(error.code, code);
        assert.equal(error.param, param);
        assert.equal(error.type, "invalid_request_error");
        assert.ok(error.requestID);
        return true;
      },
    );
  }
}

async function main() {
  const models = await client.models.list();
  assert.equal(models.data[0].id, model);
  assert.equal((await client.models.retrieve(model)).object, "model");

  const asked = { model, messages, max_tokens: 8, seed: 3 };
  const { data: whole, request_id } = await client.chat.completions.create(asked).withResponse();
  assert.ok(request_id);
  assert.ok(whole.usage.completion_tokens <= 8);

  let text = "";
  let usage = null;
  const options = { include_usage: true };
  const stream = await client.chat.completions.create({
    ...asked, stream: true, stream_options: options,
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.deepEqual(usage, whole.usage);

  const runner = client.chat.completions.stream(asked);
  assert.equal(await runner.finalContent(), text);

  const left = await client.chat.completions.create({ ...asked, max_tokens: 200, stream: true });
  for await (const chunk of left) {
    if (chunk.choices[0].delta.content) break; // aborts the request
  }

  const scored = await client.completions.create({
    model, prompt: "The quick brown fox", echo: true, max_tokens: 0, logprobs: 1,
  });
  assert.equal(scored.choices[0].text, "The quick brown fox");
  assert.equal(scored.choices[0].logprobs.tokens.length, scored.usage.prompt_tokens);
  const many = await client.completions.create({ model, prompt: ["a", "b"], n: 2, max_tokens: 2 });
  assert.deepEqual(many.choices.map((choice) => choice.index), [0, 1, 2, 3]);

  await refused(OpenAI.NotFoundError, { model: "gone" }, "model_not_found", "model");
  await refused(OpenAI.BadRequestError, { temperature: 3 }, "decimal_above_max_value", "temperature");
  await refused(OpenAI.BadRequestError, { max_tokens: "x" }, "invalid_type", "max_tokens");
  const long = [{ role: "user", content: "word ".repeat(999) }];
  await refused(OpenAI.BadRequestError, { messages: long }, "context_length_exceeded", "messages");
  console.log("all is well");
}

main();
