"""`transformers serve` in a process of its own, and an OpenAI client that asks it."""

import base64
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai

MEDIA_TYPES = {".png": "image/png", ".mp4": "video/mp4"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def part_of(path: Path) -> dict:
    """The part of a message that holds an image or a video, as a data URL."""
    media_type = MEDIA_TYPES[path.suffix]
    kind = media_type.partition("/")[0]
    text = base64.b64encode(path.read_bytes()).decode()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{media_type};base64,{text}"}}


class Server:
    """
    Runs from the beginning to the end of a `with`.

    Args:
        log: the file for what it prints.
    """

    def __init__(self, log: Path):
        self.log, self.port = log, free_port()
        # A second try, since uvicorn closes the connection of a request that failed.
        address = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=address, api_key="none", timeout=300, max_retries=1)

    def __enter__(self):
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--trust-remote-code"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        with open(self.log, "w") as file:
            variables = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables)
        while not self._listens():
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.log.read_text()[-3000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def ask(self, folder, content: list, new_tokens: int, stream=False, **options) -> tuple:
        """
        Asks the variant in a folder about the parts of a message.

        Args:
            stream: in pieces.
            options: `chat_template_kwargs` of the request.

        Returns:
            the answer, and how many tokens the prompt had, which a streamed answer does not tell: `None`.
        """
        reply = self.client.chat.completions.create(
            model=str(folder),
            messages=[{"role": "user", "content": content}],
            max_tokens=new_tokens,
            temperature=0,
            stream=stream,
            extra_body={"chat_template_kwargs": options},
        )
        if not stream:
            return reply.choices[0].message.content.strip(), reply.usage.prompt_tokens
        return "".join(part.choices[0].delta.content or "" for part in reply if part.choices).strip(), None
