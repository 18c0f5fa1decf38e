"""`docker_build` on a real engine."""

import threading
import time
import uuid

import pytest

from steps import StepCancelled, StepError, StepFailed
from steps.docker_build import Params, code_files, run

pytestmark = pytest.mark.docker


@pytest.fixture
def image(docker_engine):
    """A name for the image under test; removed at the end."""
    name = f"sygaldry-test/built:{uuid.uuid4().hex[:12]}"
    yield name
    if docker_engine.images.list(name):
        docker_engine.images.remove(name, force=True)


@pytest.fixture
def write(tmp_path, small_image):
    """Writes files of a build context; `FROM small` in a Dockerfile means the small image."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text.replace("FROM small", f"FROM {small_image}"))
        return tmp_path

    return write


def test_builds_labels_and_streams_the_log(write, image, docker_engine, step_context):
    write(Dockerfile="FROM small AS one\nARG WHO\nRUN echo hello $WHO; echo oops >&2\nFROM one AS two\nLABEL two=yes\n")
    context = step_context()
    outputs = run(
        Params(image=image, build_args={"WHO": "you"}, labels={"b": "2", "a": "1"}, target="one", network="none"),
        context,
    )
    built = docker_engine.images.get(image)
    assert outputs == {"image": image, "image_id": built.id, "digest": built.id}
    assert built.labels == {"a": "1", "b": "2"}
    assert "hello you" in context.text() and context.text("stderr") == "oops"
    assert any("Step 3/5 : RUN" in line for _, line in context.lines)
    # Each label is a step of its own.
    assert {"text": "step 2 of 5", "fraction": 1 / 5} in context.progress


def test_the_context_leaves_out_what_dockerignore_names(write, image, docker_engine, step_context):
    write(
        app__Dockerfile="FROM small\nCOPY . /app\n",
        app__keep="kept",
        app__big="ignored",
        app___dot_dockerignore="big\nsub/*.tmp\n",
        app__sub__a_dot_tmp="ignored",
    )
    run(Params(image=image, context="app"), step_context())
    found = docker_engine.containers.run(
        image, ["find", "/app", "-type", "f"], remove=True, network_mode="none"
    ).decode()
    assert sorted(found.split()) == ["/app/.dockerignore", "/app/Dockerfile", "/app/keep"]


def test_the_cache_key_is_made_of_what_is_sent(write):
    folder = write(
        app__Dockerfile="FROM small\n", app__keep="x", app__big="x", app___dot_dockerignore="big\n", Own="FROM small\n"
    )
    found = code_files(Params(image="x", context="app", dockerfile="Own"), folder)
    assert [str(path.relative_to(folder)) for path in found] == [
        "Own",
        "app/.dockerignore",
        "app/Dockerfile",
        "app/keep",
    ]
    assert code_files(Params(image="x", context="missing"), folder) == []


@pytest.mark.parametrize("dockerfile", ["build/Own", "Own"])
def test_the_dockerfile_is_found_from_the_plan_or_the_context(write, image, step_context, dockerfile):
    write(build__Own="FROM small\nCOPY marker /\n", build__marker="x")
    assert run(Params(image=image, context="build", dockerfile=dockerfile), step_context())["image_id"]


def test_a_dockerfile_outside_of_the_context_is_used(write, image, step_context):
    write(other__Own="FROM small\nCOPY marker /\n", build__marker="x")
    assert run(Params(image=image, context="build", dockerfile="other/Own"), step_context())["image_id"]


def test_a_failing_instruction_is_named(write, image, step_context):
    write(Dockerfile="FROM small\nRUN echo before && exit 7\n")
    context = step_context()
    with pytest.raises(
        StepFailed, match=r"`RUN echo before && exit 7` \(step 2 of 2\) ended with exit code 7"
    ) as caught:
        run(Params(image=image, network="none"), context)
    assert caught.value.exit_code == 7 and "before" in context.text()


def test_a_dockerfile_that_cannot_be_read_is_final(write, image, step_context):
    write(Dockerfile="FROM small\nFROB x\n")
    with pytest.raises(StepError, match="unknown instruction: FROB") as caught:
        run(Params(image=image), step_context())
    assert not isinstance(caught.value, StepFailed)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"context": "missing"}, "is not a folder"),
        ({"dockerfile": "missing"}, "there is no Dockerfile"),
        ({"build_args": {"TOKEN": "x-s3cret-x"}}, r"`build_args.TOKEN` holds a secret"),
        ({"image": "Not A Name"}, "invalid"),
    ],
)
def test_mistakes_are_final(write, step_context, params, message):
    write(**({} if "dockerfile" in params else {"Dockerfile": "FROM small\n"}))
    with pytest.raises(StepError, match=message) as caught:
        run(Params(**{"image": "sygaldry-test/never:1", **params}), step_context(secrets={"T": "s3cret"}))
    assert not isinstance(caught.value, StepFailed) and "s3cret" not in str(caught.value)


def test_the_same_build_again_gives_the_same_image(write, image, step_context):
    write(Dockerfile="FROM small\nCOPY marker /\nRUN echo $A$B\n", marker="x")
    first = run(Params(image=image, build_args={"A": "1", "B": "2"}, network="none"), step_context())
    again = run(Params(image=image, build_args={"B": "2", "A": "1"}, network="none"), step_context())
    assert first == again


def test_cancel_ends_the_build_on_the_engine(write, image, docker_engine, step_context):
    marker = uuid.uuid4().hex
    write(Dockerfile=f"FROM small\nRUN echo begun-{marker} && sleep 600\n")
    context, ended = step_context(), []

    def work():
        try:
            run(Params(image=image, network="none"), context)
        except StepCancelled:
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    # The whole line, so that the echo of the instruction does not count.
    with context.logged:
        assert context.logged.wait_for(lambda: ("stdout", f"begun-{marker}") in context.lines, 60)
    context.cancel()
    thread.join(20)
    assert ended == [True]

    def building():
        return [each for each in docker_engine.containers.list(all=True) if marker in str(each.attrs["Args"])]

    deadline = time.monotonic() + 20
    while building() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert building() == []


def test_no_engine_is_a_failure_with_a_hint(tmp_path, step_context):
    (tmp_path / "Dockerfile").write_text("FROM x\n")
    with pytest.raises(StepFailed, match=r"no Docker Engine answers at `unix:///nowhere.sock`(.|\n)*hint: start"):
        run(Params(image="x"), step_context(env={"DOCKER_HOST": "unix:///nowhere.sock"}))


def test_through_the_host(write, image, run_step):
    write(Dockerfile="FROM small\nRUN sleep 600\n")
    stopped = run_step("docker_build", {"image": image, "network": "none"}, timeout_s=2)
    assert stopped.outcome == "timed_out"
