import pandas as pd
import pytest
import torch
from test_training_run import CONFIG
from toy_cohort import make_toy_cohort, tiny_model

from cspine_helpers.cohort import read_cohort
from cspine_helpers.files.paths import fold_dir
from cspine_helpers.labels import UID
from cspine_helpers.packed import sequence_path
from cspine_helpers.runs import read_record
from cspine_helpers.splits import adopt, k_folds, read_split, split_hash, write_split
from cspine_helpers.training import folds as rooms
from cspine_helpers.training.folds import train_folds
from cspine_helpers.training.run import set_aside, train

FOLDS = 3


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return make_toy_cohort(tmp_path_factory.mktemp("toy") / "toy", studies=12)


def in_folds(cohort, folder, **options):
    return train_folds(cohort, folder, model=tiny_model(), config=CONFIG, **{"folds": FOLDS} | options)


def trainings(monkeypatch) -> list:
    """What `train` was given, from now on, in place of a training."""
    given = []
    monkeypatch.setattr(rooms, "train", lambda *arguments, **options: given.append((arguments, options)))
    return given


def test_each_fold_is_a_run_that_never_saw_its_own_patients(cohort, tmp_path, monkeypatch):
    given, folder = trainings(monkeypatch), tmp_path / "run"
    assert list(in_folds(cohort, folder)) == [0, 1, 2]
    table, whole = read_split(folder / "folds.csv", column="fold"), read_cohort(cohort)
    pd.testing.assert_frame_equal(
        table, k_folds(whole.labels, folds=FOLDS, split=whole.split), check_dtype=False
    )
    for number, ((own, place), options) in enumerate(given):
        assert place == folder / f"fold_{number}"
        assert options["resume"]
        learned = {uid for name in ("train", "validation") for uid in own.samples[name][UID]}
        assert learned == set(table[UID][table["fold"] != number])
    assert in_folds(cohort, folder, fold=1).keys() == {1}
    assert given[-1][0][1] == folder / "fold_1"


@pytest.mark.slow
def test_a_stopped_fold_continues_and_finished_ones_are_left(cohort, tmp_path, monkeypatch):
    folder, step, steps = tmp_path / "run", torch.optim.AdamW.step, []

    def stop_in_the_second_fold(optimizer, *arguments, **options):
        steps.append(1)
        if fold_dir(folder, 1).joinpath("run.json").exists():
            raise KeyboardInterrupt
        return step(optimizer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop_in_the_second_fold)
        with pytest.raises(KeyboardInterrupt):
            in_folds(cohort, folder)
    assert not fold_dir(folder, 2).exists()
    first = fold_dir(folder, 0) / "model.safetensors"
    before = first.stat().st_mtime_ns
    histories = in_folds(cohort, folder)
    assert first.stat().st_mtime_ns == before
    assert [len(history) for history in histories.values()] == [2, 2, 2]
    alone = train(
        read_cohort(cohort).of_fold(read_split(folder / "folds.csv", column="fold"), 1),
        tmp_path / "alone",
        model=tiny_model(),
        config=CONFIG,
    )
    one, other = (each.drop(columns="seconds") for each in (histories[1], alone))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    record = read_record(fold_dir(folder, 1))
    found = split_hash(read_split(folder / "folds.csv", column="fold"))
    assert record["data"]["fold"] == {"number": 1, "folds": FOLDS, "folds_sha256": found}
    assert record["cohort"]["counts"]["out_of_fold"]["studies"] > 0


REFUSED = {
    "a fold outside its range": ({"fold": 3}, r"^Folds are numbered 0 to 2; found 3\. Choose one of them\.$"),
    "a fold below it": ({"fold": -1}, r"^Folds are numbered 0 to 2; found -1\."),
    "two folds": ({"folds": 2}, r"^Folds to train on are 3 or more, .* found 2\."),
    "one fold": ({"folds": 1}, r"^folds is 2 or more; found 1\."),
    "more folds than studies": ({"folds": 20}, r"studies are too few: nothing is left for fold"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_and_nothing_is_written(cohort, tmp_path, case):
    options, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        in_folds(cohort, tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_unusable_sequences_of_any_fold_are_refused_before_the_first_is_trained(tmp_path):
    cohort = make_toy_cohort(tmp_path / "toy", studies=12)
    read = read_cohort(cohort)
    sequence_path(read.packed, k_folds(read.labels, folds=3, split=read.split)[UID].iloc[-1], "C2").unlink()
    with pytest.raises(ValueError, match=r"missing"):
        in_folds(cohort, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_own_folds_are_used_and_refused_where_they_share_a_patient(tmp_path, monkeypatch):
    cohort = make_toy_cohort(tmp_path / "toy", studies=12)
    given, whole = trainings(monkeypatch), read_cohort(cohort)
    own = k_folds(whole.labels, folds=3, split=whole.split, seed=7)
    (tmp_path / "run").mkdir()
    own.to_csv(tmp_path / "run" / "folds.csv", index=False)
    adopt(tmp_path / "run" / "folds.csv")
    in_folds(cohort, tmp_path / "run")
    assert [each[0][0].fold["folds_sha256"] for each in given] == [split_hash(own)] * 3
    with pytest.raises(ValueError, match=r"into 3 folds, not 5\. Ask for 3"):
        in_folds(cohort, tmp_path / "run", folds=5)

    one, other = (own[UID][own["fold"] == fold].iloc[0] for fold in (0, 1))
    same = whole.split[UID].replace({one: "p", other: "p"})
    owned = whole.split.assign(patient=same)
    together = owned["split"].where(owned["patient"] != "p", "train")
    write_split(owned.assign(split=together), cohort / "split.csv", replace=True)
    with pytest.raises(ValueError, match=r"All studies of a patient belong to one fold.* \(1\): 'p'"):
        in_folds(cohort, tmp_path / "run")
    assert len(given) == 3


@pytest.mark.parametrize("name", ["run.json", "state.safetensors", "predictions.csv"])
def test_a_folder_that_holds_something_else_is_left(cohort, tmp_path, name):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(FileExistsError, match=f"not trained in folds, or predictions \\('{name}'\\)"):
        in_folds(cohort, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_folds_are_not_trained_over_and_can_be_set_aside(cohort, tmp_path, monkeypatch):
    trainings(monkeypatch)
    in_folds(cohort, tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"folds\.csv"):
        train(cohort, tmp_path / "run", model=tiny_model(), config=CONFIG)
    assert (set_aside(tmp_path / "run") / "folds.csv").is_file()
