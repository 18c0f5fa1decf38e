"""Spack environments as data: the committed ones, what their locks say, and what keys and plans make of them."""

import json
import random
import re
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bridge.autobuild import Container, Effort, plan_text
from bridge.cache_key import key_fields
from bridge.plan import Cache
from bridge.reader import read_plan_text
from container import image_spec
from container.environment import (
    BUILT,
    Environment,
    EnvironmentProblem,
    check_built,
    environments,
    find,
    lock_hash,
)
from container.spack_lock import keep
from container.spack_place import Here, Inside
from container.spack_template import create, render
from steps import StepRequest

NAMES = ("base", "cpu", "torch_cuda", "zephyr")
OF_THE_IMAGE = {"/usr", "/usr/bin/gcc", "/usr/bin/g++", "/usr/bin/gfortran", "/usr/local/cuda"}
VIEW_CHECK = Path(__file__).parent.parent / "container" / "entrypoints" / "_verify_view.py"


def lock_of(*specs: str, version: str = "1.0", more: tuple[str, ...] = ()) -> dict[str, Any]:
    """A lock as Spack writes it, of these roots, with further packages that they need."""
    packages = {
        f"{name}-hash": {"name": name, "version": version, "hash": f"{name}-hash"}
        for name in [*(spec.partition("@")[0] for spec in specs), *more]
    }
    roots = [{"hash": f"{spec.partition('@')[0]}-hash", "spec": spec} for spec in specs]
    return {"_meta": {"lockfile-version": 6}, "roots": roots, "concrete_specs": packages}


def environment(folder: Path, *specs: str, name: str = "mine", **of_lock: Any) -> Environment:
    """An environment of these specs, locked."""
    create(folder, name, specs)
    return keep(Environment(folder / name), json.dumps(lock_of(*specs, **of_lock)))


@pytest.fixture(params=NAMES)
def ours(request: pytest.FixtureRequest) -> Environment:
    return find(request.param)


def test_our_environments_are_found_by_name() -> None:
    assert tuple(each.name for each in environments() if each.folder.parent.name == "spack") == NAMES


def test_our_locks_are_those_of_their_manifests(ours: Environment) -> None:
    assert ours.lock is not None and ours.staleness == ""
    names = [
        [re.split("[@+~ ]", spec)[0] for spec in specs]
        for specs in (map(itemgetter("spec"), ours.lock["roots"]), ours.specs)
    ]
    assert sorted(names[0]) == sorted(names[1])
    for root in ours.lock["roots"]:
        pinned = re.search(r"@([\w.]+)", root["spec"])
        version = ours.lock["concrete_specs"][root["hash"]]["version"]
        assert pinned is None or version == pinned[1] or version.startswith(f"{pinned[1]}."), root


def test_our_locks_are_for_the_image_and_name_no_other_machine(ours: Environment) -> None:
    assert ours.lock is not None
    places = {
        (spec["arch"]["platform"], spec["arch"]["platform_os"], spec["arch"]["target"])
        for spec in ours.lock["concrete_specs"].values()
    }
    assert places == {("linux", "ubuntu24.04", "x86_64_v3")}
    assert set(re.findall(r'"(/[^"]*)"', ours.lock_file.read_text())) <= OF_THE_IMAGE
    externals = {spec["name"]: spec["version"] for spec in ours.lock["concrete_specs"].values() if "external" in spec}
    cuda = {"cuda": "12.9.1", "cudnn": "9.10.2"} if ours.uses_cuda else {}
    assert externals == {"gcc": "13.3.0", "glibc": "2.39", **cuda}
    assert ours.uses_cuda == (ours.name in ("zephyr", "torch_cuda"))


def test_our_locks_come_from_the_spack_that_the_image_has(ours: Environment) -> None:
    assert ours.lock is not None
    made_by = (f"v{ours.lock['spack']['version']}", ours.lock["spack"]["commit"])
    assert made_by == (image_spec.SPACK_VERSION, image_spec.SPACK_COMMIT)
    assert ours.manifest["repos"]["builtin"]["commit"] == image_spec.SPACK_PACKAGES_COMMIT
    assert {spec["namespace"] for spec in ours.lock["concrete_specs"].values()} == {"builtin"}


