"""Stores behind URLs: pyarrow's S3 and Google Cloud Storage, and every other file system that fsspec knows."""

import functools
import json
import os
import re
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs


def open_store(url: str, protocol: str, options: dict[str, Any]) -> tuple[Any, str]:
    """What opens the URL, and the path in it."""
    if protocol in _ARROW:
        system = _ARROW[protocol](json.dumps(options, sort_keys=True), urlsplit(url).netloc)
        return system, system._strip_protocol(url)
    return fsspec.core.url_to_fs(url, **options)


@functools.lru_cache(maxsize=64)
def _s3(storage: str, bucket: str) -> ArrowFSWrapper:
    """pyarrow's S3 with the option names of s3fs or its own; else the environment and files of the AWS tools count."""
    given: dict[str, Any] = json.loads(storage)
    client = given.pop("client_kwargs", {})
    endpoint = given.pop("endpoint_url", None) or client.get("endpoint_url")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    names = {"key": "access_key", "secret": "secret_key", "token": "session_token", "anon": "anonymous"}
    options = {names.get(name, name): value for name, value in given.items()}
    region = options.pop("region_name", None) or client.get("region_name")
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        options |= {"endpoint_override": urlsplit(endpoint).netloc, "scheme": urlsplit(endpoint).scheme}
        region = region or "us-east-1"  # other makers' stores take any
    if region or "region" not in options:
        options["region"] = region or fs.resolve_s3_region(bucket)
    return _Arrow(fs.S3FileSystem(**options))


@functools.lru_cache(maxsize=64)
def _gcs(storage: str, bucket: str) -> ArrowFSWrapper:
    return _Arrow(fs.GcsFileSystem(**json.loads(storage)))


class _Arrow(ArrowFSWrapper):
    """pyarrow names objects without the protocol."""

    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return re.sub(r"^[A-Za-z0-9+.-]+://", "", path).rstrip("/")


_ARROW: Final[dict[str, Callable[[str, str], ArrowFSWrapper]]] = {"s3": _s3, "s3a": _s3, "gs": _gcs, "gcs": _gcs}
