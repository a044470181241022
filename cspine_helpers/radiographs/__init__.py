"""Radiographs of any bone: sources into one image table, groups, a network with a mask, and its evidence."""

from cspine_helpers.radiographs.consolidation import consolidate
from cspine_helpers.radiographs.evaluation import (
    ablation,
    evaluate,
    examples,
    froc,
    shortcut,
    study_metrics,
    study_scores,
    subgroups,
)
from cspine_helpers.radiographs.groups import group_images, leakage, split_images
from cspine_helpers.radiographs.image_table import read_images, read_regions, read_sources
from cspine_helpers.radiographs.mask_cases import MaskCases, judged_images
from cspine_helpers.radiographs.sources.fracatlas import read_fracatlas
