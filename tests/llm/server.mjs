// A small language model behind the part of OpenAI's protocol that data preparation speaks:
// POST /v1/chat/completions (messages, response_format json_schema, max_tokens, temperature, seed) and GET /v1/models.
//
//   node server.mjs MODEL.gguf [PORT]
//
// Listens on 127.0.0.1 only. Standard output is one JSON object a line: {"event": "listening", "url": ...}, then
// "asked" and "answered" for each request, which name its last message by SHA-256 alone. Requests are answered one at
// a time, in the order in which they came. The server ends when its standard input does, so it outlives nobody.

import {createHash, randomUUID} from "node:crypto";
import {createServer} from "node:http";
import {basename} from "node:path";
import {getLlama, LlamaChat, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, port = "0"] = process.argv.slice(2);
const CONTEXT_TOKENS = 4096;
const MAX_BODY_BYTES = 1 << 20;

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
// one thread: more of them wait for each other spinning, a hundred times slower as soon as the machine is busy
const context = await model.createContext({contextSize: CONTEXT_TOKENS, sequences: 1, threads: 1});
// one sequence for all requests: the system prompt, which they share, stays evaluated
const chat = new LlamaChat({contextSequence: context.getSequence()});
const modelName = basename(modelPath, ".gguf");
const grammars = new Map();
let queue = Promise.resolve();

class RequestError extends Error {
    constructor(status, message) {
        super(message);
        this.status = status;
    }
}

const log = (entry) => console.log(JSON.stringify(entry));

async function readJson(request) {
    const chunks = [];
    let numBytes = 0;
    for await (const chunk of request) {
        numBytes += chunk.length;
        if (numBytes > MAX_BODY_BYTES) throw new RequestError(413, `more than ${MAX_BODY_BYTES} bytes`);
        chunks.push(chunk);
    }
    try {
        return JSON.parse(Buffer.concat(chunks).toString("utf8"));
    } catch {
        throw new RequestError(400, "the body is not JSON");
    }
}

function toHistory(messages) {
    const history = messages.map(({role, content}) => {
        if (typeof content !== "string") throw new RequestError(400, "only text messages are supported");
        if (role === "assistant") return {type: "model", response: [content]};
        if (role === "system" || role === "user") return {type: role, text: content};
        throw new RequestError(400, `unknown role ${JSON.stringify(role)}`);
    });
    return [...history, {type: "model", response: []}];
}

async function grammarOf(format) {
    if (format?.type !== "json_schema") return undefined;
    const key = JSON.stringify(format.json_schema.schema);
    if (!grammars.has(key)) grammars.set(key, await llama.createGrammarForJsonSchema(format.json_schema.schema));
    return grammars.get(key);
}

async function complete(body, signal) {
    if (!Array.isArray(body.messages) || body.messages.length === 0) throw new RequestError(400, "no messages");
    if (body.model !== modelName) throw new RequestError(404, `no such model; this server has ${modelName}`);
    const history = toHistory(body.messages);
    const {contextText} = chat.chatWrapper.generateContextState({chatHistory: history});
    const numPrompt = contextText.tokenize(model.tokenizer).length;
    const maxTokens = body.max_completion_tokens ?? body.max_tokens ?? CONTEXT_TOKENS - numPrompt;
    if (numPrompt + maxTokens > CONTEXT_TOKENS || maxTokens < 1)
        throw new RequestError(400, `${numPrompt} prompt tokens and max_tokens ${maxTokens} exceed ${CONTEXT_TOKENS}`);
    const meter = chat.sequence.tokenMeter.getState();
    const {response, metadata} = await chat.generateResponse(history, {
        grammar: await grammarOf(body.response_format),
        maxTokens,
        temperature: body.temperature ?? 0, // unlike OpenAI's 1: the same question gets the same answer
        seed: body.seed ?? 0,
        signal
    });
    const numOutput = chat.sequence.tokenMeter.diff(meter).usedOutputTokens;
    return {
        id: `chatcmpl-${randomUUID()}`,
        object: "chat.completion",
        created: Math.floor(Date.now() / 1000),
        model: modelName,
        choices: [{
            index: 0,
            message: {role: "assistant", content: response, refusal: null},
            finish_reason: metadata.stopReason === "maxTokens" ? "length" : "stop",
            logprobs: null
        }],
        usage: {prompt_tokens: numPrompt, completion_tokens: numOutput, total_tokens: numPrompt + numOutput}
    };
}

async function reply(request, response) {
    if (request.method === "GET" && request.url === "/v1/models")
        return {object: "list", data: [{id: modelName, object: "model", created: 0, owned_by: "local"}]};
    if (request.method !== "POST" || request.url !== "/v1/chat/completions") throw new RequestError(404, "no such path");
    const body = await readJson(request);
    const sha256 = createHash("sha256").update(String(body.messages?.at(-1)?.content)).digest("hex");
    log({event: "asked", sha256});
    const gone = new AbortController(); // a client that was killed is not answered
    response.on("close", () => gone.abort(new RequestError(499, "the client is gone")));
    const turn = queue.then(() => {
        gone.signal.throwIfAborted();
        return complete(body, gone.signal);
    });
    queue = turn.catch(() => {});
    const completion = await turn;
    log({event: "answered", sha256, usage: completion.usage});
    return completion;
}

const server = createServer(async (request, response) => {
    let status = 200, payload;
    try {
        payload = await reply(request, response);
    } catch (error) {
        status = error.status ?? 500;
        payload = {error: {message: error.message, type: "error", code: null, param: null}};
    }
    if (!response.destroyed) response.writeHead(status, {"Content-Type": "application/json"}).end(JSON.stringify(payload));
});
process.stdin.on("end", () => process.exit(0)).resume();
server.listen(Number(port), "127.0.0.1", () => {
    log({event: "listening", url: `http://127.0.0.1:${server.address().port}/v1`, model: modelName});
});
