"""`orchestrate spack`: with a stand-in for Spack that records its calls, and with the real one that `SPACK_ROOT` names.

There is no Spack on PyPI or in Debian, so CI has none unless its machine does; what needs it says so and skips.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

ORCHESTRATE = str(Path(sys.executable).with_name("orchestrate"))
ENTRYPOINTS = Path(__file__).parent.parent / "container" / "entrypoints"
OURS = ("SPACK_", "SYGALDRY_", "ORCHESTRATE_", "TEMPORAL_")
HASH = "abc123abc123abc123abc123abc12312"

STAND_IN = r"""#!/usr/bin/env bash
# Records its arguments; does what its files say.
me=$(cd "${BASH_SOURCE[0]%/*}/.." && pwd)
printf '%s\n' "$*" >>"$me/calls"
turn() { local code; code=$(head -n 1 "$me/$1" 2>/dev/null); sed -i 1d "$me/$1" 2>/dev/null; return "${code:-0}"; }
while (($#)); do
  case $1 in
    -e) folder=$2; shift ;;
    -c) shift ;;
    concretize) echo '==> Concretized 1 spec'; cp "$me/lock" "$folder/spack.lock"; turn concretize; exit ;;
    install) echo '[+] everything is fine'; if [[ -e $me/gate ]]; then cat "$me/gate"; fi; turn install; exit ;;
    python) turn python; exit ;;
    find) cat "$me/found"; exit ;;
  esac
  shift
done
"""
SPACK_YAML = """
import yaml


def load_config(text):
    return yaml.safe_load(text)


def dump_config(document, stream):
    yaml.safe_dump(document, stream, sort_keys=False)
"""


class Commands:
    """`orchestrate spack` in a folder of the test's own, with an own state directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        self.env = {**kept, "ORCHESTRATE_HOME": str(folder / "home"), "HOME": str(folder)}

    def start(self, *arguments: object, **env: str) -> "subprocess.Popen[str]":
        argv = [ORCHESTRATE, *map(str, arguments)]
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(argv, cwd=self.folder, env={**self.env, **env}, text=True, **pipes)

    def run(self, *arguments: object, timeout_s: float = 240, **env: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments, **env)
        output, errors = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def spack(self, *arguments: object, **env: str) -> "subprocess.CompletedProcess[str]":
        return self.run("spack", *arguments, **env)


