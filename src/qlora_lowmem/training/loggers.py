"""Loggers that follow a run through transformers' own integrations: is what they need installed?"""

import importlib.util

from qlora_lowmem.errors import UsageError

# What transformers imports for each (transformers/integrations/integration_utils.py).
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def check_logger(report_to: str) -> None:
    """Refuse a logger whose package is missing, before anything is loaded.

    Raises:
        UsageError: it is not installed.
    """
    package = _PACKAGES.get(report_to)
    if package is not None and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"run.report_to: {report_to!r} needs the package {package}, which is not installed. Run: python -m pip "
            f"install {package}; or set run.report_to to none: log.jsonl in the output folder is written in any case"
        )
