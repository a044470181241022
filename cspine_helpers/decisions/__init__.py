"""From probabilities to calls: thresholds, their guarantees, triage, and the test split, opened once."""

from cspine_helpers.decisions.confidence import (
    CONFIDENCES,
    Confidence,
    cross_fitted_confidence,
    disagreement,
    fit_confidence,
    map_features,
)
from cspine_helpers.decisions.frozen_triage import freeze_triage, read_triage, triage_on_test
from cspine_helpers.decisions.guarantees import (
    RecallTarget,
    guarantee_on_validation,
    guarantee_recall,
    patients_needed,
)
from cspine_helpers.decisions.simulation import simulate_guarantee, simulate_triage
from cspine_helpers.decisions.test_split import (
    DECISION,
    evaluate_on_test,
    freeze,
    read_decision,
    read_openings,
)
from cspine_helpers.decisions.threshold_table import threshold_table
from cspine_helpers.decisions.thresholds import (
    Rule,
    apply_decision,
    choose_decision,
    choose_per_vertebra,
    choose_threshold,
)
from cspine_helpers.decisions.triage import (
    Triage,
    compare_deferral,
    compare_triage,
    deferral_curve,
    evaluate_triage,
    patient_answers,
)
from cspine_helpers.decisions.triage_search import (
    SearchRule,
    patient_confidence,
    search_triage,
    shared_guarantees,
    winner_of,
)
