"""Install a built wheel into an empty environment and run the README's commands from it.

    python tools/wheel_walk.py dist/wispprof-0.3.0-py3-none-any.whl out/wheel

The environment gets the versions of ``requirements.lock``. Commands come from the README's section "Your
laptop and your server", with the bundled pair in place of ``TARGET`` and ``DRAFT`` and with quick grids. The
walk ends with a chat request to the edge. It fails at the first command that fails, and for a wheel of more
than :data:`LIMIT_MB`.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_MB = 40
SERVER, EDGE = "127.0.0.1:8259", "127.0.0.1:8359"
START_S = 180.0
QUICK = {
    "profile-server": ["--grid", "quick"],
    "profile-edge": ["--grid", "quick"],
    "trace": ["--count", "6"],
}


def readme_commands() -> list[list[str]]:
    """Argument lists of the README's walk, without ``wispprof``, in its order."""
    section = (ROOT / "README.md").read_text().split("## Your laptop and your server")[1].split("\n## ")[0]
    lines = re.findall(r"^wispprof (.*)$", section, re.MULTILINE)
    return [on_bundled_pair(shlex.split(line, comments=True)) for line in lines]


def on_bundled_pair(words: list[str]) -> list[str]:
    """``words`` with the bundled models, a port of this walk and a quick grid."""
    text = shlex.join(words)
    for option in ("--model TARGET", "--target TARGET", "--draft DRAFT"):
        text = text.replace(f" {option}", "")
    made = shlex.split(text.replace("SERVER:8200", SERVER))
    if made[0] == "serve":
        made += ["--port", SERVER.rpartition(":")[2]]
    if made[0] == "edge":
        made += ["--port", EDGE.rpartition(":")[2]]
    return [*made, *QUICK.get(made[0], [])]


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel; returns its ``wispprof``."""
    venv.create(folder / "venv", with_pip=True, clear=True)
    binaries = folder / "venv" / "bin"
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "requirements.lock", wheel], check=True)
    return binaries / "wispprof"


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None:
                raise SystemExit(
                    f"{shlex.join(map(str, process.args))} ended with {process.returncode}"
                ) from None
            time.sleep(0.5)
    raise SystemExit(f"{url} did not answer within {START_S:g} s")


def chat() -> str:
    body = {"messages": [{"role": "user", "content": "Once upon a time"}], "max_tokens": 24}
    request = urllib.request.Request(
        f"http://{EDGE}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def walk(wheel: Path, folder: Path) -> None:
    size_mb = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {size_mb:.1f} MB (limit {LIMIT_MB})", flush=True)
    if size_mb > LIMIT_MB:
        raise SystemExit("The wheel is too large.")
    program = install(wheel, folder)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for words in [["--version"], ["doctor"], *readme_commands()]:
            print(f"$ wispprof {shlex.join(words)}", flush=True)
            command = [program, *words]
            if words[0] not in ("serve", "edge"):
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
                continue
            running.append(subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL))
            address, path = (SERVER, "/ready") if words[0] == "serve" else (EDGE, "/v1/models")
            wait_until_ready(f"http://{address}{path}", running[-1])
        text = chat()
        print(f"chat: {text!r}")
        if not text:
            raise SystemExit("The edge answered without text.")
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    walk(Path(sys.argv[1]).resolve(), target.resolve())
