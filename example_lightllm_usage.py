# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The lightllm_client authors
"""Recipes for lightllm_client, each a function: run them all, or those you name.

    python example_lightllm_usage.py
    python example_lightllm_usage.py chat tools
    LIGHTLLM_BASE_URL=http://host:8000 LIGHTLLM_MODEL=qwen python example_lightllm_usage.py

Without LIGHTLLM_BASE_URL a scripted server in this process plays the model.
"""

import base64
import concurrent.futures
import io
import json
import os
import pathlib
import sys
import tempfile
import time

import lightllm_client as lightllm

MODEL = os.environ.get("LIGHTLLM_MODEL", "default")


def user(text):
    return {"role": "user", "content": text}


def chat(client):
    """A question and its answer."""
    response = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            user("What is the capital of France?"),
        ],
    )
    print(response.choices[0].message.content)
    print(response.usage.total_tokens, "tokens")


def stream(client):
    """The answer as it is written."""
    question = [user("Count to five.")]
    create = client.chat.completions.create
    for chunk in create(model=MODEL, messages=question, stream=True):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def get_weather(city: str, unit: str = "celsius") -> dict:
    """The weather of a city, now.

    city: its English name
    unit: celsius or fahrenheit
    """
    return {"city": city, "degrees": 20, "unit": unit}


def tools(client):
    """The model asks for a function, gets its result, and answers."""
    messages = [user("What is the weather in Paris?")]
    for _ in range(5):
        response = client.chat.completions.create(
            model=MODEL, messages=messages, tools=[get_weather]
        )
        message = response.choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            result = lightllm.run_tool(call, [get_weather])
            print(call.function.name, call.function.arguments, "->", result)
            answer = {"role": "tool", "tool_call_id": call.id, "content": result}
            messages.append(answer)
        if not message.tool_calls:
            return print(message.content)


def stream_tools(client):
    """Calls in a stream: taken out of the text, and whole when they come."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[user("What is the weather in Paris?")],
        tools=[get_weather],
        tool_mode="prompt",  # loses nothing on any LightLLM build
        stream=True,
    )
    for chunk in answer:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="")
    for call in answer.get_final_completion().choices[0].message.tool_calls or []:
        print("wants", call.function.name, call.function.arguments)


def image(client):
    """A question about a picture."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "picture.png")
        path.write_bytes(a_picture())
        parts = [
            {"type": "text", "text": "What is in this image?"},
            {"type": "image_url", "image_url": path.as_uri()},
        ]
        messages = [{"role": "user", "content": parts}]
        response = client.chat.completions.create(model=MODEL, messages=messages)
    print(response.choices[0].message.content)


def a_picture():
    """A PNG: drawn with Pillow where that is installed, else two by two pixels."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        text = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAEElEQVR4nGP4z8AARAwQCgAf7gP"
        return base64.b64decode(text + "9i18U1AAAAABJRU5ErkJggg==")
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, 56, 56), fill="red")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def errors(client):
    """What can go wrong, the narrow classes first."""
    try:
        client.chat.completions.create(
            model=MODEL, messages=[user("hi")], temperature=-1, timeout=60
        )
    except lightllm.APITimeoutError as error:
        print("too late:", error)
    except lightllm.APIConnectionError as error:
        print("no connection:", error)
    except lightllm.RateLimitError as error:
        print("busy:", error)
    except lightllm.APIStatusError as error:
        print(error.status_code, error)


def ask(client, item):
    """One item {"id": ..., "prompt": ...} with its answer, or with its error."""
    try:
        response = client.chat.completions.create(
            model=MODEL, messages=[user(item["prompt"])]
        )
        return {**item, "answer": response.choices[0].message.content}
    except lightllm.APIError as error:
        return {**item, "error": str(error)}


def answered(path):
    """The ids of the rows of a JSON Lines file that have an answer."""
    known = set()
    if os.path.exists(path):
        text = pathlib.Path(path).read_text(encoding="utf-8")
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except ValueError:  # an empty line, or one that a crash cut off
                continue
            known |= {row["id"]} if "answer" in row else set()
    return known


def progress(done, total, started):
    """`40% 20/50, 3.1/s, 10 s left` on stderr."""
    rate = done / max(time.monotonic() - started, 1e-9)
    left = (total - done) / rate
    text = f"{done / total:4.0%} {done}/{total}, {rate:.1f}/s, {left:.0f} s left"
    end = "\n" if done == total else ""
    print("\r" + text.ljust(50), end=end, file=sys.stderr, flush=True)


def ask_all(client, items, path, threads=32):
    """Answer many items into a JSON Lines file; run again, it asks what is missing."""
    known = answered(path)
    items = [item for item in items if item["id"] not in known]
    started = time.monotonic()
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n")  # the last run may have ended in the middle of a line
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            rows = [pool.submit(ask, client, item) for item in items]
            finished = concurrent.futures.as_completed(rows)
            for done, row in enumerate(finished, 1):
                file.write(json.dumps(row.result(), ensure_ascii=False) + "\n")
                progress(done, len(items), started)
    return len(items)


def many(client):
    """Many prompts at once, on one client; a second run resumes."""
    items = [{"id": n, "prompt": f"Is {n} a prime number?"} for n in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "answers.jsonl")
        print("asked", ask_all(client, items, path))
        print("asked again", ask_all(client, items, path))


RECIPES = (chat, stream, tools, stream_tools, image, errors, many)


# --- the model that is played where there is no server ---


def played_answer(request):
    """What the scripted server says to a request."""
    import test_lightllm as scripted

    asked = request.json
    text = str(asked["messages"])
    if asked["temperature"] < 0:
        body = {"message": "temperature must be non-negative", "code": 400}
        return scripted.plain({"error": body}, 400)
    if "weather" in text and "degrees" not in text:
        call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
        say = f"I will look it up.\n<tool_call>\n{call}\n</tool_call>"
    elif "weather" in text:
        say = "It is 20 degrees in Paris."
    elif "Count" in text:
        say = "One, two, three, four, five."
    else:
        say = "I see a picture." if "image_url" in text else "Paris."
    if not asked.get("stream"):
        return scripted.answer(say)
    deltas = [scripted.delta(say[at : at + 5]) for at in range(0, len(say), 5)]
    return scripted.events(*deltas, scripted.STOP, scripted.DONE)


def main(names):
    unknown = set(names) - {recipe.__name__ for recipe in RECIPES}
    if unknown:
        known = ", ".join(recipe.__name__ for recipe in RECIPES)
        return f"no recipe {', '.join(sorted(unknown))}; there are {known}"
    server, url = None, os.environ.get("LIGHTLLM_BASE_URL")
    if url:
        print(f"asking {url}")
    else:
        import test_lightllm as scripted

        print("no LIGHTLLM_BASE_URL: a scripted server in this process plays the model")
        server = scripted.Server()
        server.answers(played_answer)
        url = server.url
    with lightllm.LightLLMClient(base_url=url) as client:
        for recipe in RECIPES:
            if not names or recipe.__name__ in names:
                print(f"\n--- {recipe.__name__}: {recipe.__doc__}")
                recipe(client)
    if server:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
