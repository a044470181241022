"""Where the model looked, measured against the truth."""

from cspine_helpers.explain.attention import (
    attention_scores,
    attention_table,
    sequence_scores,
    without_attention,
)
from cspine_helpers.explain.localisation import (
    localisation_table,
    localise,
    over_strongest,
    trivial_maps,
)
from cspine_helpers.explain.maps import map_sequences
from cspine_helpers.explain.perturbation import mean_curves
from cspine_helpers.explain.scanner_map import peaks, scanner_map, study_maps, write_scanner_map
