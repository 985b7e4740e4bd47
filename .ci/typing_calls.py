# A user's program as type checkers see it: an error must stand at each line that says
# "wrong", and at no other. Run by .ci/run with mypy and pyright, never executed.

from __future__ import annotations

import json
from typing import Any, Literal

from lightllm_client import (
    NOT_GIVEN,
    APIError,
    AsyncOpenAI,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    Client,
    Completion,
    LightLLMClient,
    OpenAI,
    Stream,
    run_tool,
)

client = LightLLMClient("key", "http://localhost:8000", 5.0, max_retries=1)
patient: OpenAI = client.with_options(timeout=None, max_retries=5)
question: list[Any] = [{"role": "user", "content": "hi"}]
create = client.chat.completions.create


def search(query: str, limit: int = 3) -> str:
    return query * limit


def run_agent(client: Client, question: list[Any]) -> str | None:
    for _ in range(5):
        response = client.chat.completions.create(
            model="m",
            messages=question,
            tools=[search],
            temperature=0.2,
            seed=NOT_GIVEN,
        )
        message: ChatCompletionMessage = response.choices[0].message
        question.append(message)
        if response.choices[0].finish_reason != "tool_calls":
            return message.content
        for call in message.tool_calls or []:
            arguments: dict[str, Any] = json.loads(call.function.arguments)
            print(call.id, call.type, call.function.name, arguments)
            told = {"role": "tool", "tool_call_id": call.id}
            question.append({**told, "content": run_tool(call, [search])})
    return None


plain: ChatCompletion = create(model="m", messages=question, temperature=0.1, top_k=5)
also: ChatCompletion = create(model="m", messages=question, stream=False, seed=1)
stream: Stream[ChatCompletionChunk] = create(model="m", messages=question, stream=True)
either: bool = bool(question)
create(model="m", messages=question, stream=either).close()  # wrong
both: Completion | Stream[Completion] = client.completions.create(
    model="m", prompt="x", stream=either
)
raw = client.chat.completions.with_raw_response.create(model="m", messages=question)
parsed: ChatCompletion = raw.parse()
print(raw.status_code, raw.headers.get("x-request-id"))
thought: str | None = plain.choices[0].message.reasoning
also_thought: str | None = plain.choices[0].message.reasoning_content
used: int = plain.usage.total_tokens if plain.usage else 0
cached = plain.usage.prompt_tokens_details.cached_tokens if plain.usage else 0
ended: bool = plain.choices[0].finish_reason == "length"
print(plain.choices[0].logprobs.content[0].token)
for chunk in stream:
    piece: str | None = chunk.choices[0].delta.content
    thinking: str | None = chunk.choices[0].delta.reasoning
    for part in chunk.choices[0].delta.tool_calls or []:
        first: str | None = part.function.name if part.function else None
whole: ChatCompletion = stream.get_final_completion()
text: Completion = client.completions.create(model="m", prompt="x", max_tokens=5)
lengths: list[int] = [model.max_model_len for model in client.models.list()]
dumped: dict[str, Any] = plain.model_dump(exclude_none=True)
try:
    run_agent(patient, question)
except APIError as error:
    print(error.message, error.code, error.request)
    partial: ChatCompletion | Completion | None = error.partial
    print(error.partial.choices)  # wrong

create(model="m", messages=question, temprature=0.1)  # wrong
create(model="m")  # wrong
number: int = plain.choices[0].message.content  # wrong
other: ChatCompletion = create(model="m", messages=question, stream=True)  # wrong
LightLLMClient(time_out=5)  # wrong
client.completions.create(model="m", prompt="x", messages=question)  # wrong
print(plain.choices[0].mesage)  # wrong
print(plain.choices[0].message.contents)  # wrong
print(plain.usage.total)  # wrong
print(stream.text)  # wrong
reason: Literal["stop", "stopped"] = plain.choices[0].finish_reason  # wrong
create(model="m", messages=question, temperature="hot")  # wrong
client.chat.completion.create(model="m", messages=question)  # wrong
print(AsyncOpenAI().chat)  # wrong
completion: Completion = stream.get_final_completion()  # wrong
length: int = plain.choices[0].message.reasoning  # wrong
