"""`orchestrate cluster`: a Ray cluster on other machines, brought up by Ray's own launcher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.cli.failure import Failure, Unreachable
from bridge.cli.options import json_option
from bridge.cli.watch import Output
from bridge.current_cluster import CurrentCluster, current_cluster, forget_cluster, use_cluster
from bridge.state import State, StateError, private_dir

if TYPE_CHECKING:
    from cluster.cluster_file import ClusterFile
    from cluster.machine_check import Check
    from cluster.nodes import Node

DEFAULT_FILE = "ray-cluster.yaml"
NOT_COMPLETE = 3
"""Exit code of `status` when a machine of the cluster is missing."""

config_option = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The cluster file; by default that of the current cluster, else `{DEFAULT_FILE}` here.",
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


@click.group()
def cluster() -> None:
    """A Ray cluster on other machines: where steps go that ask for resources.

    The cluster file is that of Ray's launcher; `ray up`, `ray exec`, `ray dashboard` and so on work with it too.
    """


@cluster.command()
@config_option
@yes_option
@json_option
@click.option(
    "--timeout", "timeout_s", default=600.0, show_default=True, help="Seconds until every machine has joined."
)
def up(config: Path | None, yes: bool, as_json: bool, timeout_s: float) -> None:
    """Check the machines, bring the cluster up, and send steps there from now on.

    A cluster that runs already is started anew: what runs there is ended. Exit code 3 when something is missing: all of
    it is told, with the machine where it is missing.
    """
    state = _state()
    with _explained():
        from cluster.launcher import up as bring_up
        from cluster.machine_check import check_cluster
        from cluster.token_file import ensure_token

        found = _cluster_file(config, state)
        if found.token_file and ensure_token(found.token_file):
            click.echo(f"made token {found.token_file}", err=True)
        checks = check_cluster(found)
        if any(not check.passed for check in checks):
            if as_json:
                Output(as_json=True).print_json({"checks": [asdict(check) for check in checks]})
            raise _what_is_missing(found, checks)
        if not yes:
            where = ", ".join(machine.address for machine in found.machines) or found.content["provider"]["type"]
            click.confirm(f"Bring up `{found.name}` on {where}?", abort=True, err=True)
        address, nodes = bring_up(found, _folder(state), _say, timeout_s)
        use_cluster(state, CurrentCluster(found.name, address, str(found.token_file), str(found.path)))
    if as_json:
        Output(as_json=True).print_json(_status(found, address, nodes))
        return
    click.echo(f"cluster {found.name} is up at {address}; steps that ask for resources go there")
    _print_nodes(nodes)


@cluster.command()
@config_option
@yes_option
@json_option
def down(config: Path | None, yes: bool, as_json: bool) -> None:
    """Take the cluster down: its containers, its processes and its files on every machine.

    Exit code 3 when a machine could not be cleaned; the same command tries it again.
    """
    state = _state()
    with _explained():
        from cluster.launcher import down as take_down

        found = _cluster_file(config, state)
        if not yes:
            click.confirm(f"Take down `{found.name}`? What runs there is ended.", abort=True, err=True)
        problems = take_down(found, _folder(state), _say)
        forget_cluster(state, found.name)
    if as_json:
        Output(as_json=True).print_json({"name": found.name, "down": not problems, "problems": problems})
    if problems:
        raise Unreachable("\n".join(problems), "run `orchestrate cluster down` again when the machine answers")
    if not as_json:
        click.echo(f"cluster {found.name} is down")


@cluster.command()
@config_option
@json_option
@click.pass_context
def status(context: click.Context, config: Path | None, as_json: bool) -> None:
    """Show the health of the cluster. Exit code 0 when every machine has joined, else 3."""
    state = _state()
    with _explained():
        found = _cluster_file(config, state)
        address = _address(found, state)
        nodes = _nodes(found, address)
    document = _status(found, address, nodes)
    if as_json:
        Output(as_json=True).print_json(document)
    else:
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in document["resources"].items() if name != "memory")
        rows = [
            ("cluster", f"{found.name} ({document['state']})"),
            ("address", address),
            ("token", found.token_file),
            ("nodes", f"{document['alive']} alive" + (f", {document['expected']} wanted" if found.machines else "")),
            ("resources", amounts),
            *(("missing", one) for one in document["missing"]),
            ("dashboard", f"ray dashboard {found.path}"),
        ]
        for name, value in rows:
            click.echo(f"{name:<10} {value}")
    if document["state"] != "up":
        context.exit(NOT_COMPLETE)


@cluster.command()
@config_option
@json_option
def nodes(config: Path | None, as_json: bool) -> None:
    """List the nodes: type, state, image, resources, labels."""
    state = _state()
    with _explained():
        found = _cluster_file(config, state)
        listed = _nodes(found, _address(found, state))
    if as_json:
        Output(as_json=True).print_json([node.model_dump() for node in listed])
    else:
        _print_nodes(listed)


@cluster.command()
@config_option
@json_option
@click.pass_context
def check(context: click.Context, config: Path | None, as_json: bool) -> None:
    """Check this machine and the cluster's, starting nothing. Exit code 3 when something is missing."""
    with _explained():
        from cluster.machine_check import check_cluster

        checks = check_cluster(_cluster_file(config, _state()))
    if as_json:
        Output(as_json=True).print_json([asdict(one) for one in checks])
    else:
        from bridge.terminal import columns

        rows = [(one.machine, one.name, "ok" if one.passed else "FAILED", one.text) for one in checks]
        click.echo("\n".join(columns(("MACHINE", "CHECK", "STATE", "FOUND"), rows)))
        for one in checks:
            if not one.passed and one.hint:
                click.echo(f"hint: {one.machine}, {one.name}: {one.hint}")
    if not all(one.passed for one in checks):
        context.exit(NOT_COMPLETE)


