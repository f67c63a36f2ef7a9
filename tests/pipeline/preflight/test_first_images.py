"""The first images of a dataset, which are decoded before anything is trained."""

from pathlib import Path

import pytest

from data.indexing.index_shards import index_shards
from data.remote.storage import Storage
from pipeline.preflight.shards import unreadable
from tests.support.third_party import picture, write_members


@pytest.mark.parametrize("key", ["a", "a_0.5"])
def test_the_first_image_is_found_also_if_its_key_has_dots(tmp_path: Path, key: str) -> None:
    for content, said in ((picture(0), "None"), (picture(0)[:-200], f"its first image, {key}.jpg, does not decode")):
        write_members(tmp_path / "a-0.tar", [(f"{key}.cls", b"0"), (f"{key}.jpg", content)])
        assert said in str(unreadable(index_shards([str(tmp_path)], overwrite=True).index, Storage()))
