"""One POST that cannot hang, cannot flood memory and cannot carry its key elsewhere."""

from __future__ import annotations

import asyncio
import ipaddress
import zlib
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mmhooks.errors import MMHooksError
from mmhooks.utils.secrets import Secret, redacted_logs

LIMIT = 4 * 2**20  # bytes of a reply, as sent and again unpacked; a chat completion has a few thousand


class EndpointError(MMHooksError):
    """An endpoint that refused, or that gave no usable answer after all tries."""


class PostFailed(Exception):
    """No reply, or one that is broken, too long or too slow; another try may succeed."""


@dataclass(frozen=True)
class Reply:
    """Status, what ``Retry-After`` says, and the body unpacked; :func:`post` has taken the key out of both."""

    status: int
    retry_after: str | None
    body: bytes


def check_address(url: str) -> None:
    """Refuses addresses that a key should not be sent to.

    Raises:
        EndpointError: no http(s) address; one with a user, a password, a query or a fragment; or plain http to a
            machine that is neither this one nor on a private network.

    >>> check_address("https://api.deepseek.com"), check_address("http://127.0.0.1:8000/v1")
    (None, None)
    """
    expected = "expected an address such as https://api.deepseek.com or http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as fault:
        raise EndpointError(f"{expected}, got one that cannot be read ({fault})") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise EndpointError(
            f"{expected}, got one with a user, password, query or fragment (not shown: they may be secret); "
            "the key belongs into the environment variable that key_variable= names"
        )
    if parts.scheme not in ("http", "https") or not host or any(not c.isprintable() or c == " " for c in url):
        raise EndpointError(f"{expected}, got {url!r}")
    if parts.scheme == "http" and not _is_near(host):
        raise EndpointError(
            f"{url} would send the key readable to everyone on the way: expected https, or http to this machine or a "
            "private address (10.x, 192.168.x, ...); a tunnel (ssh -L) makes a far server a port of this machine"
        )


def _is_near(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def post(url: str, body: Any, key: Secret, *, seconds: float, limit: int = LIMIT) -> Reply:
    """Sends ``body`` as JSON with ``key`` as its bearer token, to this address alone: no redirect is followed.

    Args:
        seconds: for everything together: the connection, every header and the whole body.
        limit: bytes that a reply may have, before and after it is unpacked.

    Raises:
        PostFailed: in words that hold nothing of the key.
    """
    try:
        reply = _run(_post(url, body, key, seconds, limit))
    except PostFailed as failed:
        fault = str(failed)
    else:
        said = key.redact(reply.body.decode("latin-1")).encode(
            "latin-1"
        )  # servers quote the key that they refuse
        return Reply(reply.status, reply.retry_after and key.redact(reply.retry_after), said)
    # Raised out here, so that no exception of the transport, which holds the request with its header, hangs on it.
    raise PostFailed(key.redact(fault))


async def _post(url: str, body: Any, key: Secret, seconds: float, limit: int) -> Reply:
    import httpx

    headers = {"Authorization": f"Bearer {key.reveal()}", "Accept-Encoding": "identity"}
    # A proxy of the environment sees what plain http says; through https it sees the host's name alone.
    client = httpx.AsyncClient(
        follow_redirects=False, trust_env=url.startswith("https:"), timeout=httpx.Timeout(seconds)
    )
    raw = bytearray()
    try:
        # One deadline over all: httpx's own timeouts begin anew with every byte that drips in.
        with redacted_logs(key, "httpx", "httpcore"):
            async with (
                asyncio.timeout(seconds),
                client,
                client.stream("POST", url, json=body, headers=headers) as reply,
            ):
                async for chunk in reply.aiter_raw():
                    raw += chunk
                    if len(raw) > limit:
                        raise PostFailed(f"a reply of more than {limit:,} bytes")
    except TimeoutError:
        raise PostFailed(f"TimeoutError: no whole reply within {seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise PostFailed(f"{type(error).__name__}: {error}") from None
    packed = reply.headers.get("content-encoding", "identity").strip().lower()
    return Reply(reply.status_code, reply.headers.get("retry-after"), _unpacked(bytes(raw), packed, limit))


def _unpacked(raw: bytes, packed: str, limit: int) -> bytes:
    """What the server meant, where it packed the reply unasked."""
    if packed in ("", "identity"):
        return raw
    if packed not in ("gzip", "x-gzip", "deflate"):
        raise PostFailed(f"a reply packed as {packed[:40]!r}, though none was asked for")
    unpacker = zlib.decompressobj(wbits=47)  # gzip and zlib, told by their first bytes
    try:
        body = unpacker.decompress(raw, limit + 1)
    except zlib.error as fault:
        raise PostFailed(f"a reply that cannot be unpacked ({fault})") from None
    if len(body) > limit:
        raise PostFailed(f"a reply of more than {limit:,} bytes when unpacked")
    if not unpacker.eof:
        raise PostFailed("a packed reply that breaks off")
    return body


def _run(work: Coroutine[Any, Any, Reply]) -> Reply:
    """``asyncio.run``, in a thread of its own where this one runs a loop already, as notebooks do."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