@cluster.command()
@config_option
def token(config: Path | None) -> None:
    """Make the token of the cluster file unless it is there, and print its path; `ray up` needs it."""
    with _explained():
        from cluster.token_file import check_token, ensure_token

        path = _cluster_file(config, _state()).token_file
        if path is None:
            check_token(path)
        else:
            ensure_token(path)
    click.echo(path)


@contextmanager
def _explained() -> Iterator[None]:
    """What goes wrong becomes a `Failure`."""
    from cluster.cluster_file import ClusterFileError
    from cluster.launcher import LaunchError
    from cluster.nodes import NodesError
    from cluster.token_file import TokenError

    try:
        yield
    except ClusterFileError as error:
        raise Failure(str(error)) from error
    except (LaunchError, NodesError, TokenError) as error:
        raise Unreachable(str(error)) from error


def _state() -> State:
    state = State.from_environment()
    try:
        private_dir(state.dir)
    except StateError as error:
        raise Failure(str(error)) from error
    return state


def _folder(state: State) -> Path:
    return state.dir / "clusters"


def _cluster_file(config: Path | None, state: State) -> "ClusterFile":
    from cluster.cluster_file import read_cluster_file

    current = current_cluster(state)
    return read_cluster_file(config or (Path(current.config) if current else Path(DEFAULT_FILE)))


def _address(found: "ClusterFile", state: State) -> str:
    from cluster.launcher import head_address

    current = current_cluster(state)
    if current and current.config == str(found.path):
        return current.address
    return found.client_address(head_address(found, _folder(state)))


def _nodes(found: "ClusterFile", address: str) -> "list[Node]":
    from cluster.nodes import list_nodes

    return list_nodes(address, found.token_file)


def _status(found: "ClusterFile", address: str, listed: "list[Node]") -> dict[str, Any]:
    alive = [node for node in listed if node.alive]
    missing = [machine.address for machine in found.machines if machine.address not in {node.address for node in alive}]
    resources: dict[str, float] = {}
    for node in alive:
        for name, amount in node.resources.items():
            resources[name] = resources.get(name, 0.0) + amount
    return {
        "name": found.name,
        "address": address,
        "state": "up" if alive and not missing else "incomplete",
        "alive": len(alive),
        "expected": len(found.machines),
        "missing": missing,
        "resources": dict(sorted(resources.items())),
        "nodes": [node.model_dump() for node in listed],
    }


def _print_nodes(listed: "list[Node]") -> None:
    from bridge.terminal import columns

    rows = []
    for node in sorted(listed, key=lambda node: (not node.alive, node.type != "head", node.address)):
        own = {name: value for name, value in node.labels.items() if not name.startswith("ray.io/") and name != "image"}
        amounts = [
            f"{amount / 1e9:.1f} GB memory" if name == "memory" else f"{amount:g} {name}"
            for name, amount in sorted(node.resources.items())
        ]
        state = "alive" if node.alive else "dead"
        rows.append((node.address, node.type, state, node.image or "-", ", ".join(amounts),
                     ", ".join(f"{name}={value}" for name, value in own.items())))  # fmt: skip
    click.echo("\n".join(columns(("NODE", "TYPE", "STATE", "IMAGE", "RESOURCES", "LABELS"), rows)))


def _what_is_missing(found: "ClusterFile", checks: "list[Check]") -> Unreachable:
    lines = [
        f"  {check.machine}: {check.name}: {check.text}" + (f"\n    hint: {check.hint}" if check.hint else "")
        for check in checks
        if not check.passed
    ]
    return Unreachable(f"`{found.name}` cannot be brought up:\n" + "\n".join(lines))


_say: Callable[[str], None] = lambda line: click.echo(line, err=True)  # noqa: E731

COMMANDS = (cluster,)
