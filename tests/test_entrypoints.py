"""The entrypoints, run inside real containers as a launch would run them."""

import json
import os
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from container.mounts import ENTRYPOINTS

pytestmark = pytest.mark.docker
FOLDER = Path(__file__).parent.parent / "container" / "entrypoints"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(docker_engine: Any, tmp_path: Path) -> Iterator[Run]:
    """Runs an entrypoint, or a command, in a container whose /workspace is the test's folder; waits for its end."""
    from docker.types import Mount

    started = []

    def run(
        image: str, argv: list[str], env: dict[str, str] | None = None, mounts: dict[str, Path] | None = None
    ) -> Ended:
        program, *rest = argv
        command = ["bash", f"{ENTRYPOINTS}/{program}.sh", *rest] if (FOLDER / f"{program}.sh").exists() else argv
        binds = {"/workspace": tmp_path, ENTRYPOINTS: FOLDER, **(mounts or {})}
        container = docker_engine.containers.create(
            image,
            entrypoint=[],
            command=command,
            environment={"HOME": "/workspace", **(env or {})},
            mounts=[
                Mount(goal, str(source), type="bind", read_only=goal == ENTRYPOINTS) for goal, source in binds.items()
            ],
            user=f"{os.getuid()}:{os.getgid()}",
            working_dir="/workspace",
            network_mode="host",
            init=True,
            labels={"orchestrate.key": "test"},
        )
        started.append(container)
        container.start()
        code = container.wait(timeout=200)["StatusCode"]
        out, err = (container.logs(stdout=one, stderr=not one).decode() for one in (True, False))
        return Ended(code, out, err)

    yield run
    for container in started:
        container.remove(force=True, v=True)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def view(store: Path, name: str) -> Path:
    """A view as an environment's build leaves it, with one program."""
    folder = store / "views" / name
    executable(folder / "bin" / "only-in-view", f"#!/bin/sh\necho of {name}\n")
    return folder


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["echo a  'b c'"], "a b c\n"),
        (["printf '%s|' \"$HOME\" x; exit 0"], "/workspace|x|"),
        (["printf", "%s|", "a b", "$HOME", ""], "a b|$HOME||"),
        (["./a program"], "found\n"),
    ],
)
def test_run_job_takes_a_command_line_or_arguments(run: Run, small_image: str, tmp_path: Path, argv, said) -> None:
    executable(tmp_path / "a program", "#!/bin/sh\necho found\n")
    assert run(small_image, ["run-job", *argv]) == (0, said, "")


def test_run_job_keeps_the_exit_code_and_wants_a_program(run: Run, small_image: str) -> None:
    assert run(small_image, ["run-job", "exit 7"]).code == 7
    assert run(small_image, ["run-job", "bash", "-c", "exit 9"]).code == 9
    assert run(small_image, ["run-job", "no-such-program"]).code == 127
    code, _, said = run(small_image, ["run-job"])
    assert code == 2 and "got no program" in said


def test_the_named_environment_is_on_the_path(run: Run, small_image: str, tmp_path: Path) -> None:
    folder = view(tmp_path / "store", "tools")
    mounts = {"/opt/spack_store": tmp_path / "store"}
    named = {"SYGALDRY_SPACK_ENVIRONMENT": "tools"}
    command = 'only-in-view; echo "$CMAKE_PREFIX_PATH"'
    place = f"/opt/spack_store/views/{folder.name}"
    assert run(small_image, ["run-job", command], named, mounts) == (0, f"of tools\n{place}\n", "")
    assert run(small_image, ["default", "only-in-view"], named, mounts).out == "of tools\n"
    missing = run(small_image, ["run-job", "echo never"], {"SYGALDRY_SPACK_ENVIRONMENT": "nope"}, mounts)
    assert missing.code == 1 and missing.out == ""
    assert "`nope` is not built" in missing.err and "orchestrate spack build nope" in missing.err


SESSION = """
type -t spack-env-activate gpu-test jax-test
spack-env-activate tools && only-in-view
spack-env-activate nope || echo refused
gpu-test --timeout 20; echo gpu-test=$?
jax-test --timeout 20; echo jax-test=$?
echo own=$OWN $-
exit 5
"""


def test_the_interactive_shell_has_its_commands(run: Run, ray_image: str, tmp_path: Path) -> None:
    """Once typed at a terminal, once from a pipe."""
    view(tmp_path / "store", "tools")
    (tmp_path / ".bashrc").write_text("OWN=mine\n")
    (tmp_path / "session").write_text(SESSION)
    shell = f"bash {ENTRYPOINTS}/default.sh"
    for command in (f"script -qec {shlex.quote(shell)} /dev/null < session", f"{shell} < session"):
        code, said, _ = run(ray_image, ["bash", "-c", command], mounts={"/opt/spack_store": tmp_path / "store"})
        lines = said.replace("\r", "").splitlines()
        assert code == 5, said
        assert lines.count("function") == 3 and "of tools" in lines and "refused" in lines, said
        assert "gpu-test=1" in lines and "jax-test=1" in lines, said
        assert any("torch" in line and "not installed" in line for line in lines), said
        assert any(line.startswith("own=mine") and "i" in line.partition(" ")[2] for line in lines), said
        assert any("Standard container" in line for line in lines), said


