# Copyright 2026 The florence_vl_hf authors. Licensed under the Apache License, Version 2.0.
"""Images in requests to a server, from anybody: base64 data URLs, and URLs of public addresses."""

import base64
import ipaddress
import socket
import time
from io import BytesIO

from huggingface_hub.utils import httpx  # the client that Transformers loads images with
from PIL import Image

from ..processing.images import read_pixels
from .chat import DOWNLOAD_TIMEOUT


MAX_URL_LENGTH = 200  # in characters, in messages
MAX_REDIRECTS = 5
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PublicTransport(httpx.HTTPTransport):
    """Connects to public addresses only. Each redirect is a request of its own, and is checked too."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        addresses = {str(info[4][0]): None for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        for address in addresses:
            if not is_public(address):
                raise httpx.UnsupportedProtocol(f"{host} is the address {address}, which is not public")
        # The address itself, because a second look-up of the name could return another.
        public = httpx.Request(
            request.method,
            request.url.copy_with(host=next(iter(addresses))),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return super().handle_request(public)


def is_public(address: str) -> bool:
    """Whether an IP address is neither private, loopback, link-local, multicast nor reserved."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        # An IPv4 address within it is what is connected to.
        nat64 = ipaddress.IPv4Address(int(parsed) % 2**32) if parsed in NAT64 else None
        parsed = nat64 or parsed.ipv4_mapped or parsed.sixtofour or parsed
    return parsed.is_global and not parsed.is_multicast


def load_request_image(url: str, max_bytes: int, allow_private_urls: bool = False) -> Image.Image:
    """
    Load the image of a request, upright and in RGB.

    Args:
        url (`str`): A URL (http or https), or a data URL in base64.
        max_bytes (`int`): Maximum size of a download.
        allow_private_urls (`bool`, *optional*, defaults to `False`): Whether to connect to any address.

    Raises:
        ValueError: If it cannot be read, or is at an address that is not public. The message is one line.
    """
    try:
        if url.startswith("data:"):
            content = base64.b64decode(url.partition(";base64,")[2], validate=True)
        elif url.startswith(("http://", "https://")):
            content = _download(url, max_bytes, allow_private_urls)
        else:
            raise ValueError("expected a URL that begins with http:, https: or data:")
        with Image.open(BytesIO(content)) as opened:
            return read_pixels(opened)
    except Exception as error:  # Pillow's decoders and the HTTP client raise many types
        name = url.partition(",")[0] if url.startswith("data:") else url
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        message = f"Cannot read the image {name[:MAX_URL_LENGTH]!r} ({' '.join(reason.split())}); send another."
        raise ValueError(message) from error


def _download(url: str, max_bytes: int, allow_private_urls: bool) -> bytes:
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT
    transport = None if allow_private_urls else PublicTransport()
    client = httpx.Client(
        transport=transport, follow_redirects=True, max_redirects=MAX_REDIRECTS, timeout=DOWNLOAD_TIMEOUT
    )
    content = bytearray()
    with client, client.stream("GET", url) as response:
        response.raise_for_status()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > max_bytes:
                raise ValueError(f"it has more than {max_bytes:,} bytes")
            if time.monotonic() > deadline:
                raise ValueError(f"the download takes more than {DOWNLOAD_TIMEOUT} seconds")
    return bytes(content)
