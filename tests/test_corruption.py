"""Damaged files: refused with their name, or read exactly as before.

Every artefact is damaged 500 times or more, the same way on every run. Where a SHA-256 stands beside a file
(split, manifest, predictions, and run.json for itself and the history), any damage counts. `train.csv` and
`train_bounding_boxes.csv` usually come without one: a digit changed there, or whole rows cut off, is a table
like any other, and only damage to the form is tried (and, for any damage, that what is still read keeps every
rule). The pixels of a packed sequence have theirs in `SHA256SUMS`, which is compared on request.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy_cohort import SIZE, SLICES, make_toy_cohort

from cspine_helpers import labels, packed, predictions, runs, splits
from cspine_helpers.decisions import test_split as frozen
from cspine_helpers.decisions import test_split as openings
from cspine_helpers.decisions.test_split import evaluate_on_test
from cspine_helpers.decisions.thresholds import Rule, choose_decision
from cspine_helpers.files import paths
from cspine_helpers.files.tables import write_table
from cspine_helpers.labels import BOX_COLUMNS, UID, VERTEBRAE
from cspine_helpers.packed import read_manifest, write_manifest
from cspine_helpers.training.trainer import STATE, TrainingState, read_state, save_state

pytestmark = pytest.mark.slow  # half a minute of damages

damaged = settings(max_examples=500, derandomize=True, database=None)
few = settings(damaged, max_examples=150)

BOM, NUL, LATIN, FULL_WIDTH, ARABIC = b"\xef\xbb\xbf", b"\0", b"\xe9", "１".encode(), "١".encode()
EDITS = ("flip", "put", "take", "repeat", "cut")
PIECES = (BOM, NUL, LATIN, FULL_WIDTH, ARABIC, *(bytes([byte]) for byte in b'\r\n\t ,;"#-+.0159eExX{[:n'))
NO_NUMBERS = ("nan", "NaN", "NA", "null", "inf", "-inf", "", "True", "0x1", "１", "١", "1_0", "1;5", '"1,5"',
              "1.5.2", "--1", "#", "1\0", "one", "9" * 400)  # fmt: skip
NO_UIDS = (
    "",
    " 1.2",
    "1.2 ",
    "None",
    "../1",
    "/1",
    "１.2",
    "1.2\0",
    '"1.2\n"',
    '"1,2"',
    "nan",
    "NUL.1",
    "1" * 65,
)


@dataclass(frozen=True)
class Artefact:
    """A file, its bytes, what reads it and what it holds."""

    path: Path
    read: Callable[[], Any]

    @property
    def content(self) -> bytes:
        return ORIGINALS[self.path][0]

    def check(self, content: bytes) -> bool:
        """Whether the file with other bytes is read; then it holds what it held before."""
        self.path.write_bytes(content)
        try:
            found = self.read()
        except (ValueError, FileNotFoundError) as error:
            named = self.path.name.removesuffix(".sha256") in str(error)
            assert named, f"{error!r} does not name {self.path.name}"  # noqa: PT017  # no error is as good
            return False
        expected = ORIGINALS[self.path][1]
        if isinstance(expected, pd.DataFrame):
            pd.testing.assert_frame_equal(found, expected, check_exact=True)
        elif isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(found, expected, strict=True)
        else:
            assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)
        return True


ORIGINALS: dict[Path, tuple[bytes, Any]] = {}


def save_a_state(run: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = TrainingState({"train": {"epochs": 3}}, "sequences", 2, [0.5], [{"epoch": 1, "train_loss": 0.25}])
    save_state(run, state, model, optimizer)


def a_state(run: Path) -> list[Any]:
    state, tensors = read_state(run)
    return [asdict(state), {name: [str(value.dtype), value.tolist()] for name, value in tensors.items()}]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> dict[str, Artefact]:
    """Every artefact of a toy cohort and run; the unsealed ones as people bring them, without a hash."""
    folder = make_toy_cohort(tmp_path_factory.mktemp("cohort") / "toy")
    bare = tmp_path_factory.mktemp("bare")
    run = tmp_path_factory.mktemp("run")
    table = labels.read_labels(folder / "train.csv")
    table[UID] = [
        f"{number}0" for number in (1.1, 1, "00", 2.2, 3, 40, 5, 6.60, 7, 8)
    ]  # as text, not as numbers
    labels.write_labels(table, folder / "train.csv")
    splits.write_split(splits.split_patients(table), folder / "split.csv", replace=True)
    rng = np.random.default_rng(0)
    boxes = pd.DataFrame(rng.uniform(1, 99, (6, 5)), columns=list(BOX_COLUMNS[1:])).assign(
        slice_number=range(97, 103)
    )
    boxes.insert(0, UID, table[UID].iloc[:6].to_numpy())
    labels.write_boxes(boxes, folder / "train_bounding_boxes.csv")
    samples = labels.expand(table, table[UID].iloc[:3])
    made = samples[[UID, "vertebra"]].assign(split="test", label=samples["label"], probability=rng.random(21))
    predictions.write_predictions(made, run / "predictions.csv")
    history = pd.DataFrame(rng.random((4, len(runs.HISTORY_COLUMNS))), columns=list(runs.HISTORY_COLUMNS))
    write_table(history.assign(epoch=range(1, 5)), run / runs.HISTORY)
    (run / "model.safetensors").write_bytes(b"weights")
    data = {"split_sha256": "0" * 64}
    runs.write_record(
        run, {"data": data, "decision": {"threshold": 0.25, "floor": 1}, "classes": list(VERTEBRAE)}
    )
    shutil.copy(run / "predictions.csv", bare)
    write_manifest(read_manifest(folder / "packed")[:10], bare)
    paths.seal_of(bare / "manifest.csv").unlink()
    save_a_state(run)
    chosen = made.assign(split=["validation"] * 14 + ["test"] * 7, label=[0, 1, 0] * 7)
    decision = choose_decision(chosen, Rule("max_youden"))
    frozen.freeze(run, decision, chosen)
    evaluate_on_test(run, chosen)
    sequence = packed.sequence_path(folder / "packed", "1.2.826.0", "C1")
    paths.write_checksums(folder / "packed")
    split = folder / "split.csv"
    found = {
        "labels": Artefact(folder / "train.csv", lambda: labels.read_labels(folder / "train.csv")),
        "boxes": Artefact(
            folder / "train_bounding_boxes.csv",
            lambda: labels.read_boxes(folder / "train_bounding_boxes.csv"),
        ),
        "split": Artefact(split, lambda: splits.read_split(split, table)),
        "seal": Artefact(paths.seal_of(split), lambda: splits.read_split(split, table)),
        "manifest": Artefact(folder / "packed" / "manifest.csv", lambda: read_manifest(folder / "packed")),
        "bare manifest": Artefact(bare / "manifest.csv", lambda: read_manifest(bare)),
        "predictions": Artefact(
            run / "predictions.csv", lambda: predictions.read_predictions(run / "predictions.csv")
        ),
        "bare predictions": Artefact(
            bare / "predictions.csv", lambda: predictions.read_predictions(bare / "predictions.csv")
        ),
        "history": Artefact(run / runs.HISTORY, lambda: runs.read_history(run)),
        "record": Artefact(run / runs.RECORD, lambda: runs.read_record(run)),
        "state": Artefact(run / STATE, lambda: a_state(run)),
        "decision": Artefact(run / frozen.DECISION, lambda: frozen.read_decision(run).record),
        "openings": Artefact(run / openings.OPENINGS, lambda: openings.read_openings(run)),
        "sequence": Artefact(
            sequence, lambda: np.array(packed.open_sequence(sequence, slices=SLICES, size=SIZE))
        ),
    }
    ORIGINALS.update(
        {artefact.path: (artefact.path.read_bytes(), artefact.read()) for artefact in found.values()}
    )
    return found


@pytest.fixture
def artefact(artefacts, request):
    """The artefact of a test's parameter, put back afterwards."""
    chosen = artefacts[request.param]
    yield chosen
    chosen.path.write_bytes(chosen.content)


