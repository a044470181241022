"""Every picture. Functions return a `Figure`; only `save_figure` writes files."""

from cspine_helpers.figures.calibration import (
    decision_curves,
    predictive_value_curves,
    reliability_diagrams,
)
from cspine_helpers.figures.cohorts import (
    cooccurrence_heatmap,
    fractures_per_patient,
    imbalance_bars,
    leak_picture,
    prevalence_bars,
    split_comparison,
)
from cspine_helpers.figures.curves import (
    confusions,
    guarantee_picture,
    learning_curves,
    pr_curves,
    roc_curves,
    score_histograms,
    threshold_sweep,
    vertebra_against_patient,
)
from cspine_helpers.figures.explanations import (
    Explained,
    agreement_heatmap,
    difference_dots,
    localisation_dots,
    maps_sheet,
    mask_ablation_dots,
    neighbour_dots,
    perturbation_curves,
    sanity_curves,
)
from cspine_helpers.figures.montages import (
    attention_by_level,
    attention_montage,
    attention_vs_truth,
    sequence_montage,
    vertebra_row,
)
from cspine_helpers.figures.patient import patient_picture
from cspine_helpers.figures.radiographs import (
    Overlay,
    ablation_dots,
    close_ups,
    cohort_sheet,
    froc_curves,
    outlined,
    overlay_sheet,
    shortcut_dots,
    split_leaks,
    subgroup_dots,
)
from cspine_helpers.figures.scans import contact_sheet, heights, study_views
from cspine_helpers.figures.style import save_figure
from cspine_helpers.figures.triage import (
    confidence_dots,
    confidence_name,
    deferral_scatter,
    gain_curves,
    recall_at_coverage,
    risk_coverage_curves,
    search_heatmap,
    violation_dots,
    workload_bars,
)