def test_our_manifests_are_the_template_with_more_packages(ours: Environment) -> None:
    jobs = ours.manifest["config"]["build_jobs"]
    ours.manifest["config"]["ccache"] = False
    template = yaml.safe_load(render(ours.name, ours.specs, cuda=ours.uses_cuda, build_jobs=jobs))["spack"]
    packages = ours.manifest.pop("packages")
    assert packages.items() >= template.pop("packages").items() and ours.manifest == template


def test_every_environment_has_a_view_of_its_own() -> None:
    views = [each.manifest["view"] for each in environments() if each.folder.parent.name == "spack"]
    assert views == [{name: {"root": f"/opt/spack_store/views/{name}"}} for name in NAMES]


NAME = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
SPEC = st.from_regex(
    r"[a-z][a-z-]{0,8}(@[0-9:.]{1,5})?([+~][a-z]{1,4}){0,2}( [a-z]{1,4}=[a-z0-9,']{1,6})?( %gcc)?", fullmatch=True
)


@given(name=NAME, specs=st.lists(SPEC, min_size=1, max_size=4), cuda=st.booleans())
def test_a_rendered_manifest_says_what_was_asked_for(name: str, specs: list[str], cuda: bool) -> None:
    section = yaml.safe_load(render(name, specs, cuda=cuda))["spack"]
    assert section["specs"] == specs and list(section["view"]) == [name]
    assert ("cuda" in section["packages"]) == cuda


def test_a_manifest_is_never_overwritten(tmp_path: Path) -> None:
    path = create(tmp_path, "mine", ["python"])
    with pytest.raises(EnvironmentProblem, match="exists already"):
        create(tmp_path, "mine", ["perl"])
    assert "- python\n" in path.read_text() and [each.name for each in path.parent.iterdir()] == ["spack.yaml"]
    for name in ("", "../up", "a b", "-x", ".hidden"):
        with pytest.raises(EnvironmentProblem, match="environment name is"):
            create(tmp_path, name)


def _shuffled(value: Any, order: random.Random) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        order.shuffle(keys)
        return {key: _shuffled(value[key], order) for key in keys}
    return value


@given(seed=st.integers(), indent=st.sampled_from([None, 0, 1, 4]))
def test_the_hash_of_a_lock_is_that_of_its_content(
    tmp_path_factory: pytest.TempPathFactory, seed: int, indent: int | None
) -> None:
    made = environment(tmp_path_factory.mktemp("e"), "python@3.13", "py-numpy")
    before = lock_hash(made.folder)
    lock = _shuffled(json.loads(made.lock_file.read_text()), random.Random(seed))
    lock["_meta"]["lockfile-version"], lock["spack"] = 7, {"version": "9"}
    made.lock_file.write_text(json.dumps(lock, indent=indent))
    assert re.fullmatch("[0-9a-f]{64}", before) and lock_hash(made.folder) == before
    lock["concrete_specs"]["python-hash"]["version"] = "1.1"
    made.lock_file.write_text(json.dumps(lock))
    assert lock_hash(made.folder) != before


def test_a_lock_is_stale_when_what_it_was_made_from_changes(tmp_path: Path) -> None:
    made = environment(tmp_path, "python@3.13", "zstd")
    text = made.manifest_file.read_text()

    def staleness(changed: str) -> str:
        made.manifest_file.write_text(changed)
        return Environment(made.folder).staleness

    assert staleness(text) == ""
    assert (
        staleness("# why\n" + text.replace("/opt/spack_store", "/data").replace("build_jobs: 8", "build_jobs: 2")) == ""
    )
    assert staleness(text.replace("- zstd", "- zstd\n  - lz4")) == "`lz4` is not locked"
    assert staleness(text.replace("  - zstd\n", "")) == "`zstd` is locked but not wanted"
    assert "`python@3.12` is not locked" in staleness(text.replace("@3.13", "@3.12"))
    assert "was changed after it was locked" in staleness(text.replace("x86_64_v3", "x86_64_v2"))
    assert "was changed after it was locked" in staleness(text.replace("- zstd", "- zstd+programs"))
    # A lock of plain Spack does not know its manifest: names and versions are all that can be compared.
    made.lock_file.write_text(json.dumps(lock_of("python@3.13", "zstd")))
    assert staleness(text.replace("x86_64_v3", "x86_64_v2")) == ""
    assert staleness(text.replace("  - zstd\n", "")) == "`zstd` is locked but not wanted"


