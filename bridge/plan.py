"""The Plan model: what a plan file says, frozen, with the defaults of every field.

Fields only; what a YAML text needs to become a `Plan` is in `reader`, what must hold between fields is in `checks`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from steps import Frozen
from steps._registry import step_types

Number = int | float | str
"""A number, or a `${{ }}` template that renders to one."""

Status = Literal["success", "failure", "succeeded", "failed", "skipped", "cancelled", "timed_out"]
"""`success` is `succeeded`; `failure` is `failed` or `timed_out`."""

ParamType = Literal["string", "integer", "number", "boolean", "list", "object"]

DEFAULT_TIMEOUT_S = 7200
COMMON_BLOCKS = ("command",)
"""Step types whose own fields stand on the step itself; every other type has a block of its name."""


class Param(Frozen):
    """A value given by whoever runs the plan (`-p name=value`)."""

    type: ParamType = "string"
    """How the value is read and checked."""
    default: Any = None
    """Without a default the param must be given."""
    choices: list[Any] = []
    """Allowed values; empty allows all of the type."""
    description: str = ""
    """Shown when the value is missing."""

    @property
    def required(self) -> bool:
        """True when no default was written."""
        return "default" not in self.model_fields_set


class Resources(Frozen):
    """What a step needs from a Ray node. Naming any of them sends the step to Ray."""

    nodes: Number | None = None
    """Different nodes that run the step together; each gives all that is asked for here, all of them or none."""
    cpus: Number | None = None
    """CPU cores; fractions are allowed."""
    gpus: Number | None = None
    """GPUs; a part of one, or whole ones."""
    memory: int | str | None = None
    """Bytes, or a text like `8GiB`."""
    labels: dict[str, str] = {}
    """Ray node labels the node must have."""
    custom: dict[str, Number] = {}
    """Custom Ray resources and how much of each."""
    actor: str | None = None
    """Name of a Ray actor that serves, one by one, the plan's steps that name it: a loaded model is used again."""


class Retry(Frozen):
    """When a failed attempt is followed by another."""

    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 1
    """Attempts in all, the first one included."""
    backoff_s: Annotated[float, Field(ge=0)] = 1.0
    """Wait before the second attempt, in seconds; doubled for each further one."""
    max_backoff_s: Annotated[float, Field(ge=0)] = 60.0
    """Longest wait between attempts, in seconds; by default 60, or `backoff_s` where that is longer."""
    on: list[int | Literal["infrastructure", "timeout"]] | None = None
    """Exit codes, `infrastructure`, `timeout`; by default every failure that may pass."""

    @model_validator(mode="before")
    @classmethod
    def _longest_is_no_shorter_than_asked(cls, given: Any) -> Any:
        """A long `backoff_s` alone is what was asked for, not something to cut at the default of the other."""
        if isinstance(given, dict) and "max_backoff_s" not in given and isinstance(given.get("backoff_s"), int | float):
            longest = max(given["backoff_s"], cls.model_fields["max_backoff_s"].default)
            return {**given, "max_backoff_s": longest}
        return given


class Cache(Frozen):
    """A step whose key is unchanged is not run again."""

    inputs: list[str] = []
    """Files and globs, relative to the plan's folder, whose content is part of the key."""
    artifacts: list[str] = []
    """Files the step makes; when one is missing or changed the step runs again."""
    version: str = ""
    """Change it to run the step again."""