def test_default_runs_a_program_with_the_secrets(run: Run, small_image: str, tmp_path: Path) -> None:
    (tmp_path / "secrets").write_bytes(b"TOKEN=two\nlines\0")
    mounts = {"/run/sygaldry/secrets": tmp_path / "secrets"}
    assert run(small_image, ["default", "bash", "-c", 'echo "$TOKEN"; exit 4'], mounts=mounts) == (
        4,
        "two\nlines\n",
        "",
    )


NVIDIA_SMI = """#!/bin/bash
if [[ $1 == --query-gpu=* ]]; then
  echo "0, NVIDIA H100, GPU-11, 575.57, 81559, 9.0"
  echo "1, NVIDIA H100, GPU-22, 575.57, 81559, 9.0"
else
  echo "| NVIDIA-SMI 575.57   Driver Version: 575.57   CUDA Version: 12.9 |"
fi
"""
TORCH = """
__version__ = "2.9.0"
class version: cuda = "12.9"
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_device_name = staticmethod(lambda index: f"H100 number {index}")
class ones:
    def __init__(self, rows, columns, device): self.total = rows * columns * columns
    def __matmul__(self, other): return self
    def sum(self): return self
    def item(self): return float(self.total) + OFF
OFF = 0
"""
JAX = """
__version__ = "0.7.0"
class Device: device_kind = "H100"
def devices(kind): return [Device()]
def device_put(value, device): return value
class numpy:
    class ones:
        def __init__(self, shape): pass
        def __matmul__(self, other): return self
        def sum(self): return 64.0**3
"""


@pytest.fixture
def gpu_machine(tmp_path: Path) -> dict[str, str]:
    """Stand-ins for a driver with two GPUs, torch and JAX; the environment in which a container finds them."""
    executable(tmp_path / "driver" / "nvidia-smi", NVIDIA_SMI)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "torch.py").write_text(TORCH)
    (tmp_path / "modules" / "jax.py").write_text(JAX)
    path = "/workspace/driver:/opt/sygaldry/python/bin:/usr/bin:/bin"
    return {"PATH": path, "PYTHONPATH": "/workspace/modules"}


def test_verify_gpu_passes_where_both_compute(run: Run, ray_image: str, gpu_machine, tmp_path: Path) -> None:
    code, said, errors = run(ray_image, ["verify-gpu", "--report", "deep/report.json"], gpu_machine)
    report = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert (code, errors) == (0, "") and "all is well" in said and "computes on 2 GPU(s)" in said
    assert report["ok"] is True and report["problems"] == []
    assert report["driver"] == {"version": "575.57", "cuda": "12.9"}
    assert [(gpu["index"], gpu["uuid"], gpu["memory_mib"]) for gpu in report["gpus"]] == [
        (0, "GPU-11", 81559),
        (1, "GPU-22", 81559),
    ]
    assert report["frameworks"]["torch"]["devices"] == ["H100 number 0", "H100 number 1"]
    assert report["frameworks"]["jax"]["version"] == "0.7.0"


def test_verify_gpu_fails_without_a_gpu(run: Run, ray_image: str) -> None:
    """The true case on a machine without one: no driver, no torch, no JAX."""
    code, said, _ = run(ray_image, ["verify-gpu", "--json"])
    report = json.loads(said)
    assert code == 1 and report["ok"] is False and report["gpus"] == []
    assert "there is no GPU" in report["problems"][0]
    assert {name: found["installed"] for name, found in report["frameworks"].items()} == {"torch": False, "jax": False}


