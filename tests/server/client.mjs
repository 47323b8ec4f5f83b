// What programs for node do with OpenAI's package; read from standard input by node, told as one JSON object.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "many small experts" }];
const asked = { model, messages, temperature: 0, max_completion_tokens: 20 };
const schema = {
  type: "object",
  properties: { city: { type: "string", enum: ["Rome", "Oslo"] } },
  required: ["city"],
  additionalProperties: false,
};
const weather = { type: "function", function: { name: "weather", description: "now", parameters: schema } };
const tools = { tools: [weather], tool_choice: { type: "function", function: { name: "weather" } } };
const told = {};

async function refused(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    const { status, code, param, type, message } = error;
    return { name: error.constructor.name, status, code, param, type, message };
  }
}

told.models = [];
for await (const found of client.models.list()) told.models.push(found.id);

told.whole = await client.chat.completions.create(asked);
told.pieces = [];
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
})) {
  told.pieces.push(chunk);
}
told.gathered = await client.chat.completions.stream(asked).finalContent();

const long = { ...asked, max_completion_tokens: 300 };
told.calls = (await client.chat.completions.create({ ...long, ...tools })).choices[0];
told.streamedCalls = (await client.chat.completions.stream({ ...long, ...tools }).finalChatCompletion()).choices[0];
told.ran = [];
const run = client.chat.completions.runTools({
  ...long,
  tool_choice: tools.tool_choice,
  tools: [{ ...weather, function: { ...weather.function, parse: JSON.parse, function: ({ city }) => told.ran.push(city) } }],
});
await run.done();

const Sky = z.strictObject({ sky: z.enum(["clear", "grey"]), windy: z.boolean() });
const format = { ...long, response_format: zodResponseFormat(Sky, "sky") };
told.parsed = (await client.chat.completions.parse(format)).choices[0].message.parsed;

told.response = await client.responses.create({ model, input: "the sky", temperature: 0, max_output_tokens: 20 });
told.responseText = told.response.output_text;
told.events = [];
for await (const event of await client.responses.create({
  model,
  input: "the sky",
  temperature: 0,
  max_output_tokens: 20,
  stream: true,
})) {
  told.events.push(event);
}
told.completion = await client.completions.create({ model, prompt: "a", max_tokens: 4, echo: true, logprobs: 1 });

told.badField = await refused(client.chat.completions.create({ ...asked, temperature: 3 }));
told.badModel = await refused(client.chat.completions.create({ ...asked, model: "gpt" }));
told.badKey = await refused(new OpenAI({ baseURL, apiKey: "guess", maxRetries: 0 }).models.list());
told.badStream = await refused(client.chat.completions.create({ ...asked, stream: true, n: 0 }));

const endless = await client.chat.completions.create({ ...asked, max_completion_tokens: 1500, stream: true });
told.beforeAbort = 0;
for await (const _ of endless) {
  told.beforeAbort += 1;
  if (told.beforeAbort === 5) endless.controller.abort();
}
const controller = new AbortController();
setTimeout(() => controller.abort(), 150);
told.aborted = await refused(
  client.chat.completions.create({ ...asked, max_completion_tokens: 1500 }, { signal: controller.signal }),
);
console.log(JSON.stringify(told));
