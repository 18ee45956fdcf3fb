"""botocore's client with the options of a target: retries, checksums, credentials."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

from job.errors import DeliveryError, UsageError
from job.text.credentials import require_clean
from job.text.redaction import redact, remember
from job.transfer.s3.options import S3Options, S3Target

_ATTEMPTS = 5
# A server may ask for more patience than botocore's waits have, but not for an unbounded one.
_LONGEST_RETRY_AFTER_S = 300.0


def connect(target: S3Target, options: S3Options) -> Any:
    """Return botocore's client. Raises DeliveryError for unusable credentials, UsageError for the endpoint."""
    import boto3
    from botocore.config import Config
    from botocore.handlers import add_expect_header
    from botocore.session import get_session

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        max_pool_connections=options.parallel_parts + 2,
        tcp_keepalive=True,
        s3={"addressing_style": options.addressing_style},
        # Checksums are given explicitly where the server keeps them: implicit ones break some servers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    core = get_session()
    session = boto3.session.Session(botocore_session=core)
    # Last: boto3 adds a folder to the loader that it finds.
    core.register_component("data_loader", _descriptions(core.get_config_variable("data_path")))
    if (credentials := session.get_credentials()) is not None:
        # They may come from a file or a service, where no variable holds them.
        frozen = credentials.get_frozen_credentials()
        remember(frozen.secret_key, frozen.token)
        # Stray characters fail as headers, which looks like a lost line.
        names = ("access_key_id", "secret_access_key", "session_token")
        for name, value in zip(names, (frozen.access_key, frozen.secret_key, frozen.token), strict=True):
            source = f"AWS_{name.upper()}" if credentials.method == "env" else f"aws_{name} ({credentials.method})"
            require_clean(value or "", source, DeliveryError)
    try:
        client = session.client("s3", region_name=options.region, endpoint_url=options.endpoint, config=config)
    except ValueError as error:  # botocore says so about an endpoint that is no URL
        raise UsageError(redact(str(error)), remedy="correct the endpoint, e.g. https://host:9000") from error
    target.refuse_in(client.meta.endpoint_url)  # wherever boto3 has found it
    # Bodies are sent at once: botocore 1.44 loops forever if the interim "100 Continue" breaks off.
    client.meta.events.unregister("before-call.s3", add_expect_header)
    client.meta.events.register_first("needs-retry.s3", _wait_as_asked)
    return client


@cache
def _descriptions(data_path: str | None) -> Any:
    """Return what botocore knows of services. To parse S3's for every client would take a core for a tenth of a second.

    `data_path` names further folders of it; None: botocore's own.
    """
    from botocore.loaders import create_loader

    return create_loader(data_path)


def _wait_as_asked(response: Any, attempts: int, request_dict: dict[str, Any], **_: object) -> float | None:
    """Wait as long as a busy server asks in Retry-After, which botocore ignores; None: botocore decides."""
    asked = response[0].headers.get("retry-after", "") if response and response[0].status_code in (429, 503) else ""
    if not asked.isdigit() or attempts >= _ATTEMPTS:
        return None
    stop = getattr(request_dict["body"], "stop", None) or threading.Event()
    stop.wait(min(float(asked), _LONGEST_RETRY_AFTER_S))
    return 0.0
