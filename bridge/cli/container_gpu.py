"""`orchestrate container diagnose`: why a GPU can or cannot be used in a container on this machine."""

import json
import os

import click

from bridge.cli.failure import FAILED
from bridge.terminal import safe_json, visible

_COLOURS = {"PASS": "green", "INFO": "cyan", "WARN": "yellow", "FAIL": "red"}


@click.command()
@click.option("--test", is_flag=True, help="Also run a container with all GPUs.")
@click.option("--image", metavar="NAME", help="Image for `--test`; $SYGALDRY_IMAGE or the standard image by default.")
@click.option("--fix", is_flag=True, help="Print the commands that would help. Nothing is run.")
@click.option("--quiet", "-q", is_flag=True, help="Only what is wrong.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def diagnose(test: bool, image: str | None, fix: bool, quiet: bool, as_json: bool) -> int:
    """Say why GPUs can or cannot be used in containers here.

    Looks at the driver, its modules and device nodes, Docker and its NVIDIA runtime, and changes nothing.
    Exit code 0 when nothing is wrong (there may be warnings), 1 when something is.
    """
    from container.finding import document, fixes, has_problems
    from container.gpu import diagnose as look
    from container.gpu_choice import required_cuda
    from container.gpu_test import run_test
    from container.launch import DEFAULT_IMAGE
    from container.machine import ThisMachine

    findings = look(ThisMachine(), required_cuda(os.environ))
    if test:
        findings.append(run_test(os.environ, image or os.environ.get("SYGALDRY_IMAGE") or DEFAULT_IMAGE))
    if as_json:
        click.echo(safe_json(json.dumps(document(findings), indent=2)))
        return FAILED if has_problems(findings) else 0
    for finding in findings:
        if quiet and finding.level in ("PASS", "INFO"):
            continue
        level = click.style(finding.level, fg=_COLOURS[finding.level])
        click.echo(f"{level}  {finding.check:<9} {visible(finding.message)}")
        if finding.hint:
            click.echo(f"                {click.style('hint:', bold=True)} {visible(finding.hint)}")
    if fix:
        commands = fixes(findings) or ["# none: no command can help here"]
        click.echo("\n".join(["", "# nothing was changed; these commands would help:", *commands]))
    if not quiet:
        counts = document(findings)["counts"]
        click.echo(f"\n{counts['FAIL']} wrong, {counts['WARN']} to be looked at, {counts['PASS']} fine")
    return FAILED if has_problems(findings) else 0


VERBS: tuple[click.Command, ...] = (diagnose,)
