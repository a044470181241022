"""How good probabilities are: cases, bootstrap, reliability, calibration, clinical utility, deferral."""

from cspine_helpers.evaluation.calibration import choose_calibrator, cross_fitted
from cspine_helpers.evaluation.cases import Aggregation, Cases, cleared_by_vertebrae, compare_aggregations
from cspine_helpers.evaluation.clinical_utility import (
    COMPETITION_PREVALENCE,
    SCREENING_PREVALENCE,
    decision_curve,
    predictive_curve,
    restate,
)
from cspine_helpers.evaluation.intervals import bootstrap, compare, per_vertebra
from cspine_helpers.evaluation.reliability import calibration_scores, written_scores
from cspine_helpers.evaluation.selective import (
    compare_selective,
    difference_at_coverage,
    risk_bands,
    risk_coverage,
    selective_scores,
)
from cspine_helpers.metrics import RSNA_COSTS
