"""An OpenAI-compatible chat endpoint: retries, a rate limit, answers kept on disk, the key from the environment."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmhooks.data.cache import cache_dir
from mmhooks.errors import MMHooksError
from mmhooks.utils.files import written_aside

_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class EndpointError(MMHooksError):
    """An endpoint that refused, or that gave no usable answer after all tries."""


@dataclass
class Endpoint:
    """One model behind ``POST {base_url}/chat/completions``.

    Args:
        model, base_url: DeepSeek's chat model by default.
        key_variable: environment variable that holds the key; never written anywhere.
        tries: per question; timeouts, broken connections, 408, 409, 425, 429, 5xx and answers that are not what they
            should be are tried again, after 1, 2, 4, ... seconds or what ``Retry-After`` says.
        per_minute: at most so many requests a minute.
        cache: folder of answers, one file a question (a hash of model, address, options and messages); default: in
            the user's cache.
        keep: whether answers are kept and read at all.
        sleep, clock: replaced in tests.

    Raises:
        EndpointError: (on asking) no key, a status that does not pass by itself, or no answer after all tries.
    """

    model: str = "deepseek-chat"
    base_url: str = "https://api.deepseek.com"
    key_variable: str = "DEEPSEEK_API_KEY"
    tries: int = 5
    timeout: float = 60.0
    per_minute: float = 60.0
    cache: Path | None = None
    keep: bool = True
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 64})
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _next: float = field(default=0.0, init=False, repr=False)

    def ask(self, messages: Sequence[dict[str, Any]], check: Callable[[str], Any] | None = None) -> str:
        """The answer's text, from the cache where this was asked before.

        Args:
            check: raises ValueError on an answer that is nonsense; it is then asked again, and nonsense is never kept.
        """
        path = self._path(messages)
        if self.keep and path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["answer"]
        fault = ""
        for attempt in range(self.tries):
            wait = 2.0**attempt * random.uniform(0.75, 1.25)
            try:
                answer = self._post(messages)
                if check is not None:
                    check(answer)
            except _Passing as passing:
                fault, wait = str(passing), passing.wait or wait
            except ValueError as nonsense:
                fault = f"nonsense: {nonsense}"
            else:
                if self.keep:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with written_aside(path) as aside:
                        Path(aside).write_text(json.dumps({"model": self.model, "answer": answer}))
                return answer
            if attempt + 1 < self.tries:
                self.sleep(wait)
        raise EndpointError(
            f"{self.model} at {self.base_url}: no answer in {self.tries} tries; last: {fault}"
        )

    def _post(self, messages: Sequence[dict[str, Any]]) -> str:
        import httpx

        key = os.environ.get(self.key_variable)
        if not key:
            raise EndpointError(
                f"no key for {self.base_url}: set the environment variable {self.key_variable}"
            )
        self._wait_for_turn()
        body = {"model": self.model, "messages": list(messages), **self.options}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            reply = httpx.post(
                url, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=self.timeout
            )
        except httpx.TransportError as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        if reply.status_code in _RETRY:
            raise _Passing(f"status {reply.status_code}", _seconds(reply.headers.get("retry-after")))
        if reply.status_code != 200:
            raise EndpointError(f"{url} answered {reply.status_code}: {reply.text[:300]}")
        try:
            answer = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise _Passing(f"a reply that is no chat completion: {reply.text[:100]!r}") from error
        if not isinstance(answer, str):
            raise _Passing(f"an answer that is no text: {answer!r}")
        return answer

    def _wait_for_turn(self) -> None:
        now = self.clock()
        if now < self._next:
            self.sleep(self._next - now)
        self._next = max(now, self._next) + 60.0 / self.per_minute

    def _path(self, messages: Sequence[dict[str, Any]]) -> Path:
        asked = json.dumps([self.model, self.base_url, self.options, list(messages)], sort_keys=True)
        name = blake2b(asked.encode(), digest_size=16).hexdigest()
        return (self.cache or cache_dir("endpoint")) / f"{name}.json"


class _Passing(Exception):
    """A fault that may be gone next time."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


def _seconds(header: str | None) -> float | None:
    try:
        return min(120.0, max(0.0, float(header))) if header else None
    except ValueError:
        return None  # a date: our own waiting will do
