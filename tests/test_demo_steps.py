"""The functions of the demo: what they count, how they split, and the picture."""

import ast
import csv
import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

EXAMPLES = Path(__file__).parent.parent / "examples"

SOURCE = '''"""Module.

More.
"""

import os  # not a comment line


class Box:
    """One line."""

    # A comment.
    def open(self):
        return os.name


async def shut():
    pass
'''


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("demo_steps")


def test_lines_are_counted_by_kind_and_symbols_have_their_lines(demo: ModuleType) -> None:
    counts, symbols = demo.count_source(SOURCE)
    assert counts == {"docstrings": 4, "code": 6, "comments": 1, "blank": 7}
    assert sorted(symbols) == [("Box", "class", 9), ("open", "function", 13), ("shut", "function", 17)]


@pytest.mark.parametrize("text", ["def broken(:\n", "a = 1\0\n", "x = " + "(" * 5000 + "\n"])
def test_what_cannot_be_parsed_is_still_counted(demo: ModuleType, text: str) -> None:
    counts, symbols = demo.count_source(text)
    assert counts["unparsed"] == 1
    assert counts["code"] == len(text.splitlines())
    assert symbols == []


@given(st.text(max_size=200))
def test_every_line_has_one_kind(demo: ModuleType, text: str) -> None:
    counts, _ = demo.count_source(text)
    assert sum(counts[kind] for kind in ("code", "docstrings", "comments", "blank")) == len(text.splitlines())


def test_shards_hold_every_file_once_and_weigh_about_the_same(demo: ModuleType, tmp_path: Path) -> None:
    packages = {
        f"package_{number}": {f"{number}/{file}.py": number * 10 + file for file in range(9)} for number in range(9)
    }
    manifest = tmp_path / "packages.json"
    manifest.write_text(json.dumps({"root": "/", "packages": packages}))
    parts = [
        json.loads(Path(path).read_text())["packages"]
        for path in demo.shard_packages(str(manifest), 4, str(tmp_path))["shards"]
    ]
    found = [file for part in parts for files in part.values() for file in files]
    assert sorted(found) == sorted(file for files in packages.values() for file in files)
    weights = [sum(packages[name][file] for name, files in part.items() for file in files) for part in parts]
    assert max(weights) - min(weights) <= 88


def test_the_whole_job_on_a_small_folder(demo: ModuleType, tmp_path: Path) -> None:
    from PIL import Image

    root, output = tmp_path / "root", str(tmp_path / "out")
    (root / "big" / "inner").mkdir(parents=True)
    (root / "big" / "inner" / "a.py").write_text(SOURCE * 3)
    (root / "big" / "b.py").write_text("x = 1\n")
    (root / "single.py").write_text(SOURCE)
    (root / "big.dist-info").mkdir()
    (root / "big.dist-info" / "not_source.py").write_text("x = 1\n")
    (root / "_private.py").write_text("x = 1\n")

    listed = demo.list_packages(str(root), output)
    assert (listed["packages"], listed["files"]) == (2, 3)
    shards = demo.shard_packages(listed["manifest"], 8, output)["shards"]
    assert len(shards) == 3
    counted = [demo.count_shard(shard) for shard in shards]
    merged = demo.merge_counts([count["result"] for count in counted], str(root), output)
    assert merged["lines"] == sum(count["lines"] for count in counted) == 45
    assert merged["largest"] == "big"
    with Path(merged["table"]).open(newline="") as stream:
        rows = {row["package"]: row for row in csv.DictReader(stream)}
    assert rows["big"]["files"] == "2" and rows["single"]["docstrings"] == "4"

    tags = [line.split("\t") for line in Path(merged["tags"]).read_text().splitlines() if not line.startswith("!")]
    assert tags == sorted(tags) and len(tags) == merged["symbols"] == 12
    for name, file, line, _ in tags:
        assert name in Path(file).read_text().splitlines()[int(line.removesuffix(';"')) - 1]

    picture = Path(demo.draw_chart(merged["table"], 20, output)["picture"])
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width == 1200
        colours = image.getcolors(maxcolors=1 << 20)
        assert colours is not None and len(colours) > 10
    assert not list(Path(output).glob("**/.*.part"))


def test_an_empty_folder_is_an_error_with_a_hint(demo: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Python source in `.*`\n\nhint: "):
        demo.list_packages(str(tmp_path), str(tmp_path / "out"))


def test_modules_of_the_examples_parse() -> None:
    assert all(ast.parse(path.read_text()) for path in EXAMPLES.glob("**/*.py") if "output" not in path.parts)
