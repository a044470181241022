"""Scans become packed sequences: cut around each vertebra, with the truth of each slice."""

from cspine_helpers.packing.cohort import PackSource, pack_cohort, sheets_dir, summary
from cspine_helpers.packing.crop import PackConfig, pack_vertebra
from cspine_helpers.packing.planes import own_plane
from cspine_helpers.packing.slice_truth import known_truth, read_packed_boxes
from cspine_helpers.packing.study import locate
