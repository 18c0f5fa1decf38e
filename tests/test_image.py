"""The standard image: what its content hash depends on, and real builds of target `slim` on the minimal Debian."""

import dataclasses
import fcntl
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container import image_spec
from container.build_context import Checkout, Context, ContextError, gather
from container.image import ImageError, ImageSpec, build, content_hash, ensure, images
from container.image_label import image_label
from container.image_spec import recipe

HERE = Path(__file__).parent.parent
SPEC = ImageSpec(base="debian:12", target="slim", spack="", uid=1000, gid=1000)
PATHS = st.text("abc/", min_size=1, max_size=6)
FILES = st.dictionaries(PATHS, st.binary(max_size=8), max_size=4)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, "-C", folder, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with the few files of Spack, and of its packages, that a build and the entrypoints look at."""
    folder = tmp_path / "spack checkout"
    setup = folder / "share" / "spack" / "setup-env.sh"
    setup.parent.mkdir(parents=True)
    setup.write_text('export SPACK_ROOT=/opt/spack_src\nspack() { echo "spack $*"; }\n')
    (folder / "lib" / "spack" / "spack").mkdir(parents=True)
    (folder / "lib" / "spack" / "spack" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (folder / "etc" / "spack").mkdir(parents=True)
    (folder / "etc" / "spack" / "config.yaml").write_text("config: {}\n")
    (folder / "repos" / "spack_repo" / "builtin").mkdir(parents=True)
    (folder / "repos" / "spack_repo" / "builtin" / "repo.yaml").write_text("repo: {namespace: builtin}\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


@given(first=FILES, second=FILES)
def test_the_digest_of_a_context_is_that_of_its_files(first: dict[str, bytes], second: dict[str, bytes]) -> None:
    same = Context(dict(reversed(first.items())), {})
    assert Context(first, {}).digest() == same.digest()
    assert (Context(first, {}).digest() == Context(second, {}).digest()) == (first == second)


@given(files=FILES)
def test_what_only_helps_the_build_is_no_content(files: dict[str, bytes]) -> None:
    helped = {**files, "site/python/pip.conf": b"[global]\n"}
    assert Context(files, {}).digest() == Context(helped, {}).digest()


def test_an_archive_has_no_times_and_no_owners(checkout: Path) -> None:
    context = gather(None, {"spack_src": Checkout.of(checkout)}, {})
    archives = []
    for _ in range(2):
        file = io.BytesIO()
        context.write_archive(file)
        archives.append(file.getvalue())
    assert archives[0] == archives[1]
    with tarfile.open(fileobj=io.BytesIO(archives[0])) as archive:
        entries = {entry.name: entry for entry in archive}
        assert {"Dockerfile", "requirements.txt", "setup/apt.sh", "entrypoints/run-job.sh", "spack_src.tar"} <= set(
            entries
        )
        assert {entry.mtime for entry in entries.values()} == {0} and {entry.uid for entry in entries.values()} == {0}
        assert entries["entrypoints/run-job.sh"].mode == 0o755


@pytest.mark.parametrize(
    "change",
    [
        {"base": "ubuntu:24.04"},
        {"target": "full"},
        {"python_version": "3.13"},
        {"spack": "v1.0.0"},
        {"apt_snapshot": "20260101T000000Z"},
        {"uid": 0},
        {"gid": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_input_changes_the_hash(change: dict[str, Any]) -> None:
    assert content_hash(dataclasses.replace(SPEC, **change)) != content_hash(SPEC)
    assert content_hash(SPEC, "sha256:one") != content_hash(SPEC, "sha256:two")


def test_name_and_network_are_no_content() -> None:
    assert content_hash(dataclasses.replace(SPEC, name="other:1", network="none")) == content_hash(SPEC)


def test_the_lock_of_the_environment_is_part_of_the_hash(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "spack.yaml").write_text("spack: {specs: [zlib]}\n")
    with pytest.raises(ImageError, match="has no lock"):
        content_hash(dataclasses.replace(SPEC, environment=str(folder)))

    def locked(version: str) -> str:
        lock = {"roots": [{"hash": "h", "spec": "zlib"}], "concrete_specs": {"h": {"name": "zlib", "version": version}}}
        (folder / "spack.lock").write_text(json.dumps(lock))
        return content_hash(dataclasses.replace(SPEC, environment=str(folder)))

    assert len({locked("1"), locked("2"), locked("1"), content_hash(SPEC)}) == 3


def test_only_what_is_committed_of_a_checkout_counts(checkout: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, spack=checkout)
    before = content_hash(spec)
    found = recipe(spec, "").arguments
    assert (found["SPACK_VERSION"], found["SPACK_COMMIT"]) == ("1.2.3", git(checkout, "rev-parse", "HEAD"))
    for path in checkout.rglob("*"):
        os.utime(path, (1, 1))
    (checkout / "share" / "cache").write_text("untracked")
    assert content_hash(spec) == before
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(checkout), str(clone))
    assert content_hash(dataclasses.replace(SPEC, spack=clone)) == before
    (checkout / "etc" / "spack" / "config.yaml").write_text("config: {a: 1}\n")
    git(checkout, "commit", "--quiet", "--all", "--message", "changed")
    assert content_hash(spec) != before
    with pytest.raises(ImageError, match=r"is not a git checkout(.|\n)*hint"):
        content_hash(dataclasses.replace(SPEC, spack=tmp_path))


def test_a_site_gives_certificates_and_configuration_but_no_passwords(tmp_path: Path) -> None:
    site = tmp_path / "site"
    with pytest.raises(ContextError, match="neither `root` nor `python`"):
        gather(site, {}, {})
    certificate = site / "root" / "usr/local/share/ca-certificates/mine.crt"
    certificate.parent.mkdir(parents=True)
    certificate.write_text("certificate")
    (site / "python").mkdir()
    (site / "python" / "pip.conf").write_text("[global]\nindex-url = https://me:secret@index\n")
    context = gather(site, {}, {})
    assert context.files["site/root/usr/local/share/ca-certificates/mine.crt"] == b"certificate"
    assert b"secret" in context.files["site/python/pip.conf"]
    sources = site / "root" / "etc/apt/sources.list.d/mine.list"
    sources.parent.mkdir(parents=True)
    sources.write_text("deb https://me:secret@mirror/debian bookworm main\n")
    with pytest.raises(ContextError, match=r"mine.list` of the site holds a password") as caught:
        gather(site, {}, {})
    assert "secret" not in str(caught.value)


def test_indexes_of_the_environment_are_passed_on_for_both_clients() -> None:
    env = {"PIP_INDEX_URL": "https://one/simple", "PIP_EXTRA_INDEX_URL": "https://two/simple file:///here"}
    files = gather(None, {}, env).files
    assert files["site/python/pip.conf"] == (
        b"[global]\nindex-url = https://one/simple\nextra-index-url = https://two/simple\n"
    )
    settings = tomllib.loads(files["site/python/uv/uv.toml"].decode())
    assert settings == {"index-url": "https://one/simple", "extra-index-url": ["https://two/simple"]}
    assert not any(name.startswith("site/python") for name in gather(None, {}, {}).files)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ImageError, match="target: got `huge`, wanted `full` or `slim`"):
        content_hash(dataclasses.replace(SPEC, target="huge"))
    with pytest.raises(ImageError, match="Python version: got `3`"):
        content_hash(dataclasses.replace(SPEC, python_version="3"))
    with pytest.raises(ImageError, match=r"no Spack environment `nope`(.|\n)*hint"):
        content_hash(dataclasses.replace(SPEC, environment="nope"))


def test_the_lock_has_the_ray_of_this_project() -> None:
    wanted = re.search(r'"ray\[default\]==([^"]+)"', (HERE / "pyproject.toml").read_text())
    assert wanted is not None and wanted[1] == image_spec.locked_version("ray") == importlib.metadata.version("ray")


def test_the_dockerfile_has_the_defaults_of_the_spec() -> None:
    text = (HERE / "container" / "Dockerfile").read_text()
    for value in (image_spec.DEFAULT_BASE, image_spec.SPACK_VERSION, image_spec.SPACK_COMMIT):
        assert f"={value}" in text
    assert f"SPACK_PACKAGES_COMMIT={image_spec.SPACK_PACKAGES_COMMIT}" in text
    # What the recipe says, the Dockerfile hears.
    for name in recipe(SPEC, "").build_arguments:
        assert re.search(rf"^(ARG .*|    )\b{name}\b", text, re.MULTILINE), name


@given(name=st.text(max_size=90), digest=st.text("0123456789abcdef", min_size=16, max_size=64))
def test_every_image_has_a_label_that_ray_takes(name: str, digest: str) -> None:
    label = image_label(name, f"sha256:{digest}")
    assert label == image_label(name, digest) and label.endswith(digest[:16])
    assert len(label) <= 63 and re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?", label)


def test_labels_are_readable_and_know_no_tag() -> None:
    digest = "0123456789abcdef" * 4
    assert image_label("sygaldry/zephyr:base", digest) == "sygaldry.zephyr-0123456789abcdef"
    assert image_label("host:5000/a/b@sha256:" + digest, digest) == image_label("host:5000/a/b:1", digest)
    with pytest.raises(ValueError, match="got `latest`"):
        image_label("a", "latest")


def run(engine: Any, image: str, program: str, **options: Any) -> list[str]:
    """Lines that a program prints in a container."""
    return engine.containers.run(image, ["bash", "-c", program], remove=True, **options).decode().splitlines()


@pytest.mark.docker
def test_the_ray_image_has_what_a_node_needs(docker_engine: Any, ray_image: str) -> None:
    (found,) = [image for image in images(docker_engine) if ray_image in image.names]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    expected = {"ray_version": importlib.metadata.version("ray"), "python_version": python, "target": "slim"}
    expected |= {"user": f"{os.getuid()}:{os.getgid()}", "spack_version": "", "environment": "", "lock_hash": ""}
    assert expected.items() <= found.labels.items()
    assert found.labels["content_hash"].startswith(ray_image.rpartition(":")[2])
    assert found.label == image_label(ray_image, found.content_hash)
    program = """
    set -e
    ray --version; uv --version; rsync --version | head -n 1; python3 -c 'import sys; print(sys.version_info[:2])'
    id -u; echo $HOME; echo $SYGALDRY_IMAGE_LABEL
    test -s /opt/sygaldry/packages.txt; test -s /opt/sygaldry/python/packages.txt
    test -w /opt/bazel_cache -a -w /workspace; ls /opt/sygaldry/entrypoints/run-job.sh
    ray start --head --num-cpus 1 2>&1 | grep -m 1 -i token
    """
    said = run(docker_engine, ray_image, program)
    assert said[0] == f"ray, version {expected['ray_version']}" and said[1].startswith(
        f"uv {found.labels['uv_version']}"
    )
    assert said[3] == str(sys.version_info[:2]) and said[4] == str(os.getuid()) and said[6] == found.label
    # Without a token no node starts.
    assert "token" in said[-1].lower(), said


@pytest.mark.docker
def test_a_second_ensure_does_nothing(docker_engine: Any, ray_image: str, base_image: str) -> None:
    said: list[str] = []
    spec = ImageSpec(name="sygaldry-test/ray:slim", base=base_image, target="slim", spack="")
    found = ensure(docker_engine, spec, said.append)
    assert said == [] and ray_image in found.names
    # The same content under another name of the repository is only named.
    other = dataclasses.replace(spec, name=f"sygaldry-test/ray:also-{os.getpid()}")
    try:
        assert ensure(docker_engine, other, said.append).id == found.id and said == []
        assert other.name in ensure(docker_engine, other, said.append).names
    finally:
        docker_engine.images.remove(other.name)


@pytest.mark.docker
@pytest.mark.parametrize(("uid", "gid"), [(12345, 12345), (33, 100), (0, 0)])
def test_ids_of_the_host_are_those_of_the_user(
    docker_engine: Any, ray_image: str, base_image: str, checkout: Path, tmp_path: Path, uid: int, gid: int
) -> None:
    """Free ids, ids that the base gives to a service and a group, and root's; with Spack from a checkout."""
    environment = tmp_path / "mine"
    environment.mkdir()
    (environment / "spack.yaml").write_text("spack: {specs: [zlib]}\n")
    lock = {"roots": [{"hash": "h", "spec": "zlib"}], "concrete_specs": {"h": {"name": "zlib", "version": "1"}}}
    (environment / "spack.lock").write_text(json.dumps(lock))
    name = f"sygaldry-test/ids-{os.getpid()}:{uid}"
    spec = ImageSpec(
        name=name,
        base=base_image,
        target="slim",
        spack=checkout,
        spack_packages=checkout,
        environment=str(environment),
        uid=uid,
        gid=gid,
    )
    built = ensure(docker_engine, spec, print)
    try:
        program = """
        id -u; id -g; getent passwd kvothe | cut -d : -f 3,4,6; cat /opt/spack_src/lib/spack/spack/__init__.py
        for place in ~ /workspace /opt/spack_store /opt/spack_src; do touch $place/x; done
        bash /opt/sygaldry/entrypoints/default.sh bash -c 'echo $SPACK_ROOT'
        echo $SYGALDRY_SPACK_ENVIRONMENT; cat $(tail -n 1 /opt/spack_src/etc/spack/repos.yaml | cut -d : -f 2)/repo.yaml
        """
        assert run(docker_engine, built.id, program) == [
            *(str(uid), str(gid), f"{uid}:{gid}:/home/kvothe"),
            *('__version__ = "1.2.3"', "/opt/spack_src", "mine", "repo: {namespace: builtin}"),
        ]
        labels = {key: built.labels[key] for key in ("user", "spack_version", "spack_commit", "environment")}
        head = git(checkout, "rev-parse", "HEAD")
        assert labels == {"user": f"{uid}:{gid}", "spack_version": "1.2.3", "spack_commit": head, "environment": "mine"}
        assert len(built.labels["lock_hash"]) == 64
    finally:
        for each in built.names:
            docker_engine.images.remove(each, force=True)


