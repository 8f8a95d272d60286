"""What rag.py and chat.py need of an OpenAI-compatible server; standard library only."""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass


@dataclass
class Answer:
    text: str
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float

    def __str__(self) -> str:
        cached = f"{self.cached_tokens} of {self.prompt_tokens} tokens from cache"
        return f"first token after {self.first_token_s:.3f} s, {cached}"


class Client:
    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with urllib.request.urlopen(f"{self._url}/v1/models", timeout=30) as reply:
            self._model = json.load(reply)["data"][0]["id"]

    def complete(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy and streamed, so that the first token can be timed."""
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        started, first, text, usage = time.perf_counter(), 0.0, "", {}
        with urllib.request.urlopen(request, timeout=600) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len("data: ") :])
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    first = first or time.perf_counter() - started
                    text += choice["text"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Answer(text, usage["prompt_tokens"], cached, first)
