"""`orchestrate container build` and `images`: the standard image, by the hash of what it is made from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge.cli.container_engine import engine, say
from bridge.cli.failure import Failure
from bridge.terminal import columns, safe_json

if TYPE_CHECKING:
    from container.image import BuiltImage


@click.command()
@click.option(
    "--tag",
    metavar="NAME",
    envvar="SYGALDRY_IMAGE",
    show_envvar=True,
    help="Name and tag of the image; `sygaldry/zephyr:base` by default.",
)
@click.option(
    "--base",
    metavar="IMAGE",
    envvar="SYGALDRY_BASE",
    show_envvar=True,
    help="Image to start from: any with apt and bash, such as Debian 12.",
)
@click.option(
    "--target",
    type=click.Choice(["full", "slim"]),
    default="full",
    envvar="SYGALDRY_TARGET",
    show_default=True,
    show_envvar=True,
    help="With or without compilers, MPI, node, Go and bazelisk.",
)
@click.option("--environment", default="", metavar="NAME", help="Spack environment that its containers activate.")
@click.option(
    "--spack",
    metavar="SOURCE",
    envvar="SYGALDRY_SPACK",
    show_envvar=True,
    help="Spack: a tag or commit to clone, a folder with a git checkout, or `none`.",
)
@click.option(
    "--spack-packages",
    metavar="SOURCE",
    envvar="SYGALDRY_SPACK_PACKAGES",
    show_envvar=True,
    help="The same for Spack's package repository.",
)
@click.option("--python", "python_version", metavar="3.N", help="Python of the Ray node; by default this project's.")
@click.option(
    "--apt-snapshot", metavar="MOMENT", help="Archive of Debian or Ubuntu to install from, `20260101T000000Z`."
)
@click.option(
    "--site",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with a site's certificates and indexes, see container/site/README.md; $SYGALDRY_SITE by default.",
)
@click.option("--no-cache", is_flag=True, help="Build though there is one, and use no layer of earlier builds.")
@click.option("--quiet", is_flag=True, help="Show nothing of the build, unless it fails.")
@click.option("--json", "as_json", is_flag=True, help="The image as one JSON document on stdout.")
def build(no_cache: bool, quiet: bool, as_json: bool, **given: Any) -> None:
    """Build the standard image, if its content has changed.

    By default nothing is built when there is an image made from the same Dockerfile and inputs.
    Exit code 2 when it cannot be built, 3 when no engine answers.
    """
    from container.image import build as build_image
    from container.image import ensure

    spec = _spec(given)

    def tell(line: str) -> None:
        if not quiet:
            say(line)

    with engine() as client:
        image = build_image(client, spec, tell, use_cache=False) if no_cache else ensure(client, spec, tell)
    if as_json:
        click.echo(safe_json(json.dumps(_document(image), indent=2)))
    else:
        click.echo(f"{spec.name}  {image.content_hash[:16]}  {image.id}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def images(as_json: bool) -> None:
    """List the images that `build` made, the newest first."""
    from container.image import images as our_images

    with engine() as client:
        found = our_images(client)
    if as_json:
        click.echo(safe_json(json.dumps([_document(image) for image in found], indent=2)))
        return
    rows = [
        (
            ", ".join(image.names),
            image.content_hash[:16],
            f"{image.size_bytes / 1e9:.2f} GB",
            image.created_at[:19].replace("T", " "),
            " ".join(
                f"{word} {image.labels[label]}"
                for word, label in (("Ray", "ray_version"), ("Python", "python_version"), ("Spack", "spack_version"))
                if image.labels.get(label)
            )
            + (f" environment {image.labels['environment']}" if image.labels.get("environment") else ""),
        )
        for image in found
    ]
    click.echo("\n".join(columns(("NAMES", "CONTENT", "SIZE", "BUILT (UTC)", "HOLDS"), rows)))


def _spec(given: dict[str, Any]) -> Any:
    from container.image_spec import ImageSpec

    sources = {name: given.pop(name) for name in ("spack", "spack_packages")}
    named = {"name" if key == "tag" else key: value for key, value in given.items() if value is not None}
    for name, source in sources.items():
        if source is not None:
            named[name] = _source(source, name)
    return ImageSpec(**named)


def _source(text: str, name: str) -> str | Path:
    """A tag or commit, a checkout, or nothing: what looks like a path must be one."""
    if text == "none":
        return ""
    if "/" not in text and text not in (".", ".."):
        return text
    folder = Path(text).expanduser().resolve()
    if not folder.is_dir():
        raise Failure(f"`--{name.replace('_', '-')} {text}` is not a folder")
    return folder


def _document(image: "BuiltImage") -> dict[str, Any]:
    return {
        "id": image.id,
        "names": list(image.names),
        "content_hash": image.content_hash,
        "label": image.label,
        "labels": dict(image.labels),
        "size_bytes": image.size_bytes,
        "created_at": image.created_at,
    }


VERBS: tuple[click.Command, ...] = (build, images)
