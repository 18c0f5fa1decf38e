"""What is asked of the engine as a `docker run` line: the same options as `containers.create` takes, spelt for a shell.

run_options -> docker_run -> argv: shown by a dry run, executed by a launch
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def docker_run(options: Mapping[str, Any], *, interactive: bool, terminal: bool) -> list[str]:
    """The argument list that runs and then removes a container with `options`, as `launch.run_options` makes them.

    `interactive` connects stdin; `terminal` gives the container a terminal as well.
    """
    argv = ["docker", "run", "--rm", "--pull=never"]
    if interactive:
        argv.append("--interactive")
    if terminal:
        # Docker's own keys for leaving take Ctrl-P away from the shell inside.
        argv += ["--tty", "--detach-keys=ctrl-^,ctrl-^"]
    program, *arguments = options["entrypoint"]
    return [*argv, *_flags(options), "--entrypoint", program, options["image"], *arguments, *options["command"]]


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    yield from ("--name", options["name"])
    if options["init"]:
        yield "--init"
    yield from ("--user", options["user"])
    for group in options["group_add"]:
        yield from ("--group-add", group)
    yield from ("--network", options["network_mode"], "--ipc", options["ipc_mode"])
    for port, (address, host_port) in options["ports"].items():
        yield from ("--publish", f"{address}:{host_port}:{port}")
    for request in options["device_requests"]:
        yield from _gpus(request)
    if options["mem_limit"]:
        yield from ("--memory", str(options["mem_limit"]))
    if options["nano_cpus"]:
        yield from ("--cpus", f"{options['nano_cpus'] / 1e9:.9f}".rstrip("0").rstrip("."))
    yield from ("--log-driver", options["log_config"]["Type"])
    yield from ("--workdir", options["working_dir"])
    for mount in options["mounts"]:
        fields = [f"type={mount['Type']}", f"source={mount['Source']}", f"target={mount['Target']}"]
        yield from ("--mount", _comma_separated([*fields, *(["readonly"] if mount["ReadOnly"] else [])]))
    for name, value in options["environment"].items():
        yield from ("--env", f"{name}={value}")
    for name, value in options["labels"].items():
        yield from ("--label", f"{name}={value}")


def _gpus(request: Mapping[str, Any]) -> Iterator[str]:
    if request["Driver"] == "cdi":
        for device in request["DeviceIDs"]:
            yield from ("--device", device)
    elif request["DeviceIDs"]:
        # Docker reads this as a line of comma-separated fields, of which the list is one.
        yield from ("--gpus", _comma_separated([f"device={','.join(request['DeviceIDs'])}"]))
    else:
        yield from ("--gpus", "all" if request["Count"] == -1 else str(request["Count"]))


def _comma_separated(fields: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(fields)
    return line.getvalue()
