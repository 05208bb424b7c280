"""A folder given by its path, or by the name of a repository on the Hugging Face hub.

    folder = find_folder("FacebookAI/xlm-roberta-base", ["config.json"])  # fetched once, then cached

Only files that are data are ever asked for; code of a repository is neither fetched nor run.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from maws.config import ConfigError

NAME = r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?"  # NAME or ORGANISATION/NAME


def find_folder(name: str, files: Sequence[str], setting: str = "text.pretrained") -> Path:
    """The local folder of that name, or one with those `files` (patterns) of the repository that has it on the hub.

    Raises ConfigError when there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise ConfigError(f"{setting}={name} is a file; give the folder that it lies in")
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{setting}={name}: there is no such folder, and no repository of the hub has such a name")
    from huggingface_hub import snapshot_download  # imports an HTTP client, which local folders do not need

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as e:  # the hub's errors are among these
        reason = " ".join(str(e).split())[:300]
        raise ConfigError(
            f"{setting}={name}: there is no such folder, and it could not be fetched from the hub either ({reason}); "
            f"on a machine without a network, fetch it elsewhere and give its local folder"
        ) from None
