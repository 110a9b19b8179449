"""An HTTP POST with a deadline, a size limit, and a key that is never sent to another host."""

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

LIMIT = 4 * 2**20  # bytes of a reply, both compressed and decompressed; a chat completion has a few thousand


class EndpointError(MMHooksError):
    """An endpoint refused, or gave no usable answer after all tries."""


class PostFailed(Exception):
    """There was no reply, or a broken, too long or too slow one; another try may succeed."""


@dataclass(frozen=True)
class Reply:
    """Status, the ``Retry-After`` header, and the decompressed body; :func:`post` has removed the key from both."""

    status: int
    retry_after: str | None
    body: bytes


def check_address(url: str) -> None:
    """Refuses addresses to which a key should not be sent.

    Raises:
        EndpointError: the address is not http(s), has a user, a password, a query or a fragment, or is plain http to
            a machine that is neither this one nor on a private network.

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
            "put the key into the environment variable that key_variable= names"
        )
    if parts.scheme not in ("http", "https") or not host or any(not c.isprintable() or c == " " for c in url):
        raise EndpointError(f"{expected}, got {url!r}")
    if parts.scheme == "http" and not _is_near(host):
        raise EndpointError(
            f"{url} would send the key unencrypted: expected https, or http to this machine or a "
            "private address (10.x, 192.168.x, ...); a tunnel (ssh -L) makes a remote server a port of this machine"
        )


def _is_near(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def post(url: str, body: Any, key: Secret, *, seconds: float, limit: int = LIMIT) -> Reply:
    """Sends ``body`` as JSON with ``key`` as bearer token, only to this address: redirects are not followed.

    Args:
        seconds: deadline for everything together: connection, headers and the whole body.
        limit: maximum size of a reply in bytes, before and after decompression.

    Raises:
        PostFailed: with a message that contains nothing of the key.
    """
    try:
        reply = _run(_post(url, body, key, seconds, limit))
    except PostFailed as failed:
        fault = str(failed)
    else:
        redacted = key.redact(reply.body.decode("latin-1")).encode(
            "latin-1"
        )  # servers quote the key that they refuse
        return Reply(reply.status, reply.retry_after and key.redact(reply.retry_after), redacted)
    # Raised here, so that it does not chain an exception of the transport, which holds the request with its header.
    raise PostFailed(key.redact(fault))


async def _post(url: str, body: Any, key: Secret, seconds: float, limit: int) -> Reply:
    import httpx

    headers = {"Authorization": f"Bearer {key.reveal()}", "Accept-Encoding": "identity"}
    # A proxy from the environment can read plain http; through https it only sees the host name.
    client = httpx.AsyncClient(
        follow_redirects=False, trust_env=url.startswith("https:"), timeout=httpx.Timeout(seconds)
    )
    raw = bytearray()
    try:
        # One overall deadline: httpx's own timeouts restart with every byte that arrives.
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
    encoding = reply.headers.get("content-encoding", "identity").strip().lower()
    return Reply(
        reply.status_code, reply.headers.get("retry-after"), _decompressed(bytes(raw), encoding, limit)
    )


def _decompressed(raw: bytes, encoding: str, limit: int) -> bytes:
    """Decompresses a reply that the server compressed although it was not asked to."""
    if encoding in ("", "identity"):
        return raw
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise PostFailed(f"a reply with content encoding {encoding[:40]!r}, though none was requested")
    unpacker = zlib.decompressobj(wbits=47)  # detects gzip and zlib by their first bytes
    try:
        body = unpacker.decompress(raw, limit + 1)
    except zlib.error as fault:
        raise PostFailed(f"a reply that cannot be decompressed ({fault})") from None
    if len(body) > limit:
        raise PostFailed(f"a reply of more than {limit:,} bytes when decompressed")
    if not unpacker.eof:
        raise PostFailed("a compressed reply that is truncated")
    return body


def _run(work: Coroutine[Any, Any, Reply]) -> Reply:
    """Runs a coroutine; in a separate thread if this one already runs an event loop, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
