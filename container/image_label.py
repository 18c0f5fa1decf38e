"""How an image is named in the label of a Ray node: `image=<value>` says that the node runs inside that image."""

import re

CONTENT_HASH_LABEL = "sygaldry.content_hash"
"""Label of our images; its value is the hash of all that they are built from."""
_LONGEST = 63
"""Ray's limit for the value of a label."""
_HASH_LENGTH = 16


def image_label(name: str, content_hash: str) -> str:
    """`<name>@<hash>` in the characters that a Ray label may hold: `sygaldry.zephyr-0123456789abcdef`.

    `content_hash` is hexadecimal, with or without `sha256:`. The hash tells images apart; the name is for people: its
    tag, which may move, is left out, characters may be replaced and its beginning cut. Raises `ValueError`.
    """
    digest = content_hash.removeprefix("sha256:")[:_HASH_LENGTH]
    if not re.fullmatch(rf"[0-9a-f]{{{_HASH_LENGTH}}}", digest):
        raise ValueError(f"content hash: got `{content_hash}`, wanted at least {_HASH_LENGTH} hexadecimal digits")
    repository = re.sub(r"@.*|:[^/]*$", "", name)
    words = re.sub(r"[^A-Za-z0-9_.-]+", ".", repository)[-(_LONGEST - _HASH_LENGTH - 1) :].strip("._-")
    return f"{words}-{digest}" if words else digest