@pytest.mark.docker
def test_an_ordinary_user_of_the_base_makes_room(docker_engine: Any, base_image: str) -> None:
    """Ubuntu's images have a user 1000 of their own."""
    setup = {str(HERE / "container" / "setup"): {"bind": "/setup", "mode": "ro"}}
    program = "useradd --uid 1000 --create-home ubuntu; bash /setup/user.sh 1000 1000; id -un 1000; id -g kvothe"
    assert run(docker_engine, base_image, program, volumes=setup) == ["kvothe", "1000"]


@pytest.mark.docker
@pytest.mark.parametrize(
    ("distribution", "said", "source"),
    [
        (
            "ubuntu",
            "--snapshot 20260101T000000Z update",
            "deb [snapshot=no signed-by=/k] https://nvidia.example/cuda /",
        ),
        (
            "debian",
            "-o Acquire::Check-Valid-Until=false update",
            "deb http://snapshot.debian.org/archive/debian/20260101T000000Z x main",
        ),
    ],
)
def test_packages_come_from_the_archive_of_a_moment(
    docker_engine: Any, base_image: str, tmp_path: Path, distribution: str, said: str, source: str
) -> None:
    """With an apt-get that only tells what it was asked for: neither archive of snapshots is here."""
    (tmp_path / "os-release").write_text(f"ID={distribution}\n")
    (tmp_path / "apt-get").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "apt-get").chmod(0o755)
    sources = {
        "cuda.list": "deb [signed-by=/k] https://nvidia.example/cuda /",
        "own.list": "deb http://one.example/debian x main",
    }
    program = "".join(f"echo '{line}' >/etc/apt/sources.list.d/{name}; " for name, line in sources.items())
    program += "bash /setup/apt.sh git >&2; cat /etc/apt/sources.list.d/*.list"
    places = {HERE / "container" / "setup": "/setup", tmp_path / "os-release": "/etc/os-release"}
    places[tmp_path / "apt-get"] = "/usr/local/bin/apt-get"
    mounts = {str(path): {"bind": place, "mode": "ro"} for path, place in places.items()}
    moment = {"APT_SNAPSHOT": "20260101T000000Z"}
    lines = run(docker_engine, base_image, program, stderr=True, volumes=mounts, environment=moment)
    assert source in lines and any(said in line for line in lines), lines