def test_verify_gpu_reports_an_environment_that_is_not_built(run: Run, ray_image: str, gpu_machine) -> None:
    code, said, _ = run(ray_image, ["verify-gpu", "--json"], {**gpu_machine, "SYGALDRY_SPACK_ENVIRONMENT": "nope"})
    report = json.loads(said)
    assert code == 1 and report["problems"] == ["the Spack environment nope cannot be activated"]
    assert report["frameworks"]["torch"]["usable"] is True


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (("torch.py", "OFF = 0", "OFF = 1"), "torch: RuntimeError: a product computed on cuda:0 is wrong"),
        (("torch.py", "lambda: True", "lambda: False"), "torch: RuntimeError: torch sees no GPU"),
        (("torch.py", '__version__ = "2.9.0"', "import os; os._exit(9)"), "torch: the check ended with 9"),
        (("torch.py", '__version__ = "2.9.0"', "import time; time.sleep(600)"), "torch: no answer within 5 s"),
        (("jax.py", "return [Device()]", "raise RuntimeError('no backend gpu')"), "jax: RuntimeError: no backend gpu"),
        (("../driver/nvidia-smi", "#!/bin/bash", "#!/bin/bash\necho no driver >&2; exit 9"), "ended with 9: no driver"),
    ],
)
def test_verify_gpu_fails_when_one_cannot_compute(
    run: Run, ray_image: str, gpu_machine, tmp_path: Path, change, problem
) -> None:
    file, old, new = change
    path = tmp_path / "modules" / file
    path.write_text(path.read_text().replace(old, new))
    code, said, _ = run(ray_image, ["verify-gpu", "--json", "--timeout", "5"], gpu_machine)
    report = json.loads(said)
    assert code == 1 and problem in "\n".join(report["problems"]), report


def test_verify_gpu_asks_only_for_what_is_named(run: Run, ray_image: str, gpu_machine, tmp_path: Path) -> None:
    (tmp_path / "modules" / "jax.py").unlink()
    assert run(ray_image, ["verify-gpu", "--frameworks", "torch"], gpu_machine).code == 0
    assert run(ray_image, ["verify-gpu"], gpu_machine).code == 1
    assert run(ray_image, ["verify-gpu", "--frameworks", "tensorflow"], gpu_machine).code == 2


def test_verify_gpu_takes_nothing_of_the_current_folder(run: Run, ray_image: str, gpu_machine, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('a folder of the repository')\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('a file of the repository')\n")
    (tmp_path / "modules" / "jax.py").rename(tmp_path / "jax.py")
    code, said, _ = run(ray_image, ["verify-gpu", "--json"], gpu_machine)
    found = json.loads(said)["frameworks"]
    assert code == 1 and found["torch"]["usable"] is True
    assert found["jax"]["installed"] is False and found["jax"]["error"].startswith("not installed in ")


COMMIT = "5f91d94bd9cd7190a9f3216ff93cd1dd95f2c7be"


class Hub:
    """A Hugging Face hub with a model of one file, `owner/tiny`, and a dataset of one, `owner/rows`."""

    files = {
        "owner/tiny": ("config.json", b'{"model_type": "tiny"}'),
        "owner/rows": ("train.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
    }

    def __init__(self, serve: Callable[..., str]) -> None:
        self.tokens: list[str | None] = []
        self.url = serve(self.answer)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.tokens.append(request.headers.get("Authorization"))
        request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        found = re.fullmatch(r"(?:/api/(models|datasets)|/datasets)?/(owner/[^/]+)(?:/([\w-]+)(/.*)?)?", path)
        if found is None or found[2] not in self.files:
            self.send(request, 404, b"{}", "RepoNotFound")
            return
        name, content = self.files[found[2]]
        if found[3] == "resolve" and path.endswith(f"/{name}"):
            self.send(request, 200, content)
        elif found[3] == "resolve":
            self.send(request, 404, b"", "EntryNotFound")
        elif found[3] in ("tree", "paths-info"):
            self.send(request, 200, json.dumps([{"type": "file", "path": name, "size": len(content), "oid": "1" * 40}]))
        else:
            self.send(request, 200, json.dumps({"id": found[2], "sha": COMMIT, "siblings": [{"rfilename": name}]}))

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes | str, error: str = "") -> None:
        body = body.encode() if isinstance(body, str) else body
        request.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
        for name, value in {**headers, "ETag": f'"{len(body)}"', "X-Error-Code": error}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def test_hf_download_fills_the_cache_where_look_ups_find_it(
    run: Run, ray_image: str, http_site, tmp_path: Path
) -> None:
    hub = Hub(http_site)
    mounts = {"/opt/bazel_cache": tmp_path / "bazel", "/opt/hf_cache": tmp_path / "hf"}
    for folder in mounts.values():
        folder.mkdir()
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "t0ken-value", "HF_HUB_DISABLE_XET": "1"}
    code, said, errors = run(ray_image, ["hf-download", "model", "owner/tiny"], env, mounts)
    assert code == 0, errors
    folder = said.strip().splitlines()[-1]
    assert folder == f"/opt/hf_cache/hub/models--owner--tiny/snapshots/{COMMIT}"
    assert "Bearer t0ken-value" in hub.tokens
    (venv,) = [path for path in (tmp_path / "bazel" / "uv_venvs" / "hf-download").iterdir() if path.is_dir()]
    made = venv.stat().st_mtime_ns

    # Found without a hub by a look-up that knows only HF_HOME.
    program = "from huggingface_hub import hf_hub_download as f; print(open(f('owner/tiny', 'config.json')).read())"
    offline = {"HF_HUB_OFFLINE": "1"}
    assert run(ray_image, ["python3", "-c", program], offline, mounts).out.strip() == '{"model_type": "tiny"}'

    code, said, errors = run(ray_image, ["hf-download", "dataset", "owner/rows"], env, mounts)
    assert code == 0 and said.strip().endswith(f"/hub/datasets--owner--rows/snapshots/{COMMIT}"), errors
    code, said, errors = run(ray_image, ["hf-download", "dataset", "owner/rows", "default", "train"], env, mounts)
    assert code == 0 and said.strip().splitlines()[-1].startswith("/opt/hf_cache/datasets/owner___rows/"), errors
    program = "from datasets import load_dataset as f; print(f('owner/rows', split='train')[1]['text'])"
    python = f"/opt/bazel_cache/{venv.relative_to(tmp_path / 'bazel')}/bin/python"
    assert run(ray_image, [python, "-c", program], offline, mounts).out.strip() == "two"
    # A quote in an id is only a strange id.
    code, _, errors = run(
        ray_image, ["hf-download", "model", "x'); import os; os.mkdir('/workspace/hacked"], env, mounts
    )
    assert code == 1 and "HFValidationError" in errors and not (tmp_path / "hacked").exists()
    code, _, errors = run(ray_image, ["hf-download", "model", "owner/missing"], env, mounts)
    assert code == 1 and "cannot be had" in errors and "hint:" in errors and "Traceback" not in errors
    assert venv.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    "words", [[], ["model"], ["owner/tiny"], ["model", "a/b", "c"], ["dataset", "a/b", "c", "d", "e"], ["--revision"]]
)
def test_hf_download_tells_its_usage(run: Run, small_image: str, words: list[str]) -> None:
    code, said, errors = run(small_image, ["hf-download", *words])
    assert (code, said) == (2, "") and "wanted: [--revision REVISION] model ID |" in errors


