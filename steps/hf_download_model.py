"""Download a model repository of a Hugging Face hub into the hub's own cache, where later jobs find it."""

from steps import Context, Frozen, PlanPath
from steps import Outputs as StepOutputs


class Params(Frozen):
    model_id: str
    """Such as `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    cache_dir: PlanPath = ""
    """Used as `HF_HOME`: files go to `hub/` below it. By default where the node's `HF_HOME` or the hub says."""
    revision: str = ""
    """Branch, tag or commit; the main branch by default."""
    allow_patterns: list[str] = []
    """Only files that match one of these, such as `*.safetensors`."""
    ignore_patterns: list[str] = []
    """No files that match one of these."""
    token_secret: str = ""
    """Name of a declared secret with the token; by default `HF_TOKEN` or the login of the node."""


class Outputs(Frozen):
    path: str
    """Folder of the snapshot."""
    revision: str
    """Commit of the snapshot."""


def run(params: Params, context: Context) -> StepOutputs:
    from steps._hub import fetch

    return fetch(
        context,
        repo_type="model",
        repo_id=params.model_id,
        revision=params.revision,
        cache_dir=params.cache_dir,
        token_secret=params.token_secret,
        allow_patterns=params.allow_patterns,
        ignore_patterns=params.ignore_patterns,
    )
