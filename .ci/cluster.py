"""Run by .ci/cluster: one recipe of README.md, twice, against a scripted server of 60 ms."""

import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

PROMPTS, BAD, LATENCY = 300, 7, 0.06
# The modules are in a folder that only the driver's sys.path has: workers get them shipped.
RUN = """
import os, runpy, sys
sys.path.insert(0, os.path.abspath("modules"))
runpy.run_path("recipe.py", run_name="__main__")
"""
posts, in_flight, most, lock = [], 0, 0, threading.Lock()


class Model(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        global in_flight, most
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][0]["content"]
        with lock:
            posts.append((text, self.headers["Authorization"]))
            in_flight += 1
            most = max(most, in_flight)
        time.sleep(LATENCY)
        with lock:
            in_flight -= 1
        if text == f"prompt {BAD}":
            self.reply(400, {"message": "a bad prompt"})
        else:
            message = {"role": "assistant", "content": f"answer to {text}"}
            self.reply(
                200, {"choices": [{"message": message, "finish_reason": "stop"}]}
            )

    def reply(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 200
    daemon_threads = True


def run(readme, engine):
    """Run the recipe of an engine once; the seconds it took and the rows there are."""
    blocks = re.findall(
        r"^```python cluster\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL
    )
    (recipe,) = (
        block
        for block in blocks
        if re.search(rf"^(import|from) {engine}\b", block, re.MULTILINE)
    )
    assert recipe.count("\n") <= 25, "a recipe has at most 25 lines"
    pathlib.Path("recipe.py").write_text(recipe)
    del posts[:]
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", RUN], check=True)
    texts = [path.read_text() for path in pathlib.Path("answers").glob("[!.]*.json*")]
    lines = "".join(texts).splitlines()
    return time.monotonic() - started, [json.loads(line) for line in lines]


def main(readme, engine):
    server = Server(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["LIGHTLLM_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
    os.environ["LIGHTLLM_API_KEY"] = "key-of-the-worker"
    with open("prompts.jsonl", "w") as file:
        rows = [{"id": n, "prompt": f"prompt {n}"} for n in range(PROMPTS)]
        file.writelines(json.dumps(row) + "\n" for row in rows)

    seconds, rows = run(readme, engine)
    print(f"{engine}: {len(posts)} POSTs, {most} in flight, {seconds:.1f} s")
    assert len(posts) == PROMPTS and len({text for text, _ in posts}) == PROMPTS
    assert {key for _, key in posts} == {"Bearer key-of-the-worker"}
    assert most >= 16, most
    assert sorted(row["id"] for row in rows) == list(range(PROMPTS))
    failed = [row for row in rows if row.get("error")]
    assert [row["id"] for row in failed] == [BAD], failed
    assert "a bad prompt" in failed[0]["error"], failed
    assert all(
        row["answer"] == f"answer to {row['prompt']}"
        for row in rows
        if row not in failed
    )

    seconds, rows = run(readme, engine)
    print(f"{engine}, again: {len(posts)} POSTs, {len(rows)} rows, {seconds:.1f} s")
    assert not posts and len(rows) == PROMPTS


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2])
