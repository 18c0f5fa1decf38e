"""What is withheld from an environment over a Spack view; how it is used is tested in containers."""

import importlib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import container
from container.entrypoints._overlay import Withheld
from container.entrypoints._packages import inspect


def over(**view):
    return Withheld({"distributions": {name.replace("_", "-"): {"version": version} for name, version in view.items()}})


def test_what_the_view_has_of_the_gpu_stack_is_withheld_and_nothing_else():
    withheld = over(torch="2.9.0", torchvision="0.24.0", numpy="2.3.4")
    assert withheld.names == ["torch", "torchvision"]
    assert all(withheld.has(name) for name in ("torch", "nvidia-cudnn-cu12", "nvidia-nccl-cu12", "jax-cuda12-plugin"))
    # Not of the view, no CUDA in it, or only a name that begins alike.
    assert not any(withheld.has(name) for name in ("numpy", "triton", "jax", "nvidia-ml-py", "torchmetrics", "cuda"))


def test_a_view_without_torch_withholds_no_wheels():
    withheld = over(numpy="2.3.4")
    assert withheld.names == [] and not withheld.has("torch") and not withheld.has("nvidia-cudnn-cu12")


REQUIREMENT = st.sampled_from(["torch", "Torch", "nvidia_nccl_cu12", "helper", "numpy", "torchmetrics"])


@given(st.lists(st.tuples(REQUIREMENT, st.integers(0, 3)), unique_by=lambda each: each[0].lower()))
def test_requirements_are_left_out_with_their_hashes(requirements):
    blocks = [
        f"{name}==1.0 \\\n" + "    --hash=sha256:0 \\\n" * hashes + "    # via x\n" for name, hashes in requirements
    ]
    kept, left_out = over(torch="2.9.0").leave_out("--find-links wheels\n\n" + "".join(blocks))
    goes = [
        name.lower().replace("_", "-") for name, _ in requirements if name in ("torch", "Torch", "nvidia_nccl_cu12")
    ]
    stays = [
        block
        for block, (name, _) in zip(blocks, requirements, strict=True)
        if name in ("helper", "numpy", "torchmetrics")
    ]
    assert left_out == goes and kept == "--find-links wheels\n\n" + "".join(stays)


def test_an_interpreter_tells_what_it_has_and_what_does_not_fit():
    seen = inspect(
        ["pytest>=1", "pytest<1", "pytest<1 ; extra == 'other'", "no-such-distribution>=1", "not a requirement"]
    )
    assert seen["compared"] and seen["distributions"]["pytest"]["version"]
    unmet = [each for each in seen["unmet"] if each["by"] == "the repository"]
    assert [(each["name"], each["wanted"]) for each in unmet] == [("pytest", "<1")]


def test_what_a_repository_asks_for(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(container.__file__).parent / "entrypoints"))
    monkeypatch.chdir(tmp_path)
    project = importlib.import_module("_project")
    requirements, pyproject = Path("requirements.txt"), Path("pyproject.toml")
    assert project._inputs() == [] and not project._is_package()
    requirements.write_text("--no-index\n-r other.txt\n\nhelper>=1  # why\ntorch --hash=sha256:0\n./local\n")
    assert project._inputs() == [requirements] and project.asked_for([requirements]) == ["helper>=1", "torch"]
    pyproject.write_text("[tool.x]\n")
    assert project._inputs() == [requirements]
    pyproject.write_text(
        '[project]\nname = "a"\ndependencies = ["b"]\n[project.optional-dependencies]\nc = ["d"]\nno = ["no"]\n'
        '[dependency-groups]\ne = ["f", {include-group = "c"}]\n[build-system]\n'
    )
    assert project._inputs() == [pyproject] and project._is_package()
    Path("uv.lock").touch()
    assert project._inputs() == [Path("uv.lock"), pyproject]
    assert project.asked_for(project._inputs(), ["c"], ["e"]) == ["b", "f", "d"]
