"""Ids made of file names."""

from cspine_helpers.files.paths import check_uids
from cspine_helpers.radiographs.image_ids import file_ids


def test_ids_are_file_names_and_no_two_are_alike():
    names = ["IMG1", "img1", "a b", "a_b", "ä", "..", "CON", "x" * 80, "nan", "骨折", "a/b", "a b"]
    ids = file_ids(names, [f"{n}{name}" for n, name in enumerate(names)])
    check_uids(ids)
    assert len({each.casefold() for each in ids}) == len(names)
    assert ids[3] == "a_b"
    assert ids[4] == "a"
    assert file_ids(["größe"]) == file_ids(["gro\u0308\u00dfe".replace("o\u0308", "ö")]) == ["grosse"]