@pytest.mark.parametrize("printed", ["", "{}", "[]", '{"_meta": {}}', json.dumps(lock_of("a", "b"))])
def test_only_a_lock_of_the_manifest_is_kept(tmp_path: Path, printed: str) -> None:
    made = environment(tmp_path, "python")
    before = made.lock_file.read_text()
    with pytest.raises(EnvironmentProblem):
        keep(made, printed)
    assert made.lock_file.read_text() == before and len(list(made.folder.iterdir())) == 2


def test_environments_are_found_in_folders_by_path_and_by_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = environment(tmp_path / "first", "python").folder
    other = environment(tmp_path / "second", "perl", name="other").folder
    assert find("mine", [tmp_path / "first"]).folder == mine
    assert find(mine).folder == find(f"{mine}/").folder == find(mine / "spack.yaml").folder == mine
    monkeypatch.chdir(mine)
    assert find(".").folder == find("./").folder == mine
    with pytest.raises(
        EnvironmentProblem, match=r"no Spack environment `other`\n\nhint: known environments: base, cpu"
    ):
        find("other")
    monkeypatch.setenv("SYGALDRY_SPACK_ENVIRONMENTS", f"{tmp_path / 'first'}:{tmp_path / 'second'}")
    assert find("other").folder == other and [each.name for each in environments()] == sorted([*NAMES, "mine", "other"])
    with pytest.raises(EnvironmentProblem, match=r"has no `spack\.yaml`"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("spack.yaml", "a: [", "cannot be read"),
        ("spack.yaml", "python", "no section `spack`"),
        ("spack.yaml", "spack: {specs: [{matrix: []}]}", "matrices are not supported"),
        ("spack.lock", "{", "cannot be read"),
        ("spack.lock", '{"roots": []}', "is not a lock"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    made = environment(tmp_path, "python")
    (made.folder / name).write_text(text)
    with pytest.raises(EnvironmentProblem, match=message) as caught:
        assert Environment(made.folder).staleness
    assert str(made.folder / name) in str(caught.value)


def test_only_an_environment_built_from_the_same_lock_counts(tmp_path: Path) -> None:
    made = environment(tmp_path, "python")
    copy = tmp_path / "store" / "environments" / "mine"
    copy.mkdir(parents=True)
    (copy / "spack.lock").write_text(made.lock_file.read_text())
    with pytest.raises(EnvironmentProblem, match="is not built in the store"):
        check_built(made, tmp_path / "store")
    (copy / BUILT).write_text(json.dumps(json.loads(made.lock_file.read_text())))
    check_built(made, tmp_path / "store")
    (copy / BUILT).write_text(json.dumps(lock_of("python", version="2")))
    with pytest.raises(EnvironmentProblem, match=r"was built from the lock `\w+`, wanted `\w+`"):
        check_built(made, tmp_path / "store")


def test_an_autobuild_is_a_valid_plan_of_two_steps(tmp_path: Path) -> None:
    container = Container("proj", tmp_path / "root", "img:1")
    effort = Effort(tries=3, pause_s=5, timeout_s=100, wait_s=20)
    plan = read_plan_text(plan_text(find("zephyr"), Inside(), effort, container), tmp_path / "a.yaml").plan
    build, verify = plan.steps
    assert plan.name == "spack-autobuild-zephyr" and verify.depends_on == ["build"] and build.timeout_seconds == 120
    assert build.retry is not None and (build.retry.max_attempts, build.retry.backoff_s) == (3, 5)
    assert build.params["command"].endswith("spack-build.sh /opt/sygaldry/environments/zephyr")
    assert build.params["env"]["SYGALDRY_SPACK_WAIT_S"] == "20" and build.params["image"] == "img:1"
    assert verify.params["gpu"] is True and verify.params["environment"] == str(find("zephyr").folder)
    assert verify.params["command"].endswith("verify-gpu.sh --frameworks torch,jax")
    laptop = read_plan_text(plan_text(find("cpu"), Inside(), effort, container), tmp_path / "a.yaml").plan.steps[1]
    assert laptop.params["command"].endswith("_verify_view.py /opt/spack_store/views/cpu py-numpy py-pip py-torch")
    assert "gpu" not in laptop.params
    here = Here(tmp_path / "spack", str(tmp_path / "store"))
    first, second = read_plan_text(plan_text(find("cpu"), here, effort, container), tmp_path / "a.yaml").plan.steps
    assert first.type == second.type == "command" and first.params["args"][-1] == str(find("cpu").folder)
    assert second.env["SYGALDRY_SPACK_ENVIRONMENT"] == "cpu" and second.env["SPACK_ROOT"] == str(tmp_path / "spack")


def test_the_lock_is_part_of_a_step_s_cache_key(tmp_path: Path) -> None:
    made = environment(tmp_path / "spack", "python")

    def fields(**changes: Any) -> dict[str, str]:
        values: dict[str, Any] = {
            "workflow_id": "flow", "run_id": "run", "step_id": "one", "step_name": "one", "attempt": 1,
            "type": "container_job", "params": {"command": "python x.py", "environment": "mine"},
            "plan_dir": str(tmp_path), "working_dir": str(tmp_path), "log_dir": "/var/log", "timeout_s": 10,
        }  # fmt: skip
        return key_fields(StepRequest(**{**values, **changes}), Cache(), image="")

    assert fields()["identities.environment"] == f"mine {made.lock_hash}"
    by_variable = fields(params={"command": "python x.py"}, env={"SYGALDRY_SPACK_ENVIRONMENT": "mine"})
    assert by_variable["identities.environment"] == f"mine {made.lock_hash}"
    assert "identities.environment" not in fields(params={"command": "python x.py"})
    before = fields()
    made.lock_file.write_text(json.dumps(lock_of("python", version="2")))
    now = fields()
    assert {name for name in now if now[name] != before[name]} == {"identities.environment"}
    made.lock_file.unlink()
    assert "has no lock" in fields()["identities.environment"]


@pytest.mark.docker
def test_what_is_in_an_image_is_part_of_a_step_s_cache_key(
    docker_engine: Any, small_image: str, tmp_path: Path
) -> None:
    from container.image_identity import image_identity

    original = docker_engine.images.get(small_image)
    assert image_identity(small_image, {}) == original.id
    assert image_identity("sygaldry-test/there-is-none:1", {}) == ""
    assert image_identity(small_image, {"DOCKER_HOST": f"unix://{tmp_path}/none"}) == ""
    container = docker_engine.containers.create(small_image, ["true"])
    name = f"sygaldry-test/identity:{container.short_id}"
    try:
        container.commit(name.partition(":")[0], container.short_id, changes='LABEL sygaldry.content_hash="abc"')
        assert image_identity(name, {}) == "abc"
    finally:
        container.remove(force=True)
        docker_engine.images.remove(name)


@pytest.fixture
def view(tmp_path: Path) -> Path:
    """A view whose Python packages are beside it, with metadata as installers write it."""
    packages = {"numpy": ["numpy"], "scikit-learn": ["sklearn", "tests"], "broken-one": ["broken_one"]}
    for name, modules in packages.items():
        information = tmp_path / "site" / f"{name.replace('-', '_')}-1.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (information / "top_level.txt").write_text("\n".join(modules))
        for module in modules:
            text = "raise OSError('no libomp')" if "broken" in module or module == "tests" else ""
            (tmp_path / "site" / f"{module}.py").write_text(text)
    (tmp_path / "view" / "bin").mkdir(parents=True)
    return tmp_path / "view"


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        (["py-numpy", "py-scikit-learn"], 0, "2 Python packages, 0 failures"),
        (["py-numpy", "py-broken-one"], 1, "py-broken-one: `import broken_one` fails: OSError: no libomp"),
        (["py-jax"], 1, "py-jax: "),
        ([], 0, "0 Python packages"),
    ],
)
def test_a_view_is_good_when_its_packages_can_be_imported(
    view: Path, packages: list[str], code: int, said: str
) -> None:
    argv = [sys.executable, "-P", "-S", str(VIEW_CHECK), str(view), *packages]
    done = subprocess.run(
        argv, env={"PYTHONPATH": str(view.parent / "site")}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code and said in done.stdout + done.stderr
    argv[-1 - len(packages)] = str(view / "nothing")
    assert subprocess.run(argv, capture_output=True, timeout=60).returncode == 1
