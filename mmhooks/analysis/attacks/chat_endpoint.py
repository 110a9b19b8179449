"""An OpenAI-compatible chat endpoint: retries, a rate limit, answers kept on disk, the key from the environment."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mmhooks.analysis.attacks.bounded_post import EndpointError, PostFailed, check_address, post
from mmhooks.utils.files import cache_dir, make_folder, write_text
from mmhooks.utils.json_files import read_json
from mmhooks.utils.secrets import Secret

_RETRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


@dataclass
class Endpoint:
    """One model behind ``POST {base_url}/chat/completions``.

    The key is sent to the host of ``base_url`` alone: redirects are not followed. It stands in no file, message,
    ``repr`` or log; where the server's words repeat it, it is replaced.

    Args:
        model, base_url: DeepSeek's chat model by default; https, or http to this machine or a private address.
        key_variable: environment variable that holds the key; never written anywhere.
        tries: per question; timeouts, broken connections, 408, 409, 425, 429, 5xx and answers that are not what they
            should be are tried again, after 1, 2, 4, ... seconds or what ``Retry-After`` says.
        timeout: seconds for one whole try, from the connection to the reply's last byte.
        per_minute: at most so many requests a minute.
        cache: folder of answers, one file a question (a hash of model, address, options and messages); default: in
            the user's cache.
        keep: whether answers are kept and read at all.
        sleep, clock: replaced in tests.

    Raises:
        EndpointError: an address, a variable's name or a key that cannot be used; on asking, no key, a status that does
            not pass by itself, no answer after all tries, or a damaged file among the answers kept.
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

    def __post_init__(self) -> None:
        check_address(self.base_url)
        Secret.from_environment(
            self.key_variable, EndpointError
        )  # a key that cannot be sent is told before any work
        if self.tries < 1 or not (self.timeout > 0 and self.per_minute > 0):
            raise EndpointError(
                "expected tries of at least 1, and timeout and per_minute above 0, got "
                f"{self.tries}, {self.timeout} and {self.per_minute}"
            )

    def ask(self, messages: Sequence[dict[str, Any]], check: Callable[[str], Any] | None = None) -> str:
        """The answer's text, from the cache where this was asked before.

        Args:
            check: raises ValueError on an answer that is nonsense; it is then asked again, and nonsense is never kept.
        """
        path = self._path(messages)
        if self.keep and path.is_file():
            return _kept(path)
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
                    make_folder(path.parent)
                    write_text(path, json.dumps({"model": self.model, "answer": answer}))
                return answer
            if attempt + 1 < self.tries:
                self.sleep(wait)
        raise EndpointError(
            f"{self.model} at {self.base_url}: no answer in {self.tries} tries; last: {fault}"
        )

    def _post(self, messages: Sequence[dict[str, Any]]) -> str:
        check_address(self.base_url)  # both may have been set anew
        key = Secret.from_environment(self.key_variable, EndpointError)
        if key is None:
            raise EndpointError(
                f"no key for {self.base_url}: set the environment variable {self.key_variable}"
            )
        self._wait_for_turn()
        body = {"model": self.model, "messages": list(messages), **self.options}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            reply = post(url, body, key, seconds=self.timeout)
        except PostFailed as failed:
            raise _Passing(str(failed)) from None
        if reply.status in _RETRY:
            raise _Passing(f"status {reply.status}", _seconds(reply.retry_after))
        if reply.status != 200:
            raise EndpointError(
                f"{url} answered {reply.status}: {_said(reply.body, key)}{_redirected(reply.status)}"
            )
        try:
            answer = json.loads(reply.body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            answer = None
        if not isinstance(answer, str):
            raise _Passing(
                f"expected a chat completion whose content is a text, got {_said(reply.body, key)}"
            )
        # Half of a surrogate pair is no text: it could be neither printed nor written to a UTF-8 file.
        return key.redact(re.sub("[\ud800-\udfff]", "\ufffd", answer))

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


def _kept(path: Path) -> str:
    content = read_json(path, "an answer of an endpoint", {"answer": str}, error=EndpointError,
                        remedy="delete the file and the question is asked again")  # fmt: skip
    return content["answer"]


def _said(body: bytes, key: Secret) -> str:
    """The beginning of what a server said, without the key and without signs that act on a terminal."""
    text = body[:4000].decode(errors="replace")
    return repr(key.redact(text)[:300])


def _redirected(status: int) -> str:
    if not 300 <= status < 400:
        return ""
    return "; redirects are not followed, as the key is for this host alone: give base_url= the final address"


def _seconds(header: str | None) -> float | None:
    try:
        return min(120.0, max(0.0, float(header))) if header else None
    except ValueError:
        return None  # a date: our own waiting will do
