import json
from pathlib import Path

import pytest

from cltjax.errors import UserError
from cltjax.files import Lock, write_json, write_whole


def test_json_is_read_back_and_leaves_nothing_beside_it(tmp_path: Path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": [1, None]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("sync", [True, False])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, sync: bool):
    path = tmp_path / "a"
    write_whole(path, lambda temporary: temporary.write_text("old"), sync=sync)

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail, sync=sync)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_writer(tmp_path: Path):
    first = Lock(tmp_path, "another capture")
    with pytest.raises(UserError, match="another capture is writing"):
        Lock(tmp_path, "another capture")
    first.close()
    first.close()
    Lock(tmp_path, "another capture").close()
