"""Download a dataset of a Hugging Face hub: the repository's files, or with `config` or `split` a prepared dataset."""

from steps import Context, Frozen, PlanPath, StepError
from steps import Outputs as StepOutputs


class Params(Frozen):
    dataset_id: str
    """Such as `HuggingFaceFW/fineweb`."""
    config: str = ""
    """Configuration to prepare with `datasets`. Without it and `split` the files are fetched as they are."""
    split: str = ""
    """Split to prepare with `datasets`, such as `train[:100]`."""
    cache_dir: PlanPath = ""
    """Used as `HF_HOME`: `hub/` and `datasets/` are below it. By default where the node's `HF_HOME` or the hub says."""
    revision: str = ""
    """Branch, tag or commit; the main branch by default."""
    allow_patterns: list[str] = []
    """Only files that match one of these; not with `config` or `split`."""
    ignore_patterns: list[str] = []
    """No files that match one of these; not with `config` or `split`."""
    token_secret: str = ""
    """Name of a declared secret with the token; by default `HF_TOKEN` or the login of the node."""


class Outputs(Frozen):
    path: str
    """Folder of the snapshot, or of the prepared dataset."""
    revision: str
    """Commit of the repository."""
    rows: int = 0
    """Rows of the prepared dataset; 0 when the files were fetched."""


def run(params: Params, context: Context) -> StepOutputs:
    from steps._hub import fetch

    if (params.config or params.split) and (params.allow_patterns or params.ignore_patterns):
        raise StepError(
            "`allow_patterns` and `ignore_patterns` do not go with `config` and `split`\n\n"
            "hint: `datasets` decides itself which files a configuration needs"
        )
    outputs = fetch(
        context,
        repo_type="dataset",
        repo_id=params.dataset_id,
        revision=params.revision,
        cache_dir=params.cache_dir,
        token_secret=params.token_secret,
        allow_patterns=params.allow_patterns,
        ignore_patterns=params.ignore_patterns,
        config=params.config,
        split=params.split,
    )
    return {"rows": 0, **outputs}
