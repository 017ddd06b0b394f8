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

const schema = {
  type: "object",
  properties: { city: { enum: ["Paris", "Rome"] }, days: { enum: [1, 2] } },
  required: ["city", "days"],
  additionalProperties: false,
};

function isWeather(text) {
  const value = JSON.parse(text);
  assert.ok(["Paris", "Rome"].includes(value.city) && [1, 2].includes(value.days), text);
}

async function calls() {
  const tool = { type: "function", function: { name: "weather", parameters: schema, strict: true } };
  const asked = {
    model, messages, seed: 1, tools: [tool], tool_choice: "required", parallel_tool_calls: false,
  };
  const whole = (await client.chat.completions.create(asked)).choices[0];
  assert.equal(whole.finish_reason, "tool_calls");
  assert.equal(whole.message.content, null);
  const [call] = whole.message.tool_calls;
  isWeather(call.function.arguments);
  const final = await client.chat.completions.stream(asked).finalChatCompletion();
  const [streamed] = final.choices[0].message.tool_calls;
  assert.equal(streamed.function.arguments, call.function.arguments);
  assert.equal(streamed.function.name, "weather");
  const replay = [...messages, whole.message];
  replay.push({ role: "tool", tool_call_id: call.id, content: "sunny" });
  const answer = await client.chat.completions.create({ model, messages: replay, max_tokens: 4 });
  assert.ok(answer.usage.completion_tokens <= 4);
}

async function shapes() {
  const json_schema = { name: "weather", strict: true, schema };
  const response_format = { type: "json_schema", json_schema };
  const parsed = await client.chat.completions.parse({ model, messages, response_format, seed: 1 });
  isWeather(parsed.choices[0].message.content);
  const stream = client.chat.completions.stream({ model, messages, response_format, seed: 1 });
  assert.equal(await stream.finalContent(), parsed.choices[0].message.content);
}

async function thoughts() {
  const other = new OpenAI({ baseURL: process.argv[3], apiKey: "none", maxRetries: 0 });
  const asked = {
    model, seed: 5, max_tokens: 30, thinking_token_budget: 6,
    messages: [...messages, { role: "assistant", content: "<think>" }],
    add_generation_prompt: false, continue_final_message: true,
  };
  const whole = await other.chat.completions.create(asked);
  const { message } = whole.choices[0];
  assert.ok(message.content && message.reasoning);
  assert.ok(whole.usage.completion_tokens_details.reasoning_tokens <= 6 + 8);
  let [reasoning, content] = ["", ""];
  for await (const chunk of await other.chat.completions.create({ ...asked, stream: true })) {
    reasoning += chunk.choices[0].delta.reasoning ?? "";
    content += chunk.choices[0].delta.content ?? "";
  }
  assert.deepEqual([reasoning, content], [message.reasoning, message.content]);
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
  await calls();
  await shapes();
  await thoughts();
  console.log("all is well");
}

main();
