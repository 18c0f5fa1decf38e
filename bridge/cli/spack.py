"""`orchestrate spack`: environments of packages, their locks, and the store they are built in.

new -> spack.yaml -> lock -> spack.lock -> build -> store, view -> shell, steps with `environment: NAME`
"""

import sys
from pathlib import Path
from typing import Any

import click

from bridge.cli.failure import FAILED, Failure
from bridge.cli.job_lookup import time_option
from bridge.cli.options import json_option
from bridge.cli.spack_autobuild import autobuild
from bridge.cli.spack_environment import (
    FOLDERS,
    described,
    environment_argument,
    environment_of,
    locked,
    problems,
    stale,
    undescribed,
)
from bridge.cli.spack_place import Site, place_options
from bridge.cli.watch import Output
from bridge.terminal import columns, visible
from container.environment import EnvironmentProblem, check_built, environments

LOCK_TIMEOUT_S = 3600.0
BUILD_TIMEOUT_S = 24 * 3600.0
FIND_TIMEOUT_S = 300.0


@click.group()
def spack() -> None:
    """Spack environments: lock, build and use them.

    ENVIRONMENT is a name - of a folder in ./spack, of one in a folder that SYGALDRY_SPACK_ENVIRONMENTS names, or of one
    of ours - or a folder with a `spack.yaml`. Spack is that of the standard container, or with --here the one in
    SPACK_ROOT.
    """


@spack.command()
@click.argument("name")
@click.argument("specs", nargs=-1)
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), default=Path("spack"), show_default=True,
    help="Where the environment's folder is made.",
)  # fmt: skip
@click.option("--cuda", is_flag=True, help="With the CUDA and cuDNN of the standard image.")
@json_option
def new(name: str, specs: tuple[str, ...], folder: Path, cuda: bool, as_json: bool) -> None:
    """Make the environment NAME of SPECS, to be edited and locked.

    \b
    orchestrate spack new mine python@3.13 'py-torch~cuda'
    """
    from container.spack_template import create

    try:
        path = create(folder, name, specs, cuda=cuda)
    except EnvironmentProblem as error:
        raise Failure(str(error)) from error
    if as_json:
        Output(as_json=True).print_json({"environment": name, "manifest": str(path.absolute())})
        return
    place = name if folder == Path("spack") else path.parent
    print(f"made {visible(str(path))}\nlock it with: orchestrate spack lock {visible(str(place))}")


@spack.command()
@environment_argument
@click.option("--force", is_flag=True, help="Make the lock anew though there is one.")
@click.option("--fresh", is_flag=True, help="Reuse nothing of what is installed in the store.")
@time_option("--timeout", "timeout_s", default=LOCK_TIMEOUT_S, help="Time limit: 1 h.")
@place_options
@json_option
def lock(environment: str, force: bool, fresh: bool, timeout_s: float, as_json: bool, **place: Any) -> int:
    """Let Spack choose what ENVIRONMENT needs, and keep it as `spack.lock`.

    A lock that is there stays as it is; one that is not of its manifest any more is refused without --force.
    """
    from container.spack_lock import keep
    from container.spack_place import lock_command

    found = environment_of(environment)
    with problems():
        kept = found.lock is not None and not force
        if kept and (reason := found.staleness):
            raise stale(found, reason)
        if not kept:
            site = Site.of(**place)
            options = ["--fresh"] if fresh else []
            command = lock_command(site.place, found, *options)
            code, printed = site.run(command, found, timeout_s=timeout_s, capture=True)
            if code:
                return code
            found = keep(found, printed)
        document = {**described(found), "kept": kept}
    if as_json:
        Output(as_json=True).print_json(document)
    else:
        said = "was locked before" if kept else "is locked"
        count = f"{document['packages']} package{'s' * (document['packages'] != 1)}"
        print(f"`{visible(found.name)}` {said}: {count}, lock {document['lock_hash'][:12]}")
    return 0