class StandIn:
    """A `SPACK_ROOT` without Spack in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "spack").write_text(STAND_IN)
        (folder / "bin" / "spack").chmod(0o755)
        package = folder / "lib" / "spack" / "spack" / "util"
        package.mkdir(parents=True)
        (package / "spack_yaml.py").write_text(SPACK_YAML)
        lock = {
            "_meta": {"lockfile-version": 6},
            "roots": [{"hash": HASH, "spec": "greeting"}],
            "concrete_specs": {HASH: {"name": "greeting", "version": "1.0", "hash": HASH}},
        }
        (folder / "lock").write_text(json.dumps(lock))
        (folder / "found").write_text(f"greeting\t1.0\t{HASH}\t/store/greeting\n")

    def calls(self) -> list[str]:
        """Arguments of each call."""
        return (self.folder / "calls").read_text().splitlines()

    def will(self, verb: str, *codes: int) -> None:
        """Exit codes of the next calls of `verb`; 0 after them."""
        (self.folder / verb).write_text("".join(f"{code}\n" for code in codes))


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    yield made
    made.run("down")


@pytest.fixture
def stand_in(commands: Commands) -> StandIn:
    """In use, with an environment `greeting` in ./spack, not locked."""
    made = StandIn(commands.folder / "spack_root")
    commands.env |= {
        "SPACK_ROOT": str(made.folder),
        "SYGALDRY_SPACK_STORE": str(commands.folder / "store"),
        "SPACK_PYTHON": sys.executable,
    }
    assert commands.spack("new", "greeting", "greeting").returncode == 0
    return made


@pytest.fixture
def locked(commands: Commands, stand_in: StandIn) -> StandIn:
    """The same, locked."""
    assert commands.spack("lock", "greeting", "--here").returncode == 0
    return stand_in


def test_new_makes_an_environment_that_the_other_verbs_find(commands: Commands) -> None:
    made = commands.spack("new", "mine", "python@3.13", "py-torch~cuda", "--cuda")
    assert made.stdout == "made spack/mine/spack.yaml\nlock it with: orchestrate spack lock mine\n"
    assert commands.spack("new", "mine").returncode == 2
    listed = {each["environment"]: each for each in json.loads(commands.spack("list", "--json").stdout)}
    assert listed["mine"]["state"] == "not locked" and listed["mine"]["wanted"] == ["python@3.13", "py-torch~cuda"]
    assert listed["zephyr"]["state"] == "locked" and listed["zephyr"]["packages"] == 270 and listed["zephyr"]["cuda"]
    shown = commands.spack("list").stdout.splitlines()
    assert shown[3].split() == ["mine", "not", "locked", str(commands.folder / "spack" / "mine")]
    (commands.folder / "spack" / "mine" / "spack.yaml").write_text("[")
    assert "cannot be read" in commands.spack("list").stdout
    assert shown[0].split() == ["ENVIRONMENT", "STATE", "PACKAGES", "LOCK", "FOLDER"] and len(shown) == 6


def test_what_cannot_be_done_is_said_before_anything_is_started(commands: Commands, tmp_path: Path) -> None:
    commands.spack("new", "mine", "python")

    def refused(*arguments: object, code: int, **env: str) -> str:
        done = commands.spack(*arguments, **env)
        assert done.returncode == code and done.stdout == "", done
        assert done.stderr.startswith("error: ") and "\n\nhint: " in done.stderr and done.stderr.count("\n") < 6
        return done.stderr

    no_lock = "environment `mine` has no lock: there is no"
    for verb in ("build", "shell", "autobuild", "find"):
        assert no_lock in refused(verb, "mine", code=2, SPACK_ROOT="/nowhere")
    assert "no Spack environment `minne`" in refused("build", "minne", code=2)
    assert "`SPACK_ROOT` is not set" in refused("lock", "mine", "--here", code=3)
    assert "holds no Spack" in commands.spack("lock", "mine", "--here", SPACK_ROOT=str(tmp_path)).stderr
    assert "no Docker Engine answers" in refused("lock", "mine", code=3, DOCKER_HOST=f"unix://{tmp_path}/none")
    assert "is not built in the store" in refused("shell", "--store", tmp_path / "empty", "cpu", code=2)
    assert "mean nothing" in refused("lock", "mine", "--here", "--image", "x", code=2)
    StandIn(tmp_path / "s")
    if os.getuid():
        read_only = {"SPACK_ROOT": str(tmp_path / "s"), "SYGALDRY_SPACK_STORE": "/proc/store"}
        assert "cannot be written" in refused("build", "cpu", "--here", code=3, **read_only)
    assert not (tmp_path / "home").exists()


def test_a_lock_is_made_once_and_anew_only_when_told_so(commands: Commands, stand_in: StandIn) -> None:
    first = commands.spack("lock", "greeting", "--here", "--json")
    assert "Concretized" in first.stderr and json.loads(first.stdout)["kept"] is False
    (call,) = stand_in.calls()
    assert call.endswith("/greeting concretize --force") and not call.startswith(f"-e {commands.folder}/spack")
    again = json.loads(commands.spack("lock", "greeting", "--here", "--json").stdout)
    assert again["kept"] is True and again["lock_hash"] == json.loads(first.stdout)["lock_hash"]
    assert len(stand_in.calls()) == 1
    manifest = commands.folder / "spack" / "greeting" / "spack.yaml"
    manifest.write_text(manifest.read_text().replace("x86_64_v3", "x86_64_v2"))
    for verb in ("lock", "build"):
        stale = commands.spack(verb, "greeting", "--here")
        assert stale.returncode == 2 and "is stale: `spack.yaml` was changed" in stale.stderr
        assert "hint: `orchestrate spack lock greeting --force`" in stale.stderr
    assert len(stand_in.calls()) == 1
    assert commands.spack("lock", "greeting", "--here", "--force", "--fresh").returncode == 0
    assert stand_in.calls()[1].endswith("concretize --force --fresh")
    assert commands.spack("build", "greeting", "--here").returncode == 0
    assert not any(path.name.startswith(".spack-env") for path in manifest.parent.iterdir())


def test_a_failed_concretization_keeps_the_lock_that_is_there(commands: Commands, locked: StandIn) -> None:
    lock = commands.folder / "spack" / "greeting" / "spack.lock"
    before = lock.read_text()
    locked.will("concretize", 1)
    assert commands.spack("lock", "greeting", "--here", "--force").returncode == 1
    assert lock.read_text() == before


def test_a_build_has_succeeded_when_spack_and_its_database_say_so(commands: Commands, locked: StandIn) -> None:
    built = commands.folder / "store" / "environments" / "greeting" / "built.lock"
    locked.will("install", 1)
    failed = commands.spack("build", "greeting", "--here")
    # What a log says is no proof.
    assert failed.returncode == 1 and "everything is fine" in failed.stdout and not built.exists()
    locked.will("python", 1)
    assert commands.spack("build", "greeting", "--here").returncode == 1 and not built.exists()
    assert commands.spack("build", "greeting", "--heer").returncode == 2
    done = commands.spack("build", "greeting", "--here", "--", "-j", "3")
    assert done.returncode == 0 and built.exists()
    assert locked.calls()[-2].endswith("install --only-concrete --show-log-on-error -j 3")
    assert locked.calls()[-1].endswith("_missing_roots.py") and not any(
        "concretize" in call for call in locked.calls()[1:]
    )
    copy = yaml.safe_load((built.parent / "spack.yaml").read_text())["spack"]
    assert copy["config"]["install_tree"]["root"] == str(commands.folder / "store")
    assert copy["view"]["greeting"]["root"] == str(commands.folder / "store" / "views" / "greeting")
    shell = commands.spack("shell", "--here", "greeting", "printenv", "SYGALDRY_SPACK_ENVIRONMENT")
    assert shell.returncode == 0 and shell.stdout == "greeting\n"


def test_the_packages_that_are_here_stand_in_for_the_repository(commands: Commands, locked: StandIn) -> None:
    builtin = commands.folder / "packages" / "repos" / "spack_repo" / "builtin"
    builtin.mkdir(parents=True)
    env = {"SYGALDRY_SPACK_PACKAGES": str(commands.folder / "packages")}
    manifest = commands.folder / "spack" / "greeting" / "spack.yaml"
    manifest.write_text(manifest.read_text().replace("  repos:\n", "  repos:\n    own: repo\n"))
    assert commands.spack("lock", "greeting", "--here", "--force", **env).returncode == 0
    assert commands.spack("build", "greeting", "--here", **env).returncode == 0
    copy = yaml.safe_load((commands.folder / "store" / "environments" / "greeting" / "spack.yaml").read_text())
    assert copy["spack"]["repos"] == {"own": str(manifest.parent / "repo"), "builtin": str(builtin)}


def test_what_is_installed_is_listed_and_what_is_missing_is_an_error(commands: Commands, locked: StandIn) -> None:
    never_built = commands.spack("find", "greeting", "--here")
    assert never_built.returncode == 1 and "not installed: greeting@1.0" in never_built.stderr
    commands.spack("build", "greeting", "--here")
    assert commands.spack("find", "greeting", "--here").stdout.split() == [
        "PACKAGE", "VERSION", "HASH", "greeting", "1.0", "abc123a",
    ]  # fmt: skip
    with (locked.folder / "found").open("a") as file:
        file.write("zlib\t1.3\tdef\t/store/zlib\n")
    document = json.loads(commands.spack("find", "greeting", "--here", "--json").stdout)
    assert [(each["name"], each["wanted"]) for each in document["installed"]] == [("greeting", True), ("zlib", False)]
    assert document["missing"] == [] and document["store"] == str(commands.folder / "store")
    assert len(commands.spack("find", "greeting", "--here", "--all").stdout.splitlines()) == 3
    (locked.folder / "found").write_text("==> 1 package\nzlib\t1.3\tdef\t/store/zlib\n")
    assert commands.spack("find", "greeting", "--here").returncode == 1
    everything = commands.spack("find", "--here", "--json")
    assert everything.returncode == 0 and [each["name"] for each in json.loads(everything.stdout)["installed"]] == [
        "zlib"
    ]


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    """Wait until `condition()` is true."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def test_one_build_at_a_time_uses_a_store_and_who_ends_it_ends_all(commands: Commands, locked: StandIn) -> None:
    gate = locked.folder / "gate"
    os.mkfifo(gate)
    first = commands.start("spack", "build", "greeting", "--here")
    until(lambda: any(" install " in call for call in locked.calls()))
    second = commands.spack("build", "greeting", "--here")
    assert second.returncode == 75 and "another build holds the store" in second.stderr
    assert "greeting on " in second.stderr
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
    gate.unlink()
    assert commands.spack("build", "greeting", "--here").returncode == 0


