"""Downloads one repository of a Hugging Face hub; started by `hf-download.sh`: REVISION KIND ID [CONFIG] [SPLIT].

Where to, from where and as whom is the environment's: `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`.
"""

import sys
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError


def main() -> int:
    """Download, print the folder; 1 with a message when that fails."""
    revision, kind, repo_id, *rest = sys.argv[1:]
    config, split = (*rest, "", "")[:2]
    try:
        if config or split:
            print(_prepared(repo_id, config or None, split or None, revision or None))
        else:
            print(snapshot_download(repo_id, repo_type=kind, revision=revision or None))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        told = "accept its terms on the hub" if isinstance(error, GatedRepoError) else "look at the id"
        print(f"{kind} `{repo_id}` cannot be had from {constants.ENDPOINT}: {_first_line(error)}", file=sys.stderr)
        print(f"\nhint: {told}; private and gated ones need HF_TOKEN", file=sys.stderr)
        return 1
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError, ValueError) as error:
        print(f"{kind} `{repo_id}`: {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
        return 1
    return 0


def _prepared(repo_id: str, config: str | None, split: str | None, revision: str | None) -> Path:
    from datasets import DatasetDict, load_dataset

    loaded = load_dataset(repo_id, config, split=split, revision=revision)
    parts = list(loaded.values()) if isinstance(loaded, DatasetDict) else [loaded]
    files = [Path(file["filename"]) for part in parts for file in part.cache_files]
    return files[0].parent if files else Path(constants.HF_HOME) / "datasets"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
