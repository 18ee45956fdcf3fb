"""The account's API key for a platform, from its own tools' files, and the market it opens."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from job.cloud import runpod, vast
from job.cloud.api import Api, Patience
from job.cloud.provider import Market
from job.errors import UsageError
from job.text.credentials import require_clean
from job.text.redaction import remember

Platform = Literal["vast", "runpod"]
VAST_KEY, RUNPOD_KEY = "VAST_API_KEY", "RUNPOD_API_KEY"
# Account-wide keys, which must never reach a rented machine.
ACCOUNT_KEYS = frozenset({VAST_KEY, RUNPOD_KEY, "VASTAI_API_KEY"})


def open_market(
    platform: Platform,
    say: Callable[[str], None],
    *,
    secrets: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    patience: Patience | None = None,
) -> Market:
    """Return a platform's market with the account's key; `secrets` are hidden. Raises UsageError without a key."""
    env = os.environ if env is None else env
    patience = patience or Patience()
    if platform == "vast":
        key, base = _vast_key(env), env.get(vast.BASE_NAME) or vast.BASE
        return vast.Vast(Api("Vast.ai", base, _required(key, "Vast.ai", VAST_KEY), VAST_KEY, say, patience, secrets))
    key, base = _runpod_key(env), env.get(runpod.BASE_NAME) or runpod.BASE
    return runpod.RunPod(Api("RunPod", base, _required(key, "RunPod", RUNPOD_KEY), RUNPOD_KEY, say, patience, secrets))


def _required(key: str, platform: str, name: str) -> str:
    remember(key)
    if not key:
        raise UsageError(f"there is no key for {platform}", remedy=f"set {name} to a key of your account")
    require_clean(key, name, UsageError)
    return key


def _vast_key(env: Mapping[str, str]) -> str:
    home = Path(env.get("HOME") or Path.home())
    config = Path(env.get("XDG_CONFIG_HOME") or home / ".config")
    files = (config / "vastai" / "vast_api_key", home / ".vast_api_key")
    return env.get(VAST_KEY) or next((text for file in files if (text := _text(file))), "")


def _runpod_key(env: Mapping[str, str]) -> str:
    if env.get(RUNPOD_KEY):
        return env[RUNPOD_KEY]
    try:
        found = tomllib.loads(_text(Path(env.get("HOME") or Path.home()) / ".runpod" / "config.toml"))
    except tomllib.TOMLDecodeError:
        return ""
    # One of the platform's tools stores it in a table, the other at the top level.
    profile = found.get("default")
    keys = [profile.get("api_key") if isinstance(profile, dict) else None, found.get("apikey"), found.get("apiKey")]
    return next((str(key) for key in keys if key), "")


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
