# Right and wrong calls as type checkers see them: an error must stand at each line that
# says "wrong", and at no other. Run by .ci/run with mypy and pyright, never executed.

from lightllm_client import ChatCompletion, ChatCompletionChunk, LightLLMClient, Stream

client = LightLLMClient("key", "http://localhost:8000", 5.0, max_retries=1)
question = [{"role": "user", "content": "hi"}]
create = client.chat.completions.create

plain: ChatCompletion = create(model="m", messages=question, temperature=0.1, top_k=5)
also: ChatCompletion = create(model="m", messages=question, stream=False, seed=1)
stream: Stream[ChatCompletionChunk] = create(model="m", messages=question, stream=True)
text: str | None = plain.choices[0].message.content
for chunk in stream:
    piece: str | None = chunk.choices[0].delta.content
for call in plain.choices[0].message.tool_calls or []:
    name: str = call.function.name

create(model="m", messages=question, temprature=0.1)  # wrong
create(model="m")  # wrong
number: int = plain.choices[0].message.content  # wrong
other: ChatCompletion = create(model="m", messages=question, stream=True)  # wrong
LightLLMClient(time_out=5)  # wrong
client.completions.create(model="m", prompt="x", messages=question)  # wrong