@pytest.mark.docker
def test_spack_from_its_repository_is_the_commit_that_is_wanted(
    docker_engine: Any, ray_image: str, checkout: Path, tmp_path: Path
) -> None:
    """The two repositories are on this machine, under their addresses on the network."""
    head = git(checkout, "rev-parse", "HEAD")
    git(checkout, "tag", "v1.1.0")
    (tmp_path / "gitconfig").write_text(
        "[safe]\n  directory = *\n[uploadpack]\n  allowAnySHA1InWant = true\n"
        + "".join(
            f'[url "file:///origin/.git"]\n  insteadOf = https://github.com/spack/{name}.git\n'
            for name in ("spack", "spack-packages")
        )
    )
    places = {HERE / "container" / "setup": "/setup", checkout: "/origin", tmp_path / "gitconfig": "/etc/gitconfig"}
    mounts = {str(source): {"bind": place, "mode": "ro"} for source, place in places.items()}
    program = """
    bash /setup/spack.sh /setup 2>&1
    cat /opt/spack_src/lib/spack/spack/__init__.py /opt/spack_src/etc/spack/repos.yaml || true
    """

    def lines(commit: str) -> list[str]:
        env = {"SPACK_VERSION": "v1.1.0", "SPACK_PACKAGES_COMMIT": head, "SPACK_COMMIT": commit}
        return run(docker_engine, ray_image, program, user="0", volumes=mounts, environment=env)

    assert lines(head)[:2] == ['__version__ = "1.2.3"', "repos:"]
    (told, *_) = [line for line in lines("0" * 40) if "wanted" in line]
    assert told == f"v1.1.0 of https://github.com/spack/spack.git is {head}, wanted {'0' * 40}"


