"""How well the cached run does on phantoms that nobody has seen: a cohort drawn from another seed.

Nothing was chosen on this cohort: neither weights, nor epoch, nor threshold.

    python benchmarks/fresh_cohort.py [--studies 200] [--seed 4711]
"""

import argparse
import tempfile
from pathlib import Path

from cspine_helpers import labels, metrics
from cspine_helpers.checkpoints import load_run
from cspine_helpers.evaluation.cases import Cases
from cspine_helpers.evaluation.intervals import bootstrap
from cspine_helpers.explain.attention import attention_scores, attention_table
from cspine_helpers.files import paths
from cspine_helpers.inference.prediction import predict
from cspine_helpers.phantom import cohort as phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", default="builtin")
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=4711)
    options = parser.parse_args()
    run = load_run(paths.run_dir(options.run))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "fresh"
        phantom.make_cohort(folder, phantom.CohortConfig(options.studies, options.seed))
        table = labels.read_labels(folder / "train.csv")
        samples = labels.expand(table, table[labels.UID])
        predictions = predict(run, samples, folder / "packed", split="test")
        attention = attention_table(run, samples, folder / "packed")
    truth = predictions["label"]
    print(
        f"{options.studies} studies, seed {options.seed}: {truth.sum()} of {len(truth)} vertebrae fractured"
    )
    cases = Cases.of(predictions)
    print(bootstrap(cases, threshold=run.threshold).round(3).to_string(index=False))
    patients = cases.patients()
    print(f"patient AUROC: {metrics.auroc(patients.label, patients.probability):.3f}")
    print(attention_scores(attention).round(3).to_string())


if __name__ == "__main__":
    main()
