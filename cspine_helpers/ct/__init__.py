"""A scan becomes an oriented volume in Hounsfield units, and its mask a label map on the same grid."""

from cspine_helpers.ct.masks import find_mask, find_vertebrae, read_label_map
from cspine_helpers.ct.reading import read_ct
