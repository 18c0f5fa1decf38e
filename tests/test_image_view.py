"""The view of an image's Spack environment in our own processes: what a shell of the image sets is the measure."""

import subprocess
import sys
from pathlib import Path

import pytest

from container.view import activate_view

COMMON = Path(__file__).parent.parent / "container" / "entrypoints" / "_common.sh"
SET = ("PATH", "SPACK_ENV_VIEW", "MANPATH", "ACLOCAL_PATH", "CMAKE_PREFIX_PATH", "PKG_CONFIG_PATH")


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a process in an image with the environment `mine`, which is in the store."""
    (tmp_path / "views" / "mine" / "bin").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    named = {"SYGALDRY_SPACK_ENVIRONMENT": "mine", "SYGALDRY_IMAGE_LABEL": "sygaldry.mine-0123456789abcdef"}
    return {"PATH": "/usr/bin:/bin", "SYGALDRY_SPACK_STORE": str(tmp_path), **named}


@pytest.mark.parametrize("before", [{}, dict.fromkeys((*SET[:1], *SET[2:]), "/usr/bin:/bin:/two")])
def test_it_is_activated_as_in_a_shell_and_once(env: dict[str, str], tmp_path: Path, before: dict[str, str]) -> None:
    env |= before
    script = 'source "$0"; activate_view "$1"; env -0'
    argv = ["/bin/bash", "-c", script, str(COMMON), str(tmp_path / "views" / "mine")]
    output = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    shell = dict(pair.split("=", 1) for pair in output.rstrip("\0").split("\0"))
    for _ in range(2):
        assert activate_view(env) == ""
        assert {name: env[name] for name in SET} == {name: shell[name] for name in SET}


def test_its_python_packages_come_last_when_they_are_of_this_python(env: dict[str, str], tmp_path: Path) -> None:
    before = [*sys.path]
    library = tmp_path / "views" / "mine" / "lib"
    (library / "python3.1" / "site-packages").mkdir(parents=True)
    assert activate_view(env) == "" and sys.path == before
    own = library / f"python3.{sys.version_info.minor}" / "site-packages"
    own.mkdir(parents=True)
    for _ in range(2):
        assert activate_view(env) == "" and sys.path == [*before, str(own)]


def test_a_view_that_is_not_there_is_said_with_what_to_do(env: dict[str, str], tmp_path: Path) -> None:
    env["SYGALDRY_SPACK_ENVIRONMENT"] = "other"
    before = {**env}
    text = activate_view(env)
    assert "environment `other`" in text and f"there is no `{tmp_path}/views/other/bin`\n\nhint: " in text
    assert "`orchestrate spack build other`" in text and env == before
    del env["SYGALDRY_SPACK_STORE"]
    assert "there is no `/opt/spack_store/views/other/bin`" in activate_view(env)


@pytest.mark.parametrize("missing", ["SYGALDRY_SPACK_ENVIRONMENT", "SYGALDRY_IMAGE_LABEL"])
@pytest.mark.parametrize("store", ["", "/nowhere"])
def test_what_is_no_image_with_an_environment_is_left_alone(env: dict[str, str], missing: str, store: str) -> None:
    env |= {missing: "", "SYGALDRY_SPACK_STORE": store}
    before = {**env}
    assert activate_view(env) == "" and env == before
    del env[missing], before[missing]
    assert activate_view(env) == "" and env == before