class Condition(Frozen):
    """When a step runs: one of the forms below. `when: always` is short for `{always: true}`."""

    all: list["Condition"] | None = None
    """Every one holds."""
    any: list["Condition"] | None = None
    """At least one holds."""
    always: Literal[True] | None = None
    """Run whatever happened."""
    step: str | None = None
    """Id of the step to look at."""
    status: Status | None = None
    """How that step must have ended."""
    exit_code: int | list[int] | None = None
    """Exit code, or any of several, of its process."""
    outputs: dict[str, Any] | None = None
    """Output names and the values they must have."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"always": True} if value == "always" else value

    @model_validator(mode="after")
    def _one_form(self) -> "Condition":
        forms = [name for name in ("all", "any", "always", "step") if getattr(self, name) is not None]
        if len(forms) != 1:
            raise ValueError(f"got {' and '.join(forms) or 'nothing'}, wanted one of `all`, `any`, `always`, `step`")
        tests = [name for name in ("status", "exit_code", "outputs") if getattr(self, name) is not None]
        if forms == ["step"] and not tests:
            raise ValueError("`step` needs `status`, `exit_code` or `outputs`")
        if forms != ["step"] and tests:
            raise ValueError(f"`{tests[0]}` needs `step`")
        return self

    def steps(self) -> set[str]:
        """Ids of the steps this condition looks at."""
        own = {self.step} if self.step is not None else set()
        return own.union(*(part.steps() for part in [*(self.all or []), *(self.any or [])]))


class Defaults(Frozen):
    """Values for steps that do not set their own."""

    timeout_seconds: Annotated[float, Field(ge=0)] | None = None
    allow_failure: bool | None = None
    env: dict[str, str] = {}
    working_dir: str | None = None
    resources: Resources | None = None
    image: str | None = None
    retry: Retry | None = None
    cache: bool | Cache | None = None
    secrets: list[str] | dict[str, str] = []


class Step(Frozen):
    """One step. The fields of its type stand in the block of its name (`download: {...}`), those of `command` here."""

    id: str
    """Unique in the plan; names the step's logs."""
    name: str = ""
    """For people; the id by default."""
    type: str
    """See `orchestrate steps`."""
    params: dict[str, Any] = {}
    """The fields of the step type."""
    depends_on: list[str] = []
    """Ids of the steps that must succeed first."""
    when: Condition | None = None
    """Runs the step by what others came to, instead of by their success."""
    timeout_seconds: Annotated[float, Field(ge=0)] | None = None
    """Per attempt; 0 or nothing means 7200."""
    allow_failure: bool | None = None
    """The run goes on when this step fails."""
    env: dict[str, str] = {}
    """Environment variables of the step."""
    working_dir: str | None = None
    """Relative to the plan's folder, which is also the default."""
    resources: Resources | None = None
    """What the step needs; naming any sends it to Ray."""
    image: str | None = None
    """Container image the step's Ray actor runs in."""
    retry: Retry | None = None
    """When a failed attempt is followed by another."""
    matrix: dict[str, list[Any] | str] | None = None
    """One instance per combination; a value is a list or a template that renders to one."""
    max_parallel: Annotated[int, Field(ge=1)] | None = None
    """Most instances of the matrix at a time."""
    locks: list[str] = []
    """No two steps of the run that name the same lock run at the same time."""
    secrets: list[str] | dict[str, str] = []
    """Names of secrets put into the environment under their own name, or environment variable -> secret."""
    outputs: list[str] = []
    """Names of the outputs this step must write."""
    artifacts: list[str] = []
    """Files, folders and globs in the plan's folder that this step must make; they come back from any node."""
    cache: bool | Cache | None = None
    """Do not run the step again while all that it depends on is unchanged."""

    @property
    def secret_variables(self) -> dict[str, str]:
        """Environment variable -> name of the secret."""
        return _variables(self.secrets)


class Plan(Frozen):
    """A whole plan."""

    name: str = ""
    """The plan file's name by default."""
    description: str = ""
    """What the plan is for."""
    log_dir: str | None = None
    """Root of the logs, relative to the plan's folder."""
    params: dict[str, Param] = {}
    """Values given by whoever runs the plan."""
    env: dict[str, str] = {}
    """Environment variables of every step."""
    secrets: list[str] | dict[str, str] = []
    """Secrets every step gets, in the form of a step's `secrets`."""
    defaults: Defaults = Defaults()
    """Values for steps that do not set their own."""
    image: str | None = None
    """Container image for the Ray actors of steps that name none; steps that drive the engine itself need none."""
    max_parallel: Annotated[int, Field(ge=1)] | None = None
    """Most steps at a time."""
    on_failure: Literal["finish", "cancel"] = "finish"
    """What happens to running steps when another fails."""
    steps: Annotated[list[Step], Field(min_length=1)]
    """The steps, in any order."""


def with_defaults(plan: Plan) -> Plan:
    """The plan with `defaults`, plan-wide secrets and image merged into every step that does not set its own."""
    defaults = plan.defaults
    return plan.model_copy(
        update={
            "defaults": Defaults(),
            "secrets": [],
            "image": None,
            "steps": [_with_defaults(step, plan, defaults) for step in plan.steps],
        }
    )


def _with_defaults(step: Step, plan: Plan, defaults: Defaults) -> Step:
    own = {
        name: getattr(defaults, name)
        for name in ("timeout_seconds", "allow_failure", "working_dir", "resources", "image", "retry", "cache")
        if getattr(step, name) is None
    }
    if own.get("image", step.image) is None:
        own["image"] = plan.image
    if step.image is None and step.type in step_types() and step_types()[step.type].drives_engine:
        own["image"] = None
    secrets = {**_variables(plan.secrets), **_variables(defaults.secrets), **_variables(step.secrets)}
    return step.model_copy(update={**own, "env": {**defaults.env, **step.env}, "secrets": secrets})


def _variables(secrets: list[str] | dict[str, str]) -> dict[str, str]:
    return dict(secrets) if isinstance(secrets, dict) else {name: name for name in secrets}