def test_an_autobuild_tries_again_and_then_verifies(commands: Commands, locked: StandIn) -> None:
    locked.will("install", 1)
    view = commands.folder / "store" / "views" / "greeting" / "bin"
    view.mkdir(parents=True)
    (view / "greet").touch()
    done = commands.spack("autobuild", "greeting", "--here", "--tries", "2", "--pause", "0", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    build, verify = report["steps"]
    assert [each["outcome"] for each in build["attempts"]] == ["failed", "succeeded"]
    assert verify["outcome"] == "succeeded" and "views/greeting: 0 Python packages" in verify["stdout_tail"]
    (view / "greet").unlink()
    locked.will("install", 3, 3, 3)
    failed = json.loads(
        commands.spack("autobuild", "greeting", "--here", "--tries", "2", "--pause", "0", "--json").stdout
    )
    assert [(step["outcome"], len(step["attempts"])) for step in failed["steps"]] == [("failed", 2), ("skipped", 0)]
    assert failed["steps"][0]["exit_code"] == 3


def test_specs_are_installed_into_the_store_and_no_shell_waits_where_nobody_types(
    commands: Commands, stand_in: StandIn
) -> None:
    argv = ["bash", str(ENTRYPOINTS / "spack-install.sh")]
    options: dict[str, Any] = {"env": commands.env, "capture_output": True, "text": True, "timeout": 60}
    assert subprocess.run(argv, **options).returncode == 2
    done = subprocess.run([*argv, "zlib@1.3", "+shared"], stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0 and stand_in.calls()[0].endswith(" install zlib@1.3 +shared")
    assert f"-c config:install_tree:root:{commands.folder / 'store'}" in stand_in.calls()[0]
    stand_in.will("install", 4)
    assert subprocess.run([*argv, "zlib"], stdin=subprocess.DEVNULL, **options).returncode == 4
    nowhere = {**options, "env": {**commands.env, "SPACK_ROOT": "/nowhere"}}
    without = subprocess.run([*argv, "zlib"], **nowhere)
    assert without.returncode == 1 and "there is no Spack here" in without.stderr


PACKAGE = '''
import os

from spack.package import *


class Greeting(Package):
    """Says hello."""

    url = f"file://{os.path.dirname(__file__)}/greeting-1.0.tar.gz"
    version("1.0", sha256="SHA256")

    def install(self, spec, prefix):
        mkdirp(prefix.bin)
        install("greet", prefix.bin)
'''
MANIFEST = """
spack:
  specs:
  - greeting
  concretizer:
    reuse: false
    targets: {granularity: generic}
  repos::
    greetings: spack_repo/greetings
    builtin_mock: $spack/var/spack/test_repos/spack_repo/builtin_mock
  packages:
    all:
      require:
      - target=x86_64
    gcc:
      externals:
      - spec: gcc@12.2.0 languages:='c,c++,fortran'
        prefix: /usr
        extra_attributes:
          compilers: {c: /usr/bin/gcc, cxx: /usr/bin/g++, fortran: /usr/bin/gfortran}
      buildable: false
"""


@pytest.fixture
def real_spack(commands: Commands) -> Path:
    """The Spack on this machine, with an environment `greeting` in ./spack: one package from a repository beside it."""
    root = os.environ.get("SPACK_ROOT", "")
    if not (Path(root) / "bin" / "spack").is_file():
        pytest.skip("there is no Spack on this machine: SPACK_ROOT names no checkout")
    folder = commands.folder / "spack" / "greeting"
    package = folder / "spack_repo" / "greetings" / "packages" / "greeting"
    package.mkdir(parents=True)
    program = commands.folder / "greeting-1.0" / "greet"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho hello from spack\n")
    program.chmod(0o755)
    with tarfile.open(package / "greeting-1.0.tar.gz", "w:gz") as archive:
        archive.add(program.parent, "greeting-1.0")
    digest = sha256((package / "greeting-1.0.tar.gz").read_bytes()).hexdigest()
    (package / "package.py").write_text(PACKAGE.replace("SHA256", digest))
    (package.parent.parent / "repo.yaml").write_text("repo:\n  namespace: greetings\n  api: v2.2\n")
    (folder / "spack.yaml").write_text(MANIFEST)
    commands.env |= {"SPACK_ROOT": root, "SPACK_PYTHON": sys.executable}
    # Here, and for the worker that autobuild's steps run in.
    commands.env["SPACK_DISABLE_LOCAL_CONFIG"] = "1"
    return Path(root)


PLAN = """
name: greet
steps:
  - id: greet
    type: container_job
    cache: true
    container_job:
      image: {image}
      command: greet && command -v greet
      environment: greeting
      mounts: ["{mount}"]
"""


@pytest.mark.docker
@pytest.mark.timeout(900)
def test_a_package_is_locked_built_from_its_source_and_used_in_a_container_by_a_step(
    commands: Commands, real_spack: Path, small_image: str
) -> None:
    store = commands.folder / "root" / "spack_store"
    commands.env |= {"SYGALDRY_CONTAINER_ROOT": str(commands.folder / "root"), "SYGALDRY_SPACK_STORE": str(store)}
    plan = commands.folder / "greet.yaml"
    # Prefixes are those of this machine, so the container sees the store at the same place.
    plan.write_text(PLAN.format(image=small_image, mount=f"{store}:{store}:ro"))
    done = commands.spack("lock", "greeting", "--here")
    assert done.returncode == 0, done.stderr
    refused = commands.run(plan, "--json")
    assert refused.returncode == 1 and "is not built in the store" in json.loads(refused.stdout)["steps"][0]["error"]

    done = commands.spack("build", "greeting", "--here")
    assert done.returncode == 0 and "1 of 1 roots are in Spack's database" in done.stdout, done.stderr
    found = json.loads(commands.spack("find", "greeting", "--here", "--json").stdout)
    (package,) = found["installed"]
    assert package["wanted"] and found["missing"] == [] and (Path(package["prefix"]) / "bin" / "greet").is_file()
    assert commands.spack("shell", "--here", "greeting", "greet").stdout == "hello from spack\n"

    used = commands.run(plan, "--json")
    (step,) = json.loads(used.stdout)["steps"]
    assert (
        used.returncode == 0 and step["stdout_tail"] == "hello from spack\n/opt/spack_store/views/greeting/bin/greet\n"
    )
    assert json.loads(commands.run(plan, "--json").stdout)["steps"][0]["reason"] == "cached"

    # Another program of the same name and version is another lock: the step runs again, once it is built.
    file = commands.folder / "spack" / "greeting" / "spack_repo" / "greetings" / "packages" / "greeting" / "package.py"
    file.write_text(file.read_text().replace('install("greet"', 'touch(prefix.new)\n        install("greet"'))
    assert commands.spack("lock", "greeting", "--here", "--force").returncode == 0
    explained = {each["field"] for each in json.loads(commands.run("explain", plan, "greet", "--json").stdout)}
    assert explained == {"identities.environment"}
    stale = json.loads(commands.run(plan, "--json").stdout)["steps"][0]["error"]
    assert "was built from the lock" in stale and "orchestrate spack build greeting" in stale
    built = commands.spack("autobuild", "greeting", "--here", "--tries", "1", "--json")
    assert built.returncode == 0, built.stderr
    again = json.loads(commands.run(plan, "--json").stdout)["steps"][0]
    assert again["outcome"] == "succeeded" and again["reason"] != "cached"


@pytest.mark.docker
@pytest.mark.timeout(900)
def test_the_standard_container_locks_builds_and_verifies(
    commands: Commands, real_spack: Path, ray_image: str, small_image: str
) -> None:
    commands.env["SYGALDRY_CONTAINER_ROOT"] = str(commands.folder / "root")
    options = ["--image", ray_image, "--mount", f"{real_spack}:/opt/spack_src:ro"]
    done = commands.spack("lock", "greeting", *options)
    assert done.returncode == 0, done.stderr
    built = commands.spack("autobuild", "greeting", *options, "--tries", "1", "--json")
    assert built.returncode == 0, built.stderr
    plan = commands.folder / "greet.yaml"
    plan.write_text(PLAN.format(image=small_image, mount=f"{commands.folder}:/data:ro"))
    used = commands.run(plan, "--json")
    assert json.loads(used.stdout)["steps"][0]["stdout_tail"].startswith("hello from spack\n"), used.stderr
    found = commands.spack("find", "greeting", *options)
    assert found.returncode == 0 and "greeting  1.0" in found.stdout
