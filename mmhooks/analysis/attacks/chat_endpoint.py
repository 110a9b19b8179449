"""An OpenAI-compatible chat endpoint: retries, a rate limit, answers cached on disk, the key from the environment."""

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


@dataclass(frozen=True)
class Completion:
    """An answer, whether it was cut at the limit of tokens, and the model that the server says gave it ("" if it does
    not say)."""

    text: str
    cut: bool = False
    served: str = ""


@dataclass
class Endpoint:
    """One model behind ``POST {base_url}/chat/completions``.

    The key is sent only to the host of ``base_url``: redirects are not followed. It appears in no file, message,
    ``repr`` or log; if the server's reply repeats it, it is replaced.

    Args:
        model, base_url: DeepSeek's chat model by default; https, or http to this machine or a private address.
        key_variable: environment variable that holds the key; never written anywhere.
        tries: per question; timeouts, broken connections, 408, 409, 425, 429, 5xx and malformed answers are retried
            after 1, 2, 4, ... seconds or what ``Retry-After`` says.
        timeout: seconds for one whole try, from the connection to the reply's last byte.
        per_minute: maximum number of requests per minute.
        cache: folder of answers, one file per question (a hash of model, address, options and messages); default: in
            the user's cache.
        keep: whether answers are cached on disk and read from there.
        sleep, clock: replaced in tests.

    Raises:
        EndpointError: the address, the variable's name or the key cannot be used; on asking: no key, a permanent error
            status, no answer after all tries, or a damaged file in the cache.
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
        )  # a key that cannot be sent fails before any work
        if self.tries < 1 or not (self.timeout > 0 and self.per_minute > 0):
            raise EndpointError(
                "expected tries of at least 1, and timeout and per_minute above 0, got "
                f"{self.tries}, {self.timeout} and {self.per_minute}"
            )

    def ask(self, messages: Sequence[dict[str, Any]], check: Callable[[str], Any] | None = None) -> str:
        """Returns the text of :meth:`complete`."""
        return self.complete(messages, check).text

    def complete(
        self, messages: Sequence[dict[str, Any]], check: Callable[[str], Any] | None = None
    ) -> Completion:
        """Returns the answer, from the cache if the question was asked before.

        Args:
            check: raises ValueError for a nonsensical answer, which is then asked for again and never cached.
        """
        path = self._path(messages)
        if self.keep and path.is_file():
            return _cached(path)
        fault = ""
        for attempt in range(self.tries):
            wait = 2.0**attempt * random.uniform(0.75, 1.25)
            try:
                answer = self._post(messages)
                if check is not None:
                    check(answer.text)
            except _Transient as transient:
                fault, wait = str(transient), transient.wait or wait
            except ValueError as nonsense:
                fault = f"nonsense: {nonsense}"
            else:
                if self.keep:
                    make_folder(path.parent)
                    write_text(path, json.dumps({"model": self.model, "answer": answer.text, "cut": answer.cut,
                                                 "served": answer.served}))  # fmt: skip
                return answer
            if attempt + 1 < self.tries:
                self.sleep(wait)
        raise EndpointError(
            f"{self.model} at {self.base_url}: no answer in {self.tries} tries; last: {fault}"
        )

    def require_key(self) -> Secret:
        """Returns the key from the environment.

        Raises:
            EndpointError: there is none; a study asks for it before it computes anything.
        """
        key = Secret.from_environment(self.key_variable, EndpointError)
        if key is None:
            raise EndpointError(
                f"no key for {self.base_url}: set the environment variable {self.key_variable}"
            )
        return key

    def _post(self, messages: Sequence[dict[str, Any]]) -> Completion:
        check_address(self.base_url)  # both may have been changed since
        key = self.require_key()
        self._wait_for_turn()
        body = {"model": self.model, "messages": list(messages), **self.options}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        try:
            reply = post(url, body, key, seconds=self.timeout)
        except PostFailed as failed:
            raise _Transient(str(failed)) from None
        if reply.status in _RETRY:
            raise _Transient(f"status {reply.status}", _seconds(reply.retry_after))
        if reply.status != 200:
            raise EndpointError(
                f"{url} answered {reply.status}: {_reply_excerpt(reply.body, key)}{_redirected(reply.status)}"
            )
        try:
            told = json.loads(reply.body)
            choice = told["choices"][0]
            answer, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            told, answer, cut = {}, None, False
        if not isinstance(answer, str):
            raise _Transient(
                f"expected a chat completion whose content is a text, got {_reply_excerpt(reply.body, key)}"
            )
        served = told.get("model")
        return Completion(
            key.redact(_text(answer)), cut, key.redact(_text(served)[:100]) if isinstance(served, str) else ""
        )

    def _wait_for_turn(self) -> None:
        now = self.clock()
        if now < self._next:
            self.sleep(self._next - now)
        self._next = max(now, self._next) + 60.0 / self.per_minute

    def _path(self, messages: Sequence[dict[str, Any]]) -> Path:
        asked = json.dumps([self.model, self.base_url, self.options, list(messages)], sort_keys=True)
        name = blake2b(asked.encode(), digest_size=16).hexdigest()
        return (self.cache or cache_dir("endpoint")) / f"{name}.json"


class _Transient(Exception):
    """A fault that may not occur on the next try."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


def _text(received: str) -> str:
    """Half of a surrogate pair is not text: it can be neither printed nor written to a UTF-8 file."""
    return re.sub("[\ud800-\udfff]", "\ufffd", received)


def _cached(path: Path) -> Completion:
    content = read_json(path, "an answer of an endpoint", {"answer": str}, error=EndpointError,
                        remedy="delete the file and the question is asked again")  # fmt: skip
    served = content.get("served")
    return Completion(
        content["answer"], content.get("cut") is True, served if isinstance(served, str) else ""
    )


def _reply_excerpt(body: bytes, key: Secret) -> str:
    """The beginning of a server's reply, without the key and without terminal control characters."""
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
        return None  # a date: use our own waiting time