@spack.command()
@environment_argument
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- OPTION...]")
@time_option("--timeout", "timeout_s", default=BUILD_TIMEOUT_S, help="Time limit: 24 h.")
@place_options
def build(environment: str, options: tuple[str, ...], timeout_s: float, **place: Any) -> int:
    """Install what ENVIRONMENT has locked, and make its view. Options behind `--` are those of `spack install`.

    Nothing is locked anew. Exit code 0 when all that is wanted is in Spack's database, 1 when the build failed, 2 when
    there is no lock or it is not that of the manifest, 3 without Spack or a container engine, 75 when another build
    uses the store.
    """
    from container.spack_place import build_command

    found = locked(environment)
    site = Site.of(**place)
    return site.run(build_command(site.place, found, *options), found, timeout_s=timeout_s)[0]


@spack.command("find")
@click.argument("environment", metavar="[ENVIRONMENT]", required=False)
@click.option("--all", "show_all", is_flag=True, help="Also what was installed because something else needs it.")
@place_options
@json_option
def find_installed(environment: str | None, show_all: bool, as_json: bool, **place: Any) -> int:
    """List what is installed, of ENVIRONMENT or in the whole store. Exit code 1 when something wanted is missing."""
    from container.spack_place import find_command

    found = environment_of(environment) if environment else None
    with problems():
        wanted = found.roots if found else {}
    site = Site.of(**place)
    code, printed = site.run(find_command(site.place, found), found, timeout_s=FIND_TIMEOUT_S, capture=True)
    if code:
        return code
    packages = _packages(printed)
    hashes = {package["hash"] for package in packages}
    missing = [f"{spec['name']}@{spec['version']}" for key, spec in wanted.items() if key not in hashes]
    if as_json:
        document = described(found) if found is not None else {}
        for package in packages:
            package["wanted"] = package["hash"] in wanted
        document |= {"store": str(site.host_store), "installed": packages, "missing": missing}
        Output(as_json=True).print_json(document)
    else:
        shown = [each for each in packages if show_all or found is None or each["hash"] in wanted]
        rows = [(each["name"], each["version"], each["hash"][:7]) for each in shown]
        print("\n".join(columns(("PACKAGE", "VERSION", "HASH"), rows)))
        if missing:
            print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    return FAILED if missing else 0


@spack.command("list")
@json_option
def list_environments(as_json: bool) -> None:
    """List the environments that are found by name."""
    documents = []
    for environment in environments(FOLDERS):
        try:
            documents.append(described(environment))
        except EnvironmentProblem as error:
            documents.append(undescribed(environment) | {"state": str(error).partition("\n")[0]})
    if as_json:
        Output(as_json=True).print_json(documents)
        return
    rows = [
        (
            each["environment"],
            each["state"],
            str(each["packages"] or ""),
            (each["lock_hash"] or "")[:12],
            each["folder"],
        )
        for each in documents
    ]
    print("\n".join(columns(("ENVIRONMENT", "STATE", "PACKAGES", "LOCK", "FOLDER"), rows)))


@spack.command(context_settings={"allow_interspersed_args": False})
@place_options
@environment_argument
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(environment: str, command: tuple[str, ...], **place: Any) -> None:
    """Open a shell with ENVIRONMENT activated, or run COMMAND as that shell would. It must have been built."""
    found = locked(environment)
    site = Site.of(**place)
    with problems():
        check_built(found, site.host_store)
    site.become(list(command), found)


def _packages(printed: str) -> list[dict[str, Any]]:
    """What `_spack-find.sh` prints, by name."""
    lines = (line.split("\t") for line in printed.splitlines() if line.count("\t") == 3)
    return sorted(
        ({"name": name, "version": version, "hash": key, "prefix": prefix} for name, version, key, prefix in lines),
        key=lambda package: (package["name"], package["version"]),
    )


spack.add_command(autobuild)

COMMANDS: tuple[click.Command, ...] = (spack,)
"""What `orchestrate` adds to its commands."""