def wheel(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """A package of one module that knows its version."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{module}.py", f"version = '{version}'\n")
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_uv_install_never_hides_the_torch_of_the_view(run: Run, ray_image: str, tmp_path: Path) -> None:
    """A view with a torch, and an index whose torch is newer and whose helper also wants a wheel of CUDA."""
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "torch", "9.9.0")
    wheel(tmp_path / "wheels", "nvidia-cudnn-cu12", "9.1.0")
    wheel(tmp_path / "wheels", "helper", "1.0", ("torch>=2", "nvidia-cudnn-cu12"))
    wheel(tmp_path / "wheels", "greedy", "1.0", ("torch>=3",))
    folder = view(tmp_path / "store", "standin")
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "torch-2.9.0.dist-info").mkdir(parents=True)
    (packages / "torch-2.9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    (packages / "torch.py").write_text("version = 'of the view'\n")
    (folder / "bin" / "python3").symlink_to("/usr/bin/python3")
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    mounts = {"/opt/spack_store": tmp_path / "store"}
    env = {"SYGALDRY_SPACK_ENVIRONMENT": "standin", "UV_OFFLINE": "1"}

    def install(*words: str) -> Ended:
        return run(ray_image, ["uv-install", *words, "--no-index", "--find-links", "wheels"], env, mounts)

    def versions() -> str:
        program = "import helper, torch; print(helper.version, torch.version)"
        return run(ray_image, ["run-job", ".venv/bin/python", "-c", program], env, mounts).out.strip()

    done = install("helper", "torch>=2.5")
    assert done.code == 0 and "left out nvidia-cudnn-cu12" in done.err, done.err
    assert versions() == "1.0 of the view"
    for words, problem in (
        (["torch==9.9.0"], "you want torch==9.9.0, the view has 2.9.0"),
        (["greedy"], "greedy wants torch>=3, the view has 2.9.0"),
        (["no-such-package"], "above is what uv said"),
    ):
        done = install(*words)
        assert done.code == 1 and problem in done.err and "Traceback" not in done.err, done.err
    installed = sorted(path.name for path in (tmp_path / ".venv").glob("lib/*/site-packages/*.dist-info"))
    assert installed == ["helper-1.0.dist-info"] and versions() == "1.0 of the view"
    run(ray_image, ["python3", "-m", "venv", "--without-pip", "foreign"])
    assert "was not made by uv-install" in install("--venv", "foreign", "helper").err
    assert not list((tmp_path / "foreign").glob("lib/*/site-packages/helper*"))
    assert run(ray_image, ["uv-install"]).code == 2


def test_uv_install_wants_uv(run: Run, small_image: str) -> None:
    code, _, errors = run(small_image, ["uv-install", "helper"])
    assert code == 1 and "there is no uv" in errors