def each(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("artefact", names, indirect=True)


@st.composite
def garbled(draw: st.DrawFn, content: bytes) -> bytes:
    """One to three edits anywhere: bits flipped, bytes put in, taken out or repeated, the end cut off."""
    for kind in draw(st.lists(st.sampled_from(EDITS), min_size=1, max_size=3)):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.integers(1, 40))
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
        elif kind == "put":
            content = content[:at] + draw(st.sampled_from(PIECES)) + content[at:]
        elif kind == "take":
            content = content[:at] + content[at + length :]
        elif kind == "repeat":
            content = content[: at + length] + content[at:]
        elif kind == "cut":
            content = content[:at]
    return content


@st.composite
def misshapen(draw: st.DrawFn, content: bytes) -> bytes:
    """A table with its form damaged, and no value turned into another that could be meant."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    row = draw(st.integers(1, len(rows) - 1))
    column = draw(st.integers(0, len(rows[0]) - 1))
    kind = draw(st.sampled_from(tuple(SHAPES)))
    return SHAPES[kind](draw, content, rows, row, column)


def table(rows: list[list[str]], delimiter: str = ",") -> bytes:
    return "".join(delimiter.join(row) + "\n" for row in rows).encode()


def with_cell(rows: list[list[str]], row: int, column: int, value: str) -> list[list[str]]:
    return [
        [value if (r, c) == (row, column) else old for c, old in enumerate(line)]
        for r, line in enumerate(rows)
    ]


def cut(draw, content, rows, row, column):
    at = draw(st.integers(0, len(content) - 1))
    assume(not content[:at].endswith(b"\n"))  # whole rows: a shorter table
    return content[:at]


def no_value(draw, content, rows, row, column):
    name = rows[0][column]
    assume(name != "split")  # any text names one
    bad = {UID: NO_UIDS, "vertebra": (*NO_NUMBERS, "C8", "c1"), "slice_truth": [*filter(None, NO_NUMBERS)]}
    return table(with_cell(rows, row, column, draw(st.sampled_from(bad.get(name, NO_NUMBERS)))))


def same_value(draw, content, rows, row, column):
    value, name = rows[row][column], rows[0][column]
    assume(value)
    forms = (
        ['"{}"']
        if name in (UID, "vertebra", "split", "slice_truth")
        else ['"{}"', " {}", "{} ", "0{}", "{}e0"]
    )
    assume(not value.startswith("-"))
    return table(with_cell(rows, row, column, draw(st.sampled_from(forms)).format(value)))


def inserted(draw, content, rows, row, column):
    at = draw(st.integers(0, len(content)))
    return (
        content[:at]
        + draw(st.sampled_from((NUL, LATIN, FULL_WIDTH, ARABIC, BOM, b"\xff\xfe", b'"')))
        + content[at:]
    )


def line(draw, content, rows, row, column):
    text = draw(
        st.sampled_from((",".join(rows[0]), "", "   ", "# note", "\x0b", ",", "," * (len(rows[0]) - 1)))
    )
    return b"\n".join([table(rows[:row])[:-1], text.encode(), table(rows[row:])])


def ragged(draw, content, rows, row, column):
    less = draw(st.booleans())
    wrong = (
        rows[row][:column] + rows[row][column + 1 :]
        if less
        else [*rows[row], draw(st.sampled_from(("", "0", "x")))]
    )
    return table([*rows[:row], wrong, *rows[row + 1 :]])


def columns(draw, content, rows, row, column):
    order = list(range(len(rows[0])))
    kind = draw(st.sampled_from(("order", "less", "twice", "renamed", "index", "extra", "shifted")))
    if kind == "order":
        order = order[column:] + order[:column]
    elif kind == "less":
        order.remove(column)
    elif kind == "twice":  # with other values
        other = [rows[0][column], *reversed([values[column] for values in rows[1:]])]
        return table([[again, *values] for values, again in zip(rows, other, strict=True)])
    elif kind == "renamed":
        old = rows[0][column]
        new = draw(
            st.sampled_from(
                (old + " ", old.upper() + "_", "\ufeff" + old, old[:-1], f'"{old}', "", old + ".1")
            )
        )
        return table([[*rows[0][:column], new, *rows[0][column + 1 :]], *rows[1:]])
    elif kind in ("index", "extra", "shifted"):
        head = {"index": "", "extra": "note"}.get(kind)
        first = [] if head is None else [head]
        return table([[*first, *rows[0]], *([str(n), *values] for n, values in enumerate(rows[1:]))])
    return table([[values[place] for place in order] for values in rows])


def line_ends(draw, content, rows, row, column):
    return content.replace(b"\n", draw(st.sampled_from((b"\r\n", b"\r", b"\n\n", b"\r\r\n", b""))))


def delimiter(draw, content, rows, row, column):
    return table(rows, draw(st.sampled_from((";", "\t", "|", ", ", " ,", ",,", " "))))


def encoding(draw, content, rows, row, column):
    return content.decode().encode(draw(st.sampled_from(("utf-8-sig", "utf-16", "utf-32", "utf-16-be"))))


def trailing_commas(draw, content, rows, row, column):
    first = draw(st.integers(0, 2))
    return table([[*values, ""] if place >= first else values for place, values in enumerate(rows)])


SHAPES: dict[str, Callable[..., bytes]] = {
    "cut": cut,
    "no value": no_value,
    "same value": same_value,
    "inserted": inserted,
    "line": line,
    "ragged": ragged,
    "columns": columns,
    "line ends": line_ends,
    "delimiter": delimiter,
    "encoding": encoding,
    "trailing commas": trailing_commas,
}


@each("split", "manifest", "predictions", "history", "record", "state", "decision", "openings", "seal")
def test_any_damage_to_a_sealed_file_is_refused_or_changes_nothing(artefact):
    @damaged
    @given(garbled(artefact.content))
    def check(content):
        artefact.check(content)

    check()


@each("labels", "boxes", "bare manifest", "bare predictions")
def test_a_table_of_damaged_form_is_refused_or_reads_the_same(artefact):
    read = []

    @damaged
    @given(misshapen(artefact.content))
    def check(content):
        read.append(artefact.check(content))

    check()
    assert not all(read)


@pytest.mark.parametrize("text", ["utf-8-sig", "quotes", "order", "blank lines", "CRLF", "spaces"])
@each("labels", "boxes", "bare manifest", "bare predictions")
def test_what_editors_and_spreadsheets_make_of_a_table_reads_the_same(artefact, text):
    content = artefact.content
    frame = pd.read_csv(artefact.path, dtype=str, keep_default_na=False)
    changed = {
        "utf-8-sig": BOM + content,
        "quotes": frame.to_csv(index=False, quoting=1).encode(),
        "order": frame[frame.columns[::-1]].to_csv(index=False).encode(),
        "blank lines": content.replace(b"\n", b"\n\n"),
        "CRLF": content.replace(b"\n", b"\r\n"),
        "spaces": frame.assign(note="a, b").to_csv(index=False).encode(),
    }
    assert artefact.check(changed[text])


@each("labels", "boxes", "bare manifest", "bare predictions")
def test_whatever_is_still_read_keeps_every_rule(artefact):
    """Any damage to a table without a hash: no other error, and no table that a writer would refuse."""
    rules = {
        "train.csv": labels.validate_labels,
        "train_bounding_boxes.csv": labels.validate_boxes,
        "manifest.csv": lambda found: write_manifest(found, artefact.path.parent / "again"),
        "predictions.csv": predictions.validate_predictions,
    }

    @few
    @given(garbled(artefact.content))
    def check(content):
        artefact.path.write_bytes(content)
        try:
            found = artefact.read()
        except ValueError as error:
            assert artefact.path.name in str(error)  # noqa: PT017  # no error is as good
        else:
            rules[artefact.path.name](found)

    check()


@st.composite
def garbled_array(draw: st.DrawFn, content: bytes) -> bytes:
    """A packed sequence with its header damaged, its end missing or too long, or another array's header."""
    header, body = content[:128], content[128:]
    kind = draw(st.sampled_from(("header", "end", "length", "declared")))
    if kind == "header":
        return draw(garbled(header)) + body
    if kind == "end":
        end = draw(st.integers(-len(body), 300))
        return header + (body[:end] if end < 0 else body + b"\0" * end)
    if kind == "length":
        return header[:8] + draw(st.binary(min_size=2, max_size=2)) + content[10:]
    shape = tuple(draw(st.lists(st.integers(-3, 10**30), max_size=6)))
    descr = draw(st.sampled_from(("|u1", "<f2", "<f4", "<f8", "|O", "<i2", ">f4", "|V6", "|S10", "|b1", "")))
    text = repr({"descr": descr, "fortran_order": draw(st.booleans()), "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@each("sequence")
def test_a_damaged_sequence_is_refused_or_reads_the_same(artefact):
    @damaged
    @given(garbled_array(artefact.content))
    def check(content):
        artefact.check(content)

    check()


@each("sequence")
def test_another_array_in_a_sequences_place_is_refused(artefact):
    array = np.load(artefact.path)
    cells = st.tuples(*(st.integers(0, length - 1) for length in array.shape))
    floats = st.sampled_from((np.float16, np.float32, np.float64))
    outside = st.sampled_from((-0.01, 1.01, 255, -1000, np.nan, np.inf, -np.inf))

    @few
    @given(cells, floats, outside)
    def check_values(cell, dtype, value):
        spoilt = (array / 255).astype(dtype)
        spoilt[cell] = value
        np.save(artefact.path, spoilt)
        with pytest.raises(ValueError, match=rf"{artefact.path.name} .*expected \[0, 1\] and no NaN"):
            artefact.read()

    check_values()
    shapes = st.lists(st.integers(0, 7), max_size=6).map(tuple)
    dtypes = st.sampled_from(tuple(np.sctypeDict.values()))

    @few
    @given(st.one_of(st.just(array.shape), shapes), dtypes)
    def check_form(shape, dtype):
        assume((shape, dtype) != (array.shape, np.uint8) and np.dtype(dtype).kind != "f")
        np.save(artefact.path, np.zeros(shape, dtype))
        with pytest.raises(ValueError, match=artefact.path.name):
            artefact.read()

    check_form()


@each("sequence")
def test_a_changed_pixel_is_found_when_the_checksums_are_compared(artefact):
    folder, uid = artefact.path.parent, artefact.path.name.removesuffix("_1.npy")
    sample = pd.DataFrame({UID: [uid], "vertebra": ["C1"]})

    @few
    @given(st.integers(128, len(artefact.content) - 1), st.integers(1, 255))
    def check(at, change):
        content = bytearray(artefact.content)
        content[at] ^= change
        artefact.path.write_bytes(content)
        assert packed.unusable_sequences(folder, sample, slices=SLICES, size=SIZE) == {}
        bad = packed.unusable_sequences(folder, sample, slices=SLICES, size=SIZE, verify=True)
        assert bad == {(uid, "C1"): "its SHA-256 is not that of SHA256SUMS"}

    check()
    artefact.path.write_bytes(artefact.content)
    assert packed.unusable_sequences(folder, sample, verify=True) == {}


HUGE = """
import resource, sys
from pathlib import Path
from cspine_helpers.packed import open_sequence
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, used + 2**25))
for path in sys.argv[1:]:
    try:
        open_sequence(path)
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
def test_headers_that_declare_huge_arrays_cost_no_memory(tmp_path):
    files = []
    for number, (descr, shape) in enumerate(
        (("|u1", (10**15 // 6, 1, 1, 6)), ("<f8", (10**5, 10**5, 10**5, 6)), ("<f4", (10**200, 1, 1, 6)))
    ):
        text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
        files.append(tmp_path / f"{number}_1.npy")
        files[-1].write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 6000)
    found = subprocess.run([sys.executable, "-c", HUGE, *files], capture_output=True, text=True, check=True)
    lines = found.stdout.splitlines()
    assert [
        f"{file} is not a usable packed sequence: truncated" in line
        for file, line in zip(files, lines, strict=True)
    ] == [True] * 3
