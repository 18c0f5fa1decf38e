"""A fresh `spack.yaml`: the standard store with a view of its own, pinned packages, compilers and CUDA of the image.

name, specs -> render -> text -> create -> <folder>/<name>/spack.yaml
"""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from container.environment import MANIFEST, EnvironmentProblem, is_name
from container.image_spec import SPACK_PACKAGES_COMMIT
from container.mounts import STORE

DEFAULT_SPECS = ("python@3.13", "python-venv", "py-pip")
_TEXT = f"""\
spack:
  specs:
%(specs)s  view:
    %(key)s:
      root: {STORE}/views/%(name)s
  concretizer:
    unify: true
    reuse: dependencies
    targets:
      granularity: generic
      host_compatible: false
  repos:
    builtin:
      git: https://github.com/spack/spack-packages.git
      commit: {SPACK_PACKAGES_COMMIT}
  config:
    install_tree:
      root: {STORE}
    build_stage: {STORE}/build_stage
    source_cache: {STORE}/source_cache
    misc_cache: {STORE}/misc_cache
    locks: true
    build_jobs: %(build_jobs)d
    ccache: false
  packages:
    all:
      require:
      - target=x86_64_v3
    gcc:
      externals:
      - spec: gcc@13.3.0 languages:='c,c++,fortran'
        prefix: /usr
        extra_attributes:
          compilers:
            c: /usr/bin/gcc
            cxx: /usr/bin/g++
            fortran: /usr/bin/gfortran
      buildable: false
"""
_CUDA = """\
    cuda:
      externals:
      - spec: cuda@12.9.1
        prefix: /usr/local/cuda
      buildable: false
    cudnn:
      externals:
      - spec: cudnn@9.10.2
        prefix: /usr/local/cuda
      buildable: false
"""


def render(name: str, specs: Sequence[str], *, cuda: bool = False, build_jobs: int = 8) -> str:
    """Text of a manifest; `cuda` makes the image's CUDA and cuDNN known to Spack."""
    lines = "".join(f"  - {_scalar(spec)}\n" for spec in specs)
    values = {"name": name, "key": _scalar(name), "specs": lines, "build_jobs": build_jobs}
    return _TEXT % values + (_CUDA if cuda else "")


def create(folder: Path, name: str, specs: Sequence[str] = (), *, cuda: bool = False) -> Path:
    """Make `folder/name/spack.yaml`; its path. Raises `EnvironmentProblem` where there is one already."""
    if not is_name(name):
        raise EnvironmentProblem(
            f"environment name is `{name}`, wanted letters, digits, `.`, `_` and `-`\n\nhint: it names a folder"
        )
    path = folder / name / MANIFEST
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{MANIFEST}.{os.getpid()}")
    temporary.write_text(render(name, specs or DEFAULT_SPECS, cuda=cuda))
    try:
        # Unlike a rename, a link does not replace what is there.
        os.link(temporary, path)
    except FileExistsError:
        raise EnvironmentProblem(f"`{path}` exists already\n\nhint: edit it, or choose another name") from None
    finally:
        temporary.unlink()
    return path


def _scalar(text: str) -> str:
    """Quoted where YAML would take it for something else."""
    return yaml.safe_dump([text], width=10_000)[2:].rstrip()