@pytest.mark.docker
def test_a_failing_step_is_told_with_the_end_of_its_output(docker_engine: Any, base_image: str, tmp_path: Path) -> None:
    apt = tmp_path / "site" / "root" / "etc/apt/apt.conf.d/99mine"
    apt.parent.mkdir(parents=True)
    apt.write_text("this is; not { apt's syntax\n")
    spec = ImageSpec(
        name=f"sygaldry-test/bad-{os.getpid()}:1", base=base_image, target="slim", spack="", site=tmp_path / "site"
    )
    with pytest.raises(ImageError) as caught:
        build(docker_engine, spec, lambda line: None)
    message = str(caught.value)
    assert "cannot be built: `RUN bash /setup/apt.sh" in message and "the end of its output:" in message
    assert "99mine" in message
    assert docker_engine.images.list(spec.name) == []


@pytest.mark.docker
def test_a_base_that_is_nowhere_is_told(docker_engine: Any) -> None:
    spec = dataclasses.replace(SPEC, base="127.0.0.1:9/none:1")
    with pytest.raises(ImageError, match=r"base `127.0.0.1:9/none:1` is not on this machine and cannot be pulled"):
        ensure(docker_engine, spec, lambda line: None)


@pytest.mark.docker
def test_a_build_in_another_process_is_waited_for_but_not_for_ever(docker_engine: Any, base_image: str) -> None:
    spec = ImageSpec(name=f"sygaldry-test/wait-{os.getpid()}:1", base=base_image, target="slim", spack="", uid=4321)
    digest = str(docker_engine.images.get(base_image).id)
    path = Path(tempfile.gettempdir()) / f"sygaldry-image-{os.getuid()}-{content_hash(spec, digest)[:16]}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ImageError, match="another process still builds this image"):
            ensure(docker_engine, spec, lambda line: None, timeout_s=0.1)
    path.unlink()
