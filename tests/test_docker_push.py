"""`docker_push` from a real engine to a real registry that wants a login."""

import base64
import json
import uuid

import httpx
import pytest

from steps import StepError, StepFailed
from steps.docker_push import Params, run

pytestmark = pytest.mark.docker


@pytest.fixture
def image(docker_engine, small_image, registry):
    """A local image with a name in the registry."""
    name = f"{registry.host}/team/app:{uuid.uuid4().hex[:8]}"
    docker_engine.images.get(small_image).tag(name)
    yield name
    docker_engine.images.remove(name, force=True)


def digest_in(registry, image):
    repository, _, tag = image.removeprefix(f"{registry.host}/").rpartition(":")
    answer = httpx.head(
        f"http://{registry.host}/v2/{repository}/manifests/{tag}",
        auth=tuple(registry.login.split(":")),
        headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json"},
    )
    return answer.headers.get("Docker-Content-Digest")


def logins(registry):
    user, _, password = registry.login.partition(":")
    auth = base64.b64encode(registry.login.encode()).decode()
    return {
        "pair": registry.login,
        "plain": json.dumps({"username": user, "password": password}),
        "auth": json.dumps({"auth": auth}),
        "config": json.dumps(
            {"auths": {"other:5000": {"auth": "eDp5"}, f"http://{registry.host}/v1/": {"auth": auth}}}
        ),
    }


@pytest.mark.parametrize("form", ["pair", "plain", "auth", "config"])
def test_pushes_with_a_login_from_a_secret(image, registry, step_context, form):
    context = step_context(secrets={"LOGIN": logins(registry)[form]})
    outputs = run(Params(image=image, registry_secret="LOGIN"), context)
    name = image.rpartition(":")[0]
    assert outputs == {"image": image, "digest": f"{name}@{digest_in(registry, image)}"}
    assert "let-me-in" not in context.text()


def test_the_login_of_the_node_is_used(image, registry, step_context, tmp_path):
    (tmp_path / "config.json").write_text(logins(registry)["config"])
    run(Params(image=image), step_context(env={"DOCKER_CONFIG": str(tmp_path)}))
    assert digest_in(registry, image)


@pytest.mark.parametrize("login", [None, "pusher:wrong"])
def test_a_refused_login_is_final(image, registry, step_context, login):
    context = step_context(secrets={"LOGIN": login} if login else {})
    with pytest.raises(StepError, match=r"was not pushed: (.|\n)*hint: ") as caught:
        run(Params(image=image, registry_secret="LOGIN" if login else ""), context)
    assert not isinstance(caught.value, StepFailed) and "wrong" not in str(caught.value)
    assert digest_in(registry, image) is None


@pytest.mark.parametrize("secret", ["no-colon-9", "{broken-9", '{"auths": {}}', '{"auth": "9!"}'])
def test_a_secret_that_is_no_login_is_told_without_showing_it(image, registry, step_context, secret):
    with pytest.raises(StepError, match="secret `LOGIN` is not a login for") as caught:
        run(Params(image=image, registry_secret="LOGIN"), step_context(secrets={"LOGIN": secret}))
    assert secret not in str(caught.value)


def test_an_image_that_is_not_there_is_final(docker_engine, registry, step_context):
    with pytest.raises(StepError, match="hint: build it first") as caught:
        run(
            Params(image=f"{registry.host}/never/built:1", registry_secret="LOGIN"),
            step_context(secrets={"LOGIN": registry.login}),
        )
    assert not isinstance(caught.value, StepFailed)


def test_an_undeclared_secret_is_an_error(step_context):
    with pytest.raises(StepError, match="secret `LOGIN` of `registry_secret` is not declared"):
        run(Params(image="x", registry_secret="LOGIN"), step_context())


def test_a_registry_that_is_not_there_may_come_back(docker_engine, small_image, step_context):
    name = "127.0.0.1:9/app:1"
    docker_engine.images.get(small_image).tag(name)
    try:
        with pytest.raises(StepFailed, match="connection refused"):
            run(Params(image=name), step_context())
    finally:
        docker_engine.images.remove(name, force=True)


def test_through_the_host(image, registry, run_step):
    result = run_step(
        "docker_push",
        {"image": image, "registry_secret": "LOGIN"},
        secrets={"LOGIN": "LOGIN"},
        node_env={"LOGIN": registry.login},
    )
    assert result.outcome == "succeeded" and "@sha256:" in result.outputs["digest"]
