# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The lightllm_client authors
"""Recipes for lightllm_client, each a function. Run them all, or those you name:

    python example_lightllm_usage.py
    python example_lightllm_usage.py chat tools
    LIGHTLLM_BASE_URL=http://host:8000 LIGHTLLM_MODEL=qwen python example_lightllm_usage.py

Without LIGHTLLM_BASE_URL, a scripted server in this process takes the place of LightLLM.
"""

import base64
import concurrent.futures
import functools
import http.server
import io
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

try:
    import lightllm_client as lightllm
except ImportError:  # a copy, under the name that the usage guide gives it
    from inference import openai_middleware as lightllm

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
    """Calls in a stream: taken out of the text, each whole in one chunk."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[user("What is the weather in Paris?")],
        tools=[get_weather],
        tool_mode="prompt",  # reads the same on every LightLLM build
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
        path.write_bytes(draw_picture())
        parts = [
            {"type": "text", "text": "What is in this image?"},
            {"type": "image_url", "image_url": path.as_uri()},
        ]
        messages = [{"role": "user", "content": parts}]
        response = client.chat.completions.create(model=MODEL, messages=messages)
    print(response.choices[0].message.content)


def draw_picture():
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
    except lightllm.APITimeoutError as error:  # is an APIConnectionError as well
        print("too late:", error)
    except lightllm.APIConnectionError as error:
        print("no connection:", error)
    except lightllm.RateLimitError as error:
        print("busy:", error)
    except lightllm.APIStatusError as error:
        print(error.status_code, error)


def ask(client, item):
    """A row for {"id": ..., "prompt": ...}, with an answer, or with what went wrong."""
    answer = error = None
    try:
        if not item["prompt"]:
            raise ValueError("no prompt")
        response = client.chat.completions.create(
            model=MODEL, messages=[user(item["prompt"])]
        )
        choice = response.choices[0]
        answer = choice.message.content
        if choice.finish_reason == "length":
            error = "cut off: raise max_tokens"
    except (lightllm.OpenAIError, KeyError, TypeError, ValueError) as cause:
        error = str(cause)
    return {**item, "answer": answer, "error": error}


@functools.lru_cache
def worker_client(base_url):
    """The one client of a process of a cluster; the key is read there, not sent there."""
    return lightllm.LightLLMClient(base_url=base_url, max_retries=8, timeout=3600)


def answered(path):
    """The ids of the rows without an error in a JSON Lines file."""
    known = set()
    if os.path.exists(path):
        text = pathlib.Path(path).read_text(encoding="utf-8")
        for line in text.split("\n"):
            try:
                row = json.loads(line)
            except ValueError:  # an empty line, or one that a crash cut off
                continue
            known |= set() if row.get("error") else {row["id"]}
    return known


def print_progress(done, total, started):
    """Print `40% 20/50, 3.1/s, 10 s left` on stderr."""
    rate = done / max(time.monotonic() - started, 1e-9)
    left = (total - done) / rate
    text = f"{done / total:4.0%} {done}/{total}, {rate:.1f}/s, {left:.0f} s left"
    end = "\n" if done == total else ""
    print("\r" + text.ljust(50), end=end, file=sys.stderr, flush=True)


def ask_all(client, items, path, threads=32):
    """Append a row for each item to a JSON Lines file, but for those that have one."""
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
                print_progress(done, len(items), started)
    return len(items)


def many(client):
    """Many prompts at once, on one client; a second run asks what is missing."""
    # A busy node queues without a limit, a busy cluster answers 429 or 503: give it
    # time and retries, and if rows still have errors, fewer threads, and run again.
    patient = client.with_options(timeout=3600, max_retries=8)
    items = [{"id": n, "prompt": f"Is {n} a prime number?"} for n in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "answers.jsonl")
        print("asked", ask_all(patient, items, path))
        print("asked again", ask_all(patient, items, path))


RECIPES = (chat, stream, tools, stream_tools, image, errors, many)


# --- a scripted server, for where there is none ---


def scripted_text(request):
    """What the scripted model says to a request."""
    text = str(request["messages"])
    if "weather" in text and "degrees" not in text:
        call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
        return f"I will look it up.\n<tool_call>\n{call}\n</tool_call>"
    if "weather" in text:
        return "It is 20 degrees in Paris."
    if "Count" in text:
        return "One, two, three, four, five."
    return "I see a picture." if "image_url" in text else "Paris."


class ScriptedServer(http.server.BaseHTTPRequestHandler):
    """Answers chat requests as LightLLM does, plain and streamed."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each reply waits for 40 ms

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        say, end = scripted_text(request), {"finish_reason": "stop"}
        if request["temperature"] < 0:
            problem = {"message": "temperature must be non-negative", "code": 400}
            self.reply(400, "application/json", json.dumps({"error": problem}))
        elif request.get("stream"):
            pieces = [
                {"delta": {"content": say[n : n + 5]}} for n in range(0, len(say), 5)
            ]
            chunks = [{"choices": [piece]} for piece in [*pieces, {"delta": {}, **end}]]
            events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
            self.reply(200, "text/event-stream", "".join(events) + "data: [DONE]\n\n")
        else:
            choice = {"message": {"role": "assistant", "content": say}, **end}
            data = {"choices": [choice], "usage": {"total_tokens": 8}}
            self.reply(200, "application/json", json.dumps(data))

    def reply(self, status, kind, text):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


class PatientServer(http.server.ThreadingHTTPServer):
    request_queue_size = 100  # connections that may wait


def start_server():
    server = PatientServer(("127.0.0.1", 0), ScriptedServer)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def main(names):
    unknown = set(names) - {recipe.__name__ for recipe in RECIPES}
    if unknown:
        known = ", ".join(recipe.__name__ for recipe in RECIPES)
        return f"no recipe {', '.join(sorted(unknown))}; there are {known}"
    url, server = os.environ.get("LIGHTLLM_BASE_URL"), None
    if url:
        print(f"asking {url}")
    else:
        server = start_server()
        url = f"http://127.0.0.1:{server.server_port}"
        print("no LIGHTLLM_BASE_URL: a scripted server takes the place of LightLLM")
    with lightllm.LightLLMClient(base_url=url) as client:
        for recipe in RECIPES:
            if not names or recipe.__name__ in names:
                print(f"\n--- {recipe.__name__}: {recipe.__doc__}")
                recipe(client)
    if server:
        server.shutdown()
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
