"""The built-in cohort: synthetic CT of the neck whose every fractured voxel is known."""

from cspine_helpers.phantom.cohort import (
    CohortConfig,
    fracture_marks,
    fracture_truth,
    study_of,
    true_labels,
    true_slice_truth,
)
from cspine_helpers.phantom.scanner import export_cohort, locate_phantom
