"""The built-in cohort: synthetic CT of the neck whose every fractured voxel is known."""

from cspine_helpers.phantom.cohort import study_of
from cspine_helpers.phantom.scanner import export_cohort
